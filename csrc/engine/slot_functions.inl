// Part of Engine: what an inner rule and its adjoint do to slots, element by element.

void slot_function(const SlotFunction& f) {
    for (int i = 0; i < f.n_sums; ++i) fill(scalar(f.sums[i], 0), B_, S(0));
    for (int p = 0; p < plan_.n_params;) {
        const int first = p;
        long size = plan_.params[p++].size;
        if (!f.of[first].code) continue;
        while (p < plan_.n_params && f.of[p].runs_on) size += plan_.params[p++].size;
        slot_run(f, first, size);
    }
}

// A number of task b.
S* scalar(int index, long b) const { return ws_ + plan_.scalars + index * plan_.lockstep + b; }

// A run of elements that begins with a parameter's first. Results that no slot of the operands takes are computed where
// they are to stand; the others are copied there.
void slot_run(const SlotFunction& f, int param, long size) {
    const SlotFunctionOf& of = f.of[param];
    const Expression& e = of.code->expression;
    const Param& p = plan_.params[param];
    const int first_number = f.n_ins + f.n_scalars;
    S* memory = ws_ + plan_.blocks_scratch;
    bool alike[kMostPlaces];
    for (long b = 0; b < B_; ++b) {
        if (b == 0 || f.n_scalars > 0) fill_uniform(f, of, p, b, memory, alike);
        S* base[kMostPlaces];
        for (int i = 0; i < e.places; ++i) base[i] = nullptr;
        for (int i = 0; i < f.n_ins; ++i) base[i] = const_cast<S*>(slot_or_weight(f.ins[i], param, b));
        for (int i = 0; i < of.n_numbers; ++i)
            if (p.rates[of.numbers[i]].elementwise) base[first_number + i] = const_cast<S*>(rate(p, of.numbers[i]));
        for (int i = 0; i < f.n_outs; ++i)
            if (of.code->direct[i]) base[e.outputs[i]] = slot(f.outs[i], p, b);
        for (long start = 0; start < size; start += kPointwiseBlock) {
            const long n = least(kPointwiseBlock, size - start);
            auto place = [&](int i) { return base[i] ? base[i] + start : memory + i * kPointwiseBlock; };
            for (const Step* s = e.steps + of.code->n_uniform; s < e.steps + e.n_steps; ++s)
                step_block<S>(*s, n, place, alike);
            const int* results = e.outputs + f.n_outs;
            for (int i = 0; i < f.n_sums; ++i) *scalar(f.sums[i], b) += sum_of_block(n, place(results[i]));
            for (int i = 0; i < of.n_gradients; ++i)
                add_number_gradient(p.rates[of.gradients[i]], start, n, place(results[f.n_sums + i]));
            for (int i = 0; i < f.n_outs; ++i)
                if (e.outputs[i] >= 0 && !of.code->direct[i])
                    copy(place(e.outputs[i]), slot(f.outs[i], p, b) + start, n);
        }
    }
}

// θ_0 in slot 0, which all tasks share.
const S* slot_or_weight(int index, int param, long b) const {
    return index == 0 ? weight(0, param).of(b) : slot(index, plan_.params[param], b);
}

// What is the same for all elements of a task: scalar numbers, constants, and what is computed of them alone. One
// number stands for a block of them, but where a primitive takes none, and for results.
void fill_uniform(const SlotFunction& f, const SlotFunctionOf& of, const Param& p, long b, S* memory,
                  bool* alike) const {
    const Expression& e = of.code->expression;
    double value[kMostPlaces];
    for (int i = 0; i < e.places; ++i) alike[i] = false;
    auto keep = [&](int place, double v) {
        value[place] = v;
        memory[place * kPointwiseBlock] = S(v);
        alike[place] = true;
    };
    int place = f.n_ins;
    for (int i = 0; i < f.n_scalars; ++i) keep(place++, double(*scalar(f.scalars[i], b)));
    for (int i = 0; i < of.n_numbers; ++i, ++place)
        if (!p.rates[of.numbers[i]].elementwise) keep(place, double(*rate(p, of.numbers[i])));
    for (int i = 0; i < e.n_constants; ++i) keep(place++, e.constants[i]);
    const Step* const first = e.steps + of.code->n_uniform;
    for (const Step* s = e.steps; s < first; ++s) {
        step_block<double>(*s, 1, [&](int i) { return value + i; });
        keep(s->out, value[s->out]);
    }
    auto spread = [&](int i) {
        if (i < 0 || !alike[i]) return;
        fill(memory + i * kPointwiseBlock, kPointwiseBlock, S(value[i]));
        alike[i] = false;
    };
    for (const Step* s = first; s < e.steps + e.n_steps; ++s) {
        const bool both = s->b >= 0 && alike[s->a] && alike[s->b];
        for (int i : {s->a, s->b, s->c})
            if (both || !takes_number(s->primitive)) spread(i);
    }
    for (int i = 0; i < e.n_outputs; ++i) spread(e.outputs[i]);
}

S sum_of_block(long n, const S* values) const {
    return sum_of<S>(n, [=](long i) { return values[i]; });
}

void add_number_gradient(const RateOf& r, long start, long n, const S* values) {
    S* to = partial_ + plan_.sums + plan_.rate_offset[r.index];
    if (r.elementwise)
        for (long i = 0; i < n; ++i) to[start + i] += values[i];
    else
        *to += sum_of_block(n, values);
}

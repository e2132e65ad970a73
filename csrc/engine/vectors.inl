// Part of Engine: parameter-sized vectors.

template <class F>
void each_adapted(F f) {
    for (int p = 0; p < plan_.n_params; ++p)
        if (plan_.params[p].adapts)
            for (long b = 0; b < B_; ++b) f(p, plan_.params[p], b);
}

S* slot(int index, const Param& p, long b) const { return ws_ + plan_.slots[index] + b * plan_.parameters + p.offset; }

// Of a parameter that adapts.
const S* rate(const Param& p, int set) const {
    const RateOf& r = p.rates[set];
    return r.packed >= 0 ? arena_ + r.packed : static_cast<const S*>(call_.rates[r.index]);
}

// What a Hessian-vector product is subtracted times; where that is a rate, all parameters have the same.
S product_factor(const Instr& in) const { return in.scaled ? *static_cast<const S*>(call_.rates[0]) : S(1); }

void update(int out, int theta, int grad, int set) {
    each_adapted([&](int index, const Param& p, long b) {
        const S *from = weight(theta, index).of(b), *g = slot(grad, p, b), *a = rate(p, set);
        S *to = slot(out, p, b), alpha = *a;
        if (p.rates[set].elementwise)
            for (long i = 0; i < p.size; ++i) to[i] = from[i] - a[i] * g[i];
        else
            for (long i = 0; i < p.size; ++i) to[i] = from[i] - alpha * g[i];
    });
}

void scale(int out, int vector, int set) {
    each_adapted([&](int, const Param& p, long b) {
        const S *from = slot(vector, p, b), *a = rate(p, set);
        S *to = slot(out, p, b), alpha = *a;
        if (p.rates[set].elementwise)
            for (long i = 0; i < p.size; ++i) to[i] = a[i] * from[i];
        else
            for (long i = 0; i < p.size; ++i) to[i] = alpha * from[i];
    });
}

void add(S factor, int out, int vector) {
    S *to = ws_ + plan_.slots[out], *from = ws_ + plan_.slots[vector];
    for (long i = 0; i < B_ * plan_.parameters; ++i) to[i] += factor * from[i];
}

void accumulate(const Instr& in) {
    auto add = [&](long offset, long sum, long size) {
        for (long b = 0; b < B_; ++b) {
            const S* from = ws_ + plan_.slots[in.vector] + b * plan_.parameters + offset;
            if (in.weighted) {
                const S w = static_cast<const S*>(call_.weights)[t0_ + b];
                put(false, partial_ + sum, size, [=](long i) { return w * from[i]; });
            } else {
                put(false, partial_ + sum, size, [=](long i) { return from[i]; });
            }
        }
    };
    if (plan_.sums == plan_.parameters) return add(0, 0, plan_.sums);  // nothing is factored: the orders agree
    for (int p = 0; p < plan_.n_params; ++p)
        if (const Param& param = plan_.params[p]; param.offset >= 0) add(param.offset, param.sum, param.size);
    for (int i = 0; i < plan_.n_ops; ++i)
        if (plan_.ops[i].low_rank) accumulate_low_rank(plan_.ops[i], in.theta_terms);
}

void rate_gradient(int grad, int adjoint, int set) {
    each_adapted([&](int, const Param& p, long b) {
        const S *g = slot(grad, p, b), *l = slot(adjoint, p, b);
        S* to = partial_ + plan_.sums + plan_.rate_offset[p.rates[set].index];
        if (p.rates[set].elementwise)
            for (long i = 0; i < p.size; ++i) to[i] -= g[i] * l[i];
        else
            *to -= sum_of<S>(p.size, [=](long i) { return g[i] * l[i]; });
    });
}

void load_parameters(int index, int place) {
    each_adapted([&](int param, const Param& p, long b) {
        const void* given = call_.adapted[place * plan_.n_params + param];
        if (!given) return;  // a rule's state of this parameter has no such tensor
        const S* from = static_cast<const S*>(given) + (t0_ + b) * p.size;
        p.taps ? conv_weights_inward(p.o, p.c, p.taps, from, slot(index, p, b)) : copy(from, slot(index, p, b), p.size);
    });
}

void store_parameters(int theta, int place) {
    for (int p = 0; p < plan_.n_params; ++p)
        for (long b = 0; b < B_; ++b) {
            const Param& param = plan_.params[p];
            void* wanted = call_.adapted_out[place * plan_.n_params + p];
            if (!wanted) continue;
            S* to = static_cast<S*>(wanted) + (t0_ + b) * param.size;
            const S* from = weight(theta, p).of(b);
            param.taps ? conv_weights_outward(param.o, param.c, param.taps, from, to) : copy(from, to, param.size);
        }
}

// Of the parameters that adapt: each task's own.
void store_gradients(int vector) {
    each_adapted([&](int param, const Param& p, long b) {
        S* to = static_cast<S*>(call_.adapted_out[param]) + (t0_ + b) * p.size;
        const S* from = slot(vector, p, b);
        p.taps ? conv_weights_outward(p.o, p.c, p.taps, from, to) : copy(from, to, p.size);
    });
}

void store_outputs(int tape_index) {
    const TapeView& tape = view(tape_index);
    S* to = static_cast<S*>(call_.outputs) + place(tape, plan_.features[plan_.outputs]);
    copy(value(tape, plan_.outputs), to, B_ * per_task(tape, plan_.outputs));
}

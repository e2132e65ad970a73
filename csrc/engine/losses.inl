// Part of Engine: losses, their slopes and tangents.

void loss(const Instr& in, int batch, S* losses, bool slope) {
    const TapeView& tape = view(in.tape);
    if (plan_.loss == LossKind::value) return own_loss(in, tape, batch, losses, slope);
    long N = samples(tape), all = plan_.samples[batch], F = plan_.features[plan_.out], size = N * F;
    S d = S(plan_.loss_parameter), factor = S(plan_.loss_factor[batch] * in.weight);
    for (long b = 0; b < B_; ++b) {
        const S* z = value(tape, plan_.out) + b * size;
        S* dz = slope ? ws_ + tape.delta[plan_.out] + b * size : nullptr;
        S weight = batch == 1 && slope ? factor * static_cast<const S*>(call_.weights)[t0_ + b] : factor;
        S value;
        if (plan_.loss == LossKind::cross_entropy) {
            const std::int64_t* y = static_cast<const std::int64_t*>(call_.y[batch]) + place(tape, 1) + b * N;
            S* p = ws_ + tape.loss + b * size;
            value = cross_entropy_value(N, F, d, z, y, p) / S(all);
            if (dz) cross_entropy_slope(N, F, d, weight / S(all), y, p, dz);
        } else {
            const S* y = static_cast<const S*>(call_.y[batch]) + place(tape, F) + b * size;
            LossKind kind = plan_.loss;
            S count = S(all * F), scale = weight / count;
            value =
                losses ? sum_of<S>(size, [=](long i) { return pointwise_value(kind, z[i], y[i], d); }) / count : S(0);
            if (dz) put(true, dz, size, [=](long i) { return scale * pointwise_slope(kind, z[i], y[i], d); });
        }
        if (losses) losses[b] = starts(!in.add) ? factor * value : losses[b] + factor * value;
    }
}

// The output is the loss, but for a factor.
void own_loss(const Instr& in, const TapeView& tape, int batch, S* losses, bool slope) const {
    const S factor = S(plan_.loss_factor[batch] * in.weight), *z = value(tape, plan_.out);
    S* dz = ws_ + tape.delta[plan_.out];
    for (long b = 0; b < B_; ++b) {
        if (losses) losses[b] = (in.add ? losses[b] : S(0)) + factor * z[b];
        if (slope) dz[b] = batch == 1 ? factor * static_cast<const S*>(call_.weights)[t0_ + b] : factor;
    }
}

void loss_tangent(const TapeView& tape) {
    if (plan_.loss == LossKind::value) return fill(ws_ + tangents_.delta[plan_.out], B_, S(0));
    long N = samples(tape), all = plan_.samples[tape.batch], F = plan_.features[plan_.out], size = N * F;
    S d = S(plan_.loss_parameter), factor = S(plan_.loss_factor[0]);  // inner gradients are the support's
    for (long b = 0; b < B_; ++b) {
        const S* tz = ws_ + tangents_.value[plan_.out] + b * size;
        S* ez = ws_ + tangents_.delta[plan_.out] + b * size;
        if (plan_.loss == LossKind::cross_entropy) {
            cross_entropy_tangent(N, F, factor / S(all), ws_ + tape.loss + b * size, tz, ez);
        } else {
            const S* z = value(tape, plan_.out) + b * size;
            const S* y = static_cast<const S*>(call_.y[0]) + place(tape, F) + b * size;
            LossKind kind = plan_.loss;
            S scale = factor / S(all * F);
            put(true, ez, size, [=](long i) { return scale * pointwise_curvature(kind, z[i], y[i], d) * tz[i]; });
        }
    }
}

void cotangent(int tape_index) {
    const TapeView& tape = view(tape_index);
    const S* from = static_cast<const S*>(call_.cotangent) + place(tape, plan_.features[plan_.out]);
    copy(from, ws_ + tape.delta[plan_.out], B_ * per_task(tape, plan_.out));
}

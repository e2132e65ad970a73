// Part of Engine: scaling, shifting and adding up, element by element.

// to (+)= factor · from.
void scaled(double factor, bool first, long size, const S* from, S* to) const {
    S f = S(factor);
    put(first, to, size, [=](long j) { return f * from[j]; });
}

void affine_values(const Op& op, long size, const S* x, S* y) const {
    S f = S(op.f0), c = S(op.f1);
    put(true, y, size, [=](long j) { return f * x[j] + c; });
}

void add_values(const Op& op, long size, const S* x, const S* z, S* y) const {
    S f = S(op.f0);
    put(true, y, size, [=](long j) { return x[j] + f * z[j]; });
}

// One of tx and tz may be null, for zeros.
void add_tangents(const Op& op, long size, const S* tx, const S* tz, S* ty) const {
    if (tx && tz)
        add_values(op, size, tx, tz, ty);
    else if (tx)
        copy(tx, ty, size);
    else
        scaled(op.f0, true, size, tz, ty);
}

// delta(j) is where the j-th input's goes, null where none is wanted.
template <class F>
void add_deltas(const Op& op, long size, const S* dy, F delta) const {
    for (int j = 0; j < 2; ++j)
        if (S* dj = delta(j)) scaled(j ? op.f0 : 1.0, op.delta_first[j], size, dy, dj);
}

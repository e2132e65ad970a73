// Linear maps as sums of scaled copies between boxes; the transpose of a copy is the copy the other way round.

// to[Σ i·out] (+)= factor · from[Σ i·in] over the axes from `axis` on.
template <class S>
void copy_box(const long* sizes, const long* in, const long* out, int axes, S factor, bool add, const S* from, S* to) {
    if (axes > 1) {
        for (long i = 0; i < *sizes; ++i)
            copy_box(sizes + 1, in + 1, out + 1, axes - 1, factor, add, from + i * *in, to + i * *out);
        return;
    }
    const long n = axes ? *sizes : 1, si = axes ? *in : 0, so = axes ? *out : 0;
    if (si == 1 && so == 1) {
        put(!add, to, n, [=](long i) { return factor * from[i]; });
    } else if (so == 0 && n > 1) {
        S sum = factor * sum_of<S>(n, [=](long i) { return from[i * si]; });
        *to = add ? *to + sum : sum;
    } else if (add) {
        for (long i = 0; i < n; ++i) to[i * so] += factor * from[i * si];
    } else {
        for (long i = 0; i < n; ++i) to[i * so] = factor * from[i * si];
    }
}

template <class S>
void copy_box(const Box& box, bool transposed, S factor, bool add, const S* from, S* to) {
    const S f = factor * S(box.factor);
    if (transposed)
        copy_box(box.sizes, box.out_strides, box.in_strides, box.axes, f, add, from + box.out, to + box.in);
    else
        copy_box(box.sizes, box.in_strides, box.out_strides, box.axes, f, add, from + box.in, to + box.out);
}

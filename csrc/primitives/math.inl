// Elementary functions, branch-free in float so that the compilers vectorise loops over them.
// Double goes to libm: it serves gradient checks, not speed.

MAML_FAST_INLINED float as_float(std::int32_t bits) {
    float f;
    __builtin_memcpy(&f, &bits, sizeof f);
    return f;
}

MAML_FAST_INLINED std::int32_t as_bits(float f) {
    std::int32_t bits;
    __builtin_memcpy(&bits, &f, sizeof bits);
    return bits;
}

// Adding 1.5·2²³ rounds to an integer, which is then in the low mantissa bits.
constexpr float kRound = 12582912.0f;

constexpr float kLeastExponent = -87.0f, kLargestExponent = 88.37f, kInfinity = __builtin_inff();

// x = n ln 2 + r with |r| ≤ ln 2 / 2; returns e^r − 1 and 2^n.
MAML_FAST_INLINED float expm1_reduced(float x, float& scale) {
    x = x > kLargestExponent ? kLargestExponent : x;
    x = x < kLeastExponent ? kLeastExponent : x;
    float shifted = x * 1.44269504f + kRound;
    float n = shifted - kRound;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    scale = as_float(std::int32_t((std::uint32_t(as_bits(shifted)) << 23) + 0x3f800000u));
    // Taylor's series to r⁷: its remainder is below 4e-9 of the result on this interval.
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    return p * r * r + r;
}

// 0 and infinity beyond what has a normal result: callers multiply it with large numbers, or divide by it.
MAML_FAST_INLINED float exp_(float x) {
    float scale, p = expm1_reduced(x, scale);
    float inside = p * scale + scale;
    return x > kLargestExponent ? kInfinity : x < kLeastExponent ? 0.0f : inside;
}

MAML_FAST_INLINED float expm1_(float x) {
    float scale, p = expm1_reduced(x, scale);
    float inside = p * scale + (scale - 1.0f);
    return x > kLargestExponent ? kInfinity : inside;
}

// log(1 + u) for u in [0, 1]: 2 artanh(u / (2 + u)).
MAML_FAST_INLINED float log1p_unit(float u) {
    float s = u / (2.0f + u), z = s * s;
    float p = 1.0f / 15.0f;
    p = p * z + 1.0f / 13.0f;
    p = p * z + 1.0f / 11.0f;
    p = p * z + 1.0f / 9.0f;
    p = p * z + 1.0f / 7.0f;
    p = p * z + 1.0f / 5.0f;
    p = p * z + 1.0f / 3.0f;
    return 2.0f * (p * z * s + s);
}

MAML_FAST_INLINED float log_(float x) { return __builtin_logf(x); }

MAML_FAST_INLINED float abs_(float x) { return as_float(as_bits(x) & 0x7fffffff); }

MAML_FAST_INLINED float with_sign(float magnitude, float sign) {
    return as_float((as_bits(magnitude) & 0x7fffffff) | (as_bits(sign) & ~0x7fffffff));
}

MAML_FAST_INLINED float tanh_(float x) {
    float e = expm1_(-2.0f * abs_(x));
    return with_sign(e / (e + 2.0f), x);
}

// erf: an odd polynomial below 1, 1 − e^(−x²) times a polynomial in 1/x above; fitted to 4e-11 and 7e-9.
MAML_FAST_INLINED float erf_(float x) {
    float m = abs_(x);
    float z = m < 1.0f ? m * m : 0.0f;
    float near = -9.67359028e-06f;
    near = near * z + 0.000112682537f;
    near = near * z + -0.000848439639f;
    near = near * z + 0.00522105349f;
    near = near * z + -0.0268654376f;
    near = near * z + 0.112837829f;
    near = near * z + -0.376126379f;
    near = near * z + 1.12837923f;
    float u = m > 1.0f ? 1.0f / m : 1.0f;
    u = u > 0.238095239f ? u : 0.238095239f;
    float far = -0.00902278535f;
    far = far * u + 0.0267397556f;
    far = far * u + 0.0268514492f;
    far = far * u + -0.244563997f;
    far = far * u + 0.498034626f;
    far = far * u + -0.471682876f;
    far = far * u + 0.0418723933f;
    far = far * u + 0.559089601f;
    far = far * u + 0.000265397102f;
    far = 1.0f - exp_(-m * m) * far;
    return m < 1.0f ? near * x : with_sign(far, x);
}

// sin and cos for |x| ≤ kLargeAngle: x = q π/2 + r with π/2 in four exact terms.
constexpr float kLargeAngle = 8192.0f;

MAML_FAST_INLINED void sincos_(float x, float& sine, float& cosine) {
    float shifted = x * 0.636619772f + kRound;
    float q = shifted - kRound;
    std::uint32_t quadrant = std::uint32_t(as_bits(shifted));
    float r = x - q * 1.5703125f;
    r = r - q * 4.8351287841796875e-4f;
    r = r - q * 3.13855707645416259765625e-7f;
    r = r - q * 6.077094383e-11f;
    float z = r * r;
    // polynomials fitted on [-π/4, π/4]: relative errors below 2e-8
    float s = ((-0.000195870365f * z + 0.00833274331f) * z + -0.166666642f) * z * r + r;
    float c = ((2.45433857e-05f * z + -0.00138882687f) * z + 0.0416666642f) * z * z - 0.5f * z + 1.0f;
    bool swap = quadrant & 1;
    float a = swap ? c : s, b = swap ? s : c;
    sine = as_float(std::int32_t(std::uint32_t(as_bits(a)) ^ ((quadrant & 2) << 30)));
    cosine = as_float(std::int32_t(std::uint32_t(as_bits(b)) ^ (((quadrant + 1) & 2) << 30)));
}

MAML_FAST_INLINED double exp_(double x) { return __builtin_exp(x); }
MAML_FAST_INLINED double expm1_(double x) { return __builtin_expm1(x); }
MAML_FAST_INLINED double log1p_unit(double u) { return __builtin_log1p(u); }
MAML_FAST_INLINED double log_(double x) { return __builtin_log(x); }
MAML_FAST_INLINED double abs_(double x) { return __builtin_fabs(x); }
MAML_FAST_INLINED double tanh_(double x) { return __builtin_tanh(x); }
MAML_FAST_INLINED double erf_(double x) { return __builtin_erf(x); }
MAML_FAST_INLINED void sincos_(double x, double& sine, double& cosine) {
    sine = __builtin_sin(x);
    cosine = __builtin_cos(x);
}

MAML_FAST_INLINED float sqrt_(float x) { return __builtin_sqrtf(x); }
MAML_FAST_INLINED double sqrt_(double x) { return __builtin_sqrt(x); }

// Mathematical functions of 16 floats, and under the same names of one double or 64-bit integer: what opcodes.h and
// the kernels' epilogues are written in. Float results are within 4 units in the last place unless said otherwise.
#pragma once
#include "simd.h"

LZ_NAMESPACE_BEGIN

typedef double f64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));

LZ_INLINE f32x like(f32x, double c) { return splat((float)c); }
LZ_INLINE double like(double, double c) { return c; }
LZ_INLINE double fma(double a, double b, double c) { return a * b + c; }
// p(x), coefficients from the highest power to the constant
template <class V, int N> LZ_INLINE V polynomial(const double (&c)[N], V x) {
  V p = like(x, c[0]);
  for (int i = 1; i < N; i++) p = fma(p, x, like(x, c[i]));
  return p;
}

// ---- choices ----
LZ_INLINE f32x choose(i32x mask, f32x yes, f32x no) { return select(mask, yes, no); }
template <class T, class U> LZ_INLINE T choose(bool mask, T yes, U no) { return mask ? yes : T(no); }
LZ_INLINE f32x one_if(i32x mask) { return select(mask, splat(1), splat(0)); }
LZ_INLINE int one_if(bool mask) { return mask; }
LZ_INLINE f32x infinity(f32x) { return splat(__builtin_inff()); }
LZ_INLINE double infinity(double) { return __builtin_inf(); }
template <class V> LZ_INLINE V maximum(V a, V b) { return choose((a > b) | (a != a), a, b); }   // NaN propagates
template <class V> LZ_INLINE V minimum(V a, V b) { return choose((a < b) | (a != a), a, b); }

template <class V> LZ_INLINE V sign(V a) { return choose(a != a, a, V(one_if(a > V{}) - one_if(a < V{}))); }

LZ_INLINE f32x absolute(f32x a) { return (f32x)((i32x)a & 0x7fffffff); }
LZ_INLINE f32x with_sign_of(f32x a, f32x sign) { return (f32x)((i32x)a | ((i32x)sign & (int32_t)0x80000000)); }
LZ_INLINE double absolute(double a) { return __builtin_fabs(a); }
LZ_INLINE int64_t absolute(int64_t a) { return a < 0 ? (int64_t)(0 - (uint64_t)a) : a; }
LZ_INLINE uint64_t absolute(uint64_t a) { return a; }

// ---- rounding ----
LZ_INLINE f32x round(f32x a) {  // half to even; from 2^23 on every float is whole
  const f32x magic = splat(0x1p23f), whole = (absolute(a) + magic) - magic;
  return with_sign_of(choose(absolute(a) < magic, whole, absolute(a)), a);
}
LZ_INLINE f32x floor(f32x a) {
  const f32x whole = round(a);
  return with_sign_of(whole - one_if(whole > a), a);
}
LZ_INLINE double round(double a) { return __builtin_rint(a); }
LZ_INLINE double floor(double a) { return __builtin_floor(a); }

// ---- what is not hot goes lane by lane to the C library ----
#define LZ_DOUBLE_1(name) \
  LZ_INLINE double name(double a) { return __builtin_##name(a); }
#define LZ_LANES_2(name)                                                   \
  LZ_INLINE f32x name(f32x a, f32x b) {                                    \
    for (int i = 0; i < LANES; i++) a[i] = __builtin_##name##f(a[i], b[i]); \
    return a;                                                              \
  }                                                                        \
  LZ_INLINE double name(double a, double b) { return __builtin_##name(a, b); }
#define LZ_EACH(X) X(expm1) X(log10) X(log1p) X(tan) X(sinh) X(cosh) X(asin) X(acos) X(atan) X(asinh) X(acosh) X(atanh)
LZ_EACH(LZ_DOUBLE_1)
LZ_DOUBLE_1(exp) LZ_DOUBLE_1(log) LZ_DOUBLE_1(log2) LZ_DOUBLE_1(sin) LZ_DOUBLE_1(cos)
LZ_DOUBLE_1(tanh) LZ_DOUBLE_1(erf) LZ_DOUBLE_1(sqrt)
LZ_INLINE double pow(double a, double b) { return __builtin_pow(a, b); }
LZ_INLINE double atan2(double a, double b) { return __builtin_atan2(a, b); }
LZ_LANES_2(fmod)

// ---- logarithms: x = 2^e m with m in [sqrt(1/2), sqrt(2)), log(m) by Cephes' polynomial in m - 1 ----
struct LogParts { f32x e, f, tail; };  // log(x) = e ln 2 + f + tail
LZ_INLINE LogParts log_parts(f32x x) {
  const i32x tiny = x < splat(0x1p-126f);
  const i32x bits = (i32x)((u32x)choose(tiny, x * 0x1p23f, x) - 0x3f3504f3);  // unsigned: it wraps for -0
  const f32x e = __builtin_convertvector((bits >> 23) - (tiny & 23), f32x);
  const f32x f = (f32x)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f, z = f * f;
  const f32x p = polynomial({7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
                             -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1}, f);
  return {e, f, fma(p * f, z, z * -0.5f)};
}
LZ_INLINE f32x log_ends(f32x x, f32x inside) {  // the values at and beyond the ends of (0, infinity)
  const f32x outside = choose(x == splat(0), -infinity(x), choose(x < splat(0), splat(__builtin_nanf("")), x));
  return choose((x > splat(0)) & (x < infinity(x)), inside, outside);
}
LZ_INLINE f32x log(f32x x) {
  const LogParts p = log_parts(x);
  return log_ends(x, fma(p.e, splat(0.693359375f), p.f + fma(p.e, splat(-2.12194440e-4f), p.tail)));
}
LZ_INLINE f32x log2(f32x x) {
  const LogParts p = log_parts(x);
  return log_ends(x, fma(p.f + p.tail, splat(1.44269504f), p.e));
}
LZ_INLINE f32x log10(f32x x) {
  const LogParts p = log_parts(x);
  return log_ends(x, fma(p.e, splat(0.30078125f), fma(p.e, splat(2.48745663e-4f), (p.f + p.tail) * 0.434294482f)));
}
LZ_INLINE f32x log1p(f32x x) {  // what 1 + x loses is given back, divided by 1 + x
  const f32x u = x + 1.0f, lost = x - (u - 1.0f);
  const LogParts p = log_parts(u);
  const f32x small = fma(p.e, splat(-2.12194440e-4f), p.tail + lost / u);
  return choose(u == splat(1), x, log_ends(u, fma(p.e, splat(0.693359375f), p.f + small)));
}
template <class V> LZ_INLINE V logaddexp(V a, V b) {  // equal operands: also equal infinities
  return choose(a == b, a + like(a, 0.69314718055994531), maximum(a, b) + log1p(exp(-absolute(a - b))));
}

// ---- circular functions: the quadrant is found in double, which is exact enough up to 2^30 ----
struct Quadrant { f32x rest; i32x number; };  // x = number π/2 + rest
LZ_INLINE Quadrant quadrant(f32x x) {
  f32x8 half[2], rest[2];
  i32x8 number[2];
  memcpy(half, &x, sizeof x);
  for (int i = 0; i < 2; i++) {
    const f64x8 d = __builtin_convertvector(half[i], f64x8);
    const f64x8 shifted = d * 0.63661977236758134 + 0x1.8p52, n = shifted - 0x1.8p52;  // whole in the lowest bits
    rest[i] = __builtin_convertvector(d - n * 1.5707963267948966, f32x8);
    number[i] = __builtin_convertvector((i64x8)shifted, i32x8);
  }
  Quadrant q;
  memcpy(&q.rest, rest, sizeof q.rest);
  memcpy(&q.number, number, sizeof q.number);
  return q;
}
LZ_INLINE f32x sin_of(Quadrant q) {
  const f32x r = q.rest, z = r * r;
  const f32x s = fma(polynomial({-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1}, z), z * r, r);
  const f32x p = polynomial({2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2}, z);
  const f32x c = fma(p, z * z, 1.0f - 0.5f * z);
  const f32x v = choose((q.number & 1) == 0, s, c);
  return (f32x)((i32x)v ^ ((q.number & 2) << 30));
}
LZ_INLINE f32x sin(f32x x) { return sin_of(quadrant(x)); }
LZ_INLINE f32x cos(f32x x) {
  const Quadrant q = quadrant(x);
  return sin_of({q.rest, q.number + 1});
}

LZ_INLINE f32x tan(f32x x) {  // Cephes' polynomial
  const Quadrant q = quadrant(x);
  const f32x r = q.rest, z = r * r;
  const f32x p = polynomial({9.38540185543e-3, 3.11992232697e-3, 2.44301354525e-2, 5.34112807005e-2, 1.33387994085e-1,
                             3.33331568548e-1}, z);
  const f32x t = fma(p * z, r, r);
  return choose((q.number & 1) == 0, t, -1.0f / t);
}

// ---- their inverses, by Cephes' polynomials ----
LZ_INLINE f32x atan_of(f32x y, f32x x) {  // atan(y / x), 0 <= y <= x: near 1 as π/4 + atan((y - x) / (y + x))
  const i32x near = y > x * 0.41421356f;
  const f32x t = choose(near, y - x, y) / choose(near, y + x, x), z = t * t;
  const f32x p = polynomial({8.05374449538e-2, -1.38776856032e-1, 1.99777106478e-1, -3.33329491539e-1}, z);
  return choose(near, splat(0.785398163f), splat(0)) + fma(p * z, t, t);
}
LZ_INLINE f32x atan2(f32x y, f32x x) {
  const f32x a = absolute(y), b = absolute(x);
  const f32x same = choose(a == splat(0), splat(0), splat(0.785398163f));  // both 0 or both infinite
  f32x t = choose((a == b) & (a == a), choose(b == b, same, a), atan_of(choose(a < b, a, b), choose(a < b, b, a)));
  t = choose(a > b, 1.57079633f - t, t);
  t = choose((i32x)x < 0, 3.14159265f - t, t);
  return with_sign_of(choose((a != a) | (b != b), a + b, t), y);
}
LZ_INLINE f32x atan(f32x x) {
  const f32x a = absolute(x), t = atan_of(choose(a > splat(1), splat(1), a), choose(a > splat(1), a, splat(1)));
  return with_sign_of(choose(a > splat(1), 1.57079633f - t, t), x);
}
struct HalfAngle { f32x angle; i32x far; };  // far: of sqrt((1 - |x|) / 2), for |x| > 1/2
LZ_INLINE HalfAngle asin_of(f32x x) {
  const f32x a = absolute(x);
  const i32x far = a > splat(0.5f);
  const f32x z = choose(far, 0.5f - 0.5f * a, a * a), s = choose(far, sqrt(z), a);
  const f32x p = polynomial({4.2163199048e-2, 2.4181311049e-2, 4.5470025998e-2, 7.4953002686e-2, 1.6666752422e-1}, z);
  return {fma(p * z, s, s), far};
}
LZ_INLINE f32x asin(f32x x) {
  const HalfAngle h = asin_of(x);
  return with_sign_of(choose(h.far, fma(h.angle, splat(-2), splat(1.57079633f)), h.angle), x);
}
LZ_INLINE f32x acos(f32x x) {
  const HalfAngle h = asin_of(x);
  const f32x twice = h.angle + h.angle;
  return choose(h.far, choose(x < splat(0), 3.14159265f - twice, twice), 1.57079633f - with_sign_of(h.angle, x));
}

// ---- hyperbolic functions ----
LZ_INLINE f32x expm1(f32x x) {  // as exp: 2^n (1 + p) - 1, halved so that 2^128 is none
  const f32x y = maxf(splat(-30.0f), minf(splat(89.0f), x));
  const f32x n = round_even(y * 1.44269504f), r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), y));
  const f32x p = fma(polynomial({1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
                                 5.0000001201e-1}, r), r * r, r);
  const f32x half = times_power_of_2(splat(0.5f), n);
  return choose(x == splat(0), x, 2.0f * fma(p, half, half - 0.5f));
}
LZ_INLINE f32x half_square(f32x a) {  // e^a / 2 where e^a may be infinite
  const f32x e = exp(a * 0.5f);
  return 0.5f * e * e;
}
LZ_INLINE f32x sinh(f32x x) {
  const f32x a = absolute(x), e = expm1(a);
  return with_sign_of(choose(a > splat(20), half_square(a), 0.5f * (e + e / (e + 1.0f))), x);
}
LZ_INLINE f32x cosh(f32x x) {
  const f32x a = absolute(x), e = exp(a);
  return choose(a > splat(20), half_square(a), 0.5f * (e + 1.0f / e));
}
LZ_INLINE f32x asinh(f32x x) {
  const f32x a = absolute(x), z = a * a;
  const f32x far = log(a) + 0.693147181f, near = log1p(a + z / (1.0f + sqrt(z + 1.0f)));
  return with_sign_of(choose(a > splat(1e9f), far, near), x);
}
LZ_INLINE f32x acosh(f32x x) {
  const f32x t = choose(x < splat(1), splat(__builtin_nanf("")), x - 1.0f);
  return choose(x > splat(1e9f), log(x) + 0.693147181f, log1p(t + sqrt(t * (t + 2.0f))));
}
LZ_INLINE f32x atanh(f32x x) {
  const f32x a = absolute(x);
  return with_sign_of(0.5f * log1p((a + a) / (1.0f - a)), x);
}

// ---- powers: 2^(b log2 a), the logarithm and the product in double ----
LZ_INLINE f64x8 log2_of(f64x8 m) {  // of m in [sqrt(1/2), sqrt(2)): 2 atanh((m - 1) / (m + 1)) / ln 2
  const f64x8 s = (m - 1.0) / (m + 1.0), z = s * s;
  f64x8 p = z * (1.0 / 15) + 1.0 / 13;
  for (int i = 11; i > 0; i -= 2) p = p * z + 1.0 / i;
  return p * s * 2.8853900817779268;
}
LZ_INLINE f32x power_of_positive(f32x a, f32x b) {
  const LogParts parts = log_parts(a);
  const f32x m = parts.f + 1.0f;
  f32x8 halves[4], whole[2], rest[2];
  memcpy(halves, &m, sizeof m);
  memcpy(halves + 2, &b, sizeof b);
  f32x8 exponent[2];
  memcpy(exponent, &parts.e, sizeof parts.e);
  for (int i = 0; i < 2; i++) {
    const auto wide = [](f32x8 v) { return __builtin_convertvector(v, f64x8); };
    f64x8 t = (log2_of(wide(halves[i])) + wide(exponent[i])) * wide(halves[2 + i]);
    t = t < -160.0 ? f64x8{} - 160.0 : t;
    t = t > 160.0 ? f64x8{} + 160.0 : t;
    const f64x8 n = (t + 0x1.8p52) - 0x1.8p52;
    whole[i] = __builtin_convertvector(n, f32x8);
    rest[i] = __builtin_convertvector((t - n) * 0.69314718055994531, f32x8);
  }
  f32x n, r;
  memcpy(&n, whole, sizeof n);
  memcpy(&r, rest, sizeof r);
  const f32x p = polynomial({1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
                             5.0000001201e-1}, r);
  return times_power_of_2(fma(p, r * r, r) + 1.0f, n);
}
LZ_INLINE f32x pow(f32x a, f32x b) {
  const f32x x = absolute(a), half = b * 0.5f, inf = infinity(a);
  const i32x grows = (x > splat(1)) == (b > splat(0)), whole = floor(b) == b, odd = whole & (floor(half) != half);
  const i32x ends = (x == splat(0)) | (x == inf) | (absolute(b) == inf);
  f32x y = choose(ends, choose(grows, inf, splat(0)), power_of_positive(x, b));
  y = choose((a != a) | (b != b), a + b, y);
  y = choose((b == splat(0)) | (a == splat(1)) | ((x == splat(1)) & (absolute(b) == inf)), splat(1), y);
  y = choose((a < splat(0)) & (x < inf) & (whole == 0) & (b == b), splat(__builtin_nanf("")), y);
  return choose(odd & ((i32x)a < 0), -y, y);
}

// ---- sigmoids ----
LZ_INLINE double sigmoid(double x) { return 1 / (1 + exp(-x)); }
LZ_INLINE f32x tanh(f32x x) {
  const f32x z = x * x, a = absolute(x);
  const f32x p = polynomial(
      {-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1}, z);
  const f32x near = fma(p, z * x, x), far = with_sign_of(fma(inverse(exp(minf(splat(20), a + a)) + 1.0f), splat(-2), splat(1)), x);
  return choose(a < splat(0.625f), near, far);
}
LZ_INLINE f32x erf(f32x x) {  // N. Juffa's two polynomials, about 1 unit in the last place
  const f32x t = absolute(x), s = x * x;
  const f32x near = polynomial({-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1,
                                1.28379166e-1}, s);
  const f32x far = polynomial({-1.72853470e-5, 3.83197126e-4, -3.88396438e-3, 2.42546219e-2, -1.06777877e-1,
                               -6.34846687e-1, -1.28717512e-1}, t);
  return choose(t > splat(0.927734375f), with_sign_of(1.0f - exp(fma(far, t, -t)), x), fma(near, x, x));
}
LZ_INLINE f32x square_error(f32x a, f32x square) {  // a² - square, exactly
#if defined(__FMA__)
  return fma(a, a, -square);
#else
  const f32x high = (f32x)((i32x)a & ~0xfff), low = a - high;
  return ((high * high - square) + 2.0f * high * low) + low * low;
#endif
}
// x Φ(x). Φ(-a) = e^(-a²/2) Q(1 / (1 + 0.4 a)): Q is our fit of SciPy's erfcx, to 2e-8 of its value, so that the tail is
// right to 7 units in the last place.
LZ_INLINE f32x gelu(f32x x) {
  const f32x a = absolute(x), z = a * a, t = inverse(fma(a, splat(0.4f), splat(1)));
  const f32x q = polynomial({3.190341032e-2, -1.751270671e-1, 3.783450538e-1, -3.687621314e-1, 1.151236735e-1, -2.451671630e-2,
                             9.054354421e-2, 1.333050582e-1, 1.596083581e-1, 1.595768239e-1, 0}, t);
  const f32x e = exp(z * -0.5f), tail = select(e == splat(0), e, fma(square_error(a, z) * -0.5f, e, e) * q);
  return choose(x < splat(0), x * tail, fma(-minf(splat(30), a), tail, x));
}
LZ_INLINE double gelu(double x) { return x * 0.5 * __builtin_erfc(x * -0.70710678118654752); }
template <class V> LZ_INLINE V gelu_tanh(V x) {  // (1 + tanh u) / 2 is sigmoid(2u)
  return x * sigmoid(x * like(x, 1.5957691216057308) * (1.0f + x * x * like(x, 0.044715)));
}

// M. Giles, "Approximating the erfinv function" (single precision)
template <class V> LZ_INLINE V erfinv_estimate(V x, V w) {
  const V near = polynomial({2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
                             -0.00125372503, -0.00417768164, 0.246640727, 1.50140941}, w - 2.5f);
  const V far = polynomial({-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
                            -0.0076224613, 0.00943887047, 1.00167406, 2.83297682}, sqrt(w) - 3.0f);
  return choose(w < like(w, 5), near, far) * x;
}
LZ_INLINE f32x erfinv(f32x x) {
  const f32x y = erfinv_estimate(x, -log((1.0f - x) * (1.0f + x)));
  return choose(absolute(x) == splat(1), with_sign_of(infinity(x), x), y);
}
LZ_INLINE double erfinv(double x) {
  if (absolute(x) >= 1) return absolute(x) == 1 ? x * __builtin_inf() : __builtin_nan("");
  double y = erfinv_estimate(x, -log1p(-x * x));
  for (int i = 0; i < 2; i++) {  // Newton's steps; erfc keeps the digits near 1; erf'(y) = 2/√π e^(-y²)
    const double error = x < 0 ? __builtin_erfc(-y) - (1 + x) : (1 - x) - __builtin_erfc(y);
    y -= error * 0.88622692545275801 * exp(y * y);
  }
  return y;
}

// ---- division with the divisor's sign, as Python's ----
LZ_INLINE double remainder(double a, double b) {
  const double r = fmod(a, b);
  return r == 0 ? __builtin_copysign(0.0, b) : (r < 0) != (b < 0) ? r + b : r;
}
LZ_INLINE double floor_div(double a, double b) {
  const double r = fmod(a, b);
  return b == 0 ? a / b : round((a - r) / b) - (r != 0 && (r < 0) != (b < 0));
}
LZ_INLINE f32x remainder(f32x a, f32x b) {
  for (int i = 0; i < LANES; i++) a[i] = (float)remainder((double)a[i], (double)b[i]);
  return a;
}
LZ_INLINE f32x floor_div(f32x a, f32x b) {
  for (int i = 0; i < LANES; i++) a[i] = (float)floor_div((double)a[i], (double)b[i]);
  return a;
}
LZ_INLINE int64_t remainder(int64_t a, int64_t b) {
  if (b == 0 || b == -1) return 0;
  const int64_t r = a % b;
  return r && (r < 0) != (b < 0) ? r + b : r;
}
LZ_INLINE int64_t floor_div(int64_t a, int64_t b) {
  if (b == 0) return 0;
  if (b == -1) return (int64_t)(0 - (uint64_t)a);
  return a / b - (a % b && (a % b < 0) != (b < 0));
}
LZ_INLINE uint64_t remainder(uint64_t a, uint64_t b) { return b ? a % b : 0; }
LZ_INLINE uint64_t floor_div(uint64_t a, uint64_t b) { return b ? a / b : 0; }

// ---- integers ----
template <class T> LZ_INLINE T power(T a, T b) {  // by squaring; a negative exponent leaves only ±1
  if (b < 0) return a == 1 ? 1 : a == T(-1) ? (b & 1 ? a : 1) : 0;
  uint64_t result = 1;
  for (uint64_t square = (uint64_t)a, n = (uint64_t)b; n; n >>= 1, square *= square)
    if (n & 1) result *= square;
  return (T)result;
}
LZ_INLINE int64_t pow(int64_t a, int64_t b) { return power(a, b); }
LZ_INLINE uint64_t pow(uint64_t a, uint64_t b) { return power(a, b); }
template <class T> LZ_INLINE T shift_left(T a, T b) { return (uint64_t)b < 64 ? (T)((uint64_t)a << b) : 0; }
template <class T> LZ_INLINE T shift_right(T a, T b) { return (uint64_t)b < 64 ? a >> b : T(a < 0 ? -1 : 0); }

LZ_NAMESPACE_END

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
#define LZ_LANES_1(name)                                             \
  LZ_INLINE f32x name(f32x a) {                                      \
    for (int i = 0; i < LANES; i++) a[i] = __builtin_##name##f(a[i]); \
    return a;                                                        \
  }
#define LZ_DOUBLE_1(name) \
  LZ_INLINE double name(double a) { return __builtin_##name(a); }
#define LZ_LANES_2(name)                                                   \
  LZ_INLINE f32x name(f32x a, f32x b) {                                    \
    for (int i = 0; i < LANES; i++) a[i] = __builtin_##name##f(a[i], b[i]); \
    return a;                                                              \
  }                                                                        \
  LZ_INLINE double name(double a, double b) { return __builtin_##name(a, b); }
#define LZ_EACH(X) X(expm1) X(log10) X(log1p) X(tan) X(sinh) X(cosh) X(asin) X(acos) X(atan) X(asinh) X(acosh) X(atanh)
LZ_EACH(LZ_LANES_1)
LZ_EACH(LZ_DOUBLE_1)
LZ_DOUBLE_1(exp) LZ_DOUBLE_1(log) LZ_DOUBLE_1(log2) LZ_DOUBLE_1(sin) LZ_DOUBLE_1(cos)
LZ_DOUBLE_1(tanh) LZ_DOUBLE_1(erf) LZ_DOUBLE_1(sqrt)
LZ_LANES_2(pow)
LZ_LANES_2(atan2)
LZ_LANES_2(fmod)

// ---- logarithms: x = 2^e m with m in [sqrt(1/2), sqrt(2)), log(m) by Cephes' polynomial in m - 1 ----
struct LogParts { f32x e, f, tail; };  // log(x) = e ln 2 + f + tail
LZ_INLINE LogParts log_parts(f32x x) {
  const i32x tiny = x < splat(0x1p-126f);
  const i32x bits = (i32x)choose(tiny, x * 0x1p23f, x) - 0x3f3504f3;
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

// ---- sigmoids ----
LZ_INLINE double sigmoid(double x) { return 1 / (1 + exp(-x)); }
LZ_INLINE f32x tanh(f32x x) {
  const f32x z = x * x, a = absolute(x);
  const f32x p = polynomial(
      {-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1}, z);
  const f32x near = fma(p, z * x, x), far = with_sign_of(1.0f - 2.0f / (exp(a + a) + 1.0f), x);
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
template <class V> LZ_INLINE V gelu(V x) { return x * 0.5f * (1.0f + erf(x * like(x, 0.70710678118654752))); }
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

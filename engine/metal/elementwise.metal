// elementwise: any chain of pointwise operations as one pass over memory. elementwise.py appends the kernel, written from
// the step's program; these are its functions. Registers are float, long or ulong. Each thread does 4 items, a threadgroup
// apart, so that neighbours read neighbours. What the math mode must be safe for: NaN, infinities and signed zeros
// anywhere, the sums of log1p, and logaddexp, round.
#include "common.h"

constant int AXES [[function_constant(0)]];        // that the operands have when merged, at most 8
constant bool WIDE [[function_constant(1)]];       // offsets need 64 bits

// ---- of every type; NaN propagates ----
template <typename T> METAL_FUNC T sign_of(T a) { return a != a ? a : T(T(a > T(0)) - T(a < T(0))); }
template <typename T> METAL_FUNC T maximum(T a, T b) { return a > b || a != a ? a : b; }
template <typename T> METAL_FUNC T minimum(T a, T b) { return a < b || a != a ? a : b; }

// ---- floats ----
METAL_FUNC float expm1(float x) {                  // 2^n (1 + p) - 1, halved so that 2^128 is none
  const float y = x < -30.0f ? -30.0f : x > 89.0f ? 89.0f : x, n = rint(y * 1.44269504f);
  const float r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, y));
  const float q = fma(fma(fma(fma(fma(1.9875691500e-4f, r, 1.3981999507e-3f), r, 8.3334519073e-3f), r, 4.1665795894e-2f), r,
                          1.6666665459e-1f), r, 5.0000001201e-1f);
  const float p = fma(q, r * r, r), scale = exp2(n - 1.0f);
  return x == 0.0f ? x : 2.0f * fma(p, scale, scale - 0.5f);
}
METAL_FUNC float log1p(float x) {                  // what 1 + x loses is given back, divided by 1 + x
  const float u = 1.0f + x, lost = x - (u - 1.0f);
  return u == 1.0f ? x : u > 0.0f && u < INFINITY ? log(u) + lost / u : log(u);
}
METAL_FUNC float logaddexp(float a, float b) {     // equal operands: also equal infinities
  return a == b ? a + 0.693147181f : maximum(a, b) + log1p(exp(-fabs(a - b)));
}
// M. Giles, "Approximating the erfinv function" (single precision)
METAL_FUNC float erfinv(float x) {
  const float w = -log((1.0f - x) * (1.0f + x));
  const bool near = w < 5.0f;
  const float t = near ? w - 2.5f : sqrt(w) - 3.0f;
  float p = near ? 2.81022636e-08f : -0.000200214257f;
  p = fma(p, t, near ? 3.43273939e-07f : 0.000100950558f);
  p = fma(p, t, near ? -3.5233877e-06f : 0.00134934322f);
  p = fma(p, t, near ? -4.39150654e-06f : -0.00367342844f);
  p = fma(p, t, near ? 0.00021858087f : 0.00573950773f);
  p = fma(p, t, near ? -0.00125372503f : -0.0076224613f);
  p = fma(p, t, near ? -0.00417768164f : 0.00943887047f);
  p = fma(p, t, near ? 0.246640727f : 1.00167406f);
  p = fma(p, t, near ? 1.50140941f : 2.83297682f);
  return fabs(x) == 1.0f ? copysign(INFINITY, x) : p * x;
}
// Division with the divisor's sign, as Python's
METAL_FUNC float modulo(float a, float b) {
  const float r = fmod(a, b);
  return r == 0.0f ? copysign(0.0f, b) : (r < 0.0f) != (b < 0.0f) ? r + b : r;
}
METAL_FUNC float floor_div(float a, float b) {
  const float r = fmod(a, b);
  return b == 0.0f ? a / b : rint((a - r) / b) - float(r != 0.0f && (r < 0.0f) != (b < 0.0f));
}
METAL_FUNC float power(float a, float b) { return pow(a, b); }
METAL_FUNC float negative(float a) { return -a; }
METAL_FUNC float magnitude(float a) { return fabs(a); }
METAL_FUNC float add(float a, float b) { return a + b; }
METAL_FUNC float sub(float a, float b) { return a - b; }
METAL_FUNC float mul(float a, float b) { return a * b; }

// ---- integers: all wrap around, so long does its sums as ulong ----
METAL_FUNC ulong negative(ulong a) { return 0ul - a; }
METAL_FUNC ulong magnitude(ulong a) { return a; }
METAL_FUNC ulong add(ulong a, ulong b) { return a + b; }
METAL_FUNC ulong sub(ulong a, ulong b) { return a - b; }
METAL_FUNC ulong mul(ulong a, ulong b) { return a * b; }
METAL_FUNC ulong modulo(ulong a, ulong b) { return b ? a % b : 0; }
METAL_FUNC ulong floor_div(ulong a, ulong b) { return b ? a / b : 0; }
METAL_FUNC ulong power(ulong a, ulong n) {         // by squaring
  ulong result = 1;
  for (; n; n >>= 1, a *= a)
    if (n & 1) result *= a;
  return result;
}
METAL_FUNC ulong shl(ulong a, ulong b) { return b < 64 ? a << b : 0; }
METAL_FUNC ulong shr(ulong a, ulong b) { return b < 64 ? a >> b : 0; }
METAL_FUNC long negative(long a) { return long(negative(ulong(a))); }
METAL_FUNC long magnitude(long a) { return a < 0 ? negative(a) : a; }
METAL_FUNC long add(long a, long b) { return long(ulong(a) + ulong(b)); }
METAL_FUNC long sub(long a, long b) { return long(ulong(a) - ulong(b)); }
METAL_FUNC long mul(long a, long b) { return long(ulong(a) * ulong(b)); }
METAL_FUNC long modulo(long a, long b) {
  const long r = b == 0 || b == -1 ? 0 : a % b;
  return r && (r < 0) != (b < 0) ? r + b : r;
}
METAL_FUNC long floor_div(long a, long b) {
  if (b == 0 || b == -1) return b ? negative(a) : 0;
  return a / b - long(a % b && (a % b < 0) != (b < 0));
}
METAL_FUNC long power(long a, long b) {            // a negative exponent leaves only ±1
  if (b < 0) return a == 1 || (a == -1 && !(b & 1)) ? 1 : a == -1 ? -1 : 0;
  return long(power(ulong(a), ulong(b)));
}
METAL_FUNC long shl(long a, long b) { return long(shl(ulong(a), ulong(b))); }
METAL_FUNC long shr(long a, long b) { return ulong(b) < 64 ? a >> b : a < 0 ? -1 : 0; }

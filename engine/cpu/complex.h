// complex64 as two floats, and the functions that opcodes.h uses of it. Products and quotients follow the formulas;
// quotients and magnitudes are taken in double, where they cannot overflow. The rest is the C library's.
#pragma once
#include "simd.h"

LZ_NAMESPACE_BEGIN

struct c64 {
  float re, im;
  c64() = default;
  LZ_ALWAYS constexpr c64(float r, float i) : re(r), im(i) {}
  template <class R> LZ_ALWAYS constexpr c64(R real) : re((float)real), im(0) {}
  template <class R> LZ_ALWAYS explicit operator R() const { return (R)re; }   // as in NumPy, the real part
};
LZ_INLINE c64 operator-(c64 a) { return {-a.re, -a.im}; }
LZ_INLINE c64 operator+(c64 a, c64 b) { return {a.re + b.re, a.im + b.im}; }
LZ_INLINE c64 operator-(c64 a, c64 b) { return {a.re - b.re, a.im - b.im}; }
LZ_INLINE c64 operator*(c64 a, c64 b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
LZ_INLINE c64 operator/(c64 a, c64 b) {
  const double x = b.re, y = b.im, d = x * x + y * y;
  return {(float)((a.re * x + a.im * y) / d), (float)((a.im * x - a.re * y) / d)};
}
LZ_INLINE bool operator==(c64 a, c64 b) { return a.re == b.re && a.im == b.im; }
LZ_INLINE bool operator!=(c64 a, c64 b) { return !(a == b); }

LZ_INLINE double magnitude(c64 a) { return __builtin_sqrt((double)a.re * a.re + (double)a.im * a.im); }
LZ_INLINE c64 absolute(c64 a) { return magnitude(a); }
LZ_INLINE c64 infinity(c64) { return __builtin_inff(); }
LZ_INLINE c64 conj(c64 a) { return {a.re, -a.im}; }
LZ_INLINE c64 imag(c64 a) { return a.im; }
LZ_INLINE c64 sign(c64 a) {
  const double r = magnitude(a);
  return r == 0 ? c64(0) : c64((float)(a.re / r), (float)(a.im / r));
}

LZ_INLINE float _Complex of_c64(c64 a) {
  float _Complex z;
  __real__ z = a.re, __imag__ z = a.im;
  return z;
}
LZ_INLINE c64 to_c64(float _Complex z) { return {__real__ z, __imag__ z}; }
#define LZ_COMPLEX(name) \
  LZ_INLINE c64 name(c64 a) { return to_c64(__builtin_c##name##f(of_c64(a))); }
LZ_COMPLEX(exp) LZ_COMPLEX(log) LZ_COMPLEX(sqrt) LZ_COMPLEX(sin) LZ_COMPLEX(cos) LZ_COMPLEX(tan)
LZ_COMPLEX(sinh) LZ_COMPLEX(cosh) LZ_COMPLEX(tanh) LZ_COMPLEX(asin) LZ_COMPLEX(acos) LZ_COMPLEX(atan)
LZ_COMPLEX(asinh) LZ_COMPLEX(acosh) LZ_COMPLEX(atanh)
#undef LZ_COMPLEX
LZ_INLINE c64 log2(c64 a) { return log(a) * c64(1.44269504f); }
LZ_INLINE c64 log10(c64 a) { return log(a) * c64(0.434294482f); }
LZ_INLINE c64 log1p(c64 a) { return log(a + c64(1)); }
LZ_INLINE c64 expm1(c64 a) { return exp(a) - c64(1); }
LZ_INLINE c64 pow(c64 a, c64 b) { return b == c64(0) ? c64(1) : to_c64(__builtin_cpowf(of_c64(a), of_c64(b))); }

LZ_NAMESPACE_END

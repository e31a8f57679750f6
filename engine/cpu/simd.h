// Sixteen lanes everywhere, as compiler vectors: one AVX-512 register, two of AVX2, four of SSE or NEON.
// Only what compilers do badly is written with intrinsics. No std:: here: see DESIGN.md, CPU.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "kernel.h"

LZ_NAMESPACE_BEGIN

constexpr int LANES = 16;
typedef float f32x __attribute__((vector_size(64)));
typedef int32_t i32x __attribute__((vector_size(64)));
typedef uint32_t u32x __attribute__((vector_size(64)));
typedef uint16_t u16x __attribute__((vector_size(32)));
typedef int16_t i16x __attribute__((vector_size(32)));
typedef uint8_t u8x __attribute__((vector_size(16)));

#define LZ_INLINE static inline __attribute__((always_inline, unused))

template <class V, class T> LZ_INLINE V load(const T* p) { V v; memcpy(&v, p, sizeof v); return v; }
template <class V, class T> LZ_INLINE void store(T* p, V v) { memcpy(p, &v, sizeof v); }
LZ_INLINE f32x loadf(const float* p) { return load<f32x>(p); }
LZ_INLINE f32x splat(float x) { return f32x{} + x; }
LZ_INLINE f32x select(i32x mask, f32x yes, f32x no) { return mask ? yes : no; }
#if defined(__AVX512F__)
LZ_INLINE f32x maxf(f32x a, f32x b) { return (f32x)_mm512_max_ps((__m512)a, (__m512)b); }
LZ_INLINE f32x minf(f32x a, f32x b) { return (f32x)_mm512_min_ps((__m512)a, (__m512)b); }
LZ_INLINE f32x times_power_of_2(f32x x, f32x n) { return (f32x)_mm512_scalef_ps((__m512)x, (__m512)n); }
#else
LZ_INLINE f32x maxf(f32x a, f32x b) { return select(a > b, a, b); }  // b where one is NaN
LZ_INLINE f32x minf(f32x a, f32x b) { return select(a < b, a, b); }
LZ_INLINE f32x times_power_of_2(f32x x, f32x n) {  // |n| <= 250; in two factors, for 2^128 is none
  const i32x e = __builtin_convertvector(n, i32x), half = e >> 1;
  return x * (f32x)((half + 127) << 23) * (f32x)((e - half + 127) << 23);
}
#endif

LZ_INLINE float as_f32(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
LZ_INLINE uint32_t as_u32(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
LZ_INLINE float bf16_to_f32(uint16_t h) { return as_f32((uint32_t)h << 16); }
LZ_INLINE uint16_t f32_to_bf16(float f) {  // round to nearest even; NaN stays NaN
  const uint32_t u = as_u32(f);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 64);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
LZ_INLINE float f16_to_f32(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, mag = h & 0x7fff;
  if (mag >= 0x7c00) return as_f32(sign | 0x7f800000 | mag << 13);               // infinity and NaN
  return as_f32(sign | as_u32(as_f32(mag << 13) * 0x1p112f));                    // exact for subnormals too
}
LZ_INLINE uint16_t f32_to_f16(float f) {  // round to nearest even
  const uint32_t u = as_u32(f), sign = u >> 16 & 0x8000, mag = u & 0x7fffffff;
  if (mag > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (mag >= 0x477ff000) return (uint16_t)(sign | 0x7c00);                       // rounds to 2^16 or more
  if (mag < 0x38800000) return (uint16_t)(sign | (as_u32(as_f32(mag) + 0.5f) - 0x3f000000));  // subnormal: 2^-24 steps
  return (uint16_t)(sign | (((mag + 0xfff + (mag >> 13 & 1)) >> 13) - (112 << 10)));
}

LZ_INLINE f32x load_bf16(const uint16_t* p) { return (f32x)(__builtin_convertvector(load<u16x>(p), u32x) << 16); }
LZ_INLINE void store_bf16(uint16_t* p, f32x v) {
  const u32x u = (u32x)v, r = (u + 0x7fff + (u >> 16 & 1)) >> 16, nan = (u >> 16) | 64;
  const u32x is_nan = (u32x)((u & 0x7fffffff) > (u32x{} + 0x7f800000));
  store(p, __builtin_convertvector((r & ~is_nan) | (nan & is_nan), u16x));
}
#if defined(__AVX512F__)
LZ_INLINE f32x load_f16(const uint16_t* p) { return (f32x)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
LZ_INLINE void store_f16(uint16_t* p, f32x v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0)); }
LZ_INLINE float sum(f32x v) { return _mm512_reduce_add_ps((__m512)v); }
LZ_INLINE float max_of(f32x v) { return _mm512_reduce_max_ps((__m512)v); }
LZ_INLINE f32x round_even(f32x v) { return (f32x)_mm512_roundscale_ps((__m512)v, 0); }
LZ_INLINE f32x fma(f32x a, f32x b, f32x c) { return (f32x)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#else
#if defined(__F16C__)
LZ_INLINE f32x load_f16(const uint16_t* p) {
  const __m128i* halves = (const __m128i*)p;
  const __m256 v[2] = {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
  return load<f32x>(v);
}
LZ_INLINE void store_f16(uint16_t* p, f32x x) {
  __m256 v[2];
  store(v, x);
  for (int i = 0; i < 2; i++) _mm_storeu_si128((__m128i*)p + i, _mm256_cvtps_ph(v[i], 0));
}
#else
LZ_INLINE f32x load_f16(const uint16_t* p) {
  f32x v;
  for (int i = 0; i < LANES; i++) v[i] = f16_to_f32(p[i]);
  return v;
}
LZ_INLINE void store_f16(uint16_t* p, f32x v) { for (int i = 0; i < LANES; i++) p[i] = f32_to_f16(v[i]); }
#endif
LZ_INLINE float sum(f32x v) {
  float s[LANES]; memcpy(s, &v, sizeof s);
  for (int n = LANES / 2; n; n /= 2) for (int i = 0; i < n; i++) s[i] += s[i + n];
  return s[0];
}
LZ_INLINE float max_of(f32x v) { float m = v[0]; for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m; return m; }
LZ_INLINE f32x round_even(f32x v) {  // exact below 2^22, which is all that is asked of it
  const f32x magic = splat(12582912.0f);
  return (v + magic) - magic;
}
#if defined(__FMA__)
LZ_INLINE f32x fma(f32x a, f32x b, f32x c) {
  __m256 a2[2], b2[2], c2[2];
  memcpy(a2, &a, 64); memcpy(b2, &b, 64); memcpy(c2, &c, 64);
  for (int i = 0; i < 2; i++) c2[i] = _mm256_fmadd_ps(a2[i], b2[i], c2[i]);
  memcpy(&c, c2, 64);
  return c;
}
#else
LZ_INLINE f32x fma(f32x a, f32x b, f32x c) { return a * b + c; }
#endif
#endif

// e^x to 2 ulp; infinity above 88.73, NaN stays NaN. Cephes' reduction by ln 2 and polynomial. Subnormal results are 0:
// processors take a hundred cycles for each such number, and masked scores are full of them.
LZ_INLINE f32x exp(f32x x) {
  const f32x least = splat(-87.3365f), y = maxf(least, minf(splat(89.0f), x));
  const f32x n = round_even(y * 1.44269504f), r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), y));
  const float c[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  f32x p = splat(1.9875691500e-4f);
  for (int i = 0; i < 5; i++) p = fma(p, r, splat(c[i]));
  p = fma(p, r * r, r) + 1.0f;
  return select(x < least, splat(0), times_power_of_2(p, n));
}
LZ_INLINE f32x sqrt(f32x x) {
#if defined(__AVX512F__)
  return (f32x)_mm512_sqrt_ps((__m512)x);
#else
  for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
LZ_INLINE f32x sigmoid(f32x x) { return 1.0f / (1.0f + exp(-x)); }

LZ_NAMESPACE_END

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
LZ_INLINE f32x inverse(f32x x) {  // 1 / x to 1 ulp, for x in [1, 2^126]: faster than a division
#if defined(__AVX512F__)
  const f32x r = (f32x)_mm512_rcp14_ps((__m512)x);
  return fma(r, fma(-x, r, splat(1)), r);
#else
  return 1.0f / x;
#endif
}
LZ_INLINE f32x sigmoid(f32x x) { return select(x < splat(-87.0f), splat(0), inverse(1.0f + exp(minf(splat(87.0f), -x)))); }

// bytes, a multiple of 16, past the caches, to an address that is a multiple of 16: what is larger than they are only
// pushes out what is still needed, and a plain store reads the line first. Then streamed(), before others may read.
LZ_INLINE void stream(char* to, const void* from, int64_t bytes) {
  int64_t i = 0;
#if defined(__SSE2__)
  const auto some = [&](int64_t end) __attribute__((always_inline)) {
    for (; i < end; i += 16) _mm_stream_si128((__m128i*)(to + i), load<__m128i>((const char*)from + i));
  };
#if defined(__AVX512F__)
  const int64_t head = -(int64_t)(uintptr_t)to & 63;
  some(head < bytes ? head : bytes);
  for (; i + 64 <= bytes; i += 64) _mm512_stream_si512((__m512i*)(to + i), load<__m512i>((const char*)from + i));
#endif
  some(bytes);
#else
  memcpy(to, from, bytes);
#endif
}
LZ_INLINE void streamed() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
constexpr int64_t STREAMED = 16 << 20;  // bytes of a result from which on it is streamed

// n of 16 lanes from memory, nothing past them is touched; `rest` in the others
LZ_INLINE f32x load_some(const float* p, int64_t n, float rest) {
#if defined(__AVX512F__)
  return (f32x)_mm512_mask_loadu_ps((__m512)splat(rest), (__mmask16)((1u << n) - 1), p);
#else
  f32x v = splat(rest);
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
#endif
}
LZ_INLINE void store_some(float* p, f32x v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  for (int i = 0; i < n; i++) p[i] = v[i];
#endif
}
// Lane r of the result is v[r]'s lanes, folded by `of`.
template <class F> LZ_INLINE f32x across(const f32x v[LANES], F of) {
#if defined(__AVX512F__)
  f32x a[8], b[4], c[2];
  for (int i = 0; i < 8; i++) {
    const __m512 x = (__m512)v[2 * i], y = (__m512)v[2 * i + 1];
    a[i] = of((f32x)_mm512_unpacklo_ps(x, y), (f32x)_mm512_unpackhi_ps(x, y));
  }
  for (int i = 0; i < 4; i++) {
    const __m512 x = (__m512)a[2 * i], y = (__m512)a[2 * i + 1];
    b[i] = of((f32x)_mm512_shuffle_ps(x, y, 0x44), (f32x)_mm512_shuffle_ps(x, y, 0xee));
  }
  const auto halves = [&](f32x x, f32x y) __attribute__((always_inline)) {
    return of((f32x)_mm512_shuffle_f32x4((__m512)x, (__m512)y, 0x88), (f32x)_mm512_shuffle_f32x4((__m512)x, (__m512)y, 0xdd));
  };
  for (int i = 0; i < 2; i++) c[i] = halves(b[2 * i], b[2 * i + 1]);
  return halves(c[0], c[1]);
#else
  f32x result;
  for (int r = 0; r < LANES; r++) {
    float lanes[LANES];
    store(lanes, v[r]);
    for (int half = LANES / 2; half; half /= 2)
      for (int j = 0; j < half; j++) lanes[j] = of(lanes[j], lanes[j + half]);
    result[r] = lanes[0];
  }
  return result;
#endif
}

// 16 rows x 16 floats -> out[16][16], transposed; strides in floats. Whole cache lines are read at once, for rows a power
// of two apart share few places in the cache.
#if defined(__AVX512F__)
LZ_INLINE void turn(const float* p, int64_t stride, float* out, int64_t step) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(p + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {  // a[4 g + c]: column c of each quarter, rows 4 g …
    const __m512 low = b[i / 4 * 4 + i % 4 / 2], high = b[i / 4 * 4 + i % 4 / 2 + 2];
    a[i] = i % 2 ? _mm512_shuffle_ps(low, high, 0xee) : _mm512_shuffle_ps(low, high, 0x44);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const __m512 low = a[i / 4 * 8 + i % 4], high = a[i / 4 * 8 + i % 4 + 4];
    b[i] = _mm512_shuffle_f32x4(low, high, 0x88);      // quarters 0 and 2 of rows 8 (i / 4) …
    b[i + 8] = _mm512_shuffle_f32x4(low, high, 0xdd);  // quarters 1 and 3
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const __m512 low = b[i / 4 * 8 + i % 4], high = b[i / 4 * 8 + i % 4 + 4];
    float* to = out + i * step;
    _mm512_storeu_ps(to, _mm512_shuffle_f32x4(low, high, 0x88));
    _mm512_storeu_ps(to + 8 * step, _mm512_shuffle_f32x4(low, high, 0xdd));
  }
}
#else
LZ_INLINE void turn(const float* p, int64_t stride, float* out, int64_t step) {
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < 16; c++) out[c * step + r] = p[r * stride + c];
}
#endif

LZ_NAMESPACE_END

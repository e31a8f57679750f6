// Vectors as wide as the machine's registers, for register tiles and exponentials: simd.h's sixteen lanes live in
// memory where a register holds fewer. Loads and stores convert from and to what caches keep.
#pragma once
#include "../simd.h"

LZ_NAMESPACE_BEGIN

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr float LOG2E = 1.44269504f;

template <int N> struct Lanes {
  typedef float f32 __attribute__((vector_size(N * 4)));
  typedef int32_t i32 __attribute__((vector_size(N * 4)));
  typedef uint32_t u32 __attribute__((vector_size(N * 4)));
  typedef uint16_t u16 __attribute__((vector_size(N * 2)));
  typedef int8_t i8 __attribute__((vector_size(N)));
};
template <class V> using LanesOf = Lanes<sizeof(V) / 4>;
typedef Lanes<W>::f32 vec;
typedef Lanes<W>::i32 ivec;
typedef Lanes<8>::f32 vec8;
typedef Lanes<4>::f32 vec4;

struct f16 { uint16_t v; };
struct bf16 { uint16_t v; };

template <class V> LZ_INLINE V get(const float* p) { return load<V>(p); }
template <class V> LZ_INLINE V get(const bf16* p) {
  return (V)(__builtin_convertvector(load<typename LanesOf<V>::u16>(p), typename LanesOf<V>::u32) << 16);
}
template <class V> LZ_INLINE V get(const int8_t* p) {
  typedef LanesOf<V> L;
  return __builtin_convertvector(__builtin_convertvector(load<typename L::i8>(p), typename L::i32), V);
}
template <class V> LZ_INLINE V get(const f16* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#endif
#if defined(__F16C__)
  if constexpr (sizeof(V) == 32) return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
  typedef typename LanesOf<V>::u32 U;
  const U h = __builtin_convertvector(load<typename LanesOf<V>::u16>(p), U), mag = h & 0x7fff;
  const U sign = (h & 0x8000) << 16, special = (U)(mag >= 0x7c00) & 0x7f800000;
  return (V)((U)((V)(mag << 13) * 0x1p112f) | special | sign);
}

LZ_INLINE void put(float* p, vec x) { store(p, x); }
LZ_INLINE void put(int8_t* p, vec x) {       // to nearest, half to even, below 2^22
  const vec magic = vec{} + 12582912.0f;
  const ivec n = (ivec)(x + magic) - (ivec)magic;
  for (int i = 0; i < W; i++) p[i] = (int8_t)n[i];
}
LZ_INLINE void put(f16* p, vec x) {
#if defined(__AVX512F__)
  store(p, _mm512_cvtps_ph((__m512)x, 0));
#elif defined(__F16C__)
  store(p, _mm256_cvtps_ph((__m256)x, 0));
#else
  for (int i = 0; i < W; i++) p[i].v = f32_to_f16(x[i]);
#endif
}
LZ_INLINE void put(bf16* p, vec x) {
#if defined(__AVX512BF16__)
  store(p, _mm512_cvtneps_pbh((__m512)x));
#else
  for (int i = 0; i < W; i++) p[i].v = f32_to_bf16(x[i]);
#endif
}

template <class V> LZ_INLINE V larger(V a, V b) { return a > b ? a : b; }
#if defined(__AVX512F__)
LZ_INLINE float total(vec v) { return sum(v); }
LZ_INLINE float top(vec v) { return max_of(v); }
#else
LZ_INLINE float total(vec v) {
  vec4 part[W / 4];
  memcpy(part, &v, sizeof v);
  for (int i = 1; i < W / 4; i++) part[0] += part[i];
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}
LZ_INLINE float top(vec v) {
  vec4 part[W / 4];
  memcpy(part, &v, sizeof v);
  for (int i = 1; i < W / 4; i++) part[0] = larger(part[0], part[i]);
  return larger(larger(part[0][0], part[0][2]), larger(part[0][1], part[0][3]));
}
#endif

// 2^x to 2e-7 for x <= 127, 0 below -126: a polynomial in what x exceeds its floor by, scaled.
LZ_INLINE vec exp2(vec x) {
#if defined(__AVX512F__)
  const vec r = (vec)_mm512_reduce_ps((__m512)x, 1);
#else
  x = x > -126.0f ? x : vec{} - 150.0f;
  const vec magic = vec{} + 12582912.0f, n = (x - 0.5f + magic) - magic, r = x - n;
#endif
  vec p = 0.00186713f * r + 0.00901703f;
  p = p * r + 0.05579991f;
  p = p * r + 0.24016445f;
  p = p * r + 0.69315131f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  const ivec e = __builtin_convertvector(n, ivec);
  return (vec)(((ivec)p + (e << 23)) & (e > -127));
#endif
}
LZ_INLINE float exp2(float x) { return exp2(vec{} + x)[0]; }

LZ_NAMESPACE_END

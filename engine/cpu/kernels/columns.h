// Matrices lie row-major in memory and the kernels want W rows side by side, one a lane. columns() turns W rows x 16
// bytes into four vectors: lane r of out[j] is the j-th dword of row r. No weight is ever repacked.
#pragma once
#include "../functions.h"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 suspects its own avx512fintrin.h

LZ_NAMESPACE_BEGIN

LZ_INLINE int size_of(int dtype) { return dtype == LZ_F32 || dtype == LZ_U32 ? 4 : dtype == LZ_F64 ? 8 : dtype == LZ_U8 ? 1 : 2; }
// The widest vectors that the set has registers for: GCC keeps wider ones, such as f32x on AVX2, in memory.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr int W = 16;
#define LZ_MM(name) _mm512_##name
#elif defined(__AVX2__)
constexpr int W = 8;
#define LZ_MM(name) _mm256_##name
#else
constexpr int W = 4;
#define LZ_MM(name) _mm_##name
#endif
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef long long vm __attribute__((vector_size(4 * W), may_alias));  // what intrinsics take
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// f(0) … f(N - 1) with constants for arguments: what GCC 12's unrolling comes too late for, keeping arrays in registers
template <int N, class F> LZ_INLINE void unrolled(const F& f) {
  if constexpr (N > 0) unrolled<N - 1>(f), f(N - 1);
}
#define LZ_LAMBDA(i) [&](int i) __attribute__((always_inline))
#define LZ_LAMBDA2(i, j) [&](int64_t i, int64_t j) __attribute__((always_inline))

LZ_INLINE vf each(float x) { return x - vf{}; }  // folds into an operand, which adding to zero does not
// n of 16 lanes, for the end of a row: nothing past them is touched. A constant n = 16 costs nothing.
LZ_INLINE f32x get(const float* p, int64_t n) {
  if (n == LANES) return loadf(p);
  f32x v{};
  memcpy(&v, p, n * 4);
  return v;
}
LZ_INLINE void put(float* p, f32x v, int64_t n) {
  if (n == LANES) store(p, v);
  else memcpy(p, &v, n * 4);
}
LZ_INLINE f32x get_as(int dtype, const char* p, int64_t n) {
  char some[64] = {};
  if (n < LANES) memcpy(some, p, n * size_of(dtype)), p = some;
  return dtype == LZ_F32 ? loadf((const float*)p) : dtype == LZ_F16 ? load_f16((const uint16_t*)p) : load_bf16((const uint16_t*)p);
}
// f(k, lanes) over n values, sixteen at a time
template <class F> LZ_INLINE void over(int64_t n, const F& f) {
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) f(k, (int64_t)LANES);
  if (k < n) f(k, n - k);
}

// the low bytes of sixteen lanes (GCC 12 takes them apart one by one if left to it)
LZ_INLINE u8x low_bytes(i32x v) {
#if defined(__AVX512F__)
  return (u8x)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__SSE2__)
  __m128i q[4];
  v &= 255;
  memcpy(q, &v, sizeof v);
  return (u8x)_mm_packus_epi16(_mm_packs_epi32(q[0], q[1]), _mm_packs_epi32(q[2], q[3]));
#else
  return __builtin_convertvector((u32x)v, u8x);
#endif
}

// W values of a float type -> f32
LZ_INLINE vf widen_bf16(vh v) { return (vf)(__builtin_convertvector(v, vu) << 16); }
LZ_INLINE vf widen_f16(vh v) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)v);
#else
  vf r;
  for (int i = 0; i < W; i++) r[i] = f16_to_f32(v[i]);
  return r;
#endif
}
template <int DTYPE> LZ_INLINE vf widen(const char* p) {
  return DTYPE == LZ_F32 ? load<vf>(p) : DTYPE == LZ_F16 ? widen_f16(load<vh>(p)) : widen_bf16(load<vh>(p));
}

// FULL: 16 bytes of every row may be read; else only the first n, the others count as zero.
template <bool FULL> LZ_INLINE void columns(const char* p, int64_t stride, int64_t n, vi out[4]) {
#if defined(__SSE2__)
  const char* q[4] = {p, p + 4 * stride, p + 8 * stride, p + 12 * stride};
  for (int i = 0; i < W / 4; i++) asm("" : "+r"(q[i]));  // or GCC keeps sixteen offsets, in vector registers
#if defined(__AVX512VL__)
  const __mmask16 mask = FULL || n >= 16 ? 0xffff : (1u << n) - 1;
  const auto row = [&](int i, int r) {
    const char* from = q[i] + r * stride;
    return FULL ? _mm_loadu_si128((const __m128i*)from) : _mm_maskz_loadu_epi8(mask, from);
  };
#else
  const auto row = [&](int i, int r) {
    __m128i v{};
    memcpy(&v, q[i] + r * stride, FULL || n >= 16 ? 16 : n);
    return v;
  };
#endif
  unrolled<4>(LZ_LAMBDA(r) {
#if defined(__AVX512VL__)
    const __m512i two = _mm512_inserti32x4(_mm512_castsi128_si512(row(0, r)), row(1, r), 1);
    out[r] = (vi)_mm512_inserti32x4(_mm512_inserti32x4(two, row(2, r), 2), row(3, r), 3);
#elif defined(__AVX2__)
    out[r] = (vi)_mm256_inserti128_si256(_mm256_castsi128_si256(row(0, r)), row(1, r), 1);
#else
    out[r] = (vi)row(0, r);
#endif
  });
  vm z[4] = {(vm)out[0], (vm)out[1], (vm)out[2], (vm)out[3]}, t[4];
  for (int i = 0; i < 2; i++) {
    t[i] = LZ_MM(unpacklo_epi32)(z[2 * i], z[2 * i + 1]);
    t[i + 2] = LZ_MM(unpackhi_epi32)(z[2 * i], z[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    out[2 * i] = (vi)LZ_MM(unpacklo_epi64)(t[2 * i], t[2 * i + 1]);
    out[2 * i + 1] = (vi)LZ_MM(unpackhi_epi64)(t[2 * i], t[2 * i + 1]);
  }
#else
  for (int r = 0; r < W; r++) {
    int32_t row[4] = {};
    memcpy(row, p + r * stride, FULL || n >= 16 ? 16 : n);
    for (int j = 0; j < 4; j++) out[j][r] = row[j];
  }
#endif
}

// 16 rows x count values of a float type -> f32 out[count][16], `step` floats from one column to the next.
// Columns past count up to a multiple of 8 may be written too, as zeros.
static inline void columns_f32(int dtype, const char* p, int64_t stride, int64_t count, float* out, int64_t step) {
  const int size = size_of(dtype), each = 16 / size;
#if defined(__AVX512F__)
  for (; dtype == LZ_F32 && count >= 16; count -= 16, p += 64, out += 16 * step) turn((const float*)p, stride / 4, out, step);
#endif
  for (int r = 0; r < LANES; r += W, p += W * stride, out += W)
    for (int64_t c = 0; c < count; c += each) {
      vi z[4];
      if (c + each <= count) columns<true>(p + c * size, stride, 16, z);
      else columns<false>(p + c * size, stride, (count - c) * size, z);
      for (int j = 0; j < 4; j++) {
        const auto put_pair = [&](auto low, auto high) {
          store(out + (c + 2 * j) * step, low);
          store(out + (c + 2 * j + 1) * step, high);
        };
        if (dtype == LZ_F32) store(out + (c + j) * step, z[j]);
        else if (dtype == LZ_BF16) put_pair(z[j] << 16, z[j] & (int32_t)0xffff0000);
        else put_pair(widen_f16(__builtin_convertvector((vu)z[j], vh)), widen_f16(__builtin_convertvector((vu)z[j] >> 16, vh)));
      }
    }
}

// element r of the result is the sum of v[r]'s lanes
LZ_INLINE f32x sums(const vf v[LANES]) {
#if defined(__AVX512F__)
  return across(v, [](f32x x, f32x y) { return x + y; });
#else
  float lanes[LANES][W], total[LANES];
  memcpy(lanes, v, sizeof lanes);
  for (int r = 0; r < LANES; r++) {
    for (int n = W / 2; n; n /= 2) for (int i = 0; i < n; i++) lanes[r][i] += lanes[r][i + n];
    total[r] = lanes[r][0];
  }
  return loadf(total);
#endif
}

LZ_NAMESPACE_END

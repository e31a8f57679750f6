// Matrices lie row-major in memory and the kernels want sixteen rows side by side, one a lane. Everything here
// turns 16 rows x 16 bytes into four vectors: lane r of out[j] is the j-th dword of row r. No weight is ever repacked.
#pragma once
#include "../functions.h"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 suspects its own avx512fintrin.h

LZ_NAMESPACE_BEGIN

LZ_INLINE int size_of(int dtype) { return dtype == LZ_F32 ? 4 : dtype == LZ_F64 ? 8 : 2; }
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// f(0) … f(N - 1) with constants for arguments: what GCC 12's unrolling comes too late for, keeping arrays in registers
template <int N, class F> LZ_INLINE void unrolled(const F& f) {
  if constexpr (N > 0) unrolled<N - 1>(f), f(N - 1);
}
#define LZ_LAMBDA(i) [&](int i) __attribute__((always_inline))
#define LZ_LAMBDA2(i, j) [&](int64_t i, int64_t j) __attribute__((always_inline))

LZ_INLINE f32x each(float x) { return f32x{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }  // folds into an operand
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

// FULL: 16 bytes of every row may be read; else only the first n, the others count as zero.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
template <bool FULL> LZ_INLINE void columns(const char* p, int64_t stride, int64_t n, i32x out[4]) {
  const __mmask16 mask = FULL || n >= 16 ? 0xffff : (1u << n) - 1;
  __m512i z[4], t[4];
  const char* q[4] = {p, p + 4 * stride, p + 8 * stride, p + 12 * stride};
  for (int i = 0; i < 4; i++) asm("" : "+r"(q[i]));  // or GCC keeps sixteen offsets, in vector registers
  const auto row = [&](int i, int r) { return FULL ? _mm_loadu_si128((const __m128i*)(q[i] + r * stride)) : _mm_maskz_loadu_epi8(mask, q[i] + r * stride); };
  for (int r = 0; r < 4; r++) {
    z[r] = _mm512_inserti32x4(_mm512_castsi128_si512(row(0, r)), row(1, r), 1);
    z[r] = _mm512_inserti32x4(_mm512_inserti32x4(z[r], row(2, r), 2), row(3, r), 3);
  }
  for (int i = 0; i < 2; i++) t[i] = _mm512_unpacklo_epi32(z[2 * i], z[2 * i + 1]), t[i + 2] = _mm512_unpackhi_epi32(z[2 * i], z[2 * i + 1]);
  for (int i = 0; i < 2; i++) {
    out[2 * i] = (i32x)_mm512_unpacklo_epi64(t[2 * i], t[2 * i + 1]);
    out[2 * i + 1] = (i32x)_mm512_unpackhi_epi64(t[2 * i], t[2 * i + 1]);
  }
}
#elif defined(__AVX2__)
template <bool FULL> LZ_INLINE void columns(const char* p, int64_t stride, int64_t n, i32x out[4]) {
  const auto row = [&](int r) {
    __m128i v{};
    memcpy(&v, p + r * stride, FULL || n >= 16 ? 16 : n);
    return v;
  };
  for (int half = 0; half < 2; half++) {
    __m256i z[4], t[4];
    for (int i = 0; i < 4; i++) z[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(row(8 * half + i)), row(8 * half + 4 + i), 1);
    for (int i = 0; i < 2; i++) t[i] = _mm256_unpacklo_epi32(z[2 * i], z[2 * i + 1]), t[i + 2] = _mm256_unpackhi_epi32(z[2 * i], z[2 * i + 1]);
    for (int i = 0; i < 2; i++) {
      _mm256_storeu_si256((__m256i*)&out[2 * i] + half, _mm256_unpacklo_epi64(t[2 * i], t[2 * i + 1]));
      _mm256_storeu_si256((__m256i*)&out[2 * i + 1] + half, _mm256_unpackhi_epi64(t[2 * i], t[2 * i + 1]));
    }
  }
}
#else
template <bool FULL> static __attribute__((noinline)) void columns(const char* p, int64_t stride, int64_t n, i32x out[4]) {
  int32_t row[4] = {}, all[4][LANES];
  for (int r = 0; r < LANES; r++) {
    memcpy(row, p + r * stride, FULL || n >= 16 ? 16 : n);
    for (int j = 0; j < 4; j++) all[j][r] = row[j];
  }
  memcpy(out, all, sizeof all);
}
#endif

// 16 rows x count values of a float type -> f32 out[count][16], `step` floats from one column to the next.
// Columns past count up to a multiple of 8 are written too, as zeros.
static inline void columns_f32(int dtype, const char* p, int64_t stride, int64_t count, float* out, int64_t step) {
  const int size = size_of(dtype), each = 16 / size;
  for (int64_t c = 0; c < count; c += each) {
    i32x z[4];
    if (c + each <= count) columns<true>(p + c * size, stride, 16, z);
    else columns<false>(p + c * size, stride, (count - c) * size, z);
    for (int j = 0; j < 4; j++) {
      if (dtype == LZ_F32) {
        store(out + (c + j) * step, z[j]);
      } else if (dtype == LZ_BF16) {
        store(out + (c + 2 * j) * step, z[j] << 16);
        store(out + (c + 2 * j + 1) * step, z[j] & (int32_t)0xffff0000);
      } else {
        const u16x low = __builtin_convertvector((u32x)z[j], u16x), high = __builtin_convertvector((u32x)z[j] >> 16, u16x);
        store(out + (c + 2 * j) * step, load_f16((const uint16_t*)&low));
        store(out + (c + 2 * j + 1) * step, load_f16((const uint16_t*)&high));
      }
    }
  }
}

// lane r of the result is the sum of v[r]'s lanes
LZ_INLINE f32x sums(const f32x v[LANES]) {
  const i32x lo = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29}, hi = lo + 2;
  const i32x lo2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}, hi2 = lo2 + 2;
  const i32x even = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}, odd = even + 4;
  f32x a[8], b[4], c[2];
  for (int i = 0; i < 8; i++) a[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], lo) + __builtin_shuffle(v[2 * i], v[2 * i + 1], hi);
  for (int i = 0; i < 4; i++) b[i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], lo2) + __builtin_shuffle(a[2 * i], a[2 * i + 1], hi2);
  for (int i = 0; i < 2; i++) c[i] = __builtin_shuffle(b[2 * i], b[2 * i + 1], even) + __builtin_shuffle(b[2 * i], b[2 * i + 1], odd);
  return __builtin_shuffle(c[0], c[1], even) + __builtin_shuffle(c[0], c[1], odd);
}

LZ_NAMESPACE_END

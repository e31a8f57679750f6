// Matrix tiles of bf16: C[16 rows][16 tokens] += A[16 rows][32 k] B[16 pairs of k][16 tokens][2], 3 TFLOPS a core where vector
// code has 0.2. A are weights in the order in which they lie, so that expanding them is a stream and nothing is turned but C.
#pragma once
#include "qdot.h"
#include "tiles.h"
#if defined(__AMX_BF16__)

LZ_NAMESPACE_BEGIN

constexpr int AMX_TOKENS = 32, AMX_ROWS = 32;

// Pairs of neighbours of 32 columns as tiles have them: codes of 4 bits come four by four of the first and of the second 16.
template <int BITS> LZ_INLINE __m512i amx_order() {
  if (bits_of(BITS) == 4) return _mm512_setr_epi32(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// x[0..K) -> token t of a block [K / 32][32 tokens][16 pairs] of bf16, and if REST, `rest` bytes after it, of what bf16 left of x.
template <int BITS, bool REST> static void amx_row(const float* x, int64_t K, int64_t rest, char* acts, int64_t t) {
  const __m512i order = amx_order<BITS>();
  acts += t % AMX_TOKENS * 64;
  for (int64_t k = 0; k < K; k += 32, acts += 2048) {
    const auto some = [&](int64_t i) { return i + LANES <= K ? loadf(x + i) : i < K ? get(x + i, K - i) : vf{}; };
    const vf v[2] = {some(k), some(k + LANES)};
    const __m512i high = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    store(acts, _mm512_permutexvar_epi32(order, high));
    if (REST) {
      const vf left[2] = {v[0] - widen_bf16((vh)_mm512_castsi512_si256(high)), v[1] - widen_bf16((vh)_mm512_extracti64x4_epi64(high, 1))};
      store(acts + rest, _mm512_permutexvar_epi32(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)left[1], (__m512)left[0])));
    }
  }
}
// 16 tokens, of which t is one, become columns: [K / 32][2][16 pairs][16 tokens].
static void amx_turn(int64_t K, char* acts, int64_t t) {
  acts += t % AMX_TOKENS / 16 * 1024;
  for (int64_t k = 0; k < K; k += 32, acts += 2048) turn((float*)acts, 16, (float*)acts, 16);
}

// Columns k … k + n of 32 rows of weights -> panel [n / 32][32 rows][32] of bf16; the next 32 rows are fetched.
template <int WIDTH, class F> LZ_INLINE void amx_rows(const char* w, int64_t stride, int64_t K, int64_t k, int64_t n, char* panel, const F& expand) {
  const int64_t whole = least(n, K - k) / 32 * 32;
  w += k * WIDTH / 8;
  for (int r = 0; r < AMX_ROWS; r++, w += stride, panel += 64) {
    const char *p = w, *next = w + AMX_ROWS * stride;
    char* to = panel;
    int64_t i = 0;
    for (; i < whole; i += 32, p += 4 * WIDTH, next += 4 * WIDTH, to += 2048) {
      if (WIDTH > 8 || i % (512 / WIDTH) == 0) __builtin_prefetch(next, 0, 2);
      _mm512_store_si512(to, expand(r, p, k + i, (__mmask32)~0u));
    }
    if (i < n && k + i < K) _mm512_store_si512(to, expand(r, p, k + i, (__mmask32)((1u << (K - k - i)) - 1)));
  }
}
static void amx_expand_bf16(const char* w, int64_t stride, int64_t K, int64_t k, int64_t n, char* panel) {
  amx_rows<16>(w, stride, K, k, n, panel, [](int, const char* p, int64_t, __mmask32 real) __attribute__((always_inline)) {
    return _mm512_maskz_loadu_epi16(real, p);
  });
}

// w = scale q + bias. sides: [32 rows][2][groups] of f32. GROUP: 16, or 32 for all that are larger.
// Codes of 4 bits look the 16 numbers of their group up, of which bf16 is every second word: code i of a quadword becomes the
// index 2 q + 1, and vpermw looks at five bits.
template <int BITS, int GROUP>
static void amx_expand(const char* codes, int64_t stride, int64_t K, int64_t k, int64_t n, int group, const float* sides, int64_t groups, char* panel) {
  const int shift = __builtin_ctz(group);  // groups are powers of two
  const auto side = [&](int r, int64_t k) { return sides + r * 2 * groups + (GROUP == 16 ? k / 16 : k >> shift); };
  const auto number = [&](vf q, const float* s) __attribute__((always_inline)) { return fma(q, each(s[0]), each(s[groups])); };
  if (bits_of(BITS) == 8)
    return amx_rows<8>(codes, stride, K, k, n, panel, [&](int r, const char* p, int64_t k, __mmask32 real) __attribute__((always_inline)) {
      const __m256i q = _mm256_maskz_loadu_epi8(real, p);
      const float* s = side(r, k);
      const vf low = number((vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(q))), s);
      const vf high = number((vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(q, 1))), s + (GROUP == 16));
      return _mm512_maskz_mov_epi16(real, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    });
  vf numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  if (BITS == FP4) numbers = (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load<__m128i>(E2M1)));
  alignas(64) uint8_t from[64];
  for (int i = 0; i < 64; i++) from[i] = (16 * (i / 16) + 4 * (i % 8 / 2) - 1) & 63;
  const __m512i shifts = load<__m512i>(from);
  amx_rows<4>(codes, stride, K, k, n, panel, [&](int r, const char* p, int64_t k, __mmask32 real) __attribute__((always_inline)) {
    const bool whole = real == (__mmask32)~0u;
    const __m512i q = _mm512_broadcast_i32x4(whole ? load<__m128i>(p) : _mm_loadu_si64(p));
    const __m512i index = _mm512_or_si512(_mm512_multishift_epi64_epi8(shifts, q), _mm512_set1_epi16(1));
    const auto table = [&](const float* s) __attribute__((always_inline)) { return (__m512i)((vi)number(numbers, s) + 0x8000); };
    const float* s = side(r, k);
    const __m512i line = _mm512_permutexvar_epi16(index, table(s));
    if (!whole) return _mm512_maskz_mov_epi16(0x0f0f0f0f, line);
    return GROUP == 16 ? _mm512_mask_permutexvar_epi16(line, 0xf0f0f0f0, index, table(s + 1)) : line;
  });
}

// Tiles 0 to 3 += a [K / 32][32][32] times b [K / 32][2][16 pairs of k][16][2]. Not tall: only 16 rows of a are real, not
// wide: only 16 columns of b. REST: a second product with what bf16 left of b, `rest` bytes behind it.
template <bool REST = false> LZ_INLINE void amx_multiply(const char* a, const char* b, int64_t K, bool tall, bool wide, int64_t rest = 0) {
  for (int64_t k = 0; k < K; k += 32, a += 2048, b += 2048) {
    _tile_loadd(4, a, 64);
    if (tall) _tile_loadd(5, a + 1024, 64);
    unrolled<1 + REST>(LZ_LAMBDA(pass) {
      _tile_loadd(6, b + pass * rest, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (tall) _tile_dpbf16ps(2, 5, 6);
      if (wide) {
        _tile_loadd(7, b + pass * rest + 1024, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (tall) _tile_dpbf16ps(3, 5, 7);
      }
    });
  }
}

LZ_NAMESPACE_END
#endif

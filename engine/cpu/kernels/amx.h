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

// Columns k … k + 128 of 32 rows of weights -> panel [4][32 rows][32] of bf16, zeros past K; the next 32 rows are fetched in the
// order in which they lie. `row` is called before each row, and `between` after it: what else there is to do meanwhile.
constexpr int AMX_COLUMNS = 128;
template <int WIDTH, class R, class F, class G>
LZ_INLINE void amx_rows(const char* w, int64_t stride, int64_t K, int64_t k, char* panel, const R& row, const F& expand, const G& between) {
  const char* next = w + AMX_ROWS * (stride + k * WIDTH / 8);
  w += k * WIDTH / 8;
  for (int r = 0; r < AMX_ROWS; r++, w += stride, next += AMX_COLUMNS * WIDTH / 8, panel += 64) {
    const auto some = [&](int i, __mmask32 real) __attribute__((always_inline)) {
      _mm512_store_si512(panel + i * 2048, expand(r, w + i * 4 * WIDTH, k + 32 * i, real));
    };
    row(r);
    unrolled<WIDTH / 4>(LZ_LAMBDA(i) { __builtin_prefetch(next + 64 * i, 0, 2); });
    if (K - k >= AMX_COLUMNS) unrolled<4>(LZ_LAMBDA(i) { some(i, ~0u); });
    else for (int64_t i = 0, n = K - k; n > 0; i++, n -= 32) some(i, n < 32 ? (1u << n) - 1 : ~0u);
    between(r);
  }
}
template <class G> static void amx_expand_bf16(const char* w, int64_t stride, int64_t K, int64_t k, char* panel, const G& between) {
  amx_rows<16>(w, stride, K, k, panel, [](int) {}, [](int, const char* p, int64_t, __mmask32 real) __attribute__((always_inline)) {
    return _mm512_maskz_loadu_epi16(real, p);
  }, between);
}

// w = scale q + bias; scales and biases `stride_s` bytes from a row to the next. GROUP: 16, or 32 for all that are larger.
// Codes of 4 bits look the 16 numbers of their group up, of which bf16 is the upper half: code q becomes the bytes 4 q + 2 and
// 4 q + 3, and vpermb looks at six bits. Codes of 8 bits become the second byte of 2^15 + q.
template <int BITS, int GROUP, class G>
static void amx_expand(const char* codes, int64_t stride, const char* scales, const char* biases, int64_t stride_s, int dtype, int group,
                       int64_t K, int64_t k, char* panel, const G& between) {
  constexpr bool BYTES = bits_of(BITS) == 8;
  const int shift = __builtin_ctz(group);  // groups are powers of two
  const int64_t first = k >> shift, count = least((K >> shift) - first, GROUP == 16 ? 8 : 4), at = first * size_of(dtype);
  alignas(64) float scale[LANES], bias[LANES];
  const auto row = [&](int r) __attribute__((always_inline)) {
    const char *p = scales + r * stride_s, *q = biases + r * stride_s;
    const vf s = along(dtype, p, first, count, 0), b = along(dtype, q, first, count, 0);
    store(scale, s);
    store(bias, BYTES ? fma(s, splat(-32768), b) : b);
    __builtin_prefetch(p + AMX_ROWS * stride_s + at, 0, 2);
    __builtin_prefetch(q + AMX_ROWS * stride_s + at, 0, 2);
  };
  const auto number = [&](vf q, int64_t k) __attribute__((always_inline)) {
    const int64_t g = (GROUP == 16 ? k / 16 : k >> shift) - first;
    return fma(q, each(scale[g]), each(bias[g]));
  };
  alignas(64) uint8_t from[64];
  if constexpr (BYTES) {
    for (int i = 0; i < 64; i++) from[i] = i / 4;
    const __m512i low = load<__m512i>(from), high = _mm512_add_epi8(low, _mm512_set1_epi8(16)), power = _mm512_set1_epi32(0x47000000);
    amx_rows<8>(codes, stride, K, k, panel, row, [&](int, const char* p, int64_t k, __mmask32 real) __attribute__((always_inline)) {
      const __m512i q = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(real, p));
      const auto half = [&](__m512i which, int64_t k) __attribute__((always_inline)) {
        return (__m512)number((vf)_mm512_mask_permutexvar_epi8(power, 0x2222222222222222, which, q), k);
      };
      const __m512i line = (__m512i)_mm512_cvtne2ps_pbh(half(high, GROUP == 16 ? k + 16 : k), half(low, k));
      return real == (__mmask32)~0u ? line : _mm512_maskz_mov_epi16(real, line);
    }, between);
  } else {
    vf numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (BITS == FP4) numbers = (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load<__m128i>(E2M1)));
    for (int i = 0; i < 64; i++) from[i] = (16 * (i / 16) + 4 * (i % 8 / 2) - 2) & 63;
    const __m512i shifts = load<__m512i>(from), upper = _mm512_set1_epi16(0x0302), code = _mm512_set1_epi8(60);
    amx_rows<4>(codes, stride, K, k, panel, row, [&](int, const char* p, int64_t k, __mmask32 real) __attribute__((always_inline)) {
      const bool whole = real == (__mmask32)~0u;
      const __m512i q = _mm512_broadcast_i32x4(whole ? load<__m128i>(p) : _mm_loadu_si64(p));
      const __m512i index = _mm512_ternarylogic_epi32(_mm512_multishift_epi64_epi8(shifts, q), code, upper, 0xea);  // a & b | c
      const auto table = [&](int64_t k) __attribute__((always_inline)) { return (__m512i)((vi)number(numbers, k) + 0x8000); };
      const __m512i line = _mm512_permutexvar_epi8(index, table(k));
      if (!whole) return _mm512_maskz_mov_epi16(0x0f0f0f0f, line);
      return GROUP == 16 ? _mm512_mask_permutexvar_epi8(line, 0xff00ff00ff00ff00, index, table(k + 16)) : line;
    }, between);
  }
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

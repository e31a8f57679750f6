// Matrix tiles of bf16: C[16 tokens][16 rows] += A[16][32] B[32][16], 3 TFLOPS a core where vector code has 0.2.
// Weights of any kind become panels [K / 32][2][16 pairs of k][16 rows][2], that is tiles as the unit wants them.
#pragma once
#include "qdot.h"
#include "tiles.h"
#if defined(__AMX_BF16__)

LZ_NAMESPACE_BEGIN

constexpr int AMX_TOKENS = 32, AMX_ROWS = 32;

// x[0..K) -> token t of a block [K / 32][32 tokens][32] of bf16, and if SPLIT, `rest` bytes after it, of what bf16 left of x.
template <bool SPLIT> static void amx_row(const float* x, int64_t K, int64_t rest, char* acts, int64_t t) {
  acts += t % AMX_TOKENS * 64;
  over(round_up(K, 32), LZ_LAMBDA2(k, n) {
    const vf v = k + n <= K ? loadf(x + k) : k < K ? get(x + k, K - k) : vf{};
    const __m256bh high = _mm512_cvtneps_pbh((__m512)v);
    memcpy(acts + k / 32 * 2048 + k % 32 * 2, &high, 32);
    if (SPLIT) {
      const __m256bh low = _mm512_cvtneps_pbh((__m512)(v - load_bf16((const uint16_t*)&high)));
      memcpy(acts + rest + k / 32 * 2048 + k % 32 * 2, &low, 32);
    }
  });
}

// where the pair (k, k + 1) of rows r .. r + 15 goes
LZ_INLINE uint32_t* amx_place(uint32_t* panel, int64_t k, int r) { return panel + (k / 32 * 2 + r / 16) * 256 + k % 32 / 2 * 16; }

static void amx_expand_bf16(const char* w, int64_t stride, int64_t K, uint32_t* panel) {
  for (int r = 0; r < AMX_ROWS; r += LANES)
    for (int64_t k = 0; k < round_up(K, 32); k += 8) {
      vi z[4] = {};
      if (k + 8 <= K) columns<true>(w + r * stride + k * 2, stride, 16, z);
      else if (k < K) columns<false>(w + r * stride + k * 2, stride, (K - k) * 2, z);
      for (int j = 0; j < 4; j++) store(amx_place(panel, k + 2 * j, r), z[j]);
    }
}

// w = scale q + bias, in bf16. A code set in the mantissa of 1.0 is 1 + q / 2^BITS: no conversion, one fma.
template <int BITS>
static void amx_expand(const char* codes, int64_t stride, int64_t K, int group, const float* scale, const float* bias, uint32_t* panel) {
  constexpr int WIDTH = bits_of(BITS), CHUNK = 128 / WIDTH, EACH = 32 / WIDTH, TOP = 23 - WIDTH, MASK = ((1 << WIDTH) - 1) << TOP;
  const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);  // of FP4, doubled
  const int shift = __builtin_ctz(group);  // groups are powers of two
  for (int r = 0; r < AMX_ROWS; r += LANES)
    for (int64_t k = 0; k < round_up(K, 32); k += CHUNK) {
      vi z[4] = {};
      if (k + CHUNK <= K) columns<true>(codes + r * stride + k * WIDTH / 8, stride, 16, z);
      else if (k < K) columns<false>(codes + r * stride + k * WIDTH / 8, stride, (K - k) * WIDTH / 8, z);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const int64_t g = ((k + j * EACH) >> shift) * AMX_ROWS + r;
        const vf one = loadf(scale + g), s = one * (float)(1 << WIDTH), b = loadf(bias + g) - s;
        const auto weight = [&](int i) {
          if (BITS == FP4) return (vi)((vf)_mm512_permutexvar_ps((__m512i)((u32x)z[j] >> 4 * i), numbers) * one) + 0x8000;
          const vi at = i * WIDTH <= TOP ? z[j] << (TOP - i * WIDTH) : (vi)((u32x)z[j] >> (i * WIDTH - TOP));
          return (vi)fma((vf)((at & MASK) | 0x3f800000), s, b) + 0x8000;
        };
#pragma GCC unroll 4
        for (int i = 0; i < EACH; i += 2)
          store(amx_place(panel, k + j * EACH + i, r), (weight(i + 1) & (int32_t)0xffff0000) | (vi)((u32x)weight(i) >> 16));
      }
    }
}

// y[32][32] (+)= A panel over K inputs, two by two tiles, or one by two if no more than 16 tokens are real.
// SPLIT: a second product with what bf16 left of A.
template <bool SPLIT>
static void amx_tile(const uint32_t* panel, int64_t K, const char* acts, bool half, int64_t rest, float* y, bool add) {
  constexpr int STEP = AMX_ROWS * 4;
  load_c(y, STEP, add);
  for (int64_t k = 0; k < K; k += 32, panel += 512, acts += 2048) {
    _tile_loadd(6, panel, 64);
    _tile_loadd(7, panel + 256, 64);
    unrolled<1 + SPLIT>(LZ_LAMBDA(pass) {
      _tile_loadd(4, acts + pass * rest, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (!half) {
        _tile_loadd(5, acts + pass * rest + 1024, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    });
  }
  store_c(y, STEP, half);
}

LZ_NAMESPACE_END
#endif

// Sixteen tokens by AMX: tiles of 16 rows of codes, a group at a time, times 16 tokens of int8. Codes are unpacked as they
// lie, without turning them. Bytes moved: every code once; the next rows are fetched meanwhile.
#pragma once
#include "qdot.h"
#include "tiles.h"
#if defined(__AMX_INT8__)

LZ_NAMESPACE_BEGIN

// 16 rows of weights: codes as they lie, and f32 scales and biases, one an activation group, [groups / 16][2][16 rows][16].
struct Sixteen {
  const char* codes;
  int64_t stride, K;
  const float* sides;
};

LZ_INLINE bool any16(const char* p) { return load<uint64_t>(p) | load<uint64_t>(p + 8); }
// Tokens m … 15 of a block count as zeros.
static void clear_rest(const Codes& c, char* acts, int m) {
  float* d = c.d(acts) + m;
  for (int64_t g = 0; g < 2 * c.groups(); g++) memset(d + g * LANES, 0, (LANES - m) * 4);
  for (int64_t g = 0; g < c.groups(); g++) memset(c.fine(acts) + g * LANES + m, 0, LANES - m);
}

// 64 codes to bytes: of each A, even ones and then odd ones
template <int BITS, int A> LZ_INLINE __m512i spread(const char* p, __mmask64 real) {
  if (BITS == 8) return _mm512_maskz_loadu_epi8(real, p);
  const auto qwords = [](int a, int b, int c, int d, int e, int f, int g, int h) { return _mm512_setr_epi64(a, b, c, d, e, f, g, h); };
  const __m512i from = A == 64 ? qwords(0, 1, 2, 3, 0, 1, 2, 3) : A == 32 ? qwords(0, 1, 0, 1, 2, 3, 2, 3) : qwords(0, 0, 1, 1, 2, 2, 3, 3);
  const __m512i down = A == 64 ? qwords(0, 0, 0, 0, 4, 4, 4, 4) : A == 32 ? qwords(0, 0, 4, 4, 0, 0, 4, 4) : qwords(0, 4, 0, 4, 0, 4, 0, 4);
  const __m512i z = _mm512_permutexvar_epi64(from, _mm512_castsi256_si512(_mm256_maskz_loadu_epi8((__mmask32)real, p)));
  return (__m512i)e2m1<BITS>((vi)_mm512_srlv_epi64(z, down) & 0x0f0f0f0f);
}
// 16 rows x 64 codes from k on -> to[16][64]; the next rows are fetched
template <int BITS, int A> LZ_INLINE void spread_rows(const Sixteen& w, int64_t k, char* to) {
  constexpr int WIDTH = bits_of(BITS);
  const int64_t bytes = least(w.K - k, 64) * WIDTH / 8;
  const __mmask64 real = bytes == 64 ? ~0ull : (1ull << bytes) - 1;
  const char *from = w.codes + k * WIDTH / 8, *next = w.codes + LANES * w.stride + k * 2 * WIDTH;
  for (int i = 0; i < 2 * WIDTH; i++) __builtin_prefetch(next + i * 64, 0, 2);
  unrolled<LANES>(LZ_LAMBDA(r) { _mm512_store_si512(to + r * 64, spread<BITS, A>(from + r * w.stride, real)); });
}
static void spread_sides(int dtype, const char* scales, const char* biases, int64_t stride, int64_t groups, int share, float* to) {
  for (int64_t g = 0, n; g < groups; g += n, to += 2 * LANES * LANES) {
    n = least(groups - g, LANES);
    for (int r = 0; r < LANES; r++) {
      _mm512_store_ps(to + r * LANES, along(dtype, scales + r * stride, g, n, share));
      _mm512_store_ps(to + (LANES + r) * LANES, along(dtype, biases + r * stride, g, n, share));
      __builtin_prefetch(scales + (LANES + r) * stride + g * 2, 0, 2);
      __builtin_prefetch(biases + (LANES + r) * stride + g * 2, 0, 2);
    }
  }
}

// y[16 tokens][16 rows]. Tiles are open for groups of A.
template <int BITS, int A> static void tokens_tile(const Sixteen& w, const Codes& c, const char* acts, float* y) {
  alignas(64) char codes[2][LANES * 64];
  alignas(64) int32_t h[LANES * LANES], l[LANES * LANES];
  alignas(64) float rows[LANES * LANES];
  const float *d = c.d(acts), *d_sum = d + c.groups() * LANES;
  const char *low = acts + c.K * LANES, *some = c.fine((char*)acts);
  vf sum[LANES] = {};
  for (int64_t k = 0, g = 0; k < w.K; k += A, g++, d += LANES, d_sum += LANES, some += LANES) {
    char* to = codes[k / 64 % 2];
    if (k % 64 == 0) spread_rows<BITS, A>(w, k, to);
    to += k % 64;
    const bool fine = any16(some);
    const vf dv = load<vf>(d) * (fine ? 1.0f : 128.0f), ds = load<vf>(d_sum);
    const float* side = w.sides + g / 16 * 512 + g % 16;
    const auto add = [&](auto n) __attribute__((always_inline)) {
      unrolled<LANES>(LZ_LAMBDA(r) {
        sum[r] = __builtin_convertvector(n(r), vf) * dv * each(side[r * LANES]) + sum[r];
        sum[r] = ds * each(side[(LANES + r) * LANES]) + sum[r];
      });
    };
    settle();
    _tile_zero(0);
    _tile_loadd(4, to, 64);
    _tile_loadd(6, acts + k * LANES, 64);
    _tile_dpbusd(0, 4, 6);
    if (fine) {
      _tile_zero(1);
      _tile_loadd(7, low + k * LANES, 64);
      _tile_dpbusd(1, 4, 7);
      _tile_stored(0, h, 64);
      _tile_stored(1, l, 64);
      settle();
      add(LZ_LAMBDA(r) { return (load<vi>(h + r * LANES) << 7) + load<vi>(l + r * LANES); });
    } else {
      _tile_stored(0, h, 64);
      settle();
      add(LZ_LAMBDA(r) { return load<vi>(h + r * LANES); });
    }
  }
  unrolled<LANES>(LZ_LAMBDA(r) { store(rows + r * LANES, sum[r]); });
  turn(rows, LANES, y, LANES);
}

LZ_NAMESPACE_END
#endif

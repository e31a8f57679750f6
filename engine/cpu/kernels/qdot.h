// Unsigned codes times int8 activations, W rows of weights in the lanes:
//   y = sum over groups g of  scale_g d_g (sum q a) + bias_g d_g (sum a),      x ~ d_g a in group g
// The second sum runs over the quantized a as well: exact sums of x would triple the error, since q is not centred.
// An activation is one int8 of a group's largest magnitude / 127, or ("two passes") 128 h + l of / 16256: 15 bits. Panels
// take the second pass only where some token of the tile has an l, see quantize_row.
#pragma once
#include "columns.h"

LZ_NAMESPACE_BEGIN

typedef int32_t may_alias_i32 __attribute__((may_alias, aligned(1)));

// The activations of M tokens, side by side so that a tile reads them through one pointer: int8 h[K / 4][M][4], the same
// of l if there are two passes, then f32 d[groups][M], and d times the sum of the group's codes, [groups][M].
struct Codes {
  int64_t K;             // rounded up to 64
  int A, M, passes;      // A: inputs that share a d: the weights' group, at most 64
  int64_t groups() const { return K / A; }
  int64_t record() const { return K * passes + 8 * groups(); }  // bytes a token
  float* d(char* block) const { return (float*)(block + M * K * passes); }
  const float* d(const char* block) const { return (const float*)(block + M * K * passes); }
};

// 4-bit codes come out of a dword as even and odd ones, and activations are stored in that order.
template <int BITS> LZ_INLINE u8x code_order(u8x a) {
  if (BITS == 8) return a;
  return __builtin_shufflevector(a, a, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
}
template <int BITS> LZ_INLINE void unpack(const vi z[4], vi q[]) {
  for (int j = 0; j < 4; j++) {
    if (BITS == 8) {
      q[j] = z[j];
    } else {
      q[2 * j] = z[j] & 0x0f0f0f0f;
      q[2 * j + 1] = (z[j] >> 4) & 0x0f0f0f0f;
    }
  }
}

// x[0..K) -> token m of a block. K is a multiple of A, and A of 16. Groups whose largest magnitude is at most
// `plain` times the root mean square of x get 8 bits all the same: their l is zero, and a panel skips that pass.
template <int BITS, int M, int PASSES>
static void quantize_row(const Codes& c, const float* x, int64_t K, char* block, int m, float plain) {
  const float top = PASSES == 2 ? 16256.0f : 127.0f;
  f32x squares{};
  for (int64_t k = 0; plain > 0 && k < K; k += LANES) squares = fma(loadf(x + k), loadf(x + k), squares);
  const float most_plain = plain * __builtin_sqrtf(sum(squares) / (float)K);
  float *d = c.d(block) + m, *d_sum = d + c.groups() * M;
  const auto put_codes = [&](int64_t k, int pass, i32x n) __attribute__((always_inline)) {
    const u8x codes = code_order<BITS>(low_bytes(n));
    char* to = block + (pass * c.K + k) * M + 4 * m;
    uint32_t quads[4];
    memcpy(quads, &codes, 16);
    for (int j = 0; j < 4; j++) memcpy(to + 4 * M * j, quads + j, 4);
  };
  for (int64_t k = 0; k < c.K; k += c.A, d += M, d_sum += M) {
    const bool real = k < K;
    f32x most{};
    for (int i = 0; real && i < c.A; i += LANES) {
      const f32x v = loadf(x + k + i), size = maxf(v, -v);
      most = select(size <= most, most, size);  // a NaN stays
    }
    const float largest = max_of(most);
    const bool fine = PASSES == 2 && !(largest <= most_plain);
    const float inverse = largest > 0 ? (fine ? top : 127.0f) / largest : 0;
    i32x total{};
    for (int i = 0; i < c.A; i += LANES) {
      i32x t = real ? __builtin_convertvector(round_even(loadf(x + k + i) * inverse), i32x) : i32x{};
      if (PASSES == 2 && !fine) t <<= 7;
      const i32x high = PASSES == 2 ? (t + 64) >> 7 : t;
      total += t;
      put_codes(k + i, 0, high);
      if (PASSES == 2) put_codes(k + i, 1, t - (high << 7));
    }
    *d = largest / top;
    *d_sum = *d * sum(__builtin_convertvector(total, f32x));  // whole numbers below 2^24: exact
  }
}

// acc + sum of N quads: bytes of lane r of q[j] times the four activations at a + 4 M j. DOT_QUADS: as many as it likes.
LZ_INLINE int32_t four(const char* a) { return *(const may_alias_i32*)a; }
#if defined(__AVX512VNNI__)
constexpr int DOT_QUADS = 1;
template <int BITS, int N, int M> LZ_INLINE vi dot(vi acc, const vi q[], const char* a) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(*q), "m"(*(const may_alias_i32*)a));  // GCC 12 spills the intrinsic's
  return acc;
}
#elif defined(__SSE2__)
constexpr int DOT_QUADS = 8;
template <int BITS, int N, int M> LZ_INLINE vi dot(vi acc, const vi q[], const char* a) {
#if defined(__AVX2__)
  if (BITS == 4) {  // pairs: at most 2 * 15 * 127, and eight of them still fit 16 bits
    vm sum = {};
    unrolled<N>(LZ_LAMBDA(j) {
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16((vm)q[j], _mm256_set1_epi32(four(a + 4 * M * j))));
    });
    return acc + (vi)_mm256_madd_epi16(sum, _mm256_set1_epi16(1));
  }
#endif
  unrolled<N>(LZ_LAMBDA(j) {
    const vm v = LZ_MM(set1_epi32)(four(a + 4 * M * j)), u = (vm)q[j];
    const vm even = LZ_MM(madd_epi16)((vm)(q[j] & 0x00ff00ff), LZ_MM(srai_epi16)(LZ_MM(slli_epi16)(v, 8), 8));
    acc += (vi)even + (vi)LZ_MM(madd_epi16)(LZ_MM(srli_epi16)(u, 8), LZ_MM(srai_epi16)(v, 8));
  });
  return acc;
}
#else
constexpr int DOT_QUADS = 8;
template <int BITS, int N, int M> LZ_INLINE vi dot(vi acc, const vi q[], const char* a) {
  for (int j = 0; j < N; j++)
    for (int b = 0; b < 4; b++) acc += ((q[j] >> 8 * b) & 255) * (int32_t)(int8_t)a[4 * M * j + b];
  return acc;
}
#endif

// Decode: M tokens x W rows straight from the mapped bytes, `stride` bytes a row. Each chunk of W x 16 bytes is
// turned and unpacked once, in registers, for all tokens and passes. scale, bias: f32 [groups of the weights][16].
// Bytes moved: every code once, and the activations from the first-level cache.
struct Rows {
  const char* codes;
  int64_t stride, K;
  const float *scale, *bias;
  int group;
};
template <int BITS, int A, int M, int PASSES>
static void rows_tile(const Rows& w, const Codes& c, const char* acts, float* y) {
  constexpr int CHUNK = 128 / BITS, TURNS = A > CHUNK ? A / CHUNK : 1, SPLIT = CHUNK > A ? CHUNK / A : 1;
  constexpr int QUADS = CHUNK / 4 / SPLIT, DOT = DOT_QUADS < QUADS ? DOT_QUADS : QUADS;
  const int64_t block = W * w.stride, ahead = block > 16384 ? block : 16384;
  const int share = w.group / A == 2;  // two activation groups to a scale
  vf sum[M] = {};
  const float* d = c.d(acts);
  const int64_t low = c.K * M, sums = c.groups() * M;  // from h to l, from d to d times the sum
  const char *p = w.codes, *next = w.codes + ahead;
  for (int64_t k = 0; k < w.K; k += CHUNK * TURNS) {
    vi part[SPLIT][M][PASSES] = {};
    unrolled<TURNS>(LZ_LAMBDA(turn) {
      vi z[4], q[CHUNK / 4];
      for (int line = 0; line < W / 4; line++) __builtin_prefetch(next + 64 * line);
      if (CHUNK <= A || k + CHUNK <= w.K) columns<true>(p, w.stride, 16, z);
      else columns<false>(p, w.stride, 8, z);
      p += 16, next += 16 * W;
      unpack<BITS>(z, q);
      unrolled<QUADS / DOT>(LZ_LAMBDA(j) {
        unrolled<M>(LZ_LAMBDA(m) {
          unrolled<PASSES>(LZ_LAMBDA(pass) {
            unrolled<SPLIT>(LZ_LAMBDA(s) {
              const char* a = acts + pass * low + M * (k + turn * CHUNK + s * A) + 4 * (M * j * DOT + m);
              part[s][m][pass] = dot<BITS, DOT, M>(part[s][m][pass], q + s * QUADS + j * DOT, a);
            });
          });
        });
      });
    });
    unrolled<SPLIT>(LZ_LAMBDA(s) {
      const int64_t g = (k / A + s) >> share;
      const vf scale = load<vf>(w.scale + g * LANES), bias = load<vf>(w.bias + g * LANES);
      unrolled<M>(LZ_LAMBDA(m) {
        const vi n = PASSES == 2 ? (part[s][m][0] << 7) + part[s][m][PASSES - 1] : part[s][m][0];
        sum[m] = __builtin_convertvector(n, vf) * each(d[s * M + m]) * scale + sum[m];
        sum[m] = bias * each(d[sums + s * M + m]) + sum[m];
      });
    });
    d += SPLIT * M;
  }
  unrolled<M>(LZ_LAMBDA(m) { store(y + m * LANES, sum[m]); });
}

// Prefill: 64 rows are expanded once to u8 panel[K / 4][64][4] in the second-level cache, then meet all tokens,
// MR x NV vectors in registers at a time.
template <int BITS> static void expand_codes(const char* codes, int64_t stride, int64_t K, uint32_t* panel) {
  constexpr int CHUNK = 128 / BITS;
  for (int r = 0; r < 64; r += W)
    for (int64_t k = 0; k < K; k += CHUNK) {
      vi z[4], q[CHUNK / 4];
      if (k + CHUNK <= K) columns<true>(codes + r * stride + k * BITS / 8, stride, 16, z);
      else columns<false>(codes + r * stride + k * BITS / 8, stride, 8, z);
      unpack<BITS>(z, q);
      for (int j = 0; j < CHUNK / 4; j++) store(panel + (k / 4 + j) * 64 + r, q[j]);
    }
}
constexpr int PANEL_MR = W < 16 ? 4 : 6, PANEL_NV = W < 16 ? 2 : 4;
LZ_INLINE bool any(const char* p, int64_t n) {
  vi seen{};
  for (int64_t i = 0; i < n; i += 4 * W) seen |= load<vi>(p + i);
  int32_t lanes[W], all = 0;
  store(lanes, seen);
  for (int i = 0; i < W; i++) all |= lanes[i];
  return all;
}
template <int BITS>
static void panel_tile(const uint32_t* panel, const float* scale, const float* bias, int group, int64_t K, const Codes& c,
                       const char* acts, float* y) {
  constexpr int MR = PANEL_MR, NV = PANEL_NV;
  const int share = group / c.A == 2;
  const int64_t groups = K / c.A, quads = c.A / 4, sums = c.groups() * MR;
  const float* d = c.d(acts);
  memset(y, 0, MR * 64 * sizeof(float));
  for (int64_t g = 0; g < groups; g++, d += MR) {
    const bool fine = any(acts + (c.K + g * c.A) * MR, c.A * MR);
    for (int n = 0; n < 64; n += NV * W) {
      vi total[MR][NV] = {};
      for (int pass = 0; pass < 1 + fine; pass++) {
        if (pass) unrolled<MR>(LZ_LAMBDA(m) { unrolled<NV>(LZ_LAMBDA(v) { total[m][v] <<= 7; }); });
        const char* a = acts + (pass * c.K + g * c.A) * MR;
        const uint32_t* w = panel + g * quads * 64 + n;
        for (int64_t j = 0; j < quads; j++, w += 64, a += 4 * MR) {
          vi q[NV];
          unrolled<NV>(LZ_LAMBDA(v) { q[v] = load<vi>(w + v * W); });
          unrolled<MR>(LZ_LAMBDA(m) {
#if defined(__AVX512VNNI__)
            const vi b = (vi)_mm512_set1_epi32(four(a + 4 * m));
            unrolled<NV>(LZ_LAMBDA(v) { asm("vpdpbusd %2, %1, %0" : "+v"(total[m][v]) : "v"(q[v]), "v"(b)); });
#else
            unrolled<NV>(LZ_LAMBDA(v) { total[m][v] = dot<BITS, 1, MR>(total[m][v], q + v, a + 4 * m); });
#endif
          });
        }
      }
      const int up = fine ? 0 : 7;
      unrolled<NV>(LZ_LAMBDA(v) {
        const int64_t at = (g >> share) * 64 + n + v * W;
        const vf s = load<vf>(scale + at), b = load<vf>(bias + at);
        unrolled<MR>(LZ_LAMBDA(m) {
          float* to = y + m * 64 + n + v * W;
          store(to, b * each(d[sums + m]) + (__builtin_convertvector(total[m][v] << up, vf) * each(d[m]) * s + load<vf>(to)));
        });
      });
    }
    asm volatile("" ::: "memory");  // or GCC keeps y in registers that are not there
  }
}

LZ_NAMESPACE_END

// Unsigned codes times int8 activations, W rows of weights in the lanes:
//   y = sum over groups g of  scale_g d_g (sum q a) + bias_g d_g (sum a),      x ~ d_g a in group g
// The second sum runs over the quantized a as well: exact sums of x would triple the error, since q is not centred.
// An activation is one int8 of a group's largest magnitude / 127, or ("two passes") 128 h + l of / 16256: 15 bits. Panels
// take the second pass only where some token of the tile has an l, see quantize_row.
#pragma once
#include "codes.h"

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
// nibbles as they are, or as what they stand for: whole numbers of FP4, in a byte each
template <int BITS> LZ_INLINE vi e2m1(vi q) {
  if (BITS != FP4) return q;
#if defined(__AVX512BW__)
  return (vi)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(load<__m128i>(E2M1)), (__m512i)q);
#elif defined(__AVX2__)
  return (vi)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load<__m128i>(E2M1)), (__m256i)q);
#else
  uint8_t bytes[sizeof q];
  memcpy(bytes, &q, sizeof q);
  for (uint8_t& b : bytes) b = E2M1[b];
  return load<vi>(bytes);
#endif
}
template <int BITS> LZ_INLINE void unpack(const vi z[4], vi q[]) {  // BITS: 4, 8 or FP4
  for (int j = 0; j < 4; j++) {
    if (BITS == 8) {
      q[j] = z[j];
    } else {
      q[2 * j] = e2m1<BITS>(z[j] & 0x0f0f0f0f);
      q[2 * j + 1] = e2m1<BITS>((z[j] >> 4) & 0x0f0f0f0f);
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
  const auto put_codes = [&](int64_t k, int i, int pass, i32x n) __attribute__((always_inline)) {
    const u8x codes = code_order<BITS>(low_bytes(n));
    char* to = block + (pass * c.K + k) * M + 4 * m;
    uint32_t quads[4];
    memcpy(quads, &codes, 16);
    for (int j = 0; j < 4; j++) memcpy(to + M * (i + 4 * j), quads + j, 4);
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
      put_codes(k, i, 0, high);
      if (PASSES == 2) put_codes(k, i, 1, t - (high << 7));
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
  if (BITS != 8) {  // pairs: at most 2 * 15 * 127, and eight of them still fit 16 bits; five of 2 * 24 * 127
    vm sum = {};
    unrolled<N>(LZ_LAMBDA(j) {
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16((vm)q[j], _mm256_set1_epi32(four(a + 4 * M * j))));
      if (BITS == FP4 && j % 4 == 3) acc += (vi)_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), sum = vm{};
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

LZ_INLINE bool any(const char* p, int64_t n) {
  vi seen{};
  for (int64_t i = 0; i < n; i += 4 * W) seen |= load<vi>(p + i);
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)seen, (__m512i)seen);
#else
  int32_t lanes[W], all = 0;
  store(lanes, seen);
  for (int i = 0; i < W; i++) all |= lanes[i];
  return all;
#endif
}

// Decode: M tokens x W rows straight from the mapped bytes, `stride` bytes a row. Each chunk of W x 16 bytes is
// turned and unpacked once, in registers, for all tokens and passes. scale, bias: f32 [groups of the weights][16].
// Bytes moved: every code once, and the activations from the first-level cache.
struct Rows {
  const char* codes;
  int64_t stride, K;
  const float *scale, *bias;
  int group;
};
// SOME: the second pass is taken only over chunks where some token has an l.
template <int BITS, int A, int M, int PASSES, bool SOME>
static void rows_tile(const Rows& w, const Codes& c, const char* acts, float* y) {
  constexpr int CHUNK = 128 / bits_of(BITS), TURNS = A > CHUNK ? A / CHUNK : 1, SPLIT = CHUNK > A ? CHUNK / A : 1;
  constexpr int QUADS = CHUNK / 4 / SPLIT, DOT = DOT_QUADS < QUADS ? DOT_QUADS : QUADS;
  const int64_t block = W * w.stride, ahead = block > 16384 ? block : 16384;
  const int share = w.group / A == 2;  // two activation groups to a scale
  vf sum[M] = {};
  const float* d = c.d(acts);
  const int64_t low = c.K * M, sums = c.groups() * M;  // from h to l, from d to d times the sum
  const char *p = w.codes, *next = w.codes + ahead;
  for (int64_t k = 0; k < w.K; k += CHUNK * TURNS) {
    vi part[SPLIT][M][PASSES] = {};
    const bool fine = !SOME || any(acts + low + M * k, M * CHUNK * TURNS);
    unrolled<TURNS>(LZ_LAMBDA(turn) {
      vi z[4], q[CHUNK / 4];
      for (int line = 0; line < W / 4; line++) __builtin_prefetch(next + 64 * line);
      if (CHUNK <= A || k + CHUNK <= w.K) columns<true>(p, w.stride, 16, z);
      else columns<false>(p, w.stride, 8, z);
      p += 16, next += 16 * W;
      unpack<BITS>(z, q);
      unrolled<PASSES>(LZ_LAMBDA(pass) {
        if (pass && !fine) return;
        unrolled<QUADS / DOT>(LZ_LAMBDA(j) {
          unrolled<M>(LZ_LAMBDA(m) {
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

#if defined(__AVX512VNNI__)
// One token, four rows at a time, each read along: the pattern that processors prefetch best. A vector of codes is 64
// bytes; 4-bit ones split into the even and the odd codes, so `order_along` puts the activations of each 128 so.
template <int BITS> static void order_along(const Codes& c, char* record) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), one = _mm512_set1_epi32(1);
  for (int pass = 0; BITS != 8 && pass < c.passes; pass++, record += c.K)
    for (int64_t k = 0; k < c.K; k += 128) {
      const __mmask16 there = c.K - k < 128 ? 0xff : 0xffff;
      const __m512i a = _mm512_loadu_si512(record + k), b = there == 0xff ? a : _mm512_loadu_si512(record + k + 64);
      const int64_t half = there == 0xff ? 32 : 64;
      _mm512_mask_storeu_epi32(record + k, there, _mm512_permutex2var_epi32(a, even, b));
      _mm512_mask_storeu_epi32(record + k + half, there, _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, one), b));
    }
}
// 16 scales or biases of a row, one an activation group; `share` 1: two groups to each
LZ_INLINE __m512 along(int dtype, const char* row, int64_t first, int64_t n, int share) {
  const char* p = row + (first >> share) * size_of(dtype);
  const __mmask16 there = (1u << ((n + share) >> share)) - 1;
  const __m256i half = dtype == LZ_F32 ? _mm256_setzero_si256() : _mm256_maskz_loadu_epi16(there, p);
  const __m512 v = dtype == LZ_F32 ? _mm512_maskz_loadu_ps(there, p) : dtype == LZ_F16 ? _mm512_cvtph_ps(half) : (__m512)widen_bf16((vh)half);
  return share ? _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), v) : v;
}
template <int BITS, int A>
static void rows_along(const char* w, int64_t stride, const char* scales, const char* biases, int64_t stride_s, int dtype,
                       int group, int64_t K, const Codes& c, const char* acts, float* lanes) {
  constexpr int R = 4, WIDTH = bits_of(BITS), CODES = 512 / WIDTH, STEP = CODES / A, NEAR = 2560, FAR = 10240;
  const int64_t G = K / A;
  const int share = group / A == 2;
  const float *d = c.d(acts), *d_sum = d + c.groups();
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi64(0x1020408000000000), lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i place = _mm512_srli_epi32(lane, STEP == 1 ? 4 : STEP == 2 ? 3 : STEP == 4 ? 2 : 1);  // a lane's group
  __m512 sum[R], offset[R], scale[R];
  unrolled<R>(LZ_LAMBDA(r) { sum[r] = offset[r] = _mm512_setzero_ps(); });
  for (int64_t g0 = 0; g0 < G; g0 += LANES) {
    const int64_t n = least(G - g0, LANES);
    const __mmask16 some = (1u << n) - 1;
    const __m512 dv = _mm512_maskz_loadu_ps(some, d + g0), sv = _mm512_maskz_loadu_ps(some, d_sum + g0);
    unrolled<R>(LZ_LAMBDA(r) {
      scale[r] = _mm512_mul_ps(along(dtype, scales + r * stride_s, g0, n, share), dv);
      offset[r] = _mm512_fmadd_ps(along(dtype, biases + r * stride_s, g0, n, share), sv, offset[r]);
    });
    __m512i index = place;
    const auto vectors = [&](int64_t k, __mmask64 real, __mmask64 codes, int64_t half) __attribute__((always_inline)) {
      const char* a = acts + k;
      const __m512i h = _mm512_maskz_loadu_epi8(real, a), l = _mm512_maskz_loadu_epi8(real, a + c.K);
      const __m512i h1 = WIDTH == 4 ? _mm512_maskz_loadu_epi8(real, a + half) : h, l1 = WIDTH == 4 ? _mm512_maskz_loadu_epi8(real, a + half + c.K) : l;
      unrolled<R>(LZ_LAMBDA(r) {
        const char* p = w + r * stride + k * WIDTH / 8;
        __builtin_prefetch(p + NEAR);       // to the first-level cache,
        __builtin_prefetch(p + FAR, 0, 2);  // when it is in the second already: the first can wait for few lines only
        const __m512i q = _mm512_maskz_loadu_epi8(codes, p), q0 = WIDTH == 4 ? (__m512i)e2m1<BITS>((vi)_mm512_and_si512(q, low)) : q;
        const __m512i q1 = (__m512i)e2m1<BITS>((vi)_mm512_gf2p8affine_epi64_epi8(q, high, 0));  // q >> 4, in bytes
        __m512i dot = _mm512_setzero_si512();
        asm("vpdpbusd %2, %1, %0" : "+v"(dot) : "v"(q0), "v"(h));
        if (WIDTH == 4) asm("vpdpbusd %2, %1, %0" : "+v"(dot) : "v"(q1), "v"(h1));
        dot = _mm512_slli_epi32(dot, 7);
        asm("vpdpbusd %2, %1, %0" : "+v"(dot) : "v"(q0), "v"(l));
        if (WIDTH == 4) asm("vpdpbusd %2, %1, %0" : "+v"(dot) : "v"(q1), "v"(l1));
        sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(index, scale[r]), sum[r]);
      });
      index = _mm512_add_epi32(index, _mm512_set1_epi32(STEP));
    };
    int64_t g = 0, k = g0 * A;
    for (; g < n && k + CODES <= K; g += STEP, k += CODES) vectors(k, ~0ull, ~0ull, 64);
    if (g < n) {  // less than a vector is left; activations go on as zeros to a multiple of 64
      const int64_t half = WIDTH == 4 ? least(c.K - k, 128) / 2 : 64;
      vectors(k, half == 64 ? ~0ull : 0xffffffff, (1ull << ((K - k) * WIDTH / 8)) - 1, half);
    }
  }
  unrolled<R>(LZ_LAMBDA(r) { _mm512_store_ps(lanes + r % 2 * 32 + r / 2 * 16, _mm512_add_ps(sum[r], offset[r])); });
}
// The sums of 16 rows' lanes: vectors are halved and put side by side four times. Row 4 a + b is vector
// 4 a' + b', where ' exchanges two bits.
LZ_INLINE __m512 sum_lanes(const float* lanes) {
  __m512 v[16];
  unrolled<16>(LZ_LAMBDA(i) { v[i] = _mm512_load_ps(lanes + 16 * i); });
  unrolled<8>(LZ_LAMBDA(i) { v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44), _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee)); });
  unrolled<4>(LZ_LAMBDA(i) { v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 4], 0x88), _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd)); });
  unrolled<2>(LZ_LAMBDA(i) { v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[i], v[i + 2]), _mm512_unpackhi_ps(v[i], v[i + 2])); });
  return _mm512_add_ps(_mm512_shuffle_ps(v[0], v[1], 0x44), _mm512_shuffle_ps(v[0], v[1], 0xee));
}
#endif

// Prefill: 64 rows are expanded once to u8 panel[K / 4][64][4] in the second-level cache, then meet all tokens,
// MR x NV vectors in registers at a time.
template <int BITS> static void expand_codes(const char* codes, int64_t stride, int64_t K, uint32_t* panel) {
  constexpr int WIDTH = bits_of(BITS), CHUNK = 128 / WIDTH;
  for (int r = 0; r < 64; r += W)
    for (int64_t k = 0; k < K; k += CHUNK) {
      vi z[4], q[CHUNK / 4];
      if (k + CHUNK <= K) columns<true>(codes + r * stride + k * WIDTH / 8, stride, 16, z);
      else columns<false>(codes + r * stride + k * WIDTH / 8, stride, 8, z);
      unpack<BITS>(z, q);
      for (int j = 0; j < CHUNK / 4; j++) store(panel + (k / 4 + j) * 64 + r, q[j]);
    }
}
constexpr int PANEL_MR = W < 16 ? 4 : 6, PANEL_NV = W < 16 ? 2 : 4;
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

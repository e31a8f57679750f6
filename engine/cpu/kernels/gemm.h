// Float products. Two tiles: sixteen rows of weights as they lie, for few tokens (memory-bound: each weight is read
// once, in its own type), and MR tokens x 64 columns of an f32 panel[K][64], for many.
#pragma once
#include "columns.h"

LZ_NAMESPACE_BEGIN

// y[m][r] = sum_k x[m][k] w[r][k] for 16 rows w of any float type
template <int M> static void dense_rows(int dtype, const char* w, int64_t stride, int64_t K, const float* x, int64_t ldx, float* y) {
  const int size = size_of(dtype);
  f32x all[M][LANES];
  for (int r = 0; r < LANES; r += 4) {
    f32x acc[4][M] = {};
    over(K, LZ_LAMBDA2(k, n) {
      f32x v[M];
      unrolled<M>(LZ_LAMBDA(m) { v[m] = get(x + m * ldx + k, n); });
      unrolled<4>(LZ_LAMBDA(i) {
        const char* p = w + (r + i) * stride + k * size;
        __builtin_prefetch(p + 4096);
        const f32x row = get_as(dtype, p, n);
        unrolled<M>(LZ_LAMBDA(m) { acc[i][m] = fma(row, v[m], acc[i][m]); });
      });
    });
    unrolled<4>(LZ_LAMBDA(i) { unrolled<M>(LZ_LAMBDA(m) { all[m][r + i] = acc[i][m]; }); });
  }
  for (int m = 0; m < M; m++) store(y + m * LANES, sums(all[m]));
}

#if defined(__AVX512F__)
constexpr int FLOAT_MR = 6, FLOAT_NV = 4;
#else
constexpr int FLOAT_MR = 4, FLOAT_NV = 1;
#endif
// y[m][0..64) (+)= sum_k x[m][k] panel[k][0..64), MR tokens; `ldp` floats from one k to the next
static void float_tile(const float* panel, int64_t ldp, int64_t K, const float* x, int64_t ldx, float* y, bool add) {
  constexpr int MR = FLOAT_MR, NV = FLOAT_NV;
  for (int n = 0; n < 64; n += NV * LANES) {
    f32x acc[MR][NV];
    unrolled<MR>(LZ_LAMBDA(m) { unrolled<NV>(LZ_LAMBDA(v) { acc[m][v] = add ? loadf(y + m * 64 + n + v * LANES) : f32x{}; }); });
    for (int64_t k = 0; k < K; k++) {
      f32x w[NV];
      unrolled<NV>(LZ_LAMBDA(v) { w[v] = loadf(panel + k * ldp + n + v * LANES); });
      unrolled<MR>(LZ_LAMBDA(m) {
        const f32x a = each(x[m * ldx + k]);
        unrolled<NV>(LZ_LAMBDA(v) { acc[m][v] = fma(a, w[v], acc[m][v]); });
      });
    }
    unrolled<MR>(LZ_LAMBDA(m) { unrolled<NV>(LZ_LAMBDA(v) { store(y + m * 64 + n + v * LANES, acc[m][v]); }); });
  }
}

LZ_NAMESPACE_END

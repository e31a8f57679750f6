// Float products. Two tiles: sixteen rows of weights as they lie, for few tokens (memory-bound: each weight is read
// once, in its own type), and MR tokens x 64 columns of an f32 panel[K][64], for many.
#pragma once
#include "columns.h"

LZ_NAMESPACE_BEGIN

// y[m][r] = sum_k x[m][k] w[r][k] for 16 rows w. x is zero from K up to the next multiple of 16.
template <int M, int DTYPE> static void dense_rows(const char* w, int64_t stride, int64_t K, const float* x, int64_t ldx, float* y) {
  constexpr int SIZE = DTYPE == LZ_F32 ? 4 : 2, R = W == 16 || M < 4 ? 4 : 2;
  vf all[M][LANES];
  for (int r = 0; r < LANES; r += R) {
    vf acc[R][M] = {};
    for (int64_t k = 0; k < K; k += W) {
      char end[R][W * SIZE] = {};  // the last lanes of a row, so that nothing past it is read
      const bool whole = k + W <= K;
      if (!whole) for (int i = 0; i < R; i++) memcpy(end[i], w + (r + i) * stride + k * SIZE, (K - k) * SIZE);
      vf v[M];
      unrolled<M>(LZ_LAMBDA(m) { v[m] = load<vf>(x + m * ldx + k); });
      unrolled<R>(LZ_LAMBDA(i) {
        const char* p = w + (r + i) * stride + k * SIZE;
        __builtin_prefetch(p + 4096);
        const vf row = widen<DTYPE>(whole ? p : end[i]);
        unrolled<M>(LZ_LAMBDA(m) { acc[i][m] = row * v[m] + acc[i][m]; });
      });
    }
    unrolled<R>(LZ_LAMBDA(i) { unrolled<M>(LZ_LAMBDA(m) { all[m][r + i] = acc[i][m]; }); });
  }
  for (int m = 0; m < M; m++) store(y + m * LANES, sums(all[m]));
}
template <int M> static void dense_rows(int dtype, const char* w, int64_t stride, int64_t K, const float* x, int64_t ldx, float* y) {
  (dtype == LZ_F32 ? dense_rows<M, LZ_F32> : dtype == LZ_F16 ? dense_rows<M, LZ_F16> : dense_rows<M, LZ_BF16>)(w, stride, K, x, ldx, y);
}

template <class T> struct Wide { typedef T type __attribute__((vector_size(4 * W))); };
constexpr int FLOAT_MR = W < 8 ? 4 : 6, FLOAT_NV = W < 16 ? 2 : 4;
constexpr int PANEL_BYTES = 256;  // 64 floats or 32 doubles
// y[m][0..columns) (+)= sum_k x[m][k] panel[k][0..columns), MR rows; ldp, ldx and ldy items from one row to the next, ldk
// from one k of x to the next
template <int MR = FLOAT_MR, int NV = FLOAT_NV, class T = float>
static void float_tile(const T* panel, int64_t ldp, int64_t K, const T* x, int64_t ldx, T* y, bool add,
                       int64_t ldy = PANEL_BYTES / sizeof(T), int columns = PANEL_BYTES / sizeof(T), int64_t ldk = 1) {
  typedef typename Wide<T>::type V;
  constexpr int L = 4 * W / sizeof(T);
  for (int n = 0; n < columns; n += NV * L) {
    V acc[MR][NV];
    unrolled<MR>(LZ_LAMBDA(m) { unrolled<NV>(LZ_LAMBDA(v) { acc[m][v] = add ? load<V>(y + m * ldy + n + v * L) : V{}; }); });
    for (int64_t k = 0; k < K; k++) {
      V w[NV];
      unrolled<NV>(LZ_LAMBDA(v) { w[v] = load<V>(panel + k * ldp + n + v * L); });
      unrolled<MR>(LZ_LAMBDA(m) {
        const V a = x[m * ldx + k * ldk] - V{};
        unrolled<NV>(LZ_LAMBDA(v) { acc[m][v] = a * w[v] + acc[m][v]; });
      });
    }
    unrolled<MR>(LZ_LAMBDA(m) { unrolled<NV>(LZ_LAMBDA(v) { store(y + m * ldy + n + v * L, acc[m][v]); }); });
  }
}

LZ_NAMESPACE_END

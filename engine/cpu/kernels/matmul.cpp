// matmul: o (…, M, N) = a (…, M, K) b (…, K, N), batch axes broadcast (stride 0), any strides.
//
//   o, a, b  f32, f16 or bf16 in any mixture, sums in f32; or all f64. ints [], floats []
//
// The plain loop: for m, n: o[m][n] = sum_k a[m][k] b[k][n]. The fast one takes MB x 64 outputs at a time and KC of K:
// b becomes an f32 panel[KC][64], a an f32 block[MB][KC], and float_tile multiplies them from the second-level cache.
// A few rows of a against a b that lies along k (a vector times a matrix) are dots of rows as they lie: b is read once.
#include "gemm.h"

LZ_NAMESPACE_BEGIN

namespace {

constexpr int MB = 96, KC = 512, NB = 64;

struct Matrix {
  char* data;
  int dtype;
  int64_t row, column;  // strides in elements
  char* at(int64_t r, int64_t c) const { return data + (r * row + c * column) * size_of(dtype); }
};

Matrix matrix_of(const View& v, int64_t batch, const View& out) {
  int64_t offset = 0;
  for (int i = out.ndim - 3, j = v.ndim - 3; i >= 0; i--, j--) {
    if (j >= 0 && v.shape[j] > 1) offset += batch % out.shape[i] * v.strides[j];
    batch /= out.shape[i];
  }
  return {v.data + offset * size_of(v.dtype), v.dtype, v.strides[v.ndim - 2], v.strides[v.ndim - 1]};
}
Matrix transposed(const Matrix& m) { return {m.data, m.dtype, m.column, m.row}; }

float number(const Matrix& m, int64_t r, int64_t c) {
  const char* p = m.at(r, c);
  return m.dtype == LZ_F32 ? *(const float*)p : m.dtype == LZ_F16 ? f16_to_f32(*(const uint16_t*)p) : bf16_to_f32(*(const uint16_t*)p);
}

// rows x columns of m from (r, c) on -> f32, `step` floats a row; what lies between them and `most` rows of whole lanes is zero
void pack(const Matrix& m, int64_t r, int64_t c, int64_t rows, int64_t columns, int64_t most, float* to, int64_t step) {
  for (int64_t i = 0; i < most; i++, to += step) {
    if (i >= rows) {
      memset(to, 0, round_up(columns, LANES) * 4);
    } else if (m.column == 1) {
      over(columns, LZ_LAMBDA2(k, n) { store(to + k, get_as(m.dtype, m.at(r + i, c + k), n)); });
    } else {
      memset(to + columns / LANES * LANES, 0, columns % LANES ? LANES * 4 : 0);
      for (int64_t k = 0; k < columns; k++) to[k] = number(m, r + i, c + k);
    }
  }
}

// b from (k, n) on -> panel[depth][64], zeros past the last column
void pack_panel(const Matrix& b, int64_t k, int64_t n, int64_t depth, int64_t columns, float* panel) {
  if (b.row != 1) {
    if (columns < NB) memset(panel, 0, depth * NB * 4);
    return pack(b, k, n, depth, columns, depth, panel, NB);
  }
  for (int64_t c = 0; c < NB; c += LANES) {
    if (c + LANES <= columns) {
      columns_f32(b.dtype, b.at(k, n + c), b.column * size_of(b.dtype), depth, panel + c, NB);
    } else {
      for (int64_t i = 0; i < depth; i++)
        for (int64_t l = c; l < c + LANES; l++) panel[i * NB + l] = l < columns ? number(b, k + i, n + l) : 0;
    }
  }
}

void write(const Matrix& o, int64_t r, int64_t c, f32x v, int64_t n) {
  if (o.dtype == LZ_F32 && o.column == 1) return put((float*)o.at(r, c), v, n);
  uint16_t halves[LANES];
  if (o.dtype == LZ_F16) store_f16(halves, v);
  else store_bf16(halves, v);
  if (o.column == 1) memcpy(o.at(r, c), halves, n * 2);
  else for (int i = 0; i < n; i++) memcpy(o.at(r, c + i), o.dtype == LZ_F32 ? (char*)&v + 4 * i : (char*)(halves + i), size_of(o.dtype));
}

struct Work { float *block, *panel, *sums; };  // [MB][KC], [KC + 8][64], [MB][64]

// o[m .. m + rows][n .. n + columns], all of K
void product(const Matrix& a, const Matrix& b, const Matrix& o, int64_t K, int64_t m, int64_t n, int64_t rows, int64_t columns, Work w) {
  for (int64_t k = 0; k == 0 || k < K; k += KC) {
    const int64_t depth = least(K - k, KC);
    pack(a, m, k, rows, depth, round_up(rows, FLOAT_MR), w.block, KC);
    const bool direct = b.dtype == LZ_F32 && b.column == 1 && columns == NB && rows <= FLOAT_MR;
    if (!direct) pack_panel(b, k, n, depth, columns, w.panel);
    for (int64_t i = 0; i < rows; i += FLOAT_MR) {
      const auto tile = rows - i == 1 ? float_tile<1> : rows - i == 2 ? float_tile<2> : float_tile<FLOAT_MR>;
      tile(direct ? (float*)b.at(k, n) : w.panel, direct ? b.row : NB, depth, w.block + i * KC, KC, w.sums + i * NB, k);
    }
  }
  for (int64_t i = 0; i < rows; i++) over(columns, LZ_LAMBDA2(c, l) { write(o, m + i, n + c, loadf(w.sums + i * NB + c), l); });
}

// up to 4 rows of a, packed in w.block, against 16 columns of b that lie along k
void dots(const Matrix& b, const Matrix& o, int64_t K, int64_t n, int64_t rows, Work w) {
  alignas(64) float y[4 * LANES];
  const auto tile = rows == 1 ? dense_rows<1> : rows == 2 ? dense_rows<2> : dense_rows<4>;
  tile(b.dtype, b.at(0, n), b.column * size_of(b.dtype), K, w.block, round_up(K, LANES), y);
  for (int64_t i = 0; i < rows; i++) write(o, i, n, loadf(y + i * LANES), LANES);
}

void run_f64(const Step& s, Team& team) {
  const View &o = s.out[0], &a = s.in[0], &b = s.in[1];
  const int64_t M = o.shape[o.ndim - 2], N = o.shape[o.ndim - 1], K = a.shape[a.ndim - 1];
  int64_t rows = M, begin, end;
  for (int i = 0; i < o.ndim - 2; i++) rows *= o.shape[i];
  team.part(rows, 1, &begin, &end);
  for (int64_t i = begin; i < end; i++) {
    const Matrix to = matrix_of(o, i / M, o), x = matrix_of(a, i / M, o), y = matrix_of(b, i / M, o);
    for (int64_t n = 0; n < N; n++) {
      double sum = 0;
      for (int64_t k = 0; k < K; k++) sum += *(double*)x.at(i % M, k) * *(double*)y.at(k, n);
      *(double*)to.at(i % M, n) = sum;
    }
  }
}

void run(const Step& s, Team& team) {
  const View &out = s.out[0], &va = s.in[0], &vb = s.in[1];
  if (out.dtype == LZ_F64) return run_f64(s, team);
  int64_t M = out.shape[out.ndim - 2], N = out.shape[out.ndim - 1], batches = 1;
  const int64_t K = va.shape[va.ndim - 1];
  for (int i = 0; i < out.ndim - 2; i++) batches *= out.shape[i];
  if (!M || !N || !batches) return;
  const bool swap = N < M && N <= 4;  // a matrix times a vector: (b^T a^T)^T
  if (swap) { const int64_t m = M; M = N, N = m; }
  float* local = (float*)team.local;
  const Work w = {local, local + MB * KC, local + MB * KC + (KC + 8) * NB};
  const int64_t along = swap ? va.strides[va.ndim - 1] : vb.strides[vb.ndim - 2];
  const bool by_dots = M <= 4 && along == 1 && K > 1 && round_up(K, LANES) * 4 <= MB * KC;
  const int64_t blocks = (N + NB - 1) / NB, share = round_up(M * batches * blocks / (2 * team.size) + 1, FLOAT_MR);
  const int64_t tall = least(share, MB);  // lower strips where there is too little for every thread
  const int64_t strips = (M + tall - 1) / tall, total = batches * blocks * strips;
  for (int64_t i; (i = team.take(1)) < total;) {
    const int64_t batch = i / (blocks * strips), n = i / strips % blocks * NB, m = i % strips * tall;
    Matrix a = matrix_of(va, batch, out), b = matrix_of(vb, batch, out), o = matrix_of(out, batch, out);
    if (swap) {
      const Matrix left = transposed(b);
      b = transposed(a), a = left, o = transposed(o);
    }
    int64_t done = 0;
    if (by_dots) {
      pack(a, 0, 0, M, K, 4, w.block, round_up(K, LANES));
      for (; done + LANES <= least(N - n, NB); done += LANES) dots(b, o, K, n + done, M, w);
    }
    if (n + done < least(N, n + NB)) product(a, b, o, K, m, n + done, least(M - m, tall), least(N - n, NB) - done, w);
  }
}

size_t local(const Step&, int) { return (MB * KC + (KC + 8) * NB + MB * NB) * 4; }

bool is_real(int dtype) { return dtype == LZ_F32 || dtype == LZ_F16 || dtype == LZ_BF16; }
const char* check(const Step& s) {
  if (s.n_in != 2 || s.n_out != 1 || s.in[0].ndim < 2 || s.in[1].ndim < 2 || s.out[0].ndim < 2)
    return "wants a (…, M, K), b (…, K, N) and o (…, M, N)";
  const View &o = s.out[0], &a = s.in[0], &b = s.in[1];
  if (a.shape[a.ndim - 1] != b.shape[b.ndim - 2]) return "the inner sizes of a and b differ";
  if (o.shape[o.ndim - 2] != a.shape[a.ndim - 2] || o.shape[o.ndim - 1] != b.shape[b.ndim - 1])
    return "the output must be (…, rows of a, columns of b)";
  const bool doubles = o.dtype == LZ_F64 && a.dtype == LZ_F64 && b.dtype == LZ_F64;
  return doubles || (is_real(o.dtype) && is_real(a.dtype) && is_real(b.dtype)) ? 0 : "wants float32, float16 and bfloat16, or only float64";
}

}  // namespace

extern const Kernel matmul;
const Kernel matmul = {"matmul", run, 0, local, check};

LZ_NAMESPACE_END

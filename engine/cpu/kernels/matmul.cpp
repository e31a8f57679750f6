// matmul: o (…, M, N) = a (…, M, K) b (…, K, N), batch axes broadcast (stride 0), any strides.
//
//   o, a, b  f32, f16 or bf16 in any mixture, sums in f32; or all f64. ints [], floats []
//
// The plain loop: for m, n: o[m][n] = sum_k a[m][k] b[k][n]. The fast one is product.h's. Of many small matrices each thread
// packs for itself. A vector times a matrix reads the matrix once, as it lies, and so does
// a matrix times a few columns.
//
// add_product: o (M, N) += a (M, K) b (K, N), all f32 and K small, o's rows as they lie. ints [], floats []: o is read and written
// once, row after row, and nothing else is in memory.
#include "product.h"

LZ_NAMESPACE_BEGIN

namespace {

constexpr int64_t THIN_BYTES = 1 << 19;

// Many small ones: strips of each by whoever comes.
template <class Kind> void apart(const Product& p, Team& team) {
  const int64_t share = round_up(p.M * p.batches / (2 * team.size) + 1, FLOAT_MR), tall = least(share, MB);
  const int64_t strips = (p.M + tall - 1) / tall, total = p.batches * strips;
  for (int64_t i; (i = team.take(1)) < total;) {
    const int64_t batch = i / strips, m = i % strips * tall;
    Unit u = {p.left(batch), p.right(batch), p.matrix(p.o, batch), p.K, m, 0, least(p.M - m, tall), 0, 0, 0, team.local};
    for (; u.n < p.N; u.n += Kind::NB) {
      u.columns = least(p.N - u.n, Kind::NB);
      Kind::multiply(u);
    }
  }
}

// y[m][c] = sum_k x[m][k] b[k][n + c] for few rows: R rows of b at a time, y in the first-level cache
template <int M, int DTYPE, int R>
void add_rows(const Matrix& b, int64_t k, int64_t n, int64_t columns, const float* x, int64_t ldx, float* y) {
  const char* rows = b.at(k, n);
  const int64_t step = b.row * size_of(DTYPE);
  for (int64_t c = 0; c < columns; c += W) {
    vf sum[M];
    unrolled<M>(LZ_LAMBDA(m) { sum[m] = k ? load<vf>(y + m * WIDE + c) : vf{}; });
    unrolled<R>(LZ_LAMBDA(r) {
      const vf w = widen<DTYPE>(rows + r * step + c * size_of(DTYPE));
      unrolled<M>(LZ_LAMBDA(m) { sum[m] = (x[m * ldx + k + r] - vf{}) * w + sum[m]; });
    });
    unrolled<M>(LZ_LAMBDA(m) { store(y + m * WIDE + c, sum[m]); });
  }
}
template <int M, int DTYPE> void add_rows(const Matrix& b, int64_t K, int64_t n, int64_t columns, const float* x, int64_t ldx, float* y) {
  int64_t k = 0;
  for (; k + 8 <= K; k += 8) add_rows<M, DTYPE, 8>(b, k, n, columns, x, ldx, y);
  for (; k < K; k++) add_rows<M, DTYPE, 1>(b, k, n, columns, x, ldx, y);
}
template <int M> void add_rows(const Matrix& b, int64_t K, int64_t n, int64_t columns, const float* x, int64_t ldx, float* y) {
  const auto f = b.dtype == LZ_F32 ? add_rows<M, LZ_F32> : b.dtype == LZ_F16 ? add_rows<M, LZ_F16> : add_rows<M, LZ_BF16>;
  f(b, K, n, columns, x, ldx, y);
}

// At most 4 rows of a, or 8 where b's rows lie as they are: b is read once, as it lies. What is left of its columns after whole
// lanes is a unit like any other.
void few_rows(const Product& p, Team& team) {
  const int64_t ldx = round_up(p.K, LANES), share = round_up(p.N / (2 * team.size) + 1, LANES), wide = least(share, WIDE);
  const int64_t blocks = (p.N + wide - 1) / wide, M = p.M;
  float *x = (float*)team.local, *y = x + 8 * ldx;  // y[8][WIDE]
  for (int64_t i; (i = team.take(1)) < blocks * p.batches;) {
    const Matrix a = p.left(i / blocks), b = p.right(i / blocks), o = p.matrix(p.o, i / blocks);
    const int64_t n = i % blocks * wide, columns = least(p.N - n, wide), whole = columns / LANES * LANES;
    memset(x, 0, 8 * ldx * 4);
    for (int64_t m = 0; m < M; m++) pack(a, m, 0, 1, p.K, x + m * ldx, ldx);
    if (b.column == 1) {
      (M == 1 ? add_rows<1> : M == 2 ? add_rows<2> : M <= 4 ? add_rows<4> : add_rows<8>)(b, p.K, n, whole, x, ldx, y);
      for (int64_t m = 0; m < M; m++) write_row(o, m, n, y + m * WIDE, whole);
    } else {
      const auto dots = M == 1 ? dense_rows<1> : M == 2 ? dense_rows<2> : dense_rows<4>;
      for (int64_t c = 0; c < whole; c += LANES) {
        dots(b.dtype, b.at(0, n + c), b.column * size_of(b.dtype), p.K, x, ldx, y);
        for (int64_t m = 0; m < M; m++) write_row(o, m, n + c, y + m * LANES, LANES);
      }
    }
    if (whole < columns) Floats<float>::multiply({a, b, o, p.K, 0, n + whole, M, columns - whole, 0, 0, team.local});
  }
}

bool few(const Product& p) {
  const Matrix b = p.right(0);
  return (b.column == 1 ? p.M <= 8 : b.row == 1 && p.M <= 4) && b.dtype != LZ_F64 && p.K > 0 && p.K <= FEW_K;
}

// A thin b: its columns are packed as rows by every thread, and each row of a, which is read once, as it lies, meets all.
bool thin(const Product& p) {
  const Matrix a = p.left(0);
  return p.batches == 1 && p.N <= THIN && p.M > 4 && p.K * THIN <= THIN_BYTES / 4 && a.column == 1 && p.a.dtype == LZ_F32 && p.b.dtype == LZ_F32 && p.o.dtype == LZ_F32;
}
void thin_columns(const Product& p, Team& team) {
  constexpr int ROWS = W < 16 ? 1 : 2;
  const Matrix a = p.left(0), b = transposed(p.right(0)), o = p.matrix(p.o, 0);
  const int64_t step = round_up(p.K, LANES), N = round_up(p.N, 8);
  float* panel = (float*)team.local;
  memset(panel, 0, N * step * 4);
  for (int64_t j = 0; j < p.N; j++)
    for (int64_t k = 0; k < p.K; k++) panel[j * step + k] = *(const float*)b.at(j, k);
  int64_t begin, end;
  team.part(p.M, ROWS, &begin, &end);
  for (int64_t t = begin; t < end; t += ROWS)
    for (int64_t j = 0; j < p.N; j += 8) {
      const float* x[ROWS];
      for (int r = 0; r < ROWS; r++) x[r] = (const float*)a.at(least(t + r, end - 1), 0);
      vf sum[LANES] = {};
      int64_t k = 0;
      const auto add = [&](auto read) __attribute__((always_inline)) {
        vf v[ROWS];
        unrolled<ROWS>(LZ_LAMBDA(r) { v[r] = read(x[r] + k); });
        unrolled<8>(LZ_LAMBDA(i) {
          const vf w = load<vf>(panel + (j + i) * step + k);
          unrolled<ROWS>(LZ_LAMBDA(r) { sum[r * 8 + i] = v[r] * w + sum[r * 8 + i]; });
        });
      };
      for (; k + W <= p.K; k += W) add([](const float* from) { return load<vf>(from); });
      if (k < p.K) add([&](const float* from) { vf v{}; memcpy(&v, from, (p.K - k) * 4); return v; });
      const f32x found = sums(sum);
      for (int r = 0; r < ROWS && t + r < end; r++)
        for (int64_t i = 0; i < least(p.N - j, 8); i++) *(float*)o.at(t + r, j + i) = found[r * 8 + i];
    }
}

// f(a null pointer to the kind of products), for a large one
template <class F> auto with_kind(const Product& p, F f) {
#if defined(__AVX512BF16__)
  if (Pairs::takes(p)) return f((Pairs*)nullptr);
#if defined(__AMX_BF16__)
  if (Triples::takes(p)) return f((Triples*)nullptr);
#endif
#endif
  return p.o.dtype == LZ_F64 ? f((Floats<double>*)nullptr) : f((Floats<float>*)nullptr);
}

void run(const Step& s, Team& team) {
  const Product p(s);
  if (!p.M || !p.N || !p.batches) return;
  if (few(p)) return few_rows(p, team);
  if (thin(p)) return thin_columns(p, team);
  if (p.M * p.N * p.K <= SMALL) return s.out->dtype == LZ_F64 ? apart<Floats<double>>(p, team) : apart<Floats<float>>(p, team);
  tiles_begin();
  with_kind(p, [&](auto* kind) { together(kind, p, team); });
  tiles_end();
}

size_t shared(const Step& s, int) {
  const Product p(s);
  return p.M * p.N * p.K <= SMALL ? 0 : with_kind(p, [&](auto* kind) { return bytes(kind, p); });
}
size_t local(const Step& s, int) {
  const Product p(s);
  if (thin(p)) return THIN_BYTES + THIN * LANES * 4;
  const int64_t unit = s.out->dtype == LZ_F64 ? Floats<double>::LOCAL : Floats<float>::LOCAL, rows = 32 * (round_up(p.K, LANES) + WIDE);
  return p.K > FEW_K || rows < unit ? unit : rows;
}

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

// MR rows of o from t on
template <int MR> void add_to(const Matrix& o, const Matrix& a, const Matrix& b, int64_t K, int64_t N, int64_t t) {
  const float *x = (const float*)a.at(t, 0), *w = (const float*)b.data;
  float* y = (float*)o.at(t, 0);
  const int64_t wide = N / 64 * 64, lanes = N / LANES * LANES;
  float_tile<MR>(w, b.row, K, x, a.row, y, true, o.row, (int)wide, a.column);
  float_tile<MR, LANES / W>(w + wide, b.row, K, x, a.row, y + wide, true, o.row, (int)(lanes - wide), a.column);
  for (int64_t m = 0; m < MR; m++)
    for (int64_t n = lanes; n < N; n++)
      for (int64_t k = 0; k < K; k++) y[m * o.row + n] += x[m * a.row + k * a.column] * w[k * b.row + n];
}
void run_add(const Step& s, Team& team) {
  const auto matrix = [](const View& v) { return Matrix{v.data, v.dtype, v.strides[0], v.strides[1]}; };
  const Matrix o = matrix(s.out[0]), a = matrix(s.in[0]);
  Matrix b = matrix(s.in[1]);
  const int64_t M = s.out->shape[0], N = s.out->shape[1], K = s.in[0].shape[1];
  if (b.column != 1) {
    pack(b, 0, 0, K, N, (float*)team.local, round_up(N, LANES));
    b = {team.local, LZ_F32, round_up(N, LANES), 1};
  }
  int64_t t, end;
  team.part(M, FLOAT_MR, &t, &end);
  for (; t + FLOAT_MR <= end; t += FLOAT_MR) add_to<FLOAT_MR>(o, a, b, K, N, t);
  for (; t < end; t++) add_to<1>(o, a, b, K, N, t);
}
size_t local_add(const Step& s, int) { return (s.in[0].shape[1] + 8) * round_up(s.out->shape[1], LANES) * 4; }
const char* check_add(const Step& s) {
  const char* wrong = check(s);
  if (wrong) return wrong;
  for (int i = 0; i < 3; i++)
    if (s.out[i].ndim != 2 || s.out[i].dtype != LZ_F32) return "wants float32 matrices";
  return s.out->shape[1] > 1 && s.out->strides[1] != 1 ? "wants an output whose columns are neighbours" : nullptr;
}

}  // namespace

extern const Kernel matmul, add_product;
const Kernel matmul = {"matmul", run, shared, local, check};
const Kernel add_product = {"add_product", run_add, nullptr, local_add, check_add};

LZ_NAMESPACE_END

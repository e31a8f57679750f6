// gather_mm: o (R, M, N) f32 = a[lhs[r]] (M, K) times b[rhs[r]], of a (A, M, K) f32|f16|bf16; lhs, rhs (R) integers.
// ints = [format, group]: 0 for b (B, K, N) f32|f16|bf16, any strides; else b (B, N, K bits / 32) u32 codes, with scales and
// [biases] (B, N, K / group), see codes.h, of which the transposes are taken. Negative indices count from the end.
//
// The plain loop multiplies matrix by matrix. The fast one orders the products by rhs, so that all that share a matrix of
// b are one tall product, of which a unit of work is MB rows and a panel of 64 columns of b, expanded in the cache. Bytes
// moved: a and o once a panel, b once for each MB rows that use it: as good as once, if many do.
#include "../rows.h"
#include "codes.h"
#include "gemm.h"

LZ_NAMESPACE_BEGIN

namespace {

constexpr int64_t MB = 96, KC = 512, NB = 64;

struct Grouped {
  View o, a, b;
  const View *scales, *biases, *lhs, *rhs;
  int64_t R, M, N, K, B, group;
  int format;
  explicit Grouped(const Step& s) : o(s.out[0]), a(s.in[0]), b(s.in[1]), scales(s.in + 2), biases(s.in + 3) {
    format = (int)s.ints[0], group = s.ints[1], lhs = s.in + 1 + parts_of(format), rhs = lhs + 1;
    R = o.shape[0], M = o.shape[1], N = o.shape[2], K = a.shape[2], B = b.shape[0];
  }
};

// The products in the order of rhs: first[e] … of `order` use matrix e.
struct Order {
  int64_t *first, *order, *left;
  Order(const Grouped& g, char* memory) : first((int64_t*)memory), order(first + g.B + 1), left(order + g.R) {}
  static size_t bytes(const Grouped& g) { return size_t(g.B + 1 + 2 * g.R) * 8; }
};

int64_t index_at(const View& v, int64_t i, int64_t size, Team& team) {
  int64_t index;
  loader<int64_t>(v.dtype)(&index, v.data + i * v.strides[0] * ITEM_SIZE[v.dtype], 1, 1);
  if (index >= -size && index < size) return index < 0 ? index + size : index;
  team.fail("[gather_mm] index %lld is out of range for size %lld", (long long)index, (long long)size);
  return 0;
}

void sort_products(const Grouped& g, const Order& at, Team& team) {
  memset(at.first, 0, (g.B + 1) * sizeof *at.first);
  for (int64_t r = 0; r < g.R; r++) at.first[index_at(*g.rhs, r, g.B, team) + 1]++;
  for (int64_t e = 0; e < g.B; e++) at.first[e + 1] += at.first[e];
  for (int64_t r = g.R - 1; r >= 0; r--) {
    const int64_t e = index_at(*g.rhs, r, g.B, team);
    at.left[r] = index_at(*g.lhs, r, g.a.shape[0], team);
    at.order[--at.first[e + 1]] = r;
  }
  for (int64_t e = 0; e < g.B; e++) at.first[e] = at.first[e + 1];
  at.first[g.B] = g.R;
}

// 16 columns of b[e] from n on, `depth` of K from k on -> to[depth][NB]; what lies past N is zero
void dequantize(const Grouped& g, int64_t e, int64_t k, int64_t depth, int64_t n, float* to, float* rows) {
  float scale[KC / 16], bias[KC / 16];
  for (int64_t j = 0; j < LANES; j++) {
    float* row = rows + j * KC;
    if (n + j >= g.N) {
      memset(row, 0, depth * 4);
      continue;
    }
    const auto at = [&](const View* v, int64_t column) { return v->data + (e * v->strides[0] + (n + j) * v->strides[1] + column) * ITEM_SIZE[v->dtype]; };
    row_sides(g.format, (int)g.group, g.scales->dtype, at(g.scales, k / g.group), parts_of(g.format) == 3 ? at(g.biases, k / g.group) : 0, depth / g.group, scale, bias);
    over_numbers(g.format, (int)g.group, at(&g.b, 0) + k * bits_of(g.format) / 8, scale, bias, depth,
                 [&](int64_t i, f32x v) __attribute__((always_inline)) { store(row + i, v); });
  }
  columns_f32(LZ_F32, (const char*)rows, KC * 4, depth, to, NB);
}

void copy_panel(const Grouped& g, int64_t e, int64_t k, int64_t depth, int64_t n, int64_t columns, float* to) {
  const int64_t item = ITEM_SIZE[g.b.dtype], row = g.b.strides[1], column = g.b.strides[2];
  const char* from = g.b.data + (e * g.b.strides[0] + k * row + n * column) * item;
  if (columns < NB) memset(to, 0, depth * NB * 4);
  if (row == 1 && columns == NB && column > 1) {
    for (int64_t c = 0; c < NB; c += LANES) columns_f32(g.b.dtype, from + c * column * item, column * item, depth, to + c, NB);
  } else {
    for (int64_t i = 0; i < depth; i++) loader<float>(g.b.dtype)(to + i * NB, from + i * row * item, column, columns);
  }
}

struct Work { float *block, *panel, *sums, *rows; };  // [MB][KC], [KC + 8][NB], [MB][NB], [LANES][KC]
constexpr size_t WORK = (MB * KC + (KC + 8) * NB + MB * NB + LANES * KC) * 4;

// rows [begin, begin + rows) of the product with matrix e, columns n …
void product(const Grouped& g, const Order& at, int64_t e, int64_t begin, int64_t rows, int64_t n, const Work& w) {
  const int64_t columns = least(g.N - n, NB), item = ITEM_SIZE[g.a.dtype];
  const Load<float> load = loader<float>(g.a.dtype);
  for (int64_t k = 0; k == 0 || k < g.K; k += KC) {
    const int64_t depth = least(g.K - k, KC);
    for (int64_t i = 0; i < rows; i++) {
      const int64_t r = at.order[at.first[e] + (begin + i) / g.M], m = (begin + i) % g.M;
      load(w.block + i * KC, g.a.data + (at.left[r] * g.a.strides[0] + m * g.a.strides[1] + k * g.a.strides[2]) * item, g.a.strides[2], depth);
    }
    if (!g.format) copy_panel(g, e, k, depth, n, columns, w.panel);
    else for (int64_t c = 0; c < columns; c += LANES) dequantize(g, e, k, depth, n + c, w.panel + c, w.rows);
    for (int64_t i = 0; i < rows; i += FLOAT_MR) {
      const auto tile = rows - i == 1 ? float_tile<1> : rows - i == 2 ? float_tile<2> : float_tile<FLOAT_MR>;
      tile(w.panel, NB, depth, w.block + i * KC, KC, w.sums + i * NB, k, NB, NB, 1);
    }
  }
  for (int64_t i = 0; i < rows; i++) {
    const int64_t r = at.order[at.first[e] + (begin + i) / g.M], m = (begin + i) % g.M;
    memcpy(g.o.as<float>() + (r * g.M + m) * g.N + n, w.sums + i * NB, columns * 4);
  }
}

void run(const Step& s, Team& team) {
  const Grouped g(s);
  const Order at(g, team.shared);
  if (team.id == 0) sort_products(g, at, team);
  team.barrier();
  float* local = (float*)team.local;
  const Work w = {local, local + MB * KC, local + MB * KC + (KC + 8) * NB, local + MB * KC + (KC + 8) * NB + MB * NB};
  const int64_t panels = (g.N + NB - 1) / NB;
  int64_t taken = team.take(1), before = 0;
  for (int64_t e = 0; e < g.B; e++) {
    const int64_t rows = (at.first[e + 1] - at.first[e]) * g.M, units = (rows + MB - 1) / MB * panels;
    for (; taken < before + units; taken = team.take(1)) {
      const int64_t begin = (taken - before) / panels * MB, n = (taken - before) % panels * NB;
      product(g, at, e, begin, least(rows - begin, MB), n, w);
    }
    before += units;
  }
}

size_t shared(const Step& s, int) { return Order::bytes(Grouped(s)); }
size_t local(const Step&, int) { return WORK; }

bool is_real(int dtype) { return dtype == LZ_F32 || dtype == LZ_F16 || dtype == LZ_BF16; }
const char* check(const Step& s) {
  if (s.n_out != 1 || s.n_int != 2 || s.n_in != 3 + parts_of(s.ints[0])) return "wants one output, inputs a, b, [scales, biases], lhs, rhs, and ints = [format, group]";
  const Grouped g(s);
  if (g.o.ndim != 3 || g.a.ndim != 3 || g.b.ndim != 3 || g.lhs->ndim != 1 || g.rhs->ndim != 1) return "wants arrays of three axes and indices of one";
  if (g.o.dtype != LZ_F32 || !is_real(g.a.dtype)) return "wants a of floats and a float32 output";
  if (!is_integer(g.lhs->dtype) || !is_integer(g.rhs->dtype)) return "indices must be integers";
  if (g.lhs->shape[0] != g.R || g.rhs->shape[0] != g.R || g.a.shape[1] != g.M) return "the output must be (R, M, N)";
  if (g.o.strides[2] != 1 || g.o.strides[1] != g.N || g.o.strides[0] != g.M * g.N) return "the output must be contiguous";
  if (!g.format) return is_real(g.b.dtype) && g.b.shape[1] == g.K && g.b.shape[2] == g.N ? nullptr : "b must be (B, K, N) of floats";
  for (const View* v = s.in + 1; v < g.lhs; v++)
    if (v->ndim != 3 || v->strides[2] != 1 || v->shape[1] != g.N || v->shape[0] != g.B) return "codes, scales and biases must be (B, N, ...), with contiguous rows";
  return check_parts(g.format, g.group, g.K, s.in + 1);
}

}  // namespace

extern const Kernel gather_mm;
const Kernel gather_mm = {"gather_mm", run, shared, local, check};

LZ_NAMESPACE_END

// Gradients of what norm.cpp computes, row by row: x, dy, dx (R, C), weight (C), all float32, float16 or bfloat16.
//   softmax_grad:    dx = y (dy - Σ y dy), where y is the softmax                                   in: y, dy
//   rms_norm_grad:   r = 1 / sqrt(mean x² + eps), n = r x, g = dy w, dx = r (g - n mean(g n))       in: x, dy, w
//                    dw = Σ_rows dy n                                                              out: dx, dw
//   layer_norm_grad: the same of x - mean x, and less mean g; db = Σ_rows dy                       out: dx, dw, db
// Threads share the rows; each sums the columns of its own, which are added up at the end.
#include "../functions.h"
#include "../rows.h"

LZ_NAMESPACE_BEGIN

LZ_INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Row r as floats up to whole vectors, filled up with zeros: where it lies, or in the buffer
LZ_INLINE const float* floats(const View& v, int64_t r, float* buffer) {
  const int64_t n = v.shape[1];
  const char* p = v.data + r * v.strides[0] * ITEM_SIZE[v.dtype];
  if (v.dtype == LZ_F32 && v.strides[1] == 1 && n % LANES == 0) return reinterpret_cast<const float*>(p);
  loader<float>(v.dtype)(buffer, p, v.strides[1], n);
  for (int64_t k = n; k < padded(n); k++) buffer[k] = 0;
  return buffer;
}

template <class Row> LZ_INLINE void for_rows(const Step& s, Team& team, Row row) {
  const View& out = s.out[0];
  const int64_t n = out.shape[1], width = padded(n);
  float* local = reinterpret_cast<float*>(team.local);
  int64_t begin, end;
  team.part(out.shape[0], 1, &begin, &end);
  for (int64_t r = begin; r < end; r++) {
    row(local, floats(s.in[0], r, local + width), floats(s.in[1], r, local + 2 * width), width);
    storer<float>(out.dtype)(out.data + r * out.strides[0] * ITEM_SIZE[out.dtype], local, out.strides[1], n);
  }
}

static void run_softmax_grad(const Step& s, Team& team) {
  for_rows(s, team, [](float* dx, const float* y, const float* dy, int64_t n) {
    f32x dot = {};
    for (int64_t k = 0; k < n; k += LANES) dot += loadf(y + k) * loadf(dy + k);
    const f32x all = splat(sum(dot));
    for (int64_t k = 0; k < n; k += LANES) store(dx + k, loadf(y + k) * (loadf(dy + k) - all));
  });
}

template <bool MEAN> static void run_norm_grad(const Step& s, Team& team) {
  const int64_t columns = s.out[0].shape[1], width = padded(columns);
  const float eps = (float)s.floats[0], each = 1.0f / (float)columns;
  float *local = reinterpret_cast<float*>(team.local), *w = local + 3 * width;
  float *totals = reinterpret_cast<float*>(team.shared), *dw = totals + team.id * 2 * width, *db = dw + width;
  const View weight = {s.in[2].data, s.in[2].dtype, 2, {1, columns}, {0, s.in[2].strides[0]}};
  if (const float* lies = floats(weight, 0, w); lies != w) memcpy(w, lies, width * 4);
  memset(dw, 0, 2 * width * 4);
  for_rows(s, team, [&](float* dx, const float* x, const float* dy, int64_t n) {
    f32x total = {}, squares = {}, g_sum = {}, dot = {};
    if (MEAN) for (int64_t k = 0; k < n; k += LANES) total += loadf(x + k);
    const f32x mean = splat(sum(total) * each);
    for (int64_t k = 0; k < n; k += LANES) {
      const f32x v = loadf(x + k) - mean, g = loadf(dy + k) * loadf(w + k);
      squares += v * v, g_sum += g, dot += g * v;
    }
    const float padding = (float)(n - columns) * mean[0] * mean[0];  // of the zeros that fill the last vector
    const float r = 1 / __builtin_sqrtf((sum(squares) - padding) * each + eps);
    const f32x scale = splat(r), along = splat(sum(dot) * each * r * r), g_mean = splat(MEAN ? sum(g_sum) * each : 0);
    for (int64_t k = 0; k < n; k += LANES) {
      const f32x d = loadf(dy + k), v = loadf(x + k) - mean;
      store(dx + k, (d * loadf(w + k) - g_mean - v * along) * scale);
      store(dw + k, loadf(dw + k) + d * v * scale);
      if (MEAN) store(db + k, loadf(db + k) + d);
    }
  });
  team.barrier();
  if (team.id) return;
  for (int i = 0; i < s.n_out - 1; i++) {
    float* sums = totals + i * width;
    for (int t = 1; t < team.size; t++)
      for (int64_t k = 0; k < width; k += LANES) store(sums + k, loadf(sums + k) + loadf(totals + (t * 2 + i) * width + k));
    storer<float>(s.out[1 + i].dtype)(s.out[1 + i].data, sums, s.out[1 + i].strides[0], columns);
  }
}

static size_t local(const Step& s, int) { return size_t(padded(s.out[0].shape[1])) * 4 * sizeof(float); }
static size_t shared(const Step& s, int threads) { return size_t(padded(s.out[0].shape[1])) * 2 * threads * sizeof(float); }

template <int N_IN, int N_OUT> static const char* check(const Step& s) {
  if (s.n_out != N_OUT || s.n_in != N_IN || s.n_float != (N_IN > 2)) return "wrong number of outputs, inputs or floats";
  const View& dx = s.out[0];
  if (dx.ndim != 2) return "the first output must be (R, C)";
  for (int i = 0; i < s.n_out + s.n_in; i++) {
    const View& v = s.out[i];
    const bool rows = i == 0 || (i >= s.n_out && i < s.n_out + 2);
    if (!is_float(v.dtype)) return "wants float32, float16 or bfloat16";
    if (rows ? v.ndim != 2 || v.shape[0] != dx.shape[0] || v.shape[1] != dx.shape[1] : v.ndim != 1 || v.shape[0] != dx.shape[1])
      return "arrays must be (R, C), weights and their gradients (C)";
  }
  return nullptr;
}

extern const Kernel softmax_grad, rms_norm_grad, layer_norm_grad;
const Kernel softmax_grad = {"softmax_grad", run_softmax_grad, nullptr, local, check<2, 1>};
const Kernel rms_norm_grad = {"rms_norm_grad", run_norm_grad<false>, shared, local, check<3, 2>};
const Kernel layer_norm_grad = {"layer_norm_grad", run_norm_grad<true>, shared, local, check<3, 3>};

LZ_NAMESPACE_END

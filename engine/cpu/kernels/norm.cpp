// softmax, rms_norm, layer_norm: o, i (R, C) in float32, float16 or bfloat16; w, b (C). Threads share the rows; each row
// is read once into an L1 buffer of floats, worked on there, and written once.
//   softmax:    y = exp(x - max x) / Σ exp(x - max x)
//   rms_norm:   y = x / sqrt(mean x² + eps) · w                                   floats = [eps]
//   layer_norm: y = (x - mean x) / sqrt(mean (x - mean x)² + eps) · w + b         floats = [eps]
#include "../functions.h"
#include "../rows.h"

LZ_NAMESPACE_BEGIN

LZ_INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Σ f(x[k]) over n floats, n a multiple of the lanes; four sums at once, for the adder's latency
template <class F> LZ_INLINE float sum_of(const float* x, int64_t n, F f) {
  f32x s[4] = {};
  int64_t k = 0;
  for (; k + 4 * LANES <= n; k += 4 * LANES)
    for (int j = 0; j < 4; j++) s[j] += f(loadf(x + k + j * LANES));
  for (; k < n; k += LANES) s[0] += f(loadf(x + k));
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

// y = row(x, C) for this thread's rows; x and y are the same buffer, filled up with `fill` to full vectors.
// The weights (inputs 1 and 2) follow it as floats.
template <class Row> LZ_INLINE void for_rows(const Step& s, Team& team, float fill, Row row) {
  const View &x = s.in[0], &y = s.out[0];
  const int64_t columns = x.shape[1], width = padded(columns);
  int64_t begin, end;
  team.part(x.shape[0], 1, &begin, &end);
  if (begin == end) return;
  float* buffer = reinterpret_cast<float*>(team.local);
  for (int i = 1; i < s.n_in; i++) {
    loader<float>(s.in[i].dtype)(buffer + i * width, s.in[i].data, s.in[i].strides[0], columns);
    for (int64_t k = columns; k < width; k++) buffer[i * width + k] = 0;
  }
  const Load<float> load = loader<float>(x.dtype);
  const Store<float> store = storer<float>(y.dtype);
  for (int64_t r = begin; r < end; r++) {
    load(buffer, x.data + r * x.strides[0] * ITEM_SIZE[x.dtype], x.strides[1], columns);
    for (int64_t k = columns; k < width; k++) buffer[k] = fill;
    row(buffer, width);
    store(y.data + r * y.strides[0] * ITEM_SIZE[y.dtype], buffer, y.strides[1], columns);
  }
}

static void run_softmax(const Step& s, Team& team) {
  for_rows(s, team, -__builtin_inff(), [](float* x, int64_t n) {
    f32x largest = splat(-__builtin_inff()), total = {};
    for (int64_t k = 0; k < n; k += LANES) largest = maximum(largest, loadf(x + k));
    const f32x shift = splat(max_of(largest));
    for (int64_t k = 0; k < n; k += LANES) {
      const f32x e = exp(loadf(x + k) - shift);
      store(x + k, e);
      total += e;
    }
    const f32x scale = splat(1 / sum(total));
    for (int64_t k = 0; k < n; k += LANES) store(x + k, loadf(x + k) * scale);
  });
}

static void run_rms_norm(const Step& s, Team& team) {
  const float eps = (float)s.floats[0], columns = (float)s.in[0].shape[1];
  for_rows(s, team, 0, [&](float* x, int64_t n) {
    const f32x scale = splat(1 / __builtin_sqrtf(sum_of(x, n, [](f32x v) { return v * v; }) / columns + eps));
    for (int64_t k = 0; k < n; k += LANES) store(x + k, loadf(x + k) * scale * loadf(x + n + k));
  });
}

static void run_layer_norm(const Step& s, Team& team) {
  const float eps = (float)s.floats[0], columns = (float)s.in[0].shape[1];
  for_rows(s, team, 0, [&](float* x, int64_t n) {
    const f32x mean = splat(sum_of(x, n, [](f32x v) { return v; }) / columns);
    const float padding = (float)(n - (int64_t)columns) * mean[0] * mean[0];  // the zeros that fill the last vector
    const float squares = sum_of(x, n, [&](f32x v) { return (v - mean) * (v - mean); }) - padding;
    const f32x scale = splat(1 / __builtin_sqrtf(squares / columns + eps));
    for (int64_t k = 0; k < n; k += LANES) store(x + k, (loadf(x + k) - mean) * scale * loadf(x + n + k) + loadf(x + 2 * n + k));
  });
}

static size_t local(const Step& s, int) { return size_t(padded(s.in[0].shape[1])) * s.n_in * sizeof(float); }

template <int N_WEIGHTS> static const char* check(const Step& s) {
  if (s.n_out != 1 || s.n_in != 1 + N_WEIGHTS || s.n_float != (N_WEIGHTS > 0)) return "wrong number of outputs, inputs or floats";
  const View &x = s.in[0], &y = s.out[0];
  if (x.ndim != 2 || y.ndim != 2 || x.shape[0] != y.shape[0] || x.shape[1] != y.shape[1]) return "input and output must both be (R, C)";
  for (int i = 0; i < 1 + s.n_in; i++)
    if (!is_float(s.out[i].dtype)) return "wants float32, float16 or bfloat16";
  for (int i = 1; i < s.n_in; i++)
    if (s.in[i].ndim != 1 || s.in[i].shape[0] != x.shape[1]) return "a weight must be (C)";
  return nullptr;
}

extern const Kernel softmax, rms_norm, layer_norm;
const Kernel softmax = {"softmax", run_softmax, nullptr, local, check<0>};
const Kernel rms_norm = {"rms_norm", run_rms_norm, nullptr, local, check<1>};
const Kernel layer_norm = {"layer_norm", run_layer_norm, nullptr, local, check<2>};

LZ_NAMESPACE_END

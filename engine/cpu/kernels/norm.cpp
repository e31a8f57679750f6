// softmax, rms_norm, layer_norm: o, i (R, C) in float32, float16 or bfloat16; w, b (C). Threads share the rows; each
// row is read once from memory, worked on in L1, and written once.
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

// Input i as floats, in this thread's workspace after the buffer for a row
LZ_INLINE float* weight(const Step& s, Team& team, int i) {
  return reinterpret_cast<float*>(team.local) + i * padded(s.in[0].shape[1]);
}
LZ_INLINE bool plain(const View& v) { return v.dtype == LZ_F32 && v.strides[1] == 1 && v.shape[1] % LANES == 0; }

// row(y, x, n) for this thread's rows, n floats each: in memory where they are plain floats, else in a buffer that is
// filled up with `fill` to full vectors.
template <class Row> LZ_INLINE void for_rows(const Step& s, Team& team, float fill, Row row) {
  const View &in = s.in[0], &out = s.out[0];
  const int64_t columns = in.shape[1], width = padded(columns);
  const Load<float> load = loader<float>(in.dtype);
  const Store<float> store = storer<float>(out.dtype);
  float* buffer = reinterpret_cast<float*>(team.local);
  int64_t begin, end;
  team.part(in.shape[0], 1, &begin, &end);
  for (int i = 1; i < s.n_in && begin < end; i++) {
    float* w = weight(s, team, i);
    loader<float>(s.in[i].dtype)(w, s.in[i].data, s.in[i].strides[0], columns);
    for (int64_t k = columns; k < width; k++) w[k] = 0;
  }
  for (int64_t r = begin; r < end; r++) {
    char* from = in.data + r * in.strides[0] * ITEM_SIZE[in.dtype];
    char* to = out.data + r * out.strides[0] * ITEM_SIZE[out.dtype];
    float* y = plain(out) ? reinterpret_cast<float*>(to) : buffer;
    if (plain(in)) {
      row(y, reinterpret_cast<const float*>(from), width);
    } else {
      load(buffer, from, in.strides[1], columns);
      for (int64_t k = columns; k < width; k++) buffer[k] = fill;
      row(y, buffer, width);
    }
    if (!plain(out)) store(to, y, out.strides[1], columns);
  }
}

static void run_softmax(const Step& s, Team& team) {
  for_rows(s, team, -__builtin_inff(), [](float* y, const float* x, int64_t n) {
    f32x largest = splat(-__builtin_inff()), total = {};
    for (int64_t k = 0; k < n; k += LANES) largest = maximum(largest, loadf(x + k));
    const f32x shift = splat(max_of(largest));
    for (int64_t k = 0; k < n; k += LANES) {
      const f32x e = exp(loadf(x + k) - shift);
      store(y + k, e);
      total += e;
    }
    const f32x scale = splat(1 / sum(total));
    for (int64_t k = 0; k < n; k += LANES) store(y + k, loadf(y + k) * scale);
  });
}

static void run_rms_norm(const Step& s, Team& team) {
  const float eps = (float)s.floats[0], columns = (float)s.in[0].shape[1];
  for_rows(s, team, 0, [&, w = weight(s, team, 1)](float* y, const float* x, int64_t n) {
    const f32x scale = splat(1 / __builtin_sqrtf(sum_of(x, n, [](f32x v) { return v * v; }) / columns + eps));
    for (int64_t k = 0; k < n; k += LANES) store(y + k, loadf(x + k) * scale * loadf(w + k));
  });
}

static void run_layer_norm(const Step& s, Team& team) {
  const float eps = (float)s.floats[0], columns = (float)s.in[0].shape[1];
  for_rows(s, team, 0, [&, w = weight(s, team, 1), b = weight(s, team, 2)](float* y, const float* x, int64_t n) {
    const f32x mean = splat(sum_of(x, n, [](f32x v) { return v; }) / columns);
    const float padding = ((float)n - columns) * mean[0] * mean[0];  // of the zeros that fill the last vector
    const float squares = sum_of(x, n, [&](f32x v) { return (v - mean) * (v - mean); }) - padding;
    const f32x scale = splat(1 / __builtin_sqrtf(squares / columns + eps));
    for (int64_t k = 0; k < n; k += LANES) store(y + k, (loadf(x + k) - mean) * scale * loadf(w + k) + loadf(b + k));
  });
}

static size_t local(const Step& s, int) { return size_t(padded(s.in[0].shape[1])) * s.n_in * sizeof(float); }

template <int N_WEIGHTS> static const char* check(const Step& s) {
  if (s.n_out != 1 || s.n_in != 1 + N_WEIGHTS || s.n_float != (N_WEIGHTS > 0))
    return "wrong number of outputs, inputs or floats";
  const View &x = s.in[0], &y = s.out[0];
  if (x.ndim != 2 || y.ndim != 2 || x.shape[0] != y.shape[0] || x.shape[1] != y.shape[1])
    return "input and output must both be (R, C)";
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

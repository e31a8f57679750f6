// softmax, rms_norm, layer_norm: o, i (R, C) in float32, float16 or bfloat16; w, b (C). Threads share the rows; each
// row is read once from memory, worked on in L1, and written once. Very wide rows of softmax are shared in pieces.
//   softmax:    y = exp(x - max x) / Σ exp(x - max x)
//   rms_norm:   y = x / sqrt(mean x² + eps) · w                                   floats = [eps]
//   layer_norm: y = (x - mean x) / sqrt(mean (x - mean x)² + eps) · w + b         floats = [eps]
#include "../functions.h"
#include "../rows.h"

LZ_NAMESPACE_BEGIN

LZ_INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// f(k, lanes) over n floats, sixteen at a time; get and put touch no more than these
template <class F> LZ_INLINE void over(int64_t n, F f) {
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) f(k, LANES);
  if (k < n) f(k, (int)(n - k));
}
LZ_INLINE f32x get(const float* p, int n, float rest = 0) { return n == LANES ? loadf(p) : load_some(p, n, rest); }
LZ_INLINE void put(float* p, f32x v, int n) { n == LANES ? store(p, v) : store_some(p, v, n); }

// Σ f(x[k]) over n floats, f(rest) being 0; four sums at once, for the adder's latency
template <class F> LZ_INLINE float sum_of(const float* x, int64_t n, float rest, F f) {
  f32x s[4] = {};
  int64_t k = 0;
  for (; k + 4 * LANES <= n; k += 4 * LANES)
    for (int j = 0; j < 4; j++) s[j] += f(loadf(x + k + j * LANES));
  for (; k < n; k += LANES) s[0] += f(get(x + k, n - k < LANES ? n - k : LANES, rest));
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

// Input i as floats, in this thread's workspace after the buffer for a row
LZ_INLINE float* weight(const Step& s, Team& team, int i) {
  return reinterpret_cast<float*>(team.local) + i * padded(s.in[0].shape[1]);
}
LZ_INLINE bool plain(const View& v) { return v.dtype == LZ_F32 && v.strides[1] == 1; }

// row(y, x, n) for this thread's rows, n floats each: in memory where they are plain floats, else in a buffer.
template <class Row> LZ_INLINE void for_rows(const Step& s, Team& team, Row row) {
  const View &in = s.in[0], &out = s.out[0];
  const int64_t columns = in.shape[1];
  const Load<float> load = loader<float>(in.dtype);
  const Store<float> store = storer<float>(out.dtype);
  const bool streams = plain(out) && in.shape[0] * columns * 4 >= STREAMED && out.strides[0] % 4 == 0 && columns % 4 == 0 &&
                       (uintptr_t)out.data % 16 == 0;
  const bool straight = plain(out) && !streams;
  float* buffer = reinterpret_cast<float*>(team.local);
  int64_t begin, end;
  team.part(in.shape[0], 1, &begin, &end);
  for (int i = 1; i < s.n_in && begin < end; i++)
    loader<float>(s.in[i].dtype)(weight(s, team, i), s.in[i].data, s.in[i].strides[0], columns);
  for (int64_t r = begin; r < end; r++) {
    char* from = in.data + r * in.strides[0] * ITEM_SIZE[in.dtype];
    char* to = out.data + r * out.strides[0] * ITEM_SIZE[out.dtype];
    float* y = straight ? reinterpret_cast<float*>(to) : buffer;
    if (!plain(in)) load(buffer, from, in.strides[1], columns);
    row(y, plain(in) ? reinterpret_cast<const float*>(from) : buffer, columns);
    if (streams) stream(to, y, columns * 4);
    else if (!straight) store(to, y, out.strides[1], columns);
  }
  if (streams) streamed();
}

// Asks for the next row, n floats further: a pass that computes leaves memory idle, and the next one would wait for it
LZ_INLINE void ask_ahead(const float* x, int64_t n) { __builtin_prefetch(x + n); }

struct Part { float largest, total; };  // of e^(x - largest)
LZ_INLINE float largest_of(const float* x, int64_t n) {  // a NaN may be missed: the exponentials keep it
  const f32x least = splat(-__builtin_inff());
  f32x m[4] = {least, least, least, least};
  int64_t k = 0;
  for (; k + 4 * LANES <= n; k += 4 * LANES)
    for (int j = 0; j < 4; j++) m[j] = maxf(loadf(x + k + j * LANES), m[j]);
  for (; k < n; k += LANES) m[0] = maxf(get(x + k, n - k < LANES ? n - k : LANES, least[0]), m[0]);
  return max_of(maxf(maxf(m[0], m[1]), maxf(m[2], m[3])));
}

constexpr int64_t PIECE = 16384, VERY_WIDE = 1 << 17;  // columns
static bool in_pieces(const Step& s) { return plain(s.in[0]) && plain(s.out[0]) && s.in[0].shape[1] >= VERY_WIDE; }
LZ_INLINE int64_t pieces(const Step& s) { return (s.in[0].shape[1] + PIECE - 1) / PIECE; }

// First the parts of all pieces, by all threads, then y: x is read twice.
static void run_wide_softmax(const Step& s, Team& team) {
  const int64_t columns = s.in[0].shape[1], n = pieces(s);
  Part* parts = reinterpret_cast<Part*>(team.shared);
  const float least = -__builtin_inff();
  int64_t begin, end;
  team.part(n, 1, &begin, &end);
  for (int64_t r = 0; r < s.in[0].shape[0]; r++) {
    const float* x = s.in[0].as<float>() + r * s.in[0].strides[0];
    float* y = s.out[0].as<float>() + r * s.out[0].strides[0];
    if (r) team.barrier();
    for (int64_t i = begin; i < end; i++) {
      const float* piece = x + i * PIECE;
      const int64_t size = columns - i * PIECE < PIECE ? columns - i * PIECE : PIECE;
      const float largest = largest_of(piece, size);
      const f32x shift = splat(largest == least ? 0 : largest);
      parts[i] = {largest, sum_of(piece, size, least, [&](f32x v) { return exp(v - shift); })};
    }
    team.barrier();
    float largest = least, total = 0;
    for (int64_t i = 0; i < n; i++) largest = parts[i].largest > largest ? parts[i].largest : largest;
    for (int64_t i = 0; i < n; i++) total += parts[i].total * exp(splat(parts[i].largest - largest))[0];
    const f32x shift = splat(largest), scale = splat(1 / total);
    const bool streams = (uintptr_t)y % 64 == 0;
    const int64_t first = begin * PIECE, last = end * PIECE < columns ? end * PIECE : columns;
    over(last - first, [&](int64_t k, int lanes) __attribute__((always_inline)) {
      const f32x v = exp(get(x + first + k, lanes) - shift) * scale;
      if (streams && lanes == LANES) stream(reinterpret_cast<char*>(y + first + k), &v, 64);
      else put(y + first + k, v, lanes);
    });
    streamed();
  }
}

#define LZ_LANES [&](int64_t k, int lanes) __attribute__((always_inline))
static void run_softmax(const Step& s, Team& team) {
  if (in_pieces(s)) return run_wide_softmax(s, team);
  for_rows(s, team, [](float* y, const float* x, int64_t n) {
    const f32x shift = splat(largest_of(x, n));
    f32x total = {};
    over(n, LZ_LANES {
      ask_ahead(x + k, n);
      const f32x e = exp(get(x + k, lanes, -__builtin_inff()) - shift);
      put(y + k, e, lanes);
      total += e;
    });
    const f32x scale = splat(1 / sum(total));
    over(n, LZ_LANES { put(y + k, get(y + k, lanes) * scale, lanes); });
  });
}

static void run_rms_norm(const Step& s, Team& team) {
  const float eps = (float)s.floats[0];
  for_rows(s, team, [&, w = weight(s, team, 1)](float* y, const float* x, int64_t n) {
    const f32x scale = splat(1 / __builtin_sqrtf(sum_of(x, n, 0, [](f32x v) { return v * v; }) / (float)n + eps));
    over(n, LZ_LANES { ask_ahead(x + k, n), put(y + k, get(x + k, lanes) * scale * get(w + k, lanes), lanes); });
  });
}

static void run_layer_norm(const Step& s, Team& team) {
  const float eps = (float)s.floats[0];
  for_rows(s, team, [&, w = weight(s, team, 1), b = weight(s, team, 2)](float* y, const float* x, int64_t n) {
    const f32x mean = splat(sum_of(x, n, 0, [](f32x v) { return v; }) / (float)n);
    const float squares = sum_of(x, n, mean[0], [&](f32x v) { return (v - mean) * (v - mean); });
    const f32x scale = splat(1 / __builtin_sqrtf(squares / (float)n + eps));
    over(n, LZ_LANES { ask_ahead(x + k, n), put(y + k, (get(x + k, lanes) - mean) * scale * get(w + k, lanes) + get(b + k, lanes), lanes); });
  });
}

static size_t shared_softmax(const Step& s, int) { return in_pieces(s) ? size_t(pieces(s)) * sizeof(Part) : 0; }
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
const Kernel softmax = {"softmax", run_softmax, shared_softmax, local, check<0>};
const Kernel rms_norm = {"rms_norm", run_rms_norm, nullptr, local, check<1>};
const Kernel layer_norm = {"layer_norm", run_layer_norm, nullptr, local, check<2>};

LZ_NAMESPACE_END

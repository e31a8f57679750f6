// linear_cross_entropy: logits = x wᵀ (or softcap tanh(logits / softcap)), loss = log Σ exp logits - logits[target], and its
// gradient of x, dx = (softmax - one hot) w, in one pass.
//   in: x (T, C) f32, targets (T) i32, w (V, C) floats or codes, scales, [biases]      out: loss (T) f32, [dx (T, C) f32]
//   ints [format (0: floats), group, fast]; floats [softcap]
// A row whose target is -1 has loss 0 and dx 0 and is not computed. Logits of some rows at a time are in memory, at most
// BUDGET bytes, so that w is expanded once for hundreds of rows. They become the gradient where they lie, as bf16 if that is
// what is multiplied, and meet w again in slices of columns, whose panels fit the second-level cache.
#include "product.h"

LZ_NAMESPACE_BEGIN

namespace {

constexpr int64_t BUDGET = 48 << 20, SLICE = 2048;

struct Head {
  View x, targets, w, scales, biases, loss, dx;
  int64_t T, C, V, format, group;
  bool fast, gradient;
  float softcap;
  explicit Head(const Step& s)
      : x(s.in[0]), targets(s.in[1]), w(s.in[2]), loss(s.out[0]), dx(s.out[s.n_out - 1]), T(x.shape[0]), C(x.shape[1]), V(w.shape[0]), format(s.ints[0]),
        group(s.ints[1]), fast(s.ints[2]), gradient(s.n_out == 2), softcap((float)s.floats[0]) {
    scales = s.in[format ? 3 : 2], biases = s.in[1 + parts_of(format)];
  }
  int64_t rows() const {  // that have their logits in memory
    const int64_t most = BUDGET / 4 / V / 32 * 32, some = most < 32 ? 32 : most > 512 ? 512 : most;
    return least(round_up(T, 32), some);
  }
  int32_t target(int64_t t) const { return targets.as<int32_t>()[t * targets.strides[0]]; }
  bool halves() const { return HALVES && fast; }  // the gradient of the logits
#if defined(__AVX512BF16__)
  static constexpr bool HALVES = true;
#else
  static constexpr bool HALVES = false;
#endif

  // f(o, a, w's rows from v on as the right side, transposed or not)
  template <class F> void with_weight(const View& o, const View& a, int64_t v, bool turned, F f) const {
    const auto from = [&](View part, int64_t size) { part.data += v * part.strides[0] * size; return part; };
    if (format) {
      const Quantized codes = {from(w, 4), from(scales, size_of(scales.dtype)), from(biases, size_of(biases.dtype)), (int)format, (int)group, turned};
      return f(Product(o, a, codes));
    }
    View b = from(w, size_of(w.dtype));
    if (turned) b.shape[0] = w.shape[1], b.shape[1] = w.shape[0], b.strides[0] = w.strides[1], b.strides[1] = w.strides[0];
    f(Product(o, a, b));
  }
  void product(const View& o, const View& a, int64_t v, bool turned, bool add, Team& team) const {
    with_weight(o, a, v, turned, [&](Product p) {
      p.add = add;
      multiply(p, fast, team);
    });
    team.barrier();
  }
  size_t product_bytes(const View& o, const View& a, bool turned) const {
    size_t bytes = 0;
    with_weight(o, a, 0, turned, [&](const Product& p) { bytes = packed_bytes(p, fast); });
    return bytes;
  }
};

View matrix(void* data, int64_t rows, int64_t columns, int64_t step, int dtype = LZ_F32) {
  return {(char*)data, dtype, 2, {rows, columns}, {step, 1}};
}

// The workspace of all threads.
struct Space {
  int64_t *order, *count;          // rows with a target, and their number
  float *x, *dx, *logits;          // of some rows, gathered
  char* packed;
  Space(const Head& h, char* at) {
    const int64_t R = h.rows();
    const auto take = [&](int64_t bytes) { char* p = at; at += round_up(bytes, 64); return p; };
    order = (int64_t*)take((h.T + 1) * 8), count = order + h.T;
    x = (float*)take(R * h.C * 4), dx = (float*)take(R * h.C * 4), logits = (float*)take(R * round_up(h.V, LANES) * 4);
    packed = at;
  }
};

// logits of one row -> its loss, and where they lie the gradient, as bf16 if `half`. Up to whole lanes p may be written.
float settle(float* p, int64_t n, int32_t target, float cap, bool gradient, bool half) {
  const int64_t end = round_up(n, LANES);
  for (int64_t k = n; k < end; k++) p[k] = 0;
  for (int64_t k = 0; cap && k < end; k += LANES) store(p + k, tanh(loadf(p + k) / cap) * cap);
  for (int64_t k = n; k < end; k++) p[k] = -__builtin_inff();
  f32x top = splat(-__builtin_inff()), total = {};
  for (int64_t k = 0; k < end; k += LANES) top = maxf(top, loadf(p + k));
  const float most = max_of(top), picked = p[target];
  for (int64_t k = 0; k < end; k += LANES) total += exp(loadf(p + k) - most);
  const float lse = most + log(splat(sum(total)))[0], bend = cap ? 1 / (cap * cap) : 0;
  const auto slope = [&](f32x v) { return exp(v - lse) * (1 - v * v * bend); };
  const float at_target = slope(splat(picked))[0] - (1 - picked * picked * bend);
  uint16_t* to = (uint16_t*)p;     // never ahead of what is read
  for (int64_t k = 0; gradient && k < n; k += LANES) {
    f32x v = slope(loadf(p + k));
    if (target >= k && target < k + LANES) v[target - k] = at_target;
    if (half) put_as(to + k, v);
    else put_as(p + k, v);
  }
  return lse - picked;
}

void run(const Step& s, Team& team) {
  const Head h(s);
  const Space space(h, team.shared);
  if (!h.T) return;
  if (team.id == 0) {
    *space.count = 0;
    for (int64_t t = 0; t < h.T; t++) {
      if (h.target(t) >= h.V) return team.fail("[linear_cross_entropy] target %d of row %d: there are %d classes", h.target(t), (int)t, (int)h.V);
      if (h.target(t) >= 0) { space.order[(*space.count)++] = t; continue; }
      h.loss.as<float>()[t * h.loss.strides[0]] = 0;
      if (h.gradient) memset(h.dx.as<float>() + t * h.dx.strides[0], 0, h.C * 4);
    }
  }
  team.barrier();
  Team inner = team;
  inner.shared = space.packed;
  tiles_begin();
  const int64_t wide = round_up(h.V, LANES);
  for (int64_t first = 0, n; first < *space.count; first += n) {
    n = least(*space.count - first, h.rows());
    const int64_t* order = space.order + first;
    int64_t begin, end;
    team.part(n, 1, &begin, &end);
    for (int64_t i = begin; i < end; i++) memcpy(space.x + i * h.C, h.x.as<float>() + order[i] * h.x.strides[0], h.C * 4);
    team.barrier();
    h.product(matrix(space.logits, n, h.V, wide), matrix(space.x, n, h.C, h.C), 0, true, false, inner);
    for (int64_t i = begin; i < end; i++) {
      float* loss = h.loss.as<float>() + order[i] * h.loss.strides[0];
      *loss = settle(space.logits + i * wide, h.V, h.target(order[i]), h.softcap, h.gradient, h.halves());
    }
    team.barrier();
    for (int64_t v = 0; h.gradient && v < h.V; v += SLICE) {
      char* slopes = (char*)space.logits + v * (h.halves() ? 2 : 4);
      const View a = matrix(slopes, n, least(h.V - v, SLICE), h.halves() ? 2 * wide : wide, h.halves() ? LZ_BF16 : LZ_F32);
      h.product(matrix(space.dx, n, h.C, h.C), a, v, false, v > 0, inner);
    }
    for (int64_t i = begin; h.gradient && i < end; i++) memcpy(h.dx.as<float>() + order[i] * h.dx.strides[0], space.dx + i * h.C, h.C * 4);
    team.barrier();
  }
  tiles_end();
}

size_t shared(const Step& s, int) {
  const Head h(s);
  const int64_t R = h.rows(), slice = least(h.V, SLICE);
  const size_t logits = h.product_bytes(matrix(0, R, h.V, h.V), matrix(0, R, h.C, h.C), true);
  const size_t back = h.product_bytes(matrix(0, R, h.C, h.C), matrix(0, R, slice, slice, h.halves() ? LZ_BF16 : LZ_F32), false);
  return (Space(h, nullptr).packed - (char*)nullptr) + (logits > back ? logits : back);
}
size_t local(const Step&, int) { return Floats<float>::LOCAL; }

const char* check(const Step& s) {
  if (s.n_int != 3 || s.n_float != 1 || s.n_in != 2 + parts_of(s.ints[0]) || s.n_out < 1 || s.n_out > 2) return "wants other numbers of inputs, outputs, integers or floats";
  const View &x = s.in[0], &targets = s.in[1], &w = s.in[2], &loss = s.out[0], &dx = s.out[s.n_out - 1];
  for (int i = 0; i < s.n_out + s.n_in; i++)
    if (s.out[i].ndim == 2 && s.out[i].shape[1] > 1 && s.out[i].strides[1] != 1) return "wants matrices whose columns are neighbours";
  if (x.ndim != 2 || w.ndim != 2 || targets.ndim != 1 || loss.ndim != 1 || x.dtype != LZ_F32 || loss.dtype != LZ_F32 || targets.dtype != LZ_I32)
    return "wants x (T, C) and loss (T) float32, targets (T) int32, w (V, C)";
  if (targets.shape[0] != x.shape[0] || loss.shape[0] != x.shape[0]) return "x, targets and loss must have as many rows";
  if (s.n_out == 2 && (dx.ndim != 2 || dx.dtype != LZ_F32 || dx.shape[0] != x.shape[0] || dx.shape[1] != x.shape[1])) return "dx must be like x";
  if (!s.ints[0]) return is_real(w.dtype) && w.shape[1] == x.shape[1] ? nullptr : "w must be floats, as many columns as x";
  for (int i = 3; i < s.n_in; i++) if (s.in[i].ndim != 2 || s.in[i].shape[0] != w.shape[0]) return "scales and biases must have the rows of w";
  return check_parts(s.ints[0], s.ints[1], x.shape[1], s.in + 2);
}

}  // namespace

extern const Kernel linear_cross_entropy;
const Kernel linear_cross_entropy = {"linear_cross_entropy", run, shared, local, check};

LZ_NAMESPACE_END

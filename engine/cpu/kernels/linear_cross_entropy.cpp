// linear_cross_entropy: logits = x wᵀ (or softcap tanh(logits / softcap)), loss = log Σ exp logits - logits[target], and its
// gradient of x, dx = (softmax - one hot) w, in one pass.
//   in: x (T, C) f32, targets (T) i32, w (V, C) floats or codes, scales, [biases]      out: loss (T) f32, [dx (T, C) f32]
//   ints [format (0: floats), group, fast]; floats [softcap]
// A row whose target is -1 has loss 0 and dx 0 and is not computed. Logits are computed twice, in slices of columns: once for the
// largest and the sum of exponentials of each row, and once to become the gradient where they lie, as bf16 if that is what is
// multiplied, and to meet their slice of w again. So few are in memory that w is expanded three times for ROWS rows, which
// costs less than the second product saves.
#include "product.h"

LZ_NAMESPACE_BEGIN

namespace {

constexpr int64_t ROWS = 2048, SLICE = 2048;

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
  int64_t rows() const { return least(round_up(T, 32), ROWS); }  // that are computed together
  int64_t columns(int64_t v) const { return least(V - v, SLICE); }
  int32_t target(int64_t t) const { return targets.as<int32_t>()[t * targets.strides[0]]; }
  bool halves() const { return HALVES && fast; }  // x and the gradient of the logits
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
  float *dx, *logits, *top, *total, *picked;  // of some rows: the gradient, a slice of logits, their largest, Σ exp(logit - top), the target's
  char *x, *packed;
  Space(const Head& h, char* at) {
    const int64_t R = h.rows();
    const auto take = [&](int64_t bytes) { char* p = at; at += round_up(bytes, 64); return p; };
    order = (int64_t*)take((h.T + 1) * 8), count = order + h.T;
    x = take(R * h.C * 4), dx = (float*)take(R * h.C * 4), logits = (float*)take(R * SLICE * 4);
    top = (float*)take(R * 12), total = top + R, picked = total + R;
    packed = at;
  }
};

void gather(const float* from, int64_t n, bool half, char* to) {
  if (half) over(n, LZ_LAMBDA2(k, m) {
    uint16_t bits[LANES];
    put_as(bits, get(from + k, m));
    memcpy(to + k * 2, bits, m * 2);
  });
  else memcpy(to, from, n * 4);
}
// n logits of a row, up to whole lanes of which may be written, -> p, and what is known of the row
void tally(float* p, int64_t n, int64_t target, float cap, float* top, float* total, float* picked) {
  const int64_t end = round_up(n, LANES);
  for (int64_t k = n; k < end; k++) p[k] = 0;
  for (int64_t k = 0; cap && k < end; k += LANES) store(p + k, tanh(loadf(p + k) / cap) * cap);
  for (int64_t k = n; k < end; k++) p[k] = -__builtin_inff();
  f32x most = splat(*top), sums = {};
  for (int64_t k = 0; k < end; k += LANES) most = maxf(most, loadf(p + k));
  const float now = max_of(most);
  for (int64_t k = 0; k < end; k += LANES) sums += exp(loadf(p + k) - now);
  *total = *total * exp(splat(*top - now))[0] + sum(sums), *top = now;
  if (target >= 0 && target < n) *picked = p[target];
}
// n logits of a row -> their gradient, where they lie, as bf16 if `half`
void slopes(float* p, int64_t n, int64_t target, float cap, float lse, bool half) {
  const float bend = cap ? 1 / (cap * cap) : 0;
  uint16_t* to = (uint16_t*)p;     // never ahead of what is read
  for (int64_t k = 0; k < n; k += LANES) {
    f32x v = loadf(p + k);
    if (cap) v = tanh(v / cap) * cap;
    f32x slope = exp(v - lse);
    if (target >= k && target < k + LANES) slope[target - k] -= 1;
    slope *= 1 - v * v * bend;
    if (half) put_as(to + k, slope);
    else put_as(p + k, slope);
  }
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
  for (int64_t first = 0, n; first < *space.count; first += n) {
    n = least(*space.count - first, h.rows());
    const int64_t *order = space.order + first, size = h.halves() ? 2 : 4;
    int64_t begin, end;
    team.part(n, 1, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
      gather(h.x.as<float>() + order[i] * h.x.strides[0], h.C, h.halves(), space.x + i * h.C * size);
      space.top[i] = -__builtin_inff(), space.total[i] = 0;
    }
    team.barrier();
    // f(a row's logits from v on, their number, the row, its target from there)
    const auto over_logits = [&](int64_t v, auto f) {
      h.product(matrix(space.logits, n, h.columns(v), SLICE), matrix(space.x, n, h.C, h.C, h.halves() ? LZ_BF16 : LZ_F32), v, true, false, inner);
      for (int64_t i = begin; i < end; i++) f(space.logits + i * SLICE, h.columns(v), i, h.target(order[i]) - v);
      team.barrier();
    };
    for (int64_t v = 0; v < h.V; v += SLICE)
      over_logits(v, [&](float* p, int64_t many, int64_t i, int64_t target) {
        tally(p, many, target, h.softcap, space.top + i, space.total + i, space.picked + i);
      });
    for (int64_t i = begin; i < end; i++) {
      space.top[i] += log(splat(space.total[i]))[0];
      h.loss.as<float>()[order[i] * h.loss.strides[0]] = space.top[i] - space.picked[i];
    }
    for (int64_t v = 0; h.gradient && v < h.V; v += SLICE) {
      over_logits(v, [&](float* p, int64_t many, int64_t i, int64_t target) { slopes(p, many, target, h.softcap, space.top[i], h.halves()); });
      const View a = matrix(space.logits, n, h.columns(v), SLICE * 4 / size, h.halves() ? LZ_BF16 : LZ_F32);
      h.product(matrix(space.dx, n, h.C, h.C), a, v, false, v > 0, inner);
    }
    for (int64_t i = begin; h.gradient && i < end; i++) memcpy(h.dx.as<float>() + order[i] * h.dx.strides[0], space.dx + i * h.C, h.C * 4);
    team.barrier();
  }
  tiles_end();
}

size_t shared(const Step& s, int) {
  const Head h(s);
  const int64_t R = h.rows(), kind = h.halves() ? LZ_BF16 : LZ_F32;
  const size_t logits = h.product_bytes(matrix(0, R, h.columns(0), SLICE), matrix(0, R, h.C, h.C, kind), true);
  const size_t back = h.product_bytes(matrix(0, R, h.C, h.C), matrix(0, R, h.columns(0), SLICE, kind), false);
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

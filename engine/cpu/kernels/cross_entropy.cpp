// Cross-entropy of logits x (R, C), float32, float16 or bfloat16, and classes t (R), integers. Logits are read from
// memory once in each direction, and never normalised there.
//   cross_entropy_lse:  lse = log Σ exp x, loss = lse - x[t]                        in: x, t    out: loss, lse (R) f32
//   cross_entropy_grad: dx = exp(x - lse) dlse, and dpicked more at t               in: x, t, lse, dlse, dpicked
#include "../functions.h"
#include "../rows.h"

LZ_NAMESPACE_BEGIN

constexpr int64_t PART = 1024;  // logits at a time, as floats

// f(floats, first column, columns) for the parts of row r; the last one is filled up with `fill` to whole vectors
template <class F> LZ_INLINE void for_parts(const View& x, int64_t r, float* buffer, float fill, F f) {
  for (int64_t c = 0; c < x.shape[1]; c += PART) {
    const int64_t n = x.shape[1] - c < PART ? x.shape[1] - c : PART;
    loader<float>(x.dtype)(buffer, x.data + (r * x.strides[0] + c * x.strides[1]) * ITEM_SIZE[x.dtype], x.strides[1], n);
    for (int64_t k = n; k % LANES; k++) buffer[k] = fill;
    f(buffer, c, n);
  }
}
LZ_INLINE float at(const View& v, int64_t r) { return v.as<float>()[r * v.strides[0]]; }
LZ_INLINE bool class_of(const Step& s, Team& team, int64_t r, int64_t* target) {
  const View &x = s.in[0], &t = s.in[1];
  loader<int64_t>(t.dtype)(target, t.data + r * t.strides[0] * ITEM_SIZE[t.dtype], 1, 1);
  const bool inside = *target >= 0 && *target < x.shape[1];
  if (!inside) team.fail("[cross_entropy] target %lld of row %lld: there are %lld classes", (long long)*target, (long long)r, (long long)x.shape[1]);
  return inside;
}

static void run_lse(const Step& s, Team& team) {
  const View& x = s.in[0];
  alignas(64) float buffer[PART];
  int64_t begin, end, target;
  team.part(x.shape[0], 1, &begin, &end);
  for (int64_t r = begin; r < end && class_of(s, team, r, &target); r++) {
    f32x top = splat(-__builtin_inff()), total = {};
    for_parts(x, r, buffer, -__builtin_inff(), [&](const float* p, int64_t, int64_t n) {
      f32x most = top;
      for (int64_t k = 0; k < n; k += LANES) most = maxf(most, loadf(p + k));
      most = splat(max_of(most));
      total = select(top == most, total, total * exp(top - most));
      top = most;
      for (int64_t k = 0; k < n; k += LANES) total += exp(loadf(p + k) - top);
    });
    float picked;
    loader<float>(x.dtype)(&picked, x.data + (r * x.strides[0] + target * x.strides[1]) * ITEM_SIZE[x.dtype], 1, 1);
    const float lse = top[0] + log(splat(sum(total)))[0];
    s.out[0].as<float>()[r * s.out[0].strides[0]] = lse - picked;
    s.out[1].as<float>()[r * s.out[1].strides[0]] = lse;
  }
}

static void run_grad(const Step& s, Team& team) {
  const View &x = s.in[0], &dx = s.out[0];
  alignas(64) float buffer[PART];
  int64_t begin, end, target;
  team.part(x.shape[0], 1, &begin, &end);
  for (int64_t r = begin; r < end && class_of(s, team, r, &target); r++) {
    const f32x lse = splat(at(s.in[2], r)), dlse = splat(at(s.in[3], r));
    for_parts(x, r, buffer, 0, [&](float* p, int64_t c, int64_t n) {
      for (int64_t k = 0; k < n; k += LANES) store(p + k, exp(loadf(p + k) - lse) * dlse);
      if (target >= c && target < c + n) p[target - c] += at(s.in[4], r);
      storer<float>(dx.dtype)(dx.data + (r * dx.strides[0] + c * dx.strides[1]) * ITEM_SIZE[dx.dtype], p, dx.strides[1], n);
    });
  }
}

template <int N_IN> static const char* check(const Step& s) {
  constexpr int N_OUT = N_IN == 2 ? 2 : 1;
  if (s.n_in != N_IN || s.n_out != N_OUT) return "wrong number of outputs or inputs";
  const View& x = s.in[0];
  if (x.ndim != 2 || !is_float(x.dtype)) return "logits must be (R, C) in float32, float16 or bfloat16";
  if (!is_integer(s.in[1].dtype)) return "targets must be integers";
  for (int i = 0; i < N_OUT + N_IN; i++) {
    const View& v = s.out[i];
    if (i == N_OUT || (N_OUT == 1 && i == 0)) {
      if (v.ndim != 2 || v.shape[0] != x.shape[0] || v.shape[1] != x.shape[1] || !is_float(v.dtype)) return "gradient and logits must both be (R, C)";
    } else if (v.ndim != 1 || v.shape[0] != x.shape[0] || (i != N_OUT + 1 && v.dtype != LZ_F32)) {
      return "all but the logits must be (R), and float32 but for the targets";
    }
  }
  return nullptr;
}

extern const Kernel cross_entropy_lse, cross_entropy_grad;
const Kernel cross_entropy_lse = {"cross_entropy_lse", run_lse, nullptr, nullptr, check<2>};
const Kernel cross_entropy_grad = {"cross_entropy_grad", run_grad, nullptr, nullptr, check<5>};

LZ_NAMESPACE_END

// What recurrent layers do to the sequences of a step; states are updated in place.
//
// short_conv: y (T, C) f32 <- x (T, C), weight (C, W), states (N, W-1, C), slots, starts, counts, lengths (B) i32.
//   y[t] = silu(sum_j weight[:, j] x[t - W + 1 + j]) within each sequence; what came before the step is in the states.
//   Threads share the channels; bytes: x and y once (the last W rows stay in the cache).
//
// gated_delta: o (T, H, E) f32 <- q, k (T, K, D), v (T, H, E), decay, rate (T, H), states (N, H, D, E), slots, starts,
//   counts, lengths (B) i32. floats = [scale, eps]. q and k are normed to length 1, q times scale; then for each token
//   S = e^decay S, S += k rate (v - k S), o = q S
//
// The plain loop goes through S three times a token. The columns of S are independent, so a unit of work is 64 columns of
// one head of one sequence: 32 KB for D = 128, which stay in the cache from the first token to the last. Tokens are taken
// C = 16 at a time: with G the running sum of decays, S0 the state before them and c_i the change rate (v - k S) of token i,
//   c_i = rate_i (v_i - e^G_i k_i S0 - sum_{j<i} e^(G_i - G_j) (k_i k_j) c_j)
//   o_i = e^G_i q_i S0 + sum_{j<=i} e^(G_i - G_j) (q_i k_j) c_j
//   S   = e^G_n S0 + sum_j e^(G_n - G_j) k_j c_j
// which are products of matrices but for the sums over j < i (arXiv:2412.06464, 3.3). A decoded token is a chunk of one.
// Bytes: S once in and out a step, q and k once for each 64 columns.
#include "gemm.h"

LZ_NAMESPACE_BEGIN

namespace {

constexpr int64_t C = 16, EB = 64, SPARE = 8;  // tokens of a chunk, columns of a unit, rows that a tile may run over
constexpr int NARROW = W == 16 ? 1 : 2;        // vectors of a tile of 16 columns

// The sequences of a step: the last four inputs.
struct Sequences {
  const int32_t *slots, *starts, *counts, *lengths;
  int64_t B;
  explicit Sequences(const View* v)
      : slots(v[0].as<int32_t>()), starts(v[1].as<int32_t>()), counts(v[2].as<int32_t>()), lengths(v[3].as<int32_t>()), B(v->shape[0]) {}
  bool valid(int64_t b, int64_t tokens, int64_t states, Team& team) const {
    if (slots[b] >= 0 && slots[b] < states && starts[b] >= 0 && counts[b] >= 0 && starts[b] + (int64_t)counts[b] <= tokens) return true;
    team.fail("sequence %d: slot %d of %d, rows %d + %d of %d", (int)b, slots[b], (int)states, starts[b], counts[b], (int)tokens);
    return false;
  }
};

// rows of no sequence: rows between sequences are rare, so each thread looks at its part of all rows
void clear_unowned(const Sequences& q, const View& y, int64_t width, Team& team) {
  int64_t begin, end, owned = 0;
  for (int64_t b = 0; b < q.B; b++) owned += q.counts[b];
  if (owned >= y.shape[0]) return;
  team.part(y.shape[0], 1, &begin, &end);
  for (int64_t t = begin; t < end; t++) {
    bool mine = false;
    for (int64_t b = 0; b < q.B; b++) mine |= t >= q.starts[b] && t < q.starts[b] + q.counts[b];
    if (!mine) memset(y.as<float>() + t * width, 0, width * 4);
  }
}

// short_conv

void run_conv(const Step& s, Team& team) {
  const View &x = s.in[0], &weight = s.in[1], &states = s.in[2], &y = s.out[0];
  const Sequences q(s.in + 3);
  const int64_t channels = x.shape[1], taps = weight.shape[1], past = taps - 1;
  clear_unowned(q, y, channels, team);
  int64_t begin, end;
  team.part(channels, LANES, &begin, &end);
  const int64_t width = end - begin;
  float* w = (float*)team.local;                          // [taps][width]
  const float** rows = (const float**)(w + taps * round_up(channels, LANES));
  float* nothing = (float*)(rows + taps);
  for (int64_t j = 0; j < taps; j++)
    for (int64_t c = 0; c < width; c++) w[j * width + c] = weight.as<float>()[(begin + c) * taps + j];
  memset(nothing, 0, width * 4);
  for (int64_t b = 0; b < q.B && width > 0; b++) {
    if (!q.valid(b, x.shape[0], states.shape[0], team)) return;
    const int64_t n = q.counts[b];
    const bool fresh = q.lengths[b] == n;
    float* state = states.as<float>() + q.slots[b] * past * channels + begin;
    const auto token = [&](int64_t i) -> const float* {   // the sequence's i-th of this step, or before it
      if (i >= 0) return x.as<float>() + (q.starts[b] + i) * x.strides[0] + begin;
      return fresh ? nothing : state + (past + i) * channels;
    };
    for (int64_t t = 0; t < n; t++) {
      float* out = y.as<float>() + (q.starts[b] + t) * channels + begin;
      for (int64_t j = 0; j < taps; j++) rows[j] = token(t - past + j);
      over(width, LZ_LAMBDA2(c, lanes) {
        f32x sum{};
        for (int64_t j = 0; j < taps; j++) sum = fma(get(rows[j] + c, lanes), get(w + j * width + c, lanes), sum);
        put(out + c, sum * sigmoid(sum), lanes);
      });
    }
    for (int64_t j = 0; n && j < past; j++) memmove(state + j * channels, token(n - past + j), width * 4);
  }
}

size_t local_conv(const Step& s, int) {
  const int64_t channels = round_up(s.in[0].shape[1], LANES), taps = s.in[1].shape[1];
  return (taps + 1) * channels * 4 + taps * sizeof(float*);
}

const char* check_sequences(const View* v) {
  for (int i = 0; i < 4; i++)
    if (v[i].dtype != LZ_I32 || v[i].ndim != 1 || v[i].shape[0] != v[0].shape[0] || (v[i].shape[0] > 1 && v[i].strides[0] != 1)) return "slots, starts, counts and lengths must be int32 (B)";
  return nullptr;
}

const char* check_conv(const Step& s) {
  if (s.n_out != 2 || s.n_in != 7) return "wants y, states and x, weight, states, slots, starts, counts, lengths";
  for (int i = 0; i < 3; i++) if (s.in[i].dtype != LZ_F32) return "x, weight and states must be float32";
  if (s.in[0].ndim != 2 || s.in[1].ndim != 2 || s.in[2].ndim != 3 || (s.in[0].shape[0] && s.in[0].strides[1] != 1)) return "wants x (T, C), weight (C, W), states (N, W-1, C)";
  if (s.in[1].shape[0] != s.in[0].shape[1] || s.in[2].shape[2] != s.in[0].shape[1] || s.in[2].shape[1] != s.in[1].shape[1] - 1) return "sizes of x, weight and states do not agree";
  return check_sequences(s.in + 3);
}

// gated_delta

struct Delta {
  View q, k, v, decay, rate, states, o;
  int64_t K, H, D, E, Dp;                                  // Dp: D in whole vectors
  float scale, eps;
  explicit Delta(const Step& s)
      : q(s.in[0]), k(s.in[1]), v(s.in[2]), decay(s.in[3]), rate(s.in[4]), states(s.in[5]), o(s.out[0]), K(k.shape[1]), H(v.shape[1]),
        D(k.shape[2]), E(v.shape[2]), Dp(round_up(D, LANES)), scale((float)s.floats[0]), eps((float)s.floats[1]) {}
};

// A thread's workspace. x: k of the chunk's tokens, then q; turned: k again, a column a token, decayed to the chunk's end;
// state: the unit's columns of S; changes: c; dots: k and q times k; reads: k and q times S0.
struct Room {
  float *x, *turned, *state, *changes, *dots, *reads;
  Room(char* local, int64_t Dp) {
    x = (float*)local, turned = x + (2 * C + SPARE) * Dp, state = turned + (Dp + SPARE) * C, changes = state + (Dp + SPARE) * EB;
    dots = changes + C * EB, reads = dots + (2 * C + SPARE) * C;
  }
  static size_t bytes(int64_t Dp) {
    return ((2 * C + SPARE) * Dp + (Dp + SPARE) * (C + EB) + C * EB + (2 * C + SPARE) * (C + EB)) * 4;
  }
};

// y (rows, columns) (+)= x (rows, depth) panel (depth, columns): up to SPARE rows past the last are written too
template <int NV> void product(const float* panel, int64_t ldp, int64_t depth, const float* x, int64_t ldx, float* y, int64_t ldy, int64_t rows, bool add) {
  for (int64_t i = 0; i < rows; i += FLOAT_MR) {
    const auto tile = rows - i == 1 ? float_tile<1, NV> : rows - i == 2 ? float_tile<2, NV> : float_tile<FLOAT_MR, NV>;
    tile(panel, ldp, depth, x + i * ldx, ldx, y + i * ldy, add, ldy, (int)ldp, 1);
  }
}

void normed(const float* from, int64_t n, float scale, float eps, float* to, int64_t padded) {
  f32x squares{};
  over(n, LZ_LAMBDA2(d, lanes) { const f32x v = get(from + d, lanes); squares = fma(v, v, squares); });
  const float factor = scale / __builtin_sqrtf(sum(squares) + eps);
  over(n, LZ_LAMBDA2(d, lanes) { put(to + d, get(from + d, lanes) * factor, lanes); });
  if (padded > n) memset(to + n, 0, (padded - n) * 4);
}

// e^(at - G) of each token, at most 1; in double until then: after a strong decay G is large and its differences are not
f32x decay_since(const double* running, double at) {
  float since[C];
  for (int64_t j = 0; j < C; j++) since[j] = (float)(at - running[j]);
  return exp(minf(loadf(since), splat(0)));
}

// n <= C tokens from row t on, head h, columns e …
void chunk(const Delta& g, const Room& r, int64_t t, int64_t n, int64_t h, int64_t e) {
  const int64_t head = h / (g.H / g.K), columns = least(g.E - e, EB);
  float rate[C] = {}, kept[C] = {};                        // kept: e^G
  double running[C] = {}, total = 0;                       // G
  for (int64_t i = 0; i < n; i++) {
    normed(g.k.as<float>() + (t + i) * g.k.strides[0] + head * g.k.strides[1], g.D, 1, g.eps, r.x + i * g.Dp, g.Dp);
    normed(g.q.as<float>() + (t + i) * g.q.strides[0] + head * g.q.strides[1], g.D, g.scale, g.eps, r.x + (n + i) * g.Dp, g.Dp);
    rate[i] = g.rate.as<float>()[(t + i) * g.H + h];
    running[i] = total += g.decay.as<float>()[(t + i) * g.H + h];
  }
  for (int64_t i = 0; i < n; i++) kept[i] = (float)running[i];
  store(kept, exp(loadf(kept)));
  const f32x to_end = decay_since(running, total);
  for (int64_t d = 0; d < g.Dp; d += LANES) turn(r.x + d, g.Dp, r.turned + d * C, C);
  product<NARROW>(r.turned, C, g.Dp, r.x, g.Dp, r.dots, C, 2 * n, false);
  product<FLOAT_NV>(r.state, EB, g.Dp, r.x, g.Dp, r.reads, EB, 2 * n, false);
  for (int64_t i = 0; i < n; i++) {
    const f32x since = decay_since(running, running[i]);
    float of_k[C], of_q[C], v[EB] = {};
    store(of_k, since * loadf(r.dots + i * C)), store(of_q, since * loadf(r.dots + (n + i) * C));
    memcpy(v, g.v.as<float>() + (t + i) * g.v.strides[0] + h * g.v.strides[1] + e, columns * 4);
    float *change = r.changes + i * EB, *out = r.reads + (n + i) * EB;
    for (int64_t c = 0; c < EB; c += W) {
      vf a = load<vf>(v + c) - each(kept[i]) * load<vf>(r.reads + i * EB + c), b = each(kept[i]) * load<vf>(out + c);
      for (int64_t j = 0; j < i; j++) {
        const vf other = load<vf>(r.changes + j * EB + c);
        a -= each(of_k[j]) * other, b += each(of_q[j]) * other;
      }
      a *= each(rate[i]);
      store(change + c, a), store(out + c, b + each(of_q[i]) * a);
    }
    memcpy(g.o.as<float>() + ((t + i) * g.H + h) * g.E + e, out, columns * 4);
  }
  const vf all = each(kept[n - 1]);
  for (int64_t d = 0; d < g.Dp * C; d += LANES) store(r.turned + d, loadf(r.turned + d) * to_end);
  for (int64_t d = 0; d < g.Dp * EB; d += W) store(r.state + d, all * load<vf>(r.state + d));
  product<FLOAT_NV>(r.changes, EB, n, r.turned, C, r.state, EB, g.Dp, true);
}

void run_delta(const Step& s, Team& team) {
  const Delta g(s);
  const Sequences q(s.in + 6);
  const Room r(team.local, g.Dp);
  const int64_t blocks = (g.E + EB - 1) / EB, units = g.H * blocks;
  clear_unowned(q, g.o, g.H * g.E, team);
  memset(r.x, 0, (r.state - r.x) * 4);  // rows that a tile runs over hold numbers
  for (int64_t unit = team.take(1); unit < q.B * units; unit = team.take(1)) {
    const int64_t b = unit / units, h = unit % units / blocks, e = unit % blocks * EB, columns = least(g.E - e, EB);
    if (!q.valid(b, g.q.shape[0], g.states.shape[0], team)) return;
    if (!q.counts[b]) continue;
    float* state = g.states.as<float>() + (q.slots[b] * g.H + h) * g.D * g.E + e;
    memset(r.state, 0, (g.Dp + SPARE) * EB * 4);
    if (q.lengths[b] != q.counts[b])
      for (int64_t d = 0; d < g.D; d++) memcpy(r.state + d * EB, state + d * g.E, columns * 4);
    for (int64_t i = 0; i < q.counts[b]; i += C) chunk(g, r, q.starts[b] + i, least(q.counts[b] - i, C), h, e);
    for (int64_t d = 0; d < g.D; d++) memcpy(state + d * g.E, r.state + d * EB, columns * 4);
  }
}

size_t local_delta(const Step& s, int) { return Room::bytes(Delta(s).Dp); }

const char* check_delta(const Step& s) {
  if (s.n_out != 2 || s.n_in != 10 || s.n_float != 2) return "wants o, states and q, k, v, decay, rate, states, slots, starts, counts, lengths, and floats = [scale, eps]";
  for (int i = 0; i < 6; i++) if (s.in[i].dtype != LZ_F32) return "all but the sequences' numbers must be float32";
  const Delta g(s);
  for (int i = 0; i < 3; i++) if (s.in[i].ndim != 3 || (s.in[i].shape[0] && s.in[i].strides[2] != 1)) return "wants q, k (T, K, D) and v (T, H, E), the last axis row-major";
  if (g.q.shape[1] != g.K || g.q.shape[2] != g.D || g.K < 1 || g.H % g.K) return "sizes of q, k and v do not agree";
  if (g.states.ndim != 4 || g.states.shape[1] != g.H || g.states.shape[2] != g.D || g.states.shape[3] != g.E) return "states must be (N, H, D, E)";
  if (g.decay.ndim != 2 || g.rate.ndim != 2 || g.decay.shape[1] != g.H || g.rate.shape[1] != g.H) return "decay and rate must be (T, H)";
  return check_sequences(s.in + 6);
}

}  // namespace

extern const Kernel short_conv, gated_delta;
const Kernel short_conv = {"short_conv", run_conv, nullptr, local_conv, check_conv};
const Kernel gated_delta = {"gated_delta", run_delta, nullptr, local_delta, check_delta};

LZ_NAMESPACE_END

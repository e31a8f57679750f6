// Attention without a cache, for training, all float32 and of any strides but the last, which is 1.
//   attention_lse:   in: q, k, v                       out: o = softmax(scale q kᵀ) v, lse = log Σ exp(scale q kᵀ)
//   attention_grad:  in: q, k, v, o, lse, do, dlse     out: dq, dk, dv
//     p = exp(scale q kᵀ - lse), ds = p (do vᵀ - Σ do o + dlse), dq = scale ds k, dk = scale dsᵀ q, dv = pᵀ do
//     of B sequences q (B,H,T,D), k (B,K,S,D), v (B,K,S,E), o (B,H,T,E), lse (B,H,T)
//     ints = [causal: query t sees keys up to t + S - T], floats = [scale]
//   ragged_attention_lse:   in: q, k, v, starts (B), counts (B), [sinks (H)]
//   ragged_attention_grad:  in: q, k, v, starts, counts, o, lse, do, dlse
//     the same of T tokens q (T,H,D), k (T,K,D), v (T,K,E), lse (T,H), always causal: sequence b has counts[b] from starts[b]
//     on. A token of none has o = 0, lse = 1e30 and gradients 0.   ints = [window (0: all), has_sinks], floats = [scale,
//     softcap c: scores become c tanh(score / c)]; a sink is one more score of a head, without a value
// Blocks of 64 queries meet blocks of 64 keys in the second-level cache; scores are never in memory. Work is shared by
// blocks of queries forwards, and backwards by heads of k, so that every sum belongs to one thread.
#include "gemm.h"

LZ_NAMESPACE_BEGIN

namespace {

constexpr int BLOCK = 64, MR = W < 16 ? 4 : 8, NV = 2;
constexpr int64_t STEP = W < 16 ? LANES : NV * W;  // columns are padded to a multiple of it

// y[M][N] (+)= x[M][K] panel[K][N]; M and N are padded; ldk: from one k of x to the next
LZ_INLINE void product(int64_t M, int64_t N, int64_t K, const float* x, int64_t ldx, int64_t ldk, const float* panel, int64_t ldp,
                       float* y, int64_t ldy, bool add) {
  for (int64_t m = 0; m < M; m += MR) float_tile<MR, NV>(panel, ldp, K, x + m * ldx, ldx, y + m * ldy, add, ldy, (int)N, ldk);
}

struct Rows {                                              // the rows of one head
  float* data;
  int64_t stride;
  float* at(int64_t r) const { return data + r * stride; }
};
// n rows of `columns`, times scale -> to[BLOCK][step], zeros beyond
void pack(const Rows& from, int64_t first, int64_t n, int64_t columns, float scale, float* to, int64_t step) {
  memset(to + n * step, 0, (BLOCK - n) * step * 4);
  for (int64_t r = 0; r < n; r++, to += step) {
    memset(to + columns / LANES * LANES, 0, (step - columns / LANES * LANES) * 4);
    over(columns, LZ_LAMBDA2(k, m) { put(to + k, get(from.at(first + r) + k, m) * scale, m); });
  }
}
// packed rows [BLOCK][step] -> to[columns][BLOCK]
void turn_block(const float* rows, int64_t step, int64_t columns, float* to) {
  for (int r = 0; r < BLOCK; r += LANES) columns_f32(LZ_F32, (const char*)(rows + r * step), step * 4, columns, to + r, BLOCK);
}
void unpack(const float* from, int64_t step, int64_t n, int64_t columns, float scale, const Rows& to, int64_t first, bool add) {
  for (int64_t r = 0; r < n; r++)
    over(columns, LZ_LAMBDA2(k, m) {
      float* p = to.at(first + r) + k;
      const f32x y = get(from + r * step + k, m) * scale;
      put(p, add ? get(p, m) + y : y, m);
    });
}

struct Sizes {
  int64_t B, H, D, K, E, Dp, Ep, tokens, window = 0;
  bool ragged, causal, sinks = false;
  float scale, cap = 0;
  const int32_t *starts = nullptr, *counts = nullptr;
  int64_t T = 0, S = 0;            // of each sequence, where all are of one size
  Sizes(const Step& s, bool packed) : ragged(packed), scale((float)s.floats[0]) {
    const View &q = s.in[0], &k = s.in[1], &v = s.in[2];
    tokens = q.shape[0], H = q.shape[1], K = k.shape[1], D = q.shape[q.ndim - 1], E = v.shape[v.ndim - 1];
    Dp = round_up(D, STEP), Ep = round_up(E, STEP);
    if (ragged) B = s.in[3].shape[0], starts = s.in[3].as<int32_t>(), counts = s.in[4].as<int32_t>(), causal = true;
    else B = tokens, T = q.shape[2], S = k.shape[2], causal = s.ints[0];
    if (ragged) window = s.ints[0], sinks = s.ints[1], cap = (float)s.floats[1];
  }
  int64_t queries(int64_t b) const { return ragged ? counts[b] : T; }
  int64_t keys(int64_t b) const { return ragged ? counts[b] : S; }
  int64_t blocks(int64_t b) const { return (queries(b) + BLOCK - 1) / BLOCK; }
  // keys [first, last) of a query
  int64_t last(int64_t b, int64_t query) const { return causal ? least(keys(b), query + 1 + keys(b) - queries(b)) : keys(b); }
  int64_t first(int64_t query) const { return window && query + 1 > window ? query + 1 - window : 0; }
  Rows head(const View& v, int64_t b, int64_t h) const {
    const int64_t at = (ragged ? starts[b] : b) * v.strides[0] + h * v.strides[1];
    return {v.as<float>() + at, v.strides[ragged ? 0 : 2]};
  }
  bool inside(Team& team) const {
    for (int64_t b = 0; ragged && b < B; b++)
      if (starts[b] < (b ? starts[b - 1] + counts[b - 1] : 0) || counts[b] < 0 || starts[b] + counts[b] > tokens)
        return team.fail("[ragged_attention] sequence %d has %d tokens from %d on: of %d, after those before it, wanted", (int)b, counts[b], starts[b], (int)tokens), false;
    return true;
  }
  // f(token) for those of no sequence that are this thread's; sequences follow one another
  template <class F> void over_nobody(const Team& team, F f) const {
    int64_t begin, end, b = 0;
    team.part(ragged ? tokens : 0, 1, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
      while (b < B && starts[b] + counts[b] <= t) b++;
      if (b == B || t < starts[b]) f(t);
    }
  }
};

// scores of packed queries from q0 on and turned keys from k0 on; what is not seen is -inf
void scores(const Sizes& z, int64_t b, const float* q, const float* kt, int64_t q0, int64_t k0, float* to) {
  product(BLOCK, BLOCK, z.D, q, z.Dp, 1, kt, BLOCK, to, BLOCK, false);
  for (int64_t r = 0; r < BLOCK; r++, to += BLOCK) {
    for (int64_t c = 0; z.cap && c < BLOCK; c += LANES) store(to + c, tanh(loadf(to + c) / z.cap) * z.cap);
    const int64_t from = least(z.first(q0 + r) - k0, BLOCK), end = z.last(b, q0 + r) - k0;
    for (int64_t c = 0; c < from; c++) to[c] = -__builtin_inff();
    for (int64_t c = end > 0 ? end : 0; c < BLOCK; c++) to[c] = -__builtin_inff();
  }
}

template <bool RAGGED> void run_lse(const Step& s, Team& team) {
  const Sizes z(s, RAGGED);
  const View& lse = s.out[1];
  if (!z.inside(team)) return;
  float *q = (float*)team.local, *k = q + BLOCK * z.Dp, *kt = k + BLOCK * z.Dp, *v = kt + BLOCK * z.Dp, *p = v + BLOCK * z.Ep,
        *o = p + BLOCK * BLOCK;
  z.over_nobody(team, [&](int64_t t) {
    for (int64_t h = 0; h < z.H; h++) {
      memset(s.out[0].as<float>() + t * s.out[0].strides[0] + h * s.out[0].strides[1], 0, z.E * 4);
      lse.as<float>()[t * lse.strides[0] + h * lse.strides[1]] = 1e30f;
    }
  });
  int64_t done = 0, b = 0;         // items of the sequences before b
  for (int64_t i; b < z.B && (i = team.take(1), true);) {
    while (b < z.B && i - done >= z.H * z.blocks(b)) done += z.H * z.blocks(b++);
    if (b == z.B) break;
    const int64_t h = (i - done) % z.H, q0 = (z.blocks(b) - 1 - (i - done) / z.H) * BLOCK, n = least(z.queries(b) - q0, BLOCK);
    const Rows keys = z.head(s.in[1], b, h * z.K / z.H), values = z.head(s.in[2], b, h * z.K / z.H);
    float top[BLOCK], total[BLOCK];
    for (float& t : top) t = z.sinks ? s.in[5].as<float>()[h * s.in[5].strides[0]] : -__builtin_inff();
    for (float& t : total) t = z.sinks;
    pack(z.head(s.in[0], b, h), q0, n, z.D, z.scale, q, z.Dp);
    memset(o, 0, BLOCK * z.Ep * 4);
    for (int64_t k0 = z.first(q0) / BLOCK * BLOCK, k_first = k0; k0 < z.last(b, q0 + n - 1); k0 += BLOCK) {
      const int64_t many = least(z.keys(b) - k0, BLOCK);
      pack(keys, k0, many, z.D, 1, k, z.Dp);
      turn_block(k, z.Dp, z.D, kt);
      pack(values, k0, many, z.E, 1, v, z.Ep);
      scores(z, b, q, kt, q0, k0, p);
      for (int64_t r = 0; r < BLOCK; r++) {
        float* row = p + r * BLOCK;
        f32x most = splat(top[r]), sums = {};
        for (int c = 0; c < BLOCK; c += LANES) most = maxf(most, loadf(row + c));
        const float now = max_of(most), shift = now == -__builtin_inff() ? 0 : now;
        for (int c = 0; c < BLOCK; c += LANES) {
          const f32x e = exp(loadf(row + c) - shift);
          store(row + c, e);
          sums += e;
        }
        const f32x shrink = exp(splat(top[r] - shift));
        if (k0 > k_first) for (int64_t c = 0; c < z.Ep; c += W) store(o + r * z.Ep + c, load<vf>(o + r * z.Ep + c) * shrink[0]);
        total[r] = total[r] * shrink[0] + sum(sums), top[r] = now;
      }
      product(BLOCK, z.Ep, many, p, BLOCK, 1, v, z.Ep, o, z.Ep, true);
    }
    const Rows out = z.head(s.out[0], b, h), sums = z.head(lse, b, h);
    for (int64_t r = 0; r < n; r++) {
      unpack(o + r * z.Ep, z.Ep, 1, z.E, 1 / total[r], out, q0 + r, false);
      *sums.at(q0 + r) = top[r] + log(splat(total[r]))[0];
    }
  }
}

// p -> exp(p - lse), ds = p (dp - delta) and the slope of the cap, over the block
void derive(float* p, float* dp, const float* lse, const float* delta, float cap) {
  const float bend = cap ? 1 / (cap * cap) : 0;
  for (int64_t r = 0; r < BLOCK; r++)
    for (int64_t c = r * BLOCK; c < (r + 1) * BLOCK; c += LANES) {
      const f32x score = loadf(p + c), e = exp(score - lse[r]);
      f32x ds = e * (loadf(dp + c) - delta[r]);
      if (cap) ds = select(e == splat(0), e, ds * (1 - score * score * bend));  // what is not seen is -inf
      store(p + c, e);
      store(dp + c, ds);
    }
}

template <bool RAGGED> void run_grad(const Step& s, Team& team) {
  const Sizes z(s, RAGGED);
  const View *after = s.in + (RAGGED ? 5 : 3);  // o, lse, do, dlse
  if (!z.inside(team)) return;
  const int64_t d = BLOCK * z.Dp, e = BLOCK * z.Ep, each = z.H / z.K;
  float *q = (float*)team.local, *k = q + d, *kt = k + d, *dq = kt + d, *dk = dq + d, *v = dk + d, *vt = v + e, *dv = vt + e, *grad = dv + e,
        *o = grad + e, *p = o + e, *dp = p + BLOCK * BLOCK;
  z.over_nobody(team, [&](int64_t t) {
    for (int i = 0; i < 3; i++)
      for (int64_t h = 0; h < s.out[i].shape[1]; h++)
        memset(s.out[i].as<float>() + t * s.out[i].strides[0] + h * s.out[i].strides[1], 0, s.out[i].shape[2] * 4);
  });
  for (int64_t i; (i = team.take(1)) < z.B * z.K;) {
    const int64_t b = i / z.K, g = i % z.K, S = z.keys(b), T = z.queries(b);
    for (int64_t k0 = 0; k0 < S; k0 += BLOCK) {
      const int64_t many = least(S - k0, BLOCK);
      pack(z.head(s.in[1], b, g), k0, many, z.D, 1, k, z.Dp);
      turn_block(k, z.Dp, z.D, kt);
      pack(z.head(s.in[2], b, g), k0, many, z.E, 1, v, z.Ep);
      turn_block(v, z.Ep, z.E, vt);
      memset(dk, 0, d * 4), memset(dv, 0, e * 4);
      for (int64_t h = g * each; h < (g + 1) * each; h++)
        for (int64_t q0 = 0; q0 < T; q0 += BLOCK) {
          const int64_t n = least(T - q0, BLOCK), first = z.first(q0) / BLOCK * BLOCK;
          if (z.last(b, q0 + n - 1) <= k0 || k0 < first) continue;
          pack(z.head(s.in[0], b, h), q0, n, z.D, z.scale, q, z.Dp);
          pack(z.head(after[2], b, h), q0, n, z.E, 1, grad, z.Ep);
          pack(z.head(after[0], b, h), q0, n, z.E, 1, o, z.Ep);
          float lse[BLOCK] = {}, delta[BLOCK] = {};
          for (int64_t r = 0; r < n; r++) {
            f32x dot = {};
            for (int64_t c = 0; c < z.Ep; c += LANES) dot += loadf(grad + r * z.Ep + c) * loadf(o + r * z.Ep + c);
            lse[r] = *z.head(after[1], b, h).at(q0 + r), delta[r] = sum(dot) - *z.head(after[3], b, h).at(q0 + r);
          }
          scores(z, b, q, kt, q0, k0, p);
          product(BLOCK, BLOCK, z.E, grad, z.Ep, 1, vt, BLOCK, dp, BLOCK, false);
          derive(p, dp, lse, delta, z.cap);
          product(BLOCK, z.Ep, n, p, 1, BLOCK, grad, z.Ep, dv, z.Ep, true);
          product(BLOCK, z.Dp, n, dp, 1, BLOCK, q, z.Dp, dk, z.Dp, true);
          product(BLOCK, z.Dp, many, dp, BLOCK, 1, k, z.Dp, dq, z.Dp, false);
          unpack(dq, z.Dp, n, z.D, z.scale, z.head(s.out[0], b, h), q0, k0 > first);
        }
      unpack(dk, z.Dp, many, z.D, 1, z.head(s.out[1], b, g), k0, false);
      unpack(dv, z.Ep, many, z.E, 1, z.head(s.out[2], b, g), k0, false);
    }
  }
}

template <bool RAGGED> size_t local(const Step& s, int) {
  const Sizes z(s, RAGGED);
  return size_t(5 * z.Dp + 5 * z.Ep + 2 * BLOCK) * BLOCK * sizeof(float);
}

template <int N_IN, int N_OUT> const char* check(const Step& s) {
  if (s.n_in != N_IN || s.n_out != N_OUT || s.n_int != 1 || s.n_float != 1) return "wrong number of outputs, inputs, ints or floats";
  const View &q = s.in[0], &k = s.in[1], &v = s.in[2];
  for (int i = 0; i < N_IN + N_OUT; i++)
    if (s.out[i].dtype != LZ_F32 || s.out[i].ndim < 3 || (s.out[i].ndim == 4 && s.out[i].shape[3] > 1 && s.out[i].strides[3] != 1))
      return "wants float32 arrays (B, heads, tokens, channels) of unit last stride, or (B, H, T)";
  if (q.ndim != 4 || k.ndim != 4 || v.ndim != 4 || q.shape[3] != k.shape[3] || k.shape[1] != v.shape[1] || k.shape[2] != v.shape[2])
    return "wants q (B,H,T,D), k (B,K,S,D) and v (B,K,S,E)";
  if (!k.shape[1] || q.shape[1] % k.shape[1]) return "the heads of q must be a multiple of those of k";
  if (s.ints[0] && q.shape[2] > k.shape[2]) return "causal attention wants as many keys as queries at least";
  return nullptr;
}

template <int N_OUT> const char* check_ragged(const Step& s) {
  if (s.n_int != 2 || s.n_float != 2 || s.n_out != N_OUT || s.n_in != (N_OUT == 3 ? 9 : 5 + (s.ints[1] != 0)))
    return "wrong number of outputs, inputs, ints or floats";
  const View &q = s.in[0], &k = s.in[1], &v = s.in[2];
  for (int i = 0; i < s.n_in + s.n_out; i++) {
    const View& x = s.out[i];
    const bool whole = i == N_OUT + 3 || i == N_OUT + 4;
    if (x.dtype != (whole ? LZ_I32 : LZ_F32) || (x.ndim == 3 && x.shape[2] > 1 && x.strides[2] != 1)) return "wants float32 arrays (tokens, heads, channels) of unit last stride, or (T, H), and starts and counts int32";
    if (whole && (x.ndim != 1 || x.shape[0] != s.in[3].shape[0] || x.strides[0] != 1)) return "starts and counts must be (B)";
    if (x.ndim > 1 && x.shape[0] != q.shape[0]) return "wants as many tokens in all";
  }
  if (q.ndim != 3 || k.ndim != 3 || v.ndim != 3 || q.shape[2] != k.shape[2] || k.shape[1] != v.shape[1]) return "wants q (T,H,D), k (T,K,D) and v (T,K,E)";
  if (!k.shape[1] || q.shape[1] % k.shape[1]) return "the heads of q must be a multiple of those of k";
  return nullptr;
}

}  // namespace

extern const Kernel attention_lse, attention_grad, ragged_attention_lse, ragged_attention_grad;
const Kernel attention_lse = {"attention_lse", run_lse<false>, nullptr, local<false>, check<3, 2>};
const Kernel attention_grad = {"attention_grad", run_grad<false>, nullptr, local<false>, check<7, 3>};
const Kernel ragged_attention_lse = {"ragged_attention_lse", run_lse<true>, nullptr, local<true>, check_ragged<2>};
const Kernel ragged_attention_grad = {"ragged_attention_grad", run_grad<true>, nullptr, local<true>, check_ragged<3>};

LZ_NAMESPACE_END

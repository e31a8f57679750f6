// Attention without a cache, for training: q (B,H,T,D), k (B,K,S,D), v (B,K,S,E), o (B,H,T,E), lse (B,H,T), all float32
// and of any strides but the last, which is 1. ints = [causal: query t sees keys up to t + S - T], floats = [scale].
//   attention_lse:   in: q, k, v                       out: o = softmax(scale q kᵀ) v, lse = log Σ exp(scale q kᵀ)
//   attention_grad:  in: q, k, v, o, lse, do, dlse     out: dq, dk, dv
//     p = exp(scale q kᵀ - lse), ds = p (do vᵀ - Σ do o + dlse), dq = scale ds k, dk = scale dsᵀ q, dv = pᵀ do
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
Rows head(const View& v, int64_t b, int64_t h) { return {v.as<float>() + b * v.strides[0] + h * v.strides[1], v.strides[2]}; }

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
  int64_t B, H, T, D, K, S, E, Dp, Ep, queries, keys;
  bool causal;
  explicit Sizes(const Step& s) {
    const View &q = s.in[0], &v = s.in[2];
    B = q.shape[0], H = q.shape[1], T = q.shape[2], D = q.shape[3], K = v.shape[1], S = v.shape[2], E = v.shape[3];
    Dp = round_up(D, STEP), Ep = round_up(E, STEP), queries = (T + BLOCK - 1) / BLOCK, keys = (S + BLOCK - 1) / BLOCK;
    causal = s.ints[0];
  }
  int64_t seen(int64_t query) const { return causal ? least(S, query + 1 + S - T) : S; }  // keys
};

// scores of packed queries from q0 on and turned keys from k0 on; what is not seen is -inf
void scores(const Sizes& z, const float* q, const float* kt, int64_t q0, int64_t k0, float* to) {
  product(BLOCK, BLOCK, z.D, q, z.Dp, 1, kt, BLOCK, to, BLOCK, false);
  for (int64_t r = 0; r < BLOCK; r++)
    for (int64_t c = z.seen(q0 + r) - k0 > 0 ? z.seen(q0 + r) - k0 : 0; c < BLOCK; c++) to[r * BLOCK + c] = -__builtin_inff();
}

void run_lse(const Step& s, Team& team) {
  const Sizes z(s);
  const float scale = (float)s.floats[0];
  float *q = (float*)team.local, *k = q + BLOCK * z.Dp, *kt = k + BLOCK * z.Dp, *v = kt + BLOCK * z.Dp, *p = v + BLOCK * z.Ep,
        *o = p + BLOCK * BLOCK;
  for (int64_t i; (i = team.take(1)) < z.B * z.H * z.queries;) {
    const int64_t b = i / z.queries / z.H, h = i / z.queries % z.H, q0 = i % z.queries * BLOCK, n = least(z.T - q0, BLOCK);
    const Rows keys = head(s.in[1], b, h * z.K / z.H), values = head(s.in[2], b, h * z.K / z.H);
    float top[BLOCK], total[BLOCK] = {};
    for (float& t : top) t = -__builtin_inff();
    pack(head(s.in[0], b, h), q0, n, z.D, scale, q, z.Dp);
    memset(o, 0, BLOCK * z.Ep * 4);
    for (int64_t k0 = 0; k0 < z.seen(q0 + n - 1); k0 += BLOCK) {
      const int64_t many = least(z.S - k0, BLOCK);
      pack(keys, k0, many, z.D, 1, k, z.Dp);
      turn_block(k, z.Dp, z.D, kt);
      pack(values, k0, many, z.E, 1, v, z.Ep);
      scores(z, q, kt, q0, k0, p);
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
        if (k0) for (int64_t c = 0; c < z.Ep; c += W) store(o + r * z.Ep + c, load<vf>(o + r * z.Ep + c) * shrink[0]);
        total[r] = total[r] * shrink[0] + sum(sums), top[r] = now;
      }
      product(BLOCK, z.Ep, many, p, BLOCK, 1, v, z.Ep, o, z.Ep, true);
    }
    const View& lse = s.out[1];
    const Rows out = head(s.out[0], b, h);
    for (int64_t r = 0; r < n; r++) {
      unpack(o + r * z.Ep, z.Ep, 1, z.E, 1 / total[r], out, q0 + r, false);
      lse.as<float>()[b * lse.strides[0] + h * lse.strides[1] + (q0 + r) * lse.strides[2]] = top[r] + log(splat(total[r]))[0];
    }
  }
}

// p -> exp(p - lse), ds = p (dp - delta), over the block
void derive(float* p, float* dp, const float* lse, const float* delta) {
  for (int64_t r = 0; r < BLOCK; r++)
    for (int64_t c = r * BLOCK; c < (r + 1) * BLOCK; c += LANES) {
      const f32x e = exp(loadf(p + c) - lse[r]);
      store(p + c, e);
      store(dp + c, e * (loadf(dp + c) - delta[r]));
    }
}

void run_grad(const Step& s, Team& team) {
  const Sizes z(s);
  const float scale = (float)s.floats[0];
  const int64_t d = BLOCK * z.Dp, e = BLOCK * z.Ep, each = z.H / z.K;
  float *q = (float*)team.local, *k = q + d, *kt = k + d, *dq = kt + d, *dk = dq + d, *v = dk + d, *vt = v + e, *dv = vt + e, *grad = dv + e,
        *o = grad + e, *p = o + e, *dp = p + BLOCK * BLOCK;
  for (int64_t i; (i = team.take(1)) < z.B * z.K;) {
    const int64_t b = i / z.K, g = i % z.K;
    for (int64_t k0 = 0; k0 < z.S; k0 += BLOCK) {
      const int64_t many = least(z.S - k0, BLOCK);
      pack(head(s.in[1], b, g), k0, many, z.D, 1, k, z.Dp);
      turn_block(k, z.Dp, z.D, kt);
      pack(head(s.in[2], b, g), k0, many, z.E, 1, v, z.Ep);
      turn_block(v, z.Ep, z.E, vt);
      memset(dk, 0, d * 4), memset(dv, 0, e * 4);
      for (int64_t h = g * each; h < (g + 1) * each; h++)
        for (int64_t q0 = 0; q0 < z.T; q0 += BLOCK) {
          const int64_t n = least(z.T - q0, BLOCK);
          if (z.seen(q0 + n - 1) <= k0) continue;
          pack(head(s.in[0], b, h), q0, n, z.D, scale, q, z.Dp);
          pack(head(s.in[5], b, h), q0, n, z.E, 1, grad, z.Ep);
          pack(head(s.in[3], b, h), q0, n, z.E, 1, o, z.Ep);
          float lse[BLOCK] = {}, delta[BLOCK] = {};
          for (int64_t r = 0; r < n; r++) {
            const auto at = [&](const View& x) { return x.as<float>()[b * x.strides[0] + h * x.strides[1] + (q0 + r) * x.strides[2]]; };
            f32x dot = {};
            for (int64_t c = 0; c < z.Ep; c += LANES) dot += loadf(grad + r * z.Ep + c) * loadf(o + r * z.Ep + c);
            lse[r] = at(s.in[4]), delta[r] = sum(dot) - at(s.in[6]);
          }
          scores(z, q, kt, q0, k0, p);
          product(BLOCK, BLOCK, z.E, grad, z.Ep, 1, vt, BLOCK, dp, BLOCK, false);
          derive(p, dp, lse, delta);
          product(BLOCK, z.Ep, n, p, 1, BLOCK, grad, z.Ep, dv, z.Ep, true);
          product(BLOCK, z.Dp, n, dp, 1, BLOCK, q, z.Dp, dk, z.Dp, true);
          product(BLOCK, z.Dp, many, dp, BLOCK, 1, k, z.Dp, dq, z.Dp, false);
          unpack(dq, z.Dp, n, z.D, scale, head(s.out[0], b, h), q0, k0 > 0);
        }
      unpack(dk, z.Dp, many, z.D, 1, head(s.out[1], b, g), k0, false);
      unpack(dv, z.Ep, many, z.E, 1, head(s.out[2], b, g), k0, false);
    }
  }
}

size_t local(const Step& s, int) {
  const Sizes z(s);
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

}  // namespace

extern const Kernel attention_lse, attention_grad;
const Kernel attention_lse = {"attention_lse", run_lse, nullptr, local, check<3, 2>};
const Kernel attention_grad = {"attention_grad", run_grad, nullptr, local, check<7, 3>};

LZ_NAMESPACE_END

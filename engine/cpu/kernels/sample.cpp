// One token for each row of logits (R, V) f32, and its log-probability under the softmax of the raw logits; beside them
// the 0 to TOP likeliest tokens (R, TOP) with theirs. Parameters (R, 6) f32 and (R, 11) i32: see the enums below. A row
// goes through penalties, biases, the mask of allowed tokens, temperature, top_k, top_p, min_p and one uniform number of
// Philox4x32-10(seed, counter), so a draw depends on nothing but its row. A row with a target is not drawn: it gives the
// target's log-probability. A row with a NaN, or with nothing allowed, gives token -1 and NaN.
// Rows of a sequence share history (S, L) i32, bias ids (S, N) i32 and biases (S, N) f32; each row has its own mask
// (R, V / 32) u32, bit i % 32 of word i / 32 for token i.
//
// Bytes: the logits once, all threads sharing every row: maximum, its first place and Σ e^x in one pass. Greedy rows
// are then done. The others are drawn by one thread a row from a private copy of V weights e^((x - max) / temperature).
// Each filter keeps a prefix of the same order (weight falling, id rising), so a filter is a cut in it, found by radix
// selection on the weights' bits: nothing is sorted.
#include "vectors.h"

LZ_NAMESPACE_BEGIN

enum Params { TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY, PARAMS };
enum Ints { TOP_K, SEED, SEED_HIGH, COUNTER, HISTORY, PROMPT, SEQUENCE, BIASES, MASKED, LIKELIEST, TARGET, INTS };
// HISTORY, PROMPT: lengths; SEQUENCE: row of history and biases; TARGET: token + 1, or 0

constexpr int TOP = 20;                      // likeliest tokens at most
constexpr int BLOCK = 256;                   // values between two looks at the running maximum
constexpr float LEAST = -3.4028235e38f;

struct Part { float most; int32_t first; float sum; };   // maximum, where it is first, Σ e^(x - most)

LZ_INLINE vec load_some(const float* x, int64_t n) {  // n values, then -infinity
  if (n >= W) return load<vec>(x);
  vec v = vec{} - __builtin_inff();
  for (int64_t i = 0; i < n; i++) v[i] = x[i];
  return v;
}

// Σ e^x and the maximum of x[begin, end), NaN if one of them is. Plain: for each x: sum += e^(x - most). A block brings
// the maximum up to date first, so that e^ is taken once a value.
static Part look(const float* x, int64_t begin, int64_t end) {
  Part p = {LEAST, (int32_t)begin, 0};
  int64_t best = begin;
  ivec nan{};
  for (int64_t b = begin; b < end; b += BLOCK) {
    const int64_t stop = b + BLOCK < end ? b + BLOCK : end;
    vec most = vec{} + LEAST, sums{};
    for (int64_t i = b; i < stop; i += W) {
      const vec v = load_some(x + i, stop - i);
      most = larger(v, most);
      nan |= (ivec)(v != v);
    }
    if (top(most) > p.most) {
      p.sum *= exp2((p.most - top(most)) * LOG2E);
      p.most = top(most), best = b;
    }
    for (int64_t i = b; i < stop; i += W) sums += exp2((load_some(x + i, stop - i) - p.most) * LOG2E);
    p.sum += total(sums);
  }
  while (best < end && !(x[best] == p.most)) best++;
  p.first = (int32_t)(best < end ? best : begin);
  for (int i = 0; i < W; i++)
    if (nan[i]) p.sum = __builtin_nanf("");
  return p;
}

// Philox4x32-10 (Salmon et al. 2011) of counter (n, 0, 0, 0): 53 of its bits, in [0, 1).
static double uniform(uint32_t seed_low, uint32_t seed_high, uint32_t n) {
  uint32_t c[4] = {n, 0, 0, 0}, key[2] = {seed_low, seed_high};
  for (int round = 0; round < 10; round++, key[0] += 0x9E3779B9, key[1] += 0xBB67AE85) {
    const uint64_t a = (uint64_t)c[0] * 0xD2511F53, b = (uint64_t)c[2] * 0xCD9E8D57;
    c[0] = (uint32_t)(b >> 32) ^ c[1] ^ key[0], c[1] = (uint32_t)b;
    c[2] = (uint32_t)(a >> 32) ^ c[3] ^ key[1], c[3] = (uint32_t)a;
  }
  return ((double)(c[0] >> 5) * 67108864.0 + (double)(c[1] >> 6)) * 0x1p-53;
}

// A thread's workspace: V weights padded with zeros to whole blocks, a bit a token, and a histogram.
constexpr int DIGIT = 10, BINS = 1 << DIGIT; // weights are in [0, 1]: three digits of 10 bits
struct Room {
  float* w;
  double *bins, *blocks;
  uint64_t* seen;
  int64_t V, padded;
  Room(char* p, int64_t v) : V(v), padded((v + BLOCK - 1) / BLOCK * BLOCK) {
    w = (float*)p, bins = (double*)(w + padded), blocks = bins + BINS, seen = (uint64_t*)(blocks + padded / BLOCK);
  }
  static size_t bytes(int64_t V) {
    const size_t blocks = (size_t)(V + BLOCK - 1) / BLOCK;
    return blocks * BLOCK * sizeof(float) + (BINS + blocks) * sizeof(double) + blocks * BLOCK / 8;
  }
};

// Repetition divides (or, below 0, multiplies) the logit of every token of the sequence; presence and frequency
// subtract once a token, and once an occurrence, of the generated part.
static void penalize(const Room& room, const float* params, const int32_t* history, int length, int prompt) {
  const float repetition = params[REPETITION], presence = params[PRESENCE], frequency = params[FREQUENCY];
  for (int pass = 0; pass < 2; pass++) {
    memset(room.seen, 0, (size_t)room.padded / 8);
    for (int i = pass ? prompt : 0; i < length; i++) {
      const int64_t id = history[i];
      if (id < 0 || id >= room.V) continue;
      const uint64_t bit = 1ull << (id & 63);
      const bool first = !(room.seen[id >> 6] & bit);
      room.seen[id >> 6] |= bit;
      float& z = room.w[id];
      if (pass) z -= frequency + (first ? presence : 0);
      else if (first) z = z > 0 ? z / repetition : z * repetition;
    }
  }
}

// Σ of the weights, or of ones, from `least` up, blocks apart, in an order that is the same for every instruction set.
static double mass(const Room& room, float least = 0, bool ones = false) {
  double sum = 0;
  for (int64_t b = 0; b < room.padded; b += BLOCK) {
    vec part[LANES / W] = {};
    for (int64_t i = b; i < b + BLOCK; i += LANES)
      for (int j = 0; j < LANES / W; j++) {
        const vec w = load<vec>(room.w + i + j * W);
        part[j] += w >= least ? (ones ? vec{} + 1 : w) : vec{};
      }
    float lanes[LANES];
    memcpy(lanes, part, sizeof lanes);
    for (int n = LANES / 2; n; n /= 2)
      for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    sum += room.blocks[b / BLOCK] = lanes[0];
  }
  return sum;
}

// f(v) for the weights from `least` up: few, so whole vectors are passed over.
template <class F> LZ_INLINE void each_from(const Room& room, float least, F f) {
  for (int64_t b = 0; b < room.padded; b += 4 * W) {
    vec most = load<vec>(room.w + b);
    for (int i = W; i < 4 * W; i += W) most = larger(most, load<vec>(room.w + b + i));
    if (top(most) < least) continue;
    for (int64_t v = b; v < b + 4 * W; v++)
      if (room.w[v] >= least) f(v);
  }
}

// Keeps the shortest prefix of the order whose sum (of weights, or of ones) reaches `target`, and zeroes the rest.
static void cut(const Room& room, bool by_weight, double target) {
  float least = 1;                           // no weight below it is kept: found in a few fast passes
  while (least > 1e-37f && mass(room, least, !by_weight) < target) least /= 16;
  uint32_t prefix = 0, mask = 0;
  double above = 0;
  for (int shift = 2 * DIGIT; shift >= 0; shift -= DIGIT) {
    memset(room.bins, 0, BINS * sizeof(double));
    each_from(room, least, [&](int64_t v) {
      const uint32_t bits = as_u32(room.w[v]);
      if ((bits & mask) == prefix) room.bins[bits >> shift & (BINS - 1)] += by_weight ? room.w[v] : 1;
    });
    uint32_t last = 0;                       // the digit where the sum reaches the target, or the last that is there
    double sum = above;
    for (int digit = BINS - 1; digit >= 0 && (sum < target || sum == 0); digit--) {
      if (room.bins[digit] == 0) continue;
      above = sum, last = (uint32_t)digit;
      sum += room.bins[digit];
    }
    prefix |= last << shift;
    mask |= (uint32_t)(BINS - 1) << shift;
  }
  const float edge = as_f32(prefix);
  double ties = (target - above) / (by_weight ? edge : 1);  // so many of the weights equal to the last stay, lowest ids
  if (!(ties > 0)) ties = 1;                 // top_p = 0 keeps one
  each_from(room, edge, [&](int64_t v) {
    if (room.w[v] == edge && (ties -= 1) <= -1) room.w[v] = 0;
  });
  for (float* w = room.w; w < room.w + room.padded; w += W) put(w, load<vec>(w) >= edge ? load<vec>(w) : vec{});
}

static int32_t draw(const Room& room, double u) {
  double left = u * mass(room);
  int64_t b = 0, chosen = 0;
  for (int64_t i = 0; i < room.padded / BLOCK; i++) {      // the last block with weight catches what rounding leaves
    if (room.blocks[i] == 0) continue;
    b = i;
    if (left < room.blocks[i]) break;
    left -= room.blocks[i];
  }
  for (int64_t v = b * BLOCK; v < (b + 1) * BLOCK; v++) {
    if (room.w[v] == 0) continue;
    chosen = v;
    if ((left -= room.w[v]) < 0) break;
  }
  return (int32_t)chosen;
}

// What is said of a row besides its logits.
struct Row {
  const float *params, *bias;
  const int32_t *ints, *history, *bias_ids;
  const uint32_t* mask;
  bool penalized() const { return params[REPETITION] != 1 || params[PRESENCE] != 0 || params[FREQUENCY] != 0; }
  bool edited() const { return penalized() || ints[BIASES] || ints[MASKED]; }
};

// Everything but the tokens of the mask becomes impossible.
static void allow(const Room& room, const uint32_t* mask) {
  for (int64_t v = 0; v < room.V; v += 32) {
    const uint32_t word = mask[v / 32];
    if (word == ~0u) continue;
    for (int64_t i = v; i < v + 32 && i < room.V; i++) room.w[i] = word >> (i & 31) & 1 ? room.w[i] : -__builtin_inff();
  }
}

static int32_t choose(const Room& room, const float* x, float most, const Row& row) {
  const float temperature = row.params[TEMPERATURE], top_p = row.params[TOP_P], min_p = row.params[MIN_P];
  const int32_t* ints = row.ints;
  if (row.edited()) {
    memcpy(room.w, x, (size_t)room.V * sizeof(float));
    if (row.penalized()) penalize(room, row.params, row.history, ints[HISTORY], ints[PROMPT]);
    for (int i = 0; i < ints[BIASES]; i++)
      if ((uint32_t)row.bias_ids[i] < (uint32_t)room.V) room.w[row.bias_ids[i]] += row.bias[i];
    if (ints[MASKED]) allow(room, row.mask);
    const Part all = look(room.w, 0, room.V);
    if (!(all.sum > 0)) return -1;
    if (temperature == 0) return all.first;
    x = room.w, most = all.most;
  }
  for (int64_t v = 0; v < room.padded; v += W)
    put(room.w + v, exp2((load_some(x + v, room.V - v) - most) * (LOG2E / temperature)));
  if (ints[TOP_K] > 0 && ints[TOP_K] < room.V) cut(room, false, ints[TOP_K]);
  if (top_p < 1) cut(room, true, top_p * mass(room));
  if (min_p > 0)
    for (int64_t v = 0; v < room.V; v++) room.w[v] = room.w[v] < min_p ? 0 : room.w[v];
  return draw(room, uniform((uint32_t)ints[SEED], (uint32_t)ints[SEED_HIGH], (uint32_t)ints[COUNTER]));
}

// The n largest of x, falling, the lowest id of equals first: an ordered list that few values enter.
static void likeliest(const float* x, int64_t V, int n, int32_t* ids, float* values) {
  int count = 0;
  for (int64_t b = 0; b < V; b += W) {
    if (count == n && top(load_some(x + b, V - b)) <= values[n - 1]) continue;
    for (int64_t v = b; v < b + W && v < V; v++) {
      if (count == n && !(x[v] > values[n - 1])) continue;
      int at = count < n ? count++ : n - 1;
      for (; at > 0 && x[v] > values[at - 1]; at--) ids[at] = ids[at - 1], values[at] = values[at - 1];
      ids[at] = (int32_t)v, values[at] = x[v];
    }
  }
}

static void run(const Step& s, Team& team) {
  const View &logits = s.in[0], &params = s.in[1], &ints = s.in[2], &history = s.in[3], &ids = s.in[4], &bias = s.in[5];
  const int64_t R = logits.shape[0], V = logits.shape[1];
  const Room room(team.local, V);
  Part* parts = (Part*)team.shared;
  int64_t begin, end;
  team.part(V, BLOCK, &begin, &end);
  for (int64_t r = 0; r < R; r++)
    parts[r * team.size + team.id] = look(logits.as<float>() + r * logits.strides[0], begin, end);
  team.barrier();
  for (int64_t r = team.id; r < R; r += team.size) {
    const float* x = logits.as<float>() + r * logits.strides[0];
    Part all = parts[r * team.size];
    double sum = all.sum;
    for (int i = 1; i < team.size; i++) {
      const Part part = parts[r * team.size + i];
      const float most = larger(part.most, all.most);
      sum = sum * exp2((all.most - most) * LOG2E) + (double)part.sum * exp2((part.most - most) * LOG2E);
      if (part.most > all.most) all = part;
    }
    const int32_t* own = ints.as<int32_t>() + r * ints.strides[0];
    const int64_t q = own[SEQUENCE];
    const Row row = {params.as<float>() + r * params.strides[0], bias.as<float>() + q * bias.strides[0], own,
                     history.as<int32_t>() + q * history.strides[0], ids.as<int32_t>() + q * ids.strides[0],
                     s.in[6].as<uint32_t>() + r * s.in[6].strides[0]};
    const float log_sum = (float)__builtin_log(sum), lse = all.most + log_sum;
    int32_t token = -1;
    if (lse - lse == 0) {                    // neither NaN nor infinite
      const bool greedy = row.params[TEMPERATURE] == 0 && !row.edited();
      token = own[TARGET] ? own[TARGET] - 1 : greedy ? all.first : choose(room, x, all.most, row);
    }
    s.out[0].as<int32_t>()[r] = token;
    s.out[1].as<float>()[r] = token < 0 ? __builtin_nanf("") : x[token] - all.most - log_sum;
    if (!own[LIKELIEST]) continue;
    float* values = s.out[3].as<float>() + r * s.out[3].strides[0];
    const int n = own[LIKELIEST] < V ? own[LIKELIEST] : (int)V;
    likeliest(x, V, n, s.out[2].as<int32_t>() + r * s.out[2].strides[0], values);
    for (int i = 0; i < n; i++) values[i] = values[i] - all.most - log_sum;
  }
}

static size_t shared(const Step& s, int threads) { return (size_t)s.in[0].shape[0] * threads * sizeof(Part); }
static size_t local(const Step& s, int) { return Room::bytes(s.in[0].shape[1]); }

static const char* check(const Step& s) {
  if (s.in[0].dtype != LZ_F32) return "logits must be float32";
  if (s.in[1].shape[1] != PARAMS || s.in[2].shape[1] != INTS) return "a row has 6 parameters and 11 numbers";
  if (s.in[6].shape[1] * 32 < s.in[0].shape[1]) return "a mask has a bit for each token";
  if (s.out[2].shape[1] != TOP || s.out[3].shape[1] != TOP) return "20 places for the likeliest tokens";
  return nullptr;
}

extern const Kernel sample;
const Kernel sample = {"sample", run, shared, local, check};

LZ_NAMESPACE_END

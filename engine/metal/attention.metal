// paged_attention: softmax(scale q k^T) v of ragged sequences over a paged cache, flash style; the step of
// engine/cpu/kernels/attention.cpp. q, o (T, H, D) f32; k pages (N, KV, D, 32), v pages (N, KV, 32, D).
//
//   bytes: k and v of each sequence once for up to 8 heads of its kv head (decode) or 32 rows (prefill); q and o once
//   plain loop, row i of head h: s[p] = scale sum_d q[i,h,d] k[p,d] (softcap: cap tanh(s / cap)), p from low to high
//     o[i,h] = sum_p e^s[p] v[p] / (sum_p e^s[p] + e^sink[h])
//
// decode, a token of a sequence with less than MANY in this step: a threadgroup has SHARE heads of one kv head, each of its
//   simdgroups every n-th page. 32 tokens lie side by side in k, so a lane has 4 tokens and every fourth 4 rows of k: a load
//   is 4 numbers, lanes are neighbours, and two shuffles end the sums. Weights go to threadgroup memory, a lane of the
//   second product has 4 columns of v. Simdgroups meet at the end. Long sequences are split over SPLITS threadgroups, as
//   many as their pages fill, whose parts `merge` adds up.
// prefill, sequences with more: rows are (token, head of the kv head), 32 in 4 simdgroups of 8. A page becomes float32 in
//   threadgroup memory, k and then v; scores, weights and o stay in registers as 8 x 8 matrices. A lane of such a matrix
//   has row (lane & 16) / 4 + lane / 2 % 4 and 2 columns from (lane & 8) / 2 + lane % 2 * 2.
// Scores are in units of log 2. The type of pages is STORED.
#include "common.h"

constant int H        [[function_constant(0)]];
constant int KV       [[function_constant(1)]];
constant int WINDOW   [[function_constant(2)]];  // 0: all
constant bool CAUSAL  [[function_constant(3)]];
constant bool SINKS   [[function_constant(4)]];
constant bool SCALES  [[function_constant(5)]];  // of int8 pages, one a token
constant bool CAPPED  [[function_constant(6)]];
constant int SPLITS   [[function_constant(7)]];  // threadgroups of a token, at most
constant bool MIXED   [[function_constant(8)]];  // sequences with MANY tokens or more are prefill's, else all are decode's
constant int WIDTH    [[function_constant(9)]];  // numbers of a row of q and k, of which D is the next multiple of 8
constant int V_WIDTH  [[function_constant(10)]]; // and of v, E
constant bool RAGGED  [[function_constant(11)]];

struct Params {
  int sequences, tokens, tiles, table, pages;  // tiles of prefill, at most; the table's width; pages in all
  int q_token, q_head, o_token, o_head;        // strides in numbers
  float scale, cap;                            // scores are cap * tanh of the product if CAPPED
};

constant constexpr float NONE = -1e30f, LEAST = -1e29f;  // a score that is not seen; what a maximum starts from
constant constexpr int QUADS = D / 4;

METAL_FUNC float4 load4(device const float* p) { return *(device const float4*)p; }
METAL_FUNC float4 load4(device const half* p) { return float4(*(device const half4*)p); }
METAL_FUNC float4 load4(device const char* p) { return float4(*(device const char4*)p); }
METAL_FUNC float4 load4(device const bfloat* p) { return as_type<float4>(uint4(*(device const ushort4*)p) << 16u); }

// The positions [low, high) that a token at position `own` sees.
METAL_FUNC int2 seen(int own, int length) {
  return int2(WINDOW ? max(0, own + 1 - WINDOW) : 0, CAUSAL ? own + 1 : length);
}

METAL_FUNC float capped(float s, float cap) { return CAPPED ? cap * precise::tanh(s) : s; }

// A number of the pages' second axis: where page `index` of a sequence has this kv head's tile.
METAL_FUNC size_t tile_of(device const int* table, int sequence, int index, int kv, constant Params& p) {
  return size_t(clamp(table[sequence * p.table + index], 0, p.pages - 1)) * KV + kv;
}

// The maximum and the sum of weights under it, the sink's being part of them; what o has to be multiplied by.
METAL_FUNC float2 total_of(float m, float l, device const float* sinks, int head) {
  if (!SINKS) return float2(m, l);
  const float sink = sinks[head] * 1.44269504f, top = max(m, sink);
  return float2(top, l * exp2(m - top) + exp2(sink - top));
}
METAL_FUNC float share_of(float m, float2 total) { return total.y > 0.0f ? exp2(m - total.x) / total.y : 0.0f; }

// The sequence of a row of the step, or -1 if it is nobody's.
METAL_FUNC int owner(int t, device const int* starts, device const int* counts, int sequences, uint lane) {
  int b = -1;
  for (int i = int(lane); i < sequences; i += 32)
    if (t >= starts[i] && t < starts[i] + counts[i]) b = i;
  return simd_max(b);
}

// The work of one token: its row of the step; its sequence or -1; what it sees; how many threadgroups share it. In a mixed
// step the n-th token is that of the sequences that are decode's, and row -1 if they have fewer.
struct Token { int row, sequence, low, high, splits; };
METAL_FUNC Token token_of(int n, device const int* starts, device const int* counts, device const int* lengths, uint lane,
                          constant Params& p) {
  int t = MIXED ? -1 : n;
  for (int i = 0; MIXED && i < p.sequences && t < 0; i++) {
    if (counts[i] >= MANY) continue;
    if (n < counts[i]) t = starts[i] + n;
    n -= counts[i];
  }
  const int b = owner(t, starts, counts, p.sequences, lane);
  if (b < 0) return Token{t, -1, 0, 0, 1};
  const int length = min(lengths[b], 32 * p.table);
  const int2 range = seen(length - counts[b] + t - starts[b], length);
  const int pages = max(0, (range.y + 31) / 32 - range.x / 32);
  return Token{t, b, range.x, range.y, clamp((pages + SIMDGROUPS - 1) / SIMDGROUPS, 1, SPLITS)};
}

constant constexpr int COLUMNS = QUADS < 32 ? QUADS : 32;                                     // lanes of a row of v
constant constexpr int TURNS = (QUADS + 31) / 32;                                             // columns of a lane
constant constexpr int ROWS = 8 * COLUMNS <= 32 ? 8 : 4 * COLUMNS <= 32 ? 4 : 2 * COLUMNS <= 32 ? 2 : 1;  // of v at a time
constant constexpr int ROOM = SHARE * 8 > ROWS * QUADS ? SHARE * 8 : ROWS * QUADS;            // float4s of a simdgroup

[[max_total_threads_per_threadgroup(32 * SIMDGROUPS)]]
kernel void decode(device const float* q [[buffer(0)]], device const STORED* k_pages [[buffer(1)]],
                   device const STORED* v_pages [[buffer(2)]], device const int* table [[buffer(3)]],
                   device const int* starts [[buffer(4)]], device const int* counts [[buffer(5)]],
                   device const int* lengths [[buffer(6)]], device const float* sinks [[buffer(7)]],
                   device const float* k_scales [[buffer(8)]], device const float* v_scales [[buffer(9)]],
                   device float* o [[buffer(10)]], device float* parts [[buffer(11)]], constant Params& p [[buffer(12)]],
                   uint3 group [[threadgroup_position_in_grid]], uint thread_ [[thread_index_in_threadgroup]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float4 queries[SHARE * QUADS];
  threadgroup float4 room[SIMDGROUPS * ROOM];  // weights, then outputs
  threadgroup float tops[SIMDGROUPS];
  threadgroup float sums[SIMDGROUPS];
  const int head = int(group.x) * SHARE, kv = head / (H / KV), split = int(group.z), tid = int(thread_);
  const Token token = token_of(int(group.y), starts, counts, lengths, lane, p);
  const int t = token.row;
  if (token.sequence < 0 && t >= 0 && SPLITS == 1)
    for (int i = tid; i < SHARE * D; i += 32 * SIMDGROUPS) o[t * p.o_token + (head + i / D) * p.o_head + i % D] = 0.0f;
  if (token.sequence < 0 || split >= token.splits) return;
  for (int i = tid; i < SHARE * D; i += 32 * SIMDGROUPS)
    ((threadgroup float*)queries)[i] = q[t * p.q_token + (head + i / D) * p.q_head + i % D] * p.scale;
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int quad = int(lane) % 8, row = int(lane) / 8, v_quad = int(lane) % COLUMNS, v_row = int(lane) / COLUMNS;
  threadgroup float4* weights = room + int(simdgroup) * SHARE * 8;
  float4 out[SHARE][TURNS];
  float m[SHARE], l[SHARE];
  for (int g = 0; g < SHARE; g++) {
    m[g] = LEAST, l[g] = 0.0f;
    for (int c = 0; c < TURNS; c++) out[g][c] = float4(0.0f);
  }
  const int last = (token.high + 31) / 32, step = token.splits * SIMDGROUPS;
  for (int page = token.low / 32 + split * SIMDGROUPS + int(simdgroup); page < last; page += step) {
    const size_t tile = tile_of(table, token.sequence, page, kv, p);
    device const STORED* k = k_pages + tile * (32 * D) + 4 * quad;
    device const STORED* v = v_pages + tile * (32 * D);
    float4 s[SHARE];
    for (int g = 0; g < SHARE; g++) s[g] = float4(0.0f);
    for (int d = 4 * row; d < D; d += 16) {
      float4 x[4];
      UNROLL for (int j = 0; j < 4; j++) x[j] = load4(k + (d + j) * 32);
      UNROLL for (int g = 0; g < SHARE; g++) {
        const float4 y = queries[g * QUADS + d / 4];
        s[g] += y.x * x[0] + y.y * x[1] + y.z * x[2] + y.w * x[3];
      }
    }
    const int low = token.low - page * 32 - 4 * quad, high = token.high - page * 32 - 4 * quad;  // of the lane's 4 tokens
    simdgroup_barrier(mem_flags::mem_threadgroup);  // weights of the page before are read
    UNROLL for (int g = 0; g < SHARE; g++) {
      float4 x = s[g];
      x += simd_shuffle_xor(x, 8);
      x += simd_shuffle_xor(x, 16);
      if (SCALES) x *= load4(k_scales + tile * 32 + 4 * quad);
      UNROLL for (int e = 0; e < 4; e++) x[e] = e >= low && e < high ? capped(x[e], p.cap) : NONE;
      const float top = max(m[g], simd_max(max(max(x.x, x.y), max(x.z, x.w)))), keep = exp2(m[g] - top);
      x = exp2(x - top);
      m[g] = top, l[g] = l[g] * keep + (x.x + x.y + x.z + x.w);
      for (int c = 0; c < TURNS; c++) out[g][c] *= keep;
      if (SCALES)
        UNROLL for (int e = 0; e < 4; e++) x[e] = e >= low && e < high ? x[e] * v_scales[tile * 32 + 4 * quad + e] : 0.0f;
      if (row == 0) weights[g * 8 + quad] = x;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = 4 * v_row; i < 32 && v_row < ROWS; i += 4 * ROWS)
      UNROLL for (int c = 0; c < TURNS; c++) {
        const int column = v_quad + 32 * c;
        if (column >= QUADS) continue;
        float4 x[4];
        UNROLL for (int j = 0; j < 4; j++) {
          const int there = page * 32 + i + j;  // what nobody sees may be anything
          x[j] = float4(0.0f);
          if (there >= token.low && there < token.high) x[j] = load4(v + (i + j) * D + 4 * column);
        }
        UNROLL for (int g = 0; g < SHARE; g++) {
          const float4 w = weights[g * 8 + i / 4];
          out[g][c] += w.x * x[0] + w.y * x[1] + w.z * x[2] + w.w * x[3];
        }
      }
  }

  for (int g = 0; g < SHARE; g++) {
    const float own = simd_sum(row == 0 ? l[g] : 0.0f);
    if (lane == 0) tops[simdgroup] = m[g], sums[simdgroup] = own;
    threadgroup_barrier(mem_flags::mem_threadgroup);  // also: weights and outputs of the head before are read
    const float other = int(lane) < SIMDGROUPS ? tops[lane] : LEAST, top = simd_max(other);
    const float sum = simd_sum(int(lane) < SIMDGROUPS ? sums[lane] * exp2(other - top) : 0.0f), keep = exp2(m[g] - top);
    UNROLL for (int c = 0; c < TURNS; c++)
      if (v_row < ROWS && v_quad + 32 * c < QUADS)
        room[(int(simdgroup) * ROWS + v_row) * QUADS + v_quad + 32 * c] = out[g][c] * keep;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float share = SPLITS > 1 ? 1.0f : share_of(top, total_of(top, sum, sinks, head + g));
    device float* part = parts + ((int(group.y) * H + head + g) * SPLITS + split) * (D + 2);
    device float* to = SPLITS > 1 ? part : o + t * p.o_token + (head + g) * p.o_head;
    for (int d = tid; d < D; d += 32 * SIMDGROUPS) {
      float x = 0.0f;
      for (int i = 0; i < SIMDGROUPS * ROWS; i++) x += ((threadgroup const float*)room)[i * D + d];
      to[d] = x * share;
    }
    if (SPLITS > 1 && tid == 0) part[D] = top, part[D + 1] = sum;
  }
}

// o of a head of a token from its parts, at most 32: a simdgroup each
kernel void merge(device const float* parts [[buffer(0)]], device const int* starts [[buffer(1)]],
                  device const int* counts [[buffer(2)]], device const int* lengths [[buffer(3)]],
                  device const float* sinks [[buffer(4)]], device float* o [[buffer(5)]], constant Params& p [[buffer(6)]],
                  uint2 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float shares[32];
  const int head = int(group.x);
  const Token token = token_of(int(group.y), starts, counts, lengths, lane, p);
  if (token.row < 0) return;
  const int n = token.sequence < 0 ? 0 : token.splits;
  device const float* part = parts + (int(group.y) * H + head) * SPLITS * (D + 2);
  device const float* own = part + int(lane) * (D + 2);
  const float m = int(lane) < n ? own[D] : LEAST, top = simd_max(m), keep = exp2(m - top);
  const float l = simd_sum(int(lane) < n ? own[D + 1] * keep : 0.0f);
  shares[lane] = keep * share_of(top, total_of(top, l, sinks, head));
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int d = int(lane); d < D; d += 32) {
    float x = 0.0f;
    for (int i = 0; i < n; i++) x += part[i * (D + 2) + d] * shares[i];
    o[token.row * p.o_token + head * p.o_head + d] = x;
  }
}

// ---- prefill and dense ----

constant constexpr int LARGER = D > E ? D : E;                         // E: columns of v
constant constexpr int BLOCK = LARGER <= 128 ? 32 : 16;                // tokens at a time
constant constexpr int K_LINE = BLOCK + 4, V_LINE = E + 4;             // padded against bank conflicts
constant constexpr int TILE = D * K_LINE > BLOCK * V_LINE ? D * K_LINE : BLOCK * V_LINE;
constant constexpr bool KEPT = D <= 128;                               // q stays in registers

METAL_FUNC simdgroup_float8x8 piece(float a, float b) {
  simdgroup_float8x8 x;
  x.thread_elements()[0] = a;
  x.thread_elements()[1] = b;
  return x;
}

METAL_FUNC simdgroup_float8x8 query(device const float* x, int i, int c, float scale) {
  return piece(8 * i + c < WIDTH ? x[8 * i] * scale : 0.0f, 8 * i + c + 1 < WIDTH ? x[8 * i + 1] * scale : 0.0f);
}

METAL_FUNC float row_max(float x) {  // of the 4 lanes that share a row
  x = max(x, simd_shuffle_xor(x, 1));
  return max(x, simd_shuffle_xor(x, 8));
}
METAL_FUNC float row_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 8);
}
METAL_FUNC int row_of(int lane) { return (lane & 16) / 4 + lane / 2 % 4; }
METAL_FUNC int column_of(int lane) { return (lane & 8) / 2 + lane % 2 * 2; }

struct Paged {  // a sequence's keys and values of one kv head, in pages
  device const STORED* k_pages;
  device const STORED* v_pages;
  device const float* k_scales;
  device const float* v_scales;
  device const int* table;
  int sequence, kv, length;

  void stage_keys(threadgroup float4* tile, int at, int tid, constant Params& p) const {
    const size_t place = tile_of(table, sequence, at / 32, kv, p);
    for (int i = tid; i < D * BLOCK / 4; i += 128) {
      const int d = i / (BLOCK / 4), j = at % 32 + i % (BLOCK / 4) * 4;
      float4 y = load4(k_pages + place * (32 * D) + d * 32 + j);
      if (SCALES) y *= load4(k_scales + place * 32 + j);
      tile[(d * K_LINE + j - at % 32) / 4] = y;
    }
  }
  void stage_values(threadgroup float4* tile, int at, int tid, constant Params& p) const {
    const size_t place = tile_of(table, sequence, at / 32, kv, p);
    for (int i = tid; i < BLOCK * QUADS; i += 128) {
      const int j = i / QUADS, d = i % QUADS * 4;
      const bool there = at + j < length;  // what nobody sees may be anything
      const float4 y = there ? load4(v_pages + place * (32 * D) + (at % 32 + j) * D + d) : float4(0.0f);
      tile[(j * V_LINE + d) / 4] = SCALES && there ? y * v_scales[place * 32 + at % 32 + j] : y;
    }
  }
};

struct DenseParams {
  int sequences, tokens, keys, tiles;  // tokens of q, keys of k and v: of each sequence, or of all if ragged
  int q_token, q_head, q_batch, k_token, k_head, k_batch, v_token, v_head, v_batch, o_token, o_head, o_batch;
  int l_token, l_head, l_batch;
  float scale, cap;
};

struct Dense {  // the same in rows
  device const float* k;
  device const float* v;
  int length;

  void stage_keys(threadgroup float4* tile, int at, int tid, constant DenseParams& p) const {
    for (int i = tid; i < BLOCK * D; i += 128) {
      const int j = i / D, d = i % D;
      ((threadgroup float*)tile)[d * K_LINE + j] = at + j < length && d < WIDTH ? k[(at + j) * p.k_token + d] : 0.0f;
    }
  }
  void stage_values(threadgroup float4* tile, int at, int tid, constant DenseParams& p) const {
    for (int i = tid; i < BLOCK * E; i += 128) {
      const int j = i / E, d = i % E;
      ((threadgroup float*)tile)[j * V_LINE + d] = at + j < length && d < V_WIDTH ? v[(at + j) * p.v_token + d] : 0.0f;
    }
  }
};

// What the 32 rows of a threadgroup see of the keys from `low` on to `high`: the maximum m and the sum l of the lane's row,
// whose q is x, and their outputs. A row's range: own; positions that every row sees: common.
template <class Keys, class P>
METAL_FUNC void attend(Keys keys, device const float* x, int low, int high, int2 own, int2 common, threadgroup float4* tile4,
                       int tid, constant P& p, thread simdgroup_float8x8 (&out)[E / 8], thread float& m, thread float& l) {
  threadgroup const float* tile = (threadgroup const float*)tile4;
  const int r = row_of(tid % 32), c = column_of(tid % 32);
  simdgroup_float8x8 queries[KEPT ? D / 8 : 1];
  UNROLL for (int i = 0; i < D / 8 && KEPT; i++) queries[i] = query(x, i, c, p.scale);
  UNROLL for (int i = 0; i < E / 8; i++) out[i] = piece(0.0f, 0.0f);
  m = LEAST, l = 0.0f;
  for (int at = low / BLOCK * BLOCK; at < high; at += BLOCK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    keys.stage_keys(tile4, at, tid, p);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_float8x8 s[BLOCK / 8];
    UNROLL for (int j = 0; j < BLOCK / 8; j++) s[j] = piece(0.0f, 0.0f);
    UNROLL for (int i = 0; i < D / 8; i++) {
      simdgroup_float8x8 a = queries[KEPT ? i : 0];
      if (!KEPT) a = query(x, i, c, p.scale);
      UNROLL for (int j = 0; j < BLOCK / 8; j++) {
        threadgroup const float* y = tile + (8 * i + r) * K_LINE + 8 * j + c;
        simdgroup_float8x8 b = piece(y[0], y[1]);
        simdgroup_multiply_accumulate(s[j], a, b, s[j]);
      }
    }
    const bool all = at >= common.x && at + BLOCK <= common.y;
    float top = m, sum = 0.0f;
    UNROLL for (int j = 0; j < BLOCK / 8; j++)
      UNROLL for (int e = 0; e < 2; e++) {
        const int position = at + 8 * j + c + e;
        const float y = capped(s[j].thread_elements()[e], p.cap);
        s[j].thread_elements()[e] = all || (position >= own.x && position < own.y) ? y : NONE;
        top = max(top, s[j].thread_elements()[e]);
      }
    top = row_max(top);
    const float keep = exp2(m - top);
    UNROLL for (int j = 0; j < BLOCK / 8; j++)
      UNROLL for (int e = 0; e < 2; e++) {
        s[j].thread_elements()[e] = exp2(s[j].thread_elements()[e] - top);
        sum += s[j].thread_elements()[e];
      }
    m = top, l = l * keep + sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    keys.stage_values(tile4, at, tid, p);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL for (int i = 0; i < E / 8; i++) {
      out[i].thread_elements()[0] *= keep;
      out[i].thread_elements()[1] *= keep;
      UNROLL for (int j = 0; j < BLOCK / 8; j++) {
        threadgroup const float* y = tile + (8 * j + r) * V_LINE + 8 * i + c;
        simdgroup_float8x8 b = piece(y[0], y[1]);
        simdgroup_multiply_accumulate(out[i], s[j], b, out[i]);
      }
    }
  }
  l = row_sum(l);
}

METAL_FUNC void write_row(thread simdgroup_float8x8 (&out)[E / 8], float share, int c, device float* to) {
  UNROLL for (int i = 0; i < E / 8; i++)
    UNROLL for (int e = 0; e < 2; e++)
      if (8 * i + c + e < V_WIDTH) to[8 * i + e] = out[i].thread_elements()[e] * share;
}

// The sequence of a tile of 32 rows (token, head of the kv head), tile becoming its first row; none: `sequences`.
METAL_FUNC int sequence_of(thread int& tile, device const int* counts, int sequences) {
  for (int b = 0; b < sequences; b++) {
    const int tiles = MIXED && counts[b] < MANY ? 0 : (counts[b] * (H / KV) + 31) / 32;
    if (tile < tiles) {
      tile *= 32;
      return b;
    }
    tile -= tiles;
  }
  return sequences;
}

// Clears the rows of nobody of a block of 32; the sum of their weights is 0, but its logarithm is wanted large.
template <class P>
METAL_FUNC void clear(int block, int kv, device const int* starts, device const int* counts, device float* o, device float* lse,
                      constant P& p, int l_token, int l_head, uint simdgroup, uint lane) {
  for (int t = 32 * block + int(simdgroup); t < min(32 * block + 32, p.tokens); t += 4)
    if (owner(t, starts, counts, p.sequences, lane) < 0)
      for (int h = kv * (H / KV); h < (kv + 1) * (H / KV); h++) {
        for (int d = int(lane); d < V_WIDTH; d += 32) o[t * p.o_token + h * p.o_head + d] = 0.0f;
        if (RAGGED && lane == 0) lse[t * l_token + h * l_head] = 1e30f;
      }
}

[[max_total_threads_per_threadgroup(128)]]
kernel void prefill(device const float* q [[buffer(0)]], device const STORED* k_pages [[buffer(1)]],
                    device const STORED* v_pages [[buffer(2)]], device const int* table [[buffer(3)]],
                    device const int* starts [[buffer(4)]], device const int* counts [[buffer(5)]],
                    device const int* lengths [[buffer(6)]], device const float* sinks [[buffer(7)]],
                    device const float* k_scales [[buffer(8)]], device const float* v_scales [[buffer(9)]],
                    device float* o [[buffer(10)]], constant Params& p [[buffer(11)]],
                    uint2 group [[threadgroup_position_in_grid]], uint thread_ [[thread_index_in_threadgroup]],
                    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float4 tile[TILE / 4];
  int first = int(group.y);
  const int kv = int(group.x), tid = int(thread_), together = H / KV;
  if (first >= p.tiles) return clear(first - p.tiles, kv, starts, counts, o, o, p, 0, 0, simdgroup, lane);
  const int b = sequence_of(first, counts, p.sequences);
  if (b == p.sequences) return;
  const int rows = counts[b] * together, length = min(lengths[b], 32 * p.table), before = length - counts[b];
  const int place = first + int(simdgroup) * 8 + row_of(int(lane)), row = min(place, rows - 1);
  const int token = row / together, head = kv * together + row % together, c = column_of(int(lane));
  const int2 begin = seen(before + first / together, length), end = seen(before + min(first + 31, rows - 1) / together, length);
  const Paged keys = {k_pages, v_pages, k_scales, v_scales, table, b, kv, length};
  simdgroup_float8x8 out[E / 8];
  float m, l;
  attend(keys, q + (starts[b] + token) * p.q_token + head * p.q_head + c, begin.x, end.y, seen(before + token, length),
         int2(end.x, begin.y), tile, tid, p, out, m, l);
  if (place >= rows) return;
  o += (starts[b] + token) * p.o_token + head * p.o_head + c;
  write_row(out, share_of(m, total_of(m, l, sinks, head)), c, o);
}

// ragged_attention_lse and attention_lse, the steps of engine/cpu/kernels/attention_dense.cpp, which also keep log sum e^s:
// k and v are rows of the step, or of a batch.
[[max_total_threads_per_threadgroup(128)]]
kernel void dense(device const float* q [[buffer(0)]], device const float* k [[buffer(1)]], device const float* v [[buffer(2)]],
                  device const int* starts [[buffer(3)]], device const int* counts [[buffer(4)]],
                  device const float* sinks [[buffer(5)]], device float* o [[buffer(6)]], device float* lse [[buffer(7)]],
                  constant DenseParams& p [[buffer(8)]],
                  uint3 group [[threadgroup_position_in_grid]], uint thread_ [[thread_index_in_threadgroup]],
                  uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float4 tile[TILE / 4];
  int first = int(group.y);
  const int kv = int(group.x), tid = int(thread_), together = H / KV;
  if (RAGGED && first >= p.tiles)
    return clear(first - p.tiles, kv, starts, counts, o, lse, p, p.l_token, p.l_head, simdgroup, lane);
  const int b = RAGGED ? sequence_of(first, counts, p.sequences) : int(group.z);
  if (b == p.sequences) return;
  if (!RAGGED) first *= 32;
  const int count = RAGGED ? counts[b] : p.tokens, rows = count * together, length = RAGGED ? count : p.keys;
  const int before = length - count;
  const int place = first + int(simdgroup) * 8 + row_of(int(lane)), row = min(place, rows - 1);
  const int token = row / together, head = kv * together + row % together, c = column_of(int(lane));
  const int2 begin = seen(before + first / together, length), end = seen(before + min(first + 31, rows - 1) / together, length);
  q += (RAGGED ? starts[b] * p.q_token : b * p.q_batch) + token * p.q_token + head * p.q_head + c;
  k += (RAGGED ? starts[b] * p.k_token : b * p.k_batch) + kv * p.k_head;
  v += (RAGGED ? starts[b] * p.v_token : b * p.v_batch) + kv * p.v_head;
  o += (RAGGED ? starts[b] * p.o_token : b * p.o_batch) + token * p.o_token + head * p.o_head + c;
  lse += (RAGGED ? starts[b] * p.l_token : b * p.l_batch) + token * p.l_token + head * p.l_head;
  const Dense keys = {k, v, length};
  simdgroup_float8x8 out[E / 8];
  float m, l;
  attend(keys, q, begin.x, end.y, seen(before + token, length), int2(end.x, begin.y), tile, tid, p, out, m, l);
  if (place >= rows) return;
  const float2 total = total_of(m, l, sinks, head);
  write_row(out, share_of(m, total), c, o);
  if (c == 0) *lse = (total.x + log2(total.y)) * 0.693147181f;
}

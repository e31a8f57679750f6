// sample: one token for each row of logits (R, V) f32 and its log-probability, and the likeliest tokens; rows, parameters
// and random numbers are those of engine/cpu/kernels/sample.cpp. The ids of a sequence's biases differ.
//
//   bytes: the logits once by all threadgroups (look); a greedy row is then done. A drawn row has one threadgroup, which goes
//     through V weights e^((x - max) / temperature) in a room of their own: once to make and once to add up, 3 times for
//     each of top_k and top_p.
//   plain loop: w = e^((z - max z) / temperature), z = logits, penalized, biased, masked; keep the top_k largest; keep the
//     shortest prefix of falling w with top_p of the sum; drop w < min_p; take the first token where sum w > u sum of all w
//
// A GPU has no double, so sums of weights are integers in units of 2^-44: exact, and in no order. A cut is found by radix
// selection on the weights' bits, 10 at a time: bins in threadgroup memory have the sums of mantissas, in two words, for
// all weights of a bin have one exponent. A thread always has the same weights of the room: every 32nd of its simdgroup's
// LINE neighbours.
#include "common.h"

constant int V     [[function_constant(0)]];  // vocabulary, at most 2^19
constant int PARTS [[function_constant(1)]];  // of a row in look, at most 32

constant constexpr int TOP = 20, BINS = 1024, GROUPS = 32;  // GROUPS: simdgroups of a drawn row
constant constexpr float SMALLEST = -3.4028235e38f, LOG2E = 1.44269504f;
enum Parameter { TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY };
enum Number { TOP_K, SEED, SEED_HIGH, COUNTER, HISTORY, PROMPT, SEQUENCE, BIASES, MASKED, LIKELIEST, TARGET };

struct Params { int logits, params, ints, history, bias_ids, biases, masks, ids, values; };  // strides of rows

struct Part { float most; int first; float sum; };  // the maximum, where it is first, the sum of e^(x - most)

METAL_FUNC void add(thread Part& part, float x, int at) {
  if (x > part.most) {
    part.sum *= exp2((part.most - x) * LOG2E);
    part.most = x, part.first = at;
  }
  part.sum += exp2((x - part.most) * LOG2E);  // NaN if x is NaN or infinite
}

METAL_FUNC Part together(Part own, threadgroup float* room, uint simdgroup, uint lane, uint simdgroups) {
  Part all;
  all.most = group_max(own.most, room, simdgroup, lane, simdgroups);
  all.first = int(-group_max(own.most == all.most ? -float(own.first) : LOWEST, room, simdgroup, lane, simdgroups));
  all.sum = group_sum(own.sum * exp2((own.most - all.most) * LOG2E), room, simdgroup, lane, simdgroups);
  return all;
}

kernel void look(device const float* logits [[buffer(0)]], device float* parts [[buffer(1)]], constant Params& p [[buffer(2)]],
                 uint2 group [[threadgroup_position_in_grid]], uint2 tid [[thread_position_in_threadgroup]],
                 uint2 threads [[threads_per_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                 uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float room[32];
  const int size = (V + PARTS - 1) / PARTS, begin = int(group.x) * size, end = min(V, begin + size);
  Part own = {SMALLEST, min(begin, V - 1), 0.0f};
  for (int v = begin + int(tid.x); v < end; v += int(threads.x)) add(own, logits[int(group.y) * p.logits + v], v);
  const Part all = together(own, room, simdgroup, lane, simdgroups);
  device float* to = parts + 3 * (int(group.y) * PARTS + int(group.x));
  if (tid.x == 0) to[0] = all.most, to[1] = float(all.first), to[2] = all.sum;
}

// Philox4x32-10 (Salmon et al. 2011) of counter (n, 0, 0, 0): 53 of its bits, as a fraction of 2^64.
METAL_FUNC ulong philox(uint seed, uint seed_high, uint n) {
  uint4 c = uint4(n, 0u, 0u, 0u);
  uint key0 = seed, key1 = seed_high;
  for (int round = 0; round < 10; round++, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    const ulong a = ulong(c.x) * 0xD2511F53u, b = ulong(c.z) * 0xCD9E8D57u;
    c = uint4(uint(b >> 32) ^ c.y ^ key0, uint(b), uint(a >> 32) ^ c.w ^ key1, uint(a));
  }
  return (ulong(c.x >> 5) << 26 | ulong(c.y >> 6)) << 11;
}

METAL_FUNC ulong shifted(ulong x, int by) { return by >= 0 ? x << by : by > -64 ? x >> -by : 0ul; }
METAL_FUNC uint mantissa(uint bits) { return (bits & 0x7fffffu) | 0x800000u; }
METAL_FUNC int exponent(uint bits) { return int(bits >> 23) - 106; }                    // of 2^-44 and the mantissa's 2^23
METAL_FUNC ulong fixed(float w) { return w > 0.0f ? shifted(mantissa(as_type<uint>(w)), exponent(as_type<uint>(w))) : 0ul; }

METAL_FUNC ulong lanes_sum(ulong x) {
  for (ushort i = 1; i < 32; i *= 2) x += as_type<ulong>(simd_shuffle_xor(as_type<uint2>(x), i));
  return x;
}

// The first of n numbers where the running sum, from `before` on, reaches the target, or the last that is not 0; `before`
// becomes the sum in front of it.
METAL_FUNC int reach(threadgroup const ulong* x, int n, ulong target, thread ulong& before) {
  ulong sum = before;
  int last = 0;
  for (int i = 0; i < n && sum < target; i++) {
    if (x[i] == 0ul) continue;
    before = sum, last = i;
    sum += x[i];
  }
  return last;
}

// A drawn row's threadgroup.
struct Row {
  device float* w;
  threadgroup float* part;
  threadgroup ulong* sums;    // of each simdgroup
  threadgroup ulong* values;  // of each bin, from the highest down
  threadgroup atomic_uint* low;
  threadgroup atomic_uint* high;
  int tid, begin, end;        // this thread's weights are begin, begin + 32 ... end
  uint simdgroup, lane;

  ulong total(ulong own) const {
    own = lanes_sum(own);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == 0) sums[simdgroup] = own;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return lanes_sum(sums[lane]);
  }

  ulong mass() const {
    ulong own = 0;
    for (int v = begin; v < end; v += 32) own += fixed(w[v]);
    return total(own);
  }

  // Keeps the shortest prefix of (weight falling, id rising) whose sum, of weights or of ones, reaches the target.
  void cut(bool by_weight, ulong target) const {
    uint edge = 0;
    ulong above = 0, here = 0;
    for (int shift = 20; shift >= 0; shift -= 10) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      atomic_store_explicit(low + tid, 0u, memory_order_relaxed);
      atomic_store_explicit(high + tid, 0u, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int v = begin; v < end; v += 32) {
        const uint bits = as_type<uint>(w[v]), one = by_weight ? mantissa(bits) : 1u;
        if (bits == 0u || bits >> shift >> 10 != edge) continue;
        atomic_fetch_add_explicit(low + (bits >> shift & (BINS - 1)), one & 4095u, memory_order_relaxed);
        if (by_weight) atomic_fetch_add_explicit(high + (bits >> shift & (BINS - 1)), one >> 12, memory_order_relaxed);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const int bin = BINS - 1 - tid;
      here = ulong(atomic_load_explicit(high + bin, memory_order_relaxed)) << 12;
      here += atomic_load_explicit(low + bin, memory_order_relaxed);
      if (by_weight) here = shifted(here, exponent((edge << 10 | uint(bin)) << shift));
      values[tid] = here;
      total(here);
      const int group = reach(sums, GROUPS, target, above), digit = reach(values + 32 * group, 32, target, above);
      here = values[32 * group + digit];
      edge = edge << 10 | uint(BINS - 1 - 32 * group - digit);
    }
    const float least = as_type<float>(edge);
    const ulong unit = by_weight ? fixed(least) : 1ul, ties = unit ? (target - above + unit - 1) / unit : ~0ul;
    if (unit && ties * unit < here) {  // of those equal to the last, only the first may stay
      ulong count = 0;
      for (int v = begin; v < end; v += 32) count += w[v] == least ? 1ul : 0ul;
      total(count);
      uint rank = 0;
      for (uint i = 0; i < simdgroup; i++) rank += uint(sums[i]);
      for (int first = begin - int(lane); first < end; first += 32) {
        const int v = first + int(lane);
        const uint tie = v < end && w[v] == least ? 1u : 0u, place = rank + simd_prefix_exclusive_sum(tie);
        if (tie && place >= ties) w[v] = 0.0f;
        rank += simd_sum(tie);
      }
    }
    for (int v = begin; v < end; v += 32) w[v] = w[v] < least ? 0.0f : w[v];
  }

  int draw(ulong u) const {
    const int line = (V + BINS - 1) / BINS;  // weights of a thread
    ulong before = 0, own = 0;
    const ulong target = mulhi(u, mass()) + 1;
    int at = reach(sums, GROUPS, target, before) * line * 32;
    threadgroup_barrier(mem_flags::mem_device);
    for (int i = int(lane); i < line && at + int(simdgroup) * line + i < V; i += 32) own += fixed(w[at + int(simdgroup) * line + i]);
    total(own);
    at += reach(sums, GROUPS, target, before) * line;
    if (tid < line) values[tid] = at + tid < V ? fixed(w[at + tid]) : 0ul;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return at + reach(values, line, target, before);
  }
};

[[max_total_threads_per_threadgroup(32 * GROUPS)]]
kernel void sample(device const float* logits [[buffer(0)]], device const float* params [[buffer(1)]],
                   device const int* ints [[buffer(2)]], device const int* history [[buffer(3)]],
                   device const int* bias_ids [[buffer(4)]], device const float* biases [[buffer(5)]],
                   device const uint* masks [[buffer(6)]], device const float* parts [[buffer(7)]],
                   device float* room [[buffer(8)]], device int* tokens [[buffer(9)]], device float* logprobs [[buffer(10)]],
                   device int* ids [[buffer(11)]], device float* values [[buffer(12)]], constant Params& p [[buffer(13)]],
                   uint r_ [[threadgroup_position_in_grid]], uint tid_ [[thread_index_in_threadgroup]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float part[GROUPS];
  threadgroup ulong sums[GROUPS];
  threadgroup ulong of_bins[BINS];
  threadgroup atomic_uint low[BINS];
  threadgroup atomic_uint high[BINS];
  const int r = int(r_), tid = int(tid_), line = (V + BINS - 1) / BINS * 32;
  device const float* x = logits + r * p.logits;
  device const float* real = params + r * p.params;
  device const int* n = ints + r * p.ints;
  const int begin = int(simdgroup) * line + int(lane), end = min(V, int(simdgroup + 1) * line);

  const float own = int(lane) < PARTS ? parts[3 * (r * PARTS + int(lane))] : SMALLEST, most = simd_max(own);
  const int first = simd_min(int(lane) < PARTS && own == most ? int(parts[3 * (r * PARTS + int(lane)) + 1]) : V - 1);
  const float sum = simd_sum(int(lane) < PARTS ? parts[3 * (r * PARTS + int(lane)) + 2] * exp2((own - most) * LOG2E) : 0.0f);
  const float log_sum = log(sum), temperature = real[TEMPERATURE];
  const bool valid = sum > 0.0f && sum <= FLT_MAX && most <= FLT_MAX;  // no NaN, no infinity
  const bool penalized = real[REPETITION] != 1.0f || real[PRESENCE] != 0.0f || real[FREQUENCY] != 0.0f;
  const bool edited = penalized || n[BIASES] || n[MASKED];
  int token = !valid ? -1 : n[TARGET] ? n[TARGET] - 1 : first;

  if (valid && !n[TARGET] && (edited || temperature != 0.0f)) {
    const Row row = {room + size_t(r) * V, part, sums, of_bins, low, high, tid, begin, end, simdgroup, lane};
    Part all = {most, first, sum};
    if (edited) {
      if (penalized) {  // first the room counts: the highest bit is set for tokens of the sequence, the others count those generated
        device const int* told = history + n[SEQUENCE] * p.history;
        device atomic_uint* counts = (device atomic_uint*)row.w;
        for (int v = begin; v < end; v += 32) atomic_store_explicit(counts + v, 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_device);
        for (int i = tid; i < n[HISTORY]; i += 32 * GROUPS)
          if (told[i] >= 0 && told[i] < V) {
            atomic_fetch_or_explicit(counts + told[i], 1u << 31, memory_order_relaxed);
            if (i >= n[PROMPT]) atomic_fetch_add_explicit(counts + told[i], 1u, memory_order_relaxed);
          }
        threadgroup_barrier(mem_flags::mem_device);
      }
      for (int v = begin; v < end; v += 32) {
        const uint count = penalized ? as_type<uint>(row.w[v]) : 0u;
        float z = x[v];
        if (count) z = z > 0.0f ? z / real[REPETITION] : z * real[REPETITION];
        if (count << 1) z -= float(count & 0x7fffffffu) * real[FREQUENCY] + real[PRESENCE];
        row.w[v] = z;
      }
      threadgroup_barrier(mem_flags::mem_device);
      for (int i = tid; i < n[BIASES]; i += 32 * GROUPS) {
        const int id = bias_ids[n[SEQUENCE] * p.bias_ids + i];
        if (id >= 0 && id < V) row.w[id] += biases[n[SEQUENCE] * p.biases + i];
      }
      threadgroup_barrier(mem_flags::mem_device);
      all = {SMALLEST, V - 1, 0.0f};
      for (int v = begin; v < end; v += 32) {
        if (n[MASKED] && !(masks[r * p.masks + v / 32] >> (v % 32) & 1u)) row.w[v] = -INFINITY;
        add(all, row.w[v], v);
      }
      all = together(all, part, simdgroup, lane, GROUPS);
    }
    token = all.sum > 0.0f ? all.first : -1;
    if (token >= 0 && temperature != 0.0f) {
      for (int v = begin; v < end; v += 32) row.w[v] = exp2(((edited ? row.w[v] : x[v]) - all.most) * (LOG2E / temperature));
      if (n[TOP_K] > 0 && n[TOP_K] < V) row.cut(false, ulong(n[TOP_K]));
      if (real[TOP_P] < 1.0f) row.cut(true, max(1ul, mulhi(fixed(real[TOP_P]) << 20, row.mass())));
      for (int v = begin; v < end; v += 32) row.w[v] = row.w[v] < real[MIN_P] ? 0.0f : row.w[v];
      token = row.draw(philox(uint(n[SEED]), uint(n[SEED_HIGH]), uint(n[COUNTER])));
    }
  }
  if (tid == 0) tokens[r] = token, logprobs[r] = token < 0 ? NAN : x[token] - most - log_sum;

  float last = INFINITY;
  int last_id = -1;
  for (int i = 0; i < min(n[LIKELIEST], min(TOP, V)); i++) {  // the largest that comes after the last one found
    float best = -INFINITY;
    int at = -1;
    for (int v = begin; v < end; v += 32)
      if ((x[v] < last || (x[v] == last && v > last_id)) && (at < 0 || x[v] > best)) best = x[v], at = v;
    last = group_max(best, part, simdgroup, lane, GROUPS);
    last_id = clamp(int(-group_max(at >= 0 && best == last ? -float(at) : -float(V), part, simdgroup, lane, GROUPS)), 0, V - 1);
    if (tid == 0) ids[r * p.ids + i] = last_id, values[r * p.values + i] = last - most - log_sum;
  }
}

// Rotary positions: rope turns each head of (T, H, D) by its token's angles; rope_append norms and turns q and k of a step
// and writes k and v into the cache's pages, in one dispatch. Steps and layouts are those of engine/cpu/kernels/rope.cpp.
//
//   bytes: q, k and v once in, q once out, k and v once into pages (k transposed: D writes of one number a token and head)
//   plain loop: for t, h, pair i of (a, b): y_a = a cos - b sin, y_b = b cos + a sin, angle = position * inv_freq[i]
//
// A simdgroup has one head of one token, a lane every 32nd number: decode has heads enough for the whole GPU.
#include "common.h"

constant int D            [[function_constant(0)]];  // head size
constant int HALF         [[function_constant(1)]];  // angles; what lies beyond 2 HALF is not turned
constant bool INTERLEAVED [[function_constant(2)]];  // pairs are (2i, 2i + 1), else (i, i + HALF)
constant bool HAS_NORMS   [[function_constant(3)]];
constant bool HAS_SCALES  [[function_constant(4)]];

// cos and sin of an angle up to 2^22: quarter turns are taken away with pi/2 in two parts, by exact products
METAL_FUNC float2 circle(float angle) {
  const float turns = rint(angle * 0.636619772f);
  const float r = fma(-turns, -4.37113883e-8f, fma(-turns, 1.57079637f, angle)), z = r * r;
  const float s = fma(r * z, fma(z, fma(z, fma(z, 2.7557319e-6f, -1.984127e-4f), 8.3333333e-3f), -1.6666667e-1f), r);
  const float c = fma(z, fma(z, fma(z, fma(z, fma(z, -2.7557319e-7f, 2.4801587e-5f), -1.3888889e-3f), 4.1666667e-2f), -0.5f), 1.0f);
  const int quarter = int(turns);
  const float2 p = quarter & 1 ? float2(-s, c) : float2(c, s);
  return quarter & 2 ? -p : p;
}

struct Head {  // what a simdgroup turns: x times factor times gain
  device const float* x;
  device const float* gain;
  device const float* inv_freq;
  float position, scale, factor;

  float at(int d) const { return HAS_NORMS ? x[d] * factor * gain[d] : x[d]; }
  float turned(int d) const {
    if (d >= 2 * HALF) return at(d);
    const bool first = INTERLEAVED ? d % 2 == 0 : d < HALF;
    const int step = INTERLEAVED ? 1 : HALF;
    const float2 turn = circle(position * inv_freq[INTERLEAVED ? d / 2 : d % HALF]) * scale;
    const float other = at(first ? d + step : d - step);
    return at(d) * turn.x + (first ? -other : other) * turn.y;
  }
};

struct RopeParams { int heads, x_token, x_head, y_token, y_head; float scale; };  // strides in numbers

kernel void rope(device const float* x [[buffer(0)]], device const int* positions [[buffer(1)]],
                 device const float* inv_freq [[buffer(2)]], device float* y [[buffer(3)]], constant RopeParams& p [[buffer(4)]],
                 uint2 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                 uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const int t = int(group.y), h = int(group.x * simdgroups + simdgroup);
  if (h >= p.heads) return;
  const Head head = {x + t * p.x_token + h * p.x_head, x, inv_freq, float(positions[t]), p.scale, 1.0f};
  device float* to = y + t * p.y_token + h * p.y_head;
  for (int d = int(lane); d < D; d += 32) to[d] = d < 2 * HALF ? head.turned(d) : head.x[d];
}

// STORED: the type of pages
METAL_FUNC void put(device float* to, float x) { *to = x; }
METAL_FUNC void put(device half* to, float x) { *to = half(x); }
METAL_FUNC void put(device bfloat* to, float x) { *to = bfloat(x); }
METAL_FUNC void put(device char* to, float x) { *to = char(int(rint(x))); }

struct AppendParams {
  int q_heads, kv_heads, slots, q_token, q_head, k_token, k_head, v_token, v_head, y_token, y_head;
  float scale, eps;
};

kernel void rope_append(device const float* q [[buffer(0)]], device const float* k [[buffer(1)]], device const float* v [[buffer(2)]],
                        device const int* positions [[buffer(3)]], device const int* slots [[buffer(4)]],
                        device const float* inv_freq [[buffer(5)]], device const float* q_norm [[buffer(6)]],
                        device const float* k_norm [[buffer(7)]], device float* y [[buffer(8)]],
                        device STORED* k_pages [[buffer(9)]], device STORED* v_pages [[buffer(10)]],
                        device float* k_scales [[buffer(11)]], device float* v_scales [[buffer(12)]],
                        constant AppendParams& p [[buffer(13)]],
                        uint2 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                        uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const int t = int(group.y), h = int(group.x * simdgroups + simdgroup), slot = slots[t];
  const bool is_q = h < p.q_heads, is_v = h >= p.q_heads + p.kv_heads;
  const int n = is_q ? h : (h - p.q_heads) % p.kv_heads;
  if (h >= p.q_heads + 2 * p.kv_heads || (!is_q && (slot < 0 || slot >= p.slots))) return;
  device const float* x = is_q ? q + t * p.q_token + n * p.q_head : is_v ? v + t * p.v_token + n * p.v_head : k + t * p.k_token + n * p.k_head;
  float squares = 0.0f, most = 0.0f;
  if (HAS_NORMS) {
    for (int d = int(lane); d < D; d += 32) squares += x[d] * x[d];
    squares = simd_sum(squares);
  }
  const Head head = {x, is_q ? q_norm : k_norm, inv_freq, float(positions[t]), p.scale, rsqrt(squares / float(D) + p.eps)};
  if (is_q) {
    device float* to = y + t * p.y_token + n * p.y_head;
    for (int d = int(lane); d < D; d += 32) to[d] = head.turned(d);
    return;
  }
  const size_t tile = size_t(slot / 32) * p.kv_heads + n;  // pages are k (N, K, D, 32) and v (N, K, 32, D)
  const int offset = slot % 32;
  float unit = 1.0f;
  if (HAS_SCALES) {  // the largest of a token and head becomes 127
    for (int d = int(lane); d < D; d += 32) most = max(most, fabs(is_v ? x[d] : head.turned(d)));
    most = simd_max(most) / 127.0f;
    unit = most > 0.0f ? most : 1.0f;
    if (lane == 0) (is_v ? v_scales : k_scales)[tile * 32 + offset] = most;
  }
  for (int d = int(lane); d < D; d += 32)
    if (is_v) put(v_pages + (tile * 32 + offset) * D + d, x[d] / unit);
    else put(k_pages + (tile * D + d) * 32 + offset, head.turned(d) / unit);
}

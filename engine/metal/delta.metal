// What recurrent layers do to the sequences of a step; states are updated in place. The steps of engine/cpu/kernels/delta.cpp.
//
// short_conv: y (T, C) <- x (T, C), weight (C, TAPS), states (N, TAPS - 1, C). A thread has a channel of a sequence and its
//   last TAPS tokens. Bytes: x and y once. Plain loop: y[t] = silu(sum_j weight[:, j] x[t - TAPS + 1 + j])
// gated_delta: o (T, H, E) <- q, k (T, K, D), v (T, H, E), decay, rate (T, H), states (N, H, D, E). For each token
//   S = e^decay S, S += k rate (v - k S), o = q S      with q and k of length 1, q then times scale
//   Columns of S are independent: a simdgroup has 8 of a head, a lane every fourth row of one, in registers from the first
//   token to the last. Bytes: S once in and out, q and k once for each 8 columns, from caches.
// Threadgroups past the sequences clear the rows of nobody, 32 tokens each.
#include "common.h"

constant int C   [[function_constant(0)]];
constant int H   [[function_constant(1)]];
constant int K   [[function_constant(2)]];
constant int E   [[function_constant(3)]];

struct Params {
  int tokens, sequences, slots, x_token, k_token, v_token, x_head, k_head, v_head;  // strides in numbers; x: also q
  float scale, eps;
};

METAL_FUNC bool nobodys(int t, device const int* starts, device const int* counts, constant Params& p) {
  bool stray = true;
  for (int b = 0; b < p.sequences; b++) stray = stray && (t < starts[b] || t >= starts[b] + counts[b]);
  return stray;
}

kernel void short_conv(device const float* x [[buffer(0)]], device const float* weight [[buffer(1)]],
                       device const int* slots [[buffer(2)]], device const int* starts [[buffer(3)]],
                       device const int* counts [[buffer(4)]], device const int* lengths [[buffer(5)]],
                       device float* y [[buffer(6)]], device float* states [[buffer(7)]], constant Params& p [[buffer(8)]],
                       uint2 at [[thread_position_in_grid]]) {
  const int c = int(at.x), b = int(at.y);
  if (c >= C) return;
  if (b >= p.sequences) {
    for (int t = 32 * (b - p.sequences); t < min(32 * (b - p.sequences + 1), p.tokens); t++)
      if (nobodys(t, starts, counts, p)) y[t * C + c] = 0.0f;
    return;
  }
  if (counts[b] == 0 || slots[b] < 0 || slots[b] >= p.slots) return;
  device float* state = states + size_t(slots[b]) * (TAPS - 1) * C + c;
  float last[TAPS], factor[TAPS];
  UNROLL for (int j = 0; j < TAPS; j++) {
    factor[j] = weight[c * TAPS + j];
    last[j] = j == TAPS - 1 || lengths[b] == counts[b] ? 0.0f : state[j * C];
  }
  for (int t = starts[b]; t < starts[b] + counts[b]; t++) {
    float sum = 0.0f;
    last[TAPS - 1] = x[t * p.x_token + c];
    UNROLL for (int j = 0; j < TAPS; j++) sum += last[j] * factor[j];
    UNROLL for (int j = 0; j + 1 < TAPS; j++) last[j] = last[j + 1];
    y[t * C + c] = silu(sum);
  }
  UNROLL for (int j = 0; j + 1 < TAPS; j++) state[j * C] = last[j];
}

constant constexpr int ROWS = (D + 3) / 4;  // of a lane

METAL_FUNC float rows_sum(float x) {  // over the 4 lanes of a column
  x += simd_shuffle_xor(x, 8);
  return x + simd_shuffle_xor(x, 16);
}

METAL_FUNC void load_unit(device const float* from, int first, float scale, float eps, thread float* to) {
  float squares = 0.0f;
  UNROLL for (int i = 0; i < ROWS; i++) {
    to[i] = first + 4 * i < D ? from[first + 4 * i] : 0.0f;
    squares += to[i] * to[i];
  }
  const float factor = scale * rsqrt(rows_sum(squares) + eps);
  UNROLL for (int i = 0; i < ROWS; i++) to[i] *= factor;
}

kernel void gated_delta(device const float* q [[buffer(0)]], device const float* k [[buffer(1)]], device const float* v [[buffer(2)]],
                        device const float* decay [[buffer(3)]], device const float* rate [[buffer(4)]],
                        device const int* slots [[buffer(5)]], device const int* starts [[buffer(6)]],
                        device const int* counts [[buffer(7)]], device const int* lengths [[buffer(8)]],
                        device float* o [[buffer(9)]], device float* states [[buffer(10)]], constant Params& p [[buffer(11)]],
                        uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]]) {
  const int first = int(lane) / 8, e = int(group.x) * 32 + int(simdgroup) * 8 + int(lane) % 8, h = int(group.y), b = int(group.z);
  const bool real = e < E;
  if (b >= p.sequences) {
    for (int t = 32 * (b - p.sequences) + first; t < min(32 * (b - p.sequences + 1), p.tokens); t += 4)
      if (real && nobodys(t, starts, counts, p)) o[(t * H + h) * E + e] = 0.0f;
    return;
  }
  if (counts[b] == 0 || slots[b] < 0 || slots[b] >= p.slots) return;
  device float* state = states + (size_t(slots[b]) * H + h) * (D * E) + e;
  float s[ROWS], one[ROWS];
  UNROLL for (int i = 0; i < ROWS; i++)
    s[i] = real && lengths[b] != counts[b] && first + 4 * i < D ? state[(first + 4 * i) * E] : 0.0f;
  for (int t = starts[b]; t < starts[b] + counts[b]; t++) {
    const int head = h / (H / K);
    const float kept = exp(decay[t * H + h]);
    float known = 0.0f, out = 0.0f;
    load_unit(k + t * p.k_token + head * p.k_head, first, 1.0f, p.eps, one);
    UNROLL for (int i = 0; i < ROWS; i++) {
      s[i] *= kept;
      known += s[i] * one[i];
    }
    const float change = rate[t * H + h] * ((real ? v[t * p.v_token + h * p.v_head + e] : 0.0f) - rows_sum(known));
    UNROLL for (int i = 0; i < ROWS; i++) s[i] += one[i] * change;
    load_unit(q + t * p.x_token + head * p.x_head, first, p.scale, p.eps, one);
    UNROLL for (int i = 0; i < ROWS; i++) out += s[i] * one[i];
    out = rows_sum(out);
    if (real && first == 0) o[(t * H + h) * E + e] = out;
  }
  UNROLL for (int i = 0; i < ROWS; i++)
    if (real && first + 4 * i < D) state[(first + 4 * i) * E] = s[i];
}

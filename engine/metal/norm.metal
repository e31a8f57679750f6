// softmax, rms_norm, layer_norm: y, x (R, C) in float32, float16 or bfloat16, w, b (C). A threadgroup has a row; x is read
// again for each pass, from the cache. y may be x.
//   softmax:    y = exp(x - max x) / sum exp(x - max x)
//   rms_norm:   y = x / sqrt(mean x^2 + eps) * w
//   layer_norm: y = (x - mean x) / sqrt(mean (x - mean x)^2 + eps) * w + b
#include "common.h"

constant int X [[function_constant(0)]];           // dtypes
constant int Y [[function_constant(1)]];
constant int W [[function_constant(2)]];
constant int B [[function_constant(3)]];

struct Params { int columns, x_row, x_step, y_row, y_step, w_step, b_step; float eps; };

METAL_FUNC float x_at(device const uchar* x, constant Params& p, uint row, int c) {
  return get<float>(x, X, long(row) * p.x_row + long(c) * p.x_step);
}
METAL_FUNC void y_to(device uchar* y, constant Params& p, uint row, int c, float value) {
  put<float>(y, Y, long(row) * p.y_row + long(c) * p.y_step, value);
}

kernel void softmax(device const uchar* x [[buffer(0)]], device uchar* y [[buffer(1)]], constant Params& p [[buffer(4)]],
                    uint row [[threadgroup_position_in_grid]], uint first [[thread_position_in_threadgroup]],
                    uint threads [[threads_per_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                    uint lane [[thread_index_in_simdgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float part[32];
  float top = LOWEST, total = 0.0f;                // of this thread's columns; top is raised as they come
  for (int c = first; c < p.columns; c += threads) {
    const float v = x_at(x, p, row, c);
    if (v > top) total *= exp(top - v), top = v;
    total += exp(v - top);
  }
  const float most = group_max(top, part, simdgroup, lane, simdgroups);
  const float scale = 1.0f / group_sum(total * exp(top - most), part, simdgroup, lane, simdgroups);
  for (int c = first; c < p.columns; c += threads) y_to(y, p, row, c, exp(x_at(x, p, row, c) - most) * scale);
}

kernel void rms_norm(device const uchar* x [[buffer(0)]], device uchar* y [[buffer(1)]], device const uchar* w [[buffer(2)]],
                     constant Params& p [[buffer(4)]],
                     uint row [[threadgroup_position_in_grid]], uint first [[thread_position_in_threadgroup]],
                     uint threads [[threads_per_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                     uint lane [[thread_index_in_simdgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float part[32];
  float squares = 0.0f;
  for (int c = first; c < p.columns; c += threads) {
    const float v = x_at(x, p, row, c);
    squares += v * v;
  }
  const float scale = rsqrt(group_sum(squares, part, simdgroup, lane, simdgroups) / float(p.columns) + p.eps);
  for (int c = first; c < p.columns; c += threads)
    y_to(y, p, row, c, x_at(x, p, row, c) * scale * get<float>(w, W, long(c) * p.w_step));
}

kernel void layer_norm(device const uchar* x [[buffer(0)]], device uchar* y [[buffer(1)]], device const uchar* w [[buffer(2)]],
                       device const uchar* b [[buffer(3)]], constant Params& p [[buffer(4)]],
                       uint row [[threadgroup_position_in_grid]], uint first [[thread_position_in_threadgroup]],
                       uint threads [[threads_per_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                       uint lane [[thread_index_in_simdgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float part[32];
  float total = 0.0f, squares = 0.0f;
  for (int c = first; c < p.columns; c += threads) total += x_at(x, p, row, c);
  const float mean = group_sum(total, part, simdgroup, lane, simdgroups) / float(p.columns);
  for (int c = first; c < p.columns; c += threads) {
    const float v = x_at(x, p, row, c) - mean;
    squares += v * v;
  }
  const float scale = rsqrt(group_sum(squares, part, simdgroup, lane, simdgroups) / float(p.columns) + p.eps);
  for (int c = first; c < p.columns; c += threads) {
    const float v = (x_at(x, p, row, c) - mean) * scale;
    y_to(y, p, row, c, v * get<float>(w, W, long(c) * p.w_step) + get<float>(b, B, long(c) * p.b_step));
  }
}

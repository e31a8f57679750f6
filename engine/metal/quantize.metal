// quantize: x (N, K) -> codes (N, K bits / 32) uint32, scales and biases (N, K / group), by MLX's affine quantizer, all in
// float32 and bit for bit (so divisions must be correctly rounded): the edge of larger magnitude and 0 are exact.
//   quantize_sides: a simdgroup has a group: its ends, its scale and bias, also as floats for the codes
//   quantize:       a thread has a word of codes
// dequantize: the way back, of any format of codes.h; a thread has a number.
#include "common.h"

constant int X [[function_constant(0)]];           // dtypes: of the numbers, of scales and biases
constant int SIDE [[function_constant(1)]];
constant int CODES [[function_constant(2)]];       // the format
constant int SHARED [[function_constant(3)]];      // columns with one scale

struct Params { int rows, columns; };

kernel void quantize_sides(device const uchar* x [[buffer(0)]], device uchar* scales [[buffer(1)]], device uchar* biases [[buffer(2)]],
                           device float* sides [[buffer(3)]], constant Params& p [[buffer(4)]],
                           uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                           uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const long g = long(group) * simdgroups + simdgroup;
  if (g >= long(p.rows) * (p.columns / SHARED)) return;
  float low = INFINITY, high = -INFINITY;
  for (int k = lane; k < SHARED; k += 32) {
    const float v = get<float>(x, X, g * SHARED + k);
    low = min(low, v), high = max(high, v);
  }
  low = simd_min(low), high = simd_max(high);
  if (lane) return;
  const bool side = fabs(low) > fabs(high);
  const float size = max((high - low) / float((1 << CODES) - 1), 1e-7f), edge = side ? low : high;
  float scale = side ? size : -size, bias = 0.0f;
  const float zero = rint(edge / scale);
  if (zero != 0.0f) scale = edge / zero, bias = edge;
  if (CODES == 1) scale = size, bias = low;        // of one bit there is no zero to keep
  sides[2 * g] = scale, sides[2 * g + 1] = bias;
  put<float>(scales, SIDE, g, scale);
  put<float>(biases, SIDE, g, bias);
}

kernel void quantize(device const uchar* x [[buffer(0)]], device uint* w [[buffer(1)]], device const float* sides [[buffer(2)]],
                     constant Params& p [[buffer(4)]], uint2 at [[thread_position_in_grid]]) {
  const int word = at.x, begin = word * 32;        // of the row, in bits
  if (begin >= p.columns * CODES) return;
  uint codes = 0;
  for (int k = begin / CODES; k * CODES < begin + 32; k++) {
    const long i = long(at.y) * p.columns + k, side = 2 * (i / SHARED);
    const float q = rint((get<float>(x, X, i) - sides[side + 1]) / sides[side]);
    const uint code = uint(clamp(q, 0.0f, float((1 << CODES) - 1)));
    const int shift = k * CODES - begin;
    codes |= shift < 0 ? code >> -shift : code << shift;
  }
  w[long(at.y) * (p.columns * CODES / 32) + word] = codes;
}

kernel void dequantize(device const uint* w [[buffer(0)]], device const uchar* scales [[buffer(1)]],
                       device const uchar* biases [[buffer(2)]], device uchar* o [[buffer(3)]], constant Params& p [[buffer(4)]],
                       uint2 at [[thread_position_in_grid]]) {
  if (int(at.x) >= p.columns) return;
  const long row = at.y, side = row * (p.columns / SHARED) + at.x / SHARED;
  device const uint* codes = w + row * (p.columns * long(CODES & 15) / 32);
  put<float>(o, X, row * p.columns + at.x, weight_at(codes, at.x, scales, biases, side, SIDE, CODES, SHARED));
}

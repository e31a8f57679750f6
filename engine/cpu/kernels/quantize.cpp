// quantize: x (N, K) f32|f16|bf16 -> codes u32 (N, K bits / 32), scales and biases (N, K / group) of x's dtype or f32.
// dequantize: the way back, o (N, K) f32|f16|bf16 = scale q + bias, of any format of codes.h.
// Both: ints [format, group], floats [].
//
// The arithmetic is MLX's affine quantizer, all of it in f32, bit for bit: the edge of larger magnitude and 0 are exact.
//   s = max((max - min) / (2^bits - 1), 1e-7), negative if |min| <= |max|;  edge = the end of larger magnitude
//   q0 = rint(edge / s);  if q0: s = edge / q0, b = edge, else b = 0;  q = clip(rint((x - b) / s), 0, 2^bits - 1)
// Of one bit there is no zero to keep: s = max(max - min, 1e-7), b = min.
// Codes lie along K, low bits first. Groups are split evenly over the threads; each byte is read and written once.
#include "qdot.h"

LZ_NAMESPACE_BEGIN

namespace {

void put_float(const View& v, int64_t row, int64_t column, float x) {
  char* p = v.data + (row * v.strides[0] + column) * size_of(v.dtype);
  const uint16_t half = v.dtype == LZ_F16 ? f32_to_f16(x) : f32_to_bf16(x);
  if (v.dtype == LZ_F32) memcpy(p, &x, 4);
  else memcpy(p, &half, 2);
}
// 16 codes to 2 bits bytes
void pack(int bits, i32x q, char* to) {
  const u8x bytes = low_bytes(q);
  for (int half = 0; half < 16; half += 8, to += bits) {
    uint64_t z = 0;
    for (int i = 0; i < 8; i++) z |= (uint64_t)bytes[half + i] << bits * i;
    for (int i = 0; i < bits; i++) to[i] = (char)(z >> 8 * i);
  }
}
void quantize_group(const View& x, const Step& s, int64_t row, int64_t g, int bits, int group) {
  const int size = size_of(x.dtype);
  const char* from = x.data + (row * x.strides[0] + g * group) * size;
  const float most = (float)((1 << bits) - 1);
  f32x v[8], low = get_as(x.dtype, from, LANES), high = low;
  for (int i = 0; i < group / LANES; i++) {
    v[i] = get_as(x.dtype, from + i * LANES * size, LANES);
    low = minf(low, v[i]), high = maxf(high, v[i]);
  }
  const float least = -max_of(-low), largest = max_of(high);
  const bool side = __builtin_fabsf(least) > __builtin_fabsf(largest);
  const float range = (largest - least) / most, size0 = range > 1e-7f ? range : 1e-7f, edge = side ? least : largest;
  float scale = side ? size0 : -size0, bias = 0;
  const float q0 = __builtin_rintf(edge / scale);
  if (q0 != 0) scale = edge / q0, bias = edge;
  if (bits == 1) scale = size0, bias = least;
  char* to = s.out[0].data + row * s.out[0].strides[0] * 4 + g * group * bits / 8;
  for (int i = 0; i < group / LANES; i++) {
    const f32x q = minf(maxf(round_even((v[i] - bias) / scale), splat(0)), splat(most));
    pack(bits, __builtin_convertvector(q, i32x), to + i * 2 * bits);
  }
  put_float(s.out[1], row, g, scale);
  put_float(s.out[2], row, g, bias);
}

void dequantize_group(const View& o, const Step& s, int64_t row, int64_t g, int format, int group) {
  const auto at = [&](int i, int64_t column) { return s.in[i].data + (row * s.in[i].strides[0] + column) * (i ? size_of(s.in[i].dtype) : 4); };
  float scale, bias;
  row_sides(format, group, s.in[1].dtype, at(1, g), parts_of(format) == 3 ? at(2, g) : 0, 1, &scale, &bias);
  char* to = o.data + (row * o.strides[0] + g * group) * size_of(o.dtype);
  const char* codes = at(0, 0) + g * group * bits_of(format) / 8;
  over_numbers(format, group, codes, &scale, &bias, group, [&](int64_t k, f32x v) __attribute__((always_inline)) {
    if (o.dtype == LZ_F32) store((float*)to + k, v);
    else if (o.dtype == LZ_F16) store_f16((uint16_t*)to + k, v);
    else store_bf16((uint16_t*)to + k, v);
  });
}

template <bool BACK> void run(const Step& s, Team& team) {
  const View& x = BACK ? s.out[0] : s.in[0];
  const int64_t groups = x.shape[1] / s.ints[1];
  int64_t begin, end;
  team.part(x.shape[0] * groups, 64, &begin, &end);
  for (int64_t i = begin; i < end; i++)
    (BACK ? dequantize_group : quantize_group)(x, s, i / groups, i % groups, (int)s.ints[0], (int)s.ints[1]);
}

template <bool BACK> const char* check(const Step& s) {
  const int parts = s.n_int == 2 ? parts_of(s.ints[0]) : 0;
  if (parts < 2 || s.n_in != (BACK ? parts : 1) || s.n_out != (BACK ? 1 : parts))
    return "wants codes, scales and biases on one side, a matrix on the other, and 2 integers";
  const View& x = BACK ? s.out[0] : s.in[0];
  if (!BACK && parts == 2) return "bits must be 1, 2, 3, 4, 5, 6 or 8";
  if (x.ndim != 2) return "wants a matrix";
  if (x.dtype != LZ_F32 && x.dtype != LZ_F16 && x.dtype != LZ_BF16) return "wants float32, float16 or bfloat16 values";
  return check_parts(s.ints[0], s.ints[1], x.shape[1], BACK ? s.in : s.out);
}

}  // namespace

extern const Kernel quantize, dequantize;
const Kernel quantize = {"quantize", run<false>, 0, 0, check<false>}, dequantize = {"dequantize", run<true>, 0, 0, check<true>};

LZ_NAMESPACE_END

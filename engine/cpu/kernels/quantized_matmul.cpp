// quantized_matmul: o (M, N) f32 = x (M, K) f32 b, where b is the transpose of the matrix (N, K) that codes w u32, scales and,
// unless the format has none, biases stand for (codes.h), or the matrix (K, N) itself.
//   ints [format, group, transposed, fast]; floats []
//
// The plain loop is matmul's after dequantize. Here panels of 64 columns of b are expanded and packed in one go, 256 rows at a
// time, so that a second copy of the weights never exists: at most 8 MB of it. Every code is read once. fast: products of bf16
// where the machine has them, sums in f32; else products of f32.
#include "product.h"

LZ_NAMESPACE_BEGIN

namespace {

Quantized codes_of(const Step& s) {
  const View* part = s.in + 1;
  return {part[0], part[1], part[parts_of(s.ints[0]) - 1], (int)s.ints[0], (int)s.ints[1], s.ints[2] != 0};
}

void run(const Step& s, Team& team) {
  const Quantized codes = codes_of(s);
  const Product p(s.out[0], s.in[0], codes);
  if (!p.M || !p.N) return;
  tiles_begin();
  multiply(p, s.ints[3], team);
  tiles_end();
}

size_t shared(const Step& s, int) {
  const Quantized codes = codes_of(s);
  return packed_bytes(Product(s.out[0], s.in[0], codes), s.ints[3]);
}
size_t local(const Step&, int) { return Floats<float>::LOCAL; }

const char* check(const Step& s) {
  if (s.n_int != 4 || s.n_out != 1 || s.n_in != 1 + parts_of(s.ints[0])) return "wants other numbers of inputs for its 4 integers";
  const View &o = s.out[0], &x = s.in[0];
  const int64_t K = s.ints[2] ? x.shape[1] : o.shape[1], rows = s.ints[2] ? o.shape[1] : x.shape[1];
  for (int i = 0; i < s.n_out + s.n_in; i++) {
    const View& v = s.out[i];
    if (v.ndim != 2 || (v.shape[1] > 1 && v.strides[1] != 1)) return "wants matrices whose columns are neighbours";
    if (i > 1 && v.shape[0] != rows) return "codes, scales and biases must have the rows that x and o ask for";
  }
  if (x.dtype != LZ_F32 || o.dtype != LZ_F32) return "x and o must be float32";
  return check_parts(s.ints[0], s.ints[1], K, s.in + 1);
}

}  // namespace

extern const Kernel quantized_matmul;
const Kernel quantized_matmul = {"quantized_matmul", run, shared, local, check};

LZ_NAMESPACE_END

// take:           o (A, I, C) = x (A, N, C)[:, idx (I)], any dtype; or both without A. Bytes moved: 2 A I C items.
// quantized_take: o (I, K) float32 = rows idx (I) of quantized w (N, K bits / 32) u32, scales, [biases] (N, K / group).
//                 ints = [format, group], see codes.h.
// A negative index counts from the end; one out of range fails the run.
#include "../rows.h"
#include "codes.h"

LZ_NAMESPACE_BEGIN

// Calls f(i, index) for i in [begin, end), the index resolved into [0, size). All of a block are resolved first, without a
// branch each, and `ahead` is told of those that come soon.
template <class F, class Ahead>
LZ_INLINE void for_indices(const View& idx, int64_t begin, int64_t end, int64_t size, const char* kernel, Team& team,
                           Ahead ahead, F f) {
  constexpr int64_t BLOCK = 512, AHEAD = 32;
  const Load<int64_t> load = loader<int64_t>(idx.dtype);
  const int64_t stride = idx.strides[0];
  int64_t block[BLOCK];
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t n = end - at < BLOCK ? end - at : BLOCK;
    load(block, idx.data + at * stride * ITEM_SIZE[idx.dtype], stride, n);
    int64_t outside = -1;
    for (int64_t k = 0; k < n; k++) {
      const int64_t index = block[k] + (block[k] < 0 ? size : 0);
      outside = index < 0 || index >= size ? k : outside;
      block[k] = index;
    }
    if (outside >= 0) {
      const int64_t index = block[outside] < 0 ? block[outside] - size : block[outside];
      return team.fail("[%s] index %lld is out of range for size %lld", kernel, (long long)index, (long long)size);
    }
    for (int64_t k = 0; k < n && k < AHEAD; k++) ahead(block[k]);
    for (int64_t k = 0; k < n; k++) {
      if (k + AHEAD < n) ahead(block[k + AHEAD]);
      f(at + k, block[k]);
    }
  }
}

template <class T> LZ_INLINE void copy_items(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t n) {
  for (int64_t k = 0; k < n; k++) to[k * to_stride] = from[k * from_stride];
}

LZ_INLINE View with_leading_axis(View v) {
  if (v.ndim == 3) return v;
  for (int i = 2; i > 0; i--) v.shape[i] = v.shape[i - 1], v.strides[i] = v.strides[i - 1];
  v.ndim = 3, v.shape[0] = 1, v.strides[0] = 0;
  return v;
}

template <class T> static void take_items(const Step& s, Team& team) {
  const View x = with_leading_axis(s.in[0]), out = with_leading_axis(s.out[0]), &idx = s.in[1];
  const int64_t count = out.shape[1], columns = out.shape[2], item = sizeof(T);
  const bool block = x.strides[2] == 1 && out.strides[2] == 1 && columns * item >= 32;
  int64_t begin, end;
  team.part(out.shape[0] * count, 1, &begin, &end);
  for (int64_t a = begin / (count ? count : 1); a * count < end; a++) {  // rows a * count + i of the result
    const int64_t first = begin > a * count ? begin - a * count : 0;
    const int64_t last = end < (a + 1) * count ? end - a * count : count;
    const T* source = x.as<T>() + a * x.strides[0];
    T* result = out.as<T>() + a * out.strides[0];
    const auto ahead = [&](int64_t index) { __builtin_prefetch(source + index * x.strides[1]); };
    if (columns == 1) {
      for_indices(idx, first, last, x.shape[1], "take", team, ahead,
                  [&](int64_t i, int64_t index) { result[i * out.strides[1]] = source[index * x.strides[1]]; });
      continue;
    }
    for_indices(idx, first, last, x.shape[1], "take", team, ahead, [&](int64_t i, int64_t index) {
      T* to = result + i * out.strides[1];
      const T* from = source + index * x.strides[1];
      if (block) memcpy(to, from, columns * item);
      else copy_items(to, out.strides[2], from, x.strides[2], columns);
    });
  }
}

static void run_take(const Step& s, Team& team) {
  switch (ITEM_SIZE[s.out->dtype]) {
    case 1: return take_items<uint8_t>(s, team);
    case 2: return take_items<uint16_t>(s, team);
    case 4: return take_items<uint32_t>(s, team);
    default: return take_items<uint64_t>(s, team);
  }
}

static const char* check_take(const Step& s) {
  if (s.n_out != 1 || s.n_in != 2) return "wants one output, and inputs x, indices";
  if (s.in[0].ndim < 2 || s.in[0].ndim > 3 || s.in[1].ndim != 1 || s.out->ndim != s.in[0].ndim)
    return "wants x (A, N, C), indices (I) and output (A, I, C), or both without A";
  const View x = with_leading_axis(s.in[0]), out = with_leading_axis(s.out[0]), &idx = s.in[1];
  if (x.shape[0] != out.shape[0] || x.shape[2] != out.shape[2] || idx.shape[0] != out.shape[1])
    return "x (A, N, C), indices (I) and output (A, I, C) differ in A, I or C";
  if (x.dtype != out.dtype) return "x and the output must have one dtype";
  return is_integer(idx.dtype) ? nullptr : "indices must be integers";
}

static void run_quantized_take(const Step& s, Team& team) {
  const int format = (int)s.ints[0], group = (int)s.ints[1], parts = parts_of(format);
  const View &w = s.in[0], &scales = s.in[1], *biases = parts == 3 ? s.in + 2 : 0, &idx = s.in[parts], &out = s.out[0];
  const int64_t columns = out.shape[1], groups = scales.shape[1], size = ITEM_SIZE[scales.dtype];
  float *scale = reinterpret_cast<float*>(team.local), *bias = scale + groups;
  int64_t begin, end;
  team.part(out.shape[0], 1, &begin, &end);
  const auto ahead = [](int64_t) {};
  for_indices(idx, begin, end, w.shape[0], "quantized_take", team, ahead, [&](int64_t i, int64_t index) {
    float* to = out.as<float>() + i * out.strides[0];
    row_sides(format, group, scales.dtype, scales.data + index * scales.strides[0] * size,
              biases ? biases->data + index * biases->strides[0] * size : 0, groups, scale, bias);
    over_numbers(format, group, w.data + index * w.strides[0] * 4, scale, bias, columns,
                 [&](int64_t k, f32x v) __attribute__((always_inline)) { store(to + k, v); });
  });
}

static size_t local_quantized_take(const Step& s, int) { return size_t(s.in[1].shape[1]) * 2 * sizeof(float); }

static const char* check_quantized_take(const Step& s) {
  const int parts = s.n_int == 2 ? parts_of(s.ints[0]) : 0;
  if (s.n_out != 1 || parts < 2 || s.n_in != parts + 1)
    return "wants one output, inputs w, scales, [biases], indices, and ints = [format, group]";
  const View &w = s.in[0], &idx = s.in[parts], &out = s.out[0];
  for (int i = 0; i < parts; i++) {
    if (s.in[i].ndim != 2 || s.in[i].strides[1] != 1) return "wants w, scales, biases of two axes, contiguous rows";
    if (s.in[i].shape[0] != w.shape[0]) return "rows of w, scales and biases differ in number";
  }
  if (out.ndim != 2 || idx.ndim != 1 || idx.shape[0] != out.shape[0]) return "wants an output row for each of the indices";
  if (out.dtype != LZ_F32 || out.strides[1] != 1 || !is_integer(idx.dtype)) return "wants integer indices, and float32 rows";
  return check_parts(s.ints[0], s.ints[1], out.shape[1], s.in);
}

extern const Kernel take, quantized_take;
const Kernel take = {"take", run_take, nullptr, nullptr, check_take};
const Kernel quantized_take = {
    "quantized_take", run_quantized_take, nullptr, local_quantized_take, check_quantized_take};

LZ_NAMESPACE_END

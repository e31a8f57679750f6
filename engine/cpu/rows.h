// Strided views of any dtype, read and written as runs of plain C numbers. Included by kernels.
#pragma once
#include "complex.h"

LZ_NAMESPACE_BEGIN

struct bool8 { uint8_t v; };
struct f16 { uint16_t v; };
struct bf16 { uint16_t v; };
#define LZ_DTYPES(X)                                                                        \
  X(bool8) X(uint8_t) X(uint16_t) X(uint32_t) X(uint64_t) X(int8_t) X(int16_t) X(int32_t) \
  X(int64_t) X(f16) X(bf16) X(float) X(double)
constexpr int ITEM_SIZE[] = {1, 1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8, 8};  // by dtype
LZ_INLINE bool is_float(int dtype) { return dtype == LZ_F32 || dtype == LZ_F16 || dtype == LZ_BF16; }
LZ_INLINE bool is_integer(int dtype) { return dtype >= LZ_U8 && dtype <= LZ_I64; }

template <class T> LZ_INLINE T number(T x) { return x; }          // a stored item as a C number
LZ_INLINE uint8_t number(bool8 x) { return x.v != 0; }
LZ_INLINE float number(f16 x) { return f16_to_f32(x.v); }
LZ_INLINE float number(bf16 x) { return bf16_to_f32(x.v); }

template <class D> struct Item {                                  // a C number as a stored item, wrapped around
  template <class T> LZ_INLINE D of(T x) { return sizeof(D) < 4 ? (D)(int32_t)x : (D)x; }
};
template <> struct Item<uint32_t> { template <class T> LZ_INLINE uint32_t of(T x) { return (uint32_t)(int64_t)x; } };
template <> struct Item<bool8> { template <class T> LZ_INLINE bool8 of(T x) { return {x != 0}; } };
template <> struct Item<f16> { template <class T> LZ_INLINE f16 of(T x) { return {f32_to_f16((float)x)}; } };
template <> struct Item<bf16> { template <class T> LZ_INLINE bf16 of(T x) { return {f32_to_bf16((float)x)}; } };

template <class A, class B> struct Same { static constexpr bool value = false; };
template <class A> struct Same<A, A> { static constexpr bool value = true; };

// to[0..n) = from[0], from[stride], … as T
template <class T, class S> static void load_run(T* to, const char* from, int64_t stride, int64_t n) {
  const S* s = reinterpret_cast<const S*>(from);
  int64_t k = 0;
  if (stride == 1) {
    if constexpr (Same<T, float>::value && Same<S, f16>::value)
      for (; k + LANES <= n; k += LANES) store(to + k, load_f16((const uint16_t*)s + k));
    if constexpr (Same<T, float>::value && Same<S, bf16>::value)
      for (; k + LANES <= n; k += LANES) store(to + k, load_bf16((const uint16_t*)s + k));
    for (; k < n; k++) to[k] = (T)number(s[k]);
  } else if (stride == 2) {
    if constexpr (Same<T, float>::value && Same<S, float>::value)
      for (; k + LANES < n; k += LANES) {  // the last item read is not the last but one past it
        const i32x even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
        store(to + k, __builtin_shuffle(loadf(s + 2 * k), loadf(s + 2 * k + LANES), even));
      }
    for (; k < n; k++) to[k] = (T)number(s[2 * k]);
  } else if (stride == 0) {
    for (const T x = n ? (T)number(*s) : T(); k < n; k++) to[k] = x;
  } else {
    for (; k < n; k++) to[k] = (T)number(s[k * stride]);
  }
}
template <class T, class D> static void store_run(char* to, const T* from, int64_t stride, int64_t n) {
  D* d = reinterpret_cast<D*>(to);
  int64_t k = 0;
  if (stride == 1) {
    if constexpr (Same<T, float>::value && Same<D, f16>::value)
      for (; k + LANES <= n; k += LANES) store_f16((uint16_t*)d + k, loadf(from + k));
    if constexpr (Same<T, float>::value && Same<D, bf16>::value)
      for (; k + LANES <= n; k += LANES) store_bf16((uint16_t*)d + k, loadf(from + k));
    for (; k < n; k++) d[k] = Item<D>::of(from[k]);
  } else {
    for (; k < n; k++) d[k * stride] = Item<D>::of(from[k]);
  }
}
template <class T> using Load = void (*)(T*, const char*, int64_t, int64_t);
template <class T> using Store = void (*)(char*, const T*, int64_t, int64_t);
template <class T> LZ_INLINE Load<T> loader(int dtype) {
#define LZ_ROW(S) load_run<T, S>,
  static constexpr Load<T> table[] = {LZ_DTYPES(LZ_ROW) LZ_ROW(c64)};
#undef LZ_ROW
  return table[dtype];
}
template <class T> LZ_INLINE Store<T> storer(int dtype) {
#define LZ_ROW(D) store_run<T, D>,
  static constexpr Store<T> table[] = {LZ_DTYPES(LZ_ROW) LZ_ROW(c64)};
#undef LZ_ROW
  return table[dtype];
}

// The axes that several views of one shape share, neighbours merged where every view allows it; at least one axis.
struct Axes {
  int n;
  int64_t size, shape[LZ_MAX_DIMS];
};
LZ_INLINE Axes merge_axes(const View* views, int n_views, int64_t (*strides)[LZ_MAX_DIMS]) {
  Axes axes = {0, 1, {1}};
  for (int i = 0; i < views->ndim; i++) {
    const int64_t size = views->shape[i];
    axes.size *= size;
    if (size == 1) continue;
    bool join = axes.n > 0;
    for (int v = 0; v < n_views && join; v++) join = strides[v][axes.n - 1] == views[v].strides[i] * size;
    if (!join) axes.shape[axes.n++] = 1;
    axes.shape[axes.n - 1] *= size;
    for (int v = 0; v < n_views; v++) strides[v][axes.n - 1] = views[v].strides[i];
  }
  if (axes.n == 0) {
    axes.n = 1;
    for (int v = 0; v < n_views; v++) strides[v][0] = 1;
  }
  return axes;
}
LZ_INLINE void seek(const Axes& axes, int64_t flat, int64_t* index) {
  for (int i = axes.n - 1; i > 0; i--) index[i] = flat % axes.shape[i], flat /= axes.shape[i];
  index[0] = flat;
}
// Calls f(offset in elements, length) for the runs along the last axis that make up n items from `index` on.
template <class F>
LZ_INLINE void for_runs(const Axes& axes, const int64_t* strides, const int64_t* start, int64_t n, F f) {
  const int last = axes.n - 1;
  int64_t index[LZ_MAX_DIMS], offset = 0;
  for (int i = 0; i < axes.n; i++) index[i] = start[i], offset += start[i] * strides[i];
  while (n > 0) {
    const int64_t length = n < axes.shape[last] - index[last] ? n : axes.shape[last] - index[last];
    f(offset, length);
    n -= length;
    offset += length * strides[last], index[last] += length;
    for (int i = last; i > 0 && index[i] == axes.shape[i]; i--) {
      offset += strides[i - 1] - index[i] * strides[i];
      index[i] = 0, index[i - 1]++;
    }
  }
}

LZ_NAMESPACE_END

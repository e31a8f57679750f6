// scatter:    o (A, N, C) op= updates (A, I, C) at idx (A, I, C), in o's own memory: o[a][idx[a][i][c]][c] op= u[a][i][c]
//             for i = 0, 1, … in this order. ints = [op]: 0 set 1 add 2 multiply 3 maximum 4 minimum.
// take_along: o (A, I, C) = x (A, N, C)[a][idx[a][i][c]][c].
// All may lack A; any strides. An index whose stride over C is 0 moves whole rows. Bytes moved: A I C items read and as
// many written, and the indices once a thread. A negative index counts from the end; one out of range fails the run.
//
// scatter gives every thread a box of o that only it writes, so results do not depend on the number of threads: a part
// of A, else of C, else of N, for which the thread looks at all indices and leaves those of others alone.
#include "../rows.h"

LZ_NAMESPACE_BEGIN

namespace {

constexpr int64_t BLOCK = 256;  // indices converted at once

struct Span { int64_t begin, end; };

View with_three_axes(View v) {
  if (v.ndim == 3) return v;
  for (int i = 2; i > 0; i--) v.shape[i] = v.shape[i - 1], v.strides[i] = v.strides[i - 1];
  v.ndim = 3, v.shape[0] = 1, v.strides[0] = 0;
  return v;
}

// Calls f(k, row) for the n indices at `from`, each resolved into [0, size).
template <class F>
LZ_INLINE void resolve(const View& idx, const char* from, int64_t stride, int64_t n, int64_t size, const char* kernel,
                       Team& team, F f) {
  int64_t block[BLOCK];
  loader<int64_t>(idx.dtype)(block, from, stride, n);
  for (int64_t k = 0; k < n; k++) {
    const int64_t row = block[k] < 0 ? block[k] + size : block[k];
    if (row < 0 || row >= size)
      return team.fail("[%s] index %lld is out of range for size %lld", kernel, (long long)block[k], (long long)size);
    f(k, row);
  }
}

// Calls f(a, i, c, n, row): the items [c, c + n) of (a, i) belong to `row`, for the (a, i, c) of the box.
template <class F>
LZ_INLINE void for_rows(const View& idx, Span as, Span is, Span cs, int64_t size, const char* kernel, Team& team, F f) {
  const int64_t item = ITEM_SIZE[idx.dtype], *strides = idx.strides, columns = cs.end - cs.begin;
  const bool whole = columns == 1 || strides[2] == 0;
  const Span outer = whole ? Span{0, 1} : is, inner = whole ? is : cs;
  for (int64_t a = as.begin; a < as.end; a++)
    for (int64_t o = outer.begin; o < outer.end; o++)
      for (int64_t at = inner.begin, n; at < inner.end; at += n) {
        n = inner.end - at < BLOCK ? inner.end - at : BLOCK;
        const int64_t i = whole ? at : o, c = whole ? cs.begin : at;
        const char* from = idx.data + (a * strides[0] + i * strides[1] + c * strides[2]) * item;
        resolve(idx, from, strides[whole ? 1 : 2], n, size, kernel, team, [&](int64_t k, int64_t row) {
          if (whole) f(a, i + k, c, columns, row);
          else f(a, i, c + k, 1, row);
        });
      }
}

template <class T> struct Combine {  // to[k] op= from[k], as C numbers
  template <class F> LZ_INLINE void each(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t n, F f) {
    if (to_stride == 1 && from_stride == 1)
      for (int64_t k = 0; k < n; k++) to[k] = f(to[k], from[k]);
    else
      for (int64_t k = 0; k < n; k++) to[k * to_stride] = f(to[k * to_stride], from[k * from_stride]);
  }
  static void run(int op, T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t n) {
#define LZ_EACH(value) each(to, to_stride, from, from_stride, n, [](T p, T q) { \
      const auto a = number(p), b = number(q); \
      return Item<T>::of(value); \
    })
    switch (op) {
      case 0: return each(to, to_stride, from, from_stride, n, [](T, T q) { return q; });
      case 1: return LZ_EACH(a + b);
      case 2: return LZ_EACH(a * b);
      case 3: return LZ_EACH(a > b || a != a ? a : b);
      default: return LZ_EACH(a < b || a != a ? a : b);
    }
#undef LZ_EACH
  }
};
template <> struct Combine<c64> {
  static void run(int op, c64* to, int64_t to_stride, const c64* from, int64_t from_stride, int64_t n) {
    for (int64_t k = 0; k < n; k++) {
      c64 &a = to[k * to_stride], b = from[k * from_stride];
      a = op == 0 ? b : op == 1 ? a + b : a * b;
    }
  }
};

template <class T> void scatter_items(const Step& s, Team& team) {
  const View o = with_three_axes(s.out[0]), idx = with_three_axes(s.in[0]), u = with_three_axes(s.in[1]);
  const int64_t A = o.shape[0], N = o.shape[1], C = o.shape[2], grain = 64 / (int64_t)sizeof(T);
  Span as = {0, A}, ns = {0, N}, cs = {0, C};
  if (A >= 4 * team.size) team.part(A, 1, &as.begin, &as.end);
  else if (C >= 4 * grain * team.size) team.part(C, grain, &cs.begin, &cs.end);
  else team.part(N, grain, &ns.begin, &ns.end);
  for_rows(idx, as, {0, u.shape[1]}, cs, N, "scatter", team, [&](int64_t a, int64_t i, int64_t c, int64_t n, int64_t row) {
    if (row < ns.begin || row >= ns.end) return;
    T* to = o.as<T>() + a * o.strides[0] + row * o.strides[1] + c * o.strides[2];
    const T* from = u.as<T>() + a * u.strides[0] + i * u.strides[1] + c * u.strides[2];
    Combine<T>::run((int)s.ints[0], to, o.strides[2], from, u.strides[2], n);
  });
}

void run_scatter(const Step& s, Team& team) {
#define LZ_ROW(T) scatter_items<T>,
  static constexpr void (*table[])(const Step&, Team&) = {LZ_DTYPES(LZ_ROW) scatter_items<c64>};
#undef LZ_ROW
  table[s.out->dtype](s, team);
}

template <class T> void take_items(const Step& s, Team& team) {
  const View o = with_three_axes(s.out[0]), x = with_three_axes(s.in[0]), idx = with_three_axes(s.in[1]);
  const int64_t A = o.shape[0], I = o.shape[1], C = o.shape[2];
  Span as = {0, A}, is = {0, I}, cs = {0, C};
  if (A >= 4 * team.size) team.part(A, 1, &as.begin, &as.end);
  else if (I >= 4 * team.size) team.part(I, 1, &is.begin, &is.end);
  else team.part(C, 1, &cs.begin, &cs.end);
  for_rows(idx, as, is, cs, x.shape[1], "take_along_axis", team, [&](int64_t a, int64_t i, int64_t c, int64_t n, int64_t row) {
    T* to = o.as<T>() + a * o.strides[0] + i * o.strides[1] + c * o.strides[2];
    const T* from = x.as<T>() + a * x.strides[0] + row * x.strides[1] + c * x.strides[2];
    for (int64_t k = 0; k < n; k++) to[k * o.strides[2]] = from[k * x.strides[2]];
  });
}

void run_take_along(const Step& s, Team& team) {
  switch (ITEM_SIZE[s.out->dtype]) {
    case 1: return take_items<uint8_t>(s, team);
    case 2: return take_items<uint16_t>(s, team);
    case 4: return take_items<uint32_t>(s, team);
    default: return take_items<uint64_t>(s, team);
  }
}

// `whole` (A, N, C) and `part` (A, I, C), idx of the part's shape
const char* check_shapes(const View& whole, const View& part, const View& idx) {
  if (whole.ndim < 2 || whole.ndim > 3 || part.ndim != whole.ndim || idx.ndim != whole.ndim)
    return "wants arrays of three axes, or of two without A";
  const View w = with_three_axes(whole), p = with_three_axes(part), i = with_three_axes(idx);
  if (w.dtype != p.dtype) return "both arrays must have one dtype";
  if (w.shape[0] != p.shape[0] || w.shape[2] != p.shape[2]) return "the arrays differ in A or C";
  for (int k = 0; k < 3; k++)
    if (p.shape[k] != i.shape[k]) return "the indices must have the shape of what is read or written";
  return is_integer(idx.dtype) ? nullptr : "indices must be integers";
}
const char* check_scatter(const Step& s) {
  if (s.n_out != 1 || s.n_in != 2 || s.n_int != 1) return "wants one output, inputs indices, updates, and ints = [op]";
  if (s.ints[0] < 0 || s.ints[0] > (s.out->dtype == LZ_C64 ? 2 : 4)) return "op must be 0 to 4, of complex64 0 to 2";
  return check_shapes(s.out[0], s.in[1], s.in[0]);
}
const char* check_take_along(const Step& s) {
  return s.n_out != 1 || s.n_in != 2 ? "wants one output, and inputs x, indices" : check_shapes(s.in[0], s.out[0], s.in[1]);
}

}  // namespace

extern const Kernel scatter, take_along;
const Kernel scatter = {"scatter", run_scatter, nullptr, nullptr, check_scatter};
const Kernel take_along = {"take_along", run_take_along, nullptr, nullptr, check_take_along};

LZ_NAMESPACE_END

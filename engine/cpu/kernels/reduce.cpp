// reduce: o[0]: the kept axes; i[0]: the kept axes, then n_red reduced ones, any strides. ints = [op, n_red]
// op: 0 sum 1 prod 2 max 3 min 4 any 5 all 6 argmax 7 argmin (the first index wins, NaN before all; n_red = 1).
// Bytes moved: the input once. float16/bfloat16/float32 are folded as floats over at most 1024 items and these parts as
// doubles (an error below that of pairwise summation), integers as 64-bit integers.
//
// Two loops: along the reduced axes, for one result at a time; and for 1024 results at once, where neighbours in memory
// belong to different results (a sum over the rows of a matrix) or few items belong to each. When results are few, the
// reduced range is cut into chunks, whose parts meet in the shared workspace. Chunks depend on shapes only, so a result
// does not depend on the number of threads.
#include "../functions.h"
#include "../rows.h"

LZ_NAMESPACE_BEGIN

constexpr int64_t RUN = 1024, WIDTH = 1024, CHUNK = 65536;  // items folded at once, results at once, items of a chunk

template <class T> struct Limits { static constexpr T low = T(1) << 63, high = ~low; };
template <> struct Limits<uint64_t> { static constexpr uint64_t low = 0, high = ~low; };
template <> struct Limits<float> { static constexpr float high = __builtin_inff(), low = -high; };
template <> struct Limits<double> { static constexpr double high = __builtin_inf(), low = -high; };

#define LZ_FOLD(name, identity, value)                               \
  struct name {                                                      \
    template <class T> static constexpr T start() { return identity; } \
    template <class V> LZ_INLINE V of(V a, V b) { return V(value); } \
  };
LZ_FOLD(Sum, T(0), a + b)
LZ_FOLD(Prod, T(1), a * b)
LZ_FOLD(Max, Limits<T>::low, maximum(a, b))
LZ_FOLD(Min, Limits<T>::high, minimum(a, b))
LZ_FOLD(Any, T(0), one_if((a != V{}) | (b != V{})))
LZ_FOLD(All, T(1), one_if((a != V{}) & (b != V{})))

template <class T> struct Wide { typedef T type; };   // what parts are put together in
template <> struct Wide<float> { typedef double type; };

template <class Op, class T> LZ_INLINE T fold(const T* x, int64_t n) {
  T total = Op::template start<T>();
  int64_t k = 0;
  if constexpr (Same<T, float>::value) {
    f32x part[4] = {splat(total), splat(total), splat(total), splat(total)};
    for (; k + 4 * LANES <= n; k += 4 * LANES)
      for (int j = 0; j < 4; j++) part[j] = Op::of(part[j], loadf(x + k + j * LANES));
    float lanes[LANES];
    store(lanes, Op::of(Op::of(part[0], part[1]), Op::of(part[2], part[3])));
    for (int half = LANES / 2; half; half /= 2)
      for (int j = 0; j < half; j++) lanes[j] = Op::of(lanes[j], lanes[j + half]);
    total = lanes[0];
  }
  for (const T *rest = x + k, *end = x + n; rest < end; rest++) total = Op::of(total, *rest);
  return total;
}

// A result so far: a value …
template <class Op, class T> struct Value {
  typedef typename Wide<T>::type W;
  W result = Op::template start<W>();
  void add(const T* items, int64_t n, int64_t) { result = Op::of(result, W(fold<Op>(items, n))); }
  void add(const Value& next) { result = Op::of(result, next.result); }
};
// … or where the best item is. A run of items is searched only when its fold beats the best so far.
template <class Op, class T> struct Place {
  T best = Op::template start<T>();
  int64_t result = 0;
  bool beaten_by(T x) const { return best == best && Op::of(best, x) != best; }  // strictly, NaN beating everything
  void add(const T* items, int64_t n, int64_t at) {
    const T top = fold<Op>(items, n);
    if (!beaten_by(top)) return;
    for (result = at; *items == *items && *items != top; items++) result++;
    best = top;
  }
  void add(const Place& next) {
    if (beaten_by(next.best)) *this = next;
  }
};

struct Shape {                     // a step, its axes merged
  Axes kept, reduced;
  int64_t kept_strides[2][LZ_MAX_DIMS], reduced_strides[1][LZ_MAX_DIMS];  // kept: of the output, of the input
  bool side_by_side;
  int64_t tile, tiles, chunk, chunks;  // results per work item and reduced items per work item
};
static Shape shape_of(const Step& s) {
  Shape h;
  View views[2] = {s.out[0], s.in[0]}, reduced = s.in[0];
  const int kept = views[0].ndim;
  views[1].ndim = kept;
  reduced.ndim -= kept;
  memmove(reduced.shape, reduced.shape + kept, reduced.ndim * sizeof *reduced.shape);
  memmove(reduced.strides, reduced.strides + kept, reduced.ndim * sizeof *reduced.strides);
  h.kept = merge_axes(views, 2, h.kept_strides);
  h.reduced = merge_axes(&reduced, 1, h.reduced_strides);
  const int64_t last = h.kept.n - 1, beside = h.kept_strides[1][last], along = h.reduced_strides[0][h.reduced.n - 1];
  h.side_by_side = s.ints[0] < 6 && h.kept.shape[last] >= LANES &&
                   (h.reduced.size < 2 * LANES || (beside == 1 && along != 1));
  h.tile = h.side_by_side ? WIDTH : 1;
  h.tiles = (h.kept.size + h.tile - 1) / h.tile;
  const int64_t wanted = h.tiles < 32 ? h.reduced.size * (h.side_by_side ? h.kept.size / h.tiles : 1) / CHUNK : 1;
  h.chunks = wanted < 1 ? 1 : wanted;
  h.chunk = (h.reduced.size + h.chunks - 1) / h.chunks;
  return h;
}
LZ_INLINE int64_t offset_of(const Axes& axes, const int64_t* strides, int64_t flat) {
  int64_t index[LZ_MAX_DIMS], offset = 0;
  seek(axes, flat, index);
  for (int i = 0; i < axes.n; i++) offset += index[i] * strides[i];
  return offset;
}

// part.add(items, n, first) for runs of at most RUN of the reduced items [begin, end) of one result; short runs of
// memory are gathered in the buffer until they fill it.
template <class T, class Part>
static void fold_along(const View& x, const Shape& h, int64_t result, int64_t begin, int64_t end, T* buffer,
                       Part* part) {
  const int64_t item = ITEM_SIZE[x.dtype], stride = h.reduced_strides[0][h.reduced.n - 1];
  const bool direct = stride == 1 && Same<T, float>::value && x.dtype == LZ_F32;
  const char* base = x.data + offset_of(h.kept, h.kept_strides[1], result) * item;
  const Load<T> load = loader<T>(x.dtype);
  int64_t index[LZ_MAX_DIMS], filled = 0, at = begin;
  seek(h.reduced, begin, index);
  for_runs(h.reduced, h.reduced_strides[0], index, end - begin, [&](int64_t offset, int64_t length) {
    for (int64_t n, k = 0; k < length; k += n) {
      n = length - k < RUN - filled ? length - k : RUN - filled;
      const char* from = base + (offset + k * stride) * item;
      if (direct && !filled && n >= 4 * LANES) {
        part->add(reinterpret_cast<const T*>(from), n, at);
        at += n;
        continue;
      }
      load(buffer + filled, from, stride, n);
      if ((filled += n) < RUN) continue;
      part->add(buffer, RUN, at);
      at += RUN, filled = 0;
    }
  });
  if (filled) part->add(buffer, filled, at);
}

// The same for n neighbouring results at once: a fold of at most 64 of their rows in floats, then of these in doubles.
template <class Op, class T>
static void fold_beside(const View& x, const Shape& h, int64_t first, int64_t n, int64_t begin, int64_t end, T* buffer,
                        Value<Op, T>* results) {
  T *row = buffer, *part = buffer + WIDTH;
  const int64_t item = ITEM_SIZE[x.dtype], last = h.kept.n - 1, stride = h.kept_strides[1][last];
  const Load<T> load = loader<T>(x.dtype);
  int64_t index[LZ_MAX_DIMS];
  seek(h.kept, first, index);
  const bool one_run = stride == 1 && index[last] + n <= h.kept.shape[last];
  const bool direct = one_run && Same<T, float>::value && x.dtype == LZ_F32 && n % LANES == 0;
  const int64_t start = offset_of(h.kept, h.kept_strides[1], first);
  for (int64_t r = begin; r < end;) {
    for (int64_t k = 0; k < n; k++) part[k] = Op::template start<T>();
    for (const int64_t stop = end - r < 64 ? end : r + 64; r < stop; r++) {
      const char* from = x.data + offset_of(h.reduced, h.reduced_strides[0], r) * item;
      const T* items = direct ? reinterpret_cast<const T*>(from + start * item) : row;
      T* to = row;
      if (!direct) for_runs(h.kept, h.kept_strides[1], index, n, [&](int64_t offset, int64_t length) {
        load(to, from + offset * item, stride, length);
        to += length;
      });
      if constexpr (Same<T, float>::value)
        for (int64_t k = 0; k < n; k += LANES) store(part + k, Op::of(loadf(part + k), loadf(items + k)));
      else
        for (int64_t k = 0; k < n; k++) part[k] = Op::of(part[k], items[k]);
    }
    for (int64_t k = 0; k < n; k++) results[k].add({part[k]});
  }
}
template <class Op, class T>  // places are never side by side
static void fold_beside(const View&, const Shape&, int64_t, int64_t, int64_t, int64_t, T*, Place<Op, T>*) {}

template <class Part, class T> static void run_as(const Step& s, Team& team) {
  const View &x = s.in[0], &out = s.out[0];
  const Shape h = shape_of(s);
  Part *parts = reinterpret_cast<Part*>(team.shared), *results = reinterpret_cast<Part*>(team.local);
  T* buffer = reinterpret_cast<T*>(results + WIDTH);
  const auto store = storer<decltype(Part().result)>(out.dtype);
  auto write = [&](int64_t result, const Part& part) {
    store(out.data + offset_of(h.kept, h.kept_strides[0], result) * ITEM_SIZE[out.dtype], &part.result, 1, 1);
  };
  int64_t begin, end;
  team.part(h.tiles * h.chunks, 1, &begin, &end);
  for (int64_t work = begin; work < end; work++) {
    const int64_t chunk = work % h.chunks, first = work / h.chunks * h.tile;
    const int64_t n = h.kept.size - first < h.tile ? h.kept.size - first : h.tile;
    const int64_t from = chunk * h.chunk, to = from + h.chunk < h.reduced.size ? from + h.chunk : h.reduced.size;
    for (int64_t k = 0; k < n; k++) results[k] = Part();
    if (h.side_by_side) fold_beside(x, h, first, n, from, to, buffer, results);
    else fold_along(x, h, first, from, to, buffer, results);
    for (int64_t k = 0; k < n; k++) {
      if (h.chunks == 1) write(first + k, results[k]);
      else parts[(first + k) * h.chunks + chunk] = results[k];
    }
  }
  if (h.chunks == 1) return;
  team.barrier();
  team.part(h.kept.size, 1, &begin, &end);
  for (int64_t r = begin; r < end; r++) {
    Part total;
    for (int64_t c = 0; c < h.chunks; c++) total.add(parts[r * h.chunks + c]);
    write(r, total);
  }
}

static void run(const Step& s, Team& team) {
#define LZ_ROW(T)                                                                                            \
  {run_as<Value<Sum, T>, T>, run_as<Value<Prod, T>, T>, run_as<Value<Max, T>, T>, run_as<Value<Min, T>, T>, \
   run_as<Value<Any, T>, T>, run_as<Value<All, T>, T>, run_as<Place<Max, T>, T>, run_as<Place<Min, T>, T>}
  static constexpr void (*table[4][8])(const Step&, Team&) = {
      LZ_ROW(float), LZ_ROW(double), LZ_ROW(int64_t), LZ_ROW(uint64_t)};
#undef LZ_ROW
  const int dtype = s.in[0].dtype;
  table[is_float(dtype) ? 0 : dtype == LZ_F64 ? 1 : dtype == LZ_U64 ? 3 : 2][s.ints[0]](s, team);
}

constexpr size_t PART = sizeof(Place<Max, int64_t>);  // the largest part
static size_t shared(const Step& s, int) {
  const Shape h = shape_of(s);
  return h.chunks == 1 ? 0 : size_t(h.kept.size * h.chunks) * PART;
}
static size_t local(const Step&, int) { return WIDTH * PART + 2 * WIDTH * sizeof(double); }

static const char* check(const Step& s) {
  if (s.n_out != 1 || s.n_in != 1 || s.n_int != 2) return "wants one output, one input, and ints = [op, n_red]";
  const View &x = s.in[0], &out = s.out[0];
  if (s.ints[0] < 0 || s.ints[0] > 7) return "op must be 0 to 7";
  if (x.dtype == LZ_C64 || out.dtype == LZ_C64) return "complex64 has no reduction";
  if (s.ints[1] < 1 || out.ndim + s.ints[1] != x.ndim) return "the input must have the output's axes and n_red more";
  for (int i = 0; i < out.ndim; i++)
    if (x.shape[i] != out.shape[i]) return "the input's kept axes differ from the output's shape";
  if (s.ints[0] < 6) return nullptr;
  if (s.ints[1] != 1 || !is_integer(out.dtype)) return "argmax and argmin want n_red = 1 and an integer output";
  return x.shape[x.ndim - 1] ? nullptr : "argmax and argmin of no items have no answer";
}

extern const Kernel reduce;
const Kernel reduce = {"reduce", run, shared, local, check};

LZ_NAMESPACE_END

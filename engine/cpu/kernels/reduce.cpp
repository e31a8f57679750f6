// reduce: o[0]: the kept axes; i[0]: the kept axes, then n_red reduced ones, any strides. ints = [op, n_red]
// op: 0 sum 1 prod 2 max 3 min 4 any 5 all 6 argmax 7 argmin (the first index wins, NaN before all; n_red = 1).
// Bytes moved: the input once. float16/bfloat16/float32 are folded as floats over at most 1024 items and these parts as
// doubles (an error below that of pairwise summation), integers as 64-bit integers.
//
// Three loops: along the reduced axes, for one result at a time; for sixteen short rows at once; and for up to 1024
// results at once, where neighbours in memory belong to different results (a sum over the rows of a matrix). When results
// are few, the reduced range is cut into chunks, whose parts meet in the shared workspace. Chunks depend on shapes only,
// so a result does not depend on the number of threads. Only the leaves (Ops) are compiled for each operation.
#include "../functions.h"
#include "../rows.h"

LZ_NAMESPACE_BEGIN

constexpr int64_t RUN = 1024, WIDTH = 1024, CHUNK = 65536;  // items folded at once, results at once, items of a chunk
constexpr int64_t FEW = 64, COPIED = 4;                     // rows folded in floats; rows brought together at once

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
template <class T> struct Own { static constexpr int dtype = LZ_I64; };  // whose items are used where they are
template <> struct Own<uint64_t> { static constexpr int dtype = LZ_U64; };
template <> struct Own<float> { static constexpr int dtype = LZ_F32; };
template <> struct Own<double> { static constexpr int dtype = LZ_F64; };

// ---- the leaves ----
template <class Op> LZ_INLINE f32x fold_lanes(const float* x, int64_t n) {
  const float start = Op::template start<float>();
  f32x part[4] = {splat(start), splat(start), splat(start), splat(start)};
  int64_t k = 0;
  for (; k + 4 * LANES <= n; k += 4 * LANES)
    for (int j = 0; j < 4; j++) part[j] = Op::of(part[j], loadf(x + k + j * LANES));
  for (; k + LANES <= n; k += LANES) part[0] = Op::of(part[0], loadf(x + k));
  if (k < n) part[1] = Op::of(part[1], load_some(x + k, n - k, start));
  return Op::of(Op::of(part[0], part[1]), Op::of(part[2], part[3]));
}
template <class Op> static void rows_of(const float* x, int64_t stride, int64_t n, int64_t count, float* results) {
  f32x v[LANES];
  for (int r = 0; r < LANES; r++) v[r] = r < count ? fold_lanes<Op>(x + r * stride, n) : f32x{};
  store(results, across(v, [](auto a, auto b) { return Op::of(a, b); }));
}
template <class Op, class T> static T fold_of(const T* x, int64_t n) {
  T part[8];
  int64_t k = 0;
  for (T& p : part) p = Op::template start<T>();
  if constexpr (Same<T, float>::value) {
    float lanes[LANES];
    store(lanes, fold_lanes<Op>(x, n));
    for (int j = 0; j < 8; j++) part[j] = Op::of(lanes[j], lanes[j + 8]);
    k = n;
  }
  for (; k + 8 <= n; k += 8)
    for (int j = 0; j < 8; j++) part[j] = Op::of(part[j], x[k + j]);
  for (; k < n; k++) part[0] = Op::of(part[0], x[k]);
  for (int half = 4; half; half /= 2)
    for (int j = 0; j < half; j++) part[j] = Op::of(part[j], part[j + half]);
  return part[0];
}
// part[k] = the fold of part[k], x[k], x[stride + k] … of `rows` rows. Floats run over the end of n, into whole vectors,
// but for the last row's.
template <class Op, class T> static void beside_of(T* part, const T* x, int64_t stride, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows;) {
    const T* row = x + r * stride;
    int64_t k = 0;
    if constexpr (Same<T, float>::value) {
      const int64_t at_once = rows - r < 4 ? 1 : 4;
      for (; k + LANES <= n; k += LANES) {
        f32x v = Op::of(loadf(part + k), loadf(row + k));
        if (at_once == 4) v = Op::of(Op::of(v, loadf(row + stride + k)), Op::of(loadf(row + 2 * stride + k), loadf(row + 3 * stride + k)));
        store(part + k, v);
      }
      for (int64_t i = 0; i < at_once && k < n; i++)
        store(part + k, Op::of(loadf(part + k), load_some(row + i * stride + k, n - k, Op::template start<float>())));
      r += at_once;
    } else {
      for (; k < n; k++) part[k] = Op::of(part[k], row[k]);
      r++;
    }
  }
}
template <class Op, class T> static void join_of(typename Wide<T>::type* results, const T* part, int64_t n) {
  typedef typename Wide<T>::type W;
  for (int64_t k = 0; k < n; k++) results[k] = Op::of(results[k], W(part[k]));
}
// strictly better, NaN beating everything
template <class Op, class W> static bool beaten_of(W best, W x) { return best == best && Op::of(best, x) != best; }
// best[k] and where it is, after `rows` rows more, the first of which is number `at`
template <class Op, class T> static void places_of(T* best, int32_t* places, const T* x, int64_t stride, int64_t rows, int64_t n, int32_t at) {
  for (int64_t r = 0; r < rows; r++, at++, x += stride) {
    int64_t k = 0;
    if constexpr (Same<T, float>::value)
      for (; k + LANES <= n; k += LANES) {
        const f32x b = loadf(best + k), v = loadf(x + k), next = Op::of(b, v);
        const i32x beaten = (b == b) & (next != b), p = load<i32x>(places + k);
        store(best + k, choose(beaten, next, b));
        store(places + k, beaten ? i32x{} + at : p);
      }
    for (; k < n; k++)
      if (beaten_of<Op>(best[k], x[k])) best[k] = x[k], places[k] = at;
  }
}
template <class T> static int64_t find(const T* x, int64_t n, T top) {  // the first that is `top`, or NaN
  int64_t k = 0;
  if constexpr (Same<T, float>::value)
    for (; k < n; k += LANES) {
      const f32x v = n - k < LANES ? load_some(x + k, n - k, top) : loadf(x + k);
      const i32x found = (v == splat(top)) | (v != v);
#if defined(__AVX512F__)
      if (const unsigned where = _mm512_test_epi32_mask((__m512i)found, (__m512i)found)) return k + __builtin_ctz(where);
#else
      int64_t any[8];
      store(any, found);
      if (any[0] | any[1] | any[2] | any[3] | any[4] | any[5] | any[6] | any[7]) break;
#endif
    }
  while (k < n && x[k] == x[k] && x[k] != top) k++;
  return k;
}

// What the loops know of an operation.
template <class T> struct Ops {
  typedef typename Wide<T>::type W;
  T start;
  T (*fold)(const T*, int64_t);
  void (*rows)(const float*, int64_t, int64_t, int64_t, float*);
  void (*beside)(T*, const T*, int64_t, int64_t, int64_t);
  void (*join)(W*, const T*, int64_t);
  void (*join_wide)(W*, const W*, int64_t);
  bool (*beaten)(W, W);
  void (*places)(T*, int32_t*, const T*, int64_t, int64_t, int64_t, int32_t);
};
template <class Op, class T, bool PLACE> static constexpr Ops<T> ops_of() {
  typedef typename Wide<T>::type W;
  Ops<T> ops = {Op::template start<T>(), fold_of<Op, T>, rows_of<Op>, beside_of<Op, T>, join_of<Op, T>, join_of<Op, W>, nullptr, nullptr};
  if constexpr (PLACE) ops.beaten = beaten_of<Op, W>, ops.places = places_of<Op, T>;
  return ops;
}

// ---- a step, its axes merged ----
struct Shape {
  Axes kept, reduced;
  int64_t kept_strides[2][LZ_MAX_DIMS], reduced_strides[1][LZ_MAX_DIMS];  // kept: of the output, of the input
  enum { ALONG, ROWS, BESIDE } how;
  int64_t beside, along;               // strides of the last kept and of the last reduced axis
  int64_t tile, blocks, tiles;         // results of a work item, work items along the last kept axis, and in all
  int64_t chunk, chunks;               // reduced items of a work item; how often it is cut
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
  const int64_t last = h.kept.shape[h.kept.n - 1], size = h.reduced.size ? h.reduced.size : 1;
  h.beside = h.kept_strides[1][h.kept.n - 1], h.along = h.reduced_strides[0][h.reduced.n - 1];
  const bool short_rows = h.reduced.n == 1 && h.along == 1 && size <= RUN && s.in[0].dtype == LZ_F32;
  const bool side_by_side = last >= LANES && ((h.beside == 1 && h.along != 1) || (size < 2 * LANES && s.ints[0] < 6));
  h.how = short_rows ? Shape::ROWS : side_by_side ? Shape::BESIDE : Shape::ALONG;
  const int64_t some = CHUNK / size < LANES ? LANES : CHUNK / size, most = h.how == Shape::ROWS && some < WIDTH ? some : WIDTH;
  h.tile = h.how == Shape::ALONG ? 1 : last < most ? last : most;
  h.blocks = h.tile ? (last + h.tile - 1) / h.tile : 0;
  h.tiles = last ? h.kept.size / last * h.blocks : 0;
  const int64_t wanted = h.how != Shape::ROWS && h.tiles < 32 ? h.reduced.size * h.tile / CHUNK : 1;
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

// ---- the loops ----
template <class T> struct Loops {
  typedef typename Wide<T>::type W;
  const View& x;
  const Shape& h;
  const Ops<T>& ops;
  T* buffer;                           // RUN items, or COPIED rows of WIDTH; then a row of parts and its places
  int64_t item = ITEM_SIZE[x.dtype];
  Load<T> load = loader<T>(x.dtype);

  // One result: runs of at most RUN of the reduced items [begin, end); short runs of memory are gathered until they fill one.
  void along(const char* base, int64_t begin, int64_t end, W* result, int64_t* place) const {
    const bool direct = h.along == 1 && x.dtype == Own<T>::dtype;
    int64_t index[LZ_MAX_DIMS], filled = 0, at = begin;
    const auto add = [&](const T* items, int64_t n) {
      const T top = ops.fold(items, n);
      if (!ops.beaten) ops.join(result, &top, 1);
      else if (ops.beaten(*result, W(top))) *result = W(top), *place = at + find(items, n, top);
      at += n;
    };
    seek(h.reduced, begin, index);
    for_runs(h.reduced, h.reduced_strides[0], index, end - begin, [&](int64_t offset, int64_t length) {
      for (int64_t n, k = 0; k < length; k += n) {
        n = length - k < RUN - filled ? length - k : RUN - filled;
        const char* from = base + (offset + k * h.along) * item;
        if (direct && !filled && n >= 4 * LANES) {
          add(reinterpret_cast<const T*>(from), n);
          continue;
        }
        load(buffer + filled, from, h.along, n);
        if ((filled += n) < RUN) continue;
        add(buffer, RUN);
        filled = 0;
      }
    });
    if (filled) add(buffer, filled);
  }

  // n neighbouring results: a fold of FEW of their rows in T, then of these parts.
  void beside(const char* base, int64_t n, int64_t begin, int64_t end, W* results, int64_t* where) const {
    const bool direct = h.beside == 1 && x.dtype == Own<T>::dtype;
    T* part = buffer + COPIED * WIDTH;
    int32_t* places = reinterpret_cast<int32_t*>(part + WIDTH);
    int64_t index[LZ_MAX_DIMS], count = 0, at = 0;
    for (int64_t k = 0; k < n; k++) part[k] = ops.start, places[k] = 0;
    const auto flush = [&] {
      ops.join(results, part, n);
      for (int64_t k = 0; k < n; k++) part[k] = ops.start;
      count = 0;
    };
    seek(h.reduced, begin, index);
    for_runs(h.reduced, h.reduced_strides[0], index, end - begin, [&](int64_t offset, int64_t length) {
      for (int64_t rows, r = 0; r < length; r += rows, at += rows) {
        const int64_t most = direct ? FEW - count : COPIED;
        rows = length - r < most ? length - r : most;
        const char* from = base + (offset + r * h.along) * item;
        const T* items = direct ? reinterpret_cast<const T*>(from) : buffer;
        const int64_t stride = direct ? h.along : WIDTH;
        for (int64_t i = 0; i < rows && !direct; i++) load(buffer + i * WIDTH, from + i * h.along * item, h.beside, n);
        if (ops.beaten) ops.places(part, places, items, stride, rows, n, (int32_t)at);
        else ops.beside(part, items, stride, rows, n), count += rows;
        if (count >= FEW) flush();
      }
    });
    if (!ops.beaten) return flush();
    for (int64_t k = 0; k < n; k++) results[k] = W(part[k]), where[k] = begin + places[k];
  }

  // n rows of consecutive floats
  void rows(const char* base, int64_t n, W* results, int64_t* where) const {
    for (int64_t k = 0; k < n; k += LANES) {
      float folded[LANES];
      const float* row = reinterpret_cast<const float*>(base) + k * h.beside;
      const int64_t count = n - k < LANES ? n - k : LANES;
      ops.rows(row, h.beside, h.reduced.size, count, folded);
      for (int64_t j = 0; j < count; j++) results[k + j] = W(folded[j]);
      for (int64_t j = 0; j < count && ops.beaten; j++) where[k + j] = find(row + j * h.beside, h.reduced.size, folded[j]);
    }
  }
};

template <class T> static void run_as(const Step& s, Team& team, const Ops<T>& ops) {
  typedef typename Wide<T>::type W;
  const View &x = s.in[0], &out = s.out[0];
  const Shape h = shape_of(s);
  W* results = reinterpret_cast<W*>(team.local);
  int64_t* where = reinterpret_cast<int64_t*>(results + WIDTH);
  const Loops<T> loops = {x, h, ops, reinterpret_cast<T*>(where + WIDTH)};
  W* parts = reinterpret_cast<W*>(team.shared);          // [chunk][result]
  int64_t* part_places = reinterpret_cast<int64_t*>(parts + h.kept.size * h.chunks);
  const int64_t last = h.kept.shape[h.kept.n - 1];
  const auto write = [&](int64_t result, const W* values, const int64_t* places, int64_t n) {  // in one run of the last axis
    char* to = out.data + offset_of(h.kept, h.kept_strides[0], result) * ITEM_SIZE[out.dtype];
    const int64_t stride = h.kept_strides[0][h.kept.n - 1];
    if (ops.beaten) storer<int64_t>(out.dtype)(to, places, stride, n);
    else storer<W>(out.dtype)(to, values, stride, n);
  };
  int64_t begin, end;
  team.part(h.tiles * h.chunks, 1, &begin, &end);
  for (int64_t work = begin; work < end; work++) {
    const int64_t chunk = work % h.chunks, tile = work / h.chunks, at = tile % h.blocks * h.tile, first = tile / h.blocks * last + at;
    const int64_t n = last - at < h.tile ? last - at : h.tile;
    const int64_t from = chunk * h.chunk, to = from + h.chunk < h.reduced.size ? from + h.chunk : h.reduced.size;
    const char* base = x.data + offset_of(h.kept, h.kept_strides[1], first) * ITEM_SIZE[x.dtype];
    for (int64_t k = 0; k < n; k++) results[k] = W(ops.start), where[k] = 0;
    if (h.how == Shape::ROWS) loops.rows(base, n, results, where);
    else if (h.how == Shape::BESIDE) loops.beside(base, n, from, to, results, where);
    else loops.along(base, from, to, results, where);
    if (h.chunks == 1) {
      write(first, results, where, n);
      continue;
    }
    memcpy(parts + chunk * h.kept.size + first, results, n * sizeof *results);
    memcpy(part_places + chunk * h.kept.size + first, where, n * sizeof *where);
  }
  if (h.chunks == 1) return;
  team.barrier();
  team.part(h.tiles, 1, &begin, &end);
  for (int64_t tile = begin; tile < end; tile++) {
    const int64_t at = tile % h.blocks * h.tile, first = tile / h.blocks * last + at, n = last - at < h.tile ? last - at : h.tile;
    W* total = parts + first;
    int64_t* places = part_places + first;
    for (int64_t c = 1; c < h.chunks; c++) {
      const W* next = total + c * h.kept.size;
      if (!ops.beaten) ops.join_wide(total, next, n);
      for (int64_t k = 0; k < n && ops.beaten; k++)
        if (ops.beaten(total[k], next[k])) total[k] = next[k], places[k] = places[c * h.kept.size + k];
    }
    write(first, total, places, n);
  }
}

template <class T> static void run_with(const Step& s, Team& team) {
  static constexpr Ops<T> table[] = {ops_of<Sum, T, false>(), ops_of<Prod, T, false>(), ops_of<Max, T, false>(), ops_of<Min, T, false>(),
                                     ops_of<Any, T, false>(), ops_of<All, T, false>(), ops_of<Max, T, true>(), ops_of<Min, T, true>()};
  run_as<T>(s, team, table[s.ints[0]]);
}
static void run(const Step& s, Team& team) {
  const int dtype = s.in[0].dtype;
  (is_float(dtype) ? run_with<float> : dtype == LZ_F64 ? run_with<double> : dtype == LZ_U64 ? run_with<uint64_t> : run_with<int64_t>)(s, team);
}

static size_t shared(const Step& s, int) {
  const Shape h = shape_of(s);
  return h.chunks == 1 ? 0 : size_t(h.kept.size * h.chunks) * 16;  // a value and a place
}
static size_t local(const Step&, int) { return WIDTH * (16 + (COPIED + 1) * sizeof(double) + 4); }

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

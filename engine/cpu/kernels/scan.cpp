// scan: o (A, N, C), o[a][n][c] = op of x[a][0..n][c]. ints = [op, reverse, exclusive]
// op: 0 sum 1 prod 2 max 3 min 4 logaddexp (floats). reverse: of x[a][n..N). exclusive: without x[a][n]; where nothing is
// left, the value that changes nothing. NaN stays. Any strides; computed in float32, float64 or 64-bit integers.
// Bytes moved: x and o once.
//
// The plain loop carries one result from item to item. Along memory (C = 1) a run of 1024 items in the first-level cache is
// cut into 8 pieces that are scanned side by side, and then each piece takes the result of those before it (AVX-512 scans
// the lanes of a vector instead). Long rows are shared block by block: every thread folds a block, the folds meet, and the
// thread scans its block while it is still in the second-level cache, into which the next one is fetched meanwhile. Blocks
// do not depend on the number of threads, nor does the result. Where C > 1, the results of neighbouring columns are
// carried side by side.
#include "../functions.h"
#include "../rows.h"

LZ_NAMESPACE_BEGIN

namespace {

constexpr int64_t RUN = 1024, BLOCK = 32 * RUN, PIECES = 8, WIDTH = 1024;  // WIDTH: columns carried side by side
constexpr int64_t STREAMED = 4 << 20;                                     // bytes from which o is written past the caches

template <class T> struct Wrapping { typedef T type; };  // integers overflow without an error
template <> struct Wrapping<int64_t> { typedef uint64_t type; };
struct Sum { template <class T> LZ_INLINE T of(T a, T b) { typedef typename Wrapping<T>::type U; return T(U(a) + U(b)); } };
struct Prod { template <class T> LZ_INLINE T of(T a, T b) { typedef typename Wrapping<T>::type U; return T(U(a) * U(b)); } };
struct Max { template <class T> LZ_INLINE T of(T a, T b) { return (a > b) | (a != a) ? a : b; } };
struct Min { template <class T> LZ_INLINE T of(T a, T b) { return (a < b) | (a != a) ? a : b; } };
struct LogAddExp { template <class T> LZ_INLINE T of(T a, T b) { return logaddexp(a, b); } };

// uint64 is scanned for extremes as int64, its highest bit flipped.
struct Limits { int64_t low, high; };
Limits limits_of(int dtype) {
  const int bits = 8 * ITEM_SIZE[dtype];
  const uint64_t half = uint64_t(1) << (bits - 1);
  if (dtype >= LZ_I8 || dtype == LZ_U64) return {int64_t(-half), int64_t(half - 1)};
  return {0, dtype == LZ_BOOL ? 1 : int64_t(2 * half - 1)};
}
template <class T> T identity(int op, int dtype) {
  if (op < 2) return T(op);
  if (!Same<T, int64_t>::value) return T(op == 3 ? __builtin_inf() : -__builtin_inf());
  return T(op == 3 ? limits_of(dtype).high : limits_of(dtype).low);
}

template <class Op, class T> T fold(const T* x, int64_t n, T total) {
  constexpr int SIDE = 4 * LANES;
  T parts[SIDE];
  int64_t k = 0;
  if (n >= SIDE) {
    for (; k < SIDE; k++) parts[k] = x[k];
    for (; k + SIDE <= n; k += SIDE)
      for (int j = 0; j < SIDE; j++) parts[j] = Op::of(parts[j], x[k + j]);
    for (int j = 0; j < SIDE; j++) total = Op::of(total, parts[j]);
  }
  for (; k < n; k++) total = Op::of(total, x[k]);
  return total;
}

#if defined(__AVX512F__)
// Sixteen at a time: each lane takes the results 1, 2, 4 and 8 lanes below.
template <class Op> float scan_lanes(float* x, int64_t n, float carry, float none) {
  f32x so_far = splat(carry), empty = splat(none);
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) {
    f32x v = loadf(x + k);
    const auto with = [&](__m512i below) __attribute__((always_inline)) { v = Op::of((f32x)below, v); };
    with(_mm512_alignr_epi32((__m512i)v, (__m512i)empty, 15));
    with(_mm512_alignr_epi32((__m512i)v, (__m512i)empty, 14));
    with(_mm512_alignr_epi32((__m512i)v, (__m512i)empty, 12));
    with(_mm512_alignr_epi32((__m512i)v, (__m512i)empty, 8));
    store(x + k, Op::of(so_far, v));
    so_far = Op::of(so_far, (f32x)_mm512_permutexvar_ps(_mm512_set1_epi32(15), (__m512)v));
  }
  for (carry = so_far[0]; k < n; k++) x[k] = carry = Op::of(carry, x[k]);
  return carry;
}
#endif

// x[k] = carry op x[0] op … op x[k]; returns the last. none: what changes nothing.
template <class Op, class T> T scan_run(T* x, int64_t n, T carry, [[maybe_unused]] T none) {
#if defined(__AVX512F__)
  if constexpr (Same<T, float>::value) return scan_lanes<Op>(x, n, carry, none);
#endif
  if (n < RUN) {
    for (int64_t k = 0; k < n; k++) x[k] = carry = Op::of(carry, x[k]);
    return carry;
  }
  constexpr int64_t LENGTH = RUN / PIECES;
  T piece[PIECES];
  for (int p = 0; p < PIECES; p++) piece[p] = x[p * LENGTH];
  for (int64_t k = 1; k < LENGTH; k++)
#pragma GCC unroll 8
    for (int p = 0; p < PIECES; p++) x[p * LENGTH + k] = piece[p] = Op::of(piece[p], x[p * LENGTH + k]);
  for (int p = 0; p < PIECES; p++) {
    for (int64_t k = 0; k < LENGTH; k++) x[p * LENGTH + k] = Op::of(carry, x[p * LENGTH + k]);
    carry = x[p * LENGTH + LENGTH - 1];
  }
  return carry;
}

template <class T> void turn(T* x, int64_t n) {
  for (int64_t i = 0, j = n - 1; i < j; i++, j--) {
    const T t = x[i];
    x[i] = x[j], x[j] = t;
  }
}

void write_past_caches(char* to, const char* from, int64_t bytes) {  // all multiples of 64
#if defined(__AVX512F__)
  for (int64_t k = 0; k < bytes; k += 64) _mm512_stream_si512((__m512i*)(to + k), _mm512_loadu_si512(from + k));
#elif defined(__x86_64__)
  for (int64_t k = 0; k < bytes; k += 16) _mm_stream_si128((__m128i*)(to + k), _mm_loadu_si128((const __m128i*)(from + k)));
#else
  memcpy(to, from, bytes);
#endif
}

View with_three_axes(View v) {
  if (v.ndim == 3) return v;
  for (int i = 2; i > 0; i--) v.shape[i] = v.shape[i - 1], v.strides[i] = v.strides[i - 1];
  v.ndim = 3, v.shape[0] = 1, v.strides[0] = 0;
  return v;
}

template <class T> struct Items {  // of both arrays, read and written as T
  View x, o;
  Load<T> load;
  Store<T> store;
  bool flip, streamed, direct;      // direct: x is what it is read as
  Items(const Step& s) : x(with_three_axes(s.in[0])), o(with_three_axes(s.out[0])) {
    load = loader<T>(x.dtype), store = storer<T>(o.dtype);
    flip = x.dtype == LZ_U64 && (s.ints[0] == 2 || s.ints[0] == 3);
    const int64_t size = o.shape[0] * o.shape[1] * o.shape[2] * ITEM_SIZE[o.dtype];
    direct = Same<T, float>::value && x.dtype == LZ_F32 && x.strides[1] == 1;
    streamed = sizeof(T) == (size_t)ITEM_SIZE[o.dtype] && o.dtype >= LZ_F32 && size >= STREAMED;
  }
  const char* from(int64_t a, int64_t n, int64_t c) const {
    return x.data + (a * x.strides[0] + n * x.strides[1] + c * x.strides[2]) * ITEM_SIZE[x.dtype];
  }
  char* to(int64_t a, int64_t n, int64_t c) const {
    return o.data + (a * o.strides[0] + n * o.strides[1] + c * o.strides[2]) * ITEM_SIZE[o.dtype];
  }
  void flipped(T* items, int64_t n) const {
    if constexpr (Same<T, int64_t>::value)
      for (int64_t k = 0; flip && k < n; k++) items[k] ^= int64_t(1) << 63;
  }
  void get(T* items, const char* from, int64_t stride, int64_t n) const { load(items, from, stride, n), flipped(items, n); }
  void put(char* to, T* items, int64_t stride, int64_t n) const {
    flipped(items, n);
    if (streamed && stride == 1 && !((uintptr_t)to & 63) && !(n & 15)) write_past_caches(to, (const char*)items, n * sizeof(T));
    else store(to, items, stride, n);
  }
};

// Calls f(run, n, first) for the runs of [begin, end) of row a, from the end where `reverse`; the run is turned around.
template <class T, class F>
void for_row(const Items<T>& items, bool reverse, int64_t a, int64_t begin, int64_t end, T* buffer, F f) {
  const int64_t N = items.x.shape[1];
  for (int64_t n, at = begin; at < end; at += n) {
    n = end - at < RUN ? end - at : RUN;
    const int64_t first = reverse ? N - at - n : at;
    items.get(buffer, items.from(a, first, 0), items.x.strides[1], n);
    if (reverse) turn(buffer, n);
    f(buffer, n, first);
  }
}

// Row a by the threads id, id + 1, … of `size`; folds: [2][size], shared.
template <class Op, class T>
void scan_row(const Step& s, const Items<T>& items, int64_t a, Team& team, int id, int size, T* folds, T* buffer) {
  const int64_t N = items.x.shape[1], reverse = s.ints[1], exclusive = s.ints[2], stride = items.o.strides[1];
  const T none = identity<T>((int)s.ints[0], items.o.dtype);
  T before = none;                                          // of the blocks before this round's
  for (int64_t first = 0, round = 0; first < N; first += size * BLOCK, round ^= 1) {
    const int64_t begin = first + id * BLOCK, end = begin + BLOCK < N ? begin + BLOCK : N;
    T own = none, carry = before, *all = folds + round * size;
    if (N > BLOCK && begin < N && items.direct)
      own = fold<Op>((const T*)items.from(a, reverse ? N - end : begin, 0), end - begin, none);
    else if (N > BLOCK && begin < N)
      for_row(items, reverse, a, begin, end, buffer, [&](T* x, int64_t n, int64_t) { own = fold<Op>(x, n, own); });
    all[id] = own;
    if (size > 1) team.barrier();
    for (int t = 0; t < size; t++) {
      if (t == id) carry = before;
      before = Op::of(before, all[t]);
    }
    if (begin < N) for_row(items, reverse, a, begin, end, buffer, [&](T* x, int64_t n, int64_t at) {
      const T start = carry;
      const int64_t next = reverse ? at - size * BLOCK : at + size * BLOCK;   // what this thread folds after this block
      for (int64_t k = 0; items.direct && next >= 0 && k < n && next + k < N; k += LANES) __builtin_prefetch(items.from(a, next + k, 0), 0, 2);
      carry = scan_run<Op>(x, n, carry, none);
      if (exclusive) memmove(x + 1, x, (n - 1) * sizeof(T)), x[0] = start;
      if (reverse) turn(x, n);
      items.put(items.to(a, at, 0), x, stride, n);
    });
  }
}

// n neighbouring columns of (a, c)
template <class Op, class T>
void scan_columns(const Step& s, const Items<T>& items, int64_t a, int64_t c, int64_t n, T* row, T* carry) {
  const int64_t N = items.x.shape[1], exclusive = s.ints[2];
  const T none = identity<T>((int)s.ints[0], items.o.dtype);
  for (int64_t k = 0; k < n; k++) carry[k] = none;
  for (int64_t i = 0; i < N; i++) {
    const int64_t at = s.ints[1] ? N - 1 - i : i;
    items.get(row, items.from(a, at, c), items.x.strides[2], n);
    for (int64_t k = 0; k < n; k++) {
      const T old = carry[k];
      carry[k] = Op::of(old, row[k]);
      row[k] = exclusive ? old : carry[k];
    }
    items.put(items.to(a, at, c), row, items.o.strides[2], n);
  }
}

template <class Op, class T> void run_as(const Step& s, Team& team) {
  const Items<T> items(s);
  const int64_t A = items.x.shape[0], N = items.x.shape[1], C = items.x.shape[2];
  T* buffer = (T*)team.local;
  int64_t begin, end;
  if (C > 1) {
    const int64_t share = (A * C / (2 * team.size) + 63) / 64 * 64, width = share < 64 ? 64 : share < WIDTH ? share : WIDTH;
    const int64_t tiles = (C + width - 1) / width;
    team.part(A * tiles, 1, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
      const int64_t c = i % tiles * width;
      scan_columns<Op>(s, items, i / tiles, c, C - c < width ? C - c : width, buffer, buffer + WIDTH);
    }
  } else if (A >= team.size || N <= BLOCK) {
    team.part(A, 1, &begin, &end);
    T none[2];
    for (int64_t a = begin; a < end; a++) scan_row<Op>(s, items, a, team, 0, 1, none, buffer);
  } else {
    for (int64_t a = 0; a < A; a++) scan_row<Op>(s, items, a, team, team.id, team.size, (T*)team.shared, buffer), team.barrier();
  }
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class Op> void run_op(const Step& s, Team& team) {
  const int dtype = s.in->dtype;
  if (is_float(dtype)) return run_as<Op, float>(s, team);
  if (dtype == LZ_F64) return run_as<Op, double>(s, team);
  if constexpr (!Same<Op, LogAddExp>::value) run_as<Op, int64_t>(s, team);
}
void run(const Step& s, Team& team) {
  static constexpr void (*table[])(const Step&, Team&) = {run_op<Sum>, run_op<Prod>, run_op<Max>, run_op<Min>, run_op<LogAddExp>};
  table[s.ints[0]](s, team);
}

size_t shared(const Step&, int threads) { return 2 * threads * sizeof(double); }
size_t local(const Step&, int) { return 2 * WIDTH * sizeof(double); }

const char* check(const Step& s) {
  if (s.n_out != 1 || s.n_in != 1 || s.n_int != 3) return "wants one output, one input, and ints = [op, reverse, exclusive]";
  const View &x = s.in[0], &o = s.out[0];
  if (x.ndim < 2 || x.ndim > 3 || o.ndim != x.ndim) return "wants x and the output (A, N, C), or both without A";
  for (int i = 0; i < x.ndim; i++)
    if (x.shape[i] != o.shape[i]) return "the output must have the input's shape";
  if (s.ints[0] < 0 || s.ints[0] > 4) return "op must be 0 to 4";
  if (x.dtype == LZ_C64 || (s.ints[0] == 4 && !is_float(x.dtype) && x.dtype != LZ_F64)) return "this op has no scan of this dtype";
  return nullptr;
}

}  // namespace

extern const Kernel scan;
const Kernel scan = {"scan", run, shared, local, check};

LZ_NAMESPACE_END

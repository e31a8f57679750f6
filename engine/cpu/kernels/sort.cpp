// sort: o (…, N) = x (…, N) sorted along the last axis, ascending, NaN last; argsort: o uint32, the positions, stable.
// ints = [kth]: -1 to sort all, else only so far that o[kth] is right and no item before (after) it is greater (less).
// Any strides. Bytes moved: x and o once, N keys two or three times for each level that is not in the cache.
//
// Every dtype becomes an unsigned key of the same order (32 bits, or 64), and back: floats flip their sign bit, or all
// bits if negative. argsort puts the position below the key, so that no two keys are equal. Two sorts of a thread's keys:
// by digits (the plain one) and, on AVX-512, quicksort by compressed stores, which ends in networks of 128 keys. A long
// row is shared out first: each thread parts its share at splitters of a sample, then takes one part of every share.
// The result is the same whatever the way.
#include "../rows.h"

LZ_NAMESPACE_BEGIN

namespace {

constexpr int DIGIT = 11, COUNTS = 1 << DIGIT, SAMPLES = 64;  // of the digit sort; for each splitter
constexpr int64_t SPLIT = 1 << 16, SPLIT_PARTIAL = 1 << 12;   // longer rows are first split by their highest digit
constexpr int64_t SHARED = 1 << 16;                           // and shared by the threads if there is no other work

template <class U> struct Order {  // the bits of an item <-> its key
  U top, flip, infinity;           // the highest bit; what to flip in integers; the bits of a float's infinity, or 0
  explicit Order(int dtype) : top(U(U(1) << (8 * sizeof(U) - 1))), flip(dtype >= LZ_I8 && dtype <= LZ_I64 ? top : 0) {
    infinity = dtype == LZ_F16 ? U(0x7c00) : dtype == LZ_BF16 ? U(0x7f80) : dtype == LZ_F32 ? U(0x7f800000)
             : dtype == LZ_F64 ? U(0x7ff0000000000000) : U(0);
  }
  LZ_ALWAYS U key(U u) const {
    if (!infinity) return U(u ^ flip);
    return U(u & ~top) > infinity ? U(~U(0)) : u & top ? U(~u) : U(u | top);
  }
  LZ_ALWAYS U item(U k) const { return !infinity ? U(k ^ flip) : k & top ? U(k ^ top) : U(~k); }
};

template <class K> struct Plain {   // a key alone
  typedef K Key;
  static constexpr int low_bit = 0;
  static constexpr bool places = false;
  K key;
  LZ_ALWAYS void set(K k, int64_t) { key = k; }
};
struct Packed {                     // a key of 32 bits above its place
  typedef uint64_t Key;
  static constexpr int low_bit = 32;
  static constexpr bool places = true;
  uint64_t key;
  LZ_ALWAYS void set(uint64_t k, int64_t i) { key = k << 32 | (uint32_t)i; }
  LZ_ALWAYS uint32_t place() const { return (uint32_t)key; }
};
struct Placed {                     // a key of 64 bits beside its place
  typedef uint64_t Key;
  static constexpr int low_bit = 0;
  static constexpr bool places = true;
  uint64_t key;
  uint32_t at;
  LZ_ALWAYS void set(uint64_t k, int64_t i) { key = k, at = (uint32_t)i; }
  LZ_ALWAYS uint32_t place() const { return at; }
};

// Calls f(stride), which inlines as a loop over neighbours where the stride is 1.
template <class F> LZ_INLINE void with_stride(int64_t stride, F f) { stride == 1 ? f(1) : f(stride); }

// The keys of the items [first, first + n); -0 is sorted as 0 where only positions are asked for.
template <class U, class E>
void load_keys(const Order<U> order, E* to, const char* from, int64_t stride, int64_t first, int64_t n) {
  const bool one_zero = E::places && order.infinity;
  with_stride(stride, [&](int64_t step) __attribute__((always_inline)) {
    const U* items = reinterpret_cast<const U*>(from) + first * step;
    for (int64_t i = 0; i < n; i++) {
      const U u = items[i * step];
      to[i].set(order.key(one_zero && u == order.top ? U(0) : u), first + i);
    }
  });
}
template <class U, class E>
void store_items(const Order<U> order, char* to, int64_t stride, const E* from, int64_t n) {
  with_stride(stride, [&](int64_t step) __attribute__((always_inline)) {
    for (int64_t i = 0; i < n; i++) {
      if constexpr (E::places) reinterpret_cast<uint32_t*>(to)[i * step] = from[i].place();
      else reinterpret_cast<U*>(to)[i * step] = order.item((U)from[i].key);
    }
  });
}

// by digits

template <class E> void insertion_sort(E* a, int64_t n) {
  for (int64_t i = 1; i < n; i++) {
    const E e = a[i];
    int64_t j = i;
    for (; j > 0 && a[j - 1].key > e.key; j--) a[j] = a[j - 1];
    a[j] = e;
  }
}

// Sorts by the bits [shift, top) of key - low; the result is in a or in b.
template <class E> E* sort_digits(E* a, E* b, int64_t n, typename E::Key low, int shift, int top, uint32_t* count) {
  if (n <= 32) return insertion_sort(a, n), a;
  const int widest = n < 4096 ? 8 : DIGIT;
  for (int passes = (top - shift + widest - 1) / widest; passes; passes--) {
    const int width = (top - shift) / passes, size = 1 << width;
    memset(count, 0, size * sizeof *count);
    for (int64_t i = 0; i < n; i++) count[(a[i].key - low) >> shift & (size - 1)]++;
    if (count[(a[0].key - low) >> shift & (size - 1)] < n) {
      for (int64_t d = 0, at = 0, c; d < size; d++, at += c) c = count[d], count[d] = (uint32_t)at;
      for (int64_t i = 0; i < n; i++) b[count[(a[i].key - low) >> shift & (size - 1)]++] = a[i];
      E* const other = a;
      a = b, b = other;
    }
    shift += width;
  }
  return a;
}

// Sorts a; the highest digit first if there are many keys, so that the others are sorted in the cache.
template <class E> void sort_by_digits(E* a, E* b, int64_t n, int64_t kth) {
  typedef typename E::Key K;
  K low = ~K(0), high = 0;
  for (int64_t i = 0; i < n; i++) low = a[i].key < low ? a[i].key : low, high = a[i].key > high ? a[i].key : high;
  low = low >> E::low_bit << E::low_bit;
  uint32_t count[COUNTS], start[COUNTS + 1];
  const int bits = n && high > low ? 64 - __builtin_clzll(high - low) : 0;
  if (n < (kth < 0 ? SPLIT : SPLIT_PARTIAL) || bits - E::low_bit <= DIGIT) {
    const E* sorted = sort_digits(a, b, n, low, E::low_bit, bits < E::low_bit ? E::low_bit : bits, count);
    if (sorted != a) memcpy(a, sorted, n * sizeof(E));
    return;
  }
  const int shift = bits - DIGIT;
  memset(count, 0, sizeof count);
  for (int64_t i = 0; i < n; i++) count[(a[i].key - low) >> shift]++;
  start[0] = 0;
  for (int d = 0; d < COUNTS; d++) start[d + 1] = start[d] + count[d], count[d] = start[d];
  for (int64_t i = 0; i < n; i++) b[count[(a[i].key - low) >> shift]++] = a[i];
  for (int d = 0; d < COUNTS; d++) {
    const int64_t at = start[d], size = start[d + 1] - at;
    const bool wanted = kth < 0 || (at <= kth && kth < at + size);
    const E* sorted = wanted ? sort_digits(b + at, a + at, size, low, E::low_bit, shift, count) : b + at;
    if (sorted != a + at) memcpy(a + at, sorted, size * sizeof(E));
  }
}

// by partitions: a = keys below the pivot, then the others; returns the number below

template <class K> int64_t part_keys(K* a, K* spare, int64_t n, K pivot) {
  int64_t below = 0, above = 0;
  for (int64_t i = 0; i < n; i++) {
    const K k = a[i];
    a[below] = k, spare[above] = k;
    below += k < pivot, above += !(k < pivot);
  }
  memcpy(a + below, spare, above * sizeof(K));
  return below;
}
LZ_INLINE bool operator<(const Placed& a, const Placed& b) { return a.key < b.key || (a.key == b.key && a.at < b.at); }
template <class K> LZ_INLINE int64_t part(K* a, K* spare, int64_t n, K pivot) { return part_keys(a, spare, n, pivot); }

#if defined(__AVX512F__)
template <class K> struct Vector;
template <> struct Vector<uint32_t> {
  static constexpr int N = 16;
  LZ_INLINE uint32_t below(__m512i a, uint32_t k) { return _mm512_cmplt_epu32_mask(a, _mm512_set1_epi32((int)k)); }
  LZ_INLINE __m512i pack(uint32_t m, __m512i a) { return _mm512_maskz_compress_epi32((__mmask16)m, a); }
  LZ_INLINE __m512i get(const uint32_t* p, uint32_t m) { return _mm512_mask_loadu_epi32(_mm512_set1_epi32(-1), (__mmask16)m, p); }
  LZ_INLINE void put(uint32_t* p, uint32_t m, __m512i a) { _mm512_mask_storeu_epi32(p, (__mmask16)m, a); }
  LZ_INLINE __m512i least(__m512i a, __m512i b) { return _mm512_min_epu32(a, b); }
  LZ_INLINE __m512i most(__m512i a, __m512i b) { return _mm512_max_epu32(a, b); }
  LZ_INLINE __m512i least_or_most(__m512i a, __m512i b, uint32_t m) { return _mm512_mask_max_epu32(least(a, b), (__mmask16)m, a, b); }
  template <int X> LZ_INLINE __m512i swap(__m512i a) {  // lane i ^ X
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return X ? _mm512_permutexvar_epi32(_mm512_xor_si512(lane, _mm512_set1_epi32(X)), a) : a;
  }
};
template <> struct Vector<uint64_t> {
  static constexpr int N = 8;
  LZ_INLINE uint32_t below(__m512i a, uint64_t k) { return _mm512_cmplt_epu64_mask(a, _mm512_set1_epi64((int64_t)k)); }
  LZ_INLINE __m512i pack(uint32_t m, __m512i a) { return _mm512_maskz_compress_epi64((__mmask8)m, a); }
  LZ_INLINE __m512i get(const uint64_t* p, uint32_t m) { return _mm512_mask_loadu_epi64(_mm512_set1_epi32(-1), (__mmask8)m, p); }
  LZ_INLINE void put(uint64_t* p, uint32_t m, __m512i a) { _mm512_mask_storeu_epi64(p, (__mmask8)m, a); }
  LZ_INLINE __m512i least(__m512i a, __m512i b) { return _mm512_min_epu64(a, b); }
  LZ_INLINE __m512i most(__m512i a, __m512i b) { return _mm512_max_epu64(a, b); }
  LZ_INLINE __m512i least_or_most(__m512i a, __m512i b, uint32_t m) { return _mm512_mask_max_epu64(least(a, b), (__mmask8)m, a, b); }
  template <int X> LZ_INLINE __m512i swap(__m512i a) {
    const __m512i lane = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    return X ? _mm512_permutexvar_epi64(_mm512_xor_si512(lane, _mm512_set1_epi64(X)), a) : a;
  }
};

constexpr uint32_t first_lanes(int64_t n) { return n < 32 ? (1u << n) - 1 : ~0u; }

// In place: both ends are read ahead, which leaves room to write, and then always from the side with less of it.
template <int U, class K> int64_t part_vectors(K* a, int64_t n, K pivot) {
  typedef Vector<K> V;
  constexpr int N = V::N, STEP = U * N, AHEAD = 4096 / sizeof(K);
  K *left = a, *right = a + n;
  const K *from = a + STEP, *to = right - STEP;
  const auto write = [&](__m512i v, uint32_t lanes) __attribute__((always_inline)) {
    const uint32_t low = V::below(v, pivot) & lanes, high = low ^ lanes;
    const int count = __builtin_popcount(high);
    if (lanes == first_lanes(N)) _mm512_storeu_si512(left, V::pack(low, v));
    else V::put(left, first_lanes(__builtin_popcount(low)), V::pack(low, v));
    left += __builtin_popcount(low), right -= count;
    V::put(right, first_lanes(count), V::pack(high, v));
  };
  __m512i ends[2 * U], v[U];
  for (int i = 0; i < U; i++) ends[i] = _mm512_loadu_si512(a + i * N), ends[U + i] = _mm512_loadu_si512(to + i * N);
  while (to - from >= STEP) {
    const K* p = from;
    if (from - left <= right - to) from += STEP;
    else p = to -= STEP;
#pragma GCC unroll 8
    for (int i = 0; i < U; i++) {
      v[i] = _mm512_loadu_si512(p + i * N);
      if (U == 8) __builtin_prefetch(p + i * N + (p < from ? AHEAD : -AHEAD));
    }
#pragma GCC unroll 8
    for (int i = 0; i < U; i++) write(v[i], first_lanes(N));
  }
  const int64_t count = to - from;
  const auto lanes = [&](int i) { return count - i * N >= N ? first_lanes(N) : count > i * N ? first_lanes(count - i * N) : 0; };
  for (int i = 0; i < U; i++) v[i] = V::get(from + i * N, lanes(i));
  for (int i = 0; i < U; i++) write(v[i], lanes(i));
  for (int i = 0; i < 2 * U; i++) write(ends[i], first_lanes(N));
  return left - a;
}
template <class K> int64_t part_long_or_short(K* a, K* spare, int64_t n, K pivot) {
  constexpr int64_t N = Vector<K>::N;
  return n < 4 * N ? part_keys(a, spare, n, pivot) : n < 64 * N ? part_vectors<2>(a, n, pivot) : part_vectors<8>(a, n, pivot);
}
LZ_INLINE int64_t part(uint32_t* a, uint32_t* spare, int64_t n, uint32_t pivot) { return part_long_or_short(a, spare, n, pivot); }
LZ_INLINE int64_t part(uint64_t* a, uint64_t* spare, int64_t n, uint64_t pivot) { return part_long_or_short(a, spare, n, pivot); }

// Compares each key with the one whose index differs by the bits X; the less goes where the highest of these bits is 0.
template <class K, int COUNT, int X> LZ_INLINE void compare(__m512i (&v)[COUNT]) {
  typedef Vector<K> V;
  constexpr int lane = X % V::N, across = X / V::N;
  if constexpr (across == 0) {
    constexpr int high = lane >= 8 ? 8 : lane >= 4 ? 4 : lane >= 2 ? 2 : 1;
    constexpr uint32_t upper = high == 8 ? 0xff00 : high == 4 ? 0xf0f0 : high == 2 ? 0xcccc : 0xaaaa;
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) {
      v[i] = V::least_or_most(v[i], V::template swap<lane>(v[i]), upper);
    }
  } else {
    constexpr int high = across >= 8 ? 8 : across >= 4 ? 4 : across >= 2 ? 2 : 1;
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) {
      if (i & high) continue;
      const __m512i one = v[i], other = V::template swap<lane>(v[i ^ across]);
      v[i] = V::least(one, other), v[i ^ across] = V::template swap<lane>(V::most(one, other));
    }
  }
}
template <class K, int COUNT, int STEP> LZ_INLINE void merge_halves(__m512i (&v)[COUNT]) {
  if constexpr (STEP > 0) compare<K, COUNT, STEP>(v), merge_halves<K, COUNT, STEP / 2>(v);
}
template <class K, int COUNT, int SIZE = 2> LZ_INLINE void network(__m512i (&v)[COUNT]) {  // Batcher's bitonic sort
  compare<K, COUNT, SIZE - 1>(v);
  merge_halves<K, COUNT, SIZE / 4>(v);
  if constexpr (SIZE < COUNT * Vector<K>::N) network<K, COUNT, SIZE * 2>(v);
}
template <class K, int COUNT> void sort_network(K* a, int64_t n) {
  constexpr int N = Vector<K>::N;
  __m512i v[COUNT];
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++) v[i] = Vector<K>::get(a + i * N, n > i * N ? first_lanes(n - i * N) : 0);
  network<K, COUNT>(v);
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++) Vector<K>::put(a + i * N, n > i * N ? first_lanes(n - i * N) : 0, v[i]);
}
template <class K> void sort_few(K* a, int64_t n) {
  constexpr int N = Vector<K>::N;
  if (n <= N) sort_network<K, 1>(a, n);
  else if (n <= 2 * N) sort_network<K, 2>(a, n);
  else if (n <= 4 * N) sort_network<K, 4>(a, n);
  else sort_network<K, 8>(a, n);
}

// levels: how many more partitions may disappoint before the digits take over
template <class K> void quicksort(K* a, K* spare, int64_t n, int64_t kth, int levels) {
  constexpr int64_t FEW = 8 * Vector<K>::N;
  while (n > FEW) {
    if (levels-- == 0) return sort_by_digits((Plain<K>*)a, (Plain<K>*)spare, n, kth);
    K sample[FEW];
    const int64_t samples = n > 32 * FEW ? FEW : Vector<K>::N, step = n / samples;
    for (int64_t i = 0; i < samples; i++) sample[i] = a[step * i + i * 7919 % step];
    sort_few(sample, samples);
    const K pivot = sample[samples / 2];
    int64_t below = part(a, spare, n, pivot);
    const bool least = below == 0;
    if (least) below = pivot == K(~K(0)) ? n : part(a, spare, n, K(pivot + 1));  // those equal to the pivot are in place
    else if (kth < 0 || kth < below) quicksort(a, spare, below, kth, levels);
    if (kth >= 0 && (kth -= below) < 0) return;
    a += below, n -= below;
  }
  if (n > 1) sort_few(a, n);
}
LZ_INLINE void sort_keys(Plain<uint32_t>* a, Plain<uint32_t>* b, int64_t n, int64_t kth) { quicksort(&a->key, &b->key, n, kth, 64); }
LZ_INLINE void sort_keys(Plain<uint64_t>* a, Plain<uint64_t>* b, int64_t n, int64_t kth) { quicksort(&a->key, &b->key, n, kth, 64); }
LZ_INLINE void sort_keys(Packed* a, Packed* b, int64_t n, int64_t kth) { quicksort(&a->key, &b->key, n, kth, 64); }
LZ_INLINE void sort_keys(Placed* a, Placed* b, int64_t n, int64_t kth) { sort_by_digits(a, b, n, kth); }
#else
template <class E> LZ_INLINE void sort_keys(E* a, E* b, int64_t n, int64_t kth) { sort_by_digits(a, b, n, kth); }
#endif

LZ_INLINE int64_t part(Plain<uint32_t>* a, Plain<uint32_t>* b, int64_t n, Plain<uint32_t> p) { return part(&a->key, &b->key, n, p.key); }
LZ_INLINE int64_t part(Plain<uint64_t>* a, Plain<uint64_t>* b, int64_t n, Plain<uint64_t> p) { return part(&a->key, &b->key, n, p.key); }
LZ_INLINE int64_t part(Packed* a, Packed* b, int64_t n, Packed p) { return part(&a->key, &b->key, n, p.key); }

// a row

struct Crew {  // the threads that sort one row together: the whole team, or one
  int id, size;
  Team* team;
  void barrier() const { if (size > 1) team->barrier(); }
};
template <class E> struct Space {  // of a crew, for rows of n
  E *a, *b;
  int64_t* bounds;                 // [share][part]: where the parts of each share begin, and the last ends
  Space(char* memory, int64_t n, int threads)
      : a((E*)(memory + 8 * threads * (threads + 1))), b(a + n), bounds((int64_t*)memory) {}
};

// The thread's own part of the row, from everyone's share [n id / size, …) of a: in b, at the place that is returned.
template <class E> int64_t exchange(const Crew& crew, const Space<E>& w, int64_t n, int64_t* size) {
  constexpr int64_t MOST = 2048;
  const int64_t begin = n * crew.id / crew.size, end = n * (crew.id + 1) / crew.size;
  const int64_t each = SAMPLES * crew.size < MOST ? SAMPLES : MOST / crew.size, samples = each * crew.size;
  E sample[MOST], spare[MOST];
  crew.barrier();
  for (int64_t i = 0; i < samples; i++) sample[i] = w.a[n / samples * i];
  sort_keys(sample, spare, samples, -1);
  crew.barrier();
  int64_t *bounds = w.bounds + crew.id * (crew.size + 1), at = begin;
  for (int t = 0; t < crew.size; t++) {
    bounds[t] = at;
    if (t + 1 < crew.size) at += part(w.a + at, w.b + at, end - at, sample[each * (t + 1)]);
  }
  bounds[crew.size] = end;
  crew.barrier();
  int64_t start = 0;
  *size = 0;
  for (int share = 0; share < crew.size; share++) {
    const int64_t* from = w.bounds + share * (crew.size + 1);
    start += from[crew.id] - from[0];
  }
  for (int share = 0; share < crew.size; share++) {
    const int64_t *from = w.bounds + share * (crew.size + 1) + crew.id, count = from[1] - from[0];
    memcpy(w.b + start + *size, w.a + from[0], count * sizeof(E));
    *size += count;
  }
  crew.barrier();
  return start;
}

// kth as in ints; `item` is the size of the output's.
template <class U, class E>
void sort_row(const Crew& crew, const Space<E>& w, const Order<U> order, const char* from, int64_t stride, char* to,
              int64_t to_stride, int64_t n, int64_t kth, int64_t item) {
  const int64_t begin = n * crew.id / crew.size, end = n * (crew.id + 1) / crew.size;
  load_keys(order, w.a + begin, from, stride, begin, end - begin);
  int64_t start = 0, size = n;
  if (crew.size > 1) start = exchange(crew, w, n, &size);
  E* const keys = (crew.size > 1 ? w.b : w.a) + start;
  if (kth < 0 || (start <= kth && kth < start + size))
    sort_keys(keys, (crew.size > 1 ? w.a : w.b) + start, size, kth < 0 ? -1 : kth - start);
  store_items(order, to + start * to_stride * item, to_stride, keys, size);
  crew.barrier();
}

// Whether the keys fit where the sorted items go: they are sorted there then, and the workspace holds the other half.
bool in_place(const Step& s) {
  const View& o = s.out[0];
  return o.dtype == s.in->dtype && ITEM_SIZE[o.dtype] >= 4 && o.strides[o.ndim - 1] == 1;
}
bool together(const Step& s, int threads) {
  const View& x = s.in[0];
  int64_t rows = 1;
  for (int i = 0; i < x.ndim - 1; i++) rows *= x.shape[i];
  return rows < threads && x.shape[x.ndim - 1] >= SHARED;
}

template <class U, class E> void run_as(const Step& s, Team& team) {
  View views[2] = {s.out[0], s.in[0]};
  const int last = views[0].ndim - 1;
  const int64_t n = views[0].shape[last], strides[] = {views[0].strides[last], views[1].strides[last]};
  views[0].ndim = views[1].ndim = last;
  int64_t outer[2][LZ_MAX_DIMS], index[LZ_MAX_DIMS];
  const Axes axes = merge_axes(views, 2, outer);
  const bool all = together(s, team.size);
  const Crew crew = all ? Crew{team.id, team.size, &team} : Crew{0, 1, &team};
  Space<E> w(all ? team.shared : team.local, n, crew.size);
  const bool direct = !E::places && in_place(s);
  if (direct) w.b = w.a;
  int64_t begin = 0, end = axes.size;
  if (!all) team.part(axes.size, 1, &begin, &end);
  const int64_t item = ITEM_SIZE[s.out->dtype];
  for (int64_t r = begin; r < end; r++) {
    int64_t offset[2] = {0, 0};
    seek(axes, r, index);
    for (int i = 0; i < axes.n; i++)
      for (int v = 0; v < 2; v++) offset[v] += index[i] * outer[v][i];
    if (direct) (all ? w.b : w.a) = (E*)(s.out->data + offset[0] * item);
    sort_row(crew, w, Order<U>(s.in->dtype), s.in->data + offset[1] * (int64_t)sizeof(U), strides[1],
             s.out->data + offset[0] * item, strides[0], n, s.ints[0], item);
  }
}

void run_sort(const Step& s, Team& team) {
  switch (ITEM_SIZE[s.in->dtype]) {
    case 1: return run_as<uint8_t, Plain<uint32_t>>(s, team);
    case 2: return run_as<uint16_t, Plain<uint32_t>>(s, team);
    case 4: return run_as<uint32_t, Plain<uint32_t>>(s, team);
    default: return run_as<uint64_t, Plain<uint64_t>>(s, team);
  }
}
void run_argsort(const Step& s, Team& team) {
  switch (ITEM_SIZE[s.in->dtype]) {
    case 1: return run_as<uint8_t, Packed>(s, team);
    case 2: return run_as<uint16_t, Packed>(s, team);
    case 4: return run_as<uint32_t, Packed>(s, team);
    default: return run_as<uint64_t, Placed>(s, team);
  }
}

template <bool PLACES> size_t space(const Step& s, int threads) {
  const int64_t item = ITEM_SIZE[s.in->dtype], entry = (item < 4 ? 4 : item) * (PLACES ? 2 : 1);
  return size_t(s.in->shape[s.in->ndim - 1] * entry * (!PLACES && in_place(s) ? 1 : 2) + 8 * threads * (threads + 1));
}
template <bool PLACES> size_t shared(const Step& s, int threads) { return together(s, threads) ? space<PLACES>(s, threads) : 0; }
template <bool PLACES> size_t local(const Step& s, int threads) { return together(s, threads) ? 0 : space<PLACES>(s, 1); }

const char* check(const Step& s) {
  if (s.n_out != 1 || s.n_in != 1 || s.n_int != 1) return "wants one output, one input, and ints = [kth]";
  const View &x = s.in[0], &o = s.out[0];
  if (x.ndim < 1 || x.ndim != o.ndim) return "the output must have the input's axes, at least one";
  for (int i = 0; i < x.ndim; i++)
    if (x.shape[i] != o.shape[i]) return "the output must have the input's shape";
  if (x.dtype == LZ_C64) return "complex64 has no order";
  return x.shape[x.ndim - 1] >> 32 ? "rows of 2^32 items or more" : nullptr;
}
const char* check_sort(const Step& s) {
  const char* error = check(s);
  return error ? error : s.out->dtype == s.in->dtype ? nullptr : "the output must have the input's dtype";
}
const char* check_argsort(const Step& s) {
  const char* error = check(s);
  return error ? error : s.out->dtype == LZ_U32 ? nullptr : "positions are uint32";
}

}  // namespace

extern const Kernel sort, argsort;
const Kernel sort = {"sort", run_sort, shared<false>, local<false>, check_sort};
const Kernel argsort = {"argsort", run_argsort, shared<true>, local<true>, check_argsort};

LZ_NAMESPACE_END

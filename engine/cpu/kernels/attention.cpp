// Paged attention, flash style: softmax(q kᵀ · scale) v of ragged sequences over a paged cache, reading k and v once.
//
// Shapes: q, o (T, H, D) f32; k pages (N, K, D, 32), transposed so that the scores of 32 tokens are vectors; v pages
// (N, K, 32, D). The H / K query heads of a kv head, and all new tokens of a tile, are the rows of one small matrix, so
// a page is read once for all of them. Decode moves 2 · length · K · D cache values a sequence and does 4 · H / K
// operations on each: it is bound by memory, reads pages as they are stored and asks for later ones ahead. A prefill
// tile has up to 256 rows: it expands a page once, to float32 or to the pairs that AMX tiles multiply, and is bound by
// arithmetic. The plain loop, for row i of head h, which tests/cpu/test_attention.py writes out:
//   s[p] = scale · Σ_d q[i,h,d] k[p,d]    (softcap: cap · tanh(s / cap); only positions p that row i sees)
//   o[i,h] = Σ_p e^s[p] v[p] / (Σ_p e^s[p] + e^sink[h])
// The fast loop keeps a maximum m and a sum l of e^(s - m) a row, so scores never leave the nearest caches. Scores are
// kept in units of log 2.
//
// Work is one line: the pages of every (sequence, tile, kv head), weighed by rows, cut into even chunks. A cut may fall
// inside an item; then its parts leave (m, l, o) in shared memory, and the thread that finishes last merges them.
#include "tiles.h"
#include "vectors.h"

LZ_NAMESPACE_BEGIN

constexpr int PAGE = 32;                     // tokens
constexpr int CHUNK = 4;                     // pages between two updates of the running maximum
constexpr int AHEAD = 3;                     // pages between what is read and what is asked for, at most CHUNK
constexpr int ROWS = W == 16 ? 8 : 6;        // of the register tile: with two vectors a row it must not spill
constexpr float LARGE = 4096;                // weights may add up to this before the maximum is brought up to date
constexpr float LOWEST = -1e29f;             // what a maximum starts from
constexpr float NONE = -1e30f;               // a score that is not seen

// The register tile: c[r] (+)= Σ_k a[r][k] b[k] for R rows and NV vectors; b is converted as it is loaded; what lies
// `ahead` bytes further, wanted two pages later, is asked for. Both products of attention are this loop.
template <int R, int NV, class V, class T>
static void tile(bool add, const float* a, int64_t as, const T* b, int64_t bs, int depth, float* c, int64_t cs,
                 int64_t ahead) {
  constexpr int N = sizeof(V) / 4;
  V acc[R][NV];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < NV; j++) acc[r][j] = add ? load<V>(c + r * cs + j * N) : V{};
  for (int k = 0; k < depth; k++, b += bs) {
    V row[NV];
    if (sizeof(T) < 4) __builtin_prefetch((const char*)b + ahead, 0, 3);
    for (int j = 0; j < NV; j++) row[j] = get<V>(b + j * N);
    for (int r = 0; r < R; r++)
      for (int j = 0; j < NV; j++) acc[r][j] += a[r * as + k] * row[j];
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < NV; j++) store(c + r * cs + j * N, acc[r][j]);
}

template <int NV, class V, class T, class... Rest> LZ_INLINE void tile_of(int rows, Rest... rest) {
  switch (rows) {
    case 1: return tile<1, NV, V, T>(rest...);
    case 2: return tile<2, NV, V, T>(rest...);
    case 3: return tile<3, NV, V, T>(rest...);
    case 4: return tile<4, NV, V, T>(rest...);
    case 5: return tile<5, NV, V, T>(rest...);
    case 6: return tile<6, NV, V, T>(rest...);
    case 7: return tile<7, NV, V, T>(rest...);
    default: return tile<8, NV, V, T>(rest...);
  }
}

template <class T>  // n columns of c, a multiple of 8
static void product(int rows, int n, bool add, const float* a, int64_t as, const T* b, int64_t bs, int depth, float* c,
                    int64_t cs, int64_t ahead) {
  int j = 0;
  for (; j + 2 * W <= n; j += 2 * W) tile_of<2, vec, T>(rows, add, a, as, b + j, bs, depth, c + j, cs, ahead);
  for (; j + W <= n; j += W) tile_of<1, vec, T>(rows, add, a, as, b + j, bs, depth, c + j, cs, ahead);
  if (j < n) tile_of<1, vec8, T>(rows, add, a, as, b + j, bs, depth, c + j, cs, ahead);
}

struct Args {
  View q, out, k, v;
  const float *k_scales, *v_scales, *sinks;
  const int32_t *table, *starts, *counts, *lengths;
  int64_t T, H, K, B, P;
  int D, group, window, rows, tokens;        // group = H / K; a tile holds tokens · group = rows
  bool causal;
  float scale, cap;                          // of q; cap > 0: scores are cap · log2 e · tanh of what the product gives

  explicit Args(const Step& s) {
    q = s.in[0], k = s.in[1], v = s.in[2], out = s.out[0];
    table = s.in[3].as<int32_t>(), starts = s.in[4].as<int32_t>();
    counts = s.in[5].as<int32_t>(), lengths = s.in[6].as<int32_t>();
    T = q.shape[0], H = q.shape[1], D = (int)q.shape[2], K = k.shape[1], B = s.in[4].shape[0], P = s.in[3].shape[1];
    window = (int)s.ints[0], causal = s.ints[1];
    int i = 7;
    sinks = s.ints[2] ? s.in[i++].as<float>() : nullptr;
    k_scales = s.ints[3] ? s.in[i].as<float>() : nullptr;
    v_scales = s.ints[3] ? s.in[i + 1].as<float>() : nullptr;
    const float c = (float)s.floats[1];
    scale = (float)s.floats[0] * (c > 0 ? 1 / c : LOG2E), cap = c * LOG2E;
    group = (int)(H / K);
    const int fit = 16384 / D < 256 ? 16384 / D : 256;
    const int step = group % 32 ? 32 / (group & -group) : 1;  // tokens that fill whole blocks of 32 rows
    tokens = fit >= step * group ? fit / group / step * step : fit > group ? fit / group : 1;
    rows = tokens * group;
  }
  int width() const { return (D + 31) & ~31; }      // of a row of q and o
  int padded() const { return (rows + 31) & ~31; }  // rows, in whole pairs of AMX tiles
  size_t state() const { return (size_t)padded() * (size_t)(width() + 2); }  // floats
};

struct Tile {                                // rows of one sequence and kv head: token first_token + i / group
  int64_t sequence, head, first_token;       // first_token counts within the sequence's new tokens
  int rows;
  int64_t page, pages;                       // what its rows see
};

struct State {                               // running maximum, sum and output of each row
  float *m, *l, *o;
  State(float* p, const Args& a) : m(p), l(p + a.padded()), o(p + 2 * a.padded()) {}
};

struct Range { int low, high; };             // kv positions
LZ_INLINE Range seen(const Args& a, const Tile& t, int row) {
  const int length = a.lengths[t.sequence], own = length - a.counts[t.sequence] + (int)t.first_token + row / a.group;
  const int low = own + 1 - a.window;
  return {a.window && low > 0 ? low : 0, a.causal ? own + 1 : length};
}

// Scores of n tokens from position `at` become weights e^(s - m), m and l are brought up to date; returns what the old
// sum and output shrink by. Scales of an int8 cache are its tokens': k's go to the scores, v's to the weights.
template <class Weight>
static float weigh(const Args& a, float* s, Weight* weights, int n, int at, Range see, const float* ks, const float* vs,
                   float* m, float* l) {
  const int low = see.low - at, high = see.high - at, end = high >= n ? n : high > 0 ? (high + W - 1) / W * W : 0;
  ivec lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  if (ks || a.cap > 0)
    for (int i = 0; i < end; i += W) {
      vec x = load<vec>(s + i);
      if (ks) x *= load<vec>(ks + i);
      if (a.cap > 0) x = a.cap - 2 * a.cap / (exp2(x * (2 * LOG2E)) + 1);
      store(s + i, x);
    }
  for (int i = 0; i < low && i < end; i += W) store(s + i, lane + i < low ? vec{} + NONE : load<vec>(s + i));
  if (0 < high && high < end) store(s + end - W, lane + (end - W) < high ? load<vec>(s + end - W) : vec{} + NONE);
  const float before = *m;
  float now = before, sum = 0;
  for (bool first = before == LOWEST;; first = true) {  // the maximum so far will usually do: then it is not looked for
    vec highest = vec{} + before, sums{};
    for (int i = 0; first && i < end; i += W) highest = larger(load<vec>(s + i), highest);
    if (first) now = top(highest);
    for (int i = 0; i < end; i += W) {
      const vec p = exp2(load<vec>(s + i) - now);
      sums += p;
      put(weights + i, vs ? p * load<vec>(vs + i) : p);
    }
    sum = total(sums);
    if (first || sum < LARGE) break;
  }
  for (int i = end; i < n; i += W) put(weights + i, vec{});
  const float keep = now == before ? 1 : exp2(before - now);
  *m = now;
  *l = *l * keep + sum;
  return keep;
}

// A thread's workspace. k and v are pages expanded, to float32 or pairs of bfloat16; q = high + low, both bfloat16.
struct Room {
  float *state, *q, *scores, *weights, *ks, *vs, *k, *v;
  bf16 *high, *low;
  size_t bytes;
  Room(char* p, const Args& a) {
    const auto take = [&p](auto*& to, size_t n) { to = (decltype(&*to))p, p += n * sizeof *to; };
    const char* begin = p;
    const size_t row = (size_t)a.width(), rows = (size_t)a.padded() * row, tokens = CHUNK * PAGE;
    take(state, a.state()), take(q, rows), take(scores, 32 * tokens), take(weights, 32 * tokens);
    take(ks, tokens), take(vs, tokens), take(k, tokens * row), take(v, tokens * row), take(high, rows), take(low, rows);
    bytes = (size_t)(p - begin);
  }
};

// Up to CHUNK pages from p on: where their k and v lie, in the order they are read, and their scales.
template <class T> struct Pages {
  int n;
  const T* order[2 * CHUNK + AHEAD];         // n of k, n of v, then what is read next: asked for ahead
  Pages(const Args& a, const Tile& t, int64_t p, int64_t end, const Room& room) {
    const int length = a.lengths[t.sequence];
    n = (int)(end - p < CHUNK ? end - p : CHUNK);
    const auto place = [&](int64_t sequence, int64_t i, int64_t head) { return (a.table[sequence * a.P + i] * a.K + head) * PAGE * a.D; };
    const T *k = a.k.as<T>(), *v = a.v.as<T>();
    for (int i = 0; i < n; i++) {
      const int64_t at = place(t.sequence, p + i, t.head);
      order[i] = k + at, order[n + i] = v + at;
      for (int j = 0; a.k_scales && j < PAGE; j++) {  // what lies past the end weighs nothing
        const bool there = (p + i) * PAGE + j < length;
        room.ks[i * PAGE + j] = there ? a.k_scales[at / a.D + j] : 0;
        room.vs[i * PAGE + j] = there ? a.v_scales[at / a.D + j] : 0;
      }
    }
    const int64_t left = end - p - n, sequence = t.head + 1 < a.K ? t.sequence : t.sequence + 1;  // the item after this one
    for (int64_t i = 0, j; i < AHEAD; i++) {
      if (i < left) order[2 * n + i] = k + place(t.sequence, p + n + i, t.head);
      else if ((j = i - left) < left) order[2 * n + i] = v + place(t.sequence, p + n + j, t.head);
      else if (j -= left; sequence < a.B && j * PAGE < a.lengths[sequence]) order[2 * n + i] = k + place(sequence, j, (t.head + 1) % a.K);
      else order[2 * n + i] = order[0];
    }
  }
  const T* k(int i) const { return order[i]; }
  const T* v(int i) const { return order[n + i]; }
  int64_t next(int i) const { return (const char*)order[i + AHEAD] - (const char*)order[i]; }
};

template <class T> LZ_INLINE vec get_some(const T* p, int n) {  // the first n values, a multiple of 8, then zeros
  if (n <= 0) return vec{};
#if defined(__AVX512F__)
  if (n < W) return (vec)_mm512_zextps256_ps512((__m256)get<vec8>(p));
#endif
  return get<vec>(p);
}

template <class T> static void expand(const T* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += W) put(to + i, get<vec>(from + i));
}

#if defined(__AMX_BF16__)
// AMX: tiles of 16 rows of 64 bytes; a product takes 16 rows x 32 bf16 of `a` and 16 pairs x 16 columns of `b`.
constexpr bool HAS_TILES = true;
// x as two bf16 whose sum has 16 bits, so that scores are as good as k's rounding.
LZ_INLINE void split(vec x, bf16* high, bf16* low) {
  const vec top = (vec)((ivec)x & -65536);
  put(high, top);
  put(low, x - top);
}

// bf16 (a0, b0, a1, b1 …): a row of a `b` tile from two rows.
LZ_INLINE void put_pairs(bf16* to, vec a, vec b) {
  typedef uint16_t u16x32 __attribute__((vector_size(64)));
  const u16x32 order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  store(to, _mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a)));
}

// k (D, 32) -> (width / 2, 32) pairs of d; v (32, D) -> (16, width) pairs of tokens, zero from token `there` on.
template <class T> static void pair_up(const T* k, const T* v, bf16* k2, bf16* v2, int D, int width, int there) {
  for (int d = 0; d < width; d += 2)
    for (int j = 0; j < PAGE; j += W) {
      const T* from = k + d * PAGE + j;
      put_pairs(k2 + d * PAGE + 2 * j, d < D ? get<vec>(from) : vec{}, d < D ? get<vec>(from + PAGE) : vec{});
    }
  for (int i = 0; i < PAGE; i += 2)
    for (int d = 0; d < D; d += W) {
      const T* from = v + i * D + d;
      put_pairs(v2 + i * width + 2 * d, i < there ? get_some(from, D - d) : vec{},
                i + 1 < there ? get_some(from + D, D - d) : vec{});
    }
}

// c (32, 32) f32 (+)= Σ over `depth` steps of a (32 rows of 32 bf16, and their low parts, if any) · b; strides in
// bytes.
static void tile_product(bool add, const bf16* a, const bf16* a_low, int64_t as, const bf16* b, int64_t bs,
                         int64_t b_step, int depth, float* c, int64_t cs) {
  load_c(c, cs, add);
  for (int k = 0; k < depth; k++) {
    const char *bk = (const char*)b + k * b_step, *parts[] = {(const char*)a, (const char*)a_low};
    _tile_loadd(6, bk, bs); _tile_loadd(7, bk + 64, bs);
    for (int i = 0; i < 2 && parts[i]; i++) {
      const char* ak = parts[i] + k * 64;
      _tile_loadd(4, ak, as); _tile_loadd(5, ak + 16 * as, as);
      _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_c(c, cs);
}
#else
constexpr bool HAS_TILES = false;
static void close_tiles() {}
static void open_tiles() {}
template <class... Any> static void split(Any...) {}
template <class... Any> static void pair_up(Any...) {}
template <class... Any> static void tile_product(Any...) {}
#endif

// A tile goes over its pages in one of three ways: few rows multiply the pages as they lie; for many, a page is expanded
// once, to float32, or to pairs of bfloat16 for AMX. Decode and the check of a few guessed tokens keep float32.
enum Way { DIRECT, EXPANDED, TILED };
LZ_INLINE Way way(const Args& a, const Tile& t) {
  const bool tiles = HAS_TILES && a.k.dtype != LZ_F32;  // who keeps float32 wants float32's accuracy
  return t.rows <= 2 * ROWS ? DIRECT : tiles && t.rows > 8 * a.group ? TILED : EXPANDED;
}

template <Way WAY, class T>
static void attend(const Args& a, const Tile& t, int64_t begin, int64_t end, State st, const Room& room) {
  constexpr int BLOCK = WAY == TILED ? 32 : ROWS, LINE = CHUNK * PAGE;
  const int D = a.D, width = a.width(), length = a.lengths[t.sequence];
  const int64_t span = (int64_t)PAGE * width;  // of an expanded page
  const auto weights = [&] { if constexpr (WAY == TILED) return (bf16*)room.weights; else return room.weights; }();
  bf16 *k2 = (bf16*)room.k, *v2 = (bf16*)room.v;
  if (WAY == TILED) open_tiles();
  for (int64_t p = begin; p < end; p += CHUNK) {
    const Pages<T> pages(a, t, p, end, room);
    const int n = pages.n, at = (int)p * PAGE;
    for (int i = 0; i < n; i++) {
      if (WAY == EXPANDED) expand(pages.k(i), room.k + i * span, PAGE * D);
      if (WAY == EXPANDED) expand(pages.v(i), room.v + i * span, PAGE * D);
      if (WAY == TILED) pair_up(pages.k(i), pages.v(i), k2 + i * span, v2 + i * span, D, width, length - at - i * PAGE);
    }
    for (int row = 0; row < t.rows; row += BLOCK) {
      const int R = t.rows - row < BLOCK ? t.rows - row : BLOCK;
      const int low = seen(a, t, row).low - at, high = seen(a, t, row + R - 1).high - at;
      const int first = low > 0 ? low / PAGE : 0, last = high < n * PAGE ? (high + PAGE - 1) / PAGE : n;
      if (first >= last) continue;
      float *q = room.q + row * width, *o = st.o + row * width;
      for (int i = first; i < last; i++) {
        float* s = room.scores + i * PAGE;
        if (WAY == DIRECT) product(R, PAGE, false, q, width, pages.k(i), PAGE, D, s, LINE, pages.next(i));
        if (WAY == EXPANDED) product(R, PAGE, false, q, width, room.k + i * span, PAGE, D, s, LINE, 0);
        if (WAY == TILED)
          tile_product(false, room.high + row * width, room.low + row * width, 2 * width, k2 + i * span, 4 * PAGE,
                       64 * PAGE, width / 32, s, 4 * LINE);
      }
      for (int r = 0; r < R; r++) {
        const int from = first * PAGE, cell = r * LINE + from;
        const float *ks = a.k_scales ? room.ks + from : nullptr, *vs = a.k_scales ? room.vs + from : nullptr;
        const float keep = weigh(a, room.scores + cell, weights + cell, (last - first) * PAGE, at + from,
                                 seen(a, t, row + r), ks, vs, st.m + row + r, st.l + row + r);
        float* to = o + r * width;
        for (int d = 0; keep != 1 && d < width; d += W) put(to + d, load<vec>(to + d) * keep);
      }
      for (int i = first; WAY != TILED && i < last; i++) {
        const int left = (high + at < length ? high : length - at) - i * PAGE, tokens = left < PAGE ? left : PAGE;
        const float* w = room.weights + i * PAGE;
        if (WAY == DIRECT) product(R, D, true, w, LINE, pages.v(i), D, tokens, o, width, pages.next(n + i));
        if (WAY == EXPANDED) product(R, D, true, w, LINE, room.v + i * span, D, tokens, o, width, 0);
      }
      for (int d = 0; WAY == TILED && d < width; d += 32)
        tile_product(true, (bf16*)room.weights + first * PAGE, nullptr, 2 * LINE, v2 + first * span + 2 * d, 4 * width,
                     2 * span, last - first, o + d, 4 * width);
    }
  }
  if (WAY == TILED) close_tiles();
}

template <class T>
static void attend_any(const Args& a, const Tile& t, int64_t begin, int64_t end, State st, const Room& room) {
  switch (way(a, t)) {
    case DIRECT: return attend<DIRECT, T>(a, t, begin, end, st, room);
    case EXPANDED: return attend<EXPANDED, T>(a, t, begin, end, st, room);
    case TILED: return attend<HAS_TILES ? TILED : EXPANDED, T>(a, t, begin, end, st, room);
  }
}

static void start(const Args& a, const Tile& t, State st, const Room& room) {
  const int width = a.width();
  for (int r = 0; r < t.rows; r++) {
    const int64_t token = a.starts[t.sequence] + t.first_token + r / a.group, head = t.head * a.group + r % a.group;
    const float* q = a.q.as<float>() + token * a.q.strides[0] + head * a.q.strides[1];
    for (int d = 0, at = r * width; d < width; d += W, at += W) {
      const vec x = get_some(q + d, a.D - d) * a.scale;
      if (way(a, t) == TILED) split(x, room.high + at, room.low + at); else put(room.q + at, x);
    }
    st.m[r] = LOWEST, st.l[r] = 0;
    memset(st.o + r * width, 0, (size_t)width * sizeof(float));
  }
}

// o / l, the sink's weight being part of the sum; rows that see nothing are 0.
static void finish(const Args& a, const Tile& t, State st) {
  for (int r = 0; r < t.rows; r++) {
    const int64_t token = a.starts[t.sequence] + t.first_token + r / a.group, head = t.head * a.group + r % a.group;
    float* __restrict y = a.out.as<float>() + token * a.out.strides[0] + head * a.out.strides[1];
    const float* o = st.o + r * a.width();
    float l = st.l[r], share = 1;
    if (a.sinks) {
      const float sink = a.sinks[head] * LOG2E, now = larger(st.m[r], sink);
      share = exp2(st.m[r] - now);
      l = l * share + exp2(sink - now);
    }
    share = l == 0 ? 0 : share / l;
    for (int d = 0; d < a.D; d++) y[d] = o[d] * share;
  }
}

// Walks the line of pages. Positions on it are weights: a tile's page costs 16 + rows.
struct Line {
  const Args& a;
  Tile tile{0, 0, 0, 0, 0, 0};
  int64_t begin = 0, cost = 0;               // of the tile's K items on the line, and of one item
  explicit Line(const Args& args) : a(args) { tile.sequence = -1; next(); }
  bool next() {                              // the following tile; false at the end
    begin += cost * a.K;
    tile.first_token += a.tokens;
    while (tile.sequence < 0 || tile.first_token >= a.counts[tile.sequence]) {
      if (++tile.sequence >= a.B) { cost = 0; return false; }
      tile.first_token = 0;
    }
    const int64_t left = a.counts[tile.sequence] - tile.first_token;
    tile.rows = (int)(left < a.tokens ? left : a.tokens) * a.group;
    const Range first = seen(a, tile, 0), last = seen(a, tile, tile.rows - 1);
    tile.page = first.low / PAGE;
    tile.pages = last.high > first.low ? (last.high + PAGE - 1) / PAGE - tile.page : 0;
    cost = weight() * (tile.pages ? tile.pages : 1);
    return true;
  }
  int64_t weight() const { return 16 + tile.rows; }
  int64_t end() const { return begin + cost * a.K; }
  void seek(int64_t x) { while (x >= end() && next()) {} }
};

// A cut of the line: item and page. Both neighbours of a cut find the same one.
struct Cut {
  int64_t item, page;                        // page counts from the item's first; kv head = item
  Cut(Line& line, int64_t x) {
    line.seek(x);
    const int64_t at = x - line.begin;
    item = line.cost ? at / line.cost : 0;
    page = line.cost ? at % line.cost / line.weight() : 0;
  }
};

static void run_chunk(const Args& a, Line& line, int64_t from, int64_t to, float* head_slot, const Room& room) {
  float* const tail_slot = head_slot + a.state();
  Cut cut(line, from);
  while (true) {
    const int64_t item_end = line.begin + (cut.item + 1) * line.cost;
    Tile t = line.tile;
    t.head = cut.item;
    const int64_t units = t.pages ? t.pages : 1;
    const int64_t stop = to >= item_end ? units : (to - (item_end - line.cost)) / line.weight();
    if (stop > cut.page || cut.page > 0) {
      const bool whole = cut.page == 0 && stop == units;
      const State st(whole ? room.state : cut.page > 0 ? head_slot : tail_slot, a);
      start(a, t, st, room);
      const int64_t begin = t.page + cut.page, end = t.page + (stop < t.pages ? stop : t.pages);
      if (a.k.dtype == LZ_F16) attend_any<f16>(a, t, begin, end, st, room);
      else if (a.k.dtype == LZ_BF16) attend_any<bf16>(a, t, begin, end, st, room);
      else if (a.k.dtype == LZ_F32) attend_any<float>(a, t, begin, end, st, room);
      else attend_any<int8_t>(a, t, begin, end, st, room);
      if (whole) finish(a, t, st);
    }
    if (to <= item_end) return;
    cut.page = 0;
    if (++cut.item == a.K) { cut.item = 0; if (!line.next()) return; }
  }
}

// Merges the parts of the item that the cut before chunk c is the first to divide: chunk c - 1's tail, heads from c on.
static void merge(const Args& a, const Tile& t, float* slots, int64_t c, int64_t last) {
  const size_t slot = a.state();
  const int width = a.width();
  const State into(slots + (2 * c - 1) * slot, a);
  for (; c <= last; c++) {
    const State part(slots + 2 * c * slot, a);
    for (int r = 0; r < t.rows; r++) {
      const float now = larger(into.m[r], part.m[r]), x = exp2(into.m[r] - now), y = exp2(part.m[r] - now);
      into.m[r] = now, into.l[r] = into.l[r] * x + part.l[r] * y;
      for (int d = 0; d < width; d++) into.o[r * width + d] = into.o[r * width + d] * x + part.o[r * width + d] * y;
    }
  }
  finish(a, t, into);
}

static void clear_strays(const Args& a, const Team& team) {  // rows of no sequence
  int64_t begin, end, owned = 0;
  for (int64_t b = 0; b < a.B; b++) owned += a.counts[b];
  if (owned == a.T) return;
  team.part(a.T, 1, &begin, &end);
  for (int64_t i = begin; i < end; i++) {
    bool stray = true;
    for (int64_t b = 0; b < a.B; b++) stray &= i < a.starts[b] || i >= a.starts[b] + a.counts[b];
    for (int64_t h = 0; stray && h < a.H; h++)
      memset(a.out.as<float>() + i * a.out.strides[0] + h * a.out.strides[1], 0, (size_t)a.D * sizeof(float));
  }
}

constexpr int CUTS = 4;                      // chunks a thread

static void run(const Step& s, Team& team) {
  const Args a(s);
  const Room room(team.local, a);
  float* slots = (float*)team.shared;
  int64_t total = 0;
  for (int64_t b = 0; b < a.B; b++) {
    if (a.counts[b] < 0 || a.starts[b] < 0 || a.lengths[b] > a.P * PAGE || a.counts[b] > a.lengths[b] || a.starts[b] + a.counts[b] > a.T)
      return team.fail("[paged_attention] sequence %d: %d new of %d tokens from row %d do not fit %d rows and %d pages",
                       (int)b, a.counts[b], a.lengths[b], a.starts[b], (int)a.T, (int)a.P);
    const int32_t* table = a.table + b * a.P;
    uint32_t most = 0;
    for (int64_t i = 0; i < (a.lengths[b] + PAGE - 1) / PAGE; i++) most = (uint32_t)table[i] > most ? (uint32_t)table[i] : most;
    if (a.lengths[b] && most >= a.k.shape[0])
      return team.fail("[paged_attention] sequence %d: page %d is not one of %d", (int)b, (int)most, (int)a.k.shape[0]);
  }
  clear_strays(a, team);
  for (Line all(a); all.cost; all.next()) total = all.end();
  if (total == 0) return;
  // Small work is not worth more cuts than threads.
  const int64_t chunks = team.size == 1 ? 1 : team.size * (total > team.size * 1024 ? CUTS : 1);
  Line line(a);
  int64_t ticket = team.take(1);
  for (; ticket < chunks; ticket = team.take(1))
    run_chunk(a, line, total * ticket / chunks, total * (ticket + 1) / chunks, slots + 2 * ticket * a.state(), room);
  if (ticket != chunks + team.size - 1) return;  // the last to run out of work merges what all left: no barrier
  Line again(a);
  for (int64_t c = 1, owner = -1; c < chunks; c++) {
    const Cut cut(again, total * c / chunks);
    const int64_t item = again.begin + cut.item * again.cost;
    if (cut.page == 0 || item == owner) continue;
    owner = item;
    int64_t last = c;                        // the last chunk that begins inside the item
    while (last + 1 < chunks && total * (last + 1) / chunks < item + again.cost &&
           (total * (last + 1) / chunks - item) / again.weight() > 0) last++;
    Tile t = again.tile;
    t.head = cut.item;
    merge(a, t, slots, c, last);
  }
}

static size_t shared(const Step& s, int threads) {
  return threads == 1 ? 0 : (size_t)(2 * CUTS * threads) * Args(s).state() * sizeof(float);
}
static size_t local(const Step& s, int) { return Room(nullptr, Args(s)).bytes; }

static const char* check(const Step& s) {
  const int dtype = s.in[1].dtype;
  if (s.in[0].dtype != LZ_F32 || s.out[0].dtype != LZ_F32) return "q and the output must be float32";
  if (dtype != s.in[2].dtype || (dtype != LZ_F32 && dtype != LZ_F16 && dtype != LZ_BF16 && dtype != LZ_I8))
    return "pages must be float32, float16, bfloat16 or int8";
  if ((dtype == LZ_I8) != (s.ints[3] != 0)) return "int8 pages, and no others, have scales";
  if (s.in[1].shape[3] != PAGE || s.in[2].shape[2] != PAGE) return "a page must hold 32 tokens";
  if (s.in[0].shape[2] % 8 || s.in[0].shape[2] > 256) return "the head size must be a multiple of 8, at most 256";
  if (s.in[0].shape[1] % s.in[1].shape[1]) return "the number of heads must be a multiple of the number of kv heads";
  return nullptr;
}

extern const Kernel paged_attention;
const Kernel paged_attention = {"paged_attention", run, shared, local, check};

LZ_NAMESPACE_END

// linear: y_j = act(norm(x)) W_j^T + bias_j for n weights that share x, with what follows folded in.
//
//   o  n outputs (T, N_j) f32, or 1 if epilogue >= 2
//   i  x (T, K) f32, [norm weight (K)], for each j W_j (N_j, K) f32|f16|bf16, or codes u32 (N_j, K bits / 32), scales and
//      [biases] (N_j, K / group); then [for each j bias_j (N_j)], [residual (T, N) f32]. x may not overlap an output; the
//      residual may.
//   ints [n, format of the weights (codes.h), group, norm (1 rms), epilogue, has_bias, precise]; floats [eps]
//   epilogue 0 none, 1 + residual (n = 1), 2 silu(y0) y1, 3 gelu(y0) y1, 4 gelu_tanh(y0) y1 (n = 2),
//   5 gpt-oss' clamped swish(y0) (y1 + 1)
//
// The plain loop: for t, n: y[t][n] = sum_k x[t][k] w[n][k]. Weights are read once from memory whatever T is; a Path
// says how a block of rows meets a few tokens, by T: rows as they lie (decode), or a panel expanded in the cache.
#include "amx.h"
#include "gemm.h"

LZ_NAMESPACE_BEGIN

struct Weight { const View *w, *scales, *biases, *bias; int64_t N; };

struct Linear {
  int n, stored, bits, group, norm, epilogue, has_bias, precise;  // stored: a format; bits: the one that paths read
  float eps;
  int64_t T, K, Kp, groups;  // Kp: K rounded up to 64; groups: rounded up to 16
  const View *x, *norm_w, *residual, *out;
  Weight w[8];

  explicit Linear(const Step& s)
      : n((int)s.ints[0]), stored((int)s.ints[1]), bits(stored == 4 || stored == FP4 ? stored : stored == FP8 || !stored ? 0 : 8), group((int)s.ints[2]), norm((int)s.ints[3]), epilogue((int)s.ints[4]),
        has_bias((int)s.ints[5]), precise((int)s.ints[6]), eps((float)s.floats[0]), T(s.in[0].shape[0]), K(s.in[0].shape[1]),
        Kp(round_up(K, 64)), groups(stored ? round_up(K / group, 16) : 0), x(s.in), norm_w(0), residual(0), out(s.out) {
    const View* in = s.in + 1;
    if (norm) norm_w = in++;
    for (int j = 0; j < n; j++) {
      w[j] = {in, in + 1, in + 2, 0, in->shape[0]};
      in += parts_of(stored);
    }
    for (int j = 0; has_bias && j < n; j++) w[j].bias = in++;
    if (epilogue == 1) residual = in;
  }
  Codes codes(int M, int passes) const { return {Kp, group < 64 ? group : 64, M, passes}; }
  bool gated() const { return epilogue >= 2; }
  // what dense paths read: powers of two times e4m3 are exact in bf16
  int dense_dtype(int j) const { return !stored ? w[j].w->dtype : w[j].scales->dtype == LZ_U8 && group > 16 ? LZ_BF16 : LZ_F32; }
  int64_t acts_bytes(int64_t tokens) const { return (tokens + 32) * Kp * 4; }  // every path's records fit, and its last tile
  int64_t own_bytes() const { return acts_bytes(0); }                          // those of one tile, for a thread alone
  int64_t panel_bytes() const { return 64 * Kp * (bits ? 2 : 4) + 64 * 64; }
  int64_t tail_bytes() const { return 64 * (Kp * (bits ? 1 : 4) + 8 * groups + 64); }
};

// A block of rows: where it lies, and where its panel goes.
struct Block {
  const char *w, *scales, *biases;
  int64_t stride, stride_s;  // bytes from a row to the next
  int dtype;                 // of the scales, or of dense weights
  char* panel;
  float* scale(const Linear&) const { return (float*)panel; }
  float* bias(const Linear& L, int rows) const { return scale(L) + L.groups * rows; }
  uint32_t* codes(const Linear& L, int rows) const { return (uint32_t*)(bias(L, rows) + L.groups * rows); }
};

// How blocks of rows of weights meet a few tokens.
struct Path {
  int rows, tokens, blocks;  // rows in a block; tokens and blocks of a tile
  bool still;                // a fixed split of the rows: each thread keeps streaming through its own part
  int64_t (*record)(const Linear&);  // bytes of a token's activations
  void (*encode)(const Linear&, const float* x, char* acts, int64_t t);  // acts: of all tokens; a tile's by one thread, in order
  void (*expand)(const Linear&, const Block&);
  void (*tile)(const Linear&, const Block* b, int blocks, const char* acts, int64_t tokens, float* y);  // y[blocks][tokens][rows]
  bool tiles;  // of AMX
};
constexpr int MOST_BLOCKS = 4;

template <int ROWS> static void expand_scales(const Linear& L, const Block& b) {
  for (int r = 0; r < ROWS; r += LANES) {
    columns_f32(b.dtype, b.scales + r * b.stride_s, b.stride_s, L.K / L.group, b.scale(L) + r, ROWS);
    columns_f32(b.dtype, b.biases + r * b.stride_s, b.stride_s, L.K / L.group, b.bias(L, ROWS) + r, ROWS);
  }
}

// Steps of more than 4 tokens give 15 bits to the groups with outliers only: of SmolLM2 mean KL 5e-4 against 6e-3 with none
// and 1e-6 with all.
constexpr float PLAIN = 4;
template <int BITS, int M, int PASSES> struct Coded {
  static int64_t record(const Linear& L) { return L.codes(M, PASSES).record(); }
  static void encode(const Linear& L, const float* x, char* acts, int64_t t) {
    quantize_row<BITS, M, PASSES>(L.codes(M, PASSES), x, L.K, acts + t / M * M * record(L), (int)(t % M), L.precise || L.T <= 4 ? 0 : PLAIN);
  }
};
template <int BITS, int A, int M, int PASSES, bool SOME = false> struct RowsPath : Coded<BITS, M, PASSES> {
  static void tile(const Linear& L, const Block* b, int blocks, const char* acts, int64_t, float* y) {
    for (int i = 0; i < blocks; i++, b++, y += M * LANES)
      for (int r = 0; r < LANES; r += W)
        rows_tile<BITS, A, M, PASSES, SOME>({b->w + r * b->stride, b->stride, L.K, b->scale(L) + r, b->bias(L, LANES) + r, L.group},
                                      L.codes(M, PASSES), acts, y + r);
  }
  static constexpr Path path = {LANES, M, 1, true, RowsPath::record, RowsPath::encode, expand_scales<LANES>, tile, false};
};
#if defined(__AVX512VNNI__)
template <int BITS, int A> struct AlongPath : Coded<BITS, 1, 2> {
  static void encode(const Linear& L, const float* x, char* acts, int64_t t) {
    Coded<BITS, 1, 2>::encode(L, x, acts, t);
    order_along<BITS>(L.codes(1, 2), acts);
  }
  static void expand(const Linear&, const Block&) {}
  static void tile(const Linear& L, const Block* b, int blocks, const char* acts, int64_t, float* y) {
    alignas(64) float lanes[LANES * LANES];
    for (int i = 0; i < blocks; i++, b++, y += LANES) {
      for (int r = 0; r < LANES; r += 4)
        rows_along<BITS, A>(b->w + r * b->stride, b->stride, b->scales + r * b->stride_s, b->biases + r * b->stride_s, b->stride_s,
                            b->dtype, L.group, L.K, L.codes(1, 2), acts, lanes + (r % 8 * 2 + r / 8 * 4) * LANES);
      _mm512_storeu_ps(y, sum_lanes(lanes));
    }
  }
  static constexpr Path path = {LANES, 1, 1, true, AlongPath::record, encode, expand, tile, false};
};
#endif
template <int BITS> struct PanelPath : Coded<BITS, PANEL_MR, 2> {
  static void expand(const Linear& L, const Block& b) {
    expand_scales<64>(L, b);
    expand_codes<BITS>(b.w, b.stride, L.K, b.codes(L, 64));
  }
  static void tile(const Linear& L, const Block* b, int blocks, const char* acts, int64_t, float* y) {
    for (int i = 0; i < blocks; i++, b++, y += PANEL_MR * 64)
      panel_tile<BITS>(b->codes(L, 64), b->scale(L), b->bias(L, 64), L.group, L.K, L.codes(PANEL_MR, 2), acts, y);
  }
  static constexpr Path path = {64, PANEL_MR, 1, false, PanelPath::record, PanelPath::encode, expand, tile, false};
};

struct Floats {
  static int64_t record(const Linear& L) { return L.Kp * 4; }
  static void encode(const Linear& L, const float* x, char* acts, int64_t t) {
    float* to = (float*)(acts + t * record(L));
    memcpy(to, x, L.K * 4);
    memset(to + L.K, 0, (L.Kp - L.K) * 4);
  }
};
template <int M> struct DensePath : Floats {
  static void expand(const Linear&, const Block&) {}
  static void tile(const Linear& L, const Block* b, int blocks, const char* acts, int64_t, float* y) {
    for (int i = 0; i < blocks; i++, b++, y += M * LANES)
      dense_rows<M>(b->dtype, b->w, b->stride, L.K, (const float*)acts, L.Kp, y);
  }
  static constexpr Path path = {LANES, M, 1, true, record, encode, expand, tile, false};
};
struct FloatPath : Floats {
  static void expand(const Linear& L, const Block& b) {
    for (int r = 0; r < 64; r += LANES) columns_f32(b.dtype, b.w + r * b.stride, b.stride, L.K, (float*)b.panel + r, 64);
  }
  static void tile(const Linear& L, const Block* b, int blocks, const char* acts, int64_t, float* y) {
    for (int i = 0; i < blocks; i++, b++, y += FLOAT_MR * 64) float_tile((float*)b->panel, 64, L.K, (const float*)acts, L.Kp, y, false);
  }
  static constexpr Path path = {64, FLOAT_MR, 1, false, record, encode, expand, tile, false};
};

#if defined(__AMX_BF16__)
template <int BITS, bool FEW> struct AmxPath {
  // Inputs at a time. Many tokens: 36 KB of activations stay in the first-level cache for all blocks; few: the panel stays
  // there, of which one part is multiplied while the next is expanded.
  static constexpr int DEPTH = FEW ? AMX_COLUMNS : 576;
  static int64_t record(const Linear& L) { return L.Kp * (BITS ? 2 : 4); }
  static void encode(const Linear& L, const float* x, char* acts, int64_t t) {
    acts += t / AMX_TOKENS * AMX_TOKENS * record(L);
    amx_row<BITS, !BITS>(x, L.K, L.Kp * 64, acts, t);
    for (int pass = 0; pass < (BITS ? 1 : 2) && (t % 16 == 15 || t == L.T - 1); pass++) amx_turn(L.K, acts + pass * L.Kp * 64, t);
  }
  static void expand(const Linear& L, const Block& b) {
    for (int64_t k = 0; !FEW && k < L.K; k += AMX_COLUMNS) expand_columns(L, b, k, b.panel + k * 64, [](int) {});
  }
  template <class G> LZ_INLINE void expand_columns(const Linear& L, const Block& b, int64_t k, char* panel, const G& between) {
    const auto coded = [&](auto run) __attribute__((always_inline)) {
      run(b.w, b.stride, b.scales, b.biases, b.stride_s, b.dtype, L.group, L.K, k, panel, between);
    };
    if constexpr (!BITS) amx_expand_bf16(b.w, b.stride, L.K, k, panel, between);
    else L.group == 16 ? coded(amx_expand<BITS, 16, G>) : coded(amx_expand<BITS, 32, G>);
  }
  static void tile(const Linear& L, const Block* b, int blocks, const char* acts, int64_t tokens, float* y) {
    alignas(64) float c[MOST_BLOCKS][AMX_ROWS * AMX_TOKENS];
    constexpr int STEP = AMX_TOKENS * 4;
    const auto multiply = [&](const char* a, int64_t k, int64_t n) __attribute__((always_inline)) {
      amx_multiply<!BITS>(a, acts + k * 64, n, true, tokens > 16, L.Kp * 64);
    };
    if (FEW) {
      alignas(64) char panels[2][DEPTH * 64];
      const int64_t parts = (L.K + DEPTH - 1) / DEPTH, all = blocks * parts;
      load_c(c[0], STEP, false);
      for (int64_t i = 0; i <= all; i++) {
        settle();
        const auto previous = [&](int r) __attribute__((always_inline)) {  // 32 columns of it after every 8 rows
          const int64_t k = (i - 1) % parts * DEPTH + r / 8 * 32;
          if (r % 8 == 7 && i && k < L.K) multiply(panels[(i - 1) % 2] + r / 8 * 2048, k, 32);
        };
        if (i < all) expand_columns(L, b[i / parts], i % parts * DEPTH, panels[i % 2], previous);
        else for (int r = 7; r < AMX_ROWS; r += 8) previous(r);
        if (i && i % parts == 0) {
          store_c(c[i / parts - 1], STEP);
          load_c(c[0], STEP, false);
        }
      }
    } else {
      for (int64_t k = 0; k < L.K; k += DEPTH)
        for (int i = 0; i < blocks; i++) {
          load_c(c[i], STEP, k);
          multiply(b[i].panel + k * 64, k, least(L.K - k, DEPTH));
          store_c(c[i], STEP);
        }
    }
    for (int i = 0; i < blocks; i++, y += AMX_ROWS * AMX_TOKENS)
      for (int t = 0; t < tokens; t += LANES)
        for (int r = 0; r < AMX_ROWS; r += LANES) turn(c[i] + r * AMX_TOKENS + t, AMX_TOKENS, y + t * AMX_ROWS + r, AMX_ROWS);
  }
  static constexpr Path path = {AMX_ROWS, AMX_TOKENS, MOST_BLOCKS, FEW, record, encode, expand, tile, true};
};
#endif

// The table: which path for so many tokens.
#if defined(__AMX_BF16__)
constexpr int WIDE = 8, FEW = 4;
#else
constexpr int WIDE = W < 16 ? 4 : 8, FEW = W < 16 ? 8 : 48;
#endif
constexpr int FEW_PRECISE = 8;  // measured: up to FEW tokens, rows as they lie beat panels
#if defined(__AMX_BF16__)
template <int BITS> static const Path& amx_path(int64_t T) { return T <= AMX_TOKENS ? AmxPath<BITS, true>::path : AmxPath<BITS, false>::path; }
#endif
template <int BITS, int A> static const Path& rows_path(int64_t T, bool precise) {
#if defined(__AVX512VNNI__)
  if (T == 1) return AlongPath<BITS, A>::path;
#endif
  if (T > 4 && !precise) return RowsPath<BITS, A, WIDE, 2, true>::path;
  return T == 1 ? RowsPath<BITS, A, 1, 2>::path : T == 2 ? RowsPath<BITS, A, 2, 2>::path : RowsPath<BITS, A, 4, 2>::path;
}
template <int BITS> static const Path& coded_path(const Linear& L) {
  const bool precise = L.precise || L.T <= 4;
  if (L.T <= (precise ? FEW_PRECISE : FEW)) {
    const auto path = L.group == 16 ? rows_path<BITS, 16> : L.group == 32 ? rows_path<BITS, 32> : rows_path<BITS, 64>;
    return path(L.T, precise);
  }
#if defined(__AMX_BF16__)
  if (!precise) return amx_path<BITS>(L.T);
#endif
  return PanelPath<BITS>::path;
}
static const Path& choose(const Linear& L) {
  if (L.bits) return (L.bits == 4 ? coded_path<4> : L.bits == 8 ? coded_path<8> : coded_path<FP4>)(L);
  if (L.T <= 4) return L.T == 1 ? DensePath<1>::path : L.T == 2 ? DensePath<2>::path : DensePath<4>::path;
#if defined(__AMX_BF16__)
  if (L.dense_dtype(0) == LZ_BF16) return amx_path<0>(L.T);
#endif
  return FloatPath::path;
}

// x of one token, normalized into `to` if the step asks for it
static const float* normalized(const Linear& L, int64_t t, float* to) {
  const float* x = L.x->as<float>() + t * L.x->strides[0];
  if (!L.norm) return x;
  f32x squares{};
  over(L.K, LZ_LAMBDA2(k, n) {
    const f32x v = get(x + k, n);
    squares = fma(v, v, squares);
  });
  const f32x r = splat(1.0f / __builtin_sqrtf(sum(squares) / (float)L.K + L.eps));
  const int dtype = L.norm_w->dtype, size = size_of(dtype);
  over(L.K, LZ_LAMBDA2(k, n) { put(to + k, get(x + k, n) * r * get_as(dtype, L.norm_w->data + k * size, n), n); });
  return to;
}

LZ_INLINE f32x gated(int epilogue, f32x v, f32x up) {
  if (epilogue == 5) {
    v = minf(v, splat(7));
    return v * sigmoid(splat(1.702f) * v) * (minf(maxf(up, splat(-7)), splat(7)) + 1);
  }
  return (epilogue == 2 ? v * sigmoid(v) : epilogue == 3 ? gelu(v) : gelu_tanh(v)) * up;
}

// y[tokens][rows] of weight j (and y1 of the next, if gated) -> out, columns n .. n + columns
static void finish(const Linear& L, int j, int64_t t, int64_t tokens, int64_t n, int64_t columns, int rows, const float* y,
                   const float* y1) {
  const View *out = L.out + j, *bias = L.w[j].bias, *bias1 = L.gated() ? L.w[j + 1].bias : 0;
  const auto at = [&](const View* v, int64_t i) { return v->as<float>() + (t + i) * v->strides[0] + n; };
  for (int64_t i = 0; i < tokens; i++, y += rows, y1 += rows) {
    float* to = at(out, i);
    const float* residual = L.residual ? at(L.residual, i) : 0;
    over(columns, LZ_LAMBDA2(c, m) {
      f32x v = loadf(y + c);
      if (bias) v += get_as(bias->dtype, bias->data + (n + c) * size_of(bias->dtype), m);
      if (L.gated()) {
        f32x w = loadf(y1 + c);
        if (bias1) w += get_as(bias1->dtype, bias1->data + (n + c) * size_of(bias1->dtype), m);
        v = gated(L.epilogue, v, w);
      }
      if (residual) v += get(residual + c, m);
      put(to + c, v, m);
    });
  }
}

// Rows n .. n + rows of weight j; past the last row, a copy padded with zeros, so that no kernel has a tail of rows. What no
// path reads as it is stored is copied too: codes of other widths as bytes, FP8 as dense weights, the scales of FP4 as floats.
static Block block_of(const Linear& L, int j, int64_t n, int rows, char* panel, char* tail) {
  const Weight& w = L.w[j];
  Block b = {};
  b.panel = panel;
  b.stride = w.w->strides[0] * size_of(w.w->dtype);
  b.w = w.w->data + n * b.stride;
  b.dtype = L.bits ? w.scales->dtype : L.dense_dtype(j);
  if (L.stored) {
    b.stride_s = w.scales->strides[0] * size_of(w.scales->dtype);
    b.scales = w.scales->data + n * b.stride_s;
    b.biases = parts_of(L.stored) == 3 ? w.biases->data + n * b.stride_s : 0;
  }
  const int64_t real = least(rows, w.N - n);
  const auto copied = [&](const char*& from, int64_t& old, int64_t stride, auto copy) {  // row r with copy(its bytes, where to)
    memset(tail + real * stride, 0, (rows - real) * stride);
    for (int64_t r = 0; r < real; r++) copy(from + r * old, tail + r * stride);
    from = tail, old = stride;
    tail += round_up(rows * stride, 64);
  };
  if (L.stored == FP8) {
    float *scale = (float*)tail, *bias = scale + L.groups;
    tail += 8 * L.groups;
    const char* sides = b.scales;
    copied(b.w, b.stride, L.K * size_of(b.dtype), [&](const char* from, char* to) {
      row_sides(FP8, L.group, w.scales->dtype, sides, 0, L.K / L.group, scale, bias);
      over_numbers(FP8, L.group, from, scale, bias, L.K, [&](int64_t k, f32x v) __attribute__((always_inline)) {
        if (b.dtype == LZ_F32) store((float*)to + k, v);
        else store((uint16_t*)to + k, __builtin_convertvector((u32x)v >> 16, u16x));  // exact
      });
      sides += b.stride_s;
    });
    return b;
  }
  if (L.stored != L.bits)
    copied(b.w, b.stride, L.K, [&](const char* from, char* to) { widen_codes(L.stored, from, L.K, (uint8_t*)to); });
  if (L.stored == FP4) {
    const int64_t stride = 4 * L.groups;
    float* bias = (float*)(tail + rows * stride);
    b.biases = (char*)bias, b.dtype = LZ_F32;
    memset(bias, 0, rows * stride);
    copied(b.scales, b.stride_s, stride, [&](const char* from, char* to) {
      row_sides(FP4, L.group, w.scales->dtype, from, 0, L.K / L.group, (float*)to, bias);
      bias += L.groups;
    });
    tail += round_up(rows * stride, 64);
  }
  if (real == rows) return b;
  const auto padded = [&](const char*& from, int64_t stride) {
    copied(from, stride, stride, [&](const char* x, char* to) { memcpy(to, x, stride); });
  };
  if (L.stored == L.bits) padded(b.w, b.stride);
  if (parts_of(L.stored) == 3) padded(b.scales, b.stride_s), padded(b.biases, b.stride_s);
  return b;
}

// The blocks of all weights are one long list; gated weights go in pairs, under the first one's number.
static int64_t blocks_of(const Linear& L, const Path& path, int j) { return (L.w[j].N + path.rows - 1) / path.rows; }
struct Place { int j; int64_t n; };  // weight and first row
static Place place(const Linear& L, const Path& path, int64_t i) {
  int j = 0;
  while (i >= blocks_of(L, path, j)) i -= blocks_of(L, path, j++);
  return {j, i * path.rows};
}

// Blocks, or pairs of gated ones, of one tile.
static int64_t most_of(const Linear& L, const Path& path) { return L.gated() && path.blocks > 1 ? path.blocks / 2 : path.blocks; }
// Blocks begin .. end, few enough for one tile, and all tokens.
static void multiply_some(const Linear& L, const Path& path, const char* acts, char* panels, int64_t begin, int64_t end) {
  alignas(64) float y[MOST_BLOCKS * 1024];
  const int weights = L.gated() ? 2 : 1;
  char* tails = panels + MOST_BLOCKS * L.panel_bytes();
  Block b[MOST_BLOCKS];
  Place at[MOST_BLOCKS];
  int count = 0;
  for (int64_t i = begin; i < end; i++)
    for (int e = 0; e < weights; e++, count++) {
      at[count] = place(L, path, i);
      at[count].j += e;
      b[count] = block_of(L, at[count].j, at[count].n, path.rows, panels + count * L.panel_bytes(), tails + count * L.tail_bytes());
      path.expand(L, b[count]);
    }
  for (int64_t t = 0; t < L.T; t += path.tokens) {
    const int64_t tokens = least(L.T - t, path.tokens), size = path.tokens * path.rows;
    path.tile(L, b, count, acts + t * path.record(L), tokens, y);
    for (int i = 0; i < count; i += weights) {
      const int64_t columns = least(L.w[at[i].j].N - at[i].n, path.rows);
      finish(L, at[i].j, t, tokens, at[i].n, columns, path.rows, y + i * size, y + (i + 1) * size);
    }
  }
}

static void multiply(const Linear& L, const Path& path, const char* acts, char* panels, int64_t begin, int64_t end) {
  for (const int64_t most = most_of(L, path); begin < end; begin += most)
    multiply_some(L, path, acts, panels, begin, least(begin + most, end));
}

constexpr int64_t FIRST = 1 << 15;  // bytes of a weight that are fetched before the tokens are ready
static void run(const Step& step, Team& team) {
  const Linear L(step);
  if (!L.T) return;
  const Path& path = choose(L);
  const bool alone = L.T <= path.tokens;  // every thread prepares all tokens for itself: cheaper than a barrier
  char* acts = alone ? team.local : team.shared;
  char* panels = team.local + L.own_bytes();
  int64_t total = 0, begin, end;
  for (int j = 0; j < (L.gated() ? 1 : L.n); j++) total += blocks_of(L, path, j);
  const int64_t fixed = L.T == 1 ? total : total - total / 4;  // of many tokens the rest is for whoever comes first: a core may be busy
  team.part(fixed, 1, &begin, &end);
  if (path.still && begin < end) {  // the first block is on its way while the tokens are prepared
    const Place at = place(L, path, begin);
    for (const View *v = L.w[at.j].w, *past = v + parts_of(L.stored); v < past; v++) {
      const int64_t bytes = path.rows * v->strides[0] * size_of(v->dtype);
      for (int64_t i = 0; i < least(bytes, FIRST); i += 64) __builtin_prefetch(v->data + at.n / path.rows * bytes + i, 0, 2);
    }
  }
  int64_t token = 0, last = L.T;
  if (!alone) team.part(L.T, path.tokens, &token, &last);  // two threads in one tile would take its cache lines from one another
  for (; token < last; token++) path.encode(L, normalized(L, token, (float*)panels), acts, token);
  if (!alone) team.barrier();

#if defined(__AMX_BF16__)
  if (path.tiles) open_tiles();
#endif
  if (path.still) {
    const int64_t some = total / (32 * team.size) + 1;
    multiply(L, path, acts, panels, begin, end);
    while ((begin = fixed + team.take(some)) < total) multiply(L, path, acts, panels, begin, least(begin + some, total));
  } else {  // equal shares of at most path.blocks
    const int64_t most = most_of(L, path);
    const int64_t parts = (total + most * team.size - 1) / (most * team.size) * team.size, some = (total + parts - 1) / parts;
    while ((begin = team.take(some)) < total) multiply(L, path, acts, panels, begin, least(begin + some, total));
  }
#if defined(__AMX_BF16__)
  if (path.tiles) close_tiles();
#endif
}

static size_t shared(const Step& step, int) {
  const Linear L(step);
  return L.T <= 4 ? 0 : L.acts_bytes(L.T);
}
static size_t local(const Step& step, int) {
  const Linear L(step);
  return L.own_bytes() + MOST_BLOCKS * (L.panel_bytes() + L.tail_bytes());
}

static bool is_float(int dtype) { return dtype == LZ_F32 || dtype == LZ_F16 || dtype == LZ_BF16; }
static const char* check(const Step& s) {
  if (s.n_int != 7 || s.n_float < 1) return "wants 7 integers and eps";
  const int64_t n = s.ints[0], bits = s.ints[1], group = s.ints[2], epilogue = s.ints[4], wants = epilogue > 1 ? 2 : 1;
  if (n < 1 || n > 8) return "wants 1 to 8 weights";
  if (bits && !is_format(bits)) return LZ_FORMATS ", 0 for dense weights";
  if (bits && !is_group(group)) return LZ_GROUPS;
  if (epilogue < 0 || epilogue > 5 || (epilogue && n != wants)) return "epilogue 1 wants one weight, 2 to 5 want two";
  const int64_t inputs = 1 + (s.ints[3] != 0) + n * (parts_of(bits) + (s.ints[5] != 0)) + (epilogue == 1);
  if (s.n_in != inputs || s.n_out != (epilogue > 1 ? 1 : n)) return "wants other numbers of inputs and outputs for these integers";
  const Linear L(s);
  if (L.x->dtype != LZ_F32 || (L.T && L.K > 1 && L.x->strides[1] != 1)) return "x must be float32, contiguous in its last axis";
  for (int j = 0; j < n; j++) {
    const Weight& w = L.w[j];
    if (!bits && (!is_float(w.w->dtype) || w.w->shape[1] != L.K)) return "dense weights must be float32, float16 or bfloat16, of x's inner size";
    if (const char* what = bits ? check_parts(bits, group, L.K, w.w) : 0) return what;
    if (parts_of(bits) == 3 && w.scales->strides[0] != w.biases->strides[0]) return "scales and biases must have the same strides";
    if (w.N != L.out[L.gated() ? 0 : j].shape[1]) return "the output's last size differs from the weight's first";
  }
  return 0;
}

// experts: y[t] = sum_j share[t][j] down_e(act(gate_e x[t]) up_e x[t]) for e = chosen[t][j], a mixture of experts.
//
//   o  (T, C) f32     i  x (T, C) f32, chosen (T, k) i32, share (T, k) f32, gate, up (E, I, C) and down (E, C, I), each a
//      dense weight or codes, scales and [biases] as above, then [gate, up, down biases (E, I), (E, I), (E, C)]
//   ints [format, group, epilogue (2 to 5), has_bias]
//
// The T k pairs are sorted by expert, so that each expert is one linear of the tokens that chose it: twice, then a sum.
// Only chosen experts' weights are read. Between the three, the pairs' results lie in the shared workspace.
struct Experts {
  const View *x, *chosen, *share, *weights[3], *biases[3];
  int64_t T, k, C, I, E;
  int bits, group, epilogue, per;

  explicit Experts(const Step& s)
      : x(s.in), chosen(s.in + 1), share(s.in + 2), biases{}, T(s.in[0].shape[0]), k(s.in[1].shape[1]), C(s.in[0].shape[1]),
        bits((int)s.ints[0]), group((int)s.ints[1]), epilogue((int)s.ints[2]), per(parts_of(bits)) {
    for (int j = 0; j < 3; j++) weights[j] = s.in + 3 + j * per;
    for (int j = 0; s.ints[3] && j < 3; j++) biases[j] = s.in + 3 + 3 * per + j;
    I = weights[0]->shape[1], E = weights[0]->shape[0];
  }
  int64_t pairs() const { return T * k; }
  int64_t acts_row(bool down) const { return round_up(down ? I : C, 64) * 4; }
  int64_t acts_bytes() const { return (pairs() + 32 * least(E, pairs())) * round_up(C > I ? C : I, 64) * 4; }
  int64_t* order(char* shared) const { return (int64_t*)shared; }            // pair of each place, sorted by expert
  int64_t* first(char* shared) const { return order(shared) + pairs(); }     // of each expert's places, E + 1 of them
  int64_t* place(char* shared) const { return first(shared) + E + 1; }       // of each pair
  float* hidden(char* shared) const { return (float*)(shared + round_up((2 * pairs() + E + 1) * 8, 64)); }  // (pairs, I)
  float* parts(char* shared) const { return hidden(shared) + round_up(pairs() * I, 16); }                  // (pairs, C)
  char* acts(char* shared) const { return (char*)(parts(shared) + round_up(pairs() * C, 16)); }
  size_t shared_bytes() const { return acts(nullptr) - (char*)nullptr + acts_bytes(); }
};

// The linear of one expert: gate and up, or down, on `tokens` rows.
struct One {
  View views[11];
  int64_t ints[7];
  double eps = 0;
  Linear linear;

  static View part(const View& v, int64_t e) {
    View r = v;
    r.data += e * v.strides[0] * size_of(v.dtype), r.ndim = v.ndim - 1;
    for (int i = 0; i < r.ndim; i++) r.shape[i] = v.shape[i + 1], r.strides[i] = v.strides[i + 1];
    return r;
  }
  static View rows(float* data, int64_t n, int64_t columns) {
    View r = {(char*)data, LZ_F32, 2, {n, columns}, {columns, 1}};
    return r;
  }
  One(const Experts& X, bool down, int64_t e, int64_t tokens, float* from, float* to)
      : ints{down ? 1 : 2, X.bits, X.group, 0, down ? 0 : X.epilogue, X.biases[0] != nullptr, 0}, linear(fill(X, down, e, tokens, from, to)) {}
  Step fill(const Experts& X, bool down, int64_t e, int64_t tokens, float* from, float* to) {
    int n = 0;
    views[n++] = rows(to, tokens, down ? X.C : X.I);
    views[n++] = rows(from, tokens, down ? X.I : X.C);
    for (int j = down ? 2 : 0; j < (down ? 3 : 2); j++)
      for (int p = 0; p < X.per; p++) views[n++] = part(X.weights[j][p], e);
    for (int j = down ? 2 : 0; X.biases[0] && j < (down ? 3 : 2); j++) views[n++] = part(*X.biases[j], e);
    return {views, views + 1, 1, n - 1, 7, 1, ints, &eps};
  }
};

// Every thread has the experts' linears in the same order; tiles of tokens go round, runs of blocks are taken as threads come.
static void run_linears(const Experts& X, Team& team, bool down) {
  const int64_t *first = X.first(team.shared), *order = X.order(team.shared), row = X.acts_row(down);
  float *from = X.hidden(team.shared), *to = down ? X.parts(team.shared) : from;
  const auto each = [&](auto fn) {  // (linear, its path, its activations, first place)
    int64_t used = 0;
    for (int64_t e = 0; e < X.E; e++) {
      const int64_t begin = first[e], n = first[e + 1] - begin;
      if (!n) continue;
      const One one(X, down, e, n, from + begin * (down ? X.I : 0), to + begin * (down ? X.C : X.I));
      fn(one.linear, choose(one.linear), X.acts(team.shared) + (begin + 32 * used++) * row, begin);
    }
  };
  int64_t tile = 0;
  each([&](const Linear& L, const Path& path, char* acts, int64_t begin) {
    for (int64_t t = 0; t < L.T; t += path.tokens, tile++)
      for (int64_t i = t; tile % team.size == team.id && i < least(t + path.tokens, L.T); i++) {
        const float* x = down ? from + (begin + i) * X.I : X.x->as<float>() + order[begin + i] / X.k * X.x->strides[0];
        path.encode(L, x, acts, i);
      }
  });
  team.barrier();
  int64_t done = 0, next = team.take(1);  // runs before this expert's, and the run that is mine
  each([&](const Linear& L, const Path& path, char* acts, int64_t) {
    const int64_t blocks = blocks_of(L, path, 0), some = path.still ? 8 : most_of(L, path), runs = (blocks + some - 1) / some;
#if defined(__AMX_BF16__)
    const bool tiles = path.tiles && next - done < runs;
    if (tiles) open_tiles();
#endif
    for (; next - done < runs; next = team.take(1)) {
      const int64_t i = (next - done) * some;
      multiply(L, path, acts, team.local + L.own_bytes(), i, least(i + some, blocks));
    }
#if defined(__AMX_BF16__)
    if (tiles) close_tiles();
#endif
    done += runs;
  });
  team.barrier();
}

static void run_experts(const Step& step, Team& team) {
  const Experts X(step);
  if (!X.T) return;
  const int32_t* chosen = X.chosen->as<int32_t>();
  const auto expert = [&](int64_t pair) { return (int64_t)chosen[pair / X.k * X.chosen->strides[0] + pair % X.k * X.chosen->strides[1]]; };
  for (int64_t p = 0; p < X.pairs(); p++)
    if (expert(p) < 0 || expert(p) >= X.E) return team.fail("[experts] token %d chose expert %d of %d", (int)(p / X.k), (int)expert(p), (int)X.E);
  if (team.id == 0) {  // a counting sort
    int64_t *first = X.first(team.shared), *order = X.order(team.shared), *place = X.place(team.shared);
    memset(first, 0, (X.E + 1) * 8);
    for (int64_t p = 0; p < X.pairs(); p++) first[expert(p) + 1]++;
    for (int64_t e = 0; e < X.E; e++) first[e + 1] += first[e];
    for (int64_t p = 0; p < X.pairs(); p++) order[place[p] = first[expert(p)]++] = p;
    for (int64_t e = X.E; e > 0; e--) first[e] = first[e - 1];
    first[0] = 0;
  }
  team.barrier();
  run_linears(X, team, false);
  run_linears(X, team, true);
  int64_t t, end;
  team.part(X.T, 1, &t, &end);
  for (; t < end; t++) {
    float* y = step.out->as<float>() + t * step.out->strides[0];
    for (int64_t j = 0; j < X.k; j++) {
      const f32x share = splat(X.share->as<float>()[t * X.share->strides[0] + j * X.share->strides[1]]);
      const float* from = X.parts(team.shared) + X.place(team.shared)[t * X.k + j] * X.C;
      over(X.C, LZ_LAMBDA2(c, n) { put(y + c, j ? fma(get(from + c, n), share, get(y + c, n)) : get(from + c, n) * share, n); });
    }
  }
}

static size_t shared_experts(const Step& step, int) { return Experts(step).shared_bytes(); }
static size_t local_experts(const Step& step, int) {
  const Experts X(step);
  size_t most = 0;
  for (int down = 0; down < 2; down++) {
    const One one(X, down, 0, 1, nullptr, nullptr);
    const size_t bytes = one.linear.own_bytes() + MOST_BLOCKS * (one.linear.panel_bytes() + one.linear.tail_bytes());
    most = bytes > most ? bytes : most;
  }
  return most;
}

static const char* check_experts(const Step& s) {
  if (s.n_int != 4 || s.n_out != 1) return "wants 4 integers and one output";
  const int64_t per = parts_of(s.ints[0]);
  if (s.n_in != 3 + 3 * per + 3 * (s.ints[3] != 0)) return "wants other numbers of inputs for these integers";
  const Experts X(s);
  if (s.ints[2] < 2 || s.ints[2] > 5) return "epilogue must be 2 to 5";
  if (X.x->dtype != LZ_F32 || X.share->dtype != LZ_F32 || X.chosen->dtype != LZ_I32) return "wants x and share float32, chosen int32";
  if (s.out->shape[1] != X.C || X.weights[2]->shape[1] != X.C || X.weights[1]->shape[1] != X.I || X.weights[2]->shape[0] != X.E)
    return "the experts' sizes differ from one another or from x's";
  for (int down = 0; down < 2; down++) {
    One one(X, down, 0, 1, nullptr, nullptr);
    if (const char* what = check(one.fill(X, down, 0, 1, nullptr, nullptr))) return what;
  }
  return 0;
}

extern const Kernel linear, experts;
const Kernel linear = {"linear", run, shared, local, check};
const Kernel experts = {"experts", run_experts, shared_experts, local_experts, check_experts};

LZ_NAMESPACE_END

// Products o (…, M, N) = a (…, M, K) b (…, K, N) by all threads of a team: what matmul, quantized_matmul and
// linear_cross_entropy share. b may be packed codes with scales and biases, of which panels are expanded as they are packed.
//
// A unit of work is at most MB rows and a panel of columns. What the tiles cannot read as it lies (always b, if it is codes)
// is packed once for all threads (Packed). bf16 times bf16 is multiplied in pairs, by AMX tiles or vdpbf16ps; floats are sums
// of three bf16 to AMX tiles, three times as fast as vectors of floats and as exact.
#pragma once
#pragma GCC diagnostic ignored "-Wunused-function"  // of amx.h, and what one of the three does not need
#include "amx.h"
#include "codes.h"
#include "gemm.h"

LZ_NAMESPACE_BEGIN

namespace {

constexpr int64_t MB = 96, KC = 128, PIECE = 256;  // rows of a unit, depth of a panel in the first-level cache, depth packed at once
constexpr int64_t THIN = 16;                        // columns of a thin matrix
constexpr int64_t SHARED = 8 << 20;                // bytes, at most, of what is packed of a or b (or one panel)
constexpr int64_t FEW_K = 16384, WIDE = 512;                    // columns of a unit of few rows
constexpr int64_t SMALL = 1 << 19;                 // products of a matrix that one thread does alone, where there are many

bool is_real(int dtype) { return dtype == LZ_F32 || dtype == LZ_F16 || dtype == LZ_BF16; }

struct Matrix {
  char* data;
  int dtype;
  int64_t row, column;  // strides in elements
  char* at(int64_t r, int64_t c) const { return data + (r * row + c * column) * size_of(dtype); }
};
Matrix transposed(const Matrix& m) { return {m.data, m.dtype, m.column, m.row}; }

LZ_INLINE void put_as(float* to, f32x v) { store(to, v); }
LZ_INLINE void put_as(uint16_t* to, f32x v) {
#if defined(__AVX512BF16__)
  store(to, _mm512_cvtneps_pbh((__m512)v));
#else
  store_bf16(to, v);
#endif
}

// Codes w (rows, words) u32 of a format, scales and biases (rows, K / group), see codes.h; b is that, or its transpose if turned.
struct Quantized {
  View w, scales, biases;
  int format, group;
  bool turned;
  // the numbers of n columns of a row from c on; n is a multiple of 16, c of 64. T: float, or the bits of bf16
  template <class T> void expand(int64_t row, int64_t c, int64_t n, T* to) const {
    alignas(64) uint8_t wide[PIECE];
    alignas(64) float scale[PIECE / 16], bias[PIECE / 16];
    const char* codes = w.data + row * w.strides[0] * 4 + c * bits_of(format) / 8;
    const int64_t first = c / group, size = size_of(scales.dtype);
    row_sides(format, group, scales.dtype, scales.data + (row * scales.strides[0] + first) * size,
              biases.data + (row * biases.strides[0] + first) * size, (c + n - 1) / group + 1 - first, scale, bias);
    if (bits_of(format) < 8) widen_codes(format, codes, n, wide), codes = (char*)wide;
    const auto over_groups = [&](auto number) __attribute__((always_inline)) {
      for (int64_t k = 0, g = 0; k < n; g++) {
        const f32x s = splat(scale[g]), b = splat(bias[g]);
        for (const int64_t end = least(n, (first + g + 1) * group - c); k < end; k += LANES) put_as(to + k, fma(number(load<u8x>(codes + k)), s, b));
      }
    };
    if (format == FP8) over_groups([](u8x q) { return e4m3(q); });
    else over_groups([](u8x q) { return __builtin_convertvector(__builtin_convertvector(q, i32x), f32x); });
  }
  // rows x columns of b from (k, n) on, expanded to `to`
  template <class T> Matrix piece(int64_t k, int64_t rows, int64_t n, int64_t columns, T* to) const {
    const int64_t first = turned ? n : k, count = turned ? columns : rows, c = turned ? k : n, step = turned ? rows : columns;
    for (int64_t r = 0; r < count; r++) expand(first + r, c, step, to + r * step);
    const Matrix m = {(char*)(to - first * step - c), sizeof(T) == 4 ? LZ_F32 : LZ_BF16, step, 1};
    return turned ? transposed(m) : m;
  }
};

// The step's sizes and matrices, turned so that N > 4 or M <= 4, batch axes that only lengthen a taken into M.
struct Product {
  View o, a, b;
  int64_t M, N, K, batches = 1;
  bool turned = false, add = false;   // add to what is in o
  const Quantized* codes = nullptr;   // b, if it is quantized
  Product(const View& out, const View& left, const View& right)
      : o(out), a(left), b(right), M(out.shape[0]), N(out.shape[1]), K(left.shape[1]) {}
  Product(const View& out, const View& left, const Quantized& right) : Product(out, left, right.w) { codes = &right; }
  explicit Product(const Step& s) : o(s.out[0]), a(s.in[0]), b(s.in[1]) {
    while (o.ndim > 2 && (b.ndim < 3 || b.shape[b.ndim - 3] == 1 || !b.strides[b.ndim - 3]) && joins(a) && joins(o)) {
      join(a, a.shape[a.ndim - 3]), join(o, o.shape[o.ndim - 3]);
      if (b.ndim > 2) join(b, 1);
    }
    M = o.shape[o.ndim - 2], N = o.shape[o.ndim - 1], K = a.shape[a.ndim - 1];
    for (int i = 0; i < o.ndim - 2; i++) batches *= o.shape[i];
    const View& x = a;
    turned = N < M && (N <= 4 || (N <= THIN && batches == 1 && x.strides[x.ndim - 2] == 1));  // (b^T a^T)^T, where a is read along its rows
    if (turned) { const int64_t m = M; M = N, N = m; }
  }
  bool joins(const View& v) const {
    const int i = v.ndim - 3;
    return i >= 0 && v.shape[i] == o.shape[o.ndim - 3] && (v.shape[i] == 1 || v.strides[i] == v.strides[i + 1] * v.shape[i + 1]);
  }
  static void join(View& v, int64_t times) {
    const int i = v.ndim-- - 3;
    v.shape[i] = times * v.shape[i + 1], v.strides[i] = v.strides[i + 1];
    v.shape[i + 1] = v.shape[i + 2], v.strides[i + 1] = v.strides[i + 2];
  }
  Matrix matrix(const View& v, int64_t batch) const {
    int64_t offset = 0;
    for (int i = o.ndim - 3, j = v.ndim - 3; i >= 0; i--, j--) {
      if (j >= 0 && v.shape[j] > 1) offset += batch % o.shape[i] * v.strides[j];
      batch /= o.shape[i];
    }
    const Matrix m = {v.data + offset * size_of(v.dtype), v.dtype, v.strides[v.ndim - 2], v.strides[v.ndim - 1]};
    return turned ? transposed(m) : m;
  }
  Matrix left(int64_t batch) const { return matrix(turned ? b : a, batch); }
  Matrix right(int64_t batch) const { return codes ? Matrix{} : matrix(turned ? a : b, batch); }
};

template <class T> T item(const Matrix& m, int64_t r, int64_t c) {
  const char* p = m.at(r, c);
  switch (m.dtype) {
    case LZ_F64: return (T) * (const double*)p;
    case LZ_F32: return *(const float*)p;
    case LZ_F16: return f16_to_f32(*(const uint16_t*)p);
    default: return bf16_to_f32(*(const uint16_t*)p);
  }
}

// rows x columns of m from (r, c) on -> to[rows][step]. Whole lanes are written, and up to 8 rows past the last.
void pack(const Matrix& m, int64_t r, int64_t c, int64_t rows, int64_t columns, float* to, int64_t step) {
  int64_t done = 0;
  if (m.column == 1) {
    const bool plain = m.dtype == LZ_F32 && columns % LANES == 0;
    for (int64_t i = 0; i < rows; i++)
      if (plain) for (int64_t k = 0; k < columns; k += LANES) store(to + i * step + k, loadf((const float*)m.at(r + i, c) + k));
      else over(columns, LZ_LAMBDA2(k, n) { store(to + i * step + k, get_as(m.dtype, m.at(r + i, c + k), n)); });
    return;
  }
  if (m.row == 1)
    for (; done + LANES <= columns; done += LANES) columns_f32(m.dtype, m.at(r, c + done), m.column * size_of(m.dtype), rows, to + done, step);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t k = done; k < columns; k++) to[i * step + k] = item<float>(m, r + i, c + k);
}
void pack(const Matrix& m, int64_t r, int64_t c, int64_t rows, int64_t columns, double* to, int64_t step) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t k = 0; k < columns; k++) to[i * step + k] = item<double>(m, r + i, c + k);
}

void write(const Matrix& o, int64_t r, int64_t c, f32x v, int64_t n) {
  if (o.dtype == LZ_F32 && o.column == 1) return put((float*)o.at(r, c), v, n);
  uint16_t halves[LANES];
  if (o.dtype == LZ_F16) store_f16(halves, v);
  else store_bf16(halves, v);
  if (o.column == 1) memcpy(o.at(r, c), halves, n * 2);
  else for (int i = 0; i < n; i++) memcpy(o.at(r, c + i), o.dtype == LZ_F32 ? (char*)&v + 4 * i : (char*)(halves + i), size_of(o.dtype));
}
void write_row(const Matrix& o, int64_t r, int64_t c, const float* y, int64_t n) {
  over(n, LZ_LAMBDA2(k, l) { write(o, r, c + k, loadf(y + k), l); });
}
void write_row(const Matrix& o, int64_t r, int64_t c, const double* y, int64_t n) {
  for (int64_t k = 0; k < n; k++) *(double*)o.at(r, c + k) = y[k];
}

// y[rows][step] -> o from (r, c) on
template <class T> void write_block(const Matrix& o, int64_t r, int64_t c, int64_t rows, int64_t columns, const T* y, int64_t step) {
#if defined(__AVX512BF16__)
  if (o.dtype == LZ_BF16 && o.column == 1 && columns % LANES == 0) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t k = 0; k < columns; k += LANES) store(o.at(r + i, c) + k * 2, _mm512_cvtneps_pbh((__m512)load<vf>(y + i * step + k)));
    return;
  }
#endif
  for (int64_t i = 0; i < rows; i++) write_row(o, r + i, c, y + i * step, columns);
}

// A unit of work: rows m … of a, columns n … of b, and their packed forms where there are such.
struct Unit {
  Matrix a, b, o;
  int64_t K, m, n, rows, columns;
  char *a_packed, *b_packed, *local;
  bool add = false;
};

// rows x columns of m from (r, c) on as floats, or as bf16, in the order in which they lie
template <class T> Matrix staged(const Matrix& m, int64_t r, int64_t c, int64_t rows, int64_t columns, T* to) {
  if (m.column != 1 && m.row == 1) return transposed(staged(transposed(m), c, r, columns, rows, to));
  const int64_t step = round_up(columns, LANES);
  for (int64_t i = 0; i < rows; i++)
    over(columns, LZ_LAMBDA2(k, n) {
      f32x v = {};
      if (m.column == 1) v = get_as(m.dtype, m.at(r + i, c + k), n);
      else for (int64_t l = 0; l < n; l++) v[l] = item<float>(m, r + i, c + k + l);
      put_as(to + i * step + k, v);
    });
  return {(char*)(to - r * step - c), sizeof(T) == 4 ? LZ_F32 : LZ_BF16, step, 1};
}

// Products of floats or doubles. Packed a: strips [depth][ROWS]; packed b: panels [depth][NB].
template <class T> struct Floats {
  typedef float Item;  // what codes become
  static bool reads(int) { return true; }
  static bool converts(const Matrix&, int64_t, int64_t) { return false; }
  static constexpr int DTYPE = sizeof(T) == 4 ? LZ_F32 : LZ_F64, NB = PANEL_BYTES / sizeof(T), ROWS = 48, ITEM = sizeof(T), TALL = MB;
  static constexpr int64_t LOCAL = ((MB + 8) * KC + (KC + 8) * NB + MB * NB) * ITEM;
  static int64_t depth(int64_t K) { return round_up(K, 64) + 8; }
  static bool as_it_lies(const Matrix& m) { return m.dtype == DTYPE && m.column == 1; }
  static bool shares_a(const Matrix& a) {  // a transposed one is read as it lies if some of its rows are in a page
    return !as_it_lies(a) && !(as_it_lies(transposed(a)) && a.column <= 4 * NB);
  }
  static bool shares_b(int64_t M) { return M > MB; }
  static int width(int64_t columns) { return columns <= NB / 2 ? NB / 2 : NB; }
  static void pack_panel(const Matrix& b, int64_t k, int64_t n, int64_t rows, int64_t columns, T* to) {
    if (columns < width(columns)) memset(to, 0, rows * PANEL_BYTES);
    pack(b, k, n, rows, columns, to, NB);
  }
  static void pack_a(const Matrix& a, int64_t, int64_t m, int64_t rows, int64_t k, int64_t n, char* to) {
    pack(transposed(a), k, m, n, rows, (T*)to + k * ROWS, ROWS);
  }
  static void pack_b(const Matrix& b, int64_t, int64_t n, int64_t columns, int64_t k, int64_t rows, char* to) {
    pack_panel(b, k, n, rows, columns, (T*)to + k * NB);
  }
  static constexpr int NARROW_MR = W < 16 ? FLOAT_MR : 12;  // rows of a tile of half a panel
  template <int MR, int NV> static auto tile(int64_t rows) {
    return rows == MR ? float_tile<MR, NV, T> : rows == 4 ? float_tile<4, NV, T> : rows == 2 ? float_tile<2, NV, T> : float_tile<1, NV, T>;
  }
  static void multiply(const Unit& u) {
    const Matrix &a = u.a, &b = u.b, &o = u.o;
    T *block = (T*)u.local, *panel = block + (MB + 8) * KC, *sums = panel + (KC + 8) * NB;
    const int wide = width(u.columns);
    const bool whole = u.columns == wide, straight = whole && as_it_lies(o), a_lies = !shares_a(a);
    const bool near = as_it_lies(b) && whole && (u.rows <= 2 * FLOAT_MR || b.row <= 4 * NB);  // some rows of b in a page
    if (u.add && !straight) pack(o, u.m, u.n, u.rows, u.columns, sums, NB);
    T* y = straight ? (T*)o.at(u.m, u.n) : sums;
    const int64_t ldy = straight ? o.row : NB, MR = wide == NB ? FLOAT_MR : NARROW_MR;
    for (int64_t k = 0; k == 0 || k < u.K; k += KC) {
      const int64_t n = least(u.K - k, KC), deep = u.a_packed ? depth(u.K) : KC;
      const T *x = u.a_packed ? (T*)u.a_packed + k * ROWS : block, *p = panel;
      int64_t ldp = NB;
      if (!a_lies && !u.a_packed)
        for (int64_t i = 0; i < u.rows; i += ROWS) pack(transposed(a), k, u.m + i, n, least(u.rows - i, ROWS), block + i * KC, ROWS);
      if (u.b_packed) p = (T*)u.b_packed + k * NB;
      else if (near) p = (T*)b.at(k, u.n), ldp = b.row;
      else pack_panel(b, k, u.n, n, u.columns, panel);
      for (int64_t i = 0, r; i < u.rows; i += r) {
        const int64_t left = u.rows - i;
        r = left >= MR ? MR : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const auto run = wide == NB ? tile<FLOAT_MR, FLOAT_NV>(r) : tile<NARROW_MR, 2>(r);
        if (a_lies) run(p, ldp, n, (T*)a.at(u.m + i, k), a.row, y + i * ldy, k || u.add, ldy, wide, a.column);
        else run(p, ldp, n, x + i / ROWS * ROWS * deep + i % ROWS, 1, y + i * ldy, k || u.add, ldy, wide, ROWS);
      }
    }
    if (!straight) write_block(o, u.m, u.n, u.rows, u.columns, sums, NB);
  }
};

#if defined(__AVX512BF16__)
// Products of bf16, two at a time. Packed a: 32 rows as [K / 32][32][32]; packed b: 64 columns as two panels
// [K / 32][2][16 pairs of k][16 columns][2]. What lies past an end is zero.
struct Pairs {
  typedef uint16_t Item;
  static bool reads(int dtype) { return dtype == LZ_BF16; }
  static bool converts(const Matrix& a, int64_t rows, int64_t n) { return a.dtype == LZ_F32 && a.column == 1 && rows == ROWS && n % 32 == 0; }
  static constexpr int NB = 64, ROWS = 32, ITEM = 2, TALL = 512;  // b is read again for every strip of TALL rows
  static bool takes(const Product& p) { return p.M > 4 && p.a.dtype == LZ_BF16 && p.b.dtype == LZ_BF16; }
  static int64_t depth(int64_t K) { return round_up(K, 32); }
  static bool shares_a(const Matrix&) { return true; }
  static bool shares_b(int64_t) { return true; }
  static uint32_t bits(const Matrix& m, int64_t r, int64_t c, int64_t rows, int64_t columns) {
    return r < rows && c < columns ? *(const uint16_t*)m.at(r, c) : 0;
  }
  // 32 rows x 16 columns of m from (k, n) on -> to[16 pairs of rows][16 columns][2]
  static void pairs(const Matrix& m, int64_t k, int64_t n, int64_t rows, int64_t columns, uint32_t* to) {
    const bool whole = k + 32 <= rows && n + 16 <= columns;
    if (whole && m.row == 1) {
      for (int i = 0; i < 16; i += 4) {
        vi z[4];
        LZ_ISA::columns<true>(m.at(k + 2 * i, n), m.column * 2, 16, z);
        for (int j = 0; j < 4; j++) store(to + (i + j) * 16, z[j]);
      }
    } else if (whole && m.column == 1) {
      alignas(64) static constexpr uint16_t TURNS[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
      const auto row = [&](int64_t r) { return _mm512_castsi256_si512(load<__m256i>(m.at(k + r, n))); };
      for (int i = 0; i < 16; i++) store(to + i * 16, _mm512_permutex2var_epi16(row(2 * i), _mm512_load_si512(TURNS), row(2 * i + 1)));
    } else {
      for (int i = 0; i < 256; i++) {
        const int64_t r = k + i / 16 * 2, c = n + i % 16;
        to[i] = bits(m, r, c, rows, columns) | bits(m, r + 1, c, rows, columns) << 16;
      }
    }
  }
  static void pack_b(const Matrix& b, int64_t K, int64_t n, int64_t columns, int64_t k, int64_t rows, char* to) {
    for (int64_t i = k; i < k + rows; i += 32)
      for (int64_t c = 0; c < round_up(columns, 32); c += 16)
        pairs(b, i, n + c, K, n + columns, (uint32_t*)(to + c / 32 * depth(K) * 64 + i / 32 * 2048 + c % 32 * 64));
  }
  static void pack_a(const Matrix& a, int64_t K, int64_t m, int64_t rows, int64_t k, int64_t n, char* to) {
    for (int64_t i = k; i < k + n; i += 32)
      for (int r = 0; r < ROWS; r += 16) {
        char* block = to + i / 32 * 2048 + r * 64;
        if (a.dtype == LZ_F32) {
          for (int j = 0; j < 16; j++) {
            const float* x = (const float*)a.at(m + r + j, i);
            store(block + j * 64, _mm512_cvtne2ps_pbh((__m512)loadf(x + 16), (__m512)loadf(x)));
          }
          continue;
        }
        if (a.column == 1 && i + 32 <= K && r + 16 <= rows) {
          for (int j = 0; j < 16; j++) memcpy(block + j * 64, a.at(m + r + j, i), 64);
          continue;
        }
        alignas(64) uint32_t turned[256];
        pairs(transposed(a), i, m + r, K, m + rows, turned);
        for (int j = 0; j < 16; j += 4) {
          vi z[4];
          columns<true>((const char*)(turned + j), 64, 16, z);
          for (int l = 0; l < 4; l++) store(block + (j + l) * 64, z[l]);
        }
      }
  }
  // y[32][32] (+)= acts panel, or 16 rows of it
#if defined(__AMX_BF16__)
  static void tile(const uint32_t* panel, const char* acts, int64_t K, float* y, int64_t ldy, bool add, bool half = false) {
    load_c(y, ldy * 4, add);
    amx_multiply(acts, (const char*)panel, K, !half, true);
    store_c(y, ldy * 4, half);
  }
#else
  static void tile(const uint32_t* panel, const char* acts, int64_t K, float* y, int64_t ldy, bool add, bool = false) {
    for (int m = 0; m < 32; m += 8) {
      vf acc[8][2];
      unrolled<8>(LZ_LAMBDA(i) { unrolled<2>(LZ_LAMBDA(v) { acc[i][v] = add ? loadf(y + (m + i) * ldy + v * 16) : vf{}; }); });
      const uint32_t* w = panel;
      const int32_t* x = (const int32_t*)acts + m * 16;
      for (int64_t k = 0; k < K; k += 32, w += 512, x += 512)
        for (int p = 0; p < 16; p++) {
          const __m512bh w0 = (__m512bh)load<vi>(w + p * 16), w1 = (__m512bh)load<vi>(w + 256 + p * 16);
          unrolled<8>(LZ_LAMBDA(i) {
            const __m512bh a = (__m512bh)(vi{} + x[i * 16 + p]);
            acc[i][0] = (vf)_mm512_dpbf16_ps((__m512)acc[i][0], a, w0);
            acc[i][1] = (vf)_mm512_dpbf16_ps((__m512)acc[i][1], a, w1);
          });
        }
      unrolled<8>(LZ_LAMBDA(i) { unrolled<2>(LZ_LAMBDA(v) { store(y + (m + i) * ldy + v * 16, acc[i][v]); }); });
    }
  }
#endif
  static void multiply(const Unit& u) {
    float* y = (float*)u.local;  // [32][32]
    for (int64_t c = 0; c < u.columns; c += 32)
      for (int64_t r = 0; r < u.rows; r += 32) {
        const int64_t rows = least(u.rows - r, 32), columns = least(u.columns - c, 32), K = depth(u.K);
        const uint32_t* b = (const uint32_t*)(u.b_packed + c * K * 2);
        const char* a = u.a_packed + r * K * 2;
        if (rows == 32 && columns == 32 && u.o.dtype == LZ_F32 && u.o.column == 1) {
          tile(b, a, K, (float*)u.o.at(u.m + r, u.n + c), u.o.row, u.add);
          continue;
        }
        if (u.add) LZ_ISA::pack(u.o, u.m + r, u.n + c, rows, columns, y, 32);
        tile(b, a, K, y, 32, u.add, rows <= 16);
        write_block(u.o, u.m + r, u.n + c, rows, columns, y, 32);
      }
  }
};
#endif

#if defined(__AMX_BF16__)
// Products of floats by tiles of bf16: x = high + middle + low, eight bits each and exact, and of the nine products the six
// that float32 can see. Packed a: 32 rows as [K / 32][3][32][32]; packed b: 64 columns as two panels
// [K / 32][3][2][16 pairs of k][16 columns][2].
struct Triples {
  typedef float Item;
  static bool reads(int dtype) { return dtype == LZ_F32; }
  static bool converts(const Matrix&, int64_t, int64_t) { return false; }
  static constexpr int NB = 64, ROWS = 32, ITEM = 6, TALL = MB, PLANE = 2048, BLOCK = 3 * PLANE;
  static constexpr int64_t DEPTH = 512;  // of a tile: 96 KB of each operand
  static bool takes(const Product& p) {
    return p.o.dtype == LZ_F32 && p.a.dtype == LZ_F32 && p.b.dtype == LZ_F32 && p.M >= 32 && p.N >= 32 && p.K >= 32;
  }
  static int64_t depth(int64_t K) { return round_up(K, 32); }
  static bool shares_a(const Matrix&) { return true; }
  static bool shares_b(int64_t) { return true; }
  // f(plane, x's part in the upper halves of the lanes, y's) for the three planes
  template <class F> static __attribute__((always_inline)) void split(vi x, vi y, F f) {
    unrolled<3>(LZ_LAMBDA(plane) {
      const vi a = x & (int32_t)0xffff0000, b = y & (int32_t)0xffff0000;
      f(plane, a, b);
      x = (vi)((vf)x - (vf)a), y = (vi)((vf)y - (vf)b);
    });
  }
  static void turn(uint32_t* x) {  // [16][16]
    vi z[16];
    for (int j = 0; j < 16; j += 4) columns<true>((const char*)(x + j), 64, 16, z + j);
    for (int j = 0; j < 16; j++) store(x + j * 16, z[j]);
  }
  // 32 rows x 16 columns of m from (k, n) on -> three planes, `plane` words apart, of [16 pairs of rows][16 columns][2], or turned
  static void pairs(const Matrix& m, int64_t k, int64_t n, int64_t rows, int64_t columns, uint32_t* to, int64_t plane, bool turned) {
    alignas(64) float part[32 * 16];
    Matrix from = m;
    if (k + 32 > rows || n + 16 > columns || (m.row != 1 && m.column != 1)) {
      for (int i = 0; i < 512; i++) part[i] = k + i / 16 < rows && n + i % 16 < columns ? item<float>(m, k + i / 16, n + i % 16) : 0;
      from = {(char*)part, LZ_F32, 16, 1}, k = n = 0;
    }
    const bool along = from.column == 1;
    for (int i = 0; i < 16; i++)
      if (along) {
        split(load<vi>(from.at(k + 2 * i, n)), load<vi>(from.at(k + 2 * i + 1, n)), [&](int p, vi a, vi b) __attribute__((always_inline)) {
          store(to + p * plane + i * 16, (vi)((vu)a >> 16) | b);
        });
      } else {
        alignas(64) static constexpr uint16_t UPPER[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                           33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
        split(load<vi>(from.at(k, n + i)), load<vi>(from.at(k + 16, n + i)), [&](int p, vi a, vi b) __attribute__((always_inline)) {
          store(to + p * plane + i * 16, _mm512_permutex2var_epi16((__m512i)a, _mm512_load_si512(UPPER), (__m512i)b));
        });
      }
    if (along == turned) for (int p = 0; p < 3; p++) turn(to + p * plane);
  }
  static void pack_b(const Matrix& b, int64_t K, int64_t n, int64_t columns, int64_t k, int64_t rows, char* to) {
    for (int64_t i = k; i < k + rows; i += 32)
      for (int64_t c = 0; c < round_up(columns, 32); c += 16)
        pairs(b, i, n + c, K, n + columns, (uint32_t*)(to + (c / 32 * depth(K) + i) / 32 * BLOCK + c % 32 * 64), PLANE / 4, false);
  }
  static void pack_a(const Matrix& a, int64_t K, int64_t m, int64_t rows, int64_t k, int64_t n, char* to) {
    for (int64_t i = k; i < k + n; i += 32)
      for (int r = 0; r < ROWS; r += 16)
        pairs(transposed(a), i, m + r, K, m + rows, (uint32_t*)(to + i / 32 * BLOCK + r * 64), PLANE / 4, true);
  }
  // y[32][32] (+)= a b over `blocks` of 32 k; `step` bytes from one row of y to the next
  static void tile(const char* b, const char* a, int64_t blocks, float* y, int64_t step, bool add) {
    load_c(y, step, add);
    for (; blocks > 0; blocks--, a += BLOCK, b += BLOCK)
      unrolled<3>(LZ_LAMBDA(low) {
        _tile_loadd(6, b + (2 - low) * PLANE, 64);
        _tile_loadd(7, b + (2 - low) * PLANE + 1024, 64);
        unrolled<3>(LZ_LAMBDA(p) {  // planes of a: those that give, with b's, one of the six
          if (p > low) return;
          _tile_loadd(4, a + (low - p) * PLANE, 64);
          _tile_loadd(5, a + (low - p) * PLANE + 1024, 64);
          _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        });
      });
    store_c(y, step);
  }
  // What is not finite in the end is computed once more, as floats: infinity has no middle, and infinity times 0 is NaN. (Not
  // of codes, and not where o is gone: there it is NaN.)
  static void multiply(const Unit& u) {
    vi odd = {};
    for (int64_t c = 0; c < u.columns; c += 32)
      for (int64_t r = 0; r < u.rows; r += 32) {
        const int64_t rows = least(u.rows - r, 32), columns = least(u.columns - c, 32);
        const bool straight = rows == 32 && columns == 32 && u.o.column == 1;
        float* y = straight ? (float*)u.o.at(u.m + r, u.n + c) : (float*)u.local;
        const int64_t step = straight ? u.o.row : 32;
        if (u.add && !straight) LZ_ISA::pack(u.o, u.m + r, u.n + c, rows, columns, y, 32);
        for (int64_t k = 0; k < depth(u.K); k += DEPTH)
          tile(u.b_packed + (c * depth(u.K) / 32 + k) / 32 * BLOCK, u.a_packed + (r * depth(u.K) / 32 + k) / 32 * BLOCK,
               least(depth(u.K) - k, DEPTH) / 32, y, step * 4, k || u.add);
        for (int64_t i = 0; i < rows; i++) {
          odd |= (vi)(loadf(y + i * step) * 0) | (vi)(loadf(y + i * step + 16) * 0);
          if (!straight) write_row(u.o, u.m + r + i, u.n + c, y + i * step, columns);
        }
      }
    if (!u.add && u.b.data && _mm512_test_epi32_mask((__m512i)odd, _mm512_set1_epi32(0x7f800000)))
      Floats<float>::multiply({u.a, u.b, u.o, u.K, u.m, u.n, u.rows, u.columns, 0, 0, u.local});
  }
};
#endif

void tiles_begin() {
#if defined(__AMX_BF16__)
  open_tiles();
#endif
}
void tiles_end() {
#if defined(__AMX_BF16__)
  close_tiles();
#endif
}

// What all threads share of a: MC rows at a time; of b: NC columns.
template <class Kind> struct Packed {
  int64_t row, panel, MC, NC;  // bytes of a row of a and of a panel of b
  bool a, b;
  explicit Packed(const Product& p)
      : row(Kind::depth(p.K) * Kind::ITEM), panel(row * Kind::NB) {
    const bool some = p.codes || p.M > 4 || !Kind::reads(LZ_F16);  // tiles read nothing as it lies
    a = some && Kind::shares_a(p.left(0)), b = p.codes || (some && Kind::shares_b(p.M));
    MC = a ? least(round_up(p.M, Kind::TALL), SHARED / row / Kind::TALL * Kind::TALL + Kind::TALL) : p.M;
    NC = b ? least(round_up(p.N, Kind::NB), SHARED / panel * Kind::NB + Kind::NB) : p.N;
  }
  size_t a_bytes() const { return a ? (MC + 8) * row : 0; }
  size_t b_bytes() const { return b ? NC / Kind::NB * panel : 0; }
};
template <class Kind> size_t bytes(const Kind*, const Product& p) { return Packed<Kind>(p).a_bytes() + Packed<Kind>(p).b_bytes(); }

// One matrix after the other, each by all threads: they pack, meet, and take units. To pack, what is not in the form that
// Kind reads goes through the workspace: codes, and floats of another type.
template <class Kind> void together(const Kind*, const Product& p, Team& team) {
  constexpr int NB = Kind::NB, ROWS = Kind::ROWS;
  const Packed<Kind> packed(p);
  char *b_at = team.shared, *a_at = team.shared + packed.b_bytes();
  const int64_t pieces = (p.K + PIECE - 1) / PIECE;
  typedef typename Kind::Item Item;
  bool first = true;
  for (int64_t batch = 0; batch < p.batches; batch++) {
    Unit u = {p.left(batch), p.right(batch), p.matrix(p.o, batch), p.K, 0, 0, 0, 0, 0, 0, team.local, p.add};
    for (int64_t n = 0; n < p.N; n += packed.NC)
      for (int64_t m = 0; m < p.M; m += packed.MC, first = false) {
        const int64_t rows = least(p.M - m, packed.MC), columns = least(p.N - n, packed.NC), blocks = (columns + NB - 1) / NB;
        int64_t begin, end;
        if (!first) team.barrier();
        if (packed.b && !m) {
          // a copy of 256 x 64 numbers of b, long where its rows lie: then 64 columns of it are a panel's
          const bool along = p.codes ? !p.codes->turned : u.b.column == 1;
          const int64_t deep = along ? NB : PIECE, wide = along ? PIECE / NB * NB : NB, across = (columns + wide - 1) / wide;
          team.part((p.K + deep - 1) / deep * across, 1, &begin, &end);
          for (; begin < end; begin++) {
            const int64_t c = begin % across * wide, k = begin / across * deep, many = least(columns - c, wide), depth = least(p.K - k, deep);
            Item* to = (Item*)team.local;
            const Matrix b = p.codes ? p.codes->piece(k, depth, n + c, many, to) : Kind::reads(u.b.dtype) ? u.b : staged(u.b, k, n + c, depth, many, to);
            for (int64_t i = c; i < c + many; i += NB) Kind::pack_b(b, p.K, n + i, least(columns - i, NB), k, depth, b_at + i / NB * packed.panel);
          }
        }
        if (packed.a) {
          team.part((rows + ROWS - 1) / ROWS * pieces, 1, &begin, &end);
          for (; begin < end; begin++) {
            const int64_t r = begin / pieces * ROWS, k = begin % pieces * PIECE;
            const int64_t tall = least(rows - r, ROWS), deep = least(p.K - k, PIECE);
            const Matrix a = Kind::reads(u.a.dtype) || Kind::converts(u.a, tall, deep) ? u.a : staged(u.a, m + r, k, tall, deep, (Item*)team.local);
            Kind::pack_a(a, p.K, m + r, tall, k, deep, a_at + r * packed.row);
          }
        }
        if (packed.a || packed.b) team.barrier();
        // lower strips where there is too little for every thread
        const int64_t share = round_up(rows * blocks / (3 * team.size) + 1, packed.a ? ROWS : FLOAT_MR), tall = least(share, Kind::TALL);
        const int64_t total = (rows + tall - 1) / tall * blocks;
        for (int64_t i; (i = team.take(1)) < total;) {
          const int64_t r = i / blocks * tall, c = i % blocks * NB;
          u.m = m + r, u.n = n + c, u.rows = least(rows - r, tall), u.columns = least(columns - c, NB);
          u.a_packed = packed.a ? a_at + r * packed.row : 0, u.b_packed = packed.b ? b_at + c / NB * packed.panel : 0;
          Kind::multiply(u);
        }
      }
  }
}

// f(a null pointer to the kind) of floats times a matrix, or codes: fast is bf16 where the machine multiplies it
template <class F> auto with_kind([[maybe_unused]] const Product& p, [[maybe_unused]] bool fast, F f) {
#if defined(__AVX512BF16__)
  if (fast) return f((Pairs*)nullptr);
#endif
#if defined(__AMX_BF16__)
  if (p.M >= 32 && p.N >= 32 && p.K >= 32) return f((Triples*)nullptr);
#endif
  return f((Floats<float>*)nullptr);
}
void multiply(const Product& p, bool fast, Team& team) {
  with_kind(p, fast, [&](auto* kind) { together(kind, p, team); });
}
size_t packed_bytes(const Product& p, bool fast) {
  return with_kind(p, fast, [&](auto* kind) { return bytes(kind, p); });
}

}  // namespace

LZ_NAMESPACE_END

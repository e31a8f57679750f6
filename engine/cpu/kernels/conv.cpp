// conv: o (N, P0, P1, P2, O) = x (N, S0, S1, S2, C) * w (O, K0, K1, K2, C / groups), channels last; fewer spatial axes are
// axes of size 1. ints = [stride 3, padding before 3, kernel dilation 3, input dilation 3, groups, flip].
// float32, float16 and bfloat16 in any mixture, computed in float32, or all float64. Rows of C are contiguous, w is whole.
//
// The plain loop: o[n][p][j] = sum over taps t and channels c of x[n][q][c] w[j][t][c] where q = (p stride - padding +
// t dilation) / input dilation, on every axis, if that is a whole number inside of x. The fast one is a product of
// matrices: a row of patches (K0 K1 K2 C) for each output position, which is laid out for MB positions and a block of
// lines at a time and never exists as a whole, times w, packed once for all threads as panels of up to 64 output
// channels. A line is K2 C numbers, in x often one piece. Where every channel is a group of its own, o's channels are
// computed side by side instead. Bytes moved: x and o once, w once and packed once a thread.
#include "../rows.h"
#include "gemm.h"

LZ_NAMESPACE_BEGIN

namespace {

constexpr int64_t MB = 96, DEPTH = 512, PANEL = 64;  // output positions, numbers of a patch, output channels at once

struct Conv {
  View x, w, o;
  const int64_t *stride, *before, *dilation, *spread;
  int64_t groups, C, O, line, lines, positions;  // C, O: channels of a group; line: K2 C; lines of a patch: K0 K1
  bool flip, joined;                             // joined: a line lies in x as it is
  explicit Conv(const Step& s) : x(s.in[0]), w(s.in[1]), o(s.out[0]), stride(s.ints), before(s.ints + 3), dilation(s.ints + 6), spread(s.ints + 9) {
    groups = s.ints[12], flip = s.ints[13];
    C = w.shape[4], O = o.shape[4] / groups, line = w.shape[3] * C, lines = w.shape[1] * w.shape[2];
    positions = o.shape[0] * o.shape[1] * o.shape[2] * o.shape[3];
    joined = groups == 1 && !flip && dilation[2] == 1 && spread[2] == 1 && x.strides[3] == C;
  }
  int64_t width() const { return least(PANEL, round_up(O, LANES)); }                // of a panel
  int64_t panels() const { return (O + width() - 1) / width(); }                    // of a group
  int64_t panel_size() const { return (lines * line + 8) * width(); }
  int64_t block_lines() const { return line >= DEPTH ? 1 : least(lines, DEPTH / line); }
  bool by_channel() const { return C == 1 && O == 1 && groups > 1; }
  // where tap t of output position p lies on an axis of x, or -1
  int64_t at(int axis, int64_t p, int64_t t) const {
    const int64_t q = p * stride[axis] - before[axis] + (flip ? w.shape[axis + 1] - 1 - t : t) * dilation[axis];
    const int64_t i = spread[axis] == 1 ? q : q / spread[axis];
    return q >= 0 && i < x.shape[axis + 1] && i * spread[axis] == q ? i : -1;
  }
};

struct Position { int64_t n, p[3]; };
Position position(const Conv& v, int64_t flat) {
  Position at;
  for (int i = 2; i >= 0; i--) at.p[i] = flat % v.o.shape[i + 1], flat /= v.o.shape[i + 1];
  at.n = flat;
  return at;
}
// the item of x at n, i0, i1, 0, or null where a tap falls outside
const char* line_of(const Conv& v, const Position& at, int64_t line) {
  const int64_t K1 = v.w.shape[2], i0 = v.at(0, at.p[0], line / K1), i1 = v.at(1, at.p[1], line % K1);
  if (i0 < 0 || i1 < 0) return nullptr;
  return v.x.data + (at.n * v.x.strides[0] + i0 * v.x.strides[1] + i1 * v.x.strides[2]) * ITEM_SIZE[v.x.dtype];
}

template <class T> void fill_line(const Conv& v, Load<T> load, const Position& at, int64_t group, int64_t line, T* to) {
  const char* from = line_of(v, at, line);
  const int64_t C = v.C, K2 = v.w.shape[3], item = ITEM_SIZE[v.x.dtype];
  if (!from) {
    memset(to, 0, v.line * sizeof(T));
  } else if (v.joined) {
    const int64_t q = at.p[2] * v.stride[2] - v.before[2], a = q < 0 ? least(-q, K2) : 0;
    const int64_t inside = v.x.shape[3] - q < K2 ? v.x.shape[3] - q : K2, b = inside < a ? a : inside;
    memset(to, 0, a * C * sizeof(T));
    load(to + a * C, from + (q + a) * C * item, 1, (b - a) * C);
    memset(to + b * C, 0, (K2 - b) * C * sizeof(T));
  } else {
    for (int64_t t = 0; t < K2; t++, to += C) {
      const int64_t i = v.at(2, at.p[2], t);
      if (i < 0) memset(to, 0, C * sizeof(T));
      else load(to, from + (i * v.x.strides[3] + group * C) * item, 1, C);
    }
  }
}

// 16 output channels of a group, from `first` on -> columns of its panel [lines line][width]
template <class T> void pack_weight(const Conv& v, int64_t group, int64_t first, T* panels) {
  const int64_t K = v.lines * v.line, width = v.width(), item = ITEM_SIZE[v.w.dtype], n = least(v.O - first, LANES);
  T* to = panels + (group * v.panels() + first / width) * v.panel_size() + first % width;
  const char* from = v.w.data + (group * v.O + first) * K * item;
  if constexpr (Same<T, float>::value)
    if (n == LANES) return columns_f32(v.w.dtype, from, K * item, K, to, width);
  const Load<T> load = loader<T>(v.w.dtype);
  T numbers[LANES][64];
  memset(numbers, 0, sizeof numbers);
  for (int64_t k = 0, m; k < K; k += m) {
    m = least(K - k, 64);
    for (int64_t j = 0; j < n; j++) load(numbers[j], from + (j * K + k) * item, 1, m);
    for (int64_t i = 0; i < m; i++)
      for (int j = 0; j < LANES; j++) to[(k + i) * width + j] = numbers[j][i];
  }
}

template <class T> struct Work { T *patches, *sums; };  // [MB][depth], [panels][MB][width]
template <class T> size_t work_size(const Conv& v) {
  return (round_up(MB, FLOAT_MR) * (v.block_lines() * v.line + v.panels() * v.width())) * sizeof(T);
}

// output positions [begin, begin + rows) of a group, panels [first, last)
template <class T>
void product(const Conv& v, Load<T> load, Store<T> put, const T* panels, int64_t group, int64_t begin, int64_t rows,
             int64_t first, int64_t last, const Work<T>& w) {
  const int64_t width = v.width(), height = round_up(MB, FLOAT_MR), most = v.block_lines(), ldx = most * v.line;
  constexpr int L = 4 * W / sizeof(T);
  for (int64_t l = 0; l < v.lines; l += most) {
    const int64_t count = least(most, v.lines - l);
    for (int64_t i = 0; i < rows; i++) {
      const Position at = position(v, begin + i);
      for (int64_t j = 0; j < count; j++) fill_line(v, load, at, group, l + j, w.patches + i * ldx + j * v.line);
    }
    for (int64_t p = first; p < last; p++) {
      const T* panel = panels + (group * v.panels() + p) * v.panel_size() + l * v.line * width;
      const auto tile = width % (FLOAT_NV * L) ? float_tile<FLOAT_MR, 1, T> : float_tile<FLOAT_MR, FLOAT_NV, T>;
      for (int64_t i = 0; i < rows; i += FLOAT_MR)
        tile(panel, width, count * v.line, w.patches + i * ldx, ldx, w.sums + (p * height + i) * width, l, width, (int)width, 1);
    }
  }
  const int64_t item = ITEM_SIZE[v.o.dtype], row = v.groups * v.O;
  for (int64_t p = first; p < last; p++)
    for (int64_t i = 0; i < rows; i++)
      put(v.o.data + ((begin + i) * row + group * v.O + p * width) * item, w.sums + (p * height + i) * width, 1,
          least(v.O - p * width, width));
}

template <class T> void by_matrices(const Conv& v, Team& team) {
  const int64_t stripes = (v.O + LANES - 1) / LANES;
  T* panels = (T*)team.shared;
  int64_t begin, end;
  team.part(v.groups * stripes, 1, &begin, &end);
  for (; begin < end; begin++) pack_weight(v, begin / stripes, begin % stripes * LANES, panels);
  team.barrier();
  const Work<T> w = {(T*)team.local, (T*)team.local + round_up(MB, FLOAT_MR) * v.block_lines() * v.line};
  const int64_t strips = (v.positions + MB - 1) / MB, enough = 3 * team.size;
  const int64_t wanted = strips * v.groups >= enough ? 1 : (enough + strips * v.groups - 1) / (strips * v.groups);
  const int64_t parts = least(wanted, v.panels());                                 // of the panels, where strips are few
  for (int64_t i; (i = team.take(1)) < strips * v.groups * parts;) {
    const int64_t strip = i / (v.groups * parts) * MB, group = i / parts % v.groups, part = i % parts;
    product(v, loader<T>(v.x.dtype), storer<T>(v.o.dtype), panels, group, strip, least(v.positions - strip, MB),
            v.panels() * part / parts, v.panels() * (part + 1) / parts, w);
  }
}

// sums[c] = sum over the taps of x[tap][c] w[tap][c], a few registers of channels at a time
template <class T> struct Tap { const T *x, *w; };
template <class T> void sum_taps(const Tap<T>* taps, int64_t count, int64_t C, T* sums) {
  typedef typename Wide<T>::type V;
  constexpr int64_t L = 4 * W / sizeof(T);
  int64_t c = 0;
  for (; c + 4 * L <= C; c += 4 * L) {
    V some[4] = {};
    for (int64_t t = 0; t < count; t++)
      unrolled<4>(LZ_LAMBDA(i) { some[i] = load<V>(taps[t].x + c + i * L) * load<V>(taps[t].w + c + i * L) + some[i]; });
    unrolled<4>(LZ_LAMBDA(i) { store(sums + c + i * L, some[i]); });
  }
  for (; c < C; c++) {
    sums[c] = 0;
    for (int64_t t = 0; t < count; t++) sums[c] += taps[t].x[c] * taps[t].w[c];
  }
}

template <class T> void by_channels(const Conv& v, Team& team) {
  const int64_t C = v.groups, K2 = v.w.shape[3], count = v.lines * K2, item = ITEM_SIZE[v.x.dtype];
  const Load<T> load = loader<T>(v.x.dtype), load_weight = loader<T>(v.w.dtype);
  const Store<T> store = storer<T>(v.o.dtype);
  const bool direct = v.x.dtype == (sizeof(T) == 4 ? LZ_F32 : LZ_F64);
  T *weights = (T*)team.shared, *sums = (T*)team.local, *rows = sums + C;
  Tap<T>* taps = (Tap<T>*)(team.local + (count + 1) * C * 8);
  int64_t begin, end;
  team.part(count, 1, &begin, &end);
  for (; begin < end; begin++) load_weight(weights + begin * C, v.w.data + begin * ITEM_SIZE[v.w.dtype], count, C);
  team.barrier();
  team.part(v.positions, 1, &begin, &end);
  for (; begin < end; begin++) {
    const Position at = position(v, begin);
    int64_t inside = 0;
    for (int64_t l = 0; l < v.lines; l++) {
      const char* line = line_of(v, at, l);
      for (int64_t t = 0; line && t < K2; t++) {
        const int64_t i = v.at(2, at.p[2], t);
        if (i < 0) continue;
        const char* from = line + i * v.x.strides[3] * item;
        if (!direct) load(rows + inside * C, from, 1, C);
        taps[inside] = {direct ? (const T*)from : rows + inside * C, weights + (l * K2 + t) * C};
        inside++;
      }
    }
    sum_taps(taps, inside, C, sums);
    store(v.o.data + begin * C * ITEM_SIZE[v.o.dtype], sums, 1, C);
  }
}

template <class T> void run_as(const Conv& v, Team& team) { v.by_channel() ? by_channels<T>(v, team) : by_matrices<T>(v, team); }
void run(const Step& s, Team& team) { s.out->dtype == LZ_F64 ? run_as<double>(Conv(s), team) : run_as<float>(Conv(s), team); }

size_t shared(const Step& s, int) {
  const Conv v(s);
  const int64_t weights = v.by_channel() ? v.groups * v.lines * v.line : v.groups * v.panels() * v.panel_size();
  return weights * (s.out->dtype == LZ_F64 ? 8 : 4);
}
size_t local(const Step& s, int) {
  const Conv v(s);
  const int64_t taps = v.lines * v.w.shape[3];
  if (v.by_channel()) return (taps + 1) * v.groups * 8 + taps * sizeof(Tap<double>);
  return s.out->dtype == LZ_F64 ? work_size<double>(v) : work_size<float>(v);
}

bool is_real(int dtype) { return dtype == LZ_F32 || dtype == LZ_F16 || dtype == LZ_BF16; }
bool whole(const View& v) {
  int64_t size = 1;
  for (int i = v.ndim - 1; i >= 0; size *= v.shape[i--])
    if (v.shape[i] != 1 && v.strides[i] != size) return false;
  return true;
}
const char* check(const Step& s) {
  if (s.n_in != 2 || s.n_out != 1 || s.n_int != 14) return "wants one output, inputs x, w, and 14 ints";
  const View &x = s.in[0], &w = s.in[1], &o = s.out[0];
  if (x.ndim != 5 || w.ndim != 5 || o.ndim != 5) return "wants arrays of five axes";
  for (int i = 0; i < 12; i++)
    if (s.ints[i] < 1 && (i < 3 || i > 5)) return "strides and dilations must be at least 1";
  if (s.ints[12] < 1 || x.shape[4] != w.shape[4] * s.ints[12] || o.shape[4] != w.shape[0] || o.shape[4] % s.ints[12])
    return "the channels of x, w and the output do not fit the groups";
  if (x.shape[0] != o.shape[0]) return "x and the output differ in N";
  const bool doubles = o.dtype == LZ_F64 && x.dtype == LZ_F64 && w.dtype == LZ_F64;
  if (!doubles && !(is_real(o.dtype) && is_real(x.dtype) && is_real(w.dtype))) return "wants float32, float16 and bfloat16, or only float64";
  return whole(w) && whole(o) && (x.shape[4] == 1 || x.strides[4] == 1) ? nullptr : "w, the output and rows of x must be contiguous";
}

}  // namespace

extern const Kernel conv;
const Kernel conv = {"conv", run, shared, local, check};

LZ_NAMESPACE_END

// linear: y_j = act(norm(x)) W_j^T + bias_j for up to 4 weights that share x, in one dispatch. gather: products with
// matrices chosen by index, also across. experts: two products, each by the matrices of the expert that a token chose.
// What the steps mean: engine/cpu/kernels/{linear,grouped,quantized_matmul}.cpp.
//
//   x (T, K), W_j (N_j, K) of floats or of codes with scales and biases (FORMAT of codes.h), y_j (T, N_j)
//   bytes: weights once for 8 tokens (up to 16), then for 32; x, from the caches, once for 8 or 64 rows
//   plain loop: for t, n: y[t][n] = sum_k x[t][k] w[n][k]
//
// TOKENS 1 ... 8: 64 threads = 2 simdgroups of 4 rows. A lane takes 16 codes (4 floats) at a time, so that a simdgroup
//   reads 512 neighbours. One token: x is divided by the place of its code in a word, so that codes are masked and not
//   shifted, and a group's sides meet sums: scale sum(x code) + bias sum(x). More tokens: codes become numbers once.
// TOKENS 32: 128 threads = 2 x 2 simdgroups. 64 rows, 32 tokens and 32 columns of K at a time lie in threadgroup memory
//   as floats; a simdgroup has 2 x 4 accumulators of 8 x 8.
// RMSNorm falls out of both loops: y = W (x gain) / rms(x), for a threadgroup sees all of its tokens. Gates are the
// first half of a tile's rows, what they multiply the second, so that the epilogue finds both.
// A third way, matmul2d of the M5 on tiles of 64 x 64, would be another `multiply`.
#include "common.h"

constant int K         [[function_constant(0)]];   // inner size
constant int N0        [[function_constant(1)]];   // rows of each weight, 0 if there is none
constant int N1        [[function_constant(2)]];
constant int N2        [[function_constant(3)]];
constant int N3        [[function_constant(4)]];
constant int EPILOGUE  [[function_constant(5)]];   // 0 none, 1 + residual, 2 silu, 3 gelu, 4 gelu_tanh, 5 clamped swish
constant bool NORM     [[function_constant(6)]];
constant bool HAS_BIAS [[function_constant(7)]];
constant bool ACROSS   [[function_constant(8)]];   // the matrix is (K, N)
constant bool GATHERED [[function_constant(9)]];
constant bool DOWN     [[function_constant(10)]];  // the second product of experts
constant int CHOICES   [[function_constant(11)]];  // experts a token
constant int MATRICES  [[function_constant(12)]];
constant int SOURCES   [[function_constant(13)]];  // matrices of x

#define THREADS (TOKENS > 8 ? 128 : 64)
constant constexpr bool TILED = TOKENS > 8;
constant constexpr int UNIT = FORMAT || TILED ? 16 : 4;     // columns that a thread reads at a time
constant constexpr int PART = TOKENS > 1 && FORMAT ? 8 : UNIT;  // and of them as numbers: registers are few
constant constexpr int TILE = TILED ? 64 : 8, ROWS = 4;     // rows of a threadgroup, of a simdgroup
constant constexpr int LINE = 32 + 4, OUT = TILE + 4;       // padded, so that columns lie in different banks
constant constexpr int STAGE = TILED ? (TILE + TOKENS) * LINE : TOKENS * OUT;
constant constexpr int MOST_CHOICES = 16, MOST_EXPERTS = 1024;

struct Params { int tokens, stride; float eps; };           // stride of x's rows, in elements

// Rows of numbers: floats, or words of 16 bits with the sides of each group
struct Matrix { device const WEIGHT* w; device const SCALE* scales; device const SCALE* biases; };

METAL_FUNC size_t line(int columns) { return FORMAT ? columns / 16 * BITS : columns; }
METAL_FUNC size_t sides(int columns) { return FORMAT ? columns / GROUP : 0; }

METAL_FUNC Matrix matrix_at(int index, device const WEIGHT* w, device const SCALE* scales, device const SCALE* biases) {
  const size_t rows = size_t(index) * (ACROSS ? K : N0);
  const int columns = ACROSS ? N0 : K;
  Matrix m = {w + rows * line(columns), scales + rows * sides(columns), biases + rows * sides(columns)};
  return m;
}

// The numbers first ... first + COUNT of a row's unit at column k, 0 past the end
template <int COUNT> METAL_FUNC void decode(Matrix m, size_t row, int k, int first, int columns, thread float* to) {
#if FORMAT
  device const ushort* q = m.w + row * line(columns) + k / 16 * BITS;
  const size_t group = row * sides(columns) + k / GROUP;
  const float scale = scale_of(m.scales[group]), bias = IS_FLOAT ? 0.0f : scale_of(m.biases[group]);
  UNROLL for (int i = 0; i < COUNT; i++) to[i] = code_at(q, first + i) * (unshift(first + i) * scale) + bias;
#else
  device const WEIGHT* w = m.w + row * columns + k;
  UNROLL for (int i = first; i < first + COUNT; i++) to[i - first] = k + i < columns ? float(w[i]) : 0.0f;
#endif
}

// A unit of a row times x, which has met unshift if it is of codes; sum: that of x before
METAL_FUNC float product(Matrix m, size_t row, int k, thread const float* x, float sum) {
  float y = 0.0f;
#if FORMAT
  device const ushort* q = m.w + row * line(K) + k / 16 * BITS;
  const size_t group = row * sides(K) + k / GROUP;
  UNROLL for (int i = 0; i < UNIT; i++) y += x[i] * code_at(q, i);
  return scale_of(m.scales[group]) * y + (IS_FLOAT ? 0.0f : scale_of(m.biases[group]) * sum);
#else
  float w[UNIT];
  decode<UNIT>(m, row, k, 0, K, w);
  UNROLL for (int i = 0; i < UNIT; i++) y += x[i] * w[i];
  return y;
#endif
}

METAL_FUNC bool gated() { return EPILOGUE >= 2; }
METAL_FUNC int span_of() { return gated() ? TILE / 2 : TILE; }
METAL_FUNC float gate(float v, float up) {
  if (EPILOGUE == 2) return silu(v) * up;
  if (EPILOGUE == 3) return gelu(v) * up;
  if (EPILOGUE == 4) return gelu_tanh(v) * up;
  v = min(v, 7.0f);
  return v * sigmoid(1.702f * v) * (clamp(up, -7.0f, 7.0f) + 1.0f);
}

#if TOKENS <= 8
// out[token][place] = 4 rows of m from `row` on, at most `last`, times the tokens. x: the first of `real` ones,
// `stride` apart; the others repeat the last.
static void multiply(Matrix m, int row, int last, device const X* x, int real, int stride, device const GAIN* gain,
                     float eps, threadgroup float* out, threadgroup float* factor, uint index, uint simdgroup,
                     uint lane) {
  float sums[TOKENS][ROWS], squares[TOKENS];
  UNROLL for (int t = 0; t < TOKENS; t++) {
    squares[t] = 0.0f;
    UNROLL for (int r = 0; r < ROWS; r++) sums[t][r] = 0.0f;
  }
  for (int k = int(lane) * UNIT; k < K; k += 32 * UNIT)
    UNROLL for (int first = 0; first < UNIT; first += PART) {
#if TOKENS > 1
      float w[ROWS][PART];
      UNROLL for (int r = 0; r < ROWS; r++) decode<PART>(m, min(row + r, last), k, first, K, w[r]);
#endif
      UNROLL for (int t = 0; t < TOKENS; t++) {
        float v[PART], sum = 0.0f;
        UNROLL for (int i = 0; i < PART; i++) {
          const int c = k + first + i;
          float a = FORMAT || c < K ? float(x[min(t, real - 1) * stride + c]) : 0.0f;
          if (NORM) {
            squares[t] += a * a;
            a *= FORMAT || c < K ? float(gain[c]) : 0.0f;
          }
          sum += a;
          v[i] = TOKENS == 1 && FORMAT ? a * unshift(i) : a;
        }
#if TOKENS > 1
        UNROLL for (int r = 0; r < ROWS; r++)
          UNROLL for (int i = 0; i < PART; i++) sums[t][r] += v[i] * w[r][i];
#else
        UNROLL for (int r = 0; r < ROWS; r++) sums[0][r] += product(m, min(row + r, last), k, v, sum);
#endif
      }
    }
  UNROLL for (int t = 0; t < TOKENS; t++) {
    const float4 y = simd_sum(float4(sums[t][0], sums[t][1], sums[t][2], sums[t][3]));
    if (lane < ROWS) out[t * OUT + simdgroup * ROWS + lane] = y[lane];
    if (!NORM) continue;
    const float s = simd_sum(squares[t]);
    if (index == 0) factor[t] = rsqrt(s / float(K) + eps);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
METAL_FUNC int my_row(uint, uint simdgroup) { return simdgroup * ROWS; }
METAL_FUNC int my_token(uint) { return 0; }
#else
// Four at a time, so that 8 threads meet 32 banks
template <int COUNT> METAL_FUNC void store(threadgroup float* to, thread const float* from) {
  UNROLL for (int i = 0; i < COUNT; i += 4)
    ((threadgroup float4*)to)[i / 4] = float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
}

// out[token][place] = 64 rows times 32 tokens. A thread brings half a row of m (if ACROSS a quarter of one of 32, from
// column `row` on) and a quarter of the token x, 0 if it is not real.
static void multiply(Matrix m, int row, int last, device const X* x, int real, int, device const GAIN* gain,
                     float eps, threadgroup float* out, threadgroup float* factor, uint index, uint simdgroup, uint) {
  threadgroup float* xs = out + TILE * LINE;
  const int down = index / 4, right = index % 4, step = ACROSS ? OUT : LINE;
  const int rows = simdgroup % 2 * 32, tokens = simdgroup / 2 * 16;
  simdgroup_float8x8 y[2][4];
  for (int i = 0; i < 2; i++) for (int j = 0; j < 4; j++) y[i][j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
  float squares = 0.0f;
  for (int k = 0; k < K; k += 32) {
    float w[UNIT], v[8];
    UNROLL for (int i = 0; i < UNIT; i++) w[i] = 0.0f;
    if (ACROSS) {
      if (k + down < K && row + right * 16 < N0) decode<UNIT>(m, k + down, row + right * 16, 0, N0, w);
    } else if (k + int(index) % 2 * 16 < K) {
      decode<UNIT>(m, min(row, last), k + index % 2 * 16, 0, K, w);
    }
    UNROLL for (int i = 0; i < 8; i++) {
      const int c = k + right * 8 + i;
      v[i] = real > 0 && c < K ? float(x[c]) : 0.0f;
      if (NORM) {
        squares += v[i] * v[i];
        v[i] *= c < K ? float(gain[c]) : 0.0f;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the products before have been read
    store<UNIT>(ACROSS ? out + down * OUT + right * 16 : out + index / 2 * LINE + index % 2 * 16, w);
    store<8>(xs + down * LINE + right * 8, v);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int c = 0; c < 32; c += 8) {
      simdgroup_float8x8 a[2], b[4];
      for (int i = 0; i < 2; i++) simdgroup_load(a[i], xs + (tokens + 8 * i) * LINE + c, LINE);
      for (int j = 0; j < 4; j++)
        simdgroup_load(b[j], ACROSS ? out + c * OUT + rows + 8 * j : out + (rows + 8 * j) * LINE + c, step, ulong2(0),
                       !ACROSS);
      simdgroup_barrier(mem_flags::mem_none);  // loads stay together, ahead of what uses them
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) simdgroup_multiply_accumulate(y[i][j], a[i], b[j], y[i][j]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 4; j++) simdgroup_store(y[i][j], out + (tokens + 8 * i) * OUT + rows + 8 * j, OUT);
  if (NORM) {
    squares += simd_shuffle_xor(squares, 1);
    squares += simd_shuffle_xor(squares, 2);
    if (right == 0) factor[down] = rsqrt(squares / float(K) + eps);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
METAL_FUNC int my_row(uint index, uint) { return index / 2; }
METAL_FUNC int my_token(uint index) { return index / 4; }
#endif

// What follows the product of row n, with bias c, and of the row that it gates, with bias d.
METAL_FUNC float finish(threadgroup const float* out, threadgroup const float* factor, int token, int row, int n,
                        device const BIAS* c, device const BIAS* d) {
  const float f = NORM ? factor[token] : 1.0f;
  float v = out[token * OUT + row] * f;
  if (HAS_BIAS) v += float(c[n]);
  if (!gated()) return v;
  float up = out[token * OUT + row + TILE / 2] * f;
  if (HAS_BIAS) up += float(d[n]);
  return gate(v, up);
}

#define WEIGHT_OF(a) (N1 && at == 1 ? a##1 : N2 && at == 2 ? a##2 : N3 && at == 3 ? a##3 : a##0)

[[max_total_threads_per_threadgroup(THREADS)]]
kernel void linear(device const X* x [[buffer(0)]], device const GAIN* gain [[buffer(1)]],
                   device const float* residual [[buffer(2)]], constant Params& p [[buffer(3)]],
                   device const WEIGHT* w0 [[buffer(4)]], device const SCALE* s0 [[buffer(5)]],
                   device const SCALE* b0 [[buffer(6)]], device const BIAS* c0 [[buffer(7)]],
                   device float* y0 [[buffer(8)]],
                   device const WEIGHT* w1 [[buffer(9)]], device const SCALE* s1 [[buffer(10)]],
                   device const SCALE* b1 [[buffer(11)]], device const BIAS* c1 [[buffer(12)]],
                   device float* y1 [[buffer(13)]],
                   device const WEIGHT* w2 [[buffer(14)]], device const SCALE* s2 [[buffer(15)]],
                   device const SCALE* b2 [[buffer(16)]], device const BIAS* c2 [[buffer(17)]],
                   device float* y2 [[buffer(18)]],
                   device const WEIGHT* w3 [[buffer(19)]], device const SCALE* s3 [[buffer(20)]],
                   device const SCALE* b3 [[buffer(21)]], device const BIAS* c3 [[buffer(22)]],
                   device float* y3 [[buffer(23)]],
                   uint2 tile [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float4 stage[STAGE / 4];
  threadgroup float* out = (threadgroup float*)stage;
  threadgroup float factor[TOKENS];
  const int span = span_of(), first = tile.y * TOKENS;
  int at = 0, row0 = int(tile.x) * span;  // which weight, and its first row
  UNROLL for (int j = 1; j < 4; j++)
    if (row0 >= WEIGHT_OF(N)) {
      row0 -= (WEIGHT_OF(N) + span - 1) / span * span;
      at = j;
    }
  const int N = WEIGHT_OF(N), mine = my_row(index, simdgroup), token = first + my_token(index);
  Matrix m = matrix_at(0, WEIGHT_OF(w), WEIGHT_OF(s), WEIGHT_OF(b));
  if (gated() && mine >= span) m = matrix_at(0, w1, s1, b1);
  multiply(m, row0 + mine % span, N - 1, x + size_t(token) * p.stride, p.tokens - token, p.stride, gain, p.eps, out,
           factor, index, simdgroup, lane);
  device float* y = WEIGHT_OF(y);
  for (int i = index; i < span * TOKENS; i += THREADS) {
    const int t = i / span, n = row0 + i % span;
    if (n >= N || first + t >= p.tokens) continue;
    const size_t to = size_t(first + t) * N + n;
    y[to] = finish(out, factor, t, i % span, n, WEIGHT_OF(c), c1) + (EPILOGUE == 1 ? residual[to] : 0.0f);
  }
}

// Which of `count` matrices an index means: the first if it is out of range, which the run reports.
METAL_FUNC int chosen_of(int index, int count, device atomic_int* fault) {
  return max(int(resolve(index, count, fault)), 0);
}

// gather: y[r] (tokens, N) = x[lhs[r]] (tokens, K) times matrix rhs[r], of SOURCES and MATRICES; or one product.
[[max_total_threads_per_threadgroup(THREADS)]]
kernel void gather(device const X* x [[buffer(0)]], device const WEIGHT* w [[buffer(1)]],
                   device const SCALE* scales [[buffer(2)]], device const SCALE* biases [[buffer(3)]],
                   device const int* lhs [[buffer(4)]], device const int* rhs [[buffer(5)]],
                   constant Params& p [[buffer(6)]], device float* y [[buffer(7)]],
                   device atomic_int* fault [[buffer(8)]], uint3 tile [[threadgroup_position_in_grid]],
                   uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float4 stage[STAGE / 4];
  threadgroup float* out = (threadgroup float*)stage;
  threadgroup float factor[TOKENS];
  const int source = GATHERED ? chosen_of(lhs[tile.z], SOURCES, fault) : 0;
  const int row0 = tile.x * TILE, first = tile.y * TOKENS, token = first + my_token(index);
  const Matrix m = matrix_at(GATHERED ? chosen_of(rhs[tile.z], MATRICES, fault) : 0, w, scales, biases);
  multiply(m, ACROSS ? row0 : row0 + my_row(index, simdgroup), N0 - 1,
           x + (size_t(source) * p.tokens + token) * p.stride, p.tokens - token, p.stride, (device const GAIN*)x, 0.0f,
           out, factor, index, simdgroup, lane);
  for (int i = index; i < TILE * TOKENS; i += THREADS) {
    const int t = i / TILE, n = row0 + i % TILE;
    if (n < N0 && first + t < p.tokens) y[(size_t(tile.z) * p.tokens + first + t) * N0 + n] = out[t * OUT + i % TILE];
  }
}

// experts: a pair is a token and one of its CHOICES experts. First gate and up, a row for each pair, then down.
// Few pairs: each reads its own matrices, and down's choices are simdgroups of one threadgroup, which adds them up.
// Many: pairs are sorted by expert (`places`), tiles of 32 listed as (expert, first place, end), a last pass adds up.

METAL_FUNC bool is_of(int expert, int index) { return index == expert || index == expert - MATRICES; }

[[max_total_threads_per_threadgroup(1024)]]
kernel void experts_sort(device const int* chosen [[buffer(0)]], device int* places [[buffer(1)]],
                         device int* tiles [[buffer(2)]], constant Params& p [[buffer(3)]],
                         device atomic_int* fault [[buffer(4)]], uint index [[thread_index_in_threadgroup]]) {
  threadgroup int counts[MOST_EXPERTS];
  const int expert = index;
  int count = 0, place = 0, tile = 0;
  for (int i = expert; i < p.tokens; i += MATRICES) resolve(chosen[i], MATRICES, fault);
  for (int i = 0; i < p.tokens; i++) count += is_of(expert, chosen[i]);
  counts[expert] = count;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (expert >= MATRICES) return;
  for (int i = 0; i < expert; i++) {
    place += counts[i];
    tile += (counts[i] + 31) / 32;
  }
  for (int i = 0, to = place; i < p.tokens; i++)
    if (is_of(expert, chosen[i])) places[to++] = i;
  const int end = place + count;
  for (; place < end || (expert == MATRICES - 1 && tile < p.stride); tile++) {  // the last one's, empty, to the end
    tiles[3 * tile] = expert;
    tiles[3 * tile + 1] = place;
    place = min(place + 32, end);
    tiles[3 * tile + 2] = place;
  }
}

[[max_total_threads_per_threadgroup(THREADS)]]
kernel void experts(device const X* x [[buffer(0)]], device const int* chosen [[buffer(1)]],
                    device const int* places [[buffer(2)]], device const int* tiles [[buffer(3)]],
                    constant Params& p [[buffer(4)]],
                    device const WEIGHT* w0 [[buffer(5)]], device const SCALE* s0 [[buffer(6)]],
                    device const SCALE* b0 [[buffer(7)]], device const BIAS* c0 [[buffer(8)]],
                    device const WEIGHT* w1 [[buffer(9)]], device const SCALE* s1 [[buffer(10)]],
                    device const SCALE* b1 [[buffer(11)]], device const BIAS* c1 [[buffer(12)]],
                    device float* y [[buffer(13)]], device atomic_int* fault [[buffer(14)]],
                    uint2 tile [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float4 stage[STAGE / 4];
  threadgroup float* out = (threadgroup float*)stage;
  threadgroup float factor[TOKENS];
  const int expert = TILED ? tiles[3 * tile.y] : chosen_of(chosen[tile.y], MATRICES, fault);
  const int first = TILED ? tiles[3 * tile.y + 1] : tile.y, end = TILED ? tiles[3 * tile.y + 2] : first + 1;
  if (first >= end) return;
  const int span = span_of(), row0 = tile.x * span, mine = my_row(index, simdgroup);
  const int place = first + my_token(index);
  const int source = DOWN ? place : (TILED ? places[min(place, end - 1)] : place) / CHOICES;
  Matrix m = matrix_at(expert, w0, s0, b0);
  if (gated() && mine >= span) m = matrix_at(expert, w1, s1, b1);
  multiply(m, row0 + mine % span, N0 - 1, x + size_t(source) * p.stride, end - place, 0, (device const GAIN*)x, 0.0f,
           out, factor, index, simdgroup, lane);
  const size_t side = size_t(expert) * N0;
  for (int i = index; i < span * TOKENS; i += THREADS) {
    const int t = i / span, n = row0 + i % span;
    if (n >= N0 || first + t >= end) continue;
    const int to = DOWN ? places[first + t] : first + t;
    y[size_t(to) * N0 + n] = finish(out, factor, t, i % span, n, c0 + side, c1 + side);
  }
}

[[max_total_threads_per_threadgroup(512)]]
kernel void experts_down(device const X* x [[buffer(0)]], device const int* chosen [[buffer(1)]],
                         device const float* share [[buffer(2)]], device const WEIGHT* w [[buffer(3)]],
                         device const SCALE* scales [[buffer(4)]], device const SCALE* biases [[buffer(5)]],
                         device const BIAS* c [[buffer(6)]], device float* y [[buffer(7)]],
                         device atomic_int* fault [[buffer(8)]], uint2 tile [[threadgroup_position_in_grid]],
                         uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                         uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float out[TILED ? STAGE : MOST_CHOICES * ROWS];
  threadgroup float factor[TOKENS];
  const int first = tile.y * CHOICES, pair = first + simdgroup, row0 = tile.x * ROWS, n = row0 + index;
  const Matrix m = matrix_at(chosen_of(chosen[pair], MATRICES, fault), w, scales, biases);
  multiply(m, row0, N0 - 1, x + size_t(pair) * K, 1, 0, (device const GAIN*)x, 0.0f, out, factor, index, simdgroup,
           lane);
  if (index >= ROWS || n >= N0) return;
  float sum = 0.0f;
  for (int j = 0; j < CHOICES; j++) {
    float v = out[j * ROWS + index];
    if (HAS_BIAS) v += float(c[size_t(chosen_of(chosen[first + j], MATRICES, fault)) * N0 + n]);
    sum += share[first + j] * v;
  }
  y[size_t(tile.y) * N0 + n] = sum;
}

kernel void experts_sum(device const float* x [[buffer(0)]], device const float* share [[buffer(1)]],
                        device float* y [[buffer(2)]], uint2 tile [[threadgroup_position_in_grid]],
                        uint index [[thread_index_in_threadgroup]]) {
  const int n = tile.x * 64 + index, first = tile.y * CHOICES;
  if (n >= N0) return;
  float sum = 0.0f;
  for (int j = 0; j < CHOICES; j++) sum += share[first + j] * x[size_t(first + j) * N0 + n];
  y[size_t(tile.y) * N0 + n] = sum;
}

// matmul: o (..., M, N) = a (..., M, K) b (..., K, N): float32, float16 and bfloat16 in any mixture, any strides, batch axes
// that may repeat. Sums are float32.
//
//   matmul  64 x 64 results a threadgroup, 16 of K at a time: 4 simdgroups of 32 x 32, 16 accumulators of 8 x 8 each. The
//           tiles of a and b are staged as floats, read along the axis on which they lie in a row; what is beyond the edges
//           is 0. Results leave through 8 x 8 of threadgroup memory for each simdgroup, which guards the edges.
//   matvec  few rows or columns, one by one: o[j] = sum_k m[j][k] v[k]. 32 x 8 threads have 8 results, each a simdgroup's, or,
//           BESIDE, where neighbours of m lie along j, 32 results, whose k they share eight ways.
#include "common.h"

constant int A [[function_constant(0)]];           // dtypes
constant int B [[function_constant(1)]];
constant int O [[function_constant(2)]];
constant bool A_TURNED [[function_constant(3)]];   // a lies in a row along M, not along K
constant bool B_TURNED [[function_constant(4)]];   // b along K, not along N
constant int BATCH [[function_constant(5)]];       // axes
constant bool WIDE [[function_constant(6)]];
constant bool BESIDE [[function_constant(7)]];

struct Params {
  int m, n, k;
  int a[2], b[2], o[2];                            // strides along the two axes of each
  uint shape[8];                                   // of the batch
  int batch[3][8];                                 // strides of a, b, o along it
};

constant constexpr int TILE = 64, DEPTH = 16, A_ROW = DEPTH + 4, B_ROW = TILE + 4;  // padded, against bank conflicts

kernel void matmul(device const uchar* a [[buffer(0)]], device const uchar* b [[buffer(1)]], device uchar* o [[buffer(2)]],
                   constant Params& p [[buffer(3)]], uint3 group [[threadgroup_position_in_grid]],
                   uint thread_index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float left[TILE * A_ROW];
  threadgroup float right[DEPTH * B_ROW];
  threadgroup float corner[4 * 64];
  const int m0 = group.y * TILE, n0 = group.x * TILE;
  const int row = simdgroup / 2 * 32, column = simdgroup % 2 * 32;
  long from_a = offset(group.z, BATCH, WIDE, p.shape, p.batch[0]) + long(m0) * p.a[0];
  long from_b = offset(group.z, BATCH, WIDE, p.shape, p.batch[1]) + long(n0) * p.b[1];
  simdgroup_float8x8 sums[4][4];
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) sums[i][j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
  for (int k0 = 0; k0 < p.k; k0 += DEPTH) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = thread_index; e < TILE * DEPTH; e += 128) {
      const int r = A_TURNED ? e % TILE : e / DEPTH, k = A_TURNED ? e / TILE : e % DEPTH;
      const bool inside = m0 + r < p.m && k0 + k < p.k;
      left[r * A_ROW + k] = inside ? get<float>(a, A, from_a + r * p.a[0] + k * p.a[1]) : 0.0f;
    }
    for (int e = thread_index; e < TILE * DEPTH; e += 128) {
      const int c = B_TURNED ? e / DEPTH : e % TILE, k = B_TURNED ? e % DEPTH : e / TILE;
      const bool inside = n0 + c < p.n && k0 + k < p.k;
      right[k * B_ROW + c] = inside ? get<float>(b, B, from_b + k * p.b[0] + c * p.b[1]) : 0.0f;
    }
    from_a += long(DEPTH) * p.a[1];
    from_b += long(DEPTH) * p.b[0];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < DEPTH; k += 8) {
      simdgroup_float8x8 x[4], y[4];
      for (int i = 0; i < 4; i++) simdgroup_load(x[i], left + (row + 8 * i) * A_ROW + k, A_ROW);
      for (int j = 0; j < 4; j++) simdgroup_load(y[j], right + k * B_ROW + column + 8 * j, B_ROW);
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) simdgroup_multiply_accumulate(sums[i][j], x[i], y[j], sums[i][j]);
    }
  }
  const long to = offset(group.z, BATCH, WIDE, p.shape, p.batch[2]);
  for (int i = 0; i < 4; i++) {
    for (int j = 0; j < 4; j++) {
      const int m = m0 + row + 8 * i, n = n0 + column + 8 * j;
      if (m >= p.m || n >= p.n) continue;          // the same for the whole simdgroup
      simdgroup_store(sums[i][j], corner + 64 * simdgroup, 8);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      for (int e = lane; e < 64; e += 32)
        if (m + e / 8 < p.m && n + e % 8 < p.n)
          put<float>(o, O, to + long(m + e / 8) * p.o[0] + long(n + e % 8) * p.o[1], corner[64 * simdgroup + e]);
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
}

// a: the matrix (n rows of k), b: the vector
kernel void matvec(device const uchar* a [[buffer(0)]], device const uchar* b [[buffer(1)]], device uchar* o [[buffer(2)]],
                   constant Params& p [[buffer(3)]], uint3 group [[threadgroup_position_in_grid]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float part[8 * 32];
  const int n = BESIDE ? group.x * 32 + lane : group.x * 8 + simdgroup;
  const int first = BESIDE ? simdgroup : lane, step = BESIDE ? 8 : 32;
  const long matrix = offset(group.z, BATCH, WIDE, p.shape, p.batch[0]) + long(n) * p.a[0];
  const long vector = offset(group.z, BATCH, WIDE, p.shape, p.batch[1]);
  float sum = 0.0f;
  if (n < p.n)
    for (int k = first; k < p.k; k += step)
      sum += get<float>(a, A, matrix + long(k) * p.a[1]) * get<float>(b, B, vector + long(k) * p.b[0]);
  if (BESIDE) {
    part[simdgroup * 32 + lane] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int s = 1; s < 8 && simdgroup == 0; s++) sum += part[s * 32 + lane];
  } else {
    sum = simd_sum(sum);
  }
  if (n < p.n && (BESIDE ? simdgroup : lane) == 0)
    put<float>(o, O, offset(group.z, BATCH, WIDE, p.shape, p.batch[2]) + long(n) * p.o[0], sum);
}

// scatter: o (A, N, C) op= updates (A, I, C) at indices (A, I, C): o[a][indices[a][i][c]][c] op= updates[a][i][c] for i in
// order. OP: 0 set 1 add 2 multiply 3 maximum 4 minimum. T: float, or long or ulong, which wrap. A thread has a column
// (a, c): neighbours work on neighbours of one row, and sums are those of the CPU, to the last bit.
#include "common.h"

constant int OP [[function_constant(0)]];
constant int INDEX [[function_constant(1)]];       // dtypes
constant int DTYPE [[function_constant(2)]];

struct Params { int columns, count, rows, o[3], updates[3], indices[3]; };  // strides along A, N (or I), C

#ifndef T
#define T float
#endif
METAL_FUNC float add(float a, float b) { return a + b; }
METAL_FUNC float multiply(float a, float b) { return a * b; }
template <typename I> METAL_FUNC I add(I a, I b) { return I(ulong(a) + ulong(b)); }
template <typename I> METAL_FUNC I multiply(I a, I b) { return I(ulong(a) * ulong(b)); }
METAL_FUNC T update(T a, T b) {
  switch (OP) {
    case 0: return b;
    case 1: return add(a, b);
    case 2: return multiply(a, b);
    case 3: return a > b || a != a ? a : b;
    default: return a < b || a != a ? a : b;
  }
}

kernel void scatter(device const uchar* updates [[buffer(0)]], device const uchar* indices [[buffer(1)]],
                    device uchar* o [[buffer(2)]], device atomic_int* fault [[buffer(3)]], constant Params& p [[buffer(4)]],
                    uint2 at [[thread_position_in_grid]]) {
  const long a = at.y, c = at.x;
  if (c >= p.columns) return;
  for (long i = 0; i < p.count; i++) {
    const long row = resolve(get<long>(indices, INDEX, a * p.indices[0] + i * p.indices[1] + c * p.indices[2]), p.rows, fault);
    if (row < 0) return;
    const long to = a * p.o[0] + row * p.o[1] + c * p.o[2];
    const T b = get<T>(updates, DTYPE, a * p.updates[0] + i * p.updates[1] + c * p.updates[2]);
    put<T>(o, DTYPE, to, update(get<T>(o, DTYPE, to), b));
  }
}

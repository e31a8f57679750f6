// take:           o (A, I, C) = x (A, N, C)[:, indices (I)], any dtype.
// take_along:     o (A, I, C) = x (A, N, C)[a][indices[a][i][c]][c].
// quantized_take: o (I, K) float32 = rows indices (I) of a quantized matrix.
// A thread has one item. A negative index counts from the end; one out of range is reported, and its items stay as they are.
#include "common.h"

constant int SIZE [[function_constant(0)]];        // of an item, in bytes
constant int INDEX [[function_constant(1)]];       // dtypes
constant int SCALE [[function_constant(2)]];
constant int CODES [[function_constant(3)]];       // the format of codes.h
constant int SHARED [[function_constant(4)]];      // columns with one scale

struct Params { int columns, count, rows, o[3], x[3], indices[3]; };  // strides along A, I (or N), C

METAL_FUNC void copy(device uchar* to, long i, device const uchar* from, long k) {
  switch (SIZE) {
    case 1: to[i] = from[k]; break;
    case 2: ((device ushort*)to)[i] = ((device const ushort*)from)[k]; break;
    case 4: ((device uint*)to)[i] = ((device const uint*)from)[k]; break;
    default: ((device ulong*)to)[i] = ((device const ulong*)from)[k];
  }
}
METAL_FUNC long place(constant int* strides, long a, long i, long c) { return a * strides[0] + i * strides[1] + c * strides[2]; }

kernel void take(device const uchar* x [[buffer(0)]], device const uchar* indices [[buffer(1)]], device uchar* o [[buffer(2)]],
                 device atomic_int* fault [[buffer(3)]], constant Params& p [[buffer(4)]], uint3 at [[thread_position_in_grid]]) {
  if (int(at.x) >= p.columns || int(at.y) >= p.count) return;
  const long row = resolve(get<long>(indices, INDEX, place(p.indices, at.z, at.y, at.x)), p.rows, fault);
  if (row >= 0) copy(o, place(p.o, at.z, at.y, at.x), x, place(p.x, at.z, row, at.x));
}

kernel void quantized_take(device const uint* w [[buffer(0)]], device const uchar* scales [[buffer(1)]],
                           device const uchar* biases [[buffer(2)]], device const uchar* indices [[buffer(3)]],
                           device float* o [[buffer(4)]], device atomic_int* fault [[buffer(5)]],
                           constant Params& p [[buffer(6)]], uint2 at [[thread_position_in_grid]]) {
  if (int(at.x) >= p.columns || int(at.y) >= p.count) return;
  const long row = resolve(get<long>(indices, INDEX, place(p.indices, 0, at.y, 0)), p.rows, fault);
  if (row < 0) return;
  device const uint* codes = w + row * (p.columns * long(CODES & 15) / 32);
  const long side = row * (p.columns / SHARED) + at.x / SHARED;
  o[place(p.o, 0, at.y, at.x)] = weight_at(codes, at.x, scales, biases, side, SCALE, CODES, SHARED);
}

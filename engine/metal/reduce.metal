// reduce: o (kept axes) = a fold of x (kept axes, then reduced ones), any dtype and strides. OP: 0 sum 1 prod 2 max 3 min
// 4 any 5 all 6 argmax 7 argmin (the first index wins, NaN before all). T: float, or long or ulong, which wrap.
//
// LANES threads work on one result. They sit side by side (a row: neighbours read neighbours), or, BESIDE, LANES rows of
// threads whose neighbours have neighbouring results (a column). Each folds blocks of 16 items, so that sums stay near
// pairwise ones; then the lanes meet in threadgroup memory. Where results are few and long, each is cut into CHUNKS whose
// parts the same kernel folds in a second launch.
#include "common.h"

constant int OP [[function_constant(0)]];
constant int DTYPE [[function_constant(1)]];       // of x
constant int OUT [[function_constant(2)]];         // of o
constant int KEPT [[function_constant(3)]];        // axes
constant int REDUCED [[function_constant(4)]];
constant bool WIDE [[function_constant(5)]];
constant int LANES [[function_constant(6)]];
constant bool BESIDE [[function_constant(7)]];
constant bool FIRST [[function_constant(8)]];      // of two launches: parts go to `values` and `places`
constant bool SECOND [[function_constant(9)]];     // x is such parts, and `places` their places
#define PLACED (OP >= 6)

struct Params {
  uint results, size, chunk;                       // items of a result, items of a chunk
  uint shape[8], reduced[8];
  int strides[2][8], steps[8];                     // of o and x along the kept axes, of x along the reduced ones
};

#ifndef T
#define T float
#endif
METAL_FUNC float fold(float a, float b) {
  switch (OP) {
    case 0: return a + b;
    case 1: return a * b;
    case 2: case 6: return a > b || a != a ? a : b;
    case 3: case 7: return a < b || a != a ? a : b;
    case 4: return float(a != 0.0f || b != 0.0f);
    default: return float(a != 0.0f && b != 0.0f);
  }
}
template <typename I> METAL_FUNC I fold(I a, I b) {
  switch (OP) {
    case 0: return I(ulong(a) + ulong(b));
    case 1: return I(ulong(a) * ulong(b));
    case 2: case 6: return a > b ? a : b;
    case 3: case 7: return a < b ? a : b;
    case 4: return I(a != 0 || b != 0);
    default: return I(a != 0 && b != 0);
  }
}
METAL_FUNC float end_of(float, bool high) { return high ? INFINITY : -INFINITY; }
METAL_FUNC long end_of(long, bool high) { return high ? 0x7fffffffffffffff : -0x7fffffffffffffff - 1; }
METAL_FUNC ulong end_of(ulong, bool high) { return high ? ~0ul : 0ul; }
METAL_FUNC T start() { return OP == 1 || OP == 5 ? T(1) : OP == 0 || OP == 4 ? T(0) : end_of(T(0), OP == 3 || OP == 7); }

// Whether b at its place goes before a
METAL_FUNC bool before(T b, uint place, T a, uint other) {
  const bool better = a == a && (b != b || (OP == 6 ? b > a : b < a)), worse = b == b && (a != a || (OP == 6 ? a > b : a < b));
  return better || (!worse && place < other);
}

kernel void reduce(device const uchar* x [[buffer(0)]], device uchar* o [[buffer(1)]], device T* values [[buffer(2)]],
                   device uint* places [[buffer(3)]], device const uint* parts [[buffer(4)]], constant Params& p [[buffer(5)]],
                   uint2 group [[threadgroup_position_in_grid]], uint2 groups [[threadgroups_per_grid]],
                   uint thread_index [[thread_index_in_threadgroup]]) {
  threadgroup T best[256];
  threadgroup uint where[256];
  const uint width = 256 / LANES, column = BESIDE ? thread_index % width : thread_index / LANES;
  const uint lane = BESIDE ? thread_index / width : thread_index % LANES, result = group.x * width + column;
  const bool inside = result < p.results;
  const uint begin = group.y * p.chunk, end = min(p.size, begin + p.chunk);
  T total = start();
  uint place = 0xffffffff;
  if (inside) {
    const long base = offset(result, KEPT, WIDE, p.shape, p.strides[1]);
    for (uint at = begin + lane; at < end;) {
      T block = start();
      for (uint k = 0; k < 16 && at < end; k++, at += LANES) {
        const T item = get<T>(x, DTYPE, base + offset(at, REDUCED, WIDE, p.reduced, p.steps));
        if (PLACED) {
          const uint here = SECOND ? parts[at * p.results + result] : at;
          if (before(item, here, total, place)) total = item, place = here;
        } else {
          block = fold(block, item);
        }
      }
      if (!PLACED) total = fold(total, block);
    }
  }
  const uint step = BESIDE ? width : 1;            // from a lane to the next one
  for (uint span = LANES / 2; span; span /= 2) {
    best[thread_index] = total, where[thread_index] = place;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane < span) {
      const T other = best[thread_index + span * step];
      const uint elsewhere = where[thread_index + span * step];
      if (!PLACED) total = fold(total, other);
      else if (before(other, elsewhere, total, place)) total = other, place = elsewhere;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (!inside || lane) return;
  if (FIRST) {
    values[group.y * p.results + result] = total;
    if (PLACED) places[group.y * p.results + result] = place;
    return;
  }
  const long to = offset(result, KEPT, WIDE, p.shape, p.strides[0]);
  if (PLACED) put<long>(o, OUT, to, long(place));
  else put<T>(o, OUT, to, total);
}

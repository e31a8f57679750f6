// random: bits of the counter-based generator Threefry-2x32-20 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as
// easy as 1, 2, 3", 2011), laid out as in MLX and JAX: o (K, M) of SIZE bytes each, keys (K, 2) uint32. The bytes of a key
// are W words; with h = W / 2 and odd = W % 2, counter (i, h + odd + i) gives the words i and h + odd + i, and counter
// (h, 0) the middle one. A thread has a counter.
#include "common.h"

constant int SIZE [[function_constant(0)]];

struct Params { int items, words; };

METAL_FUNC uint2 threefry(uint2 key, uint2 x) {
  const uint keys[3] = {key.x, key.y, key.x ^ key.y ^ 0x1BD11BDAu};
  const uint rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  x.x += keys[0], x.y += keys[1];
  for (uint i = 0; i < 5; i++) {
    for (uint k = 0; k < 4; k++) {
      const uint r = rotations[i % 2][k];
      x.x += x.y;
      x.y = (x.y << r | x.y >> (32 - r)) ^ x.x;
    }
    x.x += keys[(i + 1) % 3], x.y += keys[(i + 2) % 3] + i + 1;
  }
  return x;
}

// The items of a word, so far as there are any; rows of bytes need not begin at a word
METAL_FUNC void write(device uchar* o, constant Params& p, uint key, int word, uint bits) {
  for (int k = 0; k < 4 / SIZE; k++) {
    const int item = word * (4 / SIZE) + k;
    const long to = long(key) * p.items + item;
    if (item >= p.items) return;
    if (SIZE == 1) o[to] = uchar(bits >> 8 * k);
    else if (SIZE == 2) ((device ushort*)o)[to] = ushort(bits >> 16 * k);
    else ((device uint*)o)[to] = bits;
  }
}

kernel void random(device const uint* keys [[buffer(0)]], device uchar* o [[buffer(1)]], constant Params& p [[buffer(2)]],
                   uint2 at [[thread_position_in_grid]]) {
  const int i = at.x, pairs = p.words / 2, rest = pairs + p.words % 2;
  if (i >= rest) return;
  const bool middle = i == pairs;
  const uint2 bits = threefry(uint2(keys[2 * at.y], keys[2 * at.y + 1]), uint2(i, middle ? 0 : rest + i));
  write(o, p, at.y, i, bits.x);
  if (!middle) write(o, p, at.y, rest + i, bits.y);
}

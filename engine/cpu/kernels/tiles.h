// AMX: eight tiles of 16 rows of 64 bytes. Tiles 0, 1 and below them 2, 3 are c, 32 x 32 floats; the others are operands.
#pragma once
#include "../simd.h"
#if defined(__AMX_BF16__)

LZ_NAMESPACE_BEGIN

LZ_INLINE void open_tiles() {
  struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {};
  config.palette = 1;
  for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
  // GCC 12's intrinsics do not say that ldtilecfg reads 64 bytes, nor that tiles are loaded from memory
  asm volatile("ldtilecfg %0" : : "m"(config));
}
LZ_INLINE void close_tiles() { _tile_release(); }
LZ_INLINE void settle() { asm volatile("" : : : "memory"); }  // so the compiler is told that tiles read or wrote

// c goes on from what is there, or from 0; `step` bytes from one row to the next
LZ_INLINE void load_c(const float* c, int64_t step, bool add) {
  settle();
  if (add) {
    _tile_loadd(0, c, step); _tile_loadd(1, c + 16, step);
    _tile_loadd(2, c + 4 * step, step); _tile_loadd(3, c + 4 * step + 16, step);
  } else {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  }
}
// half: of its first 16 rows only
LZ_INLINE void store_c(float* c, int64_t step, bool half = false) {
  _tile_stored(0, c, step); _tile_stored(1, c + 16, step);
  if (!half) { _tile_stored(2, c + 4 * step, step); _tile_stored(3, c + 4 * step + 16, step); }
  settle();
}

LZ_NAMESPACE_END
#endif

// Included before llama.cpp's sources. GCC 12's header tells the compiler that ldtilecfg reads 8 bytes and tileloadd
// none, so the stores before them are dropped and llama.cpp crashes on AMX (github.com/ggml-org/llama.cpp/issues/20824).
#if defined(__AMX_TILE__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(p) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(p)) : "memory")
#undef _tile_loadd
#define _tile_loadd(tile, base, stride) \
  ({ __asm__ volatile("" ::: "memory"); _tile_loadd_internal(tile, base, stride); })
#endif

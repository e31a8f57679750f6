// random: bits of the counter-based generator Threefry-2x32-20 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as
// easy as 1, 2, 3", 2011), laid out as in MLX and JAX. o[0]: (K, M) uint8/16/32; i[0]: (K, 2) uint32 keys; both
// row-major. No ints. The bytes of one key are W 32-bit words; with h = W / 2 and odd = W % 2, counter (i, h + odd + i)
// gives the words i and h + odd + i, and counter (h, 0) the middle one. Bytes moved: each result written once.
#include "../functions.h"
#include "../rows.h"

LZ_NAMESPACE_BEGIN

constexpr int64_t COUNTERS = 512;  // of a piece of work

struct Words { u32x first, second; };

LZ_INLINE Words threefry(const uint32_t* key, Words x) {
  static constexpr int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA};
  x.first += keys[0], x.second += keys[1];
  for (int i = 0; i < 5; i++) {
    for (int r : rotations[i % 2]) {
      x.first += x.second;
      x.second = (x.second << r | x.second >> (32 - r)) ^ x.first;
    }
    x.first += keys[(i + 1) % 3], x.second += keys[(i + 2) % 3] + uint32_t(i + 1);
  }
  return x;
}

static void run(const Step& s, Team& team) {
  const View &out = s.out[0], &keys = s.in[0];
  const int64_t bytes = out.shape[1] * ITEM_SIZE[out.dtype], words = (bytes + 3) / 4, half = words / 2, odd = words % 2;
  const int64_t pieces = (half + odd + COUNTERS - 1) / COUNTERS;
  u32x lane{};
  for (int i = 0; i < LANES; i++) lane[i] = uint32_t(i);
  uint32_t first[COUNTERS], second[COUNTERS];
  int64_t begin, end;
  team.part(out.shape[0] * pieces, 1, &begin, &end);
  for (int64_t piece = begin; piece < end; piece++) {
    const int64_t k = piece / pieces, from = piece % pieces * COUNTERS;
    const int64_t n = half + odd - from < COUNTERS ? half + odd - from : COUNTERS;
    char* to = out.data + k * bytes;
    for (int64_t i = 0; i < n; i += LANES) {
      const u32x count = lane + uint32_t(from + i), beside = count + uint32_t(half + odd);
      const u32x middle = (u32x)(count == uint32_t(half));      // where W is odd: the last counter
      const Words w = threefry(keys.as<uint32_t>() + 2 * k, {count, beside & ~middle});
      store(first + i, w.first), store(second + i, w.second);
    }
    auto write = [&](const uint32_t* from_, int64_t word, int64_t count) {
      const int64_t room = bytes - 4 * word;
      if (room > 0) memcpy(to + 4 * word, from_, size_t(4 * count < room ? 4 * count : room));
    };
    write(first, from, n);
    write(second, half + odd + from, n - (odd && from + n > half));
  }
}

static const char* check(const Step& s) {
  if (s.n_out != 1 || s.n_in != 1 || s.out[0].ndim != 2 || s.in[0].ndim != 2) return "wants (K, M) of (K, 2) keys";
  const View &out = s.out[0], &keys = s.in[0];
  if (out.dtype != LZ_U8 && out.dtype != LZ_U16 && out.dtype != LZ_U32) return "makes uint8, uint16 or uint32";
  if (keys.dtype != LZ_U32 || keys.shape[1] != 2 || keys.shape[0] != out.shape[0]) return "wants (K, 2) uint32 keys";
  const bool rows = (out.shape[0] == 1 || out.strides[0] == out.shape[1]) && (out.shape[1] == 1 || out.strides[1] == 1) &&
                    (keys.shape[0] == 1 || keys.strides[0] == 2) && keys.strides[1] == 1;
  return rows ? nullptr : "wants row-major keys and results";
}

extern const Kernel random;
const Kernel random = {"random", run, nullptr, nullptr, check};

LZ_NAMESPACE_END

// What this machine can do at best, as a JSON line: bytes/s that all threads read from, and read plus write (the better of
// plain and non-temporal stores) copying, BYTES (a large last-level cache may hold them) and 1 GB; operations/s of the
// widest float32 fma, bfloat16 and int8 dot products or tiles (0: unknown).
// c++ -O3 -march=native -pthread roofline.cpp -o roofline && ./roofline THREADS BYTES
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef uint64_t V __attribute__((vector_size(64), may_alias));

static uint64_t read(const V* p, size_t n) {
  V a = {}, b = {}, c = {}, d = {};
  for (size_t i = 0; i + 4 <= n; i += 4) a += p[i], b += p[i + 1], c += p[i + 2], d += p[i + 3];
  a += b + c + d;
  return a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
}
static void copy(V* to, const V* from, size_t n) {
  for (size_t i = 0; i < n; i++) {
    to[i] = from[i];
    asm volatile("" : : : "memory");  // or the compiler calls memcpy
  }
}
static void copy_past_the_caches(V* to, const V* from, size_t n) {
#if defined(__AVX512F__)
  for (size_t i = 0; i < n; i++) _mm512_stream_si512((__m512i*)(to + i), (__m512i)from[i]);
  _mm_sfence();
#elif defined(__AVX2__)
  for (size_t i = 0; i < 2 * n; i++) _mm256_stream_si256((__m256i*)to + i, _mm256_load_si256((const __m256i*)from + i));
  _mm_sfence();
#else
  copy(to, from, n);
#endif
}

// An instruction of 512 bits on 12 accumulators, or 8 products of tiles on 4, so that latency hides
#define TWELVE(op)                                                                                             \
  op " %%zmm30,%%zmm31,%%zmm16\n" op " %%zmm30,%%zmm31,%%zmm17\n" op " %%zmm30,%%zmm31,%%zmm18\n"              \
  op " %%zmm30,%%zmm31,%%zmm19\n" op " %%zmm30,%%zmm31,%%zmm20\n" op " %%zmm30,%%zmm31,%%zmm21\n"              \
  op " %%zmm30,%%zmm31,%%zmm22\n" op " %%zmm30,%%zmm31,%%zmm23\n" op " %%zmm30,%%zmm31,%%zmm24\n"              \
  op " %%zmm30,%%zmm31,%%zmm25\n" op " %%zmm30,%%zmm31,%%zmm26\n" op " %%zmm30,%%zmm31,%%zmm27\n"
#define FOUR(op)                                                                                               \
  op " %%tmm6, %%tmm4, %%tmm0\n" op " %%tmm7, %%tmm4, %%tmm1\n" op " %%tmm6, %%tmm5, %%tmm2\n"                 \
  op " %%tmm7, %%tmm5, %%tmm3\n"

struct Unit {
  const char* name;
  double ops;  // of one turn of `run`
  void (*run)(long turns);
};
#define VECTOR(name, op, lanes) {name, 12 * 2.0 * lanes, [](long n) { for (; n; n--) asm volatile(TWELVE(op) : :); }}
#define TILES(name, op, depth) {name, 8 * 2.0 * 16 * 16 * depth, [](long n) {                                  \
    open_tiles(); for (; n; n--) asm volatile(FOUR(op) FOUR(op) : :); asm volatile("tilerelease"); }}
#if defined(__AMX_INT8__)
static void open_tiles() {
  struct { uint8_t palette = 1, zero[15] = {}; uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
           uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16}; } shape;
  asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");
}
#endif
#if defined(__AVX512F__)
static const Unit kFloat = VECTOR("AVX-512", "vfmadd231ps", 16);
#else
static const Unit kFloat = {"unknown", 0, nullptr};
#endif
#if defined(__AMX_BF16__)
static const Unit kBrain = TILES("AMX", "tdpbf16ps", 32);
#elif defined(__AVX512BF16__)
static const Unit kBrain = VECTOR("AVX-512 BF16", "vdpbf16ps", 32);
#else
static const Unit kBrain = {"unknown", 0, nullptr};
#endif
#if defined(__AMX_INT8__)
static const Unit kInt = TILES("AMX", "tdpbssd", 64);
#elif defined(__AVX512VNNI__)
static const Unit kInt = VECTOR("AVX-512 VNNI", "vpdpbusd", 64);
#else
static const Unit kInt = {"unknown", 0, nullptr};
#endif

template <class F> static double best(int threads, F work) {  // seconds of the fastest of five runs on all threads
  double shortest = 1e9;
  for (int run = 0; run < 5; run++) {
    std::vector<std::thread> team;
    const auto start = std::chrono::steady_clock::now();
    for (int t = 0; t < threads; t++) team.emplace_back(work, t);
    for (auto& thread : team) thread.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    shortest = seconds < shortest ? seconds : shortest;
  }
  return shortest;
}

int main(int, char** argv) {
  const int threads = std::atoi(argv[1]);
  const size_t large = 500000000 / sizeof(V), small = std::strtoull(argv[2], nullptr, 10) / sizeof(V), huge = size_t(2) << 20;
  auto block = [&] {
    V* p = static_cast<V*>(std::aligned_alloc(huge, (large * sizeof(V) + huge - 1) / huge * huge));
    madvise(p, large * sizeof(V), MADV_HUGEPAGE);
    std::memset(p, 1, large * sizeof(V));
    return p;
  };
  V *from = block(), *to = block();
  std::atomic<uint64_t> sink{0};
  auto reading = [&](size_t n, int times) {
    return times * n * sizeof(V) / best(threads, [&](int t) {
      for (int i = 0; i < times; i++) sink += read(from + n / threads * t, n / threads);
    });
  };
  auto copying = [&](size_t n, int times) {
    double shortest = 1e9;
    for (auto how : {copy, copy_past_the_caches}) {
      const double seconds = best(threads, [&](int t) {
        const size_t at = n / threads * t;
        for (int i = 0; i < times; i++) how(to + at, from + at, n / threads);
      });
      shortest = seconds < shortest ? seconds : shortest;
    }
    return times * 2 * n * sizeof(V) / shortest;
  };
#if defined(__AMX_BF16__)
  syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM, XTILEDATA: the kernel lets this process use tiles
#endif
  auto rate = [&](const Unit& unit) {
    const long n = unit.ops ? 5e10 / unit.ops : 0;
    return n ? n * unit.ops * threads / best(threads, [&](int) { unit.run(n); }) : 0;
  };
  std::printf("{\"read\": %.4g, \"copy\": %.4g, \"read_1GB\": %.4g, \"copy_1GB\": %.4g, \"float32\": %.4g, \"bfloat16\": %.4g, "
              "\"int8\": %.4g, \"int8_unit\": \"%s\"}\n", reading(small, 10), copying(small, 10), reading(large, 1),
              copying(large, 1), rate(kFloat), rate(kBrain), rate(kInt), kInt.name);
}

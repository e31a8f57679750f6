// What this machine can do at best with float arrays, as a JSON line: bytes/s that all threads read from, and read plus
// write (the better of plain and non-temporal stores) copying, 40 MB (10^7 floats: a large last-level cache may hold
// them) and 1 GB; float32 operations/s of the widest fma, bfloat16 ones of the widest dot product or tile (0: unknown).
// c++ -O3 -march=native -pthread streams.cpp -o streams && ./streams THREADS
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

// 12 accumulators, so that latency hides
#define TWELVE(op)                                                                                             \
  op " %%zmm30,%%zmm31,%%zmm16\n" op " %%zmm30,%%zmm31,%%zmm17\n" op " %%zmm30,%%zmm31,%%zmm18\n"              \
  op " %%zmm30,%%zmm31,%%zmm19\n" op " %%zmm30,%%zmm31,%%zmm20\n" op " %%zmm30,%%zmm31,%%zmm21\n"              \
  op " %%zmm30,%%zmm31,%%zmm22\n" op " %%zmm30,%%zmm31,%%zmm23\n" op " %%zmm30,%%zmm31,%%zmm24\n"              \
  op " %%zmm30,%%zmm31,%%zmm25\n" op " %%zmm30,%%zmm31,%%zmm26\n" op " %%zmm30,%%zmm31,%%zmm27\n"
#if defined(__AVX512F__)
static const double kFloat = 12 * 2.0 * 16;
static void float32(long n) { for (; n; n--) asm volatile(TWELVE("vfmadd231ps") : :); }
#else
static const double kFloat = 0;
static void float32(long) {}
#endif
#if defined(__AMX_BF16__)
static const double kBrain = 8 * 2.0 * 16 * 16 * 32;
static void bfloat16(long n) {
  struct { uint8_t palette = 1, zero[15] = {}; uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
           uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16}; } shape;
  asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");
#define DOT(c, a, b) "tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c "\n"
#define ALL DOT(0, 4, 6) DOT(1, 4, 7) DOT(2, 5, 6) DOT(3, 5, 7)
  for (; n; n--) asm volatile(ALL ALL ::);
  asm volatile("tilerelease");
}
#elif defined(__AVX512BF16__)
static const double kBrain = 12 * 2.0 * 32;
static void bfloat16(long n) { for (; n; n--) asm volatile(TWELVE("vdpbf16ps") : :); }
#else
static const double kBrain = 0;
static void bfloat16(long) {}
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
  const size_t large = 1000000000 / 2 / sizeof(V), small = 40000000 / sizeof(V), huge = size_t(2) << 20;
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
  auto rate = [&](double ops, void (*unit)(long)) {
    const long n = ops ? 5e10 / ops : 0;
    return ops ? n * ops * threads / best(threads, [&](int) { unit(n); }) : 0;
  };
  std::printf("{\"read\": %.4g, \"copy\": %.4g, \"read_1GB\": %.4g, \"copy_1GB\": %.4g, \"float32\": %.4g, \"bfloat16\": %.4g}\n",
              reading(small, 10), copying(small, 10), reading(large, 1), copying(large, 1), rate(kFloat, float32),
              rate(kBrain, bfloat16));
}

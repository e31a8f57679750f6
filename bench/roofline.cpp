// What this machine can do at best, as a JSON line: bytes/s that all threads read from 1.5 GB and from a buffer as large
// as the model's weights (a large last-level cache may hold it), int8 operations/s of the widest dot product (0: none known).
// c++ -O3 -march=native -pthread roofline.cpp -o roofline && ./roofline THREADS WEIGHT_BYTES
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

typedef uint64_t V __attribute__((vector_size(64), may_alias));

static uint64_t sum(const V* p, size_t n) {
  V a = {}, b = {}, c = {}, d = {};
  for (size_t i = 0; i + 4 <= n; i += 4) a += p[i], b += p[i + 1], c += p[i + 2], d += p[i + 3];
  a += b + c + d;
  return a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
}

#if defined(__AMX_INT8__)  // 8 products of tiles an iteration, on 4 accumulators
static const char* const kUnit = "AMX";
static const double kOps = 8 * 2.0 * 16 * 16 * 64;
static void int8(long n) {
  struct { uint8_t palette = 1, zero[15] = {}; uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
           uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16}; } shape;
  asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");
#define DOT(c, a, b) "tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c "\n"
#define ALL DOT(0, 4, 6) DOT(1, 4, 7) DOT(2, 5, 6) DOT(3, 5, 7)
  for (; n; n--) asm volatile(ALL ALL ::);
  asm volatile("tilerelease");
}
#elif defined(__AVX512VNNI__)  // 12 accumulators, so that latency hides
static const char* const kUnit = "AVX-512 VNNI";
static const double kOps = 12 * 2.0 * 64;
static void int8(long n) {
#define DOT(i) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #i "\n"
  for (; n; n--)
    asm volatile(DOT(16) DOT(17) DOT(18) DOT(19) DOT(20) DOT(21) DOT(22) DOT(23) DOT(24) DOT(25) DOT(26) DOT(27) ::: "cc");
}
#else
static const char* const kUnit = "unknown";
static const double kOps = 0;
static void int8(long) {}
#endif

template <class F> static double best(int threads, F work) {  // seconds of the fastest of three runs on all threads
  double shortest = 1e9;
  for (int run = 0; run < 3; run++) {
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
  const size_t large = 1500000000 / sizeof(V), weights = std::strtoull(argv[2], nullptr, 10) / sizeof(V);
  V* memory = static_cast<V*>(std::aligned_alloc(64, large * sizeof(V)));
  std::memset(memory, 1, large * sizeof(V));
  std::atomic<uint64_t> sink{0};
  auto read = [&](size_t n, int times) {
    return times * n * sizeof(V) / best(threads, [&](int t) {
      for (int i = 0; i < times; i++) sink += sum(memory + n / threads * t, n / threads);
    });
  };
#if defined(__AMX_INT8__)
  syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM, XTILEDATA: the kernel lets this process use tiles
#endif
  const long n = kOps ? 1e11 / kOps : 0;
  const double rate = n * kOps * threads / best(threads, [n](int) { int8(n); });
  std::printf("{\"memory\": %.4g, \"weights\": %.4g, \"int8\": %.4g, \"int8_unit\": \"%s\"}\n", read(large, 1),
              read(weights, 10), rate, kUnit);
}

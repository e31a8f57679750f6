// The linear layers of SmolLM2-135M through the library's own pool, against the limits of this machine measured in the
// same run, interleaved: reading the same bytes, and the fastest multiply-add that the instruction set has.
//   g++ -O3 -std=c++17 -Iengine/cpu bench/kernels/linear.cpp -o /tmp/linear_bench $LIB -Wl,-rpath,$(dirname $LIB) -pthread
//   /tmp/linear_bench [bits=4] [group=64] [head_bits=bits] [tokens=1,2,4,8,16,32,128,512]
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <vector>

#include "runtime.h"

static bool alone;  // one thread: its own CPU time, which a busy machine disturbs less
static double now() {
  timespec t;
  clock_gettime(alone ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}
static double median(std::vector<double> v) { return std::sort(v.begin(), v.end()), v[v.size() / 2]; }
template <class F> static double on_threads(int n, F f) {
  const double start = now();
  std::vector<std::thread> team;
  for (int i = 1; i < n; i++) team.emplace_back([=] { f(i); });
  f(0);
  for (auto& t : team) t.join();
  return now() - start;
}

__attribute__((target("avx2"))) static void read_all(const char* p, size_t bytes) {
  __m256i a[4] = {};
  for (size_t i = 0; i + 128 <= bytes; i += 128)
    for (int j = 0; j < 4; j++) _mm_prefetch(p + i + 4096 + 32 * j, _MM_HINT_T0), a[j] = _mm256_xor_si256(a[j], _mm256_loadu_si256((const __m256i*)(p + i + 32 * j)));
  asm volatile("" ::"x"(_mm256_xor_si256(_mm256_xor_si256(a[0], a[1]), _mm256_xor_si256(a[2], a[3]))));
}

constexpr int LOOPS = 100000;
#define TEN(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9)
#define DOT(i) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #i "\n"
#define FMA(i) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #i "\n"
#define FMA2(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n"
#define TDP "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n tdpbf16ps %%tmm7, %%tmm5, %%tmm3\n"
static void int8_loop() { for (int i = 0; i < LOOPS; i++) asm volatile(TEN(DOT)::: "memory"); }
static void fma_loop() { for (int i = 0; i < LOOPS; i++) asm volatile(TEN(FMA)::: "memory"); }
static void fma2_loop() { for (int i = 0; i < LOOPS; i++) asm volatile(TEN(FMA2)::: "memory"); }
__attribute__((target("amx-tile,amx-bf16"))) static void amx_loop() {
  struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {};
  config.palette = 1;
  for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
  for (int i = 0; i < LOOPS / 10; i++) asm volatile(TDP::: "memory");
  _tile_release();
}
struct Limit { const char* what; void (*loop)(); double macs; };

struct Weight { int n, k, bits; char *w, *scales, *biases; };
static char* fresh(size_t bytes) {
  static char* arena = (char*)mmap(0, 2ull << 30, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  char* p = arena;
  arena += (bytes + 63) / 64 * 64;
  return p;
}
static float bf16(const char* p) { uint16_t h; memcpy(&h, p, 2); uint32_t u = (uint32_t)h << 16; float f; memcpy(&f, &u, 4); return f; }

int main(int argc, char** argv) {
  const int bits = argc > 1 ? atoi(argv[1]) : 4, group = argc > 2 ? atoi(argv[2]) : 64, head = argc > 3 ? atoi(argv[3]) : bits;
  std::string list = argc > 4 ? argv[4] : "1,2,4,8,16,32,128,512";
  constexpr int C = 576, KV = 192, F = 1536, V = 49152, MAX = 512;
  std::mt19937 random(1);
  double bytes = 0, macs = 0;
  const auto make = [&](int n, int k, int b) {
    const size_t codes = b ? (size_t)n * k * b / 8 : (size_t)n * k * 2, groups = b ? (size_t)n * k / group : 0;
    Weight w = {n, k, b, fresh(codes), fresh(2 * groups), fresh(2 * groups)};
    for (size_t i = 0; i < codes / 4; i++) ((uint32_t*)w.w)[i] = b ? random() : (random() & 0x80ff80ff) | 0x3c003c00;
    for (size_t i = 0; i < groups; i++) ((uint16_t*)w.scales)[i] = 0x3c00 + (random() & 63), ((uint16_t*)w.biases)[i] = 0xbd00 + (random() & 63);
    bytes += codes + 4.0 * groups, macs += (double)n * k;
    return w;
  };
  float *x = (float*)fresh(MAX * C * 4), *q = (float*)fresh(MAX * C * 4), *k = (float*)fresh(MAX * KV * 4), *v = (float*)fresh(MAX * KV * 4),
        *h = (float*)fresh(MAX * F * 4), *r = (float*)fresh(MAX * C * 4), *norm = (float*)fresh(C * 4), *logits = (float*)fresh((size_t)MAX * V * 4);
  for (int i = 0; i < MAX * C; i++) x[i] = (int)(random() % 2001 - 1000) / 500.f, q[i] = x[i];
  for (int i = 0; i < MAX * F; i++) h[i] = (int)(random() % 2001 - 1000) / 500.f;
  for (int i = 0; i < C; i++) norm[i] = 1;

  const char* base = fresh(0);  // the weights follow
  std::vector<lz_step> steps;
  std::vector<void*> buffers = {nullptr};
  const auto view = [&](void* data, int dtype, int64_t rows, int64_t columns) {
    lz_view view = {(int32_t)buffers.size(), dtype, 2, 0, 0, {rows, columns}, {columns, 1}};
    if (!columns) view.ndim = 1, view.strides[0] = 1;
    return buffers.push_back(data), view;
  };
  const auto step = [&](std::vector<Weight> ws, void* in, std::vector<float*> outs, int64_t kind, float* residual, int64_t rows = -1) {
    const bool normed = ws[0].k == C && !residual;
    auto* views = new std::vector<lz_view>;
    for (size_t j = 0; j < outs.size(); j++) views->push_back(view(outs[j], LZ_F32, rows, ws[j].n));
    views->push_back(view(in, LZ_F32, rows, ws[0].k));
    if (normed) views->push_back(view(norm, LZ_F32, C, 0));
    for (auto& w : ws) {
      views->push_back(view(w.w, w.bits ? LZ_U32 : LZ_BF16, w.n, w.bits ? w.k * w.bits / 32 : w.k));
      if (w.bits) views->push_back(view(w.scales, LZ_BF16, w.n, w.k / group)), views->push_back(view(w.biases, LZ_BF16, w.n, w.k / group));
    }
    if (residual) views->push_back(view(residual, LZ_F32, rows, ws[0].n));
    auto* ints = new int64_t[7]{(int64_t)ws.size(), ws[0].bits, group, normed, kind, 0, 0};
    auto* eps = new double[1]{1e-5};
    steps.push_back({"linear", (int)outs.size(), (int)(views->size() - outs.size()), 7, 1, views->data(), ints, eps});
  };
  Weight last{};
  for (int layer = 0; layer < 30; layer++) {
    step({make(C, C, bits), make(KV, C, bits), make(KV, C, bits)}, x, {q, k, v}, 0, nullptr);
    step({make(C, C, bits)}, q, {r}, 1, x);
    step({make(F, C, bits), make(F, C, bits)}, x, {h}, 2, nullptr);
    step({last = make(C, F, bits)}, h, {r}, 1, x);
  }
  const double layer_macs = macs, layer_bytes = bytes;
  step({make(V, C, head)}, x, {logits}, 0, nullptr);  // prefill needs one row of it only: it is left out for T > 32

  const int64_t max_dims[] = {MAX};
  const auto fail = [] { fprintf(stderr, "%s\n", lz_error()), exit(1); };
  lz_plan *with_head = lz_load(steps.data(), (int)steps.size(), (int)buffers.size(), max_dims, 1, 64),
          *without = lz_load(steps.data(), (int)steps.size() - 1, (int)buffers.size(), max_dims, 1, 64);
  if (!with_head || !without) fail();
  const int threads = lz_threads();
  alone = threads == 1;
  const std::string isa = lz_isa();
  const Limit limits[] = {{"AMX bf16", amx_loop, 4 * 16 * 16 * 32 / 10.0}, {"VNNI int8", int8_loop, 640}, {"f32 FMA", fma_loop, 160}, {"f32 FMA", fma2_loop, 80}};
  printf("isa %s, %d threads, %d-bit group %d, head %d-bit: %.1f MB, %.1f M multiply-adds a token\n", isa.c_str(), threads, bits, group, head, bytes / 1e6, macs / 1e6);

  for (char* at = strtok(&list[0], ","); at; at = strtok(nullptr, ",")) {
    const int64_t T = atoi(at);
    lz_plan* plan = T > 32 ? without : with_head;
    const double all_bytes = T > 32 ? layer_bytes : bytes, all_macs = (T > 32 ? layer_macs : macs) * T;
    if (lz_run(plan, buffers.data(), &T, nullptr)) fail();
    double error = 0, size = 0;  // the last layer's last step: r = x + h W^T
    for (int t = 0; t < T; t += 1 + (int)T / 5)
      for (int n = 0; n < C; n += 37) {
        double y = x[t * C + n];
        for (int i = 0; i < F; i++) {
          const size_t e = (size_t)n * F + i;
          const double w = !bits ? bf16(last.w + 2 * e) : (((uint8_t*)last.w)[e * bits / 8] >> (bits == 4 ? 4 * (e & 1) : 0) & ((1 << bits) - 1)) * bf16(last.scales + e / group * 2) + bf16(last.biases + e / group * 2);
          y += w * h[t * F + i];
        }
        error += (y - r[t * C + n]) * (y - r[t * C + n]), size += y * y;
      }
    const Limit& limit = limits[isa == "amx" && (T > 16 || !bits) ? 0 : isa == "amx" || isa == "avx512" ? (bits ? 1 : 2) : 3];
    std::vector<double> ours, reads, peaks;
    const int repeats = T >= 128 ? 7 : 21;
    for (int i = 0; i < repeats; i++) {
      double start = now();
      lz_run(plan, buffers.data(), &T, nullptr);
      ours.push_back(now() - start);
      reads.push_back(on_threads(threads, [&](int t) { read_all(base + (size_t)all_bytes / threads * t, (size_t)all_bytes / threads); }));
      if (i % 3 == 0) peaks.push_back(on_threads(threads, [&](int) { limit.loop(); }) / (limit.macs * LOOPS * threads));
    }
    const double t = median(ours), read = median(reads), peak = median(peaks) * all_macs;
    std::vector<double> times(steps.size());
    double kind[5] = {};
    lz_run(plan, buffers.data(), &T, times.data());
    for (size_t i = 0; i < steps.size(); i++) kind[i == steps.size() - 1 ? 4 : i % 4] += times[i] / 1e3;
    printf("T %4ld  %8.3f ms  %7.0f tok/s  error %.1e | %5.1f GB/s = %3.0f %% of reading (%.1f) | %5.2f TOPS = %3.0f %% of %s (%.2f)\n", (long)T, t * 1e3, T / t, sqrt(error / size),
           all_bytes / t / 1e9, 100 * read / t, all_bytes / read / 1e9, 2 * all_macs / t / 1e12, 100 * peak / t, limit.what, 2 * all_macs / peak / 1e12);
    printf("        ms: qkv %.3f, o %.3f, gate and up %.3f, down %.3f, head %.3f\n", kind[0], kind[1], kind[2], kind[3], kind[4]);
  }
}

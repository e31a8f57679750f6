// The tables of kernels, one per instruction set, and the choice among them by what the processor and the system
// allow. It is made at load, never by the machine that built the library.
#include "isa.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define LZ_KERNEL(name) extern const Kernel name;
namespace lz {
namespace portable {
#include "kernels/list.h"
}
#if defined(__x86_64__)
namespace avx2 {
#include "kernels/list.h"
}
namespace avx512 {
#include "kernels/list.h"
}
#undef LZ_KERNEL
#undef LZ_KERNEL_AMX
namespace amx {  // the same code as avx512, but for the kernels that use tiles
#define LZ_KERNEL(name) using avx512::name;
#define LZ_KERNEL_AMX(name) extern const Kernel name;
#include "kernels/list.h"
}
#endif
#undef LZ_KERNEL
#undef LZ_KERNEL_AMX
#define LZ_KERNEL(name) &name,

namespace portable {
static const Kernel* const table[] = {
#include "kernels/list.h"
};
static bool usable() { return true; }
}  // namespace portable
const int n_kernels = sizeof portable::table / sizeof *portable::table;

#if defined(__x86_64__)
namespace avx2 {
static const Kernel* const table[] = {
#include "kernels/list.h"
};
static bool usable() {  // every processor with these three has F16C
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
}  // namespace avx2

namespace avx512 {
static const Kernel* const table[] = {
#include "kernels/list.h"
};
static bool usable() {
  return avx2::usable() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
}
}  // namespace avx512

namespace amx {
static const Kernel* const table[] = {
#include "kernels/list.h"
};
// Linux gives the tile registers only to a process that asks: ARCH_REQ_XCOMP_PERM for XTILEDATA. Threads inherit it.
static bool usable() {
#if defined(__linux__)
  unsigned a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25, all = bf16 | tile | int8;
  return avx512::usable() && (d & all) == all && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
}  // namespace amx
#endif

const Isa isas[] = {
#if defined(__x86_64__)
    {"amx", amx::table, amx::usable},
    {"avx512", avx512::table, avx512::usable},
    {"avx2", avx2::table, avx2::usable},
#endif
    {"portable", portable::table, portable::usable},  // a neon table goes before this line
    {nullptr, nullptr, nullptr},
};

const Isa* find_isa(const std::string& name) {
  for (const Isa* isa = isas; isa->name; isa++)
    if (name == isa->name && isa->usable()) return isa;
  return nullptr;
}

const Isa* best_isa() {
  const Isa* isa = isas;
  while (!isa->usable()) isa++;
  return isa;
}

const Kernel* find_kernel(const Isa& isa, const std::string& step) {
  const std::string name = step.substr(0, step.find(':'));  // host:NAME is a step of the kernel host
  for (int i = 0; i < n_kernels; i++)
    if (name == isa.kernels[i]->name) return isa.kernels[i];
  return nullptr;
}

}  // namespace lz

// What a kernel sees. A kernel is one function that every thread of the team calls with the same step;
// it takes its share by thread number or by the team's counter. The executor puts a barrier after each step.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include "runtime.h"

namespace lz {

// Inline members must never be emitted on their own: the linker could keep the copy compiled for AVX-512.
#define LZ_ALWAYS inline __attribute__((always_inline))

struct View {                       // an lz_view with its address and symbolic size filled in
  char* data;
  int32_t dtype, ndim;
  int64_t shape[LZ_MAX_DIMS], strides[LZ_MAX_DIMS];
  template <class T> LZ_ALWAYS T* as() const { return reinterpret_cast<T*>(data); }
};

struct Step {
  const View* out;                  // n_out + n_in views in one array: in == out + n_out
  const View* in;
  int n_out, n_in, n_int, n_float;
  const int64_t* ints;
  const double* floats;
};

static_assert(sizeof(View) == sizeof(lz_array), "a View is an lz_array");
extern lz_host_call host_call;    // see lz_set_host

class Pool;

// The threads that run a step together. Free of std:: so that it can be included in code for any instruction set.
struct Team {
  int id, size;                     // this thread, all threads
  char* shared;                     // the step's workspace, as asked by Kernel::shared, seen by all threads
  char* local;                      // this thread's workspace, as asked by Kernel::local
  Pool* pool;

  void barrier();                   // all threads of the team meet; for kernels with two phases
  int64_t take(int64_t chunk);      // the next `chunk` work items since the last barrier: first index (dynamic split);
                                    // what was written before a take is seen by those who take later
  void fail(const char* format, ...);  // reports an error from inside a kernel; the run stops after this step

  // static split: this thread's part [begin, end) of n items, borders rounded to `grain`
  LZ_ALWAYS void part(int64_t n, int64_t grain, int64_t* begin, int64_t* end) const {
    const int64_t blocks = (n + grain - 1) / grain;
    const int64_t b = blocks * id / size * grain, e = blocks * (id + 1) / size * grain;
    *begin = b < n ? b : n;
    *end = e < n ? e : n;
  }
};

struct Kernel {
  const char* name;
  void (*run)(const Step&, Team&);
  size_t (*shared)(const Step&, int threads);   // bytes; may be null. Called with the plan's largest sizes.
  size_t (*local)(const Step&, int threads);    // bytes a thread; may be null
  const char* (*check)(const Step&);            // null, or a sentence: why this step cannot run. Called once, at load.
};

}  // namespace lz

// Each kernel file is compiled once per instruction set, in that set's own namespace.
#define LZ_NAMESPACE_BEGIN namespace lz { namespace LZ_ISA {
#define LZ_NAMESPACE_END } }

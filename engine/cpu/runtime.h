// The border between Python and native code: a plain C ABI, loaded with ctypes. A plan is data: steps that
// name a kernel and the views it reads and writes. Nothing else crosses, so no operation is ever bound twice.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LZ_MAX_DIMS 8

enum lz_dtype {
  LZ_BOOL, LZ_U8, LZ_U16, LZ_U32, LZ_U64, LZ_I8, LZ_I16, LZ_I32, LZ_I64, LZ_F16, LZ_BF16, LZ_F32, LZ_F64, LZ_C64
};

// A strided window on a buffer. Only the leading axis may be symbolic: shape[0] = -1 - d stands for dims[d].
typedef struct {
  int32_t buffer;                 // index into the run's buffers; 0 is the arena, scratch memory of all plans
  int32_t dtype, ndim, pad;
  int64_t offset;                 // bytes from the buffer's start
  int64_t shape[LZ_MAX_DIMS];
  int64_t strides[LZ_MAX_DIMS];   // in elements; 0 repeats
} lz_view;

typedef struct {
  const char* kernel;
  int32_t n_out, n_in, n_int, n_float;
  const lz_view* views;           // outputs first
  const int64_t* ints;            // what they mean is said where the kernel is defined
  const double* floats;
} lz_step;

typedef struct lz_plan lz_plan;

typedef struct {                  // a view as a run sees it, sizes filled in
  char* data;
  int32_t dtype, ndim;
  int64_t shape[LZ_MAX_DIMS];
  int64_t strides[LZ_MAX_DIMS];
} lz_array;

// Computes the step of that number: arrays are its outputs, then its inputs. Not 0: it failed, and error says why.
typedef int (*lz_host_call)(int64_t number, int n_out, int n_in, const lz_array* arrays, char* error, int room);

// Every call that can fail returns NULL or non-zero and leaves a sentence in lz_error() of the calling thread.
const char* lz_error(void);
const char* lz_isa(void);                   // "amx", "avx512", "avx2", "neon" or "portable"; LAZULITE_ISA forces one
const char* lz_kernels(void);               // names, separated by spaces
const char* lz_opcodes(void);               // of the elementwise kernel, in order, separated by spaces
int lz_set_isa(const char* name);           // for plans loaded from now on; fails where this machine lacks it
int lz_threads(void);
void lz_set_host(lz_host_call call);         // what steps named host:NAME call; it must not call the library
int lz_set_threads(int n);                  // 0: what affinity and cgroup allow; LAZULITE_THREADS sets it at load

void* lz_alloc(uint64_t bytes);             // 64-byte aligned, from a cache of freed blocks; NULL when there is none
void lz_free(void* block);
void lz_memory(uint64_t* active, uint64_t* peak, uint64_t* cached);
void lz_clear_cache(void);
void lz_reset_peak(void);                   // to what is active now
uint64_t lz_set_memory_limit(uint64_t bytes);   // a guideline: beyond it freed blocks go back to the system first
uint64_t lz_set_cache_limit(uint64_t bytes);    // of freed blocks that are kept; both return the last limit

lz_plan* lz_load(const lz_step* steps, int n_steps, int n_buffers, const int64_t* max_dims, int n_dims,
                 uint64_t arena_bytes);
// Runs every step in one call, in order. buffers[1..n_buffers) are pointers, dims are the symbolic sizes.
// microseconds: one double a step, or NULL.
int lz_run(lz_plan* plan, void* const* buffers, const int64_t* dims, double* microseconds);
void lz_unload(lz_plan* plan);

#ifdef __cplusplus
}
#endif

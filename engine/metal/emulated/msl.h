// What compiled kernels and the runtime (fibers.cpp) know of each other.
#pragma once
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

namespace msl {

struct Ids {                                   // of one GPU thread
  uint size[3], groups[3], group[3];           // threads of a threadgroup, threadgroups, this one
  uint place[3], grid[3], total[3];            // this thread in its group and in the grid; threads of the grid
  uint index;                                  // in the group
};
struct Argument {
  const char* name;
  int index;
};
struct Constant {                              // a function constant: `type` is an MTLDataType
  const char* name;
  int index, type, size;
  void* value;
};
struct Function {
  const char* name;
  void (*body)(void** arguments, const Ids&);
  const Argument* arguments;                   // ends with a null name
};

// Where a lane has its two elements of an 8 x 8 matrix: side by side, in Apple's order.
inline uint matrix_row(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
inline uint matrix_column(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }

extern "C" {
extern const Function lz_functions[];          // of a kernel library; both end with a null name
extern const Constant lz_constants[];

// All lanes of a simdgroup that are still running meet here; the last one calls `combine` for all: slots[i] is lane
// i's pointer if bit i of the mask is set.
void lz_meet(void* slot, void (*combine)(void** slots, uint mask), const char* what, int line);
void lz_simdgroup_barrier(bool fence, int line);
void lz_threadgroup_barrier(int line);
void lz_pass(int line);                        // a collective that needs no meeting: lanes must pass the same ones
void lz_multiply(void* operands, int line);    // float[8]: a.xy, b.xy, c.xy, result.xy
void* lz_threadgroup(int variable, ulong size);
uint lz_lane(void);
const char* lz_run(const Function*, void** arguments, const uint* groups, const uint* threads, uint schedule);
}
}  // namespace msl

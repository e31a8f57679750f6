// Which instruction sets this library holds, which of them this machine can run, and the kernels of each.
#pragma once
#include <string>

#include "kernel.h"

namespace lz {

struct Isa {
  const char* name;
  const Kernel* const* kernels;   // in the order of kernels/list.h
  bool (*usable)();
};

extern const Isa isas[];          // best first, the last entry has no name
extern const int n_kernels;
const Isa* find_isa(const std::string& name);          // null: unknown, or not for this machine
const Isa* best_isa();
const Kernel* find_kernel(const Isa& isa, const std::string& name);

}  // namespace lz

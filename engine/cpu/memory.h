// 64-byte aligned blocks of a few sizes, kept when freed, so that the next plan needs no page faults.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

namespace lz {

class Memory {
 public:
  void* take(size_t bytes);       // null when there is none
  void give(void* pointer);
  void clear();                   // what is kept goes back to the system
  void count(uint64_t* active, uint64_t* peak, uint64_t* cached);

 private:
  std::mutex mutex_;
  std::map<size_t, std::vector<char*>> free_;   // by size
  uint64_t active_ = 0, peak_ = 0, cached_ = 0;
};

Memory& memory();                 // the process's; never destroyed, for Python frees buffers while the process exits

}  // namespace lz

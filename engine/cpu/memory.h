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
  void reset_peak();              // to what is active now
  uint64_t set_limit(uint64_t bytes);        // beyond it, kept blocks go back before new ones are taken; the last one
  uint64_t set_cache_limit(uint64_t bytes);  // of what is kept; the last one

 private:
  std::mutex mutex_;
  std::map<size_t, std::vector<char*>> free_;   // by size
  uint64_t active_ = 0, peak_ = 0, cached_ = 0, limit_ = UINT64_MAX, cache_limit_ = uint64_t(256) << 20;
};

Memory& memory();                 // the process's; never destroyed, for Python frees buffers while the process exits

}  // namespace lz

// A block is a header of 64 bytes, which holds its size, and the bytes that were asked for.
#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lz {
namespace {

constexpr size_t HEADER = 64, HUGE_PAGE = size_t(2) << 20;

// Sizes are rounded to eighths of a power of two: at most 12 % is wasted and freed blocks find a new use.
size_t rounded(size_t bytes) {
  size_t step = HEADER;
  while (step * 16 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

char* from_system(size_t size) {
  const size_t alignment = size >= HUGE_PAGE ? HUGE_PAGE : HEADER;
  void* block = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
#if defined(__linux__)
  if (block && alignment == HUGE_PAGE) madvise(block, size, MADV_HUGEPAGE);
#endif
  return static_cast<char*>(block);
}

}  // namespace

void* Memory::take(size_t bytes) {
  if (bytes > SIZE_MAX / 2) return nullptr;
  const size_t size = rounded(bytes + HEADER);
  char* block = nullptr;
  bool full;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<char*>& kept = free_[size];
    if (!kept.empty()) {
      block = kept.back();
      kept.pop_back();
      cached_ -= size;
    }
    full = active_ + cached_ + size > limit_;
  }
  if (!block && full) clear();
  if (!block) block = from_system(size);
  if (!block) {
    clear();
    block = from_system(size);
  }
  if (!block) return nullptr;
  std::memcpy(block, &size, sizeof size);
  std::lock_guard<std::mutex> lock(mutex_);
  if ((active_ += size) > peak_) peak_ = active_;
  return block + HEADER;
}

void Memory::give(void* pointer) {
  char* block = static_cast<char*>(pointer) - HEADER;
  size_t size;
  std::memcpy(&size, block, sizeof size);
  std::lock_guard<std::mutex> lock(mutex_);
  active_ -= size;
  if (cached_ + size > cache_limit_) return std::free(block);
  free_[size].push_back(block);
  cached_ += size;
}

void Memory::clear() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& kept : free_)
    for (char* block : kept.second) std::free(block);
  free_.clear();
  cached_ = 0;
}

void Memory::count(uint64_t* active, uint64_t* peak, uint64_t* cached) {
  std::lock_guard<std::mutex> lock(mutex_);
  *active = active_, *peak = peak_, *cached = cached_;
}

void Memory::reset_peak() {
  std::lock_guard<std::mutex> lock(mutex_);
  peak_ = active_;
}

uint64_t Memory::set_limit(uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(limit_, bytes);
}

uint64_t Memory::set_cache_limit(uint64_t bytes) {
  uint64_t before;
  bool full;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    before = std::exchange(cache_limit_, bytes);
    full = cached_ > bytes;
  }
  if (full) clear();
  return before;
}

Memory& memory() {
  static Memory* one = new Memory;
  return *one;
}

}  // namespace lz

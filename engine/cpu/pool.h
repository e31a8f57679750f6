// The threads that run plans: one persistent team per process, woken once per run.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kernel.h"

namespace lz {

int usable_cores();               // what the affinity mask and the cgroup's CPU quota allow, at least 1

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();                        // joins the workers; the last pool is never destroyed, so exit waits for nobody
  int size() const { return size_; }

  // Calls job(context, team) on every thread, the caller being number 0, or on the caller alone; `shared` and `local`
  // are bytes of workspace. Returns the first Team::fail, or "".
  std::string run(bool alone, void (*job)(void*, Team&), void* context, size_t shared, size_t local);
  bool stopped() const { return stop_; }  // some thread failed before the last barrier: every thread sees the same

 private:
  friend struct Team;
  void work(int id, int cpu);     // cpu: where to stay, -1 anywhere
  void barrier(Team& team);
  void fail(const char* text);
  struct alignas(64) Patience {   // of one thread, see wait()
    int spins, failures = 0, waits = 0;
  };
  template <class Ready> void wait(Patience& patience, Ready ready);
  void notify();

  const int size_;
  const int spins_;               // how long a wait at a barrier burns the core, at most, before it sleeps
  void (*job_)(void*, Team&) = nullptr;
  void* context_ = nullptr;
  bool stop_ = false, quit_ = false;
  std::vector<std::thread> workers_;
  std::vector<Patience> patience_;
  std::vector<char*> local_;      // workspaces, grown on demand
  char* shared_ = nullptr;
  size_t local_bytes_ = 0, shared_bytes_ = 0;

  alignas(64) std::atomic<uint32_t> jobs_{0};      // counts runs; workers wait for it to move
  alignas(64) std::atomic<int> running_{0};        // workers not yet done with the run
  alignas(64) std::atomic<int> arrived_{0};        // at the barrier
  alignas(64) std::atomic<uint32_t> phase_{0};     // counts barriers
  alignas(64) std::atomic<int64_t> next_{0};       // Team::take
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::string message_;
};

}  // namespace lz

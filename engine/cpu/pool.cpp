// Threads, barriers and the cores that we may use. A wait spins for 8 µs at most (a step's imbalance is shorter), then
// sleeps: a busy machine slows down, it does not collapse. Yielding instead gives away a time slice of milliseconds.
#include "pool.h"

#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lz {
namespace {

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// PAUSE takes 10 to 150 cycles, depending on the processor: count how many fill the time.
int pauses_in(double microseconds) {
  double shortest = 1;             // of a hundred; the least of five, should something else take the core
  for (int i = 0; i < 5; i++) {
    const auto begin = std::chrono::steady_clock::now();
    for (int k = 0; k < 100; k++) pause();
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    if (took.count() < shortest) shortest = took.count();
  }
  return int(microseconds / 10 / shortest) + 1;
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// CPUs' worth of time that the control group allows; 0 where it sets no limit. Version 2 nests: take the tightest.
double cgroup_quota() {
  double best = 0;
  auto consider = [&](double quota, double period) {
    if (quota > 0 && period > 0 && (best == 0 || quota / period < best)) best = quota / period;
  };
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t name = line.find(':'), path = line.find(':', name + 1);
    if (path == std::string::npos) continue;
    const bool v2 = line.compare(0, 3, "0::") == 0;
    if (!v2 && line.substr(name + 1, path - name - 1).find("cpu") == std::string::npos) continue;
    for (std::string group = line.substr(path + 1);; group.resize(group.rfind('/'))) {
      if (!group.empty() && group.back() == '/') group.pop_back();
      double quota = 0, period = 0;
      if (v2) {
        std::istringstream(first_line("/sys/fs/cgroup" + group + "/cpu.max")) >> quota >> period;  // "max" reads as 0
      } else {
        quota = std::atof(first_line("/sys/fs/cgroup/cpu" + group + "/cpu.cfs_quota_us").c_str());
        period = std::atof(first_line("/sys/fs/cgroup/cpu" + group + "/cpu.cfs_period_us").c_str());
      }
      consider(quota, period);
      if (group.rfind('/') == std::string::npos) break;
    }
  }
  return best;
}

// The processors of the calling thread's affinity mask, by number; all there are where there is no such mask.
std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
      if (CPU_ISSET(cpu, &mask)) cpus.push_back(cpu);
#endif
  if (cpus.empty()) cpus.resize(std::thread::hardware_concurrency());
  return cpus;
}

void stay_on(int cpu) {
#if defined(__linux__)
  cpu_set_t mask;
  CPU_ZERO(&mask);
  CPU_SET(cpu, &mask);
  sched_setaffinity(0, sizeof mask, &mask);
#else
  (void)cpu;
#endif
}

}  // namespace

int usable_cores() {
  int cores = int(allowed_cpus().size());
  const double quota = cgroup_quota();
  if (quota > 0 && quota < cores) cores = int(quota);
  return cores < 1 ? 1 : cores;
}

Pool::Pool(int threads)
    : size_(threads),
      spins_(pauses_in(8)),
      patience_(threads, Patience{spins_}),
      local_(threads, nullptr) {
  // A team of all cores stays one on each: Linux likes to wake a thread on its waker's core, where they take turns.
  const std::vector<int> cpus = allowed_cpus();
  const bool every_core = size_t(threads) == cpus.size();
  for (int id = 1; id < threads; id++) workers_.emplace_back(&Pool::work, this, id, every_core ? cpus[id] : -1);
}

Pool::~Pool() {
  quit_ = true;
  jobs_++;
  notify();
  for (std::thread& worker : workers_) worker.join();
  for (char* block : local_) std::free(block);
  std::free(shared_);
}

// Spins, then sleeps. Where spinning was in vain the next spin is half as long: whoever we wait for may need this very
// core (on a busy machine that made steps 50 times faster). One spin in 16 is a full one, to notice that calm is back.
template <class Ready> void Pool::wait(Patience& patience, Ready ready) {
  const int spins = ++patience.waits % 16 ? patience.spins >> patience.failures : patience.spins;
  for (int i = 0; i < spins; i++) {
    if (ready()) {
      patience.failures = 0;
      return;
    }
    pause();
  }
  if (patience.failures < 6) patience.failures++;
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_++;
  wake_.wait(lock, ready);
  sleepers_--;
}

// After the change that sleepers wait for, sequentially consistent: either we see the sleeper or it sees the change.
void Pool::notify() {
  if (sleepers_.load() == 0) return;
  { std::lock_guard<std::mutex> lock(mutex_); }
  wake_.notify_all();
}

void Pool::work(int id, int cpu) {
  if (cpu >= 0) stay_on(cpu);
  Patience idle{4 * spins_};       // the next token's run often follows within 100 µs
  for (uint32_t seen = 0;; seen++) {
    wait(idle, [&] { return jobs_.load() != seen; });
    if (quit_) return;
    Team team{id, size_, shared_, local_[id], this};
    job_(context_, team);
    if (running_.fetch_sub(1) == 1) notify();
  }
}

std::string Pool::run(bool alone, void (*job)(void*, Team&), void* context, size_t shared, size_t local) {
  auto grow = [](char*& block, size_t bytes) {
    std::free(block);
    block = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (!block) throw std::bad_alloc();
  };
  if (shared > shared_bytes_) grow(shared_, shared_bytes_ = shared);
  if (local > local_bytes_) {
    local_bytes_ = local;
    for (char*& block : local_) grow(block, local);
  }
  job_ = job, context_ = context;
  stop_ = false, failed_ = false, message_.clear();
  next_ = 0;
  if (!alone) {
    running_ = size_ - 1;
    jobs_++;
    notify();
  }
  Team team{0, alone ? 1 : size_, shared_, local_[0], this};
  job(context, team);
  if (!alone) wait(patience_[0], [&] { return running_.load() == 0; });
  return message_;
}

void Pool::barrier(Team& team) {
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1) + 1 < team.size) return wait(patience_[team.id], [&] { return phase_.load() != phase; });
  arrived_.store(0, std::memory_order_relaxed);
  next_.store(0, std::memory_order_relaxed);
  stop_ = failed_;
  phase_.store(phase + 1);
  notify();
}

void Pool::fail(const char* text) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!failed_) message_ = text;
  failed_ = true;
}

void Team::barrier() { pool->barrier(*this); }

int64_t Team::take(int64_t chunk) { return pool->next_.fetch_add(chunk, std::memory_order_acq_rel); }

void Team::fail(const char* format, ...) {
  char text[256];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  pool->fail(text);
}

}  // namespace lz

// The C ABI of runtime.h: choices, plans, and the executor that walks a plan's steps with the whole team.
#include "runtime.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "isa.h"
#include "memory.h"
#include "pool.h"

#define LZ_API extern "C" __attribute__((visibility("default")))

namespace lz {
lz_host_call host_call = nullptr;

namespace {

thread_local std::string error;

using Error = std::runtime_error;

template <class... Args> Error complaint(const char* format, Args... args) {
  char text[512];
  std::snprintf(text, sizeof text, format, args...);
  return Error(text);
}

// Runs f; an exception becomes the sentence of lz_error() and `failed` the result.
template <class R, class F> R guarded(R failed, F f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    error = "out of memory";
  } catch (const std::exception& e) {
    error = e.what();
  }
  return failed;
}

// ---- the process's choices: instruction set and threads ----

constexpr int MOST_THREADS = 1024;

struct State {
  std::mutex running;              // one run at a time: a run uses every core
  std::atomic<const Isa*> isa{nullptr};
  std::atomic<int> threads{0};     // 0: not chosen yet
  std::unique_ptr<Pool> pool;      // made by the first run
  void* arena = nullptr;           // of all plans, since one runs at a time: as large as the largest needs
  size_t arena_bytes = 0;

  void need_arena(size_t bytes) {
    if (bytes <= arena_bytes) return;
    drop_arena();
    if (!(arena = memory().take(bytes)))
      throw complaint("out of memory: the plan's arena needs %llu bytes", (unsigned long long)bytes);
    arena_bytes = bytes;
  }
  void drop_arena() {
    if (arena) memory().give(arena);
    arena = nullptr, arena_bytes = 0;
  }
};

State* current = nullptr;

State& state() {
  static const bool made = [] {
    current = new State;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] {   // the child has no workers and maybe a locked mutex: it starts anew
      const State* parent = current;
      current = new State;
      current->isa = parent->isa.load();
      current->threads = parent->threads.load();
    });
#endif
    return true;
  }();
  (void)made;
  return *current;
}

const Isa& set_isa(const std::string& name) {
  std::string have;
  for (const Isa* isa = isas; isa->name; isa++)
    if (isa->usable()) have += std::string(have.empty() ? "" : ", ") + isa->name;
  const Isa* isa = find_isa(name);
  if (!isa) throw complaint("instruction set \"%s\" is not one that this machine has: %s", name.c_str(), have.c_str());
  state().isa = isa;
  return *isa;
}

const Isa& chosen_isa() {
  if (const Isa* isa = state().isa) return *isa;
  const char* forced = std::getenv("LAZULITE_ISA");
  return set_isa(forced && *forced ? forced : best_isa()->name);
}

int chosen_threads() {
  std::atomic<int>& threads = state().threads;
  const char* forced = std::getenv("LAZULITE_THREADS");
  if (threads == 0 && forced && *forced) {
    const int wanted = std::atoi(forced);
    if (wanted < 1) throw complaint("LAZULITE_THREADS is \"%s\", wanted is a number from 1 on", forced);
    threads = std::min(wanted, usable_cores());
  }
  if (threads == 0) threads = usable_cores();
  return threads;
}

Pool& team() {
  std::unique_ptr<Pool>& pool = state().pool;
  const int threads = chosen_threads();
  if (!pool || pool->size() != threads) {
    pool.reset();                  // the old workers end before new ones start
    pool.reset(new Pool(threads));
  }
  return *pool;
}

size_t item_size(int dtype) {
  static const uint8_t sizes[] = {1, 1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8, 8};
  return sizes[dtype];
}

}  // namespace
}  // namespace lz

using namespace lz;

// ---- plans ----

struct lz_plan {
  struct Loaded {
    const Kernel* kernel;
    Step step;
  };
  std::vector<Loaded> steps;
  std::vector<lz_view> sources;    // as loaded, one for each of `views`
  std::vector<View> views;         // with addresses and sizes of the latest run
  std::vector<int64_t> ints, dims, max_dims;
  std::vector<double> floats;
  std::vector<void*> buffers;      // of the latest run; [0] is the arena
  size_t arena_bytes = 0;
  size_t shared = 0, local = 0;    // workspace bytes
  bool bound = false;              // the views point into `buffers`
  int sized_for = 0;               // threads that `shared` and `local` were computed for
  int64_t bytes = 0;               // that the views of the latest run cover
  double* microseconds = nullptr;

  void set_dims(const int64_t* values);
  void set_buffers(void* arena, void* const* pointers);
  void size_workspaces(int threads);
  void run(Team& team);
};

namespace {

// Refuses what would make a kernel leave its buffers. Only the arena's size is known here.
void check_view(const lz_view& v, const char* kernel, int n_buffers, const std::vector<int64_t>& max_dims,
                size_t arena) {
  if (v.buffer < 0 || v.buffer >= n_buffers)
    throw complaint("[%s] a view's buffer is %d, the plan has %d", kernel, v.buffer, n_buffers);
  if (v.ndim < 0 || v.ndim > LZ_MAX_DIMS)
    throw complaint("[%s] a view has %d axes, the most is %d", kernel, v.ndim, LZ_MAX_DIMS);
  if (v.dtype < LZ_BOOL || v.dtype > LZ_C64)
    throw complaint("[%s] a view's dtype is %d, which is none", kernel, v.dtype);
  int64_t first = v.offset, last = v.offset + int64_t(item_size(v.dtype));
  bool empty = false;
  for (int i = 0; i < v.ndim; i++) {
    int64_t size = v.shape[i];
    if (i == 0 && size < 0 && -1 - size < int64_t(max_dims.size())) size = max_dims[-1 - size];
    if (size < 0)
      throw complaint("[%s] a view's axis %d is %lld, and the plan has %zu symbolic sizes", kernel, i,
                      (long long)v.shape[i], max_dims.size());
    empty |= size == 0;
    (v.strides[i] < 0 ? first : last) += (size - 1) * v.strides[i] * int64_t(item_size(v.dtype));
  }
  if (v.buffer == 0 && !empty && (first < 0 || last > int64_t(arena)))
    throw complaint("[%s] a view covers bytes %lld to %lld of an arena of %zu", kernel, (long long)first,
                    (long long)last, arena);
}

}  // namespace

void lz_plan::set_dims(const int64_t* values) {
  for (size_t d = 0; d < dims.size(); d++) {
    if (values[d] < 0 || values[d] > max_dims[d])
      throw complaint("symbolic size %zu is %lld, the plan was made for 0 to %lld", d, (long long)values[d],
                      (long long)max_dims[d]);
  }
  dims.assign(values, values + dims.size());
  bytes = 0;
  for (size_t i = 0; i < views.size(); i++) {
    int64_t covered = int64_t(item_size(sources[i].dtype));
    for (int axis = 0; axis < views[i].ndim; axis++) {
      const int64_t size = sources[i].shape[axis];
      views[i].shape[axis] = size < 0 ? dims[-1 - size] : size;
      if (views[i].strides[axis]) covered *= views[i].shape[axis];
    }
    bytes += covered;
  }
}

void lz_plan::set_buffers(void* arena, void* const* pointers) {
  bound = false;
  buffers[0] = arena;
  std::copy(pointers + 1, pointers + buffers.size(), buffers.begin() + 1);
  for (size_t i = 0; i < views.size(); i++) {
    char* base = static_cast<char*>(buffers[sources[i].buffer]);
    if (!base) throw complaint("buffer %d of the plan is not set", sources[i].buffer);
    views[i].data = base + sources[i].offset;
  }
  bound = true;
}

void lz_plan::size_workspaces(int threads) {
  set_dims(max_dims.data());
  for (const Loaded& s : steps) {
    if (s.kernel->shared) shared = std::max(shared, s.kernel->shared(s.step, threads));
    if (s.kernel->local) local = std::max(local, s.kernel->local(s.step, threads));
  }
  sized_for = threads;
}

void lz_plan::run(Team& team) {
  using Clock = std::chrono::steady_clock;
  double* times = team.id == 0 ? microseconds : nullptr;
  Clock::time_point before = times ? Clock::now() : Clock::time_point();
  for (size_t i = 0; i < steps.size() && !(i && team.pool->stopped()); i++) {
    steps[i].kernel->run(steps[i].step, team);
    if (i + 1 < steps.size()) team.barrier();   // after the last step the pool waits for everybody
    if (!times) continue;
    const Clock::time_point now = Clock::now();
    times[i] = std::chrono::duration<double, std::micro>(now - before).count();
    before = now;
  }
}

LZ_API const char* lz_error(void) { return error.c_str(); }

LZ_API const char* lz_isa(void) {
  return guarded<const char*>(nullptr, [] { return chosen_isa().name; });
}

LZ_API const char* lz_kernels(void) {
  static const std::string names = [] {
    std::string all;
    for (int i = 0; i < n_kernels; i++) all += std::string(i ? " " : "") + isas[0].kernels[i]->name;
    return all;
  }();
  return names.c_str();
}

LZ_API const char* lz_opcodes(void) {
  return
#define LZ_OP(name, ...) #name " "
#include "opcodes.h"
      ;
}

LZ_API int lz_set_isa(const char* name) {
  return guarded(1, [&] { return set_isa(name), 0; });
}

LZ_API int lz_threads(void) {
  return guarded(0, [] { return chosen_threads(); });
}

LZ_API void lz_set_host(lz_host_call call) { host_call = call; }

LZ_API int lz_set_threads(int n) {
  return guarded(1, [&] {
    if (n < 0 || n > MOST_THREADS)
      throw complaint("%d threads were asked for, 0 (all that are allowed) to %d can be had", n, MOST_THREADS);
    std::lock_guard<std::mutex> lock(state().running);
    state().threads = n ? n : usable_cores();
    return 0;
  });
}

LZ_API void* lz_alloc(uint64_t bytes) {
  return guarded<void*>(nullptr, [&] {
    void* block = memory().take(bytes);
    if (!block) throw complaint("out of memory: %llu bytes cannot be had", (unsigned long long)bytes);
    return block;
  });
}

LZ_API void lz_free(void* block) {
  if (block) memory().give(block);
}

LZ_API void lz_memory(uint64_t* active, uint64_t* peak, uint64_t* cached) { memory().count(active, peak, cached); }

LZ_API void lz_clear_cache(void) {
  std::lock_guard<std::mutex> lock(state().running);
  state().drop_arena();
  memory().clear();
}

LZ_API void lz_reset_peak(void) { memory().reset_peak(); }

LZ_API uint64_t lz_set_memory_limit(uint64_t bytes) { return memory().set_limit(bytes); }

LZ_API uint64_t lz_set_cache_limit(uint64_t bytes) { return memory().set_cache_limit(bytes); }

LZ_API lz_plan* lz_load(const lz_step* steps, int n_steps, int n_buffers, const int64_t* max_dims, int n_dims,
                        uint64_t arena_bytes) {
  return guarded<lz_plan*>(nullptr, [&] {
    std::unique_ptr<lz_plan> plan(new lz_plan);
    plan->max_dims.assign(max_dims, max_dims + n_dims);
    plan->dims = plan->max_dims;
    plan->buffers.assign(n_buffers < 1 ? 1 : n_buffers, nullptr);
    const Isa& isa = chosen_isa();
    for (const lz_step* s = steps; s < steps + n_steps; s++) {
      const Kernel* kernel = find_kernel(isa, s->kernel);
      if (!kernel) throw complaint("no kernel is named \"%s\"; there are: %s", s->kernel, lz_kernels());
      plan->steps.push_back({kernel, {nullptr, nullptr, s->n_out, s->n_in, s->n_int, s->n_float, nullptr, nullptr}});
      for (const lz_view* v = s->views; v < s->views + s->n_out + s->n_in; v++) {
        check_view(*v, s->kernel, n_buffers, plan->max_dims, arena_bytes);
        plan->sources.push_back(*v);
        View view{nullptr, v->dtype, v->ndim, {}, {}};
        std::memcpy(view.strides, v->strides, sizeof view.strides);
        plan->views.push_back(view);
      }
      plan->ints.insert(plan->ints.end(), s->ints, s->ints + s->n_int);
      plan->floats.insert(plan->floats.end(), s->floats, s->floats + s->n_float);
    }
    const View* view = plan->views.data();
    const int64_t* ints = plan->ints.data();
    const double* floats = plan->floats.data();
    plan->set_dims(max_dims);
    for (lz_plan::Loaded& s : plan->steps) {
      s.step.out = view, s.step.in = view + s.step.n_out;
      view += s.step.n_out + s.step.n_in;
      s.step.ints = ints, s.step.floats = floats;
      ints += s.step.n_int, floats += s.step.n_float;
      const char* wrong = s.kernel->check ? s.kernel->check(s.step) : nullptr;
      if (wrong) throw complaint("[%s] %s", s.kernel->name, wrong);
    }
    std::lock_guard<std::mutex> lock(state().running);
    state().need_arena(plan->arena_bytes = arena_bytes);
    return plan.release();
  });
}

LZ_API int lz_run(lz_plan* plan, void* const* buffers, const int64_t* dims, double* microseconds) {
  return guarded(1, [&] {
    State& s = state();
    std::lock_guard<std::mutex> lock(s.running);
    s.need_arena(plan->arena_bytes);
    Pool& pool = team();
    if (plan->sized_for != pool.size()) plan->size_workspaces(pool.size());
    if (!std::equal(plan->dims.begin(), plan->dims.end(), dims)) plan->set_dims(dims);
    if (!plan->bound || plan->buffers[0] != s.arena ||
        !std::equal(plan->buffers.begin() + 1, plan->buffers.end(), buffers + 1))
      plan->set_buffers(s.arena, buffers);
    plan->microseconds = microseconds;
    const bool alone = pool.size() == 1 || plan->bytes < 64 * 1024;   // too little to be worth waking anybody
    auto job = [](void* p, Team& team) { static_cast<lz_plan*>(p)->run(team); };
    const std::string failed = pool.run(alone, job, plan, plan->shared, plan->local);
    if (!failed.empty()) throw Error(failed);
    return 0;
  });
}

LZ_API void lz_unload(lz_plan* plan) { delete plan; }

// The GPU: runs one kernel, threadgroup after threadgroup, each GPU thread of it on a fiber, all on one OS thread.
//
// A fiber runs one GPU thread after another until one waits (a simd function, a barrier), so that a kernel without such
// is a plain loop. Whoever waits hands over to the next that can run; the schedule says who that is. The last lane to
// arrive at a simd function computes it for all. What cannot happen on a GPU ends the kernel with a sentence.
// With -DTHREAD_SANITIZER every GPU thread is a thread in ThreadSanitizer's eyes, ordered by barriers only.
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <sys/mman.h>
#include "msl.h"

// Saves the callee's registers on this stack, its address in *save, and goes on where `to` was saved.
extern "C" void lz_switch(void** save, void* to);

namespace msl {
namespace {

constexpr int THREADS = 1024, LANES = 32, STACK = 128 << 10, ARENA = 64 << 10, LIMIT = 32 << 10, VARIABLES = 256;
constexpr size_t UNBOUND = size_t(1) << 32;    // bytes of forbidden addresses that stand for one unbound argument
#ifdef THREAD_SANITIZER
constexpr int SETS = 2;                        // neighbouring threadgroups share no stack, no fiber and no order
constexpr bool REUSE = false;                  // of a stack in the same threadgroup
#else
constexpr int SETS = 1;
constexpr bool REUSE = true;
#endif

enum State { READY, SIMD, BARRIER, DONE };

struct Lane {
  void* top;                                   // saved stack pointer; null: not begun
  char* stack;
  State state;
  int line;
  const char* what;
  void* slot;
  void (*combine)(void**, uint);
  uint passed;                                 // hash of the collectives without meeting
};
struct Simdgroup {
  int alive, arrived, first;                   // first: the lane that arrived first
};

struct Gpu {
  const Function* function;
  void** arguments;
  Ids base;
  uint schedule, random;
  int n, alive, arrived, first, returned;      // threads; those in threadgroup_barrier; the last that returned
  int current, set, turn;
  Lane lanes[THREADS];
  Simdgroup simdgroups[THREADS / LANES];
  int queue[THREADS], head, count;             // lanes that can run
  char* stacks[THREADS];                       // free ones
  int free;
  char* memory;                                // all stacks
  char* arenas;
  size_t used;
  void* variables[VARIABLES];
  char* unbound;
  void* host;                                  // stack pointer of who called lz_run
  char error[1024];
} G;
thread_local bool inside;                      // this OS thread is the GPU now
std::mutex busy;

char tsan_begin, tsan_end, tsan_ended[2 * SETS], tsan_simd[THREADS / LANES];       // what orders threads
#ifdef THREAD_SANITIZER
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
void* tsan[SETS * THREADS + 1];
void acquire(void* order) { __tsan_acquire(order); }
void release(void* order) { __tsan_release(order); }
void announce_host() { tsan[SETS * THREADS] = __tsan_get_current_fiber(); }
void announce(int lane) {
  void*& fiber = tsan[lane < 0 ? SETS * THREADS : G.set * THREADS + lane];
  if (!fiber) fiber = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(fiber, 1);            // 1: the switch itself orders nothing
}
#else
void acquire(void*) {}
void release(void*) {}
void announce_host() {}
void announce(int) {}
#endif

#if defined(__x86_64__)
asm(R"(
.text
.globl lz_switch
lz_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr int RETURN = 6, FRAME = 8;           // words: of the return address, and of all
#elif defined(__aarch64__)
asm(R"(
.text
.globl lz_switch
lz_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr int RETURN = 11, FRAME = 20;
#else
#error "the emulated GPU needs a switch of stacks for this processor"
#endif

[[noreturn]] void leave() {                    // back to the host
  void* nowhere;
  announce(-1);
  lz_switch(&nowhere, G.host);
  __builtin_unreachable();
}

template <class... Args> [[noreturn]] void fail(const char* format, Args... args) {
  snprintf(G.error, sizeof G.error, format, args...);
  leave();
}

int& ready(int i) { return G.queue[(G.head + i) % THREADS]; }

void push(int lane) {
  G.lanes[lane].state = READY;
  ready(G.count++) = lane;
}

// The next lane to run, or -1. Schedule 0: in turn; 1: who was released last, so that a simdgroup runs as far as it can
// before another one begins; more: any.
int pop() {
  if (!G.count) return -1;
  G.random = G.random * 1664525u + 1013904223u;
  const int at = G.schedule > 1 ? (G.random >> 8) % G.count : G.schedule ? G.count - 1 : 0, lane = ready(at);
  G.count--;
  if (at) ready(at) = ready(G.count);
  else G.head = (G.head + 1) % THREADS;
  return lane;
}

void work();

void resume(int lane, void** save) {
  Lane& l = G.lanes[lane];
  if (!l.top) {
    l.stack = G.stacks[--G.free];
    void** top = (void**)(l.stack + STACK) - FRAME;
    memset(top, 0, FRAME * sizeof *top);
    top[RETURN] = (void*)work;
    l.top = top;
  }
  G.current = lane;
  announce(lane);
  lz_switch(save, l.top);
}

void wait() {
  Lane& me = G.lanes[G.current];
  const int next = pop();
  if (next == G.current) return;
  if (next >= 0) return resume(next, &me.top);
  announce(-1);
  lz_switch(&me.top, G.host);
}

void check_passed(int simdgroup) {             // lanes that meet, or end, have passed the same collectives
  const Lane* lanes = G.lanes + simdgroup * LANES;
  for (int i = 1; i < LANES && simdgroup * LANES + i < G.n; i++)
    if (lanes[i].passed != lanes[0].passed)
      fail("thread %d of the threadgroup passed other simdgroup_load or _store calls than thread %d, by line %d",
           simdgroup * LANES, simdgroup * LANES + i, lanes[i].line);
}

void fire(int simdgroup) {                     // all are here: compute, and release them
  void* slots[LANES] = {};
  uint mask = 0;
  for (int i = 0; i < LANES && simdgroup * LANES + i < G.n; i++) {
    const Lane& l = G.lanes[simdgroup * LANES + i];
    if (l.state != SIMD) continue;
    mask |= 1u << i;
    slots[i] = l.slot;
  }
  const Lane& one = G.lanes[G.simdgroups[simdgroup].first];
  if (one.passed) check_passed(simdgroup);
  if (one.combine) one.combine(slots, mask);
  G.simdgroups[simdgroup].arrived = 0;
  for (int i = 0; i < LANES; i++)
    if (mask >> i & 1) push(simdgroup * LANES + i);
}

[[noreturn]] void returned(int lane, int waiting) {
  fail("divergent: thread %d has returned, thread %d waits in threadgroup_barrier (line %d)", lane, waiting,
       G.lanes[waiting].line);
}

void finish(int lane) {                        // a GPU thread has returned: its simdgroup may have waited for it alone
  const int s = lane / LANES;
  Simdgroup& simdgroup = G.simdgroups[s];
  G.lanes[lane].state = DONE;
  G.returned = lane;
  G.alive--;
  if (G.arrived) returned(lane, G.first);
  if (!--simdgroup.alive) check_passed(s);
  else if (simdgroup.arrived == simdgroup.alive) fire(s);
}

void work() {                                  // the body of a fiber
  for (;;) {
    const int me = G.current;
    Ids ids = G.base;
    ids.index = me;
    ids.place[0] = me % ids.size[0];
    ids.place[1] = me / ids.size[0] % ids.size[1];
    ids.place[2] = me / (ids.size[0] * ids.size[1]);
    for (int i = 0; i < 3; i++) ids.grid[i] = ids.group[i] * ids.size[i] + ids.place[i];
    acquire(&tsan_begin);
    acquire(&tsan_ended[(G.turn + SETS) % (2 * SETS)]);      // the last threadgroup on these stacks
    G.function->body(G.arguments, ids);
    release(&tsan_ended[G.turn]);
    release(&tsan_end);
    finish(me);
    const int next = pop();
    if (next < 0) leave();
    char* stack = G.lanes[me].stack;
    void* nowhere;
    if (REUSE && !G.lanes[next].top) {         // stay on this stack
      G.lanes[next].stack = stack;
      G.lanes[next].top = stack;
      G.current = next;
      continue;
    }
    if (REUSE) G.stacks[G.free++] = stack;
    resume(next, &nowhere);
  }
}

void on_signal(int number, siginfo_t* info, void*) {
  const uint* g = G.base.group;
  const Argument* a = G.function->arguments;
  const size_t at = (char*)info->si_addr - G.unbound;
  if (!inside) {                               // not ours: die of it, as without us
    signal(number, SIG_DFL);
    raise(number);
    return;
  }
  if (number == SIGFPE)
    fail("integer division by zero in thread %d of threadgroup (%u, %u, %u)", G.current, g[0], g[1], g[2]);
  while (a->name && size_t(a->index) != at / UNBOUND) a++;
  if (G.unbound <= (char*)info->si_addr && a->name)
    fail("argument %s (index %d) is not bound, and thread %d of threadgroup (%u, %u, %u) uses it", a->name, a->index,
         G.current, g[0], g[1], g[2]);
  const char* stack = G.lanes[G.current].stack;
  if (stack <= (char*)info->si_addr && (char*)info->si_addr < stack + 4096)
    fail("the stack of thread %d is full: too many local variables", G.current);
  fail("bad address %p in thread %d of threadgroup (%u, %u, %u)", info->si_addr, G.current, g[0], g[1], g[2]);
}

void prepare() {                               // once
  const auto map = [](size_t bytes, int protection) {
    return (char*)mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  };
  G.memory = map(size_t(STACK) * SETS * THREADS, PROT_READ | PROT_WRITE);
  for (int i = 0; i < SETS * THREADS; i++) mprotect(G.memory + size_t(STACK) * i, 4096, PROT_NONE);
  G.arenas = map(SETS * ARENA, PROT_READ | PROT_WRITE);
  G.unbound = map(UNBOUND * 32, PROT_NONE);
}

void begin(uint group, uint total) {           // a threadgroup
  const uint g = G.schedule == 1 ? total - 1 - group : group, x = G.base.groups[0], y = G.base.groups[1];
  G.base.group[0] = g % x;
  G.base.group[1] = g / x % y;
  G.base.group[2] = g / (x * y);
  G.set = group % SETS;
  G.turn = group % (2 * SETS);
  G.alive = G.n;
  G.arrived = G.head = G.count = 0;
  G.used = G.free = 0;
  memset(G.variables, 0, sizeof G.variables);
  memset(G.simdgroups, 0, sizeof G.simdgroups);
  for (int i = 0; i < G.n; i++) {
    G.simdgroups[i / LANES].alive++;
    G.lanes[i] = Lane{};
    ready(G.count++) = i;
    G.stacks[G.free++] = G.memory + size_t(STACK) * (G.set * THREADS + i);
  }
}

void describe_stuck() {
  const Lane *a = nullptr, *b = nullptr;
  for (const Lane* l = G.lanes; l < G.lanes + G.n; l++) {
    if (l->state == DONE) continue;
    if (!a) a = l;
    if (!b && (l->line != a->line || l->state != a->state)) b = l;
  }
  snprintf(G.error, sizeof G.error, "stuck: thread %d waits in %s (line %d)", int(a - G.lanes), a->what, a->line);
  const size_t end = strlen(G.error);
  if (!b) return;
  snprintf(G.error + end, sizeof G.error - end, ", thread %d in %s (line %d)", int(b - G.lanes), b->what, b->line);
}

struct Signals {                               // faults of kernels come to on_signal while a kernel runs
  static constexpr int NUMBERS[] = {SIGSEGV, SIGBUS, SIGFPE};
  struct sigaction before[3];
  stack_t stack_before;
  Signals() {
    static thread_local char memory[64 << 10];
    stack_t stack = {};
    stack.ss_sp = memory;
    stack.ss_size = sizeof memory;
    sigaltstack(&stack, &stack_before);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 3; i++) sigaction(NUMBERS[i], &action, &before[i]);
    inside = true;
  }
  ~Signals() {
    inside = false;
    for (int i = 0; i < 3; i++) sigaction(NUMBERS[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }
};
}  // namespace

extern "C" {
uint lz_lane() { return G.current % LANES; }

void lz_pass(int line) {
  Lane& me = G.lanes[G.current];
  me.line = line;
  me.passed = me.passed * 31 + uint(line);
}

void lz_meet(void* slot, void (*combine)(void**, uint), const char* what, int line) {
  Lane& me = G.lanes[G.current];
  Simdgroup& simdgroup = G.simdgroups[G.current / LANES];
  if (!simdgroup.arrived) simdgroup.first = G.current;
  const Lane& first = G.lanes[simdgroup.first];
  if (simdgroup.arrived && (first.line != line || first.combine != combine))
    fail("divergent simdgroup: thread %d is in %s (line %d), thread %d in %s (line %d)", simdgroup.first, first.what,
         first.line, G.current, what, line);
  me.slot = slot;
  me.combine = combine;
  me.what = what;
  me.line = line;
  me.state = SIMD;
  if (++simdgroup.arrived == simdgroup.alive) fire(G.current / LANES);
  wait();
}

void lz_simdgroup_barrier(bool fence, int line) {
  void* order = &tsan_simd[G.current / LANES];
  if (fence) release(order);
  lz_meet(nullptr, nullptr, "simdgroup_barrier", line);
  if (fence) acquire(order);
}

void lz_threadgroup_barrier(int line) {
  Lane& me = G.lanes[G.current];
  me.what = "threadgroup_barrier";
  me.line = line;
  me.state = BARRIER;
  if (!G.arrived) G.first = G.current;
  if (G.lanes[G.first].line != line)
    fail("divergent threadgroup_barrier: thread %d is in line %d, thread %d in line %d", G.first, G.lanes[G.first].line,
         G.current, line);
  if (G.alive < G.n) returned(G.returned, G.current);
  release(&G.arrived);
  if (++G.arrived == G.n) {
    for (int s = 0; s * LANES < G.n; s++) check_passed(s);
    G.arrived = 0;
    for (int i = 0; i < G.n; i++) push(i);
  }
  wait();
  acquire(&G.arrived);
}

void lz_multiply(void* operands, int line) {
  const auto multiply = [](void** slots, uint mask) {
    if (mask != ~0u) fail("simdgroup_multiply needs all 32 lanes (line %d)", G.lanes[G.current].line);
    float m[4][8][8];                          // a, b, c, result
    const auto each = [&](int first, int last, void (*copy)(float& of_lane, float& of_matrix)) {
      for (uint lane = 0; lane < LANES; lane++)
        for (int which = first; which < last; which++)
          for (int i = 0; i < 2; i++)
            copy(((float**)slots)[lane][2 * which + i], m[which][matrix_row(lane)][matrix_column(lane) + i]);
    };
    each(0, 3, [](float& of_lane, float& of_matrix) { of_matrix = of_lane; });
    for (int i = 0; i < 64; i++) m[3][i / 8][i % 8] = m[2][i / 8][i % 8];
    for (int i = 0; i < 8; i++)
      for (int k = 0; k < 8; k++)
        for (int j = 0; j < 8; j++) m[3][i][j] += m[0][i][k] * m[1][k][j];
    each(3, 4, [](float& of_lane, float& of_matrix) { of_lane = of_matrix; });
  };
  lz_meet(operands, multiply, "simdgroup_multiply", line);
}

void* lz_threadgroup(int variable, ulong size) {   // one for each place in the source; 0xff bytes: NaN, huge or -1
  if (variable >= VARIABLES) fail("more than %d threadgroup variables", VARIABLES);
  void*& at = G.variables[variable];
  if (!at) {
    at = G.arenas + G.set * ARENA + G.used;
    G.used = (G.used + size + 15) & ~size_t(15);
    if (G.used > LIMIT) fail("%zu bytes of threadgroup memory; there are %d", G.used, LIMIT);
    for (ulong i = 0; i < size; i += sizeof i) *(volatile ulong*)((char*)at + i) = ~0ul;     // not seen by sanitizers
  }
  return at;
}

// Runs a kernel. arguments: 31 addresses, null: not bound. The answer is null, or what went wrong.
const char* lz_run(const Function* function, void** arguments, const uint* groups, const uint* threads, uint schedule) {
  static thread_local char error[sizeof G.error];
  std::lock_guard<std::mutex> lock(busy);
  if (!G.memory) prepare();
  const ulong n = ulong(threads[0]) * threads[1] * threads[2], total = ulong(groups[0]) * groups[1] * groups[2];
  if (n < 1 || n > THREADS || total < 1 || total > 0x7fffffff) {
    snprintf(error, sizeof error, "%s: %lu threadgroups of %lu threads; there can be 1 to 2^31 of 1 to %d",
             function->name, total, n, THREADS);
    return error;
  }
  void* bound[32];
  for (int i = 0; i < 31; i++) bound[i] = arguments[i] ? arguments[i] : G.unbound + UNBOUND * i + UNBOUND / 2;
  G.function = function;
  G.arguments = bound;
  G.schedule = schedule;
  G.random = schedule * 2654435761u + 12345;
  G.n = int(n);
  G.error[0] = 0;
  for (int i = 0; i < 3; i++) {
    G.base.groups[i] = groups[i];
    G.base.size[i] = threads[i];
    G.base.total[i] = groups[i] * threads[i];
  }
  Signals signals;
  announce_host();
  release(&tsan_begin);
  for (ulong group = 0; group < total && !G.error[0]; group++) {
    begin(uint(group), uint(total));
    resume(pop(), &G.host);
    if (!G.error[0] && G.alive) describe_stuck();
  }
  acquire(&tsan_end);
  if (!G.error[0]) return nullptr;
  snprintf(error, sizeof error, "%s: %s", function->name, G.error);
  return error;
}
}
}  // namespace msl

// An Objective-C runtime and a Metal driver with just the messages that a compute host sends. Names, argument types and
// rules are Metal's; the GPU behind it (fibers.cpp) is as unfriendly as Metal allows: committing only queues, work runs
// when the host waits (or sometimes when it asks), and dispatches between two barriers run in any order.
// What Metal calls an error comes as a failed command buffer or an NSError; what would crash there ends the process
// with a sentence: over-release, a message to a released object, an unknown selector.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "msl.h"

namespace metal_driver {

using UInteger = unsigned long;
struct Size {
  UInteger x, y, z;
};
struct Selector {
  std::string name;
  int number;
};
using SEL = const Selector*;
constexpr int SELECTORS = 512, BUFFERS = 31, BYTES = 4096, COMPLETED = 4, FAILED = 5, UNTRACKED = 0x100;

std::string text(const char* format, ...) {
  char out[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(out, sizeof out, format, arguments);
  va_end(arguments);
  return out;
}

[[noreturn]] void die(const std::string& why) {
  fprintf(stderr, "emulated Metal: %s\n", why.c_str());
  abort();
}

// ---------------------------------------------------------------- objects

struct Class {
  std::string name;
  void* methods[SELECTORS] = {};
};
std::atomic<long> live;
std::recursive_mutex lock;                     // of everything but encoding
std::mt19937_64 random_bits;
bool unfriendly;

struct Object {
  Class* isa;
  std::atomic<long> references{1};
  explicit Object(const char* name);
  virtual ~Object() = default;
  virtual void end() {}                        // gives memory back; the object stays a while, to be recognised
};

std::map<std::string, Class*>& classes() {
  static std::map<std::string, Class*> table;
  return table;
}
Class* find_class(const std::string& name) {
  Class*& found = classes()[name];
  if (!found) found = new Class{name};
  return found;
}
Object::Object(const char* name) : isa(find_class(name)) { live++; }

Object* retain(Object* o) {
  o->references++;
  return o;
}
void release(Object* o) {
  static std::deque<Object*> dead;
  if (--o->references) return;
  std::lock_guard<std::recursive_mutex> guard(lock);
  live--;
  o->end();
  o->isa = find_class("released " + o->isa->name);
  dead.push_back(o);
  if (dead.size() > 10000) {
    delete dead.front();
    dead.pop_front();
  }
}
bool is_dead(const Object* o) { return o->references <= 0; }

thread_local std::vector<Object*> pool;
template <class T> T* autoreleased(T* o) {
  pool.push_back(o);
  return o;
}

struct String : Object {
  std::string value;
  explicit String(std::string v) : Object("NSString"), value(std::move(v)) {}
};
struct Error : Object {
  std::string why;
  explicit Error(std::string v) : Object("NSError"), why(std::move(v)) {}
};
struct Plain : Object {                        // options and descriptors: nothing in them matters here
  using Object::Object;
};
Object* refuse(Object** error, const std::string& why) {
  if (error) *error = autoreleased(new Error(why));
  return nullptr;
}

// ---------------------------------------------------------------- what a device makes

std::atomic<UInteger> allocated;

struct Buffer : Object {
  char* memory;
  UInteger length, mapped;                     // mapped: ours to unmap, 0 for memory of the host
  bool untracked;
  Buffer(void* m, UInteger n, UInteger own, UInteger options)
      : Object("MTLBuffer"), memory((char*)m), length(n), mapped(own), untracked(options & UNTRACKED) {
    allocated += n;
  }
  void end() override {
    allocated -= length;
    if (mapped) munmap(memory, mapped);
  }
};

Object* new_buffer(UInteger length, UInteger options) {      // ends, rounded to pages, at one that nobody may touch
  const UInteger page = sysconf(_SC_PAGESIZE), whole = (length + page - 1) / page * page;
  if (!length) return nullptr;
  char* m = (char*)mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (m == MAP_FAILED) return nullptr;
  memset(m, 0xff, whole);
  mprotect(m + whole, page, PROT_NONE);
  return new Buffer(m, length, whole + page, options);
}

Object* new_buffer_over(void* memory, UInteger length, UInteger options) {
  const UInteger page = sysconf(_SC_PAGESIZE);
  return UInteger(memory) % page || length % page || !length ? nullptr : new Buffer(memory, length, 0, options);
}

struct Values : Object {
  std::map<std::string, std::pair<UInteger, std::vector<char>>> by_name;      // MTLDataType, the value's bytes
  Values() : Object("MTLFunctionConstantValues") {}
  void set(const void* value, UInteger type, const std::string& name) {
    static const std::map<UInteger, int> sizes = {{3, 4}, {16, 2}, {29, 4}, {33, 4}, {37, 2}, {41, 2}, {45, 1},
                                                  {49, 1}, {53, 1}, {81, 8}, {85, 8}};
    if (!sizes.count(type)) die(text("setConstantValue:type:withName: %s: unknown data type %lu", name.c_str(), type));
    by_name[name] = {type, std::vector<char>((const char*)value, (const char*)value + sizes.at(type))};
  }
};

struct Library : Object {
  const msl::Function* functions;
  const msl::Constant* constants;
  explicit Library(void* handle)
      : Object("MTLLibrary"), functions((const msl::Function*)dlsym(handle, "lz_functions")),
        constants((const msl::Constant*)dlsym(handle, "lz_constants")) {}
};

void (*compiler)(const char* source, char* path, char* error, size_t size);

Object* new_library(String* source, Object** error) {
  std::vector<char> path(16 << 10), why(16 << 10);
  compiler(source->value.c_str(), path.data(), why.data(), path.size());
  if (why[0]) return refuse(error, why.data());
  void* handle = dlopen(path.data(), RTLD_NOW | RTLD_LOCAL);
  return handle ? new Library(handle) : refuse(error, dlerror());
}

struct Kernel : Object {                       // MTLFunction, then MTLComputePipelineState
  const msl::Function* function;
  std::vector<std::pair<const msl::Constant*, std::vector<char>>> constants;
  explicit Kernel(const msl::Function* f) : Object("MTLFunction"), function(f) {}
  Kernel(const Kernel& k) : Object("MTLComputePipelineState"), function(k.function), constants(k.constants) {}
};

Object* new_function(Library* library, String* name, Values* values, Object** error) {
  const msl::Function* f = library->functions;
  while (f->name && name->value != f->name) f++;
  if (!f->name) return refuse(error, "the library has no function " + name->value);
  Kernel* kernel = new Kernel(f);
  for (const msl::Constant* c = library->constants; c->name; c++) {
    std::vector<char> bytes(c->size, char(0xff));            // not given: poison
    if (values && values->by_name.count(c->name)) {
      const auto& [type, given] = values->by_name[c->name];
      if (type != UInteger(c->type)) {
        release(kernel);
        return refuse(error, text("function constant %s has data type %d, its value %lu", c->name, c->type, type));
      }
      bytes = given;
    }
    kernel->constants.emplace_back(c, bytes);
  }
  return kernel;
}

// ---------------------------------------------------------------- command buffers

struct Binding {
  Buffer* buffer;                              // null: bytes, at this offset of the command buffer's own
  UInteger offset;
  int index;                                   // -1: nothing bound
};
struct Step {
  enum { DISPATCH, BARRIER } kind;
  Kernel* kernel = nullptr;
  Size groups = {}, threads = {};
  size_t first = 0, count = 0;                 // of the command buffer's bindings
};
struct Pass {                                  // what one encoder wrote
  bool concurrent;
  std::vector<Step> steps;
  std::vector<Object*> waits, updates;         // fences
};
struct Queue : Object {
  std::deque<struct Commands*> pending;
  std::vector<Object*> updated;                // fences that the last pass updated
  bool begun = false;
  Queue() : Object("MTLCommandQueue") {}
};
struct Commands : Object {
  Queue* queue;
  std::deque<Pass> passes;
  std::vector<Binding> bindings;
  std::vector<char> bytes;
  std::string error;
  long status = 0;
  bool encoding = false;
  double start = 0, stop = 0;
  explicit Commands(Queue* q) : Object("MTLCommandBuffer"), queue(q) {}
  void end() override { passes.clear(), bindings = {}, bytes = {}; }
  void complain(const std::string& why) { if (error.empty()) error = why; }
};
struct Encoder : Object {
  Commands* commands;
  Pass* pass;
  Kernel* kernel = nullptr;
  Binding bound[BUFFERS];
  Encoder(Commands* c, bool concurrent) : Object("MTLComputeCommandEncoder"), commands(c) {
    if (c->encoding || c->status) die("computeCommandEncoder: the command buffer has an open encoder, or is committed");
    c->encoding = true;
    c->passes.push_back({concurrent, {}, {}, {}});
    pass = &c->passes.back();
    for (Binding& b : bound) b.index = -1;
  }
};

void bind(Encoder* e, UInteger index, Buffer* buffer, UInteger offset) {
  if (index >= BUFFERS) return e->commands->complain(text("buffer index %lu; the highest is %d", index, BUFFERS - 1));
  if (buffer && offset >= buffer->length)
    e->commands->complain(text("setBuffer: offset %lu, and the buffer has %lu bytes", offset, buffer->length));
  e->bound[index] = {buffer, offset, int(index)};
}

void bind_bytes(Encoder* e, const void* data, UInteger length, UInteger index) {
  Commands* c = e->commands;
  if (length > BYTES || !length) return c->complain(text("setBytes: %lu bytes; there can be 1 to %d", length, BYTES));
  const size_t at = (c->bytes.size() + 15) & ~size_t(15);
  c->bytes.resize(at + length);
  memcpy(c->bytes.data() + at, data, length);
  bind(e, index, nullptr, at);
}

void dispatch(Encoder* e, Size groups, Size threads) {
  Commands* c = e->commands;
  if (!e->kernel) return c->complain("dispatch without a pipeline");
  const size_t first = c->bindings.size();
  for (const msl::Argument* a = e->kernel->function->arguments; a->name; a++)
    if (e->bound[a->index].index >= 0) c->bindings.push_back(e->bound[a->index]);
  e->pass->steps.push_back({Step::DISPATCH, e->kernel, groups, threads, first, c->bindings.size() - first});
}

void end_encoding(Encoder* e) {
  if (!e->commands->encoding) die("endEncoding: twice");
  e->commands->encoding = false;
}

void commit(Commands* c) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  if (c->encoding) die("commit: an encoder is still open");
  if (c->status) die("commit: twice");
  c->status = 2;
  retain(c);
  c->queue->pending.push_back(c);
}

// ---------------------------------------------------------------- the GPU's side

std::string run_step(Commands* c, const Step& step) {
  if (is_dead(step.kernel)) return "a pipeline was released while its command buffer was in flight";
  const msl::Function* f = step.kernel->function;
  void* arguments[BUFFERS] = {};
  for (size_t i = step.first; i < step.first + step.count; i++) {
    const Binding& b = c->bindings[i];
    if (b.buffer && is_dead(b.buffer))
      return text("%s: buffer %d was released while its command buffer was in flight", f->name, b.index);
    arguments[b.index] = (b.buffer ? b.buffer->memory : c->bytes.data()) + b.offset;
  }
  for (auto& [constant, bytes] : step.kernel->constants) memcpy(constant->value, bytes.data(), bytes.size());
  const uint groups[] = {uint(step.groups.x), uint(step.groups.y), uint(step.groups.z)};
  const uint threads[] = {uint(step.threads.x), uint(step.threads.y), uint(step.threads.z)};
  const char* why = msl::lz_run(f, arguments, groups, threads, unfriendly ? uint(random_bits() % 4) : 0);
  return why ? why : "";
}

bool uses_untracked(const Commands* c, const Pass& pass) {
  for (const Step& s : pass.steps)
    for (size_t i = s.first; i < s.first + s.count; i++)
      if (c->bindings[i].buffer && c->bindings[i].buffer->untracked) return true;
  return false;
}

void run_pass(Commands* c, Pass& pass) {
  Queue* q = c->queue;
  const bool waits = std::any_of(pass.waits.begin(), pass.waits.end(), [&](Object* fence) {
    return std::count(q->updated.begin(), q->updated.end(), fence); });
  if (q->begun && !waits && uses_untracked(c, pass))
    return c->complain("an encoder of untracked buffers does not wait for a fence that the one before it updated");
  q->begun = true;
  q->updated = pass.updates;
  auto& steps = pass.steps;
  for (auto first = steps.begin(); first != steps.end();) {  // from barrier to barrier
    const auto last = std::find_if(first, steps.end(), [](const Step& s) { return s.kind == Step::BARRIER; });
    if (pass.concurrent && unfriendly) std::shuffle(first, last, random_bits);
    for (; first != last; ++first) {
      c->complain(run_step(c, *first));
      if (!c->error.empty()) return;
    }
    if (first != steps.end()) ++first;
  }
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void run_next(Queue* q) {
  Commands* c = q->pending.front();
  q->pending.pop_front();
  c->start = now();
  for (Pass& pass : c->passes)
    if (c->error.empty()) run_pass(c, pass);
  c->stop = now();
  c->status = c->error.empty() ? COMPLETED : FAILED;
  release(c);
}

void wait(Commands* c) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  if (!c->status) die("waitUntilCompleted: the command buffer is not committed");
  while (c->status < COMPLETED) run_next(c->queue);
}

long status(Commands* c) {                     // a host that asks often enough sees it done
  std::lock_guard<std::recursive_mutex> guard(lock);
  if (c->status == 2 && (!unfriendly || random_bits() % 2)) run_next(c->queue);
  return c->status;
}

// ---------------------------------------------------------------- messages

std::map<std::string, Selector*>& selectors() {
  static std::map<std::string, Selector*> table;
  return table;
}
SEL selector(const std::string& name) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  Selector*& found = selectors()[name];
  if (!found) found = new Selector{name, int(selectors().size() - 1)};
  if (found->number >= SELECTORS) die("too many selectors");
  return found;
}

template <class R, class S, class... A> void add(const char* owner, const char* name, R (*method)(S*, SEL, A...)) {
  if (std::count(name, name + strlen(name), ':') != sizeof...(A)) die(std::string(name) + ": arguments");
  find_class(owner)->methods[selector(name)->number] = (void*)method;
}

void* find_method(const Class* c, SEL s) {
  static const Class* const object = find_class("NSObject");
  return c->methods[s->number] ? c->methods[s->number] : object->methods[s->number];
}

// Methods of a class: each a selector, what it returns and its arguments (, type name …), then what it does. "+X" has
// the messages to X itself.
#define CLASS(name, type) for (const char* owner = name; owner; owner = nullptr) { using Type = type;
#define ON(selector, result, ...) add(owner, selector, +[](Type* self, SEL __VA_ARGS__) -> result
#define IGNORE(selector, ...) add(owner, selector, +[](Type*, SEL, __VA_ARGS__) {})
#define END }

void register_methods() {
  static const UInteger memory = UInteger(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  CLASS("NSObject", Object)                    // every object's
    ON("retain", Object*) { return retain(self); });
    ON("release", void) { release(self); });
    ON("autorelease", Object*) { return autoreleased(self); });
    ON("respondsToSelector:", bool, , SEL s) { return find_method(self->isa, s) != nullptr; });
    IGNORE("setLabel:", String*);
  END
  add("+NSString", "stringWithUTF8String:", +[](Object*, SEL, const char* s) { return autoreleased(new String(s)); });
  add("NSString", "UTF8String", +[](String* self, SEL) { return self->value.c_str(); });
  add("NSError", "localizedDescription", +[](Error* self, SEL) { return autoreleased(new String(self->why)); });
  add("+MTLCompileOptions", "new", +[](Object*, SEL) { return new Plain("MTLCompileOptions"); });
  add("+MTLFunctionConstantValues", "new", +[](Object*, SEL) { return new Values; });
  add("+MTLResidencySetDescriptor", "new", +[](Object*, SEL) { return new Plain("MTLResidencySetDescriptor"); });
  add("MTLArchitecture", "name", +[](Object*, SEL) { return autoreleased(new String("emulated")); });
  CLASS("MTLCompileOptions", Object)
    ON("setLanguageVersion:", void, , UInteger v) {
      if (v < (3 << 16 | 1)) die("setLanguageVersion: bfloat needs 3.1"); });
    IGNORE("setMathMode:", long);
    IGNORE("setMathFloatingPointFunctions:", long);
    IGNORE("setFastMathEnabled:", bool);
  END
  CLASS("MTLFunctionConstantValues", Values)
    ON("setConstantValue:type:withName:", void, , const void* value, UInteger type, String* name) {
      self->set(value, type, name->value); });
  END
  CLASS("MTLDevice", Object)
    ON("name", Object*) { return autoreleased(new String("Emulated Metal device")); });
    ON("architecture", Object*) { return autoreleased(new Plain("MTLArchitecture")); });
    ON("maxThreadgroupMemoryLength", UInteger) { return 32 << 10; });
    ON("maxBufferLength", UInteger) { return memory / 2; });
    ON("recommendedMaxWorkingSetSize", UInteger) { return memory / 4 * 3; });
    ON("currentAllocatedSize", UInteger) { return allocated; });
    ON("hasUnifiedMemory", bool) { return true; });
    ON("supportsFamily:", bool, , long family) { return family <= 1007; });
    ON("newBufferWithLength:options:", Object*, , UInteger n, UInteger options) { return new_buffer(n, options); });
    ON("newBufferWithBytesNoCopy:length:options:deallocator:", Object*, , void* p, UInteger n, UInteger o, void*) {
      return new_buffer_over(p, n, o); });
    ON("newLibraryWithSource:options:error:", Object*, , String* s, Object*, Object** e) { return new_library(s, e); });
    ON("newComputePipelineStateWithFunction:error:", Object*, , Kernel* f, Object**) { return new Kernel(*f); });
    ON("newCommandQueue", Object*) { return new Queue; });
    ON("newFence", Object*) { return new Plain("MTLFence"); });
    ON("newResidencySetWithDescriptor:error:", Object*, , Object*, Object**) { return new Plain("MTLResidencySet"); });
  END
  CLASS("MTLResidencySet", Object)
    IGNORE("addAllocation:", Object*);
    IGNORE("removeAllocation:", Object*);
    ON("commit", void) {});
    ON("requestResidency", void) {});
  END
  CLASS("MTLLibrary", Library)
    ON("newFunctionWithName:constantValues:error:", Object*, , String* name, Values* values, Object** error) {
      return new_function(self, name, values, error); });
  END
  CLASS("MTLComputePipelineState", Kernel)
    ON("maxTotalThreadsPerThreadgroup", UInteger) { return 1024; });
    ON("threadExecutionWidth", UInteger) { return 32; });
  END
  CLASS("MTLBuffer", Buffer)
    ON("contents", void*) { return self->memory; });
    ON("length", UInteger) { return self->length; });
  END
  CLASS("MTLCommandQueue", Queue)
    ON("commandBufferWithUnretainedReferences", Object*) { return autoreleased(new Commands(self)); });
    IGNORE("addResidencySet:", Object*);
  END
  CLASS("MTLCommandBuffer", Commands)
    ON("computeCommandEncoderWithDispatchType:", Object*, , UInteger type) {
      return autoreleased(new Encoder(self, type == 1)); });
    ON("commit", void) { commit(self); });
    ON("waitUntilCompleted", void) { wait(self); });
    ON("status", long) { return status(self); });
    ON("error", Object*) { return self->status == FAILED ? autoreleased(new Error(self->error)) : nullptr; });
    ON("GPUStartTime", double) { return self->start; });
    ON("GPUEndTime", double) { return self->stop; });
  END
  CLASS("MTLComputeCommandEncoder", Encoder)
    ON("waitForFence:", void, , Object* fence) { self->pass->waits.push_back(fence); });
    ON("updateFence:", void, , Object* fence) { self->pass->updates.push_back(fence); });
    ON("setComputePipelineState:", void, , Kernel* k) { self->kernel = k; });
    ON("setBuffer:offset:atIndex:", void, , Buffer* b, UInteger offset, UInteger i) { bind(self, i, b, offset); });
    ON("setBytes:length:atIndex:", void, , const void* p, UInteger n, UInteger i) { bind_bytes(self, p, n, i); });
    ON("memoryBarrierWithScope:", void, , UInteger) { self->pass->steps.push_back({Step::BARRIER}); });
    ON("dispatchThreadgroups:threadsPerThreadgroup:", void, , Size groups, Size threads) {
      dispatch(self, groups, threads); });
    ON("endEncoding", void) { end_encoding(self); });
  END
}
}  // namespace metal_driver

// ---------------------------------------------------------------- the C functions that hosts call

using namespace metal_driver;

extern "C" {
void lz_set_compiler(void (*f)(const char*, char*, char*, size_t)) { compiler = f; }
void lz_seed(long seed) {                      // 0: everything in order
  std::lock_guard<std::recursive_mutex> guard(lock);
  unfriendly = seed != 0;
  random_bits.seed(seed);
}
long lz_live() { return live; }                // objects that nobody has released

const Selector* sel_registerName(const char* name) { return selector(name); }
void* objc_autoreleasePoolPush() { return (void*)(pool.size() + 1); }
void objc_autoreleasePoolPop(void* mark) {
  for (; pool.size() + 1 > (size_t)mark; pool.pop_back()) release(pool.back());
}

static void begin() {
  static const bool once = [] {
    register_methods();
    const char* seed = getenv("LAZULITE_METAL_SEED");
    lz_seed(seed ? atol(seed) : 1);
    return true;
  }();
  (void)once;
}
Object* objc_getClass(const char* name) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  static std::map<std::string, Object*> made;
  begin();
  if (!classes().count(std::string("+") + name)) return nullptr;
  Object*& found = made[name];
  if (!found) {
    found = new Plain((std::string("+") + name).c_str());
    live--;                                    // classes stay
  }
  return found;
}
Object* MTLCreateSystemDefaultDevice() {
  std::lock_guard<std::recursive_mutex> guard(lock);
  begin();
  return new Plain("MTLDevice");
}

static UInteger nothing() { return 0; }        // what a message to nil does
void* lz_find(Object* receiver, SEL s) {
  if (!receiver) return (void*)nothing;
  void* method = find_method(receiver->isa, s);
  if (receiver->references <= 0) die(s->name + " sent to a " + receiver->isa->name);
  if (!method) die(receiver->isa->name + " does not know " + s->name);
  return method;
}
void objc_msgSend();
}
// Finds the method and goes on there with the caller's own arguments, whatever they are.
#if defined(__x86_64__)
asm(R"(
.text
.globl objc_msgSend
.type objc_msgSend, @function
objc_msgSend:
  pushq %rbp
  pushq %rdi
  pushq %rsi
  pushq %rdx
  pushq %rcx
  pushq %r8
  pushq %r9
  call lz_find@PLT
  movq %rax, %r11
  popq %r9
  popq %r8
  popq %rcx
  popq %rdx
  popq %rsi
  popq %rdi
  popq %rbp
  jmp *%r11
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl objc_msgSend
.type objc_msgSend, %function
objc_msgSend:
  stp x29, x30, [sp, #-96]!
  stp x0, x1, [sp, #16]
  stp x2, x3, [sp, #32]
  stp x4, x5, [sp, #48]
  stp x6, x7, [sp, #64]
  str x8, [sp, #80]
  bl lz_find
  mov x16, x0
  ldp x0, x1, [sp, #16]
  ldp x2, x3, [sp, #32]
  ldp x4, x5, [sp, #48]
  ldp x6, x7, [sp, #64]
  ldr x8, [sp, #80]
  ldp x29, x30, [sp], #96
  br x16
)");
#endif

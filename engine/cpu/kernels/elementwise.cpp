// elementwise: any chain of pointwise operations as one pass over memory. o: results of one shape; i: operands of that
// shape (stride 0 repeats), any dtype and strides. Bytes moved: each operand read once, each result written once.
//
//   ints = [class, n_instr, n_const, out_register × n_out, (op, dst, a, b, c) × n_instr]; floats = constants
//   class: the registers' type, 0 f32, 1 f64, 2 i64, 3 u64. Registers: loaded inputs, then constants, then temporaries.
//
// A small machine interprets the program over tiles of 512 items: a register is 512 numbers in L1, an instruction is
// one loop over them. Operands that already have the registers' type and lie in a row are used where they are.
#include "../functions.h"
#include "../rows.h"

LZ_NAMESPACE_BEGIN

constexpr int64_t TILE = 512;
constexpr int MAX_REGISTERS = 64;

enum { F32 = 1, F64 = 2, I64 = 4, U64 = 8, FLOAT = F32 | F64, INT = I64 | U64, ANY = FLOAT | INT };

#define LZ_OP(name, arity_, classes_, value)                                       \
  struct Op_##name {                                                               \
    static constexpr int arity = arity_, classes = classes_;                       \
    template <class V> LZ_INLINE V of(V a, V b, V c) {                             \
      const V zero{};                                                              \
      (void)a, (void)b, (void)c, (void)zero;                                       \
      return V(value);                                                             \
    }                                                                              \
  };
#include "../opcodes.h"

enum {
#define LZ_OP(name, ...) OP_##name,
#include "../opcodes.h"
  N_OPS
};

template <class T> struct Class;
template <> struct Class<float> { static constexpr int bit = F32, dtype = LZ_F32; };
template <> struct Class<double> { static constexpr int bit = F64, dtype = LZ_F64; };
template <> struct Class<int64_t> { static constexpr int bit = I64, dtype = LZ_I64; };
template <> struct Class<uint64_t> { static constexpr int bit = U64, dtype = LZ_U64; };

template <class T> using Loop = void (*)(T* d, const T* a, const T* b, const T* c, int64_t n);

// Vectors of floats run over the end of a tile that is not full: registers have room for that.
template <class Op, class T> static void loop(T* d, const T* a, const T* b, const T* c, int64_t n) {
  if constexpr (Same<T, float>::value)
    for (int64_t k = 0; k < n; k += LANES)
      store(d + k, Op::template of<f32x>(loadf(a + k), loadf(b + k), loadf(c + k)));
  else
    for (int64_t k = 0; k < n; k++) d[k] = Op::template of<T>(a[k], b[k], c[k]);
}
template <class Op, class T> constexpr Loop<T> loop_or_null() {
  if constexpr ((Op::classes & Class<T>::bit) != 0) return loop<Op, T>;
  else return nullptr;
}
template <class T> LZ_INLINE Loop<T> loop_of(int64_t op) {
#define LZ_OP(name, ...) loop_or_null<Op_##name, T>(),
  static constexpr Loop<T> table[] = {
#include "../opcodes.h"
  };
  return table[op];
}
static constexpr uint8_t ARITY[] = {
#define LZ_OP(name, arity, ...) arity,
#include "../opcodes.h"
}, CLASSES[] = {
#define LZ_OP(name, arity, classes, ...) classes,
#include "../opcodes.h"
};

struct Instruction { int64_t op, dst, a, b, c; };

struct Program {
  int64_t type, n, n_const;
  const int64_t* outputs;
  const Instruction* code;
};
LZ_INLINE Program program(const Step& s) {
  return {s.ints[0], s.ints[1], s.ints[2], s.ints + 3, reinterpret_cast<const Instruction*>(s.ints + 3 + s.n_out)};
}

// d = a, truncated to an integer type and widened again
template <class T> static void wrap(T* d, const T* a, int dtype, int64_t n) {
  const int shift = 64 - 8 * ITEM_SIZE[dtype];
  for (int64_t k = 0; k < n; k++) {
    const uint64_t high = (uint64_t)a[k] << shift;
    d[k] = dtype == LZ_BOOL ? T(a[k] != 0) : dtype >= LZ_I8 ? (T)((int64_t)high >> shift) : (T)(high >> shift);
  }
}

struct Operand {
  char* data;
  int item;              // bytes
  const int64_t* strides;
  bool same, flat;       // has the registers' type; lies in memory as the merged axes do, without gaps
  bool constant;         // one item, repeated
};
LZ_INLINE Operand operand(const View& v, int dtype, const Axes& axes, const int64_t* strides) {
  Operand o = {v.data, ITEM_SIZE[v.dtype], strides, v.dtype == dtype, true, true};
  int64_t expected = 1;
  for (int i = axes.n - 1; i >= 0; i--) {
    o.flat &= strides[i] == expected;
    o.constant &= strides[i] == 0;
    expected *= axes.shape[i];
  }
  return o;
}
// Where n items from `index` (flat number `at`) lie in memory as a register would have them; null: nowhere.
LZ_INLINE char* in_place(const Operand& o, const Axes& axes, const int64_t* index, int64_t at, int64_t n) {
  if (!o.same || n % LANES) return nullptr;
  if (o.flat) return o.data + at * o.item;
  const int last = axes.n - 1;
  if (o.strides[last] != 1 || index[last] + n > axes.shape[last]) return nullptr;
  int64_t offset = 0;
  for (int i = 0; i <= last; i++) offset += index[i] * o.strides[i];
  return o.data + offset * o.item;
}

template <class T> static void run_as(const Step& s, Team& team) {
  const Program p = program(s);
  int64_t strides[MAX_REGISTERS][LZ_MAX_DIMS], index[LZ_MAX_DIMS], begin, end;
  const Axes axes = merge_axes(s.out, s.n_out + s.n_in, strides);  // inputs follow outputs
  team.part(axes.size, TILE, &begin, &end);
  if (begin == end) return;

  Operand operands[MAX_REGISTERS], *const inputs = operands + s.n_out;
  for (int i = 0; i < s.n_out + s.n_in; i++) operands[i] = operand(s.out[i], Class<T>::dtype, axes, strides[i]);
  T *home = reinterpret_cast<T*>(team.local), *reg[MAX_REGISTERS];
  for (int r = 0; r < MAX_REGISTERS; r++) reg[r] = home + r * TILE;
  for (int i = 0; i < s.n_in; i++)
    if (inputs[i].constant) loader<T>(s.in[i].dtype)(reg[i], inputs[i].data, 0, TILE);
  for (int64_t i = 0; i < p.n_const; i++)
    for (int64_t k = 0; k < TILE; k++) reg[s.n_in + i][k] = (T)s.floats[i];
  const bool into_output = s.n_out == 1 && p.n > 0 && p.outputs[0] == p.code[p.n - 1].dst;

  for (int64_t at = begin; at < end; at += TILE) {
    const int64_t n = end - at < TILE ? end - at : TILE;
    seek(axes, at, index);
    for (int i = 0; i < s.n_in; i++) {
      const Operand& o = inputs[i];
      if (o.constant) continue;
      if (char* here = in_place(o, axes, index, at, n)) {
        reg[i] = reinterpret_cast<T*>(here);
        continue;
      }
      T* to = reg[i] = home + i * TILE;
      const Load<T> load = loader<T>(s.in[i].dtype);
      for_runs(axes, o.strides, index, n, [&](int64_t offset, int64_t length) {
        load(to, o.data + offset * o.item, o.strides[axes.n - 1], length);
        to += length;
      });
    }
    for (int64_t i = 0; i < p.n; i++) {
      const Instruction& e = p.code[i];
      const T* a = reg[e.a];
      const T* b = ARITY[e.op] > 1 ? reg[e.b] : a;
      const T* c = ARITY[e.op] > 2 ? reg[e.c] : a;
      T* d = reg[e.dst] = home + e.dst * TILE;
      if (into_output && i == p.n - 1)
        if (char* here = in_place(operands[0], axes, index, at, n)) d = reg[e.dst] = reinterpret_cast<T*>(here);
      if (e.op == OP_wrap) wrap(d, a, (int)e.b, n);
      else loop_of<T>(e.op)(d, a, b, c, n);
    }
    for (int i = 0; i < s.n_out; i++) {
      const Operand& o = operands[i];
      const T* from = reg[p.outputs[i]];
      if (reinterpret_cast<const char*>(from) == in_place(o, axes, index, at, n)) continue;
      const Store<T> store = storer<T>(s.out[i].dtype);
      for_runs(axes, o.strides, index, n, [&](int64_t offset, int64_t length) {
        store(o.data + offset * o.item, from, o.strides[axes.n - 1], length);
        from += length;
      });
    }
  }
}

static void run(const Step& s, Team& team) {
  static constexpr void (*classes[])(const Step&, Team&) = {
      run_as<float>, run_as<double>, run_as<int64_t>, run_as<uint64_t>};
  classes[s.ints[0]](s, team);
}

static size_t local(const Step& s, int) {
  const Program p = program(s);
  int64_t registers = s.n_in + p.n_const;
  for (int64_t i = 0; i < p.n; i++)
    if (p.code[i].dst >= registers) registers = p.code[i].dst + 1;
  return size_t(registers * TILE) * (p.type ? 8 : 4);
}

static const char* check(const Step& s) {
  if (s.n_out < 1 || s.n_out + s.n_in > MAX_REGISTERS) return "wants 1 output or more, and at most 64 views";
  if (s.n_int < 3 + s.n_out) return "wants ints = [class, n_instr, n_const, out_register of each output, instructions]";
  const Program p = program(s);
  if (p.type < 0 || p.type > 3) return "class must be 0 (f32), 1 (f64), 2 (i64) or 3 (u64)";
  if (p.n < 0 || s.n_int != 3 + s.n_out + 5 * p.n) return "the number of ints differs from 3 + n_out + 5 n_instr";
  if (p.n_const != s.n_float) return "the number of constants differs from the number of floats";
  if (p.n_const + s.n_in > MAX_REGISTERS) return "inputs and constants need more than 64 registers";
  for (int i = 0; i < s.n_out; i++)
    if (p.outputs[i] < 0 || p.outputs[i] >= MAX_REGISTERS) return "an output's register is not in 0..63";
  for (int i = 0; i < s.n_out + s.n_in; i++) {
    if (s.out[i].dtype == LZ_C64) return "complex64 has no elementwise kernel";
    if (s.out[i].ndim != s.out->ndim) return "views differ in their number of axes";
    for (int axis = 0; axis < s.out->ndim; axis++)
      if (s.out[i].shape[axis] != s.out->shape[axis]) return "views differ in shape (repeat with stride 0)";
  }
  for (const Instruction* e = p.code; e < p.code + p.n; e++) {
    if (e->op < 0 || e->op >= N_OPS) return "no such opcode";
    if (!(CLASSES[e->op] & 1 << p.type)) return "an operation does not exist for this class of registers";
    if (e->op == OP_wrap && (e->b < 0 || e->b > LZ_I64)) return "wrap wants an integer dtype";
    const int64_t used[] = {e->dst, e->a, ARITY[e->op] > 1 ? e->b : 0, ARITY[e->op] > 2 ? e->c : 0};
    for (int64_t r : used)
      if (r < 0 || r >= MAX_REGISTERS) return "a register is not in 0..63";
  }
  return nullptr;
}

extern const Kernel elementwise;
const Kernel elementwise = {"elementwise", run, nullptr, local, check};

LZ_NAMESPACE_END

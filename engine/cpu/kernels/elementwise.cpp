// elementwise: any chain of pointwise operations as one pass over memory. o: results of one shape; i: operands of that
// shape (stride 0 repeats), any dtype and strides. Bytes moved: each operand read once, each result written once.
//
//   ints = [class, n_instr, n_const, out_register × n_out, (op, dst, a, b, c) × n_instr]; floats = constants
//   class: the registers' type, 0 f32, 1 f64, 2 i64, 3 u64, 4 c64. Registers: loaded inputs, then constants, then temporaries.
//
// A small machine interprets the program over tiles of 512 items: a register is 512 numbers in L1, an instruction is
// one loop over them. Operands that already have the registers' type and lie in a row are used where they are. Where an
// operand is transposed, a tile is a block of 16 x 32 items, so that whole cache lines are read. Large results are streamed.
#include "../functions.h"
#include "../rows.h"

LZ_NAMESPACE_BEGIN

constexpr int64_t TILE = 512;
constexpr int MAX_REGISTERS = 64;

enum { F32 = 1, F64 = 2, I64 = 4, U64 = 8, C64 = 16, FLOAT = F32 | F64, INT = I64 | U64, ANY = FLOAT | INT };

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
template <> struct Class<c64> { static constexpr int bit = C64, dtype = LZ_C64; };

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

// The axis along which some operand lies in a row while it does not along the last one; -1: none
LZ_INLINE int turned_axis(const Axes& axes, const Operand* operands, int n) {
  const int last = axes.n - 1;
  for (int i = 0; i < n; i++)
    for (int axis = 0; axis < last; axis++)
      if (operands[i].strides[axis] == 1 && operands[i].strides[last] > 1 && axes.shape[axis] >= 16 && axes.shape[last] >= 16) return axis;
  return -1;
}

template <class T> struct Machine {
  const Step& s;
  const Program p;
  Axes axes;
  int64_t strides[MAX_REGISTERS][LZ_MAX_DIMS];  // of outputs, then inputs
  Operand operands[MAX_REGISTERS], *const inputs;
  T *home, *reg[MAX_REGISTERS];
  bool streams;

  Machine(const Step& s, char* local) : s(s), p(program(s)), inputs(operands + s.n_out), home(reinterpret_cast<T*>(local)) {
    axes = merge_axes(s.out, s.n_out + s.n_in, strides);
    for (int i = 0; i < s.n_out + s.n_in; i++) operands[i] = operand(s.out[i], Class<T>::dtype, axes, strides[i]);
    for (int r = 0; r < MAX_REGISTERS; r++) reg[r] = home + r * TILE;
    for (int i = 0; i < s.n_in; i++)
      if (inputs[i].constant) loader<T>(s.in[i].dtype)(reg[i], inputs[i].data, 0, TILE);
    for (int64_t i = 0; i < p.n_const; i++)
      for (int64_t k = 0; k < TILE; k++) reg[s.n_in + i][k] = (T)s.floats[i];
    streams = axes.size * (int64_t)sizeof(T) >= STREAMED;
  }

  // The program on n items; the last instruction's result goes `here`, if that is not null.
  void compute(int64_t n, char* here) {
    for (int64_t i = 0; i < p.n; i++) {
      const Instruction& e = p.code[i];
      const T* a = reg[e.a];
      const T* b = ARITY[e.op] > 1 ? reg[e.b] : a;
      const T* c = ARITY[e.op] > 2 ? reg[e.c] : a;
      T* d = reg[e.dst] = here && i == p.n - 1 ? reinterpret_cast<T*>(here) : home + e.dst * TILE;
      if (e.op == OP_wrap) wrap(d, a, (int)e.b, n);
      else loop_of<T>(e.op)(d, a, b, c, n);
    }
  }

  void tiles(int64_t begin, int64_t end) {
    const bool into_output = s.n_out == 1 && p.n > 0 && p.outputs[0] == p.code[p.n - 1].dst && !streams;
    int64_t index[LZ_MAX_DIMS];
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
      compute(n, into_output ? in_place(operands[0], axes, index, at, n) : nullptr);
      for (int i = 0; i < s.n_out; i++) {
        const Operand& o = operands[i];
        const T* from = reg[p.outputs[i]];
        char* here = in_place(o, axes, index, at, n);
        if (reinterpret_cast<const char*>(from) == here) continue;
        if (here && streams && n == TILE && reinterpret_cast<uintptr_t>(here) % 64 == 0) {
          stream(here, from, TILE * sizeof(T));
          continue;
        }
        const Store<T> store = storer<T>(s.out[i].dtype);
        for_runs(axes, o.strides, index, n, [&](int64_t offset, int64_t length) {
          store(o.data + offset * o.item, from, o.strides[axes.n - 1], length);
          from += length;
        });
      }
    }
    if (streams) streamed();
  }

  // Blocks of 16 items along `axis` x 32 along the last one; a register holds sixteen rows of 32.
  void blocks(int axis, Team& team) {
    constexpr int64_t ROWS = 16, COLUMNS = TILE / ROWS;
    const int last = axes.n - 1;
    Axes grid = axes;
    grid.shape[axis] = (axes.shape[axis] + ROWS - 1) / ROWS, grid.shape[last] = (axes.shape[last] + COLUMNS - 1) / COLUMNS;
    int64_t index[LZ_MAX_DIMS], begin, end, total = 1;
    for (int i = 0; i < grid.n; i++) total *= grid.shape[i];
    team.part(total, 1, &begin, &end);
    for (int64_t at = begin; at < end; at++) {
      seek(grid, at, index);
      index[axis] *= ROWS, index[last] *= COLUMNS;
      const int64_t rows = axes.shape[axis] - index[axis] < ROWS ? axes.shape[axis] - index[axis] : ROWS;
      const int64_t columns = axes.shape[last] - index[last] < COLUMNS ? axes.shape[last] - index[last] : COLUMNS;
      const auto place = [&](const Operand& o) {
        int64_t offset = 0;
        for (int i = 0; i <= last; i++) offset += index[i] * o.strides[i];
        return o.data + offset * o.item;
      };
      for (int i = 0; i < s.n_in; i++) {
        const Operand& o = inputs[i];
        if (o.constant) continue;
        const char* from = place(o);
        T* to = reg[i] = home + i * TILE;
        int64_t done = 0;
        if constexpr (Same<T, float>::value)
          if (o.same && o.strides[axis] == 1 && rows == ROWS)
            for (; done + 16 <= columns; done += 16)
              turn(reinterpret_cast<const float*>(from) + done * o.strides[last], o.strides[last], to + done, COLUMNS);
        for (int64_t r = 0; r < rows && done < columns; r++)
          loader<T>(s.in[i].dtype)(to + r * COLUMNS + done, from + (r * o.strides[axis] + done * o.strides[last]) * o.item, o.strides[last], columns - done);
      }
      compute(TILE, nullptr);
      for (int i = 0; i < s.n_out; i++) {
        const Operand& o = operands[i];
        for (int64_t r = 0; r < rows; r++)
          storer<T>(s.out[i].dtype)(place(o) + r * o.strides[axis] * o.item, reg[p.outputs[i]] + r * COLUMNS, o.strides[last], columns);
      }
    }
  }
};

template <class T> static void run_as(const Step& s, Team& team) {
  Machine<T> machine(s, team.local);
  const int axis = turned_axis(machine.axes, machine.inputs, s.n_in);
  if (axis >= 0) return machine.blocks(axis, team);
  int64_t begin, end;
  team.part(machine.axes.size, TILE, &begin, &end);
  machine.tiles(begin, end);
}

static void run(const Step& s, Team& team) {
  static constexpr void (*classes[])(const Step&, Team&) = {
      run_as<float>, run_as<double>, run_as<int64_t>, run_as<uint64_t>, run_as<c64>};
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
  if (p.type < 0 || p.type > 4) return "class must be 0 (f32), 1 (f64), 2 (i64), 3 (u64) or 4 (c64)";
  if (p.n < 0 || s.n_int != 3 + s.n_out + 5 * p.n) return "the number of ints differs from 3 + n_out + 5 n_instr";
  if (p.n_const != s.n_float) return "the number of constants differs from the number of floats";
  if (p.n_const + s.n_in > MAX_REGISTERS) return "inputs and constants need more than 64 registers";
  for (int i = 0; i < s.n_out; i++)
    if (p.outputs[i] < 0 || p.outputs[i] >= MAX_REGISTERS) return "an output's register is not in 0..63";
  for (int i = 0; i < s.n_out + s.n_in; i++) {
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

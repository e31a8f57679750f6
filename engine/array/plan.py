"""lower(): a graph becomes a Plan, a flat list of steps over views of one arena, inputs, outputs and constants."""
from __future__ import annotations

import importlib
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .dtypes import FROM_NUMPY, Dtype, bool_
from .node import Buffer, Dim, Node, Shape, Value, contiguous_strides, from_numpy, is_contiguous, show, toposort
from .primitives import elementwise_class
from .rewrites import rewrite

ALIGN = 64
MAX_DIMS, MAX_INPUTS, MAX_REGISTERS = 8, 8, 64
DEFERRED = "deferred"                # returned by a row's `lower` whose inputs are read by a later step


def runtime() -> Any:
    """The CPU runtime, by name only: this package runs no kernel and imports none."""
    return importlib.import_module("lazulite.engine.cpu").runtime()


@dataclass(slots=True, eq=False)
class Storage:
    """Memory of the plan. `refs` counts the values on it that are still to be read while lowering."""

    kind: str                        # arena, input, output or constant
    nbytes: int
    index: int = 0                   # among the inputs, outputs or constants
    offset: int = 0                  # in the arena
    writable: bool = True
    refs: int = 0

    def __str__(self) -> str:
        return f"arena+{self.offset}" if self.kind == "arena" else f"{self.kind}{self.index}"


@dataclass(frozen=True, slots=True)
class View:
    """A strided window on a storage: start in bytes, strides in elements."""

    storage: Storage
    dtype: Dtype
    start: int
    shape: Shape
    strides: Shape

    @property
    def contiguous(self) -> bool:
        return is_contiguous(self.shape, self.strides)

    @property
    def offset(self) -> int:
        return self.storage.offset + self.start

    def moved(self, shape: Shape, strides: Shape, first: int = 0, dtype: Dtype | None = None) -> View:
        return View(self.storage, dtype or self.dtype, self.start + first * self.dtype.size, shape, strides)

    def reshaped(self, *shape: int) -> View:
        """A row-major view under another shape."""
        return self.moved(shape, contiguous_strides(shape))

    def broadcast(self, shape: Shape) -> View:
        pad = len(shape) - len(self.shape)
        strides = tuple(st if self.shape[i] == shape[pad + i] else 0 for i, st in enumerate(self.strides))
        return self.moved(shape, (0,) * pad + strides)

    def __str__(self) -> str:
        where = str(self.storage) + (f"[{self.start}]" if self.start else "")
        strides = "" if self.contiguous else f" strides {show(self.strides)}"
        return f"{self.dtype}{show(self.shape)}{strides} {where}"


class NativeView(NamedTuple):
    """As the runtime reads it: shape[0] = -1 - d stands for the run's dims[d]."""

    buffer: int
    dtype: int
    offset: int
    shape: Shape
    strides: Shape


class NativeStep(NamedTuple):
    kernel: str
    outputs: list[NativeView]
    inputs: list[NativeView]
    ints: list[int]
    floats: list[float]


@dataclass(slots=True)
class PlanStep:
    """One call of a kernel. `ints` may name opcodes, which are numbers only to a runtime."""

    kernel: str
    outputs: list[View]
    inputs: list[View]
    ints: list[int | str] = field(default_factory=list)
    floats: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [f"{'' if i else self.kernel:16s} -> {view}" for i, view in enumerate(self.outputs)]
        rows += [f"{'':16s} <- {view}" for view in self.inputs]
        parameters = program(self.ints, self.floats) if self.kernel == "elementwise" else [
            f"{name} {' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)}"
            for name, values in (("ints", self.ints), ("floats", self.floats)) if values]
        return "\n".join(rows + [f"{'':16s}    {line}" for line in parameters])


def program(ints: Sequence[int | str], floats: Sequence[float]) -> list[str]:
    """An elementwise step's instructions as text."""
    cls, n_instructions, n_constants, *rest = ints
    n_out = len(rest) - 5 * int(n_instructions)
    code = [rest[i:i + 5] for i in range(n_out, len(rest), 5)]
    lines = [f"r{dst} = {op} {a} {b} {c}" for op, dst, a, b, c in code]
    lines.append(f"store {' '.join(f'r{r}' for r in rest[:n_out])} of {('f32', 'f64', 'i64', 'u64')[int(cls)]}")
    return [f"constants {', '.join(f'{c:g}' for c in floats)}", *lines] if floats else lines


@dataclass(slots=True)
class Plan:
    """Steps and where their memory is. Sizes of symbolic axes are their maxima."""

    steps: list[PlanStep]
    inputs: list[View]
    outputs: list[View]
    constants: list[Value]
    dims: list[Dim]
    arena: int

    def __str__(self) -> str:
        head = [f"plan: {len(self.steps)} steps, arena {self.arena} bytes"]
        head += [f"dim {d.name} <= {d.maximum}" for d in self.dims]
        head += [f"input{i}: {v.dtype}{show(v.shape)}" for i, v in enumerate(self.inputs)]
        head += [f"constant{i}: {v.dtype}{show(v.shape)}" for i, v in enumerate(self.constants)]
        steps = [f"{i:3d} {step}".replace("\n", "\n    ") for i, step in enumerate(self.steps)]
        return "\n".join([*head, *steps, *(f"output{i}: {view}" for i, view in enumerate(self.outputs)), ""])

    def load(self) -> Executable:
        return Executable(self, runtime())

    def buffer(self, storage: Storage) -> int:
        """Position among the run's pointers: arena, inputs, outputs, constants."""
        outputs = 1 + len(self.inputs)
        first = {"arena": 0, "input": 1, "output": outputs, "constant": outputs + len(self.outputs)}
        return first[storage.kind] + storage.index

    def native(self, opcodes: dict[str, int]) -> list[NativeStep]:
        def view(v: View) -> NativeView:
            shape = v.shape
            if shape and isinstance(shape[0], Dim):
                shape = (-1 - self.dims.index(shape[0]), *shape[1:])
            return NativeView(self.buffer(v.storage), v.dtype.code, v.offset, shape, v.strides)

        return [NativeStep(s.kernel, [view(v) for v in s.outputs], [view(v) for v in s.inputs],
                           [opcodes[i] if isinstance(i, str) else i for i in s.ints], s.floats) for s in self.steps]


class Group:
    """An elementwise program that is still growing. It can, as long as no other step has read its results."""

    __slots__ = ("shape", "cls", "nodes", "inputs", "inner")

    def __init__(self, shape: Shape, cls: int):
        self.shape, self.cls = shape, cls
        self.nodes: list[tuple[Node, Value]] = []
        self.inputs: Counter[Value] = Counter()           # read from memory, with the number of uses
        self.inner: set[Value] = set()                    # read from a register


class Lowering:
    """Walks the graph once, in order. A row's `lower` asks for views of inputs, places its results and adds steps."""

    def __init__(self, outputs: list[Value], inputs: list[Value], donate: Iterable[Value]):
        self.order = toposort(outputs)
        self.uses: Counter[Value] = Counter(v for node in self.order for v in node.inputs)
        self.uses.update(outputs)
        self.views: dict[Value, View] = {}
        self.scalars: dict[Value, float] = {}             # all elements are this number: in memory only if need be
        self.open: dict[Value, Group] = {}
        self.steps: list[PlanStep] = []
        self.constants: list[Value] = []
        donated = set(donate)
        self.inputs = [self._leaf(v, "input", i, v in donated) for i, v in enumerate(inputs)]
        self.outputs = outputs

    def _leaf(self, value: Value, kind: str, index: int, writable: bool) -> View:
        strides = value.strides or contiguous_strides(value.shape)
        storage = Storage(kind, nbytes(value.shape, value.dtype), index, writable=writable)
        self.place(value, view := View(storage, value.dtype, 0, value.shape, strides))
        return view

    # values and their memory

    def place(self, value: Value, view: View) -> None:
        self.views[value] = view
        view.storage.refs += self.uses[value] > 0

    def new(self, shape: Shape, dtype: Dtype) -> View:
        return View(Storage("arena", nbytes(shape, dtype)), dtype, 0, shape, contiguous_strides(shape))

    def result(self, value: Value) -> View:
        """Fresh memory for a result."""
        view = self.new(value.shape, value.dtype)
        self.place(value, view)
        return view

    def view(self, value: Value) -> View:
        """Where the value is, written by the steps so far."""
        if value in self.open:
            self.flush(self.open[value])
        if value not in self.views:
            if value in self.scalars:
                one = self.new((), value.dtype)
                self.fill(value, one)
                self.place(value, one.broadcast(value.shape))
            elif value.buffer is not None:
                self._leaf(value, "constant", len(self.constants), False)
                self.constants.append(value)
            else:
                raise no_value(value)
        return self.views[value]

    def release(self, value: Value, uses: int = 1) -> None:
        self.uses[value] -= uses
        if not self.uses[value] and value in self.views:
            self.views[value].storage.refs -= 1

    def dies(self, value: Value, uses: int) -> bool:
        """Whether these uses are the last anyone makes of the value's memory, which may then be overwritten."""
        storage = self.views[value].storage
        return storage.writable and storage.refs == 1 and self.uses[value] == uses

    def contiguous(self, value: Value) -> View:
        return self.packed(self.view(value))

    def rows(self, value: Value, axes: int) -> View:
        """A view whose last axes are row-major; the strides of the others are free."""
        view = self.view(value)
        return view if view.strides[-axes:] == contiguous_strides(view.shape)[-axes:] else self.packed(view)

    def packed(self, view: View) -> View:
        if view.contiguous:
            return view
        self.copy(view, fresh := self.new(view.shape, view.dtype))
        return fresh

    def copy(self, source: View, target: View) -> None:
        self.step("elementwise", [target], [source], [elementwise_class(target.dtype), 0, 0, 0])

    def write(self, value: Value, target: View) -> None:
        """Puts the value's elements where `target` is: computes them there, if nobody else reads them."""
        group = self.open.get(value)
        if group and self.uses[value] == 1 and not any(self.views[v].storage is target.storage for v in group.inputs):
            self.flush(group, {value: target})
        elif value in self.scalars and value not in self.views:
            self.fill(value, target)
        else:
            self.copy(self.view(value), target)

    def fill(self, value: Value, target: View) -> None:
        self.step("elementwise", [target], [], [elementwise_class(value.dtype), 0, 1, 0], [self.scalars[value]])

    def update(self, value: Value, uses: int = 1) -> View:
        """Memory with the value's elements that may be written: its own if it dies here, else a copy."""
        storage = self.view(value).storage
        for group in {id(g): g for g in self.open.values()}.values():
            if any(self.views[v].storage is storage for v in group.inputs):
                self.flush(group)
        view = self.views[value]
        if view.contiguous and self.dies(value, uses):
            return view
        self.copy(view, fresh := self.new(view.shape, view.dtype))
        return fresh

    def step(self, kernel: str, outputs: list[View], inputs: list[View], ints: Sequence[int | str] = (),
             floats: Sequence[float] = ()) -> None:
        if not outputs or 0 not in outputs[0].shape:
            if kernel == "elementwise":
                outputs, inputs = collapse(outputs, inputs)
            for view in (*outputs, *inputs):
                if len(view.shape) > MAX_DIMS:
                    raise ValueError(f"[{kernel}] {len(view.shape)} axes, at most {MAX_DIMS}")
                if any(isinstance(size, Dim) for size in view.shape[1:]):
                    raise ValueError(f"[{kernel}] axis of {show(view.shape)} is symbolic and must lead")
            self.steps.append(PlanStep(kernel, outputs, inputs, list(ints), list(floats)))

    # elementwise programs

    def fuse(self, node: Node, cls: int) -> str:
        """Joins the node to the open groups that make its inputs, or starts one. Its inputs are read at the flush."""
        [value] = node.values()
        if all(v in self.scalars for v in node.inputs) and node.primitive.name == "astype":
            self.scalars[value] = self.scalars[node.inputs[0]]
            return DEFERRED
        parents = {id(g): g for v in node.inputs if (g := self.open.get(v)) and not rounds(v)
                   and g.shape == value.shape and g.cls == cls}.values()
        group = Group(value.shape, cls)
        for parent in parents:
            group.nodes += parent.nodes
            group.inputs += parent.inputs
            group.inner |= parent.inner
        members = {v for _, v in group.nodes}
        outside = Counter(v for v in node.inputs if v not in members and v not in self.scalars)
        constants = {self.scalars[v] for n, _ in [*group.nodes, (node, value)] for v in n.inputs if v in self.scalars}
        wide = len(group.inputs | outside) > MAX_INPUTS
        if wide or len(group.nodes) + len(group.inputs | outside) + len(constants) + 1 >= MAX_REGISTERS:
            for parent in list(parents):
                self.flush(parent)
            group, members = Group(value.shape, cls), set()
            outside = Counter(v for v in node.inputs if v not in self.scalars)
        for v in outside:
            self.view(v)
        group.inputs += outside
        group.inner |= members & set(node.inputs)
        for v in node.inputs:
            if v not in outside:
                self.release(v)
        group.nodes.append((node, value))
        for _, v in group.nodes:
            self.open[v] = group
        return DEFERRED

    def flush(self, group: Group, into: dict[Value, View] | None = None) -> None:
        """Emits the group's step: assigns registers, overwrites inputs that die. into: where certain results go."""
        for _, v in group.nodes:
            self.open.pop(v, None)
        results = [v for _, v in group.nodes if self.uses[v]]
        ints, floats = assign_registers(group, results, self.scalars)
        inputs = [self.views[v] for v in group.inputs]
        for v in results:
            self.place(v, (into or {}).get(v) or self._reuse(group, v) or self.new(v.shape, v.dtype))
        for v, uses in group.inputs.items():
            self.release(v, uses)
        self.step("elementwise", [self.views[v] for v in results], inputs, ints, floats)

    def _reuse(self, group: Group, result: Value) -> View | None:
        for v, uses in group.inputs.items():
            view = self.views[v]
            if v.shape == result.shape and v.dtype.size == result.dtype.size and view.contiguous and self.dies(v, uses):
                return View(view.storage, result.dtype, view.start, view.shape, view.strides)
        return None

    # the whole graph

    def run(self) -> Plan:
        for node in self.order:
            assert node.primitive.lower is not None
            if node.primitive.lower(self, node) is not DEFERRED:
                for v in node.inputs:
                    self.release(v)
        taken: set[int] = set()
        outputs = [self._output(v, i, taken) for i, v in enumerate(self.outputs)]
        views = [v for s in self.steps for v in (*s.outputs, *s.inputs)] + self.inputs + outputs
        dims = list(dict.fromkeys(s for v in views for s in v.shape if isinstance(s, Dim)))
        return Plan(self.steps, self.inputs, outputs, self.constants, dims, plan_arena(self.steps))

    def _output(self, value: Value, index: int, taken: set[int]) -> View:
        """An output has memory of its own, row-major; only on a donated input it stays where it is."""
        view = self.view(value)
        storage = view.storage
        whole = view.contiguous and view.start == 0 and nbytes(view.shape, view.dtype) == storage.nbytes
        if whole and storage.writable and storage.kind in ("arena", "input") and id(storage) not in taken:
            taken.add(id(storage))
            if storage.kind == "arena":
                storage.kind, storage.index = "output", index
            return view
        fresh = self.new(view.shape, view.dtype)
        self.copy(view, fresh)
        fresh.storage.kind, fresh.storage.index = "output", index
        return fresh


def no_value(value: Value) -> ValueError:
    return ValueError(f"[eval] a placeholder {value.dtype}{show(value.shape)} has no value: pass it as an input")


def nbytes(shape: Shape, dtype: Dtype) -> int:
    return int(np.prod([int(s) for s in shape], dtype=np.int64)) * dtype.size


def rounds(value: Value) -> bool:
    """Whether the value must pass through memory, since storing it loses bits that a register would keep."""
    node = value.node
    if node is None or node.primitive.name != "astype":
        return node is not None and value.dtype is bool_ and node.primitive.name in ARITHMETIC
    source, target = node.inputs[0].dtype, value.dtype
    return source.kind == "f" and (target.kind != "f" or target.size < source.size)


ARITHMETIC = {"add", "subtract", "multiply", "negative", "abs", "square", "power", "bitwise_invert", "left_shift",
              "floor_divide", "astype"}         # on integers the result may need more bits than its type has


def overflows(node: Node, dtype: Dtype) -> bool:
    """Whether a 64-bit register may hold an integer that `dtype` does not."""
    if dtype.kind not in "iu" or dtype.size == 8 or node.primitive.name not in ARITHMETIC:
        return False
    source = node.inputs[0].dtype
    wider = source.size < dtype.size and (source.kind, dtype.kind) != ("i", "u")
    return node.primitive.name != "astype" or not (source is bool_ or wider)


def assign_registers(group: Group, results: list[Value],
                     scalars: dict[Value, float]) -> tuple[list[int | str], list[float]]:
    """ints and floats of the elementwise kernel. Registers: inputs, constants, then temporaries, reused when dead."""
    nodes = group.nodes
    floats = list(dict.fromkeys(scalars[v] for n, _ in nodes for v in n.inputs if v in scalars))
    register = {v: i for i, v in enumerate(group.inputs)}
    base = top = len(register) + len(floats)
    last = {v: i for i, (n, _) in enumerate(nodes) for v in n.inputs}
    free: list[int] = []
    code: list[int | str] = []
    owners: Counter[int] = Counter()                       # values in a register: a cast shares its input's

    def locate(v: Value) -> int:
        return register[v] if v in register else len(group.inputs) + floats.index(scalars[v])

    for i, (node, value) in enumerate(nodes):
        args = [locate(v) for v in node.inputs]
        opcode = node.primitive.kernel
        for v in {v: None for v in node.inputs if v in register and last[v] == i and v not in results}:
            owners[register[v]] -= 1
            if register[v] >= base and not owners[register[v]] and opcode:
                free.append(register[v])
        if opcode:
            target = free.pop() if free else top
            top = max(top, target + 1)
            code += [opcode, target, *args, *[0] * (3 - len(args))]
        else:
            target = args[0]
        if value in group.inner and overflows(node, value.dtype):
            source, target = target, target if opcode else top
            top = max(top, target + 1)
            code += ["wrap", target, source, value.dtype.code, 0]
        owners[target] += 1
        register[value] = target
    stores = [register[v] for v in results]
    return [group.cls, len(code) // 5, len(floats), *stores, *code], floats


def collapse(outputs: list[View], inputs: list[View]) -> tuple[list[View], list[View]]:
    """The same elements with as few axes as possible; a symbolic axis stays alone in front."""
    views = [*outputs, *inputs]
    shape = outputs[0].shape
    keep = [i for i, size in enumerate(shape) if size != 1]
    axes: list[tuple[int, tuple[int, ...]]] = []
    for i in keep:
        size, strides = shape[i], tuple(v.strides[i] for v in views)
        if axes and not isinstance(axes[-1][0], Dim) and all(
                a == b * size for a, b in zip(axes[-1][1], strides, strict=True)):
            axes[-1] = (axes[-1][0] * size, strides)
        else:
            axes.append((size, strides))
    axes = axes or [(1, (1,) * len(views))]
    new_shape = tuple(a[0] for a in axes)
    views = [v.moved(new_shape, tuple(a[1][k] for a in axes)) for k, v in enumerate(views)]
    return views[:len(outputs)], views[len(outputs):]


def plan_arena(steps: list[PlanStep]) -> int:
    """Offsets by liveness, best fit: storages that never live together may share bytes. Returns the arena's size."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    storages: dict[int, Storage] = {}
    for i, step in enumerate(steps):
        for view in (*step.outputs, *step.inputs):
            if view.storage.kind == "arena":
                key = id(view.storage)
                storages[key] = view.storage
                first.setdefault(key, i)
                last[key] = i
    size, active = 0, list[tuple[int, int, int]]()         # (offset, end, last step), by offset
    for key, storage in storages.items():
        active = [a for a in active if a[2] >= first[key]]
        need = -(-storage.nbytes // ALIGN) * ALIGN
        gaps, end = [], 0
        for begin, stop, _ in active:
            if begin - end >= need:
                gaps.append((begin - end, end))
            end = max(end, stop)
        storage.offset = min(gaps)[1] if gaps else end
        active = sorted([*active, (storage.offset, storage.offset + need, last[key])])
        size = max(size, storage.offset + need)
    return size


def lower_values(outputs: list[Value], inputs: list[Value], donate: Iterable[Value] = (),
                 kernels: frozenset[str] | None = None) -> Plan:
    stand_ins = {v: v.stand_in() for v in inputs if v.buffer is not None}
    outputs = rewrite(outputs, runtime().kernels if kernels is None else kernels, stand_ins)
    return Lowering(outputs, [stand_ins.get(v, v) for v in inputs], [stand_ins.get(v, v) for v in donate]).run()


class Executable:
    """A loaded plan: pointers and sizes are set once, each run is one native call."""

    def __init__(self, plan: Plan, native: Any):
        self.plan, self.lock, self._native = plan, threading.Lock(), native
        count = 1 + len(plan.inputs) + len(plan.outputs) + len(plan.constants)
        self.pointers = (c_void_p * count)()
        self.dims = (c_int64 * max(1, len(plan.dims)))(*plan.dims)
        self._names = {d.name: i for i, d in enumerate(plan.dims)}
        self._owners: dict[int, Any] = {}
        for i, value in enumerate(plan.constants):
            self._set(count - len(plan.constants) + i, value)
        self._unset = {i: v for i, v in enumerate(plan.outputs) if v.storage.kind == "output"}
        self.handle = native.load(plan.native(native.opcodes), count, [int(d) for d in plan.dims], plan.arena)

    def _set(self, position: int, value: Value) -> None:
        assert value.buffer is not None
        self.pointers[position] = value.buffer.pointer + value.offset
        self._owners[position] = value

    def set_input(self, i: int, array: Any) -> None:
        """Row-major memory, Array or ndarray, of the input's dtype and largest shape: every run reads it, and writes it
        if it is donated."""
        self._set(1 + i, _memory("set_input", i, array, self.plan.inputs[i]))

    def set_output(self, i: int, array: Any) -> None:
        """Memory that every run writes output i to."""
        view = self.plan.outputs[i]
        if view.storage.kind != "output":
            raise ValueError(f"[set_output] output {i} is in the memory of donated input {view.storage.index}")
        self._set(self.plan.buffer(view.storage), _memory("set_output", i, array, view))
        self._unset.pop(i, None)

    def output(self, i: int) -> Array:
        """Output i as an array on the memory that runs write to."""
        self._allocate()
        view = self.plan.outputs[i]
        return Array.of(self._owners[self.plan.buffer(view.storage)])

    def run(self, **dims: int) -> None:
        """Runs every step in one native call. dims: symbolic sizes by name; one not given keeps its last value."""
        for name, size in dims.items():
            self.dims[self._names[name]] = size
        if self._unset:
            self._allocate()
        self._native.run(self.handle, self.pointers, self.dims)

    def call(self) -> None:
        self._native.run(self.handle, self.pointers, self.dims)

    def _allocate(self) -> None:
        for i, buffer in enumerate(self.fresh_outputs(self._unset)):
            if buffer is not None:
                view = self.plan.outputs[i]
                value = Value(view.shape, view.dtype).fill(buffer, 0, contiguous_strides(view.shape))
                self._owners[self.plan.buffer(view.storage)] = value
        self._unset = {}

    def fresh_outputs(self, which: Iterable[int] | None = None) -> list[Buffer | None]:
        """New memory for the outputs that have their own."""
        buffers: list[Buffer | None] = []
        for i, view in enumerate(self.plan.outputs):
            buffers.append(None)
            if view.storage.kind == "output" and (which is None or i in which):
                block = self._native.alloc(max(1, view.storage.nbytes))
                buffers[-1] = Buffer(block.pointer, block.nbytes, block, True)
                self.pointers[self.plan.buffer(view.storage)] = block.pointer
        return buffers


def _memory(name: str, i: int, array: Any, view: View) -> Value:
    """The array's memory, checked against what the plan will read or write there."""
    value = array._value if isinstance(array, Array) else from_ndarray(np.asarray(array), view.dtype)
    wanted = tuple(int(s) for s in view.shape)
    fits = value.dtype is view.dtype and tuple(map(int, value.shape)) == wanted
    if value.buffer is None or not fits or not is_contiguous(value.shape, value.strides):
        raise ValueError(f"[{name}] {i}: {value.dtype}{show(value.shape)}, row-major {view.dtype}{show(wanted)} wanted")
    return value


def from_ndarray(array: np.ndarray, like: Dtype) -> Value:
    """uint16 memory counts as bfloat16 where that is wanted."""
    found = like if array.dtype == like.numpy else FROM_NUMPY.get(array.dtype, like)
    if array.dtype not in FROM_NUMPY:
        raise TypeError(f"[set_input] NumPy type {array.dtype} has no dtype here")
    return from_numpy(array, found, False)


from .array import Array  # noqa: E402  (array needs compile, and compile this module)

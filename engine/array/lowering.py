"""Lowering: one walk makes a graph a plan. Movements become views, elementwise chains programs, memory is shared."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .dtypes import Dtype, bool_
from .node import Dim, Node, Shape, Value, check_symbolic, contiguous_strides, no_value, show
from .plan import Plan, PlanStep, Storage, View, nbytes, runtime
from .primitives import elementwise_class
from .rewrites import rewrite
from .schedule import schedule

ALIGN = 64
MAX_DIMS, MAX_INPUTS, MAX_REGISTERS = 8, 8, 64
DEFERRED = "deferred"                # returned by a row's `lower` whose inputs are read by a later step


def lower_values(outputs: list[Value], inputs: list[Value], donate: Iterable[Value] = (),
                 kernels: frozenset[str] | None = None) -> Plan:
    stand_ins = {v: v.stand_in() for v in inputs if v.buffer is not None or v.node is not None}
    outputs = rewrite(outputs, runtime().kernels if kernels is None else kernels, stand_ins)
    return Lowering(outputs, [stand_ins.get(v, v) for v in inputs], [stand_ins.get(v, v) for v in donate]).run()


class Group:
    """An elementwise program that is still growing. It can, as long as no other step has read its results."""

    __slots__ = ("shape", "cls", "nodes", "inputs", "inner")

    def __init__(self, shape: Shape, cls: int, parents: Iterable[Group] = ()):
        self.shape, self.cls = shape, cls
        self.nodes: list[tuple[Node, Value]] = []
        self.inputs: Counter[Value] = Counter()           # read from memory, with the number of uses
        self.inner: set[Value] = set()                    # read from a register
        for parent in parents:
            self.nodes += parent.nodes
            self.inputs += parent.inputs
            self.inner |= parent.inner

    def takes(self, node: Node, scalars: dict[Value, float]) -> bool:
        """Whether inputs and registers suffice for one node more, if no register is used twice."""
        made = {v for _, v in self.nodes}
        read = [v for n in (*(n for n, _ in self.nodes), node) for v in n.inputs if v not in made]
        constants = {str(scalars[v]) for v in read if v in scalars}
        inputs = {v for v in read if v not in scalars}
        return len(inputs) <= MAX_INPUTS and len(inputs) + len(constants) + len(self.nodes) < MAX_REGISTERS


class Lowering:
    """Walks the graph once, in order. A row's `lower` asks for views of inputs, places its results and adds steps."""

    def __init__(self, outputs: list[Value], inputs: list[Value], donate: Iterable[Value]):
        self.order, self.uses, self.later = schedule(outputs)
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

    def update(self, value: Value) -> View:
        """Memory with the value's elements that may be written: its own if it dies here, else a copy."""
        storage = self.view(value).storage
        for group in dict.fromkeys(self.open.values()):
            if any(self.views[v].storage is storage for v in group.inputs):
                self.flush(group)
        view = self.views[value]
        if view.contiguous and self.dies(value, 1):
            return view
        self.copy(view, fresh := self.new(view.shape, view.dtype))
        return fresh

    def step(self, kernel: str, outputs: list[View], inputs: list[View], ints: Sequence[int | str] = (),
             floats: Sequence[float] = ()) -> None:
        if 0 in outputs[0].shape:
            return
        if kernel == "elementwise":
            outputs, inputs = collapse(outputs, inputs)
        for view in (*outputs, *inputs):
            if len(view.shape) > MAX_DIMS:
                raise ValueError(f"[{kernel}] {show(view.shape)} has {len(view.shape)} axes, at most {MAX_DIMS} wanted")
            check_symbolic(kernel, view.shape, 0)
        self.steps.append(PlanStep(kernel, outputs, inputs, list(ints), list(floats)))

    # elementwise programs

    def fuse(self, node: Node, cls: int) -> str:
        """Joins the node to the open groups that make its inputs, or starts one. Its inputs are read at the flush."""
        [value] = node.values()
        if node.primitive.name == "astype" and node.inputs[0] in self.scalars:
            self.scalars[value] = self.scalars[node.inputs[0]]
            return DEFERRED
        group = self._joined(node, value.shape, cls)
        made = {v for _, v in group.nodes}
        for v in node.inputs:
            if v in made or v in self.scalars:
                group.inner.add(v)
                self.release(v)
            else:
                self.view(v)
                group.inputs[v] += 1
        group.nodes.append((node, value))
        for _, v in group.nodes:
            self.open[v] = group
        return DEFERRED

    def _joined(self, node: Node, shape: Shape, cls: int) -> Group:
        """The open groups behind the node's inputs as one, or a new group where that one could not take the node."""
        through_memory = [self.open.get(v) for v in node.inputs if rounds(v)]
        behind = dict.fromkeys(g for v in node.inputs if (g := self.open.get(v)))
        parents = [g for g in behind if g.shape == shape and g.cls == cls and g not in through_memory]
        group = Group(shape, cls, parents)
        if group.takes(node, self.scalars):
            return group
        for parent in parents:
            self.flush(parent)
        return Group(shape, cls)

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
        seen: set[Node] = set()
        for node in self.order:
            assert node.primitive.lower is not None
            if node in seen:
                self._forget(node)
            seen.add(node)
            if node.primitive.lower(self, node) is not DEFERRED:
                for v in node.inputs:
                    self.release(v)
        taken: set[int] = set()
        outputs = [self._output(v, i, taken) for i, v in enumerate(self.outputs)]
        views = [v for s in self.steps for v in (*s.outputs, *s.inputs)] + self.inputs + outputs
        dims = list(dict.fromkeys(s for v in views for s in v.shape if isinstance(s, Dim)))
        return Plan(self.steps, self.inputs, outputs, self.constants, dims, plan_arena(self.steps))

    def _forget(self, node: Node) -> None:
        """Before it is computed a second time."""
        for value in node.values():
            for group in dict.fromkeys(self.open.values()):
                if value in group.inputs or self.open.get(value) is group:
                    self.flush(group)
            self.views.pop(value, None)
            self.uses[value] = self.later[value]

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


def rounds(value: Value) -> bool:
    """Whether the value must pass through memory, since storing it loses bits that a register would keep."""
    node, target = value.node, value.dtype
    if node is None or target is bool_ or node.primitive.name != "astype":
        return node is not None and target is bool_ and node.primitive.name in ARITHMETIC
    source = node.inputs[0].dtype
    return source.kind == "c" != target.kind or source.kind == "f" and (target.kind != "f" or target.size < source.size)


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
    constants = {str(scalars[v]): scalars[v] for n, _ in nodes for v in n.inputs if v in scalars}  # 0.0 is not -0.0
    register = {v: i for i, v in enumerate(group.inputs)}
    base = top = len(register) + len(constants)
    last = {v: i for i, (n, _) in enumerate(nodes) for v in n.inputs}
    free: list[int] = []
    code: list[int | str] = []
    owners: Counter[int] = Counter()                       # values in a register: a cast shares its input's

    def locate(v: Value) -> int:
        return register[v] if v in register else len(group.inputs) + list(constants).index(str(scalars[v]))

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
    return [group.cls, len(code) // 5, len(constants), *stores, *code], list(constants.values())


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

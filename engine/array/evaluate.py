"""eval: a graph's structure is the key of a cache of loaded plans, so that only new graphs are lowered.

One evaluation runs at a time in a process (LOCK): the native part gives it all cores and releases the GIL, while other
threads build graphs. A value that two threads ask for is computed once.
"""
from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from .array import Array
from .containers import arrays_of
from .device import default_device
from .dtypes import float32
from .executable import Executable
from .lowering import lower_values
from .node import TRACING, Buffer, Node, Value, no_value, toposort
from .operands import CONSTANT, leaf
from .plan import Plan

T = TypeVar("T")
CACHED = 512                         # plans: they share one arena, and those of `eval` hold no arrays
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child has no thread that could give back a lock taken in its parent
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


class Cache(Generic[T]):
    """The entries used last. To be used under LOCK."""

    def __init__(self, size: int = CACHED):
        self.size = size
        self.entries: OrderedDict[Any, T] = OrderedDict()

    def get(self, key: Any, make: Callable[[], T]) -> T:
        if (entry := self.entries.get(key)) is None:
            entry = self.entries[key] = make()
            if len(self.entries) > self.size:
                self.entries.popitem(last=False)
        else:
            self.entries.move_to_end(key)
        return entry


def lower(outputs: Sequence[Array], inputs: Sequence[Array], donate: Sequence[Array] = (),
          kernels: frozenset[str] | None = None) -> Plan:
    """The plan that computes `outputs` from `inputs`; other arrays in the graph are its constants. Memory of donated
    inputs may be overwritten: outputs that update them share it. kernels: what the runtime has (default: the CPU's)."""
    made, given, free = ([a._value for a in arrays] for arrays in (outputs, inputs, donate))
    with LOCK:
        return lower_values(made, given, free, kernels)


def eval(*trees: Any) -> None:
    """Computes all arrays in the trees (lists, tuples, dicts), and whatever else on the way is still referred to."""
    values = [a._value for a in arrays_of(trees)]
    if None in [v.buffer for v in values]:
        with LOCK:
            _run({v: None for v in values if v.buffer is None})


def async_eval(*trees: Any) -> None:
    """`eval`: the cores that compute are those that would go on meanwhile, so nothing is gained by not waiting."""
    eval(*trees)


class Entry:
    """What runs the graphs of one structure. A scalar of Python's that has changed is an input from then on."""

    def __init__(self) -> None:
        self.numbers: list[Any] | None = None
        self.varying: list[int] = []
        self.executable: Executable | None = None

    def suit(self, numbers: list[Any], outputs: list[Value], arrays: list[Value], scalars: list[Value],
             donate: list[Value]) -> Executable:
        """The executable for these numbers, made anew where one that it holds as a constant has changed."""
        changed = {i for i, (a, b) in enumerate(zip(self.numbers or (), numbers, strict=False)) if a != b}
        if self.executable is None or not changed.issubset(self.varying):
            self.varying = sorted(changed.union(self.varying))
            inputs = arrays + [scalars[i] for i in self.varying]
            self.executable = lower_values(outputs, inputs, donate).load()
        self.numbers = numbers
        return self.executable


PLANS: Cache[Entry] = Cache()


def _run(roots: dict[Value, None]) -> None:
    nodes, uses, leaves, key = _walk(roots)
    outputs = [*roots, *_referred(nodes, uses, roots)]
    key += [nodes[v.node] << 8 | v.index for v in outputs]
    arrays: list[Value] = []
    scalars: list[Any] = []                                # values of constant nodes
    donate: list[Value] = []
    mine = MINE if not TRACING.depth else -1               # a transformation reads once more what it has seen
    for v in leaves:
        if v.buffer is None:
            scalars.append(v)
            key.append(v.dtype)
        else:
            ours = (sys.getrefcount(v) == mine + uses[v] and sys.getrefcount(v.buffer) == FIELD and v.buffer.donatable)
            key += v.dtype, v.shape, v.strides, ours
            arrays.append(v)
            if ours:
                donate.append(v)
    key.append(id(default_device().type))
    entry = PLANS.get(tuple(key), Entry)
    numbers = [exact(v.node.params["value"]) for v in scalars]
    executable = entry.executable
    if executable is None or numbers != entry.numbers:
        executable = entry.suit(numbers, outputs, arrays, scalars, donate)
    for i in entry.varying:
        arrays.append(leaf(scalars[i].node.params["value"], scalars[i].dtype))
    for value, made in zip(outputs, executable(arrays), strict=True):
        value.fill(*made)


def exact(value: Any) -> Any:
    """Equal for the same parameter only: 0.0 and -0.0 are two."""
    return value or str(value)


def _walk(roots: Iterable[Value]) -> tuple[dict[Any, int], dict[Value, int], dict[Value, int], list[Any]]:
    """What must be computed: the nodes in order, how often each value is read, the leaves (scalars of Python's are
    leaves too, without memory), and a picture of the structure, which is all that a plan depends on."""
    nodes: dict[Any, int] = {}
    uses: dict[Value, int] = {}
    leaves: dict[Value, int] = {}
    key: list[Any] = []
    stack = [v.node or _fail(v) for v in roots]
    while stack:
        node, waiting = stack[-1], len(stack)
        if node not in nodes:
            for v in node.inputs:
                if v.buffer is None and (below := v.node or _fail(v)).primitive is not CONSTANT and below not in nodes:
                    stack.append(below)
            if len(stack) > waiting:
                continue
            nodes[node] = len(nodes)
            key.append(node.primitive)
            if node.params:
                key.append(tuple([exact(p) for p in node.params.values()]))
            for v in node.inputs:
                uses[v] = uses.get(v, 0) + 1
                if v.buffer is None and v.node in nodes:
                    key.append(nodes[v.node] << 8 | v.index)
                else:
                    key.append(~leaves.setdefault(v, len(leaves)))
        stack.pop()
    return nodes, uses, leaves, key


def _fail(value: Value) -> Node:
    raise no_value(value)


def _referred(nodes: Iterable[Node], uses: dict[Value, int], roots: dict[Value, None]) -> list[Value]:
    """Intermediate values that an array or another graph holds: they are kept, not computed a second time."""
    found = []
    for node in nodes:
        for ref in node.results:
            value = ref()
            if value is not None and value not in roots:
                n = uses.get(value, 0)
                if sys.getrefcount(value) > ALONE + n + (n > 0):
                    found.append(value)
    return found


def _alone() -> tuple[int, int]:
    value = Value((), float32).fill(Buffer(0, 0, None, True), 0, ())
    return sys.getrefcount(value), sys.getrefcount(value.buffer)


ALONE, FIELD = _alone()              # what getrefcount says of what one local variable, or one object's field, holds
MINE = ALONE + 2                     # and of a leaf that only a graph holds, beside its uses: keys of `uses`, `leaves`


def is_traced(a: Array) -> bool:
    """Whether the array depends on a placeholder, and so has no elements yet."""
    value = a._value
    if value.buffer is not None:
        return False
    return value.node is None or any(v.node is None and v.buffer is None for n in toposort([value]) for v in n.inputs)

"""eval and compile: a graph's structure is the key of a cache of loaded plans, so that only new graphs are lowered."""
from __future__ import annotations

import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from . import ops
from .array import Array
from .dtypes import float32
from .executable import Executable
from .lowering import lower_values
from .node import Buffer, Node, Value, is_contiguous, no_value, toposort
from .plan import Plan

CACHED = 64


def _alone() -> int:
    value = Value((), float32)
    return sys.getrefcount(value)


ALONE = _alone()                     # what getrefcount says of an object that one local variable holds


class Cache:
    """The most recently used loaded plans."""

    def __init__(self, size: int = CACHED):
        self.size, self.lock = size, threading.Lock()
        self.entries: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        with self.lock:
            if key in self.entries:
                self.entries.move_to_end(key)
                return self.entries[key]
        entry = make()
        with self.lock:
            self.entries[key] = entry
            while len(self.entries) > self.size:
                self.entries.popitem(last=False)
        return entry


PLANS = Cache()


def lower(outputs: Sequence[Array], inputs: Sequence[Array], donate: Sequence[Array] = (),
          kernels: frozenset[str] | None = None) -> Plan:
    """The plan that computes `outputs` from `inputs`; other arrays in the graph are its constants. Memory of donated
    inputs may be overwritten: outputs that update them share it. kernels: what the runtime has (default: the CPU's)."""
    return lower_values([a._value for a in outputs], [a._value for a in inputs], [a._value for a in donate], kernels)


# eval

def eval(*trees: Any) -> None:
    """Computes all arrays in the trees (lists, tuples, dicts), and whatever else on the way is still referred to."""
    roots = list({a._value: None for a in arrays_of(trees) if a._value.buffer is None})
    if roots:
        _run(roots)


def _run(roots: list[Value]) -> None:
    order = toposort(roots)
    uses: Counter[Value] = Counter(v for node in order for v in node.inputs)
    outputs = roots + _referred(order, uses, set(roots))
    leaves = [v for v in uses if v.node is None]
    for v in (*leaves, *roots):
        if v.node is None and v.buffer is None:
            raise no_value(v)
    donated = _owned(leaves, uses)
    key = _structure(order, leaves, donated, outputs)
    donate = [v for v, ours in zip(leaves, donated, strict=True) if ours]
    executable = PLANS.get(key, lambda: lower_values(outputs, leaves, donate).load())
    for value, made in zip(outputs, executable(leaves), strict=True):
        value.fill(made.buffer, made.offset, made.strides)


def _referred(order: list[Node], uses: Counter[Value], roots: set[Value]) -> list[Value]:
    """Intermediate values that an array or another graph holds: they are kept, not computed a second time."""
    found = []
    for node in order:
        for ref in node.results:
            value = ref()
            if value is None or value in roots:
                continue
            if sys.getrefcount(value) > ALONE + uses[value] + (value in uses):
                found.append(value)
    return found


def _references(value: Value) -> tuple[int, int]:
    return sys.getrefcount(value), sys.getrefcount(value.buffer)


def _owned(leaves: list[Value], uses: Counter[Value]) -> list[bool]:
    """Whether only this graph refers to the leaf and its memory, which may then be overwritten."""
    counts = [_references(v) for v in leaves]
    return [v.buffer is not None and v.buffer.donatable and value == FREE[0] + uses[v] and buffer == FREE[1]
            for v, (value, buffer) in zip(leaves, counts, strict=True)]


def _free() -> tuple[int, int]:
    """What _references says in _owned of a leaf that nobody else holds."""
    leaves = [Value((), float32).fill(Buffer(0, 0, None, True), 0, ())]
    uses = Counter(leaves)                                 # as in _owned, a key of `uses` refers to it
    counts = [_references(v) for v in leaves]
    del uses
    return counts[0]


FREE = _free()


def _structure(order: list[Node], leaves: list[Value], donated: list[bool], outputs: list[Value]) -> tuple[Any, ...]:
    number = {v: i for i, v in enumerate(leaves)}
    parts: list[Any] = [(v.dtype.code, v.shape, v.strides, ours) for v, ours in zip(leaves, donated, strict=True)]
    for node in order:
        parts.append((node.primitive.name, *node.params.values(), *[number[v] for v in node.inputs]))
        for ref in node.results:
            if (value := ref()) is not None:
                number[value] = len(number)
                parts.append(value.index)
    return (*parts, *[number[v] for v in outputs])


def is_traced(a: Array) -> bool:
    """Whether the array depends on a placeholder, and so has no elements yet."""
    value = a._value
    if value.buffer is not None:
        return False
    return value.node is None or any(v.node is None and v.buffer is None for n in toposort([value]) for v in n.inputs)


# trees: lists, tuples, dicts, modules (the attributes of an object that has `parameters`)

def items_of(tree: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(tree, dict):
        return tree.items()
    if isinstance(tree, list | tuple):
        return enumerate(tree)
    return vars(tree).items() if hasattr(tree, "parameters") else ()


def arrays_of(tree: Any) -> Iterator[Array]:
    if isinstance(tree, Array):
        yield tree
    else:
        for _, item in items_of(tree):
            yield from arrays_of(item)


def structure_of(tree: Any) -> Any:
    """A hashable picture of the tree: arrays by shape and dtype, everything else by value."""
    if isinstance(tree, Array):
        return Array, tree.shape, tree.dtype
    if isinstance(tree, dict):
        return dict, tuple((k, structure_of(v)) for k, v in tree.items())
    if isinstance(tree, list | tuple):
        return type(tree), tuple(structure_of(v) for v in tree)
    try:
        hash(tree)
    except TypeError as error:
        raise TypeError(f"[compile] a {type(tree).__name__} argument: arrays, containers, constants wanted") from error
    return type(tree), tree


def rebuild(tree: Any, arrays: Iterator[Array]) -> Any:
    """The tree with its arrays replaced, in order."""
    if isinstance(tree, Array):
        return next(arrays)
    if isinstance(tree, dict):
        return {k: rebuild(v, arrays) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        items = [rebuild(v, arrays) for v in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def assign(tree: Any, arrays: Iterator[Array]) -> None:
    """Replaces the arrays inside mutable containers, in order."""
    for key, item in list(items_of(tree)):
        if not isinstance(item, Array):
            assign(item, arrays)
        elif isinstance(tree, dict | list):
            tree[key] = next(arrays)
        else:
            setattr(tree, key, next(arrays))


# compile

class Traced:
    """One plan of a compiled function: `sources` says for each result which input it is, or -1 for a computed one;
    the last `n_state` results are the state's."""

    def __init__(self, executable: Executable | None, outputs: Any, sources: list[int], n_state: int):
        self.executable, self.outputs, self.sources, self.n_state = executable, outputs, sources, n_state

    def __call__(self, inputs: list[Value]) -> list[Array]:
        computed = iter(self.executable(inputs) if self.executable else ())
        return [Array.of(next(computed) if source < 0 else inputs[source]) for source in self.sources]


def compile(fn: Callable[..., Any], inputs: Any = None, outputs: Any = None,
            shapeless: bool = False) -> Callable[..., Any]:
    """A function that traces `fn` once for each structure, shapes and dtypes of its arguments, then replays the plan in
    one native call. Arrays that fn captures are constants; containers given as `inputs` are read and those given as
    `outputs` are written at every call. shapeless: accepted as in MLX, but each shape has its own plan."""
    cache = Cache()

    def compiled(*args: Any, **kwargs: Any) -> Any:
        arrays = [*arrays_of((args, kwargs)), *arrays_of(inputs)]
        if any(is_traced(a) for a in arrays):
            return fn(*args, **kwargs)
        eval(arrays)
        values = [row_major(a)._value for a in arrays]
        key = structure_of((args, kwargs)), structure_of(list(arrays_of(inputs)))
        traced = cache.get(key, lambda: _trace(fn, args, kwargs, inputs, outputs))
        results = traced(values)
        split = len(results) - traced.n_state
        assign(outputs, iter(results[split:]))
        return rebuild(traced.outputs, iter(results[:split]))

    return compiled


def row_major(a: Array) -> Array:
    """The evaluated array itself, or a copy without gaps, as plans take their inputs."""
    if not is_contiguous(a.shape, a._value.strides):
        eval(a := ops.contiguous(a))
    return a


def _trace(fn: Callable[..., Any], args: Any, kwargs: Any, inputs: Any, outputs: Any) -> Traced:
    """Runs fn on placeholders; the arrays of the state get theirs for as long as fn runs."""
    state = list(arrays_of(inputs))
    saved = [a._value for a in state]
    given = [Array.of(Value(a.shape, a.dtype)) for a in arrays_of((args, kwargs))]
    placeholders = [a._value for a in given] + [Value(v.shape, v.dtype) for v in saved]
    try:
        for array, value in zip(state, placeholders[len(given):], strict=True):
            array._value = value
        args, kwargs = rebuild((args, kwargs), iter(given))
        result = fn(*args, **kwargs)
        updated = [a._value for a in arrays_of(outputs)]
    finally:
        for array, value in zip(state, saved, strict=True):
            array._value = value
    values = [a._value for a in arrays_of(result)] + updated
    number = {v: i for i, v in enumerate(placeholders)}
    number |= {v: number[p] for v, p in zip(saved, placeholders[len(given):], strict=True)}
    sources = [number.get(v, -1) for v in values]
    computed = [v for v, s in zip(values, sources, strict=True) if s < 0]
    executable = lower_values(computed, placeholders, []).load() if computed else None
    return Traced(executable, result, sources, len(updated))

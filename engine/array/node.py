"""The lazy graph: a Node applies a Primitive to Values; a Value is one result, a leaf once it has memory."""
from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .dtypes import Dtype

MANY = 1 << 30
Shape = tuple[int, ...]
Aval = tuple[Shape, Dtype]


class Dim(int):
    """A size that a run chooses, at most `maximum`: it counts as its maximum and equals only itself."""

    name: str

    def __new__(cls, name: str, maximum: int) -> Dim:
        self = super().__new__(cls, maximum)
        self.name = name
        return self

    @property
    def maximum(self) -> int:
        return int(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and self.name == other.name and int(self) == int(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((self.name, int(self)))

    def __repr__(self) -> str:
        return self.name

    __str__ = __repr__


@dataclass(frozen=True, slots=True, eq=False)
class Primitive:
    """One row of the table in primitives.py. `view` marks a movement: it maps (shape, strides, new shape, params) to
    (first element, strides), or None where the elements must be copied."""

    name: str
    rule: Callable[..., list[Aval]]                        # (*values, **params) -> (shape, dtype) of each result
    lower: Callable[..., None] | None = None               # (lowering, node, results) -> None
    definition: Callable[..., Any] | None = None           # a fused op in terms of other ops: (*arrays, **params)
    view: Callable[..., tuple[int, Shape] | None] | None = None
    kernel: str = ""                                       # opcode, or the kernel that the runtime must have
    suits: Callable[..., bool] | None = None               # whether that kernel takes these inputs: (node) -> bool
    vjp: Callable[..., Any] | None = None
    jvp: Callable[..., Any] | None = None
    vmap: Callable[..., Any] | None = None


class Buffer:
    """Memory that belongs to `owner`. Only a donatable buffer may be overwritten once nobody else refers to it."""

    __slots__ = ("pointer", "nbytes", "owner", "donatable", "__weakref__")

    def __init__(self, pointer: int, nbytes: int, owner: Any, donatable: bool):
        self.pointer, self.nbytes, self.owner, self.donatable = pointer, nbytes, owner, donatable


class Node:
    __slots__ = ("primitive", "inputs", "params", "results")

    def __init__(self, primitive: Primitive, inputs: tuple[Value, ...], params: dict[str, Any]):
        self.primitive, self.inputs, self.params = primitive, inputs, params
        self.results: list[weakref.ref[Value]] = []

    def values(self) -> list[Value]:
        """The results; those nobody kept are made anew, since a kernel writes them all the same."""
        kept = [ref() for ref in self.results]
        if None in kept:
            avals = self.primitive.rule(*self.inputs, **self.params)
            kept = [v or Value(*avals[i], self, i) for i, v in enumerate(kept)]
            self.results = [weakref.ref(v) for v in kept if v is not None]
        return [v for v in kept if v is not None]


class Tracing(threading.local):
    """How many transformations this thread is tracing, and the leaves that must remember how they came about."""

    def __init__(self) -> None:
        self.depth, self.leaves = 0, list[weakref.ref["Value"]]()

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if not self.depth:
            for ref in self.leaves:
                if (value := ref()) is not None:
                    value.trace = None
            self.leaves.clear()


TRACING = Tracing()


class Value:
    """`node` and `index` say how it is computed; a leaf has `buffer`, `offset` (bytes) and `strides` (elements);
    a placeholder has no memory yet. `trace` is the node of a leaf that was computed while a transformation traced."""

    __slots__ = ("shape", "dtype", "node", "index", "buffer", "offset", "strides", "trace", "__weakref__")

    def __init__(self, shape: Shape, dtype: Dtype, node: Node | None = None, index: int = 0):
        self.shape, self.dtype, self.node, self.index = shape, dtype, node, index
        self.buffer: Buffer | None = None
        self.offset = 0
        self.strides: Shape = ()
        self.trace: Node | None = None

    def fill(self, buffer: Buffer, offset: int, strides: Shape) -> Value:
        """Becomes a leaf; the graph behind it is let go, unless a transformation still needs it."""
        if self.node is not None and TRACING.depth:
            self.trace = self.node
            TRACING.leaves.append(weakref.ref(self))
        self.buffer, self.offset, self.strides, self.node = buffer, offset, strides, None
        return self

    def stand_in(self) -> Value:
        """A placeholder of the same layout."""
        value = Value(self.shape, self.dtype)
        value.strides = self.strides
        return value


def no_value(value: Value) -> ValueError:
    what = f"{value.dtype}{show(value.shape)} has no value"
    return ValueError(f"[eval] an array {what} while vmap or compile traces the function that makes it" if TRACING.depth
                      else f"[eval] a placeholder {what}: pass it as an input")


def contiguous_strides(shape: Shape) -> Shape:
    """Row-major strides in elements. A symbolic size must not be part of any stride."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def is_contiguous(shape: Shape, strides: Shape) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return 0 in shape
        step *= size
    return True


def check_symbolic(name: str, shape: Shape, ones: int = MANY) -> None:
    """A symbolic axis must lead; `ones` axes of size 1 before it do no harm."""
    for axis, size in enumerate(shape):
        if isinstance(size, Dim) and (axis > ones or any(s != 1 for s in shape[:axis])):
            raise ValueError(f"[{name}] axis {axis} of {show(shape)} is symbolic and must lead")


def show(shape: Iterable[int]) -> str:
    """(T, 64)"""
    sizes = [str(s) for s in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def apply(primitive: Primitive, *inputs: Value, **params: Any) -> list[Value]:
    """Makes the node; a movement of a leaf is done at once, since it costs nothing, unless the leaf is traced."""
    avals = primitive.rule(*inputs, **params)
    for shape, _ in avals:
        if Dim in map(type, shape):
            check_symbolic(primitive.name, shape)
    if primitive.view and (buffer := inputs[0].buffer) is not None and inputs[0].trace is None:
        shape, dtype = avals[0]
        moved = primitive.view(inputs[0].shape, inputs[0].strides, shape, params)
        if moved is not None:
            offset = inputs[0].offset + moved[0] * inputs[0].dtype.size
            return [Value(shape, dtype).fill(buffer, offset, moved[1])]
    node = Node(primitive, inputs, params)
    values = [Value(shape, dtype, node, i) for i, (shape, dtype) in enumerate(avals)]
    node.results = [weakref.ref(v) for v in values]
    return values


def toposort(roots: Iterable[Value]) -> list[Node]:
    """Nodes in the order of evaluation. Of several roots clearly shallower ones come first: of gradients those of the
    last layers, so that what they read does not stay in memory until the end."""
    roots = list(roots)
    order = postorder(roots)
    if len(roots) < 2:
        return order
    depth: dict[Node | None, int] = {None: 0}
    for node in order:
        depth[node] = 1 + max((depth[v.node] for v in node.inputs), default=0)
    return postorder(sorted(roots, key=lambda v: depth[v.node] // 8))


def postorder(roots: Iterable[Value], behind: Callable[[Value], Node | None] = lambda value: value.node) -> list[Node]:
    """The nodes `behind` the roots, each after those of its inputs. Without recursion: graphs can be deep."""
    order: list[Node] = []
    seen: set[Node] = set()

    def unseen(values: Iterable[Value]) -> list[tuple[Node, bool]]:
        return [(node, False) for v in values if (node := behind(v)) is not None and node not in seen]

    stack = unseen(reversed(list(roots)))
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += unseen(reversed(node.inputs))
    return order


class _Window:
    """Lets NumPy see a leaf's memory and keeps the buffer alive."""

    def __init__(self, value: Value, writable: bool):
        assert value.buffer is not None
        self.buffer, size = value.buffer, value.dtype.size
        self.__array_interface__ = {
            "version": 3, "typestr": value.dtype.numpy.str, "shape": tuple(int(s) for s in value.shape),
            "strides": tuple(s * size for s in value.strides),
            "data": (value.buffer.pointer + value.offset, not writable)}


def to_numpy(value: Value, writable: bool = False) -> np.ndarray:
    """The leaf's memory without a copy; bfloat16 as its uint16 bits."""
    if 0 in value.shape:
        return np.empty(value.shape, value.dtype.numpy)
    return np.asarray(_Window(value, writable))


def from_numpy(array: np.ndarray, dtype: Dtype, donatable: bool) -> Value:
    """A leaf on an array's memory, whatever its strides; a donatable one must be nobody else's."""
    if any(s % array.itemsize for s in array.strides):
        array = array.copy()
    buffer = Buffer(array.__array_interface__["data"][0], array.nbytes, array, donatable)
    strides = tuple(s // array.itemsize for s in array.strides)
    return Value(tuple(array.shape), dtype).fill(buffer, 0, strides)

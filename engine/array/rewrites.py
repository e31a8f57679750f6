"""Rewrites of the traced graph before lowering: REWRITES is the list of (name, first primitives, rule), `rewrite` the
driver. A rule looks at a node and returns what replaces its results, or None."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from .array import Array
from .dtypes import bfloat16, float16, float32
from .node import Dim, Node, Value, apply, toposort
from .plan import nbytes
from .primitives import EPILOGUES, TABLE, size_of
from .quantized import FLOATS

LINEAR_BITS, LINEAR_GROUPS, LINEAR_WEIGHTS = (1, 2, 3, 4, 5, 6, 8), (16, 32, 64, 128), 8  # what the kernel takes
MANY_ROWS, THIN = 64, 32
CALLS = ("checkpoint", "custom_function")                  # functions of a node, which transformations alone see as one
Replacement = dict[Value, Value] | None


class Graph:
    """The graph while one rule walks it: `uses` of each value, the nodes that read it, and what replaced it."""

    def __init__(self, outputs: list[Value], kernels: frozenset[str]):
        self.outputs, self.kernels = outputs, kernels
        self.order = toposort(outputs)
        self.names = {node.primitive.name for node in self.order}
        self.uses: Counter[Value] = Counter(v for node in self.order for v in node.inputs)
        self.uses.update(outputs)
        self.readers: dict[Value, list[Node]] = {}
        for node in self.order:
            for v in node.inputs:
                self.readers.setdefault(v, []).append(node)
        self.new: dict[Value, Value] = {}
        self.seen: dict[Any, Node] = {}

    def replace(self, old: Value, new: Value) -> None:
        self.new[old] = new
        self.uses[new] += self.uses[old]

    def current(self, node: Node) -> Node:
        """The node on the replaced inputs."""
        if not self.new:
            return node
        inputs = tuple(self.new.get(v, v) for v in node.inputs)
        if inputs == node.inputs:
            return node
        for old, new in zip(node.values(), apply(node.primitive, *inputs, **node.params), strict=True):
            self.replace(old, new)
        return self.new[node.values()[0]].node or node

    def once(self, value: Value, primitive: str) -> Node | None:
        """The node behind the value, if it is that primitive and nobody else reads the value."""
        node = value.node
        return node if node is not None and node.primitive.name == primitive and self.uses[value] == 1 else None


def rewrite(outputs: list[Value], kernels: frozenset[str], stand_ins: dict[Value, Value]) -> list[Value]:
    """stand_ins: placeholders for leaves whose memory is another at the next run: no rule must make them constants."""
    graph = Graph(outputs, kernels)
    graph.new = dict(stand_ins)
    graph = walk(graph, (), lambda graph, node, old: None)
    while not graph.names.isdisjoint(CALLS):
        graph = walk(graph, CALLS, lambda graph, node, old: defined(node, old))
    fold(graph.outputs)
    for _, roots, rule in REWRITES:
        graph = walk(graph, roots, rule)
    while any(_lacks(node, kernels) for node in graph.order):
        graph = walk(graph, (), expand)
    return graph.outputs


def walk(graph: Graph, roots: tuple[str, ...], rule: Callable[..., Replacement]) -> Graph:
    """The graph after one walk of a rule that starts at `roots` (at all nodes, if there are none)."""
    if roots and graph.names.isdisjoint(roots):
        return graph
    for node in graph.order:
        results = [v for ref in node.results if (v := ref()) is not None]
        if all(v in graph.new for v in results):
            continue
        current = graph.current(node)
        if (not roots or node.primitive.name in roots) and (found := rule(graph, current, node)):
            for result, made in found.items():
                graph.replace(result, made)
    return Graph([graph.new.get(v, v) for v in graph.outputs], graph.kernels) if graph.new else graph


def fold(outputs: list[Value]) -> None:
    """Computes what follows from constants alone: it becomes one, unless it takes more memory than they do and is no
    vector, as a norm's weight is."""
    from .evaluate import eval
    known: set[Value] = set()
    plain: set[Value] = set()                              # Python's numbers, seen as arrays of any shape
    wanted: set[Value] = set(outputs)
    for node in toposort(outputs):
        results = node.values()
        leaves = [v for v in node.inputs if v.buffer is not None or v in known]
        fixed = all(v.buffer is not None or v in known or v in plain for v in node.inputs)
        if not leaves and fixed and (node.primitive.name == "constant" or node.primitive.view is not None):
            plain.update(results)
        elif leaves and fixed and (all(len(v.shape) < 2 for v in results) or _memory(results) <= _memory(leaves)):
            known.update(results)
        else:
            wanted.update(leaves)
    eval([Array.of(v) for v in known & wanted])


def _memory(values: list[Value]) -> int:
    return sum(nbytes(v.shape, v.dtype) for v in values)


def common(graph: Graph, node: Node, old: Node) -> Replacement:
    """What another node computes already."""
    params = (v or str(v) for v in node.params.values())   # 0.0 is not -0.0
    twin = graph.seen.setdefault((node.primitive, node.inputs, *params), node)
    return None if twin is node else dict(zip(old.values(), twin.values(), strict=True))


def expand(graph: Graph, node: Node, old: Node) -> Replacement:
    """A fused op without a kernel becomes its definition."""
    return defined(node, old) if _lacks(node, graph.kernels) else None


def defined(node: Node, old: Node) -> Replacement:
    assert node.primitive.definition is not None
    results = node.primitive.definition(*map(Array.of, node.inputs), **node.params)
    results = results if isinstance(results, tuple) else (results,)
    return {v: r._value for v, r in zip(old.values(), results, strict=True)}


def _lacks(node: Node, kernels: frozenset[str]) -> bool:
    primitive = node.primitive
    return primitive.definition is not None and not (
        primitive.kernel in kernels and (primitive.suits is None or primitive.suits(node)))


# linear: params sizes, bits, group, norm, epilogue, bias, eps; inputs x, [norm weight], weights …, [biases], [residual]

def _parts(bits: int) -> int:
    """The arrays of a weight: dense, or codes with scales and, unless these are floats, biases."""
    return 1 if not bits else 2 if bits & FLOATS else 3


def _linear(x: Value, weights: list[Value], sizes: tuple[int, ...], bits: int = 0, group: int = 0) -> list[Value]:
    return apply(TABLE["linear"], x, *weights, sizes=sizes, bits=bits, group=group, norm=False, epilogue="none",
                 bias=False, eps=0.0)


def _with(node: Node, inputs: list[Value], **params: Any) -> list[Value]:
    return apply(TABLE["linear"], *inputs, **{**node.params, **params})


def _flat_linear(x: Value, n: int, make: Callable[[Value], list[Value]], result: Value) -> Replacement:
    """The linear of x (…, K) seen as rows."""
    if len(x.shape) == 2:
        return {result: make(x)[0]}
    if any(isinstance(s, Dim) for s in x.shape):
        return None
    rows = 1
    for s in x.shape[:-1]:
        rows *= s
    [y] = make(apply(TABLE["reshape"], x, shape=(rows, x.shape[-1]))[0])
    return {result: apply(TABLE["reshape"], y, shape=(*x.shape[:-1], n))[0]}


def quantized_linear(graph: Graph, node: Node, old: Node) -> Replacement:
    p, (x, *weights) = node.params, node.inputs
    if not p["transpose"] or p["precise"] or len(weights[0].shape) != 2 or x.dtype is not float32:
        return None
    if p["bits"] not in LINEAR_BITS or p["group_size"] not in LINEAR_GROUPS:
        return None
    n = weights[0].shape[0]
    bits = p["bits"] if len(weights) == 3 else FLOATS + p["bits"]
    return _flat_linear(x, n, lambda v: _linear(v, weights, (n,), bits, p["group_size"]), old.values()[0])


def dense_linear(graph: Graph, node: Node, old: Node) -> Replacement:
    x, b = node.inputs
    w, rows = _transposed(b), size_of(x.shape[:-1])
    if w is None or x.dtype is not float32:
        return None
    if w.dtype is float32 and rows >= MANY_ROWS and not any(isinstance(s, Dim) for s in x.shape):
        return None                                        # matmul is as fast or, with AMX, faster
    return _flat_linear(x, w.shape[0], lambda v: _linear(v, [w], (w.shape[0],)), old.values()[0])


def turned_product(graph: Graph, node: Node, old: Node) -> Replacement:
    """(a b)ᵀ = bᵀ aᵀ, so that the gradient of a weight lies as the weight does."""
    product, axes = graph.once(node.inputs[0], "matmul"), node.params["axes"]
    if not product or axes != _last_two_exchanged(axes):
        return None
    return {old.values()[0]: apply(TABLE["matmul"], *map(_turned, reversed(product.inputs)))[0]}


def _last_two_exchanged(axes: tuple[int, ...]) -> tuple[int, ...]:
    return (*range(len(axes) - 2), len(axes) - 1, len(axes) - 2)


def _turned(v: Value) -> Value:
    axes = _last_two_exchanged(v.shape)
    if v.node is not None and v.node.primitive.name == "transpose" and v.node.params["axes"] == axes:
        return v.node.inputs[0]
    return apply(TABLE["transpose"], v, axes=axes)[0]


def _transposed(b: Value) -> Value | None:
    """The row-major weight (N, K) that b (K, N) is the transpose of, under a cast if there is one."""
    if b.node is not None and b.node.primitive.name == "astype" and b.node.inputs[0].dtype in (float16, bfloat16):
        b = b.node.inputs[0]
    if len(b.shape) != 2 or isinstance(b.shape[1], Dim):
        return None
    if b.node is not None and b.node.primitive.name == "transpose":
        w = b.node.inputs[0]
        if w.node is not None and w.node.primitive.name == "transpose":
            return None                                    # back again: b is row-major as it is
        if w.node is not None and w.node.primitive.name == "astype" and w.node.inputs[0].dtype in (float16, bfloat16):
            w = w.node.inputs[0]
        return w
    if b.node is None and b.strides == (1, b.shape[0]):
        return apply(TABLE["transpose"], b, axes=(1, 0))[0]
    return None


def add_bias(graph: Graph, node: Node, old: Node) -> Replacement:
    for y, other in (node.inputs, node.inputs[::-1]):
        linear, bias = graph.once(y, "linear"), _repeated(other)
        if linear and bias and bias.shape == linear.params["sizes"] and not linear.params["bias"]:
            return {old.values()[0]: _with(linear, [*linear.inputs, bias], bias=True)[0]}
    return None


def _repeated(rows: Value) -> Value | None:
    """The row (N) that every one of the rows (T, N) is; a leaf was broadcast at once, and has left no node."""
    if rows.node is not None:
        return rows.node.inputs[0] if rows.node.primitive.name == "broadcast_to" else None
    if rows.buffer is None or rows.strides != (0, 1):
        return None
    return Value(rows.shape[1:], rows.dtype).fill(rows.buffer, rows.offset, (1,))


def merge(graph: Graph, node: Node, old: Node) -> Replacement:
    """Linears that share x become one with several outputs, as long as what else they read is there from the start."""
    per = _parts(old.params["bits"])
    others = [n for n in dict.fromkeys(graph.readers[old.inputs[0]]) if n is not old and _mergeable(n, old, per)]
    together = [old, *others[:LINEAR_WEIGHTS - 1]]
    if not others or not _mergeable(old, old, per):
        return None
    weights = [v for n in together for v in n.inputs[1:1 + per]]
    biases = [n.inputs[-1] for n in together if n.params["bias"]]
    sizes = tuple(n.params["sizes"][0] for n in together)
    merged = _with(old, [node.inputs[0], *weights, *biases], sizes=sizes)
    return {n.values()[0]: v for n, v in zip(together, merged, strict=True)}


def _mergeable(node: Node, like: Node, per: int) -> bool:
    return (node.primitive.name == "linear" and node.params | {"sizes": ()} == like.params | {"sizes": ()}
            and len(node.params["sizes"]) == 1 and node.inputs[0] is like.inputs[0]
            and [v.dtype for v in node.inputs[1:1 + per]] == [v.dtype for v in like.inputs[1:1 + per]]
            and all(v.node is None for v in node.inputs[1:]))


def norm_prologue(graph: Graph, node: Node, old: Node) -> Replacement:
    norm = graph.once(node.inputs[0], "rms_norm")
    if not norm or norm.params["present"] != ("x", "weight") or norm.inputs[0].dtype is not float32:
        return None
    made = _with(node, [*norm.inputs, *node.inputs[1:]], norm=True, eps=norm.params["eps"])
    return dict(zip(old.values(), made, strict=True))


def add_residual(graph: Graph, node: Node, old: Node) -> Replacement:
    for y, residual in (node.inputs, node.inputs[::-1]):
        linear = graph.once(y, "linear")
        if linear and linear.params["epilogue"] == "none" and len(linear.params["sizes"]) == 1:
            return {old.values()[0]: _with(linear, [*linear.inputs, residual], epilogue="add")[0]}
    return None


def gate(graph: Graph, node: Node, old: Node) -> Replacement:
    """act(gate) * up, both from one linear of two."""
    for activated, up in (node.inputs, node.inputs[::-1]):
        for name in EPILOGUES[2:]:
            act = graph.once(activated, name)
            linear = graph.once(up, "linear")
            if (act and linear and graph.once(act.inputs[0], "linear") is linear and act.inputs[0] is not up
                    and len(linear.params["sizes"]) == 2 and linear.params["epilogue"] == "none"
                    and linear.params["sizes"][0] == linear.params["sizes"][1]):
                inputs = list(linear.inputs) if up.index else _swapped(linear)
                return {old.values()[0]: _with(linear, inputs, epilogue=name)[0]}
    return None


def _swapped(node: Node) -> list[Value]:
    """Inputs of a linear of two with the two exchanged."""
    p, inputs = node.params, list(node.inputs)
    per, first = _parts(p["bits"]), 1 + p["norm"]
    head, one, two, rest = (inputs[:first], inputs[first:first + per], inputs[first + per:first + 2 * per],
                            inputs[first + 2 * per:])
    return head + two + one + rest[::-1]


def silu(graph: Graph, node: Node, old: Node) -> Replacement:
    """x * sigmoid(x)"""
    for x, s in (node.inputs, node.inputs[::-1]):
        if s.node is not None and s.node.primitive.name == "sigmoid" and s.node.inputs[0] is x:
            return {old.values()[0]: apply(TABLE["silu"], x)[0]}
    return None


def gelu(graph: Graph, node: Node, old: Node) -> Replacement:
    """0.5 x (1 + tanh(c (x + d x³))), GELU's approximation as it is written out"""
    half, found = _factors(node.values()[0])
    for x, gate in (found, found[::-1]) if len(found) == 2 and half == 0.5 else ():
        tanh = next((t for t in _terms(gate, 1.0) if t.node is not None and t.node.primitive.name == "tanh"), None)
        slope, inner = _factors(tanh.node.inputs[0]) if tanh is not None and tanh.node is not None else (0.0, [])
        if len(inner) != 1 or not math.isclose(slope, math.sqrt(2 / math.pi), rel_tol=1e-4):
            continue
        for cube in _terms(inner[0], x):
            factor, xs = _factors(cube)
            if xs == [x, x, x] and math.isclose(factor, 0.044715, rel_tol=1e-4):
                return {old.values()[0]: apply(TABLE["gelu_tanh"], x)[0]}
    return None


def _scalar(value: Value) -> float | None:
    """The number that every element is."""
    while value.node is not None and value.node.primitive.name in ("broadcast_to", "astype"):
        value = value.node.inputs[0]
    constant = value.node is not None and value.node.primitive.name == "constant"
    return float(value.node.params["value"]) if constant else None  # type: ignore[union-attr]


def _factors(value: Value) -> tuple[float, list[Value]]:
    """A product's number and its other factors; powers of 2 and 3 are products."""
    rest: list[Value] = []
    number, open_ = 1.0, [value]
    while open_ and len(rest) < 4:                         # more are of no use to anybody
        v = open_.pop()
        name, inputs = (v.node.primitive.name, v.node.inputs) if v.node is not None else ("", ())
        if (scalar := _scalar(v)) is not None:
            number *= scalar
        elif name == "multiply":
            open_ += inputs
        elif name == "square" or name == "power" and _scalar(inputs[1]) in (2.0, 3.0):
            open_ += [inputs[0]] * (2 if name == "square" else int(_scalar(inputs[1]) or 0))
        else:
            rest.append(v)
    return number, rest


def _terms(value: Value, one: float | Value) -> list[Value]:
    """What a sum adds to `one`, a number or a value."""
    if value.node is None or value.node.primitive.name != "add":
        return []
    a, b = value.node.inputs
    return [y for x, y in ((a, b), (b, a)) if (x is one if isinstance(one, Value) else _scalar(x) == one)]


def loss_with_gradient(graph: Graph, node: Node, old: Node) -> Replacement:
    """A loss and its gradient of the same arrays come from one pass."""
    def alike(n: Node) -> bool:
        return n.primitive.name == "linear_cross_entropy_grad" and n.inputs == old.inputs and n.params == old.params

    both = next(filter(alike, graph.readers[old.inputs[0]]), None)
    if both is None:
        return None
    key = "linear_cross_entropy_grad", node.inputs, *map(str, node.params.values())
    made = graph.seen.get(key) or apply(both.primitive, *node.inputs, **node.params)[0].node
    assert made is not None
    graph.seen[key] = made
    return dict(zip(old.values(), made.values(), strict=False))


def thin_product(graph: Graph, node: Node, old: Node) -> Replacement:
    """c + a b, of few columns of a: as it is made it is added to c, which takes as long as to read and write c."""
    for y, c in (node.inputs, node.inputs[::-1]):
        product = graph.once(y, "matmul")
        if product and len(y.shape) == 2 and y.dtype is float32 and not any(isinstance(s, Dim) for s in y.shape):
            a, b = product.inputs
            if a.shape[1] <= THIN and y.shape[0] >= MANY_ROWS and a.dtype is b.dtype is float32:
                return {old.values()[0]: apply(TABLE["add_product"], c, a, b)[0]}
    return None


def needs(kernel: str, rule: Callable[..., Replacement]) -> Callable[..., Replacement]:
    return lambda graph, node, old: rule(graph, node, old) if kernel in graph.kernels else None


REWRITES: list[tuple[str, tuple[str, ...], Callable[..., Replacement]]] = [
    ("the same once", (), common),
    ("x * sigmoid(x) is silu", ("multiply",), silu),
    ("0.5 x (1 + tanh(…)) is gelu_tanh", ("multiply",), gelu),
    ("quantized_matmul is linear", ("_quantized_matmul",), needs("linear", quantized_linear)),
    ("loss and gradient in one", ("_linear_cross_entropy", "linear_cross_entropy_grad"), loss_with_gradient),
    ("a product under a transpose", ("transpose",), turned_product),
    ("matmul with a transposed weight is linear", ("matmul",), needs("linear", dense_linear)),
    ("flat x of several linears once", ("reshape",), common),
    ("linear + bias", ("add",), add_bias),
    ("linears of one x are one", ("linear",), merge),
    ("rms_norm before linear", ("linear",), norm_prologue),
    ("linear + residual", ("add",), add_residual),
    ("act(gate) * up after linear", ("multiply",), gate),
    ("c + a b of few columns of a", ("add",), needs("add_product", thin_product)),
]

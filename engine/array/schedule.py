"""The order of a plan's steps, which decides how much memory it takes."""
from __future__ import annotations

from collections import Counter

from .node import Node, Value, toposort
from .plan import nbytes
from .primitives import ELEMENTWISE

CHEAP = {name.partition(":")[0] for names in ELEMENTWISE.values() for name in names.split()} | {"astype"}
AGAIN = CHEAP | {"rms_norm", "layer_norm", "constant"}     # may be computed twice: if it has
FAR, LARGE = 100, 1 << 16                                  # so many nodes between readers, and so many bytes


def schedule(outputs: list[Value]) -> tuple[list[Node], Counter[Value], Counter[Value]]:
    """The nodes in order, some of them twice; how often each value is read, and how often after the second time."""
    order = again(early(toposort(outputs)), set(outputs))
    uses: Counter[Value] = Counter(outputs)
    later: Counter[Value] = Counter()
    first: set[Node] = set()
    second: set[Value] = set()
    for node in order:
        for v in node.inputs:
            (later if v in second else uses)[v] += 1
        second.update(node.values() if node in first else ())
        first.add(node)
    return order, uses, later


def early(order: list[Node]) -> list[Node]:
    """The order with each product that is much smaller than what it reads as soon as that is there: what gradients of
    weights read does not stay in memory until the optimizer asks for all of them."""
    readers: dict[Node, list[Node]] = {}
    missing: dict[Node, int] = {}
    for node in filter(_shrinks, order):
        made = _sources(node)
        missing[node] = len(made)
        for source in made:
            readers.setdefault(source, []).append(node)
    done: dict[Node, None] = {}

    def emit(node: Node) -> None:
        for v in node.inputs:                              # what was too cheap to be a source
            if v.node is not None and v.node not in done:
                emit(v.node)
        done[node] = None
        for reader in readers.get(node, ()):
            missing[reader] -= 1
            if not missing[reader] and reader not in done:
                emit(reader)

    for node in order:
        if node not in done:
            emit(node)
    return list(done)


def _sources(node: Node, depth: int = 8) -> set[Node]:
    """The nodes behind the inputs, through movements and short elementwise chains."""
    found: set[Node] = set()
    for before in {v.node for v in node.inputs if v.node is not None}:
        cheap = before.primitive.view is not None or before.primitive.name in CHEAP
        found |= _sources(before, depth - 1) if cheap and depth else {before}
    return found


def _shrinks(node: Node) -> bool:
    if node.primitive.name != "matmul":
        return False
    [result] = node.values()
    return any(nbytes(v.shape, v.dtype) > 8 * nbytes(result.shape, result.dtype) for v in node.inputs)


def again(order: list[Node], outputs: set[Value]) -> list[Node]:
    """The order with a second time for large results that are cheap, and whose last readers come much later than the
    others, if what they are made of is there anyway: of a forward pass only what products give waits for the backward
    pass."""
    readers: dict[Value, list[int]] = {}
    for i, node in enumerate(order):
        for v in node.inputs:
            readers.setdefault(v, []).append(i)
    for v in outputs:
        readers.setdefault(v, []).append(len(order))
    far: dict[Node, int] = {}                              # the last of its first readers
    for node in order:
        if _large(node):
            at = readers.get(node.values()[0], [])
            gap, last, place = max(((b - a, a, b) for a, b in zip(at, at[1:], strict=False)), default=(0, 0, 0))
            if gap > FAR and place < len(order) and all(_there(v, place, readers) for v in node.inputs):
                far[node] = last
    twice: set[Node] = set()
    return [step for i, node in enumerate(order) for step in (*_gone(node, i, far, readers, twice), node)]


def _gone(node: Node, at: int, far: dict[Node, int], readers: dict[Value, list[int]], twice: set[Node]) -> list[Node]:
    """What has to be computed once more for the node to run at that place; `twice` is what was, from then on too."""
    found: list[Node] = []
    for v in node.inputs:
        made = v.node
        if made is not None and made not in twice and at > far.get(made, readers[v][-1]):
            twice.add(made)
            found += [*_gone(made, at, far, readers, twice), made]
    return found


def _there(v: Value, at: int, readers: dict[Value, list[int]]) -> bool:
    """Whether the value is in memory at that place, or cheap to make of what is."""
    node = v.node
    return node is None or readers[v][-1] >= at or _cheap(node) and all(_there(x, at, readers) for x in node.inputs)


def _cheap(node: Node) -> bool:
    return node.primitive.name in AGAIN or node.primitive.view is not None


def _large(node: Node) -> bool:
    [result, *rest] = node.values()
    return not rest and node.primitive.name in AGAIN and nbytes(result.shape, result.dtype) >= LARGE

"""The lazy graph as a picture: Graphviz's language, and SVG with a layered layout of our own (no program is needed).

Layout: Sugiyama, Tagawa and Toda, "Methods for visual understanding of hierarchical system structures" (1981).
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from .array import Array
from .compiled import trace
from .containers import arrays_of
from .node import Node, Value, show, toposort

__all__ = ["export_to_dot", "graph"]
LINE, PAD, LETTER = 15, 8, 6.6       # pixels: a line of text, the margin in a box, a letter
GAP, LEVEL = 16, 38                  # between boxes, and between layers
FACTS = ("axis", "axes", "dtype")    # parameters that are shown
SWEEPS = 12                          # of ordering, and of moving boxes towards their neighbours


@dataclass
class Vertex:
    """A box of the picture: an operation, an input, or (without text) a place that a long edge passes through."""

    lines: list[str]
    kind: str = "operation"
    above: list[int] = field(default_factory=list)
    below: list[int] = field(default_factory=list)
    layer: int = 0
    x: float = 0.0                   # the middle
    y: float = 0.0

    @property
    def width(self) -> float: return LETTER * max(map(len, self.lines)) + 2 * PAD if self.lines else 0.0
    @property
    def height(self) -> float: return LINE * len(self.lines) + PAD if self.lines else 0.0


class Graph:
    """`dot` and `svg` are the picture as text; a notebook shows it, `save` writes it."""

    def __init__(self, outputs: Sequence[Array], names: dict[str, Array]):
        self.vertices: list[Vertex] = []
        self._names = {array._value: name for name, array in names.items()}
        self._number: dict[Value | Node, int] = {}
        results = dict.fromkeys(array._value for array in outputs)
        for node in toposort(results):
            if not scalar(node):
                self._add_node(node, results)
        for value in results:
            if value.node is None:
                self._add_leaf(value)

    def _add_node(self, node: Node, results: dict[Value, None]) -> None:
        above = [self._source(value) for value in node.inputs]
        found = [value for ref in node.results if (value := ref()) is not None]
        facts = [f"{key}={node.params[key]}" for key in FACTS if node.params.get(key) is not None]
        lines = [" ".join([node.primitive.name, *facts])]
        lines += [self._describe(value) for value in found]
        kind = "output" if results.keys() & set(found) else "operation"
        self._number[node] = self._add(Vertex(lines, kind, above))

    def _source(self, value: Value) -> int:
        if value.node is None or scalar(value.node):
            return self._add_leaf(value)
        return self._number[value.node]

    def _add_leaf(self, value: Value) -> int:
        """The vertex of an input; a scalar has one at each use, so that no long edges lead to it."""
        if text := scalar(value.node):
            return self._add(Vertex([text], "scalar"))
        if value not in self._number:
            self._number[value] = self._add(Vertex([self._describe(value)], "input"))
        return self._number[value]

    def _describe(self, value: Value) -> str:
        """Name, type and shape. The view of a named array bears its name."""
        same = [name for v, name in self._names.items() if v is value or (v.buffer and v.buffer is value.buffer)]
        return " ".join([*same[:1], f"{value.dtype}{show(value.shape)}"])

    def _add(self, vertex: Vertex) -> int:
        self.vertices.append(vertex)
        for i in vertex.above:
            self.vertices[i].below.append(len(self.vertices) - 1)
        return len(self.vertices) - 1

    @property
    def dot(self) -> str:
        """Graphviz's language."""
        shapes = {"operation": "box", "output": "box, penwidth=2", "input": "ellipse", "scalar": "plaintext"}
        lines = ["digraph {", "  node [fontname=Helvetica, fontsize=11];"]
        for i, v in enumerate(self.vertices):
            text = "\\n".join(v.lines).replace('"', '\\"')
            lines += [f'  {i} [shape={shapes[v.kind]}, label="{text}"];', *(f"  {j} -> {i};" for j in v.above)]
        return "\n".join([*lines, "}", ""])

    @property
    def svg(self) -> str:
        vertices, layers = layout(self.vertices)
        width = max((v.x + v.width / 2 for v in vertices), default=0) + GAP
        height = max((v.y + v.height for v in vertices), default=0) + GAP
        body = [edge(vertices[j], v) for v in vertices for j in v.above]
        body += [box(v) for v in vertices if v.lines]
        return SVG.format(width=width, height=height, body="\n".join(body))

    def _repr_svg_(self) -> str: return self.svg
    def __str__(self) -> str: return self.dot

    def save(self, file: str | Path) -> None:
        """Writes a .svg, or Graphviz's language to any other name."""
        Path(file).write_text(self.svg if Path(file).suffix == ".svg" else self.dot, "utf-8")


def scalar(node: Node | None) -> str:
    """The number that a node gives, spread or not, or nothing."""
    if node is not None and node.primitive.name == "broadcast_to":
        return scalar(node.inputs[0].node)
    return f"{node.params['value']:.6g}" if node is not None and node.primitive.name == "constant" else ""


def graph(*args: Any, file: str | Path | None = None, **names: Array) -> Graph:
    """The graph behind arrays that are not evaluated yet, or of a function: `graph(fn, *args)`. names: what to call
    arrays in it. file: where to write it, as .svg or in Graphviz's language."""
    if args and not isinstance(args[0], Array | list | tuple | dict) and callable(args[0]):
        traced = trace(args[0], args[1:], {})
        picture = Graph(arrays_of(traced.result), {})
    else:
        picture = Graph(arrays_of(args), names)
    if file is not None:
        picture.save(file)
    return picture


def export_to_dot(file: Any, *args: Array, **kwargs: Array) -> None:
    """Writes the graph behind arrays in Graphviz's language to a path or an open text file. kwargs: names of arrays."""
    text = Graph(arrays_of(args), kwargs).dot
    file.write(text) if hasattr(file, "write") else Path(file).write_text(text, "utf-8")


# layout

def layout(given: Sequence[Vertex]) -> tuple[list[Vertex], list[list[int]]]:
    """Copies of the vertices with their places, and those that long edges pass through; and the layers from the top."""
    vertices = [Vertex(v.lines, v.kind) for v in given]
    for v, old in zip(vertices, given, strict=True):
        v.layer = max((vertices[i].layer + 1 for i in old.above), default=0)
    for v, old in zip(vertices, given, strict=True):       # inputs go down to where they are used
        if not old.above and old.below:
            v.layer = min(vertices[i].layer for i in old.below) - 1
    for i, old in enumerate(given):
        for j in old.above:
            connect(vertices, j, i)
    layers: list[list[int]] = [[] for _ in range(1 + max((v.layer for v in vertices), default=-1))]
    for i, v in enumerate(vertices):
        layers[v.layer].append(i)
    order(vertices, layers)
    place(vertices, layers)
    return vertices, layers


def connect(vertices: list[Vertex], top: int, bottom: int) -> None:
    """An edge, with a vertex on every layer that it crosses."""
    for layer in range(vertices[top].layer + 1, vertices[bottom].layer + 1):
        if layer < vertices[bottom].layer:
            vertices.append(Vertex([], layer=layer))
        step = len(vertices) - 1 if layer < vertices[bottom].layer else bottom
        vertices[top].below.append(step)
        vertices[step].above.append(top)
        top = step


def sweeps(vertices: list[Vertex], layers: list[list[int]]) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Layers down and up again, with each vertex's neighbours on the layer just passed."""
    for _ in range(SWEEPS):
        yield from ((layer, [vertices[i].above for i in layer]) for layer in layers)
        yield from ((layer, [vertices[i].below for i in layer]) for layer in reversed(layers))


def order(vertices: list[Vertex], layers: list[list[int]]) -> None:
    """Sorts layers by the mean position of neighbours, which leaves few crossings."""
    rank = {i: float(k) for layer in layers for k, i in enumerate(layer)}
    for layer, neighbours in sweeps(vertices, layers):
        key = {i: mean([rank[j] for j in near], rank[i]) for i, near in zip(layer, neighbours, strict=True)}
        layer.sort(key=key.__getitem__)
        rank |= {i: float(k) for k, i in enumerate(layer)}


def mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def place(vertices: list[Vertex], layers: list[list[int]]) -> None:
    """Moves vertices towards their neighbours; on a layer they keep their order and their distance."""
    for layer, neighbours in sweeps(vertices, layers):
        wanted = [mean([vertices[j].x for j in near], vertices[i].x) for i, near in zip(layer, neighbours, strict=True)]
        gaps = [(vertices[a].width + vertices[b].width) / 2 + GAP for a, b in zip(layer, layer[1:], strict=False)]
        right, left = wanted[:], wanted[:]
        for k, gap in enumerate(gaps):
            right[k + 1] = max(right[k + 1], right[k] + gap)
        for k, gap in reversed(list(enumerate(gaps))):
            left[k] = min(left[k], left[k + 1] - gap)
        for i, a, b in zip(layer, left, right, strict=True):
            vertices[i].x = (a + b) / 2
    first, y = min((v.x - v.width / 2 for v in vertices), default=0), float(GAP)
    for layer in layers:
        tall = max(vertices[i].height for i in layer)
        for i in layer:
            vertices[i].x += GAP - first
            vertices[i].y = y + (tall - vertices[i].height) / 2
        y += tall + LEVEL


# drawing

SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"
     viewBox="0 0 {width:.0f} {height:.0f}" font-family="Helvetica, Arial, sans-serif" font-size="11"
     text-anchor="middle">
<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 L8 4 L0 8 z" fill="#5a6b7d"/></marker></defs>
<rect width="100%" height="100%" fill="white"/>
{body}
</svg>
"""
FILL = {"operation": "#eaf1fa", "output": "#fdf0d5", "input": "#e6f4e6", "scalar": "#ffffff"}


def edge(top: Vertex, bottom: Vertex) -> str:
    (x, y), (u, v) = (top.x, top.y + top.height), (bottom.x, bottom.y)
    tip = ' marker-end="url(#tip)"' if bottom.lines else ""
    middle = (y + v) / 2
    return (f'<path d="M{x:.1f} {y:.1f} C{x:.1f} {middle:.1f} {u:.1f} {middle:.1f} {u:.1f} {v:.1f}" '
            f'fill="none" stroke="#5a6b7d"{tip}/>')


def box(v: Vertex) -> str:
    rounded = v.height / 2 if v.kind in ("input", "scalar") else 3
    line = "#b9c4d0" if v.kind != "output" else "#c98a1b"
    parts = [f'<rect x="{v.x - v.width / 2:.1f}" y="{v.y:.1f}" width="{v.width:.1f}" height="{v.height:.1f}" '
             f'rx="{rounded:.0f}" fill="{FILL[v.kind]}" stroke="{line}"/>']
    for k, text in enumerate(v.lines):
        weight = ' font-weight="bold"' if k == 0 and v.kind in ("operation", "output") else ' fill="#44505c"'
        parts.append(f'<text x="{v.x:.1f}" y="{v.y + PAD / 2 + LINE * (k + 0.75):.1f}"{weight}>{escape(text)}</text>')
    return "\n".join(parts)

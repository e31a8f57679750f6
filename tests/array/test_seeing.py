"""The graph as Graphviz and SVG, and the profile: what is in them, and that the picture can be read."""
import io
import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from lazulite.engine import array as mx
from lazulite.engine.array.graph import GAP, Graph, Vertex, layout

# the graph


def mlp() -> tuple[mx.Array, dict[str, mx.Array]]:
    arrays = {"x": mx.ones((8, 64)), "w1": mx.ones((16, 64)), "b": mx.ones((16,)), "w2": mx.ones((10, 16))}
    mx.eval(arrays)
    hidden = mx.maximum(arrays["x"] @ arrays["w1"].T + arrays["b"], 0)
    return mx.softmax(hidden @ arrays["w2"].T, axis=-1), arrays


def test_dot_has_every_operation_input_and_edge() -> None:
    y, arrays = mlp()
    text = mx.graph(y, **arrays).dot
    labels = dict(re.findall(r'(\d+) \[shape=\w+, (?:penwidth=2, )?label="(.*)"\];', text))
    edges = [(labels[a], labels[b]) for a, b in re.findall(r"(\d+) -> (\d+);", text)]
    product, hidden = "matmul\\nfloat32(8, 16)", "add\\nfloat32(8, 16)"
    assert sorted(edges) == sorted([
        ("x float32(8, 64)", product), ("w1 float32(64, 16)", product), (product, hidden), ("b float32(8, 16)", hidden),
        (hidden, "maximum\\nfloat32(8, 16)"), ("0", "maximum\\nfloat32(8, 16)"),
        ("maximum\\nfloat32(8, 16)", "matmul\\nfloat32(8, 10)"), ("w2 float32(16, 10)", "matmul\\nfloat32(8, 10)"),
        ("matmul\\nfloat32(8, 10)", "softmax\\nfloat32(8, 10)")])
    assert text.startswith("digraph {") and text.count("penwidth=2") == 1
    mx.eval(y)
    assert mx.graph(y).dot.count("->") == 0                # evaluated: nothing is behind it


def test_graphs_of_functions_and_of_several_results() -> None:
    def loss(w: mx.Array, x: mx.Array) -> mx.Array:
        return mx.tanh(x @ w).sum()

    kinds = [v.lines[0] for v in mx.graph(mx.value_and_grad(loss), mx.ones((4, 3)), mx.ones((2, 4))).vertices]
    assert {"tanh", "matmul", "sum axes=(0, 1)"} <= set(kinds)
    x = mx.ones((2,))
    mx.eval(x)
    two = mx.graph([mx.exp(x), {"b": mx.sin(x)}])
    assert [v.lines[0] for v in two.vertices if v.kind == "output"] == ["exp", "sin"] and len(two.vertices) == 3


def test_export_to_dot_and_files(tmp_path: Path) -> None:
    y, arrays = mlp()
    stream = io.StringIO()
    mx.export_to_dot(stream, y, **arrays)
    mx.export_to_dot(tmp_path / "a.dot", y, **arrays)
    mx.graph(y, file=tmp_path / "b.dot", **arrays)
    picture = mx.graph(y, file=tmp_path / "b.svg", **arrays)
    assert stream.getvalue() == (tmp_path / "a.dot").read_text() == (tmp_path / "b.dot").read_text() == str(picture)
    assert (tmp_path / "b.svg").read_text() == picture.svg == picture._repr_svg_()


def random_graph(seed: int, size: int) -> Graph:
    """A graph of elementwise operations on up to three earlier results."""
    rng = np.random.default_rng(seed)
    x = mx.ones((2,))
    mx.eval(x)
    values = [x]
    for _ in range(size):
        picked = [values[i] for i in rng.choice(len(values), min(3, len(values)), replace=False)]
        values.append(mx.exp(picked[0]) if len(picked) < 3 else mx.where(picked[0], picked[1], picked[2] * 2))
    return mx.graph(values[-4:])


@pytest.mark.parametrize("size", [1, 5, 20, 60])
def test_boxes_do_not_overlap_and_edges_go_down(size: int) -> None:
    vertices, layers = layout(random_graph(size, size).vertices)
    for layer in layers:
        ends = [(vertices[i].x - vertices[i].width / 2, vertices[i].x + vertices[i].width / 2) for i in layer]
        assert all(a[1] + GAP <= b[0] + 1e-6 for a, b in itertools.pairwise(ends)) and min(ends)[0] >= GAP - 1e-6
    for v in vertices:
        assert all(vertices[i].layer == v.layer - 1 and vertices[i].y + vertices[i].height < v.y for i in v.above)


def crossings(vertices: list[Vertex], layers: list[list[int]]) -> int:
    rank = {i: k for layer in layers for k, i in enumerate(layer)}
    edges = [[(rank[j], rank[i]) for i in layer for j in vertices[i].above] for layer in layers]
    return sum((a - c) * (b - d) < 0 for level in edges for (a, b), (c, d) in itertools.combinations(level, 2))


def test_a_tree_is_drawn_without_crossings() -> None:
    leaves = [mx.ones((2,)) for _ in range(16)]
    mx.eval(leaves)
    order = np.random.default_rng(0).permutation(16)
    level = [leaves[i] for i in order]
    while len(level) > 1:
        level = [a + b for a, b in zip(level[::2], level[1::2], strict=True)]
    assert crossings(*layout(mx.graph(level).vertices)) == 0


def test_svg_is_well_formed_and_within_its_frame() -> None:
    y, arrays = mlp()
    root = ElementTree.fromstring(mx.graph(y, **{"a<b>&": arrays["x"]}).svg)
    space = {"s": "http://www.w3.org/2000/svg"}
    width, height = float(root.get("width")), float(root.get("height"))
    boxes = root.findall("s:rect", space)[1:]
    texts = [text.text for text in root.findall("s:text", space)]
    assert len(boxes) == 10 and "a<b>& float32(8, 64)" in texts and "softmax" in texts
    for box in boxes:
        x, y, w, h = (float(box.get(key)) for key in ("x", "y", "width", "height"))
        assert x >= 0 <= y and x + w <= width and y + h <= height
        inside = [t for t in root.findall("s:text", space) if abs(float(t.get("x")) - x - w / 2) < 0.2
                  and y < float(t.get("y")) < y + h]
        assert inside and all(5.5 * len(t.text) < w for t in inside)
    assert len([p for p in root.findall("s:path", space) if p.get("marker-end")]) == 9


def test_deep_graphs_and_empty_ones() -> None:
    x = mx.ones((2,))
    mx.eval(x)
    y = x
    for _ in range(1500):
        y = y + 1
    assert mx.graph(y).svg.count("<rect") == 1 + 1501 + 1500
    assert "<svg" in mx.graph([]).svg and mx.graph([]).dot.startswith("digraph")


# the profile

def test_a_row_for_each_kernel_with_its_bytes_and_time() -> None:
    x = mx.array(np.ones((256, 512), np.float32))
    mx.eval(x)
    with mx.profile() as p:
        for _ in range(3):
            mx.eval(mx.exp(x) * 2 + 1)
        mx.eval((x + 1).sum(axis=1))
    rows = {row.kernel: row for row in p.rows}
    one = x.nbytes
    assert rows["elementwise"].calls >= 3 and 3 * 2 * one <= rows["elementwise"].nbytes <= 4 * 2 * one
    assert "reduce" in rows or rows["elementwise"].calls == 4
    assert sum(row.share for row in p.rows) == pytest.approx(1) and 0 < p.seconds < 60
    for row in p.rows:
        assert row.microseconds > 0 and row.rate == pytest.approx(row.nbytes / row.microseconds / 1e3)
    assert [row.microseconds for row in p.rows] == sorted((r.microseconds for r in p.rows), reverse=True)
    assert sum(row.microseconds for row in p.rows) <= p.seconds * 1e6
    head, *lines, last = str(p).splitlines()
    assert head.split() == ["kernel", "calls", "µs", "µs/call", "GB/s", "%", "limit", "share"]
    assert [line.split()[0] for line in lines] == [row.kernel for row in p.rows] and "memory limit" in last


def test_compiled_functions_and_executables_are_seen() -> None:
    n = mx.Dim("T", 1024)
    x = mx.placeholder((n, 8), mx.float32)
    plan = mx.lower([mx.exp(x)], [x]).load()
    plan.set_input(0, np.ones((1024, 8), np.float32))
    function = mx.compile(lambda a: mx.exp(a) + 1)
    argument = mx.array(np.ones(64, np.float32))
    function(argument)
    with mx.profile() as p:
        plan.run(T=10)
        plan.run(T=1000)
        mx.eval(function(argument))
    (row,) = p.rows
    assert (row.kernel, row.calls, row.nbytes) == ("elementwise", 3, 2 * 4 * (10 * 8 + 1000 * 8 + 64))


def test_tables_count_what_is_read_of_them() -> None:
    table, index = mx.array(np.ones((10000, 16), np.float32)), mx.array([1, 2, 3])
    with mx.profile() as p:
        mx.eval(mx.take(table, index, axis=0))
    assert {row.kernel: row.nbytes for row in p.rows}["take"] == 2 * 3 * 16 * 4 + 3 * 4


def test_profiles_end_and_nest() -> None:
    with mx.profile() as outer:
        mx.eval(mx.array([1.0]) + 1)
        with pytest.raises(ZeroDivisionError), mx.profile() as inner:
            mx.eval(mx.array([1.0]) + 2)
            raise ZeroDivisionError
    mx.eval(mx.array([1.0]) + 3)
    assert [row.calls for row in inner.rows] == [1] and [row.calls for row in outer.rows] == [2]
    with mx.profile() as empty:
        pass
    assert empty.rows == [] and "kernels 0.0 ms" in str(empty)

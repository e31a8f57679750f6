"""Functions in files. A file is a safetensors file: its tensors are the constants, and the metadata holds, beside the
user's text, the traces as JSON (docs/compile.md describes it). Reading one builds graphs from the table of primitives:
nothing in it is executed, and every graph is checked before it is used.
"""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import dtypes as dt
from . import safetensors
from .array import Array, placeholder
from .compiled import compile
from .containers import arrays_of
from .dtypes import Dtype
from .evaluate import LOCK, lower
from .files import damaged, name_of, read_bytes, replacing
from .node import TRACING, Node, Value, apply, show, to_numpy
from .primitives import TABLE
from .rewrites import Graph, defined, fold, walk
from .sizes import Size, evaluated

__all__ = ["FunctionExporter", "export_function", "exporter", "import_function"]
FORMAT = "lazulite.function.1"
SMALL = 4096                         # elements
Trace = dict[str, Any]


# parameters as JSON: numbers, texts, None, tuples as lists, and objects of one key for the rest

def _encode(value: Any) -> Any:
    if isinstance(value, Size):
        return {"size": value.expression}
    if isinstance(value, tuple):
        return [_encode(v) for v in value]
    if isinstance(value, Dtype):
        return {"dtype": value.name}
    if isinstance(value, complex):
        return {"complex": [_encode(value.real), _encode(value.imag)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(type(value).__name__)


def _decode(value: Any, sizes: dict[str, int]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v, sizes) for v in value)
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "size":
        return evaluated(content, sizes)
    return DECODERS[kind](content)


DECODERS: dict[str, Callable[[Any], Any]] = {
    "dtype": dt.by_name, "float": float, "complex": lambda parts: complex(*_decode(parts, {}))}


def _at(trace: Trace, sizes: dict[str, int]) -> Any:
    """The trace with its sizes filled in."""
    nodes = [(op, {k: _decode(v, sizes) for k, v in params.items()}, inputs) for op, params, inputs in trace["nodes"]]
    return _decode(trace["inputs"], sizes), trace["constants"], nodes, trace["outputs"]


# writing

class FunctionExporter:
    """Writes traces of one function, one for each call, when it is closed."""

    def __init__(self, file: Any, fun: Callable[..., Any], shapeless: bool, metadata: str | None):
        self.file, self.fun, self.shapeless, self.metadata = file, fun, shapeless, metadata
        self.traces: list[Trace] = []
        self.constants: dict[Value, str] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Adds the trace on example arrays of these shapes and dtypes."""
        args, kwargs = _arguments("export_function", args, kwargs)
        names, arrays = sorted(kwargs), [*args, *(kwargs[k] for k in sorted(kwargs))]
        examples = {f"n{s}": s for a in arrays for s in a.shape if s > 1} if self.shapeless else {}
        sizes = {name: s for name, s in examples.items() if self._open(names, arrays, examples, name)}
        if examples and not sizes:
            raise ValueError("[export_function] no size can be open: fun takes no other, or does more than integer "
                             "arithmetic with them. Export a trace for each shape")
        self.traces.append({**self._trace(names, arrays, sizes, sizes), "sizes": sizes})

    def _open(self, names: list[str], arrays: Sequence[Array], examples: dict[str, int], name: str) -> bool:
        """Whether fun takes twice the size, and then makes the graph that the example's expressions say."""
        other = examples | {name: 2 * examples[name]}
        try:
            found = self._trace(names, arrays, other, ())
        except (ValueError, TypeError, IndexError):
            return False
        return _at(self._trace(names, arrays, examples, [name]), other) == _at(found, {})

    def _trace(self, names: list[str], arrays: Sequence[Array], sizes: dict[str, int], symbols: Any) -> Trace:
        """The graph of the function where sizes are as given; those among `symbols` stay expressions."""
        def size(s: int) -> int:
            name = f"n{s}"
            return Size(sizes[name], name) if name in symbols else sizes.get(name, s)

        inputs = [Value(tuple(size(s) for s in a.shape), a.dtype) for a in arrays]
        handles, split = [Array.of(v) for v in inputs], len(arrays) - len(names)
        with TRACING:
            results = self.fun(*handles[:split], **dict(zip(names, handles[split:], strict=True)))
        return self._write(names, inputs, [a._value for a in arrays_of(results)])

    def _write(self, names: list[str], inputs: list[Value], outputs: list[Value]) -> Trace:
        with LOCK:
            fold(outputs)
            graph = Graph(outputs, frozenset())
            while any(map(_opaque, graph.order)):
                graph = walk(graph, (), lambda _, node, old: defined(node, old) if _opaque(node) else None)
        nodes, outputs = graph.order, graph.outputs
        leaves = {v: None for v in (*(v for n in nodes for v in n.inputs), *outputs) if v.buffer is not None}
        number = {v: i for i, v in enumerate((*inputs, *leaves))}
        for node in nodes:
            number.update({v: len(number) + i for i, v in enumerate(node.values())})
        rows = [[n.primitive.name, {k: _encode(v) for k, v in n.params.items()}, [number[v] for v in n.inputs]]
                for n in nodes]
        return {"keywords": names, "inputs": [[v.dtype.name, _encode(v.shape)] for v in inputs], "nodes": rows,
                "constants": [self._constant(v) for v in leaves], "outputs": [number[v] for v in outputs]}

    def _constant(self, value: Value) -> str:
        """The tensor's name; small ones that fun makes at every trace are one."""
        for other, name in self.constants.items():
            if value is other or (value.dtype, value.shape) == (other.dtype, other.shape) and (
                    math.prod(value.shape) <= SMALL and np.array_equal(to_numpy(value), to_numpy(other))):
                return name
        return self.constants.setdefault(value, str(len(self.constants)))

    def close(self) -> None:
        metadata = {"format": FORMAT, "traces": json.dumps(self.traces, separators=(",", ":"))}
        if self.metadata is not None:
            metadata["metadata"] = self.metadata
        used = {name for trace in self.traces for name in trace["constants"]}
        with replacing(self.file) as out:
            arrays = {name: Array.of(v) for v, name in self.constants.items() if name in used}
            safetensors.save_safetensors(out, arrays, metadata)

    def __enter__(self) -> FunctionExporter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.close()


def _opaque(node: Node) -> bool:
    """Whether the node cannot be written, and its definition must."""
    try:
        _encode(tuple(node.params.values()))
        return TABLE.get(node.primitive.name) is not node.primitive
    except TypeError as error:
        if node.primitive.definition is None:
            raise ValueError(f"[export_function] {node.primitive.name} has a parameter of type {error}: numbers, texts "
                             "and dtypes can be written") from None
        return True


def export_function(file: Any, fun: Callable[..., Any], *args: Any, shapeless: bool = False,
                    metadata: str | None = None, **kwargs: Any) -> None:
    """Writes fun, traced on example arrays, to a file. fun takes arrays and returns a tree of arrays.

    shapeless: sizes above 1 of the examples are open, as far as fun takes others and computes with them as integers;
    equal ones stay equal, so choose examples with sizes that differ. ValueError where no size can be open.
    """
    with exporter(file, fun, shapeless=shapeless, metadata=metadata) as add:
        add(*args, **kwargs)


def exporter(file: Any, fun: Callable[..., Any], *, shapeless: bool = False,
             metadata: str | None = None) -> FunctionExporter:
    """`with exporter(file, fun) as add:` each call add(*args, **kwargs) writes a trace of fun on such arrays."""
    return FunctionExporter(file, fun, shapeless, metadata)


def _arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Array, ...], dict[str, Array]]:
    """f(a, b, x=x), f((a, b), {"x": x}) and f({"x": x}) are the same."""
    if not kwargs and 0 < len(args) <= 2 and all(isinstance(a, list | tuple | dict) for a in args):
        args, kwargs = (tuple(a for t in args if not isinstance(t, dict) for a in t),
                        {k: a for t in args if isinstance(t, dict) for k, a in t.items()})
    for a in (*args, *kwargs.values()):
        if not isinstance(a, Array):
            raise TypeError(f"[{name}] a {type(a).__name__} argument: arrays wanted")
    return args, kwargs


# reading

def import_function(file: Any, return_metadata: bool = False) -> Any:
    """The function that a file holds: it takes arrays as the examples were, by position and by name (or as a tuple and
    a dict), and returns a tuple of arrays. return_metadata: (function, the text written with it)."""
    name = name_of(file)
    arrays, metadata = safetensors.parse(read_bytes(file), name)
    if metadata.get("format") != FORMAT:
        damaged(name, "format", metadata.get("format"), FORMAT)
    try:
        traces = [Imported(trace, arrays) for trace in json.loads(metadata["traces"])]
        for trace in traces:
            trace.check(trace.sizes)
    except Exception as error:                             # whatever the file makes the table's rules stumble over
        damaged(name, "traces", f"{type(error).__name__}: {error}", "graphs of this version's operations")

    def function(*args: Any, **kwargs: Any) -> tuple[Array, ...]:
        args, kwargs = _arguments("import_function", args, kwargs)
        given = [*args, *(kwargs[k] for k in sorted(kwargs))]
        for trace in traces:
            if trace.keywords == sorted(kwargs) and (sizes := trace.fit(given)) is not None:
                try:
                    trace.check(sizes)
                except Exception as error:                 # a size that fits the names, but not the graph
                    raise ValueError(f"[import_function] {name} with {sizes}: {error}") from error
                return trace.run(*given)
        shown = _signature([(a.dtype, a.shape) for a in given], sorted(kwargs))
        raise ValueError(f"[import_function] {name} has no trace for {shown}; there are: {'; '.join(map(str, traces))}")

    return (function, metadata.get("metadata", "")) if return_metadata else function


def _signature(inputs: Sequence[tuple[Dtype, Sequence[Any]]], names: list[str]) -> str:
    """(float32(3, 8), y=int32(3,)), with the names of the last ones."""
    keys = [""] * (len(inputs) - len(names)) + [f"{name}=" for name in names]
    return f"({', '.join(f'{k}{dtype}{show(shape)}' for k, (dtype, shape) in zip(keys, inputs, strict=True))})"


class Imported:
    """One trace of a file. `sizes` are those of its examples that are open."""

    def __init__(self, trace: Trace, arrays: dict[str, Array]):
        self.keywords, self.nodes, self.outputs = trace["keywords"], trace["nodes"], trace["outputs"]
        self.inputs = [(dt.by_name(dtype), shape) for dtype, shape in trace["inputs"]]
        self.constants = [arrays[name] for name in trace["constants"]]
        self.sizes = {name: int(size) for name, size in trace["sizes"].items()}
        self.checked: set[tuple[int, ...]] = set()
        self.run = compile(self.apply)

    def __str__(self) -> str:
        return _signature([(d, [s if isinstance(s, int) else s["size"] for s in shape]) for d, shape in self.inputs],
                          self.keywords)

    def fit(self, given: Sequence[Array]) -> dict[str, int] | None:
        """The open sizes where the arrays are such as the trace takes."""
        sizes: dict[str, int] = {}
        if [(a.dtype, a.ndim) for a in given] != [(dtype, len(shape)) for dtype, shape in self.inputs]:
            return None
        for a, (_, shape) in zip(given, self.inputs, strict=True):
            for found, wanted in zip(a.shape, shape, strict=True):
                if found != (wanted if isinstance(wanted, int) else sizes.setdefault(wanted["size"], found)):
                    return None
        return sizes

    def apply(self, *given: Array) -> tuple[Array, ...]:
        return self._apply([a._value for a in (*given, *self.constants)], self.fit(given) or {})

    def _apply(self, values: list[Value], sizes: dict[str, int]) -> tuple[Array, ...]:
        for name, params, inputs in self.nodes:
            decoded = {key: _decode(value, sizes) for key, value in params.items()}
            values += apply(TABLE[name], *(values[i] for i in inputs), **decoded)
        return tuple(Array.of(values[i]) for i in self.outputs)

    def check(self, sizes: dict[str, int]) -> None:
        """Makes the plan for these sizes and sees that none of its steps leaves its memory."""
        if tuple(sizes.values()) not in self.checked:
            given = [placeholder(_decode(shape, sizes), dtype) for dtype, shape in self.inputs]
            inputs = given + [placeholder(a.shape, a.dtype) for a in self.constants]
            plan = lower(self._apply([a._value for a in inputs], sizes), inputs)
            plan.check()
            plan.load()
            self.checked.add(tuple(sizes.values()))

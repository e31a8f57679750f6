"""Fused ops: the body of each function is its definition in terms of other ops; `fused` makes it a row of the table
whose kernel is used where the runtime has one of that name. `definition(name)` is the body."""
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import ops
from .array import Array
from .dtypes import Dtype, float32, float64
from .node import Aval, Dim, Node, Value, apply, show
from .operands import array_of
from .primitives import row, size_of, total
from .transforms import pull_through, trace_batch

if TYPE_CHECKING:
    from .lowering import Lowering
    from .plan import View

Given = dict[str, Value]
Gradients = dict[str, Array | None]
DEFINITIONS: dict[str, Callable[..., Any]] = {}


def definition(name: str) -> Callable[..., Any]:
    """The op in terms of other ops, with the op's own signature."""
    return DEFINITIONS[name]


def fused(arrays: str, rule: Callable[..., list[Aval]], lower: Callable[..., None] | None,
          suits: Callable[..., bool] = lambda given, **params: True, kernel: str = "",
          vjp: Callable[..., Gradients] | None = None, rows: tuple[str, ...] = (),
          ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """arrays: the arguments that are arrays; rule, lower and suits (whether the kernel takes them) see those that are
    not None by name. kernel: its name if it is not the function's. vjp: (cotangents, given, results, **params) to
    gradients by name; inexact arrays that it leaves out get theirs from the definition. rows: the arrays that may have
    any number of axes in front, all the same, so that a batch is more of the same."""
    def decorate(define: Callable[..., Any]) -> Callable[..., Any]:
        name, names, signature = define.__name__, arrays.split(), inspect.signature(define)
        DEFINITIONS[name] = define

        def expand(*inputs: Array, present: tuple[str, ...], **params: Any) -> Any:
            return define(**dict.fromkeys(names) | dict(zip(present, inputs, strict=True)) | params)

        def named_rule(*values: Value, present: tuple[str, ...], **params: Any) -> list[Aval]:
            return rule(dict(zip(present, values, strict=True)), **params)

        def inputs_of(node: Node) -> Given:
            return dict(zip(node.params["present"], node.inputs, strict=True))

        def named_lower(lo: Lowering, node: Node) -> None:
            assert lower is not None
            lower(lo, node, inputs_of(node))

        def named_vjp(cts: list[Array], xs: list[Array], ys: list[Array], present: tuple[str, ...],
                      **params: Any) -> list[Any]:
            assert vjp is not None
            given = dict(zip(present, xs, strict=True))
            found = vjp(cts, given, ys, **params)
            rest = functools.cache(lambda: dict(zip(present, pull_through(
                functools.partial(expand, present=present, **params), xs, list(cts)), strict=True)))
            return [functools.partial(_plus, rest, a) if a not in found and x.dtype.inexact else
                    None if (g := found.get(a)) is None else g.astype(x.dtype) for a, x in given.items()]

        def more_rows(xs: list[Array], batched: list[bool], present: tuple[str, ...], **params: Any) -> list[Array]:
            size, free = next(x.shape[0] for x, b in zip(xs, batched, strict=True) if b), [a in rows for a in present]
            if any(b and not f for b, f in zip(batched, free, strict=True)):
                body = functools.partial(expand, present=present, **params)
                return [y if many else ops.broadcast_to(y, (size, *y.shape))
                        for y, many in trace_batch(body, xs, batched)[0]]
            xs = [ops.broadcast_to(x, (size, *x.shape)) if f and not b else x
                  for x, b, f in zip(xs, batched, free, strict=True)]
            return [Array.of(v) for v in apply(primitive, *(x._value for x in xs), present=present, **params)]

        primitive = row(name, named_rule, named_lower, definition=expand, kernel=kernel or name,
                        suits=lambda node: suits(inputs_of(node), **node.params),
                        vjp=named_vjp if vjp else None, vmap=more_rows if rows else None)

        @functools.wraps(define)
        def op(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            params = bound.arguments
            given = {a: array_of(params[a])._value for a in names if params[a] is not None}
            params = {k: v for k, v in params.items() if k not in names}
            results = [Array.of(v) for v in apply(primitive, *given.values(), present=tuple(given), **params)]
            return results[0] if len(results) == 1 else tuple(results)

        return op

    return decorate


def _plus(gradients: Callable[[], Gradients], name: str, before: Array | None) -> Array | None:
    """A gradient that is made only if it is asked for, and those so far."""
    return total([before, gradients()[name]])


def match(name: str, given: Given, **patterns: str) -> dict[str, int]:
    """Unifies named sizes: match("rms_norm", given, x="... C", weight="C") -> {"C": 64}."""
    sizes: dict[str, int] = {}
    for argument, pattern in patterns.items():
        if argument not in given:
            continue
        letters, shape = pattern.split(), given[argument].shape
        if letters[0] == "...":
            letters, shape = letters[1:], shape[len(shape) - len(letters) + 1:]
        if len(letters) != len(shape):
            raise ValueError(f"[{name}] {argument} {show(given[argument].shape)}: axes {pattern} wanted")
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"[{name}] {argument} {show(shape)}: axis {letter} is {size}, "
                                 f"{sizes[letter]} wanted by the arrays before it")
    return sizes


def require(name: str, given: Given, wanted: Dtype, *arguments: str) -> None:
    for a in arguments:
        if a in given and given[a].dtype is not wanted:
            raise ValueError(f"[{name}] {a} {given[a].dtype}{show(given[a].shape)}: {wanted} wanted")


def inexact(name: str, given: Given, *arguments: str) -> None:
    for a in arguments:
        if a in given and given[a].dtype.kind != "f":
            raise ValueError(f"[{name}] {a} {given[a].dtype}{show(given[a].shape)}: floats wanted")


def simple(kernel: str, floats: str = "", ints: str = "") -> Callable[..., None]:
    """A lowering that hands over all inputs row-major; parameters by name."""
    def lower(lo: Lowering, node: Node, given: Given) -> None:
        inputs = [lo.contiguous(v) for v in given.values()]
        p = node.params
        lo.step(kernel, [lo.result(v) for v in node.values()], inputs, [int(p[i]) for i in ints.split()],
                [p[f] for f in floats.split()])

    return lower


def wide_dtype(x: Array | Value) -> Dtype:
    """What sums of x are taken in: float32, or float64."""
    return x.dtype if x.dtype is float64 else float32


def wide(x: Array) -> Array:
    return x.astype(wide_dtype(x))


def by_rows(view: View) -> View:
    """(…, C) as (R, C)"""
    return view if len(view.shape) == 2 else view.reshaped(size_of(view.shape[:-1]), view.shape[-1])


def kernel_rows(given: Given, **_: Any) -> bool:
    """Whether a kernel of rows takes the arrays: not float64, not empty; a symbolic axis is the only one in front."""
    return all(v.dtype is not float64 and 0 not in v.shape and (
        len(v.shape) == 2 or not any(isinstance(s, Dim) for s in v.shape[:-1])) for v in given.values())

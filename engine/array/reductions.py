"""Reductions: sums, extremes, positions and statistics over axes."""
from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from typing import Any

from . import ops
from .array import Array
from .dtypes import bool_, float32, int32
from .node import Dim, Shape, apply, show
from .operands import Axes, array_of, axes_of, axis_of
from .primitives import TABLE

__all__ = [
    "all", "any", "argmax", "argmin", "count_nonzero", "diff", "logsumexp", "max", "mean", "min",
    "prod", "std", "sum", "var",
]


def _reduction(name: str) -> Callable[..., Array]:
    def op(a: Any, axis: Axes = None, keepdims: bool = False) -> Array:
        a = array_of(a)
        axes = axes_of(name, axis, a.ndim)
        if not axes:
            return ops.astype(a, TABLE[name].rule(a._value, axes=axes)[0][1])
        if a.dtype.kind == "c":
            raise ValueError(f"[{name}] {a.dtype}{show(a.shape)}: real numbers wanted")
        if name in ("max", "min", "argmax", "argmin") and builtins.any(a.shape[i] == 0 for i in axes):
            raise ValueError(f"[{name}] {show(a.shape)} has no elements along axes {show(axes)}")
        if len(axes) < a.ndim and isinstance(a.shape[axes[0]], Dim):
            raise ValueError(f"[{name}] axis {axes[0]} of {show(a.shape)} is symbolic and must lead")
        out = Array.of(apply(TABLE[name], a._value, axes=axes)[0])
        return ops.reshape(out, tuple(1 if i in axes else s for i, s in enumerate(a.shape))) if keepdims else out

    op.__name__ = op.__qualname__ = name
    op.__doc__ = f"The {name} over the given axes, or over all."
    return op


_sum, _prod, max, min, _any, _all = (_reduction(n) for n in ("sum", "prod", "max", "min", "any", "all"))


def sum(a: Any, axis: Axes = None, keepdims: bool = False) -> Array:
    """The sum over the given axes, or over all."""
    a = array_of(a)
    if a.dtype.kind != "c":
        return _sum(a, axis, keepdims)
    return _sum(ops.real(a), axis, keepdims) + 1j * _sum(ops.imag(a), axis, keepdims)


def prod(a: Any, axis: Axes = None, keepdims: bool = False) -> Array:
    """The product over the given axes, or over all."""
    a = array_of(a)
    if a.dtype.kind != "c":
        return _prod(a, axis, keepdims)
    return _complex_prod(a, axes_of("prod", axis, a.ndim), keepdims)


def _complex_prod(a: Array, axes: Shape, keepdims: bool) -> Array:
    """Half the elements times the other half, until one is left."""
    out = ops.transpose(a, [*(i for i in range(a.ndim) if i not in axes), *axes])
    out = ops.reshape(out, (*out.shape[:a.ndim - len(axes)], math.prod(a.shape[i] for i in axes)))
    while (n := out.shape[-1]) != 1:
        out = ops.pad(out, [(0, 0)] * (out.ndim - 1) + [(0, n % 2 if n else 1)], constant_values=1)
        out = out[..., ::2] * out[..., 1::2] if n else out
    kept = tuple(1 if i in axes else s for i, s in enumerate(a.shape) if keepdims or i not in axes)
    return ops.reshape(out, kept)


def any(a: Any, axis: Axes = None, keepdims: bool = False) -> Array:
    """Whether some element over the given axes, or over all, is not zero."""
    a = array_of(a)
    return _any(a != 0 if a.dtype.kind == "c" else a, axis, keepdims)


def all(a: Any, axis: Axes = None, keepdims: bool = False) -> Array:
    """Whether no element over the given axes, or over all, is zero."""
    a = array_of(a)
    return _all(a != 0 if a.dtype.kind == "c" else a, axis, keepdims)


def count_nonzero(a: Any, *, axis: Axes = None, keepdims: bool = False) -> Array:
    """How many elements are not zero, int32."""
    return sum(ops.astype(array_of(a) != 0, int32), axis, keepdims)


_arg = {name: _reduction(name) for name in ("argmax", "argmin")}


def _position(name: str, a: Array, axis: int | None, keepdims: bool) -> Array:
    if axis is not None:
        return _arg[name](a, axis, keepdims)
    out = _arg[name](ops.flatten(a), 0)
    return ops.reshape(out, (1,) * a.ndim) if keepdims else out


def argmax(a: Any, axis: int | None = None, keepdims: bool = False) -> Array:
    """The first position of the largest element, uint32; over the flattened array without an axis."""
    return _position("argmax", array_of(a), axis, keepdims)


def argmin(a: Any, axis: int | None = None, keepdims: bool = False) -> Array:
    """The first position of the smallest element, uint32; over the flattened array without an axis."""
    return _position("argmin", array_of(a), axis, keepdims)


def _count(name: str, a: Array, axis: Axes) -> int:
    sizes = [a.shape[i] for i in axes_of(name, axis, a.ndim)]
    if builtins.any(isinstance(s, Dim) for s in sizes):
        raise ValueError(f"[{name}] {show(a.shape)}: the number of elements is symbolic")
    return math.prod(sizes)


def mean(a: Any, axis: Axes = None, keepdims: bool = False) -> Array:
    a = array_of(a)
    total = sum(a if a.dtype.inexact else ops.astype(a, float32), axis, keepdims)
    return total / _count("mean", a, axis)


def var(a: Any, axis: Axes = None, keepdims: bool = False, ddof: int = 0) -> Array:
    a = array_of(a)
    spread_ = sum(ops.square(a - mean(a, axis, keepdims=True)), axis, keepdims)
    return spread_ / (_count("var", a, axis) - ddof)


def std(a: Any, axis: Axes = None, keepdims: bool = False, ddof: int = 0) -> Array:
    return ops.sqrt(var(a, axis, keepdims, ddof))


def logsumexp(a: Any, axis: Axes = None, keepdims: bool = False) -> Array:
    a = array_of(a)
    a = a if a.dtype.inexact else ops.astype(a, float32)
    top = max(a, axis, keepdims=True)
    top = ops.where(ops.isinf(top), 0.0, top)
    out = ops.log(sum(ops.exp(a - top), axis, keepdims=True)) + top
    return out if keepdims else ops.reshape(out, sum(a, axis).shape)




def diff(a: Any, n: int = 1, axis: int = -1) -> Array:
    """The n-th differences of neighbours along an axis; of booleans, whether they differ."""
    a = array_of(a)
    axis = axis_of("diff", axis, a.ndim)
    lead = (slice(None),) * axis
    for _ in range(n):
        after, before = a[(*lead, slice(1, None))], a[(*lead, slice(None, -1))]
        a = after != before if a.dtype is bool_ else after - before
    return a

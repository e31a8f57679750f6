"""Sorting and selecting along an axis. Gradients follow the elements: sort(x) is x taken at argsort(x)."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import ops
from .array import Array
from .dtypes import bool_, complex64, float32, int32, uint32
from .node import Aval, Node, Value, apply, show
from .operands import Axes, array_of, axes_of, axis_of
from .primitives import TABLE, row
from .scans import cumsum
from .scatter import scatter_rows, take_along_axis

if TYPE_CHECKING:
    from .lowering import Lowering

__all__ = ["argpartition", "argsort", "median", "minmax", "partition", "searchsorted", "sort", "topk", "unique"]


def _lower(lo: Lowering, node: Node) -> None:
    """kth -1: all. The kernel sorts the last axis."""
    axis, [x], [value] = node.params["axis"], node.inputs, node.values()
    order = [i for i in range(len(x.shape)) if i != axis] + [axis]
    source, target = lo.view(x), lo.result(value)
    views = [v.moved(tuple(v.shape[i] for i in order), tuple(v.strides[i] for i in order)) for v in (target, source)]
    lo.step(node.primitive.kernel, views[:1], views[1:], [node.params["kth"]])


def _sort_rule(x: Value, axis: int, kth: int) -> list[Aval]:
    return [(x.shape, x.dtype)]


def _argsort_rule(x: Value, axis: int, kth: int) -> list[Aval]:
    return [(x.shape, uint32)]


def _apply(name: str, x: Array, axis: int, kth: int) -> Array:
    return Array.of(apply(TABLE[name], x._value, axis=axis, kth=kth)[0])


def _vjp(cts: list[Array], xs: list[Array], ys: list[Array], axis: int, kth: int) -> list[Array | None]:
    back = _apply("argsort", _apply("argsort", xs[0], axis, kth), axis, -1)
    return [take_along_axis(cts[0], back, axis)]


def _jvp(ts: list[Array | None], xs: list[Array], ys: list[Array], axis: int, kth: int) -> list[Array | None]:
    return [None if ts[0] is None else take_along_axis(ts[0], _apply("argsort", xs[0], axis, kth), axis)]


row("sort", _sort_rule, _lower, kernel="sort", vjp=_vjp, jvp=_jvp,
    vmap=lambda xs, batched, axis, kth: [_apply("sort", xs[0], axis + 1, kth)])
row("argsort", _argsort_rule, _lower, kernel="argsort",
    vmap=lambda xs, batched, axis, kth: [_apply("argsort", xs[0], axis + 1, kth)])


def _along(name: str, a: Any, axis: int | None, kernel: str, kth: int | None = None) -> Array:
    a = array_of(a)
    if axis is None:
        a, axis = ops.flatten(a), 0
    axis = axis_of(name, axis, a.ndim)
    if a.dtype is complex64:
        raise ValueError(f"[{name}] complex64{show(a.shape)}: complex numbers have no order")
    size = a.shape[axis]
    if kth is not None and not -size <= kth < size:
        raise ValueError(f"[{name}] kth {kth} is out of range for axis {axis} of {show(a.shape)}")
    return _apply(kernel, a, axis, -1 if kth is None else kth % size)


def sort(a: Any, axis: int | None = -1) -> Array:
    """In ascending order along an axis, or of the flattened array; NaN last."""
    return _along("sort", a, axis, "sort")


def argsort(a: Any, axis: int | None = -1) -> Array:
    """The positions that sort an axis, uint32; equal elements stay in order."""
    return _along("argsort", a, axis, "argsort")


def partition(a: Any, kth: int, axis: int | None = -1) -> Array:
    """Reordered so that element kth is where sort would put it, with nothing greater before it, nothing less after."""
    return _along("partition", a, axis, "sort", kth)


def argpartition(a: Any, kth: int, axis: int | None = -1) -> Array:
    """The positions of `partition`, uint32."""
    return _along("argpartition", a, axis, "argsort", kth)


def topk(a: Any, k: int, axis: int | None = -1) -> Array:
    """The k largest elements along an axis, or of the flattened array, in no particular order."""
    a = array_of(a) if axis is not None else ops.flatten(array_of(a))
    axis = axis_of("topk", -1 if axis is None else axis, a.ndim)
    size = a.shape[axis]
    if not 0 <= k <= size:
        raise ValueError(f"[topk] k {k}: axis {axis} of {show(a.shape)} has {size} elements")
    parts = partition(a, size - k, axis) if 0 < k < size else a
    return parts[(slice(None),) * axis + (slice(size - k, size),)]


def median(a: Any, axis: Axes = None, keepdims: bool = False) -> Array:
    """The middle of the sorted elements over the given axes, or the mean of the middle two; integers give float32."""
    a = array_of(a)
    axes = axes_of("median", axis, a.ndim)
    rest = [i for i in range(a.ndim) if i not in axes]
    moved = ops.transpose(a, rest + list(axes))
    rows = ops.reshape(moved, (*moved.shape[:len(rest)], -1))
    size = rows.shape[-1]
    if not size:
        raise ValueError(f"[median] {show(a.shape)} has no elements along axes {show(axes)}")
    middle = partition(rows, size // 2) if size % 2 else sort(rows)
    pair = middle[..., (size - 1) // 2:size // 2 + 1]
    out = ops.mean(pair if a.dtype.inexact else ops.astype(pair, float32), -1)
    if a.dtype.inexact:
        out = ops.where(ops.any(ops.isnan(rows), -1), float("nan"), out).astype(a.dtype)
    return ops.expand_dims(out, axes) if keepdims else out


def minmax(a: Any, axis: Axes = None, keepdims: bool = False) -> tuple[Array, Array]:
    """The least and the greatest over the given axes."""
    return ops.min(a, axis, keepdims), ops.max(a, axis, keepdims)


def searchsorted(sorted_sequence: Any, values: Any, side: str = "left") -> Array:
    """How many of the sorted sequence (N) are less than each value (side right: or equal to it), uint32."""
    table, values = array_of(sorted_sequence), array_of(values)
    if side not in ("left", "right") or table.ndim != 1:
        raise ValueError(f"[searchsorted] sequence {show(table.shape)}, side {side!r}: one axis, left or right wanted")
    found = ops.zeros(values.shape, int32)
    if not table.size:
        return ops.astype(found, uint32)
    for step in (1 << bit for bit in reversed(range(int(table.size).bit_length()))):
        ahead = found + step
        probe = ops.take(table, ops.minimum(ahead, table.size) - 1)
        before = ops.less(probe, values) if side == "left" else ops.less_equal(probe, values)
        if values.dtype.inexact:                           # NaN comes after all
            nan = ops.isnan(values)
            before = before | (nan if side == "right" else nan & ops.logical_not(ops.isnan(probe)))
        found = ops.where((ahead <= table.size) & before, ahead, found)
    return ops.astype(found, uint32)


def unique(a: Any, size: int, return_index: bool = False, return_inverse: bool = False, return_counts: bool = False,
           fill_value: Any = None) -> Array | tuple[Array, ...]:
    """The `size` smallest distinct elements, sorted; then, as asked for, the first position of each, the number of each
    element's value, in a's shape, and the counts. Missing ones are fill_value, or else the least, and counted 0."""
    a = array_of(a)
    items = ops.flatten(a)
    if not items.size:
        raise ValueError(f"[unique] {show(a.shape)} has no elements")
    order = argsort(items)
    ordered = ops.take(items, order)
    differs = ops.concatenate([ops.zeros((1,), bool_), ordered[1:] != ordered[:-1]])
    number = cumsum(ops.astype(differs, int32))            # of each sorted element's value
    places = ops.arange(size)
    first = searchsorted(number, places).astype(int32)
    last = searchsorted(number, places, "right").astype(int32)
    inside = ops.where(first < items.size, first, 0)
    values = ops.take(ordered, inside)
    if fill_value is not None:
        values = ops.where(first < items.size, values, ops.astype(array_of(fill_value), a.dtype))
    inverse = scatter_rows(ops.zeros(items.shape, uint32), order, ops.minimum(number, max(size - 1, 0)), 0, "set")
    found = [(return_index, ops.take(order, inside)),
             (return_inverse, ops.reshape(inverse, a.shape)), (return_counts, last - first)]
    extra = [array for wanted, array in found if wanted]
    return (values, *extra) if extra else values

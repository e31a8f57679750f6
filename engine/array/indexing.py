"""a[index] and a[index] = update by NumPy's rules: slices are views, integer arrays gather, masks are refused."""
from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import ops
from .array import Array
from .dtypes import bool_, int32, int64
from .node import Dim, Shape, show
from .operands import array_of


def get(a: Array, index: Any) -> Array:
    view, arrays = _window(a, index)
    return _gather(view, arrays) if arrays else view


def put(a: Array, index: Any, update: Any) -> Array:
    """The array after `a[index] = update`."""
    start, step, shape, final, arrays = _parse(a, index)
    update = array_of(update) if not isinstance(update, bool | int | float) else ops.full((), update, a.dtype)
    if arrays:
        return scatter.update(a, index, update, "set")
    update = ops.broadcast_to(ops.reshape(update, update.shape[_leading_ones(update.shape, len(final)):]), final)
    if shape == a.shape and all(s == 1 for s in step):
        return ops.astype(ops.reshape(update, shape), a.dtype)
    return ops.slice_update(a, ops.reshape(update, shape), start, step)


def _leading_ones(shape: Shape, ndim: int) -> int:
    """How many axes of size 1 an update may lose in front to fit `ndim` axes, as NumPy allows."""
    extra = max(0, len(shape) - ndim)
    return extra if all(s == 1 for s in shape[:extra]) else 0


def _window(a: Array, index: Any) -> tuple[Array, dict[int, Array]]:
    """The part that slices, integers and None select, and the integer arrays with the axis each of them indexes."""
    start, step, shape, final, arrays = _parse(a, index)
    stop = tuple(b + n * s for b, n, s in zip(start, shape, step, strict=True))
    return ops.reshape(ops.windowed(a, start, stop, step), final), arrays


def _parse(a: Array, index: Any) -> tuple[Shape, Shape, Shape, Shape, dict[int, Array]]:
    """start, step, shape of the window on each axis of a; the shape after integers drop and None adds axes; arrays."""
    items = list(index) if isinstance(index, tuple) else [index]
    items = [_integers(i) if isinstance(i, list | np.ndarray | Array) else i for i in items]
    gathers = any(isinstance(i, Array) for i in items)
    used = sum(i is not None and i is not Ellipsis for i in items)
    if used > a.ndim:
        raise IndexError(f"[getitem] {used} indices for an array of shape {show(a.shape)}")
    if not any(i is Ellipsis for i in items):
        items.append(Ellipsis)
    at = next(k for k, i in enumerate(items) if i is Ellipsis)
    items[at:at + 1] = [slice(None)] * (a.ndim - used)
    start: list[int] = []
    step: list[int] = []
    shape: list[int] = []
    final: list[int] = []
    arrays: dict[int, Array] = {}
    for item in items:
        if item is None:
            final.append(1)
            continue
        size = a.shape[len(start)]
        if isinstance(item, slice):
            first, count, stride = _slice(item, size)
            final.append(count)
        elif isinstance(item, Array) or gathers:
            first, count, stride = 0, size, 1
            arrays[len(final)] = item if isinstance(item, Array) else Array(_integer(item, size, len(start)), int32)
            final.append(size)
        else:
            first, count, stride = _integer(item, size, len(start)), 1, 1
        start.append(first)
        step.append(stride)
        shape.append(count)
    return tuple(start), tuple(step), tuple(shape), tuple(final), arrays


def _integers(index: Any) -> Array:
    array = array_of(index)
    if array.dtype is bool_:
        raise ValueError("[getitem] boolean mask: the result's shape would depend on values; use mx.where")
    if array.dtype.kind not in "iu" and array.size:
        raise IndexError(f"[getitem] index {array.dtype}{show(array.shape)}: integers wanted")
    return array if array.dtype.kind in "iu" else ops.astype(array, int32)


def _integer(item: Any, size: int, axis: int) -> int:
    if isinstance(item, bool | np.bool_) or not hasattr(item, "__index__"):
        raise IndexError(f"[getitem] axis {axis}: index {item!r} is no integer, slice, None, … or array of integers")
    i = item.__index__()
    if isinstance(size, Dim) or not -size <= i < size:
        raise IndexError(f"[getitem] index {i} is out of range for axis {axis} of size {size}")
    return i % size


def _slice(item: slice, size: int) -> tuple[int, int, int]:
    bounds = [b.__index__() if b is not None else None for b in (item.start, item.stop, item.step)]
    first, stop, stride = slice(*bounds).indices(int(size))
    count = len(range(first, stop, stride))
    if isinstance(size, Dim):
        if (first, count, stride) != (0, int(size), 1):
            raise ValueError(f"[slice] axis '{size}' is symbolic and can only be taken whole")
        return 0, size, 1
    return first, count, stride


def _flat_index(a: Array, arrays: dict[int, Array]) -> tuple[Array, int]:
    """One index into the indexed axes taken together, and their size. Negative positions count from the end."""
    sizes = [a.shape[axis] for axis in arrays]
    total = math.prod(sizes)
    if len(sizes) == 1:
        return next(iter(arrays.values())), sizes[0]
    dtype = int32 if total < 1 << 31 else int64
    flat = ops.zeros((), dtype)
    for size, index in zip(sizes, arrays.values(), strict=True):
        wide = ops.astype(index, dtype)
        flat = flat * int(size) + ops.where(wide < 0, wide + int(size), wide)
    return flat, total


def _gather(a: Array, arrays: dict[int, Array]) -> Array:
    axes = list(arrays)
    index, total = _flat_index(a, arrays)
    if len(axes) == 1:
        return ops.take(a, index, axes[0])
    rest = [i for i in range(a.ndim) if i not in axes]
    front = ops.transpose(a, axes + rest)
    out = ops.take(ops.reshape(front, (total, *(a.shape[i] for i in rest))), index, 0)
    if axes != list(range(axes[0], axes[-1] + 1)):
        return out                                         # separated indices: their axes come first, as in NumPy
    order = list(range(index.ndim, index.ndim + axes[0])) + list(range(index.ndim))
    return ops.transpose(out, order + list(range(index.ndim + axes[0], out.ndim)))


def write_rows(a: Array, rows: Array, updates: Array) -> Array:
    """a (N, …) with updates[i] (I, …) written to row rows[i] (I); the last one wins, rows outside a are not written."""
    inside = ops.logical_and(rows >= 0, rows < a.shape[0])
    padded = ops.concatenate([a, ops.zeros((1, *a.shape[1:]), a.dtype)])
    return scatter.scatter_rows(padded, ops.where(inside, rows, a.shape[0]), updates, 0, "set")[:-1]


from . import scatter  # noqa: E402  (needs this module)

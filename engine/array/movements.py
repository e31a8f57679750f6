"""Elements in other places: shapes, axes, parts, joins, gathers. Most are views that cost nothing."""
from __future__ import annotations

import builtins
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import ops
from .array import Array
from .dtypes import Dtype, int32, int64, promote, uint32
from .node import Dim, Shape, apply, contiguous_strides, is_contiguous, show
from .operands import Axes, alias, array_of, axes_of, axis_of, broadcast_shapes, cast, shape_of, spread
from .primitives import TABLE, linear, movement, slice_shape

__all__ = [
    "as_strided", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_arrays", "broadcast_to", "concat",
    "concatenate", "contiguous", "diagonal", "expand_dims", "flatten", "flip", "matrix_transpose", "moveaxis",
    "pad", "permute_dims", "repeat", "reshape", "roll", "split", "squeeze", "stack", "swapaxes", "take", "tile",
    "transpose", "unflatten", "unstack", "view",
]
RESHAPE, TRANSPOSE, SLICE = TABLE["reshape"], TABLE["transpose"], TABLE["slice"]


def reshape(a: Array, shape: int | Sequence[int]) -> Array:
    """The same elements, row-major, under another shape; one size may be -1. A symbolic axis must stay whole."""
    a = array_of(a)
    new = _fill_in(a.shape, shape_of(shape))
    return alias(a) if new == a.shape else Array.of(apply(RESHAPE, a._value, shape=new)[0])


def _fill_in(old: Shape, new: Shape) -> Shape:
    dims = [s for s in old if isinstance(s, Dim)]
    known = math.prod(s for s in new if not isinstance(s, Dim) and s != -1)
    rest = math.prod(s for s in old if not isinstance(s, Dim))
    unknown: int = -1
    if new.count(-1) == 1:
        whole = dims and dims[0] not in new
        if not whole and known and rest % known == 0:
            unknown = rest // known
        elif whole and known == rest:
            unknown = dims[0]
    result = tuple(unknown if s == -1 else s for s in new)
    fits = math.prod(s for s in result if not isinstance(s, Dim)) == rest and -1 not in result
    if not fits or [s for s in result if isinstance(s, Dim)] != dims:
        symbolic = f": '{dims[0]}' is symbolic and must stay whole" if dims else ""
        raise ValueError(f"[reshape] {show(old)} does not fit {show(new)}{symbolic}")
    return result


def flatten(a: Array, start_axis: int = 0, end_axis: int = -1) -> Array:
    a = array_of(a)
    if not a.shape:
        return reshape(a, (1,))
    first, last = axis_of("flatten", start_axis, a.ndim), axis_of("flatten", end_axis, a.ndim)
    return reshape(a, (*a.shape[:first], -1, *a.shape[last + 1:]))


def unflatten(a: Array, axis: int, shape: Sequence[int]) -> Array:
    axis = axis_of("unflatten", axis, a.ndim)
    return reshape(a, (*a.shape[:axis], *shape, *a.shape[axis + 1:]))


def expand_dims(a: Array, axis: int | Sequence[int]) -> Array:
    count = a.ndim + (1 if isinstance(axis, int) else len(axis))
    axes, sizes = axes_of("expand_dims", axis, count), iter(a.shape)
    return reshape(a, tuple(1 if i in axes else next(sizes) for i in range(count)))


def squeeze(a: Array, axis: Axes = None) -> Array:
    axes = [i for i, s in enumerate(a.shape) if s == 1] if axis is None else axes_of("squeeze", axis, a.ndim)
    for i in axes:
        if a.shape[i] != 1:
            raise ValueError(f"[squeeze] axis {i} of {show(a.shape)} has size {a.shape[i]}, 1 wanted")
    return reshape(a, tuple(s for i, s in enumerate(a.shape) if i not in axes))


def transpose(a: Array, axes: Sequence[int] | None = None) -> Array:
    order = tuple(range(a.ndim))[::-1] if axes is None else tuple(axis_of("transpose", x, a.ndim) for x in axes)
    if sorted(order) != list(range(a.ndim)):
        raise ValueError(f"[transpose] axes {show(order)} are no permutation of {a.ndim} axes")
    return alias(a) if order == tuple(range(a.ndim)) else Array.of(apply(TRANSPOSE, a._value, axes=order)[0])


permute_dims = transpose


def swapaxes(a: Array, axis1: int, axis2: int) -> Array:
    order = list(range(a.ndim))
    i, j = axis_of("swapaxes", axis1, a.ndim), axis_of("swapaxes", axis2, a.ndim)
    order[i], order[j] = j, i
    return transpose(a, order)


def matrix_transpose(a: Array) -> Array:
    """The last two axes swapped."""
    if a.ndim < 2:
        raise ValueError(f"[matrix_transpose] {show(a.shape)}: at least two axes wanted")
    return swapaxes(a, -1, -2)


def moveaxis(a: Array, source: int, destination: int) -> Array:
    order = list(range(a.ndim))
    order.insert(axis_of("moveaxis", destination, a.ndim), order.pop(axis_of("moveaxis", source, a.ndim)))
    return transpose(a, order)


def broadcast_to(a: Any, shape: int | Sequence[int]) -> Array:
    a, shape = array_of(a), shape_of(shape)
    if broadcast_shapes(a.shape, shape, name="broadcast_to") != shape:
        raise ValueError(f"[broadcast_to] {show(a.shape)} does not broadcast to {show(shape)}")
    return Array.of(spread(a._value, shape))


def broadcast_arrays(*arrays: Any) -> list[Array]:
    listed = len(arrays) == 1 and isinstance(arrays[0], list | tuple)
    arrays = tuple(array_of(a) for a in (arrays[0] if listed else arrays))
    shape = broadcast_shapes(*(a.shape for a in arrays))
    return [broadcast_to(a, shape) for a in arrays]


def view(a: Any, dtype: Dtype) -> Array:
    """The same bytes read as another dtype; of materialized arrays without a copy."""
    a = array_of(a)
    return alias(a) if a.dtype is dtype else Array.of(apply(TABLE["view"], a._value, dtype=dtype)[0])


def contiguous(a: Array, allow_col_major: bool = False) -> Array:
    """The elements without gaps in memory. allow_col_major: accepted as in MLX; the order is row-major."""
    return Array.of(apply(TABLE["contiguous"], a._value)[0])


def windowed(a: Array, start: Shape, stop: Shape, step: Shape) -> Array:
    """a[start:stop:step] on every axis, all bounds in range. A symbolic axis can only be taken whole."""
    shape = list(slice_shape(start, stop, step))
    for i, size in enumerate(a.shape):
        if isinstance(size, Dim):
            if (start[i], stop[i], step[i]) != (0, int(size), 1):
                raise ValueError(f"[slice] axis {i} of {show(a.shape)} is symbolic and can only be taken whole")
            shape[i] = size
    if tuple(shape) == a.shape and builtins.all(s == 1 for s in step):
        return alias(a)
    return Array.of(apply(SLICE, a._value, shape=tuple(shape), start=start, step=step)[0])


def split(a: Array, indices_or_sections: int | Sequence[int], axis: int = 0) -> list[Array]:
    """Into equal parts, or at the given positions."""
    parts = indices_or_sections
    axis = axis_of("split", axis, a.ndim)
    size = a.shape[axis]
    if isinstance(parts, int):
        if size % parts:
            raise ValueError(f"[split] axis {axis} of {show(a.shape)} does not divide by {parts}")
        parts = [size // parts * i for i in range(1, parts)]
    bounds = [0, *parts, int(size)]
    return [a[(slice(None),) * axis + (slice(i, j),)] for i, j in zip(bounds, bounds[1:], strict=False)]


def unstack(x: Array, *, axis: int = 0) -> tuple[Array, ...]:
    """The parts along an axis, without it."""
    axis = axis_of("unstack", axis, x.ndim)
    return tuple(x[(slice(None),) * axis + (i,)] for i in range(x.shape[axis]))


def roll(a: Any, shift: int | Sequence[int], axis: Axes = None) -> Array:
    """Elements moved along the axes, those beyond the end coming in at the front; without axes, in the flat array."""
    a = array_of(a)
    if axis is None:
        return reshape(roll(flatten(a), shift if isinstance(shift, int) else builtins.sum(shift), 0), a.shape)
    axes = [axis] if isinstance(axis, int) else list(axis)
    shifts = [shift] * len(axes) if isinstance(shift, int) else list(shift)
    if len(shifts) != len(axes):
        raise ValueError(f"[roll] {len(shifts)} shifts for {len(axes)} axes")
    for by, i in zip(shifts, axes, strict=True):
        i = axis_of("roll", i, a.ndim)
        cut = -by % a.shape[i] if a.shape[i] else 0
        a = concatenate(split(a, [cut], i)[::-1], i) if cut else a
    return a


def diagonal(a: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Array:
    """A diagonal of each matrix of the two axes, as the last axis."""
    a = array_of(a)
    pair = axis_of("diagonal", axis1, a.ndim), axis_of("diagonal", axis2, a.ndim)
    a = transpose(a, [*(i for i in range(a.ndim) if i not in pair), *pair])
    *batch, rows, columns = a.shape
    first = offset if offset >= 0 else -offset * columns
    count = builtins.max(0, builtins.min(rows + builtins.min(offset, 0), columns - builtins.max(offset, 0)))
    flat = reshape(a, (*batch, rows * columns))
    return flat[..., first:first + count * (columns + 1):columns + 1] if count else flat[..., :0]


def as_strided(a: Any, shape: Sequence[int] | None = None, strides: Sequence[int] | None = None,
               offset: int = 0) -> Array:
    """A window on the elements in row-major order: [i, j, …] is number offset + i strides[0] + j strides[1] + …"""
    a = array_of(a)
    shape = a.shape if shape is None else tuple(shape)
    strides = contiguous_strides(shape) if strides is None else tuple(strides)
    steps = [(s - 1) * t for s, t in zip(shape, strides, strict=True)]
    low, high = (offset + builtins.sum(t for t in steps if (t > 0) == up) for up in (False, True))
    if 0 not in shape and not 0 <= low <= high < a.size:
        raise ValueError(f"[as_strided] elements {low} to {high} of {show(a.shape)}: 0 to {a.size - 1} wanted")
    return Array.of(apply(AS_STRIDED, a._value, shape=shape, strides=strides, offset=offset)[0])


def _strided_view(shape: Shape, strides: Shape, out: Shape, params: dict[str, Any]) -> tuple[int, Shape] | None:
    return (params["offset"], params["strides"]) if is_contiguous(shape, strides) else None


def _unstrided(ct: Array, x: Array, shape: Shape, strides: Shape, offset: int) -> Array:
    places = as_strided(ops.reshape(ops.arange(x.size), x.shape), shape, strides, offset)
    return reshape(ops.zeros((x.size,), ct.dtype).at[flatten(places)].add(flatten(ct)), x.shape)


AS_STRIDED = movement(
    "as_strided", lambda x, shape, **_: [(shape, x.dtype)], _strided_view, **linear("as_strided", _unstrided),
    vmap=lambda xs, batched, shape, strides, offset: [as_strided(
        xs[0], (xs[0].shape[0], *shape), (xs[0].size // xs[0].shape[0], *strides), offset)])


def _at_least(arys: tuple[Any, ...], widen: Callable[[Array], Array]) -> Any:
    widened = [widen(array_of(a)) for a in arys]
    return widened[0] if len(widened) == 1 else widened


def atleast_1d(*arys: Any) -> Any:
    """Scalars become (1,)."""
    return _at_least(arys, lambda a: a if a.ndim else reshape(a, (1,)))


def atleast_2d(*arys: Any) -> Any:
    """Scalars become (1, 1), vectors (1, N)."""
    return _at_least(arys, lambda a: a if a.ndim > 1 else reshape(a, (1, -1)))


def atleast_3d(*arys: Any) -> Any:
    """Scalars become (1, 1, 1), vectors (1, N, 1), matrices (M, N, 1)."""
    return _at_least(arys, lambda a: a if a.ndim > 2 else reshape(a, (1, -1, 1) if a.ndim < 2 else (*a.shape, 1)))


def flip(a: Array, axis: Axes = None) -> Array:
    axes = axes_of("flip", axis, a.ndim)
    return a[tuple(slice(None, None, -1) if i in axes else slice(None) for i in range(a.ndim))]


def tile(a: Array, reps: int | Sequence[int]) -> Array:
    a = array_of(a)
    counts = shape_of(reps)
    shape = (1,) * (len(counts) - a.ndim) + a.shape
    counts = (1,) * (len(shape) - len(counts)) + counts
    pairs = tuple(x for c, s in zip(counts, shape, strict=True) for x in (c, s))
    spaced = reshape(a, tuple(x for s in shape for x in (1, s)))
    return reshape(broadcast_to(spaced, pairs), tuple(c * s for c, s in zip(counts, shape, strict=True)))


def repeat(array: Array, repeats: int, axis: int | None = None) -> Array:
    a = array_of(array)
    if axis is None:
        a, axis = flatten(a), 0
    axis = axis_of("repeat", axis, a.ndim)
    spaced = expand_dims(a, axis + 1)
    wide = broadcast_to(spaced, (*a.shape[:axis + 1], repeats, *a.shape[axis + 1:]))
    return reshape(wide, (*a.shape[:axis], a.shape[axis] * repeats, *a.shape[axis + 1:]))


# joining and writing

def concatenate(arrays: Sequence[Array], axis: int | None = 0) -> Array:
    if not arrays:
        raise ValueError("[concatenate] no arrays given")
    arrays = [array_of(a) if axis is not None else flatten(a) for a in arrays]
    axis = axis_of("concatenate", axis or 0, arrays[0].ndim)
    dtype = functools.reduce(promote, (a.dtype for a in arrays))
    for a in arrays[1:]:
        if a.ndim != arrays[0].ndim or builtins.any(
                s != t for i, (s, t) in enumerate(zip(a.shape, arrays[0].shape, strict=True)) if i != axis):
            raise ValueError(f"[concatenate] {show(arrays[0].shape)} and {show(a.shape)} differ outside axis {axis}")
    if len(arrays) == 1:
        return alias(arrays[0])
    if builtins.any(isinstance(a.shape[axis], Dim) for a in arrays):
        raise ValueError(f"[concatenate] axis {axis} of {show(arrays[0].shape)} is symbolic")
    return Array.of(apply(TABLE["concatenate"], *(cast(a._value, dtype) for a in arrays), axis=axis)[0])


concat = concatenate


def stack(arrays: Sequence[Array], axis: int | None = 0) -> Array:
    axis = axis_of("stack", axis or 0, array_of(arrays[0]).ndim + 1)
    return concatenate([expand_dims(array_of(a), axis) for a in arrays], axis)


MODES: dict[str, Any] = {                                   # the source of position i along an axis of n elements
    "edge": lambda i, n: np.clip(i, 0, n - 1),
    "reflect": lambda i, n: np.abs((i + n - 1) % max(1, 2 * n - 2) - (n - 1)),
    "symmetric": lambda i, n: np.minimum(i % (2 * n), 2 * n - 1 - i % (2 * n))}


def pad(a: Any, pad_width: Any, mode: str = "constant", constant_values: Any = 0) -> Array:
    """pad_width: n, (before, after) or one pair an axis. mode: constant, edge, reflect or symmetric."""
    a = array_of(a)
    widths = np.broadcast_to(np.asarray(pad_width, int), (a.ndim, 2)).tolist()
    if mode != "constant" and mode not in MODES:
        raise ValueError(f"[pad] mode {mode!r}: one of constant, {', '.join(MODES)} wanted")
    for i, (before, after) in enumerate(widths):
        unknown = isinstance(a.shape[i], Dim) or mode in MODES and not a.shape[i]
        if before < 0 or after < 0 or unknown and before + after:
            raise ValueError(f"[pad] axis {i} of {show(a.shape)} by {before} and {after}: numbers from 0 on, and an "
                             "axis of a known size, not 0, wanted")
    if mode == "constant":
        shape = tuple(s + b + e if b + e else s for s, (b, e) in zip(a.shape, widths, strict=True))
        return slice_update(ops.full(shape, constant_values, a.dtype), a, tuple(b for b, _ in widths), (1,) * a.ndim)
    for i, (before, after) in enumerate(widths):
        if before + after:
            a = take(a, Array(MODES[mode](np.arange(-before, a.shape[i] + after), a.shape[i]), int32), i)
    return a


def slice_update(a: Array, update: Any, start: Shape, step: Shape) -> Array:
    """a with `update` written from `start` on; in a's own memory when nobody needs a any more."""
    u = cast(array_of(update)._value, a.dtype)
    return Array.of(apply(TABLE["slice_update"], a._value, u, start=start, step=step)[0])


def take(a: Array, indices: Any, axis: int | None = None) -> Array:
    """Elements of `axis` (or of the flattened array) at integer positions; negative ones count from the end."""
    a = array_of(a) if axis is not None else flatten(a)
    axis = axis_of("take", axis or 0, a.ndim)
    if isinstance(indices, int):
        return squeeze(take(a, Array([indices]), axis), axis)
    indices = array_of(indices)
    if indices.dtype.kind not in "iu":
        raise ValueError(f"[take] indices {indices.dtype}{show(indices.shape)}: integers wanted")
    index = indices._value if indices.dtype in (int32, int64, uint32) else cast(indices._value, int64)
    return Array.of(apply(TABLE["take"], a._value, index, axis=axis)[0])

"""Scatter and its mirror, take_along_axis; `array.at`, put_along_axis, and slices whose start is an array."""
from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import indexing, ops
from .array import Array
from .dtypes import int32, int64, uint32
from .node import Aval, Node, Shape, Value, apply, show
from .operands import array_of, axis_of, broadcast_shapes
from .primitives import TABLE, flat, row, size_of

if TYPE_CHECKING:
    from .lowering import Lowering
    from .plan import View

__all__ = ["put_along_axis", "slice", "slice_update", "take_along_axis"]


# rows: x (A…, N, C…), indices and updates (A…, I, C…); indices that are broadcast over A and C move whole rows

def three_axes(lo: Lowering, view: View, axis: int) -> View:
    """(A, I, C), or (I, C) where nothing precedes the axis, without a copy where the strides allow it."""
    lead, size, tail = view.shape[:axis], view.shape[axis], view.shape[axis + 1:]
    shape = (*((flat(lead),) if axis else ()), size, size_of(tail))
    moved = TABLE["reshape"].view(view.shape, view.strides, shape, {})  # type: ignore[misc]
    return lo.packed(view).reshaped(*shape) if moved is None else view.moved(shape, moved[1], moved[0])


def _lower_scatter(op: int) -> Callable[[Lowering, Node], None]:
    """Writes into x's own memory when it dies here."""
    def lower(lo: Lowering, node: Node) -> None:
        (x, indices, updates), axis = node.inputs, node.params["axis"]
        sides = [three_axes(lo, lo.view(v), axis) for v in (indices, updates)]
        if x in lo.scalars:
            lo.fill(x, target := lo.new(x.shape, x.dtype))
        else:
            target = lo.update(x)
        lo.step("scatter", [three_axes(lo, target, axis)], sides, [op])
        lo.place(node.values()[0], target)

    return lower


def _lower_take_along(lo: Lowering, node: Node) -> None:
    axis = node.params["axis"]
    inputs = [three_axes(lo, lo.view(v), axis) for v in node.inputs]
    lo.step("take_along", [three_axes(lo, lo.result(node.values()[0]), axis)], inputs)


def _batch(op: Callable[..., Array]) -> Callable[..., list[Array]]:
    """Inputs of one rank take a batch axis in front; those without it are repeated."""
    def rule(xs: list[Array], batched: list[bool], axis: int) -> list[Array]:
        size = next(x.shape[0] for x, b in zip(xs, batched, strict=True) if b)
        wide = [x if b else ops.broadcast_to(x, (size, *x.shape)) for x, b in zip(xs, batched, strict=True)]
        return [op(*wide, axis=axis + 1)]

    return rule


def _take_along(x: Array, indices: Array, axis: int) -> Array:
    return Array.of(apply(TABLE["take_along"], x._value, indices._value, axis=axis)[0])


def scatter(op: str) -> Callable[..., Array]:
    primitive = f"scatter_{op}"
    return lambda x, indices, updates, axis: Array.of(
        apply(TABLE[primitive], x._value, indices._value, updates._value, axis=axis)[0])


_set, _add, _multiply = scatter("set"), scatter("add"), scatter("multiply")


def _take_along_vjp(cts: list[Array], xs: list[Array], ys: list[Array], axis: int) -> list[Array | None]:
    return [_add(ops.zeros_like(xs[0]), xs[1], cts[0], axis), None]


def _take_along_jvp(ts: list[Array | None], xs: list[Array], ys: list[Array], axis: int) -> list[Array | None]:
    return [None if ts[0] is None else _take_along(ts[0], xs[1], axis)]


def _set_vjp(cts: list[Array], xs: list[Array], ys: list[Array], axis: int) -> list[Array | None]:
    """Of several updates of one element only the last has a gradient."""
    [ct], (x, indices, updates) = cts, xs
    number = ops.broadcast_to(ops.reshape(ops.arange(updates.shape[axis]), (-1, *(1,) * (x.ndim - axis - 1))),
                              updates.shape)
    last = _take_along(_set(ops.zeros(x.shape, int32), indices, number, axis), indices, axis)
    back = _take_along(ct, indices, axis)
    return [_set(ct, indices, ops.zeros_like(back), axis), None,
            ops.where(ops.equal(last, number), back, ops.zeros_like(back))]


def _linear_jvp(op: str) -> Callable[..., list[Array | None]]:
    """scatter_set and scatter_add are linear in x and updates together."""
    def rule(ts: list[Array | None], xs: list[Array], ys: list[Array], axis: int) -> list[Array | None]:
        t, u = (ops.zeros_like(x) if t is None else t for t, x in ((ts[0], xs[0]), (ts[2], xs[2])))
        return [scatter(op)(t, xs[1], u, axis)]

    return rule


def _add_vjp(cts: list[Array], xs: list[Array], ys: list[Array], axis: int) -> list[Array | None]:
    return [cts[0], None, _take_along(cts[0], xs[1], axis)]


def _multiply_vjp(cts: list[Array], xs: list[Array], ys: list[Array], axis: int) -> list[Array | None]:
    """Of an update that is 0 the gradient is NaN, as the other factors are not known."""
    [ct], (_, indices, updates), [y] = cts, xs, ys
    return [_multiply(ct, indices, updates, axis), None, _take_along(ct * y, indices, axis) / updates]


def _extreme_vjp(cts: list[Array], xs: list[Array], ys: list[Array], axis: int) -> list[Array | None]:
    [ct], (x, indices, updates), [y] = cts, xs, ys
    back, result = (_take_along(a, indices, axis) for a in (ct, y))
    return [ops.where(ops.equal(x, y), ct, ops.zeros_like(ct)), None,
            ops.where(ops.equal(updates, result), back, ops.zeros_like(back))]


def _scatter_rule(x: Value, indices: Value, updates: Value, axis: int) -> list[Aval]:
    return [(x.shape, x.dtype)]


def _take_along_rule(x: Value, indices: Value, axis: int) -> list[Aval]:
    return [(indices.shape, x.dtype)]


row("take_along", _take_along_rule, _lower_take_along, kernel="take_along", vjp=_take_along_vjp, jvp=_take_along_jvp,
    vmap=_batch(_take_along))
for _op, (_name, _vjp, _jvp) in enumerate([
        ("set", _set_vjp, _linear_jvp("set")), ("add", _add_vjp, _linear_jvp("add")), ("multiply", _multiply_vjp, None),
        ("maximum", _extreme_vjp, None), ("minimum", _extreme_vjp, None)]):
    row(f"scatter_{_name}", _scatter_rule, _lower_scatter(_op), kernel="scatter", vjp=_vjp, jvp=_jvp,
        vmap=_batch(scatter(_name)))


def _positions(name: str, indices: Any) -> Array:
    indices = array_of(indices)
    if indices.dtype.kind not in "iu":
        raise ValueError(f"[{name}] indices {indices.dtype}{show(indices.shape)}: integers wanted")
    return indices if indices.dtype in (int32, int64, uint32) else ops.astype(indices, int64)


def scatter_rows(a: Array, indices: Any, updates: Any, axis: int = 0, op: str = "add") -> Array:
    """a with updates (A…, *indices.shape, C…) put to rows `indices` of its `axis`, in order. op: set, add, multiply,
    maximum or minimum. The gradient of take(a, indices, axis) is scatter_rows(zeros, indices, ct, axis)."""
    axis, indices = axis_of("scatter", axis, a.ndim), _positions("scatter", indices)
    shape = (*a.shape[:axis], flat(indices.shape), *a.shape[axis + 1:])
    spread = ops.reshape(indices, (*(1,) * axis, flat(indices.shape), *(1,) * (a.ndim - axis - 1)))
    wide = ops.broadcast_to(updates, (*a.shape[:axis], *indices.shape, *a.shape[axis + 1:]))
    return scatter(op)(a, ops.broadcast_to(spread, shape), ops.reshape(ops.astype(wide, a.dtype), shape), axis)


# along an axis

def take_along_axis(a: Array, indices: Array, axis: int | None = None) -> Array:
    """out[i, j, …] = a[i, indices[i, j, …], …]; over the flattened array without an axis."""
    a, indices, axis, shape = _aligned("take_along_axis", a, indices, axis)
    wide = ops.broadcast_to(a, (*shape[:axis], a.shape[axis], *shape[axis + 1:]))
    return _take_along(wide, ops.broadcast_to(indices, shape), axis)


def put_along_axis(a: Array, indices: Array, values: Any, axis: int | None = None) -> Array:
    """a after a[i, indices[i, j, …], …] = values[i, j, …]; of values for one element the last counts."""
    flattened, indices, axis, shape = _aligned("put_along_axis", a, indices, axis)
    updates = ops.broadcast_to(ops.astype(array_of(values), a.dtype), shape)
    return ops.reshape(_set(flattened, ops.broadcast_to(indices, shape), updates, axis), a.shape)


def _aligned(name: str, a: Array, indices: Array, axis: int | None) -> tuple[Array, Array, int, Shape]:
    """a, indices, axis, and the shape of what is read or written."""
    a, indices = array_of(a) if axis is not None else ops.flatten(a), _positions(name, indices)
    axis = axis_of(name, axis or 0, a.ndim)
    if indices.ndim != a.ndim:
        raise ValueError(f"[{name}] a {show(a.shape)}, indices {show(indices.shape)}: as many axes wanted")
    beside = broadcast_shapes(*((*x.shape[:axis], 1, *x.shape[axis + 1:]) for x in (a, indices)), name=name)
    return a, indices, axis, (*beside[:axis], indices.shape[axis], *beside[axis + 1:])


# a.at[index]

class ArrayAt:
    """a.at[index]: its methods return the array after a[index] = a[index] op updates, where an element that the index
    names several times takes every update."""

    __slots__ = ("array", "index")

    def __init__(self, array: Array, index: Any = ...):
        self.array, self.index = array, index

    def __getitem__(self, index: Any) -> ArrayAt:
        return ArrayAt(self.array, index)

    def _update(self, updates: Any, op: str) -> Array:
        return update(self.array, self.index, updates, op)

    def add(self, value: Any) -> Array: return self._update(value, "add")  # noqa: E704
    def subtract(self, value: Any) -> Array: return self._update(0 - self._cast(value), "add")  # noqa: E704
    def multiply(self, value: Any) -> Array: return self._update(value, "multiply")  # noqa: E704
    def divide(self, value: Any) -> Array: return self._update(ops.reciprocal(self._cast(value)), "multiply")  # noqa: E704
    def maximum(self, value: Any) -> Array: return self._update(value, "maximum")  # noqa: E704
    def minimum(self, value: Any) -> Array: return self._update(value, "minimum")  # noqa: E704

    def _cast(self, value: Any) -> Array:
        return ops.astype(array_of(value), self.array.dtype)


def update(a: Array, index: Any, updates: Any, op: str) -> Array:
    """a after a[index] op= updates."""
    start, step, shape, final, arrays = indexing._parse(a, index)
    part = indexing._window(a, index)[0]
    new = ops.astype(array_of(updates), a.dtype)
    if arrays:
        part = _put(part, arrays, new, op)
    else:
        new = ops.reshape(new, new.shape[indexing._leading_ones(new.shape, len(final)):])
        new = ops.broadcast_to(new, final)
        part = new if op == "set" else getattr(ops, op)(part, new)
    part = ops.reshape(part, shape)
    return part if shape == a.shape and all(s == 1 for s in step) else ops.slice_update(a, part, start, step)


def _put(a: Array, arrays: dict[int, Array], new: Array, op: str) -> Array:
    """a with updates at integer arrays on some of its axes; the axes of the updates are NumPy's."""
    axes = list(arrays)
    index, total = indexing._flat_index(a, arrays)
    if len(axes) == 1:
        return scatter_rows(a, index, new, axes[0], op)
    rest = [i for i in range(a.ndim) if i not in axes]
    sizes = tuple(a.shape[i] for i in rest)
    before = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0
    new = ops.broadcast_to(new, sizes[:before] + index.shape + sizes[before:])
    order = [*range(before, before + index.ndim), *range(before), *range(before + index.ndim, new.ndim)]
    front = ops.transpose(a, axes + rest)
    rows = scatter_rows(ops.reshape(front, (total, *sizes)), index, ops.transpose(new, order), 0, op)
    return ops.transpose(ops.reshape(rows, front.shape), [(axes + rest).index(i) for i in range(a.ndim)])


# slices whose start is known at run time

def slice(a: Array, start_indices: Array, axes: Sequence[int], slice_size: Sequence[int]) -> Array:
    """The part of size `slice_size` (one an axis of a) that begins at start_indices (one an entry of `axes`)."""
    axes = _dynamic_axes("slice", a, start_indices, axes)
    if len(slice_size) != a.ndim or any(n > s for n, s in zip(slice_size, a.shape, strict=True)):
        raise ValueError(f"[slice] sizes {show(slice_size)} do not fit in {show(a.shape)}")
    for i, axis in enumerate(axes):
        a = ops.take(a, start_indices[i] + ops.arange(slice_size[axis]), axis)
    return a[tuple(builtins.slice(n) for n in slice_size)]


def slice_update(a: Array, update: Any, start_indices: Array, axes: Sequence[int]) -> Array:
    """a with `update` written from start_indices (one an entry of `axes`) on."""
    update, axes = array_of(update), _dynamic_axes("slice_update", a, start_indices, axes)
    if update.ndim != a.ndim or any(n > s for n, s in zip(update.shape, a.shape, strict=True)):
        raise ValueError(f"[slice_update] the update {show(update.shape)} does not fit in {show(a.shape)}")
    return _write_from(a, update, start_indices, list(axes))


def _write_from(a: Array, update: Array, start: Array, axes: list[int]) -> Array:
    """Axis by axis: the rows of the first axis take what is written on the others."""
    if not axes:
        return ops.slice_update(a, update, (0,) * a.ndim, (1,) * a.ndim)
    rows = start[len(start) - len(axes)] + ops.arange(update.shape[axes[0]])
    others = [n for i, n in enumerate(update.shape) if i != axes[0]]
    if others != [n for i, n in enumerate(a.shape) if i != axes[0]]:
        update = _write_from(ops.take(a, rows, axes[0]), update, start, axes[1:])
    return scatter_rows(a, rows, update, axes[0], "set")


def _dynamic_axes(name: str, a: Array, start: Array, axes: Sequence[int]) -> Sequence[int]:
    axes = [axis_of(name, axis, a.ndim) for axis in axes]
    if start.size != len(axes) or start.dtype.kind not in "iu" or start.ndim > 1:
        raise ValueError(f"[{name}] start {start.dtype}{show(start.shape)}, axes {show(axes)}: one integer each wanted")
    return axes

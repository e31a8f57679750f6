"""Cumulative sums, products, extremes and log-sum-exps along an axis."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import ops
from .array import Array
from .dtypes import Dtype, bool_, complex64, float32, int32
from .node import Aval, Node, Value, apply, show
from .operands import array_of, axis_of
from .primitives import TABLE, row
from .scatter import scatter, take_along_axis, three_axes

if TYPE_CHECKING:
    from .lowering import Lowering

__all__ = ["cummax", "cummin", "cumprod", "cumsum", "cumulative_prod", "cumulative_sum", "logcumsumexp"]
SCANS = {"cumsum": 0, "cumprod": 1, "cummax": 2, "cummin": 3, "logcumsumexp": 4}
Optional = list[Array | None]


def _rule(x: Value, axis: int, reverse: bool, inclusive: bool) -> list[Aval]:
    return [(x.shape, x.dtype)]


def _lower(lo: Lowering, node: Node) -> None:
    p, [x], [value] = node.params, node.inputs, node.values()
    views = [three_axes(lo, v, p["axis"]) for v in (lo.view(x), lo.result(value))]
    ints = [SCANS[node.primitive.name], int(p["reverse"]), int(not p["inclusive"])]
    lo.step("scan", views[1:], views[:1], ints)


def _scan(name: str, x: Array, axis: int, reverse: bool = False, inclusive: bool = True) -> Array:
    return Array.of(apply(TABLE[name], x._value, axis=axis, reverse=reverse, inclusive=inclusive)[0])


def _sum_vjp(cts: list[Array], xs: list[Array], ys: list[Array], axis: int, reverse: bool, inclusive: bool) -> Optional:
    return [_scan("cumsum", cts[0], axis, not reverse, inclusive)]


def _sum_jvp(ts: Optional, xs: list[Array], ys: list[Array], **params: Any) -> Optional:
    return [None if ts[0] is None else _scan("cumsum", ts[0], **params)]


def _prod_vjp(cts: list[Array], xs: list[Array], ys: list[Array], axis: int, reverse: bool,
              inclusive: bool) -> Optional:
    """NaN for an element that is 0, as the other factors are not known."""
    return [_scan("cumsum", cts[0] * ys[0], axis, not reverse, inclusive) / xs[0]]


def _prod_jvp(ts: Optional, xs: list[Array], ys: list[Array], **params: Any) -> Optional:
    return [None if ts[0] is None else ys[0] * _scan("cumsum", ts[0] / xs[0], **params)]


def _source(x: Array, y: Array, axis: int, reverse: bool) -> Array:
    """Where along the axis each running extreme y of x was found last."""
    number = ops.broadcast_to(ops.reshape(ops.arange(x.shape[axis]), (-1, *(1,) * (x.ndim - axis - 1))), x.shape)
    found = ops.where(ops.equal(x, y), number, x.shape[axis] - 1 if reverse else 0)
    return _scan("cummin" if reverse else "cummax", found, axis, reverse)


def _extreme_vjp(cts: list[Array], xs: list[Array], ys: list[Array], axis: int, reverse: bool,
                 inclusive: bool) -> Optional:
    return [scatter("add")(ops.zeros_like(xs[0]), _source(xs[0], ys[0], axis, reverse), cts[0], axis)]


def _extreme_jvp(ts: Optional, xs: list[Array], ys: list[Array], axis: int, reverse: bool, inclusive: bool) -> Optional:
    return [None if ts[0] is None else take_along_axis(ts[0], _source(xs[0], ys[0], axis, reverse), axis)]


def _weighted(weights: Array, logs: Array, axis: int, reverse: bool) -> list[Array]:
    """log of the running sum of weights * exp(logs): of the positive weights, and of the negative ones' sizes."""
    parts = []
    for size in (weights, -weights):
        counts = size > 0
        log = ops.where(counts, ops.log(ops.where(counts, size, 1.0)), -float("inf"))
        parts.append(_scan("logcumsumexp", log + logs, axis, reverse))
    return parts


def _log_vjp(cts: list[Array], xs: list[Array], ys: list[Array], axis: int, reverse: bool, inclusive: bool) -> Optional:
    """dx = exp(x) * running sum of ct * exp(-y) from the other end, in logarithms so that nothing overflows."""
    plus, minus = _weighted(cts[0], -ys[0], axis, not reverse)
    return [ops.exp(plus + xs[0]) - ops.exp(minus + xs[0])]


def _log_jvp(ts: Optional, xs: list[Array], ys: list[Array], axis: int, reverse: bool, inclusive: bool) -> Optional:
    if ts[0] is None:
        return [None]
    plus, minus = _weighted(ts[0], xs[0], axis, reverse)
    return [ops.exp(plus - ys[0]) - ops.exp(minus - ys[0])]


def _batch(name: str) -> Any:
    return lambda xs, batched, axis, **params: [_scan(name, xs[0], axis=axis + 1, **params)]


for _name, _vjp, _jvp in [("cumsum", _sum_vjp, _sum_jvp), ("cumprod", _prod_vjp, _prod_jvp),
                          ("cummax", _extreme_vjp, _extreme_jvp), ("cummin", _extreme_vjp, _extreme_jvp),
                          ("logcumsumexp", _log_vjp, _log_jvp)]:
    row(_name, _rule, _lower, kernel="scan", vjp=_vjp, jvp=_jvp, vmap=_batch(_name))


def _along(name: str, a: Any, axis: int | None, reverse: bool, inclusive: bool, none: float | None = None) -> Array:
    """none: what is left of nothing, where rules exist only for inclusive scans."""
    a = array_of(a)
    if axis is None:
        a, axis = ops.flatten(a), 0
    axis = axis_of(name, axis, a.ndim)
    if a.dtype is complex64:
        raise ValueError(f"[{name}] complex64{show(a.shape)}: not a type it is defined for")
    if inclusive or none is None:
        return _scan(name, a, axis, reverse, inclusive)
    whole = _scan(name, a, axis, reverse)
    at = [slice(None)] * axis
    edge = ops.full((*a.shape[:axis], min(1, a.shape[axis]), *a.shape[axis + 1:]), none, a.dtype)
    kept = whole[(*at, slice(1, None) if reverse else slice(None, -1))]
    return ops.concatenate([kept, edge] if reverse else [edge, kept], axis)


def cumsum(a: Any, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True,
           dtype: Dtype | None = None) -> Array:
    """Sums of the elements so far along an axis, or of the flattened array. reverse: from the end; not inclusive: of
    those before; dtype: summed as that type."""
    a = array_of(a)
    return _along("cumsum", ops.astype(a, dtype or (int32 if a.dtype is bool_ else a.dtype)), axis, reverse, inclusive)


def cumprod(a: Any, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True,
            dtype: Dtype | None = None) -> Array:
    """Products of the elements so far; arguments as of cumsum."""
    a = array_of(a)
    return _along("cumprod", ops.astype(a, dtype or a.dtype), axis, reverse, inclusive)


cumulative_sum, cumulative_prod = cumsum, cumprod


def cummax(a: Any, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True) -> Array:
    """The greatest of the elements so far; NaN stays. Arguments as of cumsum."""
    a = array_of(a)
    return _along("cummax", a, axis, reverse, inclusive, _limits(a.dtype)[0])


def cummin(a: Any, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True) -> Array:
    """The least of the elements so far; NaN stays. Arguments as of cumsum."""
    a = array_of(a)
    return _along("cummin", a, axis, reverse, inclusive, _limits(a.dtype)[1])


def logcumsumexp(a: Any, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True) -> Array:
    """log of the sum of exp of the elements so far. Arguments as of cumsum."""
    a = array_of(a)
    return _along("logcumsumexp", a if a.dtype.inexact else ops.astype(a, float32), axis, reverse, inclusive,
                  -float("inf"))


def _limits(dtype: Dtype) -> tuple[Any, Any]:
    if dtype.inexact:
        return -float("inf"), float("inf")
    if dtype is bool_:
        return False, True
    info = np.iinfo(dtype.numpy)
    return int(info.min), int(info.max)

"""Public functions with the names and semantics of mlx.core: they promote, broadcast and make nodes."""
from __future__ import annotations

import builtins
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .array import Array
from .dtypes import FROM_NUMPY, Dtype, bfloat16, bool_, float32, int32, int64, promote, uint16, uint32, weak
from .node import Dim, Shape, apply, from_numpy, show
from .operands import (
    Axes,
    alias,
    array_of,
    axes_of,
    axis_of,
    broadcast_shapes,
    cast,
    constant,
    leaf,
    operands,
    shape_of,
    spread,
)
from .primitives import RESULT, TABLE, slice_shape

__all__ = [
    "abs", "add", "addmm", "all", "allclose", "any", "arange", "arccos", "arccosh", "arcsin", "arcsinh",
    "arctan", "arctan2", "arctanh", "argmax", "argmin", "array_equal", "asarray", "astype", "bitwise_and",
    "bitwise_invert", "bitwise_or", "bitwise_xor", "broadcast_arrays", "broadcast_to", "ceil", "clip",
    "concatenate", "contiguous", "cos", "cosh", "divide", "divmod", "equal", "erf", "erfinv", "exp",
    "expand_dims", "expm1", "eye", "flatten", "flip", "floor", "floor_divide", "full", "full_like", "gelu",
    "gelu_tanh", "greater", "greater_equal", "identity", "inner", "isclose", "isfinite", "isinf", "isnan",
    "left_shift", "less", "less_equal", "linspace", "log", "log10", "log1p", "log2", "logaddexp", "logical_and",
    "logical_not", "logical_or", "logsumexp", "matmul", "max", "maximum", "mean", "min", "minimum", "moveaxis",
    "multiply", "negative", "not_equal", "ones", "ones_like", "outer", "pad", "permute_dims", "power", "prod",
    "reciprocal", "relu", "remainder", "repeat", "reshape", "right_shift", "round", "rsqrt", "sigmoid", "sign",
    "silu", "sin", "sinh", "split", "sqrt", "square", "squeeze", "stack", "std",
    "stop_gradient", "subtract", "sum", "swapaxes", "take", "take_along_axis", "tan", "tanh", "tile",
    "transpose", "tri", "tril", "triu", "unflatten", "var", "view", "where", "zeros", "zeros_like",
]
RESHAPE, TRANSPOSE, SLICE = TABLE["reshape"], TABLE["transpose"], TABLE["slice"]


# making arrays

def asarray(obj: Any) -> Array:
    """An array on the memory of a NumPy array (or a memory-map, or a buffer): no copy, never written to."""
    if isinstance(obj, Array):
        return obj
    array = np.asarray(obj)
    if array.dtype.name == "bfloat16":
        return view(Array.of(from_numpy(array.view(np.uint16), uint16, False)), bfloat16)
    if array.dtype not in FROM_NUMPY:
        raise TypeError(f"[asarray] NumPy type {array.dtype} has no dtype here")
    return Array.of(from_numpy(array, FROM_NUMPY[array.dtype], False))


def full(shape: int | Sequence[int], value: Any, dtype: Dtype | None = None) -> Array:
    if isinstance(value, Array):
        return broadcast_to(astype(value, dtype or value.dtype), shape)
    return Array.of(spread(constant(value, dtype or weak(value, None)), shape_of(shape)))


def zeros(shape: int | Sequence[int], dtype: Dtype = float32) -> Array:
    return full(shape, 0, dtype)


def ones(shape: int | Sequence[int], dtype: Dtype = float32) -> Array:
    return full(shape, 1, dtype)


def zeros_like(a: Array) -> Array:
    return full(a.shape, 0, a.dtype)


def ones_like(a: Array) -> Array:
    return full(a.shape, 1, a.dtype)


def full_like(a: Array, value: Any, dtype: Dtype | None = None) -> Array:
    return full(a.shape, value, dtype or a.dtype)


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Dtype | None = None) -> Array:
    """start, start + step, … below stop. `arange(Dim)` has the symbolic size."""
    if stop is None:
        start, stop = 0, start
    dtype = dtype or (int32 if builtins.all(isinstance(v, int) for v in (start, stop, step)) else float32)
    value = leaf(np.arange(start, int(stop) if isinstance(stop, Dim) else stop, step), dtype)
    if isinstance(stop, Dim) and start == 0 and step == 1:
        value.shape = (stop,)
    return Array.of(value)


def linspace(start: float, stop: float, num: int = 50, dtype: Dtype = float32) -> Array:
    return Array(np.linspace(start, stop, num), dtype)


def eye(n: int, m: int | None = None, k: int = 0, dtype: Dtype = float32) -> Array:
    return Array(np.eye(n, m, k), dtype)


def identity(n: int, dtype: Dtype = float32) -> Array:
    return eye(n, dtype=dtype)


def tri(n: int, m: int | None = None, k: int = 0, dtype: Dtype = float32) -> Array:
    return Array(np.tri(n, m, k), dtype)


def tril(a: Array, k: int = 0) -> Array:
    return where(tri(a.shape[-2], a.shape[-1], k, bool_), a, zeros_like(a))


def triu(a: Array, k: int = 0) -> Array:
    return where(tri(a.shape[-2], a.shape[-1], k - 1, bool_), zeros_like(a), a)


def _elementwise(name: str, accepts: str = "buifc") -> Callable[..., Array]:
    primitive, inexact = TABLE[name], RESULT[name] == "inexact"

    def op(*xs: Any) -> Array:
        values = operands(name, *xs, inexact=inexact)
        if values[0].dtype.kind not in accepts:
            raise ValueError(f"[{name}] {values[0].dtype}{show(values[0].shape)}: not a type it is defined for")
        return Array.of(apply(primitive, *values)[0])

    op.__name__ = op.__qualname__ = name
    op.__doc__ = f"Elementwise {name}, with broadcasting and promotion."
    return op


sign, square, relu = _elementwise("sign"), _elementwise("square"), _elementwise("relu")
sqrt, rsqrt, reciprocal = _elementwise("sqrt"), _elementwise("rsqrt"), _elementwise("reciprocal")
exp, expm1, log, log2, log10, log1p = (_elementwise(n) for n in ("exp", "expm1", "log", "log2", "log10", "log1p"))
sin, cos, tan, sinh, cosh, tanh = (_elementwise(n) for n in ("sin", "cos", "tan", "sinh", "cosh", "tanh"))
arcsin, arccos, arctan = (_elementwise(n) for n in ("arcsin", "arccos", "arctan"))
arcsinh, arccosh, arctanh = (_elementwise(n) for n in ("arcsinh", "arccosh", "arctanh"))
erf, erfinv, sigmoid = _elementwise("erf"), _elementwise("erfinv"), _elementwise("sigmoid")
silu, gelu, gelu_tanh = _elementwise("silu"), _elementwise("gelu"), _elementwise("gelu_tanh")
add, subtract, multiply, divide = (_elementwise(n) for n in ("add", "subtract", "multiply", "divide"))
floor_divide, remainder, power = (_elementwise(n) for n in ("floor_divide", "remainder", "power"))
maximum, minimum, arctan2 = _elementwise("maximum"), _elementwise("minimum"), _elementwise("arctan2")
logaddexp = _elementwise("logaddexp")
equal, not_equal, less, less_equal, greater, greater_equal = (
    _elementwise(n) for n in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal"))
logical_and, logical_or, logical_not = (_elementwise(n) for n in ("logical_and", "logical_or", "logical_not"))
bitwise_and, bitwise_or, bitwise_xor = (_elementwise(n, "bui") for n in ("bitwise_and", "bitwise_or", "bitwise_xor"))
left_shift, right_shift = _elementwise("left_shift", "ui"), _elementwise("right_shift", "ui")
negative = _elementwise("negative", "uifc")
_abs, _invert = _elementwise("abs"), _elementwise("bitwise_invert", "ui")
_isnan, _isinf = _elementwise("isnan"), _elementwise("isinf")
_rounding = {name: _elementwise(name) for name in ("floor", "ceil", "round")}


def abs(a: Any) -> Array:
    a = array_of(a)
    return alias(a) if a.dtype.kind in "bu" else _abs(a)


def floor(a: Any) -> Array:
    a = array_of(a)
    return _rounding["floor"](a) if a.dtype.inexact else alias(a)


def ceil(a: Any) -> Array:
    a = array_of(a)
    return _rounding["ceil"](a) if a.dtype.inexact else alias(a)


def round(a: Any, decimals: int = 0) -> Array:
    """To the nearest, ties to even."""
    a = array_of(a)
    if not a.dtype.inexact:
        return alias(a)
    return _rounding["round"](a * 10.0**decimals) * 10.0**-decimals if decimals else _rounding["round"](a)


def isnan(a: Any) -> Array:
    a = array_of(a)
    return _isnan(a) if a.dtype.inexact else zeros(a.shape, bool_)


def isinf(a: Any) -> Array:
    a = array_of(a)
    return _isinf(a) if a.dtype.inexact else zeros(a.shape, bool_)


def isfinite(a: Any) -> Array:
    return logical_not(logical_or(isnan(a), isinf(a)))


def bitwise_invert(a: Any) -> Array:
    a = array_of(a)
    return logical_not(a) if a.dtype is bool_ else _invert(a)


def divmod(a: Any, b: Any) -> list[Array]:
    return [floor_divide(a, b), remainder(a, b)]


def where(condition: Any, a: Any, b: Any) -> Array:
    """a where the condition holds, else b."""
    c = cast(array_of(condition)._value, bool_)
    x, y = operands("where", a, b)
    shape = broadcast_shapes(c.shape, x.shape, name="where")
    return Array.of(apply(TABLE["where"], *(spread(v, shape) for v in (c, x, y)))[0])


def clip(a: Any, a_min: Any = None, a_max: Any = None) -> Array:
    low = alias(array_of(a)) if a_min is None else maximum(a, a_min)
    return low if a_max is None else minimum(low, a_max)


def astype(a: Array, dtype: Dtype) -> Array:
    return Array.of(cast(a._value, dtype))


def isclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Array:
    a, b = array_of(a), array_of(b)
    near = logical_or(less_equal(abs(a - b), atol + rtol * abs(b)), equal(a, b))
    return logical_or(near, logical_and(isnan(a), isnan(b))) if equal_nan else near


def allclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Array:
    return all(isclose(a, b, rtol, atol, equal_nan))


def array_equal(a: Any, b: Any) -> Array:
    a, b = array_of(a), array_of(b)
    return all(equal(a, b)) if a.shape == b.shape else full((), False)


# movements

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


def moveaxis(a: Array, source: int, destination: int) -> Array:
    order = list(range(a.ndim))
    order.insert(axis_of("moveaxis", destination, a.ndim), order.pop(axis_of("moveaxis", source, a.ndim)))
    return transpose(a, order)


def broadcast_to(a: Any, shape: int | Sequence[int]) -> Array:
    a, shape = array_of(a), shape_of(shape)
    if broadcast_shapes(a.shape, shape, name="broadcast_to") != shape:
        raise ValueError(f"[broadcast_to] {show(a.shape)} does not broadcast to {show(shape)}")
    return Array.of(spread(a._value, shape))


def broadcast_arrays(*arrays: Array) -> list[Array]:
    shape = broadcast_shapes(*(a.shape for a in arrays))
    return [broadcast_to(a, shape) for a in arrays]


def view(a: Array, dtype: Dtype) -> Array:
    """The same bytes read as another dtype; of materialized arrays without a copy."""
    return alias(a) if a.dtype is dtype else Array.of(apply(TABLE["view"], a._value, dtype=dtype)[0])


def contiguous(a: Array) -> Array:
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


def split(a: Array, parts: int | Sequence[int], axis: int = 0) -> list[Array]:
    """Into equal parts, or at the given positions."""
    axis = axis_of("split", axis, a.ndim)
    size = a.shape[axis]
    if isinstance(parts, int):
        if size % parts:
            raise ValueError(f"[split] axis {axis} of {show(a.shape)} does not divide by {parts}")
        parts = [size // parts * i for i in range(1, parts)]
    bounds = [0, *parts, int(size)]
    return [a[(slice(None),) * axis + (slice(i, j),)] for i, j in zip(bounds, bounds[1:], strict=False)]


def flip(a: Array, axis: Axes = None) -> Array:
    axes = axes_of("flip", axis, a.ndim)
    return a[tuple(slice(None, None, -1) if i in axes else slice(None) for i in range(a.ndim))]


def tile(a: Array, reps: int | Sequence[int]) -> Array:
    counts = shape_of(reps)
    shape = (1,) * (len(counts) - a.ndim) + a.shape
    counts = (1,) * (len(shape) - len(counts)) + counts
    pairs = tuple(x for c, s in zip(counts, shape, strict=True) for x in (c, s))
    spaced = reshape(a, tuple(x for s in shape for x in (1, s)))
    return reshape(broadcast_to(spaced, pairs), tuple(c * s for c, s in zip(counts, shape, strict=True)))


def repeat(a: Array, repeats: int, axis: int | None = None) -> Array:
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


def stack(arrays: Sequence[Array], axis: int = 0) -> Array:
    axis = axis_of("stack", axis, array_of(arrays[0]).ndim + 1)
    return concatenate([expand_dims(array_of(a), axis) for a in arrays], axis)


def pad(a: Array, pad_width: Any, constant_values: Any = 0) -> Array:
    """pad_width: n, (before, after) or one pair an axis."""
    widths = np.broadcast_to(np.asarray(pad_width, int), (a.ndim, 2))
    shape = tuple(s + int(b + e) if b + e else s for s, (b, e) in zip(a.shape, widths, strict=True))
    for i, (size, (before, after)) in enumerate(zip(a.shape, widths, strict=True)):
        if isinstance(size, Dim) and before + after:
            raise ValueError(f"[pad] axis {i} of {show(a.shape)} is symbolic")
    return slice_update(full(shape, constant_values, a.dtype), a, tuple(int(b) for b, _ in widths), (1,) * a.ndim)


def slice_update(a: Array, update: Any, start: Shape, step: Shape) -> Array:
    """a with `update` written from `start` on; in a's own memory when nobody needs a any more."""
    u = cast(array_of(update)._value, a.dtype)
    return Array.of(apply(TABLE["slice_update"], a._value, u, start=start, step=step)[0])


# reductions

def _reduction(name: str) -> Callable[..., Array]:
    def op(a: Any, axis: Axes = None, keepdims: bool = False) -> Array:
        a = array_of(a)
        axes = axes_of(name, axis, a.ndim)
        if not axes:
            return astype(a, TABLE[name].rule(a._value, axes=axes)[0][1])
        if name in ("max", "min", "argmax", "argmin") and builtins.any(a.shape[i] == 0 for i in axes):
            raise ValueError(f"[{name}] {show(a.shape)} has no elements along axes {show(axes)}")
        if len(axes) < a.ndim and isinstance(a.shape[axes[0]], Dim):
            raise ValueError(f"[{name}] axis {axes[0]} of {show(a.shape)} is symbolic and must lead")
        out = Array.of(apply(TABLE[name], a._value, axes=axes)[0])
        return reshape(out, tuple(1 if i in axes else s for i, s in enumerate(a.shape))) if keepdims else out

    op.__name__ = op.__qualname__ = name
    op.__doc__ = f"The {name} over the given axes, or over all."
    return op


sum, prod, max, min, any, all = (_reduction(n) for n in ("sum", "prod", "max", "min", "any", "all"))
_arg = {name: _reduction(name) for name in ("argmax", "argmin")}


def _position(name: str, a: Array, axis: int | None, keepdims: bool) -> Array:
    if axis is not None:
        return _arg[name](a, axis, keepdims)
    out = _arg[name](flatten(a), 0)
    return reshape(out, (1,) * a.ndim) if keepdims else out


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
    total = sum(a if a.dtype.inexact else astype(a, float32), axis, keepdims)
    count = _count("mean", a, axis)
    return total * (1.0 / count) if count else total / 0.0


def var(a: Any, axis: Axes = None, keepdims: bool = False, ddof: int = 0) -> Array:
    a = array_of(a)
    spread_ = sum(square(a - mean(a, axis, keepdims=True)), axis, keepdims)
    return spread_ / (_count("var", a, axis) - ddof)


def std(a: Any, axis: Axes = None, keepdims: bool = False, ddof: int = 0) -> Array:
    return sqrt(var(a, axis, keepdims, ddof))


def logsumexp(a: Any, axis: Axes = None, keepdims: bool = False) -> Array:
    a = array_of(a)
    a = a if a.dtype.inexact else astype(a, float32)
    top = max(a, axis, keepdims=True)
    top = where(isinf(top), 0.0, top)
    out = log(sum(exp(a - top), axis, keepdims=True)) + top
    return out if keepdims else reshape(out, sum(a, axis).shape)


# products and gathers

def matmul(a: Any, b: Any) -> Array:
    """a (…, M, K) @ b (…, K, N); a 1-D operand is a row on the left and a column on the right, as in NumPy."""
    a, b = array_of(a), array_of(b)
    dtype = promote(a.dtype, b.dtype)
    if not a.ndim or not b.ndim or not dtype.inexact:
        raise ValueError(f"[matmul] {a.dtype}{show(a.shape)} @ {b.dtype}{show(b.shape)}: floats with axes wanted")
    k, n = a.shape[-1], b.shape[-2 if b.ndim > 1 else 0]
    if k != n:
        raise ValueError(f"[matmul] a {show(a.shape)} @ b {show(b.shape)}: inner sizes {k} and {n} differ")
    x = a if a.ndim > 1 else expand_dims(a, 0)
    y = b if b.ndim > 1 else expand_dims(b, 1)
    broadcast_shapes(x.shape[:-2], y.shape[:-2], name="matmul")
    out = Array.of(apply(TABLE["matmul"], cast(x._value, dtype), cast(y._value, dtype))[0])
    drop = [-1] * (b.ndim == 1) + [-2] * (a.ndim == 1)
    return squeeze(out, drop) if drop else out


def addmm(c: Any, a: Any, b: Any, alpha: float = 1.0, beta: float = 1.0) -> Array:
    product = matmul(a, b)
    return (product if alpha == 1.0 else alpha * product) + (c if beta == 1.0 else beta * c)


def inner(a: Array, b: Array) -> Array:
    return matmul(a, swapaxes(b, -1, -2) if b.ndim > 1 else b)


def outer(a: Array, b: Array) -> Array:
    return expand_dims(flatten(a), 1) * flatten(b)


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


def take_along_axis(a: Array, indices: Array, axis: int) -> Array:
    """out[i, j, …] = a[i, indices[i, j, …], …]"""
    axis = axis_of("take_along_axis", axis, a.ndim)
    shape = broadcast_shapes(*((*x.shape[:axis], 1, *x.shape[axis + 1:]) for x in (a, indices)), name="take_along_axis")
    indices = broadcast_to(indices, (*shape[:axis], indices.shape[axis], *shape[axis + 1:]))
    index = [reshape(arange(s), tuple(s if i == j else 1 for j in range(a.ndim))) for i, s in enumerate(shape)]
    index[axis] = indices
    return a[tuple(index)]


def stop_gradient(a: Array) -> Array:
    return alias(a)

"""From Python objects to the operands of a primitive: conversion, promotion, broadcasting, axes."""
from __future__ import annotations

import builtins
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import dtypes as dt
from . import interchange
from .array import Array
from .dtypes import Dtype, bfloat16, bool_, float32, float64, int32, int64
from .node import Shape, Value, apply, from_numpy, show
from .primitives import TABLE
from .sizes import Size

Axes = int | Sequence[int] | None
Scalar = bool | int | float | complex
CONSTANT, ASTYPE, BROADCAST = TABLE["constant"], TABLE["astype"], TABLE["broadcast_to"]


def leaf(obj: Any, dtype: Dtype | None = None) -> Value:
    """A value with a copy of the elements. Unless `dtype` says so, doubles become float32, Python's ints int32."""
    if isinstance(obj, Array):
        return cast(obj._value, dtype or obj.dtype)
    if isinstance(obj, Scalar):
        dtype = dtype or dt.weak(obj, None)
    if isinstance(obj, list | tuple) and interchange.holds_arrays(obj):
        return cast(interchange.stack(obj)._value, dtype) if dtype else interchange.stack(obj)._value
    array, found = interchange.bits_of(obj, "array")
    if dtype is None:
        listed = found is int64 and isinstance(obj, list | tuple | range)
        narrow = listed and np.array_equal(array, array.astype(np.int32))
        dtype = int32 if narrow else float32 if found is float64 else found
    return from_numpy(_converted(array, found, dtype), dtype, True)


def _converted(array: np.ndarray, found: Dtype, dtype: Dtype) -> np.ndarray:
    """A fresh row-major array of `dtype`'s storage."""
    if found is dtype:
        return np.array(array, order="C")
    if found is bfloat16:
        array = dt.from_bfloat16(array)
    return dt.to_bfloat16(array) if dtype is bfloat16 else np.array(array, dtype.numpy, order="C")


def from_bits(bits: np.ndarray, dtype: str) -> Array:
    return Array.of(from_numpy(bits, dt.by_name(dtype), True))


def constant(value: Any, dtype: Dtype) -> Value:
    """A scalar that kernels take as a parameter and not from memory."""
    if dtype.kind in "iu" and isinstance(value, int | np.integer):
        info = np.iinfo(dtype.numpy)
        if not info.min <= value <= info.max:
            raise ValueError(f"[array] {value} does not fit {dtype}")
        if builtins.abs(int(value)) > 1 << 53:
            return leaf(value, dtype)
    if dtype.kind == "c":
        if complex(value).imag:
            return leaf(value, dtype)
        value = complex(value).real
    if not isinstance(value, Size):
        value = bool(value) if dtype is bool_ else float(value) if dtype.inexact else int(value)
    return apply(CONSTANT, value=value, dtype=dtype)[0]


def array_of(x: Any) -> Array:
    return x if isinstance(x, Array) else Array(x)


def alias(a: Array) -> Array:
    """Another handle: what does nothing must not return its argument, which may be updated in place later."""
    return Array.of(a._value)


def cast(value: Value, dtype: Dtype) -> Value:
    if value.dtype is dtype:
        return value
    if value.node is not None and value.node.primitive is CONSTANT:
        return constant(value.node.params["value"], dtype)
    return apply(ASTYPE, value, dtype=dtype)[0]


def spread(value: Value, shape: Shape) -> Value:
    return value if value.shape == shape else apply(BROADCAST, value, shape=shape)[0]


def broadcast_shapes(*shapes: Shape, name: str = "broadcast_shapes") -> Shape:
    ndim = builtins.max(map(len, shapes), default=0)
    padded = [(1,) * (ndim - len(s)) + tuple(s) for s in shapes]
    out = []
    for axis, sizes in enumerate(zip(*padded, strict=True)):
        wide = list(dict.fromkeys(s for s in sizes if s != 1))
        if len(wide) > 1:
            listed = " and ".join(show(s) for s in shapes)
            raise ValueError(f"[{name}] {listed}: axis {axis - ndim} has {wide[0]} and {wide[1]}")
        out.append(wide[0] if wide else 1)
    return tuple(out)


def operands(name: str, *xs: Any, inexact: bool = False) -> list[Value]:
    """Values of one dtype and one shape. Python scalars are weak: they take the arrays' type where they can."""
    values = [x._value for x in xs if isinstance(x, Array)]
    alike = len(values) == len(xs) and len({(v.shape, v.dtype) for v in values}) == 1
    if alike and (not inexact or values[0].dtype.inexact):
        return values                                      # nothing to do, quickly
    arrays = [x if isinstance(x, Scalar) else array_of(x) for x in xs]
    dtypes = [a.dtype for a in arrays if isinstance(a, Array)]
    dtype = functools.reduce(dt.promote, dtypes) if dtypes else None
    for a in arrays:
        if not isinstance(a, Array):
            dtype = dt.weak(a, dtype)
    assert dtype is not None
    if inexact and not dtype.inexact:
        dtype = float32
    values = [cast(a._value, dtype) if isinstance(a, Array) else constant(a, dtype) for a in arrays]
    shape = broadcast_shapes(*(v.shape for v in values), name=name)
    return [spread(v, shape) for v in values]


# shapes and axes

def unpack(args: tuple[Any, ...]) -> Any:
    """f(2, 3) and f((2, 3)) are the same."""
    return args[0] if len(args) == 1 and not isinstance(args[0], int) else args


def shape_of(shape: int | Sequence[int]) -> Shape:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def axis_of(name: str, axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"[{name}] axis {axis}: the array has {ndim} axes")
    return axis % ndim


def axes_of(name: str, axis: Axes, ndim: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(ndim))
    axes = tuple(axis_of(name, a, ndim) for a in ([axis] if isinstance(axis, int) else axis))
    if len(set(axes)) != len(axes):
        raise ValueError(f"[{name}] axes {show(axes)}: one is named twice")
    return tuple(sorted(axes))

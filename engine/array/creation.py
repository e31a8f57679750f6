"""Arrays from sizes and numbers: constants, ranges, windows, grids. Constants have memory where kernels want it."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import ops
from .array import Array
from .dtypes import Dtype, float32, int32, weak
from .node import Dim
from .operands import array_of, cast, constant, leaf, shape_of, spread

__all__ = ["arange", "bartlett", "blackman", "diag", "empty", "empty_like", "eye", "full", "full_like", "hamming",
           "hanning", "identity", "linspace", "meshgrid", "ones", "ones_like", "tri", "tril", "triu", "zeros",
           "zeros_like"]


def full(shape: int | Sequence[int], vals: Any, dtype: Dtype | None = None) -> Array:
    """The value, or the array broadcast to the shape."""
    value = vals._value if isinstance(vals, Array) else constant(vals, dtype or weak(vals, None))
    return Array.of(spread(cast(value, dtype or value.dtype), shape_of(shape)))


def zeros(shape: int | Sequence[int], dtype: Dtype | None = float32) -> Array:
    return full(shape, 0, dtype or float32)


def ones(shape: int | Sequence[int], dtype: Dtype | None = float32) -> Array:
    return full(shape, 1, dtype or float32)


empty = zeros                                              # a constant costs nothing


def full_like(a: Array, vals: Any, dtype: Dtype | None = None) -> Array:
    return full(a.shape, vals, dtype or a.dtype)


def zeros_like(a: Array, dtype: Dtype | None = None) -> Array:
    return full(a.shape, 0, dtype or a.dtype)


def ones_like(a: Array, dtype: Dtype | None = None) -> Array:
    return full(a.shape, 1, dtype or a.dtype)


empty_like = zeros_like


def arange(start: Any, stop: Any = None, step: Any = None, dtype: Dtype | None = None) -> Array:
    """start, start + step, … below stop. `arange(Dim)` has the symbolic size."""
    if stop is None:
        start, stop = 0, start
    step = 1 if step is None else step
    dtype = dtype or (int32 if all(isinstance(v, int | np.integer) for v in (start, stop, step)) else float32)
    value = leaf(np.arange(start, int(stop) if isinstance(stop, Dim) else stop, step), dtype)
    if isinstance(stop, Dim) and start == 0 and step == 1:
        value.shape = (stop,)
    return Array.of(value)


def linspace(start: float, stop: float, num: int | None = 50, endpoint: bool = True,
             dtype: Dtype | None = float32) -> Array:
    return Array(np.linspace(start, stop, 50 if num is None else num, endpoint), dtype or float32)


def eye(n: int, m: int | None = None, k: int = 0, dtype: Dtype | None = float32) -> Array:
    """Ones on diagonal k of an (n, m) matrix."""
    return Array(np.eye(n, m, k), dtype or float32)


def identity(n: int, dtype: Dtype | None = float32) -> Array:
    return eye(n, dtype=dtype)


def tri(n: int, m: int | None = None, k: int = 0, dtype: Dtype | None = None) -> Array:
    """Ones on and below diagonal k of an (n, m) matrix."""
    return Array(np.tri(n, m, k), dtype or float32)


def _kept(a: Array, mask: np.ndarray) -> Array:
    return ops.where(Array(mask), a, zeros_like(a))


def tril(x: Array, k: int = 0) -> Array:
    """The matrices with zeros above diagonal k."""
    return _kept(x, np.tri(x.shape[-2], x.shape[-1], k, bool))


def triu(x: Array, k: int = 0) -> Array:
    """The matrices with zeros below diagonal k."""
    return _kept(x, ~np.tri(x.shape[-2], x.shape[-1], k - 1, bool))


def diag(a: Any, k: int = 0) -> Array:
    """The matrix with diagonal k, or the diagonal k of a matrix."""
    a = array_of(a)
    if a.ndim == 2:
        return ops.diagonal(a, k)
    if a.ndim != 1:
        raise ValueError(f"[diag] {a.ndim} axes: a diagonal or a matrix wanted")
    rows = ops.expand_dims(ops.pad(a, [(max(-k, 0), max(k, 0))]), 1)           # element i is in its row
    return ops.where(Array(np.eye(rows.shape[0], k=k, dtype=bool)), rows, zeros((), a.dtype))


def meshgrid(*arrays: Array, sparse: bool = False, indexing: str = "xy") -> list[Array]:
    """Coordinates of the points of a grid: one array for each axis; sparse ones have size 1 along the others. "xy": the
    first two axes are swapped."""
    if indexing not in ("xy", "ij"):
        raise ValueError(f'[meshgrid] indexing {indexing!r}: "xy" or "ij" wanted')
    order = [1, 0, *range(2, len(arrays))] if indexing == "xy" and len(arrays) > 1 else range(len(arrays))
    grid = [ops.reshape(a, [-1 if i == place else 1 for i in range(len(arrays))])
            for a, place in zip(arrays, order, strict=True)]
    return grid if sparse else ops.broadcast_arrays(*grid)


def _window(name: str, formula: Callable[[int], np.ndarray]) -> Callable[[int], Array]:
    def window(M: int) -> Array:
        return Array(formula(M), float32)

    window.__name__ = window.__qualname__ = name
    window.__doc__ = f"The {name} window of M points, float32."
    return window


bartlett, blackman = _window("bartlett", np.bartlett), _window("blackman", np.blackman)
hamming, hanning = _window("hamming", np.hamming), _window("hanning", np.hanning)

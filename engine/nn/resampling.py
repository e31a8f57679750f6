"""Pooling and upsampling, one spatial axis after the other. x is (N, …, C)."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np

from .. import array as mx
from .module import Module

__all__ = ["AvgPool1d", "AvgPool2d", "AvgPool3d", "MaxPool1d", "MaxPool2d", "MaxPool3d", "Upsample"]
Sizes = int | Sequence[int]


class _Pool(Module):
    """Windows of `kernel_size`, `stride` apart (default: side by side), over axes padded at both ends."""

    axes: int
    fill: float
    over: Callable[..., mx.Array]                            # of a whole axis
    pair: Callable[[mx.Array, mx.Array], mx.Array]           # of two windows' elements

    def __init__(self, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0):
        self._size, self._stride, self._padding = (
            self._sizes(name, value, least) for name, value, least in (
                ("kernel_size", kernel_size, 1), ("stride", kernel_size if stride is None else stride, 1),
                ("padding", padding, 0)))

    def _sizes(self, name: str, value: Sizes, least: int) -> tuple[int, ...]:
        sizes = (value,) * self.axes if isinstance(value, int) else tuple(value)
        if len(sizes) != self.axes or min(sizes) < least:
            raise ValueError(f"[{type(self).__name__}] {name} is {value}: {self.axes} of at least {least} wanted")
        return sizes

    def _extra_repr(self) -> str:
        return f"kernel_size={self._size}, stride={self._stride}, padding={self._padding}"

    def __call__(self, x: mx.Array) -> mx.Array:
        if x.ndim != self.axes + 2:
            raise ValueError(f"[{type(self).__name__}] {x.shape}: {self.axes + 2} axes wanted")
        if any(self._padding):
            x = mx.pad(x, [(0, 0), *((p, p) for p in self._padding), (0, 0)], constant_values=self.fill)
        for axis, (size, stride) in enumerate(zip(self._size, self._stride, strict=True), 1):
            x = self._pooled(x, axis, size, stride)
        return x

    def _pooled(self, x: mx.Array, axis: int, size: int, stride: int) -> mx.Array:
        windows = (x.shape[axis] - size) // stride + 1
        if windows < 1:
            raise ValueError(f"[{type(self).__name__}] {x.shape}: axis {axis} is shorter than a window of {size}")
        if size == stride and x.shape[axis] == windows * size:
            return self.over(mx.unflatten(x, axis, (windows, size)), axis + 1)
        last = (windows - 1) * stride + 1
        return reduce(self.pair, (x[(slice(None),) * axis + (slice(i, i + last, stride),)] for i in range(size)))


class MaxPool1d(_Pool):
    """The largest of each window of x (N, L, C)."""

    axes, fill, over, pair = 1, -math.inf, staticmethod(mx.max), staticmethod(mx.maximum)


class MaxPool2d(MaxPool1d):
    """The largest of each window of x (N, H, W, C)."""

    axes = 2


class MaxPool3d(MaxPool1d):
    """The largest of each window of x (N, D, H, W, C)."""

    axes = 3


class AvgPool1d(_Pool):
    """The mean of each window of x (N, L, C), padding counted as 0."""

    axes, fill, over, pair = 1, 0.0, staticmethod(mx.sum), staticmethod(mx.add)

    def __call__(self, x: mx.Array) -> mx.Array:
        return super().__call__(x) * (1 / math.prod(self._size))


class AvgPool2d(AvgPool1d):
    """The mean of each window of x (N, H, W, C), padding counted as 0."""

    axes = 2


class AvgPool3d(AvgPool1d):
    """The mean of each window of x (N, D, H, W, C), padding counted as 0."""

    axes = 3


class Upsample(Module):
    """Resizes the spatial axes of x (N, …, C) by scale_factor, one for all or one each, as torch's interpolate does.

    align_corners: the first and last elements keep their places. antialias: linear and cubic kernels are widened
    when the scale is below 1.
    """

    def __init__(
        self, scale_factor: float | Sequence[float], mode: str = "nearest", align_corners: bool = False,
        antialias: bool = False,
    ):
        if mode not in ("nearest", *KERNELS):
            raise ValueError(f"[Upsample] mode is {mode!r}, wanted nearest, linear or cubic")
        if antialias and (align_corners or mode == "nearest"):
            raise ValueError("[Upsample] antialias wants mode linear or cubic, and align_corners False")
        one = isinstance(scale_factor, int | float)
        self.scale_factor = float(scale_factor) if one else tuple(map(float, scale_factor))  # type: ignore
        self.mode, self.align_corners, self.antialias = mode, align_corners, antialias

    def _extra_repr(self) -> str:
        rest = ", antialias=True" if self.antialias else ""
        return f"scale_factor={self.scale_factor}, mode={self.mode!r}, align_corners={self.align_corners}{rest}"

    def __call__(self, x: mx.Array) -> mx.Array:
        scales = self.scale_factor if isinstance(self.scale_factor, tuple) else (self.scale_factor,) * (x.ndim - 2)
        if x.ndim < 3 or len(scales) != x.ndim - 2:
            raise ValueError(f"[Upsample] {x.shape}, scale_factor {self.scale_factor}: one a spatial axis wanted")
        for axis, scale in enumerate(scales, 1):
            x = self._resized(x, axis, scale)
        return x

    def _resized(self, x: mx.Array, axis: int, scale: float) -> mx.Array:
        if self.mode == "nearest":
            if scale.is_integer():
                return mx.repeat(x, int(scale), axis)
            return mx.take(x, mx.array(_nearest(x.shape[axis], scale)), axis)
        index, weights = _taps(x.shape[axis], scale, self.mode, self.align_corners, self.antialias)
        sides = (-1,) + (1,) * (x.ndim - axis - 1)
        terms = [mx.take(x, mx.array(i), axis) * mx.array(w, x.dtype).reshape(sides)
                 for i, w in zip(index, weights, strict=True)]
        return reduce(mx.add, terms)


def _nearest(n: int, scale: float) -> np.ndarray:
    m = int(scale * n)
    at = np.arange(m) * (n / m) if m <= n else np.round((np.arange(m) + 0.5) * (n / m) - 0.5)
    return at.astype(np.int32)


def _triangle(x: np.ndarray, _: bool) -> np.ndarray:
    return np.maximum(1 - x, 0)


def _cubic(x: np.ndarray, antialias: bool) -> np.ndarray:
    """Keys 1981; a is torch's, which differs when antialiased."""
    a = -0.5 if antialias else -0.75
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x <= 1, near, np.where(x <= 2, far, 0))


KERNELS = {"linear": (_triangle, 1), "cubic": (_cubic, 2)}  # with their radius


def _taps(n: int, scale: float, mode: str, align_corners: bool, antialias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which of n elements each of int(scale · n) results sums, and with what weights: both (taps, results)."""
    (kernel, radius), m = KERNELS[mode], int(scale * n)
    at = (np.arange(m) - (m - 1) / 2) * ((n - 1) / max(m - 1, 1) if align_corners else 1 / scale) + (n - 1) / 2
    if mode == "linear" and not antialias:
        at = np.clip(at, 0, n - 1)
    stretch = max(1 / scale, 1) if antialias else 1
    reach = math.ceil(radius * stretch)
    index = np.floor(at) + np.arange(1 - reach, reach + 1)[:, None]
    weights = kernel(np.abs(at - index) / stretch, antialias)
    if antialias:
        weights = np.where((index >= 0) & (index < n), weights, 0)
        weights /= weights.sum(0)
    return np.clip(index, 0, n - 1).astype(np.int32), weights.astype(np.float32)

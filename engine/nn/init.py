"""Initializers: each makes a function of an array that gives a new array of its shape."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .. import array as mx

__all__ = [
    "constant", "glorot_normal", "glorot_uniform", "he_normal", "he_uniform", "identity", "normal", "orthogonal",
    "sparse", "uniform",
]
Initializer = Callable[..., mx.Array]


def constant(value: float, dtype: mx.Dtype = mx.float32) -> Initializer:
    """`value` everywhere."""
    return lambda a: mx.full(a.shape, value, dtype)


def normal(mean: float = 0.0, std: float = 1.0, dtype: mx.Dtype = mx.float32) -> Initializer:
    """Normal numbers of the given mean and standard deviation."""
    return lambda a: mx.random.normal(a.shape, dtype, mean, std)


def uniform(low: float = 0.0, high: float = 1.0, dtype: mx.Dtype = mx.float32) -> Initializer:
    """Uniform numbers from low up to high."""
    return lambda a: mx.random.uniform(low, high, a.shape, dtype)


def identity(dtype: mx.Dtype = mx.float32) -> Initializer:
    """The identity matrix."""
    def initializer(a: mx.Array) -> mx.Array:
        if a.ndim != 2 or a.shape[0] != a.shape[1]:
            raise ValueError(f"[identity] {a.shape}: a square matrix wanted")
        return mx.eye(a.shape[0], dtype=dtype)

    return initializer


def glorot_normal(dtype: mx.Dtype = mx.float32) -> Initializer:
    """(a, gain=1): normal with variance gain² · 2 / (fan_in + fan_out), Glorot and Bengio 2010."""
    return _glorot(_normal(dtype))


def glorot_uniform(dtype: mx.Dtype = mx.float32) -> Initializer:
    """`glorot_normal`, uniform with the same variance."""
    return _glorot(_uniform(dtype))


def he_normal(dtype: mx.Dtype = mx.float32) -> Initializer:
    """(a, mode="fan_in", gain=1): normal with variance gain² / fan, He et al. 2015, arxiv.org/abs/1502.01852"""
    return _he(_normal(dtype))


def he_uniform(dtype: mx.Dtype = mx.float32) -> Initializer:
    """`he_normal`, uniform with the same variance."""
    return _he(_uniform(dtype))


def sparse(sparsity: float, mean: float = 0.0, std: float = 1.0, dtype: mx.Dtype = mx.float32) -> Initializer:
    """Normal numbers, of which the part `sparsity` in every row is 0."""
    def initializer(a: mx.Array) -> mx.Array:
        _matrix("sparse", a)
        rank = mx.argsort(mx.argsort(mx.random.uniform(shape=a.shape), axis=1), axis=1)
        return mx.where(rank < math.ceil(sparsity * a.shape[1]), 0, mx.random.normal(a.shape, dtype, mean, std))

    return initializer


def orthogonal(gain: float = 1.0, dtype: mx.Dtype = mx.float32) -> Initializer:
    """gain times a matrix whose rows or columns are orthonormal, Saxe et al. 2013, arxiv.org/abs/1312.6120"""
    def initializer(a: mx.Array) -> mx.Array:
        _matrix("orthogonal", a)
        rows, columns = a.shape
        q, r = mx.linalg.qr(mx.random.normal((max(rows, columns),) * 2))
        return (gain * q * mx.sign(mx.diag(r)))[:rows, :columns].astype(dtype)

    return initializer


Draw = Callable[[Any, float], mx.Array]  # (shape, standard deviation)


def _normal(dtype: mx.Dtype) -> Draw:
    return lambda shape, std: mx.random.normal(shape, dtype, 0.0, std)


def _uniform(dtype: mx.Dtype) -> Draw:
    return lambda shape, std: mx.random.uniform(-math.sqrt(3) * std, math.sqrt(3) * std, shape, dtype)


def _glorot(draw: Draw) -> Initializer:
    def initializer(a: mx.Array, gain: float = 1.0) -> mx.Array:
        return draw(a.shape, gain * math.sqrt(2 / sum(_fans("glorot", a).values())))

    return initializer


def _he(draw: Draw) -> Initializer:
    def initializer(a: mx.Array, mode: str = "fan_in", gain: float = 1.0) -> mx.Array:
        fans = _fans("he", a)
        if mode not in fans:
            raise ValueError(f"[he] mode is {mode!r}, wanted fan_in or fan_out")
        return draw(a.shape, gain / math.sqrt(fans[mode]))

    return initializer


def _fans(name: str, a: mx.Array) -> dict[str, int]:
    """Connections into and out of a unit of a weight (out, …, in)."""
    if a.ndim < 2:
        raise ValueError(f"[{name}] {a.shape}: a weight (out, …, in) wanted")
    window = math.prod(a.shape[1:-1])
    return {"fan_in": a.shape[-1] * window, "fan_out": a.shape[0] * window}


def _matrix(name: str, a: mx.Array) -> None:
    if a.ndim != 2:
        raise ValueError(f"[{name}] {a.shape}: a matrix wanted")


# what layers start with

_loading = ContextVar("loading", default=False)


@contextmanager
def loading() -> Iterator[None]:
    """Layers made inside have placeholders for weights, which a checkpoint must replace: much faster than drawing."""
    token = _loading.set(True)
    try:
        yield
    finally:
        _loading.reset(token)


def to_be_loaded() -> bool:
    return _loading.get()


def draw(shape: tuple[int, ...], scale: float, kind: str = "uniform") -> mx.Array:
    """A new layer's weight: uniform between ±scale, or normal with that deviation."""
    if to_be_loaded():
        return mx.placeholder(shape, mx.float32)
    return mx.random.uniform(-scale, scale, shape) if kind == "uniform" else mx.random.normal(shape, scale=scale)

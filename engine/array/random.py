"""Random numbers from counter-based keys: the same key gives the same numbers on every machine, instruction set and
number of threads, and those of mlx.core.random. `state` holds the key that calls without one split and replace."""
from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from . import linalg, ops, sorting
from .array import Array
from .dtypes import Dtype, bfloat16, complex64, float16, float32, float64, int32, uint8, uint16, uint32
from .node import Aval, Dim, Node, Primitive, Shape, Value, apply, show
from .operands import array_of, axis_of, broadcast_shapes, shape_of
from .primitives import row, size_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .lowering import Lowering

__all__ = ["bernoulli", "categorical", "gumbel", "key", "laplace", "multivariate_normal", "normal", "permutation",
           "randint", "seed", "split", "state", "truncated_normal", "uniform"]
WORDS = {1: uint8, 2: uint16, 4: uint32}


# bits

def _bits_rule(keys: Value, shape: Shape, dtype: Dtype) -> list[Aval]:
    if keys.dtype is not uint32 or keys.shape[-1:] != (2,):
        raise ValueError(f"[random] key {keys.dtype}{show(keys.shape)}: uint32(2,) wanted")
    return [((*keys.shape[:-1], *shape), dtype)]


def _lower_bits(lo: Lowering, node: Node) -> None:
    [keys], [value] = node.inputs, node.values()
    count = size_of(keys.shape[:-1])
    lo.step("random", [lo.result(value).reshaped(count, size_of(node.params["shape"]))],
            [lo.contiguous(keys).reshaped(count, 2)])


BITS: Primitive = row("random", _bits_rule, _lower_bits, kernel="random",
           vmap=lambda xs, batched, **params: [Array.of(apply(BITS, xs[0]._value, **params)[0])])


def bits(shape: Sequence[int] = (), width: int = 4, key: Array | None = None) -> Array:
    """Random unsigned integers of `width` bytes (1, 2, 4). A key of shape (…, 2) gives (…, *shape)."""
    shape = shape_of(shape)
    if any(isinstance(s, Dim) for s in shape):
        raise ValueError(f"[random] shape {show(shape)} is symbolic")
    keys = array_of(_next_key() if key is None else key)
    return Array.of(apply(BITS, keys._value, shape=shape, dtype=WORDS[width])[0])


# keys

def key(seed: int) -> Array:
    """The key of a 64-bit seed."""
    return Array(np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32))


def split(key: Array, num: int = 2) -> Array:
    """`num` independent keys from one: (num, 2)."""
    return bits((num, 2), 4, key)


state = [key(time.time_ns() // 1_000_000)]


def seed(seed: int) -> None:
    """Starts the numbers of calls without a key anew."""
    state[0] = key(seed)


def _next_key() -> Array:
    state[0], fresh = split(state[0])
    return fresh


# distributions

def _floating(name: str, dtype: Dtype | None) -> Dtype:
    dtype = dtype or float32
    if dtype.kind != "f":
        raise ValueError(f"[{name}] dtype {dtype}: a real floating type wanted")
    return dtype


def _fits(name: str, argument: str, found: Shape, shape: Shape) -> None:
    if broadcast_shapes(found, shape, name=name) != shape:
        raise ValueError(f"[{name}] {argument} {show(found)} does not broadcast to the shape {show(shape)}")


BELOW_ONE = {float16: 1 - 2.0**-11, bfloat16: 1 - 2.0**-8, float32: 1 - 2.0**-24, float64: 1 - 2.0**-24}


def uniform(low: Any = 0, high: Any = 1, shape: Sequence[int] = (), dtype: Dtype | None = float32,
            key: Array | None = None) -> Array:
    """Uniform in [low, high), which may be arrays that broadcast to the shape."""
    dtype, shape = _floating("uniform", dtype), shape_of(shape)
    unit = ops.astype(bits(shape, 4, key), float32) * 2.0**-32
    unit = ops.astype(ops.minimum(unit, BELOW_ONE[dtype]), dtype)
    if isinstance(low, int | float) and isinstance(high, int | float) and dtype.size >= 4:
        low = dtype.numpy.type(low)
        span = dtype.numpy.type(high) - low
        return unit if (low, span) == (0, 1) else float(span) * unit + float(low)
    low, high = (ops.astype(array_of(x), dtype) for x in (low, high))
    span = high - low
    _fits("uniform", "high - low", span.shape, shape)
    return span * unit + low


def _centred(shape: Sequence[int], key: Array | None) -> Array:
    """Uniform in (-1, 1), float32."""
    return uniform(-1 + 2.0**-24, 1, shape, float32, key)


def _moved(samples: Array, loc: Any, scale: Any) -> Array:
    dtype = samples.dtype
    samples = samples if scale is None else samples * ops.astype(array_of(scale), dtype)
    return samples if loc is None else samples + ops.astype(array_of(loc), dtype)


def normal(shape: Sequence[int] = (), dtype: Dtype | None = float32, loc: Any = None, scale: Any = None,
           key: Array | None = None) -> Array:
    """Normal with mean `loc` and standard deviation `scale`; complex64: both parts have variance 1/2."""
    shape, dtype = shape_of(shape), dtype or float32
    if dtype is complex64:
        parts = ops.erfinv(_centred((*shape, 2), key))
        return _moved(ops.squeeze(ops.view(parts, complex64), -1), loc, scale)
    root = 1.4140625 if _floating("normal", dtype).size == 2 else math.sqrt(2)     # the nearest in the type
    factor = root if scale is None else root * ops.astype(array_of(scale), dtype)
    return _moved(factor * ops.astype(ops.erfinv(_centred(shape, key)), dtype), loc, None)


def multivariate_normal(mean: Any, cov: Any, shape: Sequence[int] = (), dtype: Dtype | None = float32,
                        key: Array | None = None) -> Array:
    """Normal with mean (…, n) and covariance (…, n, n): (*shape, n)."""
    mean, cov = array_of(mean), array_of(cov)
    if dtype not in (None, float32):
        raise ValueError(f"[multivariate_normal] dtype {dtype}: float32 wanted")
    if mean.ndim < 1 or cov.ndim < 2 or cov.shape[-2:] != (mean.shape[-1],) * 2:
        raise ValueError(f"[multivariate_normal] mean {show(mean.shape)}, cov {show(cov.shape)}: (…, n) and (…, n, n) "
                         "wanted")
    batch = broadcast_shapes(mean.shape[:-1], cov.shape[:-2], name="multivariate_normal")
    shape = shape_of(shape) or batch
    _fits("multivariate_normal", "the batch", batch, shape)
    u, spread, _ = linalg.svd(ops.astype(cov, float32))
    z = normal((*shape, mean.shape[-1]), float32, key=key) * ops.sqrt(spread)
    return ops.squeeze(ops.matmul(u, ops.expand_dims(z, -1)), -1) + mean


def randint(low: Any, high: Any, shape: Sequence[int] = (), dtype: Dtype | None = int32,
            key: Array | None = None) -> Array:
    """Integers uniform in [low, high)."""
    dtype = dtype or int32
    if dtype.inexact:
        raise ValueError(f"[randint] dtype {dtype}: an integer type wanted")
    return ops.astype(ops.floor(ops.maximum(uniform(low, high, shape, float32, key), low)), dtype)


def bernoulli(p: Any = 0.5, shape: Sequence[int] | None = None, key: Array | None = None) -> Array:
    """True with probability p."""
    p = array_of(p)
    shape = p.shape if shape is None else shape_of(shape)
    _fits("bernoulli", "p", p.shape, shape)
    return uniform(0, 1, shape, _floating("bernoulli", p.dtype), key) < p


def truncated_normal(lower: Any, upper: Any, shape: Sequence[int] | None = None, dtype: Dtype | None = float32,
                     key: Array | None = None) -> Array:
    """Standard normal on the condition that it lies in [lower, upper]."""
    dtype = _floating("truncated_normal", dtype)
    lower, upper = (ops.astype(array_of(x), dtype) for x in (lower, upper))
    shape = broadcast_shapes(lower.shape, upper.shape) if shape is None else shape_of(shape)
    root = ops.full((), math.sqrt(2), dtype)
    out = root * ops.erfinv(uniform(ops.erf(lower / root), ops.erf(upper / root), shape, dtype, key))
    return ops.maximum(ops.minimum(upper, out), lower)


def gumbel(shape: Sequence[int] = (), dtype: Dtype | None = float32, key: Array | None = None) -> Array:
    """Standard Gumbel: -log(-log(u))."""
    return -ops.log(-ops.log(uniform(0, 1, shape, _floating("gumbel", dtype), key)))


def categorical(logits: Any, axis: int = -1, shape: Sequence[int] | None = None, num_samples: int | None = None,
                key: Array | None = None) -> Array:
    """Positions along `axis` drawn with probabilities softmax(logits), by the largest of logits + Gumbel noise. The
    shape is that of the logits without the axis, and num_samples after it, or `shape`."""
    logits = array_of(logits)
    axis = axis_of("categorical", axis, logits.ndim)
    if shape is not None and num_samples is not None:
        raise ValueError("[categorical] shape and num_samples are given: one of them wanted")
    if num_samples is not None:
        logits = ops.expand_dims(logits, -1)
    rest = (*logits.shape[:axis], *logits.shape[axis + 1:])
    drawn = (*rest[:-1], num_samples) if num_samples is not None else rest if shape is None else shape_of(shape)
    _fits("categorical", "logits without the axis", rest, drawn)
    at = axis + len(drawn) - len(rest)
    noise = gumbel((*drawn[:at], logits.shape[axis], *drawn[at:]), float32, key)
    return ops.argmax(noise + logits, at)


def laplace(shape: Sequence[int] = (), dtype: Dtype | None = float32, loc: Any = 0.0, scale: Any = 1.0,
            key: Array | None = None) -> Array:
    """Laplace with mean `loc` and scale `scale`, by the inverse of its distribution function."""
    u = _centred(shape, key)
    return _moved(ops.astype(ops.sign(u) * ops.log1p(-ops.abs(u)), _floating("laplace", dtype)), loc, scale)


def permutation(x: int | Array, axis: int = 0, key: Array | None = None) -> Array:
    """The numbers below x, or x along an axis, in random order."""
    if isinstance(x, Array):
        return ops.take(x, permutation(x.shape[axis_of("permutation", axis, x.ndim)], key=key), axis)
    return sorting.argsort(bits((x,), 4, key))

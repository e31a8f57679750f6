"""Activations: functions, and layers of the same names made from them."""
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from .. import array as mx
from .module import Module

__all__ = [
    "CELU", "ELU", "GELU", "GLU", "SELU", "HardShrink", "HardTanh", "Hardswish", "LeakyReLU", "LogSigmoid",
    "LogSoftmax", "Mish", "PReLU", "ReLU", "ReLU2", "ReLU6", "SiLU", "Sigmoid", "Softmax", "Softmin", "Softplus",
    "Softshrink", "Softsign", "Step", "Tanh", "celu", "elu", "gelu", "gelu_approx", "gelu_fast_approx", "glu",
    "hard_shrink", "hard_tanh", "hardswish", "leaky_relu", "log_sigmoid", "log_softmax", "mish", "prelu", "relu",
    "relu2", "relu6", "selu", "sigmoid", "silu", "softmax", "softmin", "softplus", "softshrink", "softsign", "step",
    "tanh",
]


def sigmoid(x: mx.Array) -> mx.Array:
    """1 / (1 + exp(−x))"""
    return mx.sigmoid(x)


def tanh(x: mx.Array) -> mx.Array:
    """(exp(x) − exp(−x)) / (exp(x) + exp(−x))"""
    return mx.tanh(x)


def relu(x: mx.Array) -> mx.Array:
    """max(x, 0)"""
    return mx.relu(x)


def relu2(x: mx.Array) -> mx.Array:
    """max(x, 0)², So et al. 2021, arxiv.org/abs/2109.08668"""
    return mx.square(mx.relu(x))


def relu6(x: mx.Array) -> mx.Array:
    """min(max(x, 0), 6)"""
    return mx.minimum(mx.relu(x), 6.0)


def leaky_relu(x: mx.Array, negative_slope: float = 0.01) -> mx.Array:
    """max(negative_slope · x, x)"""
    return mx.maximum(negative_slope * x, x)


def prelu(x: mx.Array, alpha: mx.Array) -> mx.Array:
    """max(0, x) + alpha · min(0, x)"""
    return mx.relu(x) + alpha * mx.minimum(x, 0)


def elu(x: mx.Array, alpha: float = 1.0) -> mx.Array:
    """x where it is positive, alpha · (exp(x) − 1) elsewhere"""
    return mx.where(x > 0, x, alpha * mx.expm1(mx.minimum(x, 0)))


def celu(x: mx.Array, alpha: float = 1.0) -> mx.Array:
    """max(x, 0) + min(0, alpha · (exp(x / alpha) − 1))"""
    return mx.relu(x) + alpha * mx.expm1(mx.minimum(x, 0) / alpha)


def selu(x: mx.Array) -> mx.Array:
    """1.0507 · elu(x, 1.67326), Klambauer et al. 2017, arxiv.org/abs/1706.02515"""
    return elu(x, 1.67326) * 1.0507


def softplus(x: mx.Array) -> mx.Array:
    """log(1 + exp(x))"""
    return mx.logaddexp(x, 0)


def softsign(x: mx.Array) -> mx.Array:
    """x / (1 + |x|)"""
    return x / (1 + mx.abs(x))


def softshrink(x: mx.Array, lambd: float = 0.5) -> mx.Array:
    """x moved by lambd towards 0, and 0 where |x| is not above lambd"""
    return mx.where(mx.abs(x) > lambd, x - mx.sign(x) * lambd, 0)


def hard_shrink(x: mx.Array, lambd: float = 0.5) -> mx.Array:
    """x where |x| is above lambd, 0 elsewhere"""
    return mx.where(mx.abs(x) > lambd, x, 0)


def hard_tanh(x: mx.Array, min_val: float = -1.0, max_val: float = 1.0) -> mx.Array:
    """x kept between min_val and max_val"""
    return mx.clip(x, min_val, max_val)


def hardswish(x: mx.Array) -> mx.Array:
    """x · min(max(x + 3, 0), 6) / 6, Howard et al. 2019, arxiv.org/abs/1905.02244"""
    return x * mx.clip(x + 3, 0, 6) / 6


def step(x: mx.Array, threshold: float = 0.0) -> mx.Array:
    """1 where x reaches the threshold, 0 elsewhere"""
    return mx.where(x >= threshold, 1, 0)


def silu(x: mx.Array) -> mx.Array:
    """x · sigmoid(x)"""
    return mx.silu(x)


def mish(x: mx.Array) -> mx.Array:
    """x · tanh(softplus(x)), Misra 2019, arxiv.org/abs/1908.08681"""
    return x * mx.tanh(softplus(x))


def gelu(x: mx.Array) -> mx.Array:
    """x · Φ(x)"""
    return mx.gelu(x)


def gelu_approx(x: mx.Array) -> mx.Array:
    """GELU through tanh, as GPT-2 and Gemma use it."""
    return mx.gelu_tanh(x)


def gelu_fast_approx(x: mx.Array) -> mx.Array:
    """x · sigmoid(1.702 x)"""
    return x * mx.sigmoid(1.702 * x)


def glu(x: mx.Array, axis: int = -1) -> mx.Array:
    """a · sigmoid(b), where a and b are the halves of x along the axis"""
    a, b = mx.split(x, 2, axis)
    return a * mx.sigmoid(b)


def softmax(x: mx.Array, axis: int = -1) -> mx.Array:
    """exp(x) / Σ exp(x)"""
    return mx.softmax(x, axis)


def softmin(x: mx.Array, axis: int = -1) -> mx.Array:
    """softmax(−x)"""
    return mx.softmax(-x, axis)


def log_softmax(x: mx.Array, axis: int = -1) -> mx.Array:
    """x − log Σ exp(x)"""
    return x - mx.logsumexp(x, axis, keepdims=True)


def log_sigmoid(x: mx.Array) -> mx.Array:
    """−softplus(−x)"""
    return -softplus(-x)


class Activation(Module):
    """A function as a layer: `class ReLU(Activation, function=relu)`. Options of the function are the layer's."""

    function: Callable[..., mx.Array]

    def __init_subclass__(cls, function: Callable[..., mx.Array]):
        cls.function, cls.__doc__ = staticmethod(function), function.__doc__

    def __init__(self, *args: Any, **options: Any):
        bound = inspect.signature(self.function).bind(None, *args, **options)
        self._function = functools.partial(self.function, **dict(list(bound.arguments.items())[1:]))

    def __call__(self, x: mx.Array) -> mx.Array:
        return self._function(x)


class Sigmoid(Activation, function=sigmoid): ...
class Tanh(Activation, function=tanh): ...
class ReLU(Activation, function=relu): ...
class ReLU2(Activation, function=relu2): ...
class ReLU6(Activation, function=relu6): ...
class LeakyReLU(Activation, function=leaky_relu): ...
class ELU(Activation, function=elu): ...
class CELU(Activation, function=celu): ...
class SELU(Activation, function=selu): ...
class Softplus(Activation, function=softplus): ...
class Softsign(Activation, function=softsign): ...
class Softshrink(Activation, function=softshrink): ...
class HardShrink(Activation, function=hard_shrink): ...
class HardTanh(Activation, function=hard_tanh): ...
class Hardswish(Activation, function=hardswish): ...
class Step(Activation, function=step): ...
class SiLU(Activation, function=silu): ...
class Mish(Activation, function=mish): ...
class GLU(Activation, function=glu): ...
class Softmax(Activation, function=softmax): ...
class Softmin(Activation, function=softmin): ...
class LogSoftmax(Activation, function=log_softmax): ...
class LogSigmoid(Activation, function=log_sigmoid): ...


class GELU(Module):
    """GELU: exact (approx "none"), through tanh ("precise" or "tanh"), or through the logistic function ("fast")."""

    KINDS = dict(none=gelu, precise=gelu_approx, tanh=gelu_approx, fast=gelu_fast_approx)

    def __init__(self, approx: str = "none"):
        if approx not in self.KINDS:
            raise ValueError(f"[GELU] approx is {approx!r}, wanted one of {', '.join(self.KINDS)}")
        self._approx = approx

    def __call__(self, x: mx.Array) -> mx.Array:
        return self.KINDS[self._approx](x)


class PReLU(Module):
    """max(0, x) + weight · min(0, x), the weight of num_parameters (1, or one a channel) learned."""

    def __init__(self, num_parameters: int = 1, init: float = 0.25):
        self.weight = mx.full((num_parameters,), init)

    def __call__(self, x: mx.Array) -> mx.Array:
        return prelu(x, self.weight)

"""Dropout, and the container that runs layers in a row."""
from __future__ import annotations

from collections.abc import Callable

from .. import array as mx
from .module import Module

__all__ = ["Dropout", "Dropout2d", "Dropout3d", "Sequential"]


class Dropout(Module):
    """In training each element is 0 with probability p, and the others are divided by 1 − p."""

    spatial = 0  # axes before the channels that share a fate

    def __init__(self, p: float = 0.5):
        if not 0 <= p < 1:
            raise ValueError(f"[{type(self).__name__}] p is {p}: at least 0 and below 1 wanted")
        self.p = p

    def _extra_repr(self) -> str:
        return f"p={self.p}"

    def __call__(self, x: mx.Array) -> mx.Array:
        if self.spatial and x.ndim not in (self.spatial + 1, self.spatial + 2):
            raise ValueError(f"[{type(self).__name__}] {x.shape}: {self.spatial} axes before the channels wanted")
        if self.p == 0 or not self.training:
            return x
        lead = x.ndim - 1 - self.spatial
        shape = (*x.shape[:lead], *(1,) * self.spatial, x.shape[-1]) if self.spatial else x.shape
        return mx.random.bernoulli(1 - self.p, shape) * x * (1 / (1 - self.p))


class Dropout2d(Dropout):
    """Dropout of whole channels of x (N, H, W, C) or (H, W, C)."""

    spatial = 2


class Dropout3d(Dropout):
    """Dropout of whole channels of x (N, D, H, W, C) or (D, H, W, C)."""

    spatial = 3


class Sequential(Module):
    """Layers, or functions, in a row."""

    def __init__(self, *modules: Callable[[mx.Array], mx.Array]):
        self.layers = list(modules)

    def __call__(self, x: mx.Array) -> mx.Array:
        for layer in self.layers:
            x = layer(x)
        return x

"""Normalizations over the last axis."""
from __future__ import annotations

from .. import array as mx
from .module import Module


class RMSNorm(Module):
    """x / sqrt(mean(x²) + eps) · weight, for x (…, C)."""

    def __init__(self, dims: int, eps: float = 1e-5):
        self.weight, self.eps = mx.ones((dims,)), eps

    def __call__(self, x: mx.Array) -> mx.Array:
        return mx.fast.rms_norm(x, self.weight, self.eps)


class LayerNorm(Module):
    """(x − mean) / sqrt(var + eps) · weight + bias, for x (…, C)."""

    def __init__(self, dims: int, eps: float = 1e-5):
        self.weight, self.bias, self.eps = mx.ones((dims,)), mx.zeros((dims,)), eps

    def __call__(self, x: mx.Array) -> mx.Array:
        return mx.fast.layer_norm(x, self.weight, self.bias, self.eps)

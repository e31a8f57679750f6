"""Activations, by the names that configs use for them."""
from __future__ import annotations

from .. import array as mx


def silu(x: mx.Array) -> mx.Array:
    """x · sigmoid(x)"""
    return mx.silu(x)


def gelu(x: mx.Array) -> mx.Array:
    """x · Φ(x)"""
    return mx.gelu(x)


def gelu_approx(x: mx.Array) -> mx.Array:
    """GELU through tanh, as GPT-2 and Gemma use it."""
    return mx.gelu_tanh(x)

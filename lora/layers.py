"""A linear layer with a low-rank product beside it. Hu et al. 2021, https://arxiv.org/abs/2106.09685"""
from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..engine import array as mx
from ..engine import nn


def is_linear(module: Any) -> bool:
    """Whether a module is x (…, in) to (…, out) by a matrix, quantized or not."""
    return isinstance(module, nn.Linear | nn.QuantizedLinear)


def sizes(linear: Any) -> tuple[int, int]:
    """(out, in)"""
    rows, columns = linear._sizes() if hasattr(linear, "_sizes") else linear.weight.shape
    return int(rows), int(columns)


def dense(linear: Any) -> mx.Array:
    """The layer's matrix (out, in) in float32."""
    if not hasattr(linear, "scales"):
        return linear.weight.astype(mx.float32)
    if hasattr(linear, "dequantized"):
        return linear.dequantized()
    sides = linear.scales.astype(mx.float32), linear.biases.astype(mx.float32)
    return mx.dequantize(linear.weight, *sides, linear.group_size, linear.bits)


class LoRALinear(nn.Module):
    """y = linear(x) + scale · dropout(x) A B: lora_a (in, r), lora_b (r, out), float32. The names are mlx-lm's.

    A is uniform in ±1/√in and B is 0, as in PEFT and mlx-lm, so that a new adapter changes nothing.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float = 0.0):
        rows, columns = sizes(linear)
        bound = 1 / math.sqrt(columns)
        self.linear, self.scale, self.dropout = linear, scale, dropout
        self.lora_a = mx.random.uniform(-bound, bound, (columns, rank))
        self.lora_b = mx.zeros((rank, rows))

    @property
    def rank(self) -> int:
        return int(self.lora_a.shape[1])

    def _extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"

    def __call__(self, x: mx.Array) -> mx.Array:
        seen = x
        if self.dropout and self.training:
            kept = mx.random.bernoulli(1 - self.dropout, x.shape)
            seen = mx.where(kept, x / (1 - self.dropout), 0.0)
        return self.linear(x) + (self.scale * (seen @ self.lora_a)) @ self.lora_b

    def delta(self) -> mx.Array:
        """scale · (A B)ᵀ (out, in): what the adapter adds to the layer's matrix."""
        return self.scale * (self.lora_a @ self.lora_b).T


def adapted(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers by path."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, LoRALinear))

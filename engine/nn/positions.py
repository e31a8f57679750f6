"""What tells attention where a token is."""
from __future__ import annotations

import math

from .. import array as mx
from .module import Module

__all__ = ["ALiBi", "RoPE", "SinusoidalPositionalEncoding"]


class RoPE(Module):
    """Rotates pairs of the first `dims` channels of x (…, T, D) by scale · (offset + t) · base^(−2i/dims), Su et al.
    2021, arxiv.org/abs/2104.09864. traditional: pairs are neighbours, else halves."""

    def __init__(self, dims: int, traditional: bool = False, base: float = 10000, scale: float = 1.0):
        self.dims, self.traditional, self.base, self.scale = dims, traditional, base, scale

    def _extra_repr(self) -> str:
        return f"{self.dims}, traditional={self.traditional}"

    def __call__(self, x: mx.Array, offset: int | mx.Array = 0) -> mx.Array:
        return mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=self.base, scale=self.scale, offset=offset)


class SinusoidalPositionalEncoding(Module):
    """Positions x (…) to (…, dims): sines and cosines of x at dims/2 frequencies, max_freq down to min_freq, times
    `scale` (sqrt(2/dims) where None), Vaswani et al. 2017, arxiv.org/abs/1706.03762"""

    def __init__(
        self, dims: int, min_freq: float = 0.0001, max_freq: float = 1, scale: float | None = None,
        cos_first: bool = False, full_turns: bool = False,
    ):
        if dims <= 0 or dims % 2:
            raise ValueError(f"[SinusoidalPositionalEncoding] dims is {dims}: positive and even wanted")
        falling = 1 - mx.arange(dims // 2) / max(dims // 2 - 1, 1)
        low, high = math.log(min_freq), math.log(max_freq)
        self._frequencies = mx.exp(falling * (high - low) + low) * (2 * math.pi if full_turns else 1)
        self.scale, self.cos_first = math.sqrt(2 / dims) if scale is None else scale, cos_first

    def __call__(self, x: mx.Array) -> mx.Array:
        angle = mx.expand_dims(x, -1) * self._frequencies
        parts = [mx.cos(angle), mx.sin(angle)]
        return mx.concatenate(parts if self.cos_first else parts[::-1], -1) * self.scale


class ALiBi(Module):
    """Adds −slope · distance to attention scores (N, H, T, S), a slope for each head, Press et al. 2021,
    arxiv.org/abs/2108.12409"""

    @staticmethod
    def create_alibi_matrix(
        q_sequence_length: int, k_sequence_length: int, num_heads: int, offset: int = 0, dtype: mx.Dtype = mx.float32
    ) -> mx.Array:
        """(1, H, T, S) for queries offset … q_sequence_length."""
        distance = mx.abs(mx.arange(offset, q_sequence_length).reshape(-1, 1) - mx.arange(k_sequence_length))
        return (-distance * ALiBi.create_alibi_slope(num_heads, dtype)).astype(dtype).reshape(
            1, num_heads, *distance.shape)

    @staticmethod
    def create_alibi_slope(num_heads: int, dtype: mx.Dtype = mx.float32) -> mx.Array:
        """(H, 1, 1)"""
        def slopes(heads: int) -> list[float]:
            whole = 1 << heads.bit_length() - 1
            powers = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
            return powers if whole == heads else powers + slopes(2 * whole)[::2][:heads - whole]

        return mx.array(slopes(num_heads), dtype).reshape(-1, 1, 1)

    def __call__(self, attention_scores: mx.Array, offset: int = 0, mask: mx.Array | None = None) -> mx.Array:
        _, heads, queries, keys = attention_scores.shape
        bias = self.create_alibi_matrix(queries + offset, keys, heads, offset, attention_scores.dtype)
        return attention_scores + (bias if mask is None else bias + mask)

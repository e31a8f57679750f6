"""Attention over batches (N, T, C) and the encoder and decoder of Vaswani et al. 2017, arxiv.org/abs/1706.03762

`attention.py` has the attention over pages that generation uses.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import array as mx
from .activations import relu
from .dropout import Dropout
from .linear import Linear
from .module import Module, checkpoint
from .norm import LayerNorm

__all__ = [
    "MultiHeadAttention", "Transformer", "TransformerDecoder", "TransformerDecoderLayer", "TransformerEncoder",
    "TransformerEncoderLayer",
]
Activation = Callable[[mx.Array], mx.Array]
Mask = mx.Array | str | None  # added to the scores where it is an array of floats; "causal"


class MultiHeadAttention(Module):
    """softmax(q kᵀ / sqrt(D) + mask) v in num_heads parts, with projections before and after."""

    def __init__(
        self, dims: int, num_heads: int, query_input_dims: int | None = None, key_input_dims: int | None = None,
        value_input_dims: int | None = None, value_dims: int | None = None, value_output_dims: int | None = None,
        bias: bool = False,
    ):
        if dims % num_heads:
            raise ValueError(f"[MultiHeadAttention] {dims} channels in {num_heads} heads: a multiple wanted")
        self.num_heads, value_dims = num_heads, value_dims or dims
        self.query_proj = Linear(query_input_dims or dims, dims, bias)
        self.key_proj = Linear(key_input_dims or dims, dims, bias)
        self.value_proj = Linear(value_input_dims or key_input_dims or dims, value_dims, bias)
        self.out_proj = Linear(value_dims, value_output_dims or dims, bias)

    def __call__(self, queries: mx.Array, keys: mx.Array, values: mx.Array, mask: Mask = None) -> mx.Array:
        q, k, v = (
            mx.unflatten(projection(x), -1, (self.num_heads, -1)).swapaxes(1, 2)
            for projection, x in ((self.query_proj, queries), (self.key_proj, keys), (self.value_proj, values)))
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=math.sqrt(1 / q.shape[-1]), mask=mask)
        return self.out_proj(y.swapaxes(1, 2).flatten(-2))

    @staticmethod
    def create_additive_causal_mask(N: int, dtype: mx.Dtype = mx.float32) -> mx.Array:
        """(N, N): 0 where a token may look, the smallest number of the dtype elsewhere."""
        return mx.triu(mx.full((N, N), mx.finfo(dtype).min, dtype), 1)


class _Layer(Module):
    """Sublayers with a norm before (norm_first) or after, beside a residual. Norms are ln1, ln2, …"""

    sublayers: int

    def __init__(
        self, dims: int, num_heads: int, mlp_dims: int | None = None, dropout: float = 0.0,
        activation: Activation = relu, norm_first: bool = True,
    ):
        self._attentions(dims, num_heads)
        for i in range(1, self.sublayers + 1):
            setattr(self, f"ln{i}", LayerNorm(dims))
        self.linear1, self.linear2 = Linear(dims, mlp_dims or 4 * dims), Linear(mlp_dims or 4 * dims, dims)
        for i in range(1, self.sublayers + 1):
            setattr(self, f"dropout{i}", Dropout(dropout))
        self.activation, self.norm_first = activation, norm_first

    def _attentions(self, dims: int, num_heads: int) -> None:
        raise NotImplementedError

    def _beside(self, x: mx.Array, norm: Module, sublayer: Callable[[mx.Array], mx.Array]) -> mx.Array:
        return x + sublayer(norm(x)) if self.norm_first else norm(x + sublayer(x))

    def _mlp(self, x: mx.Array, dropout: Dropout) -> mx.Array:
        return self.linear2(dropout(self.activation(self.linear1(x))))


class TransformerEncoderLayer(_Layer):
    """Self-attention and MLP of x (N, T, C)."""

    sublayers = 2

    def _attentions(self, dims: int, num_heads: int) -> None:
        self.attention = MultiHeadAttention(dims, num_heads)

    def __call__(self, x: mx.Array, mask: Mask) -> mx.Array:
        x = self._beside(x, self.ln1, lambda y: self.dropout1(self.attention(y, y, y, mask)))
        return self._beside(x, self.ln2, lambda y: self._mlp(y, self.dropout2))


class TransformerDecoderLayer(_Layer):
    """Self-attention of x (N, T, C), attention to memory (N, S, C), and MLP."""

    sublayers = 3

    def _attentions(self, dims: int, num_heads: int) -> None:
        self.self_attention = MultiHeadAttention(dims, num_heads)
        self.cross_attention = MultiHeadAttention(dims, num_heads)

    def __call__(self, x: mx.Array, memory: mx.Array, x_mask: Mask, memory_mask: Mask) -> mx.Array:
        x = self._beside(x, self.ln1, lambda y: self.dropout1(self.self_attention(y, y, y, x_mask)))
        x = self._beside(
            x, self.ln2, lambda y: self.dropout2(self.cross_attention(y, memory, memory, memory_mask)))
        return self._beside(x, self.ln3, lambda y: self._mlp(y, self.dropout3))


class _Stack(Module):
    """num_layers layers and a norm. checkpoint: what is inside layers is computed again for the gradient."""

    layer: type[_Layer]

    def __init__(
        self, num_layers: int, dims: int, num_heads: int, mlp_dims: int | None = None, dropout: float = 0.0,
        activation: Activation = relu, norm_first: bool = True, checkpoint: bool = False,
    ):
        self.layers = [
            self.layer(dims, num_heads, mlp_dims, dropout, activation, norm_first) for _ in range(num_layers)]
        self.ln, self.checkpoint = LayerNorm(dims), checkpoint

    def __call__(self, x: mx.Array, *rest: Any, **named: Any) -> mx.Array:
        for layer in self.layers:
            x = (checkpoint(layer) if self.checkpoint else layer)(x, *rest, **named)
        return self.ln(x)


class TransformerEncoder(_Stack):
    """(x, mask): x (N, T, C) through layers of self-attention."""

    layer = TransformerEncoderLayer


class TransformerDecoder(_Stack):
    """(x, memory, x_mask, memory_mask): x (N, T, C) through layers that attend to x and to memory (N, S, C)."""

    layer = TransformerDecoderLayer


class Transformer(Module):
    """Encoder of src (N, S, C) and decoder of tgt (N, T, C)."""

    def __init__(
        self, dims: int = 512, num_heads: int = 8, num_encoder_layers: int = 6, num_decoder_layers: int = 6,
        mlp_dims: int | None = None, dropout: float = 0.0, activation: Activation = relu,
        custom_encoder: Any = None, custom_decoder: Any = None, norm_first: bool = True, checkpoint: bool = False,
    ):
        rest = dims, num_heads, mlp_dims, dropout, activation, norm_first, checkpoint
        self.encoder = TransformerEncoder(num_encoder_layers, *rest) if custom_encoder is None else custom_encoder
        self.decoder = TransformerDecoder(num_decoder_layers, *rest) if custom_decoder is None else custom_decoder

    def __call__(
        self, src: mx.Array, tgt: mx.Array, src_mask: Mask, tgt_mask: Mask, memory_mask: Mask
    ) -> mx.Array:
        return self.decoder(tgt, self.encoder(src, src_mask), tgt_mask, memory_mask)

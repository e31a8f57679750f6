"""Linear layers and embeddings, plain and quantized. Weights are (out, in), as checkpoints store them."""
from __future__ import annotations

from .. import array as mx
from .module import Module


class Linear(Module):
    """y = x Wᵀ + bias, for x (…, in): weight (out, in), bias (out) or None."""

    bias: mx.Array | None

    def __init__(self, input_dims: int, output_dims: int, bias: bool = True):
        self.weight = mx.zeros((output_dims, input_dims))  # lazy: no memory until used, and loading replaces it
        self.bias = mx.zeros((output_dims,)) if bias else None

    def __call__(self, x: mx.Array) -> mx.Array:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> QuantizedLinear:
        rows, columns = self.weight.shape
        new = QuantizedLinear(columns, rows, bias=False, group_size=group_size, bits=bits)
        new.weight, new.scales, new.biases = mx.quantize(self.weight, group_size, bits)
        new.bias = self.bias
        return new


class QuantizedLinear(Module):
    """Linear with w = scale·code + bias: codes (out, in·bits/32) uint32, scales and biases (out, in/group_size).

    `biases` are of the groups, `bias` is the layer's. The layout is MLX's.
    """

    bias: mx.Array | None

    def __init__(self, input_dims: int, output_dims: int, bias: bool = True, group_size: int = 64, bits: int = 4):
        self.group_size, self.bits = group_size, bits
        self.weight, self.scales, self.biases = _empty(output_dims, input_dims, group_size, bits)
        self.bias = mx.zeros((output_dims,)) if bias else None

    def __call__(self, x: mx.Array) -> mx.Array:
        y = _matmul(self, x)
        return y if self.bias is None else y + self.bias


class Embedding(Module):
    """Rows of a table weight (V, C): tokens (T) to (T, C) in the weight's dtype."""

    def __init__(self, num_embeddings: int, dims: int):
        self.weight = mx.zeros((num_embeddings, dims))

    def __call__(self, tokens: mx.Array) -> mx.Array:
        return mx.take(self.weight, tokens, axis=0)

    def as_linear(self, x: mx.Array) -> mx.Array:
        """The table as an output head, for models that tie the two: x (T, C) to (T, V)."""
        return x @ self.weight.T

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> QuantizedEmbedding:
        rows, columns = self.weight.shape
        new = QuantizedEmbedding(rows, columns, group_size=group_size, bits=bits)
        new.weight, new.scales, new.biases = mx.quantize(self.weight, group_size, bits)
        return new


class QuantizedEmbedding(Module):
    """Embedding whose table is quantized as in QuantizedLinear; rows come out float32."""

    def __init__(self, num_embeddings: int, dims: int, group_size: int = 64, bits: int = 4):
        self.group_size, self.bits = group_size, bits
        self.weight, self.scales, self.biases = _empty(num_embeddings, dims, group_size, bits)

    def __call__(self, tokens: mx.Array) -> mx.Array:
        return mx.quantized_take(self.weight, self.scales, self.biases, tokens, self.group_size, self.bits)

    def as_linear(self, x: mx.Array) -> mx.Array:
        """The table as an output head: x (T, C) to (T, V)."""
        return _matmul(self, x)


def _empty(rows: int, columns: int, group_size: int, bits: int) -> tuple[mx.Array, mx.Array, mx.Array]:
    groups = mx.zeros((rows, columns // group_size))
    return mx.zeros((rows, columns * bits // 32), dtype=mx.uint32), groups, groups


def _matmul(layer: QuantizedLinear | QuantizedEmbedding, x: mx.Array) -> mx.Array:
    return mx.quantized_matmul(
        x, layer.weight, layer.scales, layer.biases, transpose=True, group_size=layer.group_size, bits=layer.bits
    )

"""Linear layers and embeddings, plain and quantized. Weights are (out, in), as checkpoints store them."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

from .. import array as mx
from ..array.quantized import settings
from ..array.trees import tree_map_with_path
from .init import draw, to_be_loaded
from .module import Module

__all__ = ["Bilinear", "Embedding", "Identity", "Linear", "QuantizedEmbedding", "QuantizedLinear", "quantize"]


class Identity(Module):
    """x, whatever the arguments."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, x: mx.Array) -> mx.Array:
        return x


class Linear(Module):
    """y = x Wᵀ + bias, for x (…, in): weight (out, in), bias (out) or None."""

    bias: mx.Array | None

    def __init__(self, input_dims: int, output_dims: int, bias: bool = True):
        scale = math.sqrt(1 / input_dims)
        self.weight = draw((output_dims, input_dims), scale)
        self.bias = draw((output_dims,), scale) if bias else None

    def _extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"input_dims={columns}, output_dims={rows}, bias={self.bias is not None}"

    def __call__(self, x: mx.Array) -> mx.Array:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedLinear:
        return QuantizedLinear.from_linear(self, group_size, bits, mode)


class Bilinear(Module):
    """y[…, o] = x2[…, j] W[o, j, i] x1[…, i] + bias[o]: weight (out, in2, in1), bias (out) or None."""

    bias: mx.Array | None

    def __init__(self, input1_dims: int, input2_dims: int, output_dims: int, bias: bool = True):
        scale = math.sqrt(1 / input1_dims)
        self.weight = draw((output_dims, input2_dims, input1_dims), scale)
        self.bias = draw((output_dims,), scale) if bias else None

    def _extra_repr(self) -> str:
        rows, second, first = self.weight.shape
        return f"input1_dims={first}, input2_dims={second}, output_dims={rows}, bias={self.bias is not None}"

    def __call__(self, x1: mx.Array, x2: mx.Array) -> mx.Array:
        rows, second, first = self.weight.shape
        y = (x1 @ self.weight.reshape(-1, first).T).reshape(*x1.shape[:-1], rows, second)
        y = (y @ mx.expand_dims(x2, -1)).squeeze(-1)
        return y if self.bias is None else y + self.bias


class Embedding(Module):
    """Rows of a table weight (V, C): integer ids (…) to (…, C) in the weight's dtype."""

    def __init__(self, num_embeddings: int, dims: int):
        self.weight = draw((num_embeddings, dims), math.sqrt(1 / dims), "normal")

    def _extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)

    def __call__(self, x: mx.Array) -> mx.Array:
        return mx.take(self.weight, x, axis=0)

    def as_linear(self, x: mx.Array) -> mx.Array:
        """The table as an output head, for models that tie the two: x (…, C) to (…, V)."""
        return x @ self.weight.T

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedEmbedding:
        return QuantizedEmbedding.from_embedding(self, group_size, bits, mode)


class _Quantized(Module):
    """A matrix w = scale·code + bias: weight (rows, columns·bits/32) uint32 of packed codes, scales and biases
    (rows, columns/group_size). `biases` are of the groups, `bias` is the layer's; modes but affine have none. MLX's
    layout. All start frozen. order (columns) int32 or None: which inputs the columns of the codes belong to.
    """

    biases: mx.Array | None
    order: mx.Array | None

    @classmethod
    def _of(cls, layer: Module, group_size: int | None, bits: int | None, mode: str) -> Self:
        self = cls.__new__(cls)
        return self._take(layer, group_size, bits, mode)

    def _take(self, layer: Module, group_size: int | None, bits: int | None, mode: str) -> Self:
        self.group_size, self.bits = settings(type(self).__name__, group_size, bits, mode)
        self.mode, self.order = mode, None
        self.weight, self.scales, self.biases = codes(layer.weight, self.group_size, self.bits, mode)
        self._no_grad |= {"weight", "scales", "biases", "order"}
        return self

    def _sizes(self) -> tuple[int, int]:
        rows, words = self.weight.shape
        return rows, words * 32 // self.bits

    def _format(self) -> str:
        return f"group_size={self.group_size}, bits={self.bits}, mode={self.mode}"

    def as_linear(self, x: mx.Array) -> mx.Array:
        """x (…, columns) to (…, rows)."""
        x = x if self.order is None else mx.take(x, self.order, axis=-1)
        return mx.quantized_matmul(
            x, self.weight, self.scales, self.biases, transpose=True, group_size=self.group_size, bits=self.bits,
            mode=self.mode)

    def dequantized(self) -> mx.Array:
        """The matrix (rows, columns) in float32."""
        w = mx.dequantize(self.weight, self.scales, self.biases, self.group_size, self.bits, self.mode,
                          dtype=mx.float32)
        return w if self.order is None else mx.take(w, mx.argsort(self.order), axis=1)


class QuantizedLinear(_Quantized):
    """Linear with a quantized weight."""

    bias: mx.Array | None

    def __init__(
        self, input_dims: int, output_dims: int, bias: bool = True, group_size: int | None = None,
        bits: int | None = None, mode: str = "affine",
    ):
        self._take(Linear(input_dims, output_dims, bias=False), group_size, bits, mode).freeze(keys="bias")
        self.bias = mx.zeros((output_dims,)) if bias else None

    @classmethod
    def from_linear(
        cls, linear_layer: Module, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> Self:
        new = cls._of(linear_layer, group_size, bits, mode)
        new.bias = linear_layer.bias
        return new

    def _extra_repr(self) -> str:
        rows, columns = self._sizes()
        return f"input_dims={columns}, output_dims={rows}, bias={self.bias is not None}, {self._format()}"

    def __call__(self, x: mx.Array) -> mx.Array:
        y = self.as_linear(x)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(_Quantized):
    """Embedding with a quantized table; rows come out float32."""

    def __init__(
        self, num_embeddings: int, dims: int, group_size: int | None = None, bits: int | None = None,
        mode: str = "affine",
    ):
        self._take(Embedding(num_embeddings, dims), group_size, bits, mode)

    @classmethod
    def from_embedding(
        cls, embedding_layer: Module, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> Self:
        return cls._of(embedding_layer, group_size, bits, mode)

    def _extra_repr(self) -> str:
        return "{}, {}, {}".format(*self._sizes(), self._format())

    def __call__(self, x: mx.Array) -> mx.Array:
        return mx.quantized_take(self.weight, self.scales, self.biases, x, self.group_size, self.bits,
                                 self.mode)


def codes(weight: mx.Array, group_size: int, bits: int, mode: str) -> tuple[mx.Array, mx.Array, mx.Array | None]:
    """The quantized weight (…, columns): codes, scales, and biases or None. While a model is made to be loaded, arrays
    of these shapes."""
    if not to_be_loaded():
        made, scales, *biases = mx.quantize(weight, group_size, bits, mode)
        return made, scales, biases[0] if biases else None
    *lead, columns = weight.shape
    scales = mx.placeholder((*lead, columns // group_size), mx.float32)
    return mx.placeholder((*lead, columns * bits // 32), mx.uint32), scales, scales if mode == "affine" else None


def quantize(
    model: Module, group_size: int | None = None, bits: int | None = None, *, mode: str = "affine",
    class_predicate: Callable[[str, Module], bool | dict[str, Any]] | None = None,
) -> None:
    """Replaces, in place, the layers that have `to_quantized` by their quantized twins.

    class_predicate(path, module) says which: a bool, or a dict of arguments for `to_quantized`.
    """
    settings = {"group_size": group_size, "bits": bits, "mode": mode}
    predicate = class_predicate or (lambda path, module: hasattr(module, "to_quantized"))

    def edit(path: str, module: Module) -> Module:
        choice = predicate(path, module)
        if not choice:
            return module
        if not hasattr(module, "to_quantized"):
            raise ValueError(f"[quantize] {path}: a {type(module).__name__} has no quantized twin")
        return module.to_quantized(**(choice if isinstance(choice, dict) else settings))

    model.update_modules(tree_map_with_path(edit, model.leaf_modules(), is_leaf=Module.is_module))

"""Affine quantization, MLX's layout: codes packed along the last axis as a little-endian bit stream in uint32."""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import ops
from .array import Array
from .dtypes import float32, float64, uint32
from .fused import Given, Gradients, fused, match, require
from .node import Aval, Node, Shape, show
from .operands import broadcast_shapes
from .primitives import flat, unbroadcast

if TYPE_CHECKING:
    from .lowering import Lowering
    from .plan import View


def _packed(name: str, columns: int, group_size: int, bits: int) -> int:
    """The number of words that `columns` codes take."""
    if not 1 < bits <= 8 or columns % group_size or columns * bits % 32:
        raise ValueError(f"[{name}] {columns} columns, groups of {group_size}, {bits} bits: whole groups, whole words "
                         "of 32 bits, and 2 to 8 bits wanted")
    return columns * bits // 32


def _quantize_rule(given: Given, group_size: int, bits: int) -> list[Aval]:
    *lead, columns = given["w"].shape
    words = _packed("quantize", columns, group_size, bits)
    side = (*lead, columns // group_size), given["w"].dtype
    return [((*lead, words), uint32), side, side]


def _two_axes(view: View) -> View:
    return view.reshaped(flat(view.shape[:-1]), view.shape[-1])


def _lower_quantize(kernel: str) -> Callable[..., None]:
    def lower(lo: Lowering, node: Node, given: Given) -> None:
        views = [_two_axes(lo.result(v)) for v in node.values()], [_two_axes(lo.contiguous(v)) for v in given.values()]
        lo.step(kernel, *views, [node.params["bits"], node.params["group_size"]])

    return lower


def _kernel_bits(given: Given, bits: int, group_size: int, **_: Any) -> bool:
    return bits != 7 and group_size in (16, 32, 64, 128) and all(v.dtype is not float64 for v in given.values())


@fused("w", _quantize_rule, _lower_quantize("quantize"), _kernel_bits)
def quantize(w: Array, group_size: int = 64, bits: int = 4) -> tuple[Array, Array, Array]:
    """w (…, K) -> codes (…, K * bits / 32) uint32, scales and biases (…, K / group_size), by MLX's arithmetic: the edge
    of larger magnitude and 0 are exact; w = scale * code + bias."""
    top = (1 << bits) - 1
    x = ops.reshape(w.astype(float32), (*w.shape[:-1], -1, group_size))
    low, high = ops.min(x, -1, keepdims=True), ops.max(x, -1, keepdims=True)
    scale = ops.maximum((high - low) / top, 1e-7)
    side = ops.abs(low) > ops.abs(high)
    scale, edge = ops.where(side, scale, -scale), ops.where(side, low, high)
    zero = ops.round(edge / scale)
    scale = ops.where(zero == 0, scale, edge / ops.where(zero == 0, 1.0, zero))
    bias = ops.where(zero == 0, 0.0, edge)
    codes = ops.clip(ops.round((x - bias) / scale), 0.0, float(top)).astype(uint32)
    stream = ops.bitwise_and(ops.right_shift(ops.expand_dims(codes, -1), ops.arange(bits, dtype=uint32)), 1)
    words = ops.reshape(stream, (*w.shape[:-1], -1, 32))
    packed = ops.sum(ops.left_shift(words, ops.arange(32, dtype=uint32)), -1)
    return packed, ops.squeeze(scale, -1).astype(w.dtype), ops.squeeze(bias, -1).astype(w.dtype)


def _codes(w: Array, bits: int) -> Array:
    """Packed words (…, N) -> codes (…, N * 32 / bits) uint32."""
    stream = ops.bitwise_and(ops.right_shift(ops.expand_dims(w, -1), ops.arange(32, dtype=uint32)), 1)
    spaced = ops.reshape(stream, (*w.shape[:-1], -1, bits))
    return ops.sum(ops.left_shift(spaced, ops.arange(bits, dtype=uint32)), -1)


def _dequantized(name: str, given: Given, group_size: int, bits: int) -> Shape:
    """The shape of the matrix that is packed in w, scales, biases."""
    match(name, given, scales="... G", biases="... G")
    *lead, groups = given["scales"].shape
    words = _packed(name, groups * group_size, group_size, bits)
    require(name, given, uint32, "w")
    if given["w"].shape != (*lead, words):
        raise ValueError(f"[{name}] w {show(given['w'].shape)}: {show((*lead, words))} wanted for scales "
                         f"{show(given['scales'].shape)}, {bits} bits in groups of {group_size}")
    return (*lead, groups * group_size)


def _dequantize_rule(given: Given, group_size: int, bits: int) -> list[Aval]:
    return [(_dequantized("dequantize", given, group_size, bits), given["scales"].dtype)]


@fused("w scales biases", _dequantize_rule, _lower_quantize("dequantize"), _kernel_bits)
def dequantize(w: Array, scales: Array, biases: Array, group_size: int = 64, bits: int = 4) -> Array:
    """Codes (…, K * bits / 32), scales and biases (…, K / group_size) -> (…, K) of the scales' dtype."""
    codes = ops.reshape(_codes(w, bits), (*scales.shape, group_size))
    wide = codes * ops.expand_dims(scales.astype(float32), -1) + ops.expand_dims(biases.astype(float32), -1)
    return ops.reshape(wide, (*scales.shape[:-1], -1)).astype(scales.dtype)


def _quantized_matmul_rule(given: Given, transpose: bool, group_size: int, bits: int) -> list[Aval]:
    x, shape = given["x"], _dequantized("quantized_matmul", given, group_size, bits)
    n, k = shape[-2:] if transpose else shape[:-3:-1]
    if x.shape[-1] != k:
        raise ValueError(f"[quantized_matmul] x {show(x.shape)} @ w {show(shape)}{' transposed' if transpose else ''}: "
                         f"inner sizes {x.shape[-1]} and {k} differ")
    batch = broadcast_shapes(x.shape[:-2], shape[:-2], name="quantized_matmul")
    return [((*batch, *x.shape[-2:-1], n), x.dtype)]


def _quantized_matmul_vjp(cts: list[Array], given: dict[str, Array], ys: list[Array], transpose: bool,
                          **params: int) -> Gradients:
    x, *matrix = given.values()
    return {"x": unbroadcast(quantized_matmul(cts[0], *matrix, transpose=not transpose, **params), x.shape)}


@fused("x w scales biases", _quantized_matmul_rule, None, vjp=_quantized_matmul_vjp, rows=("x",))
def quantized_matmul(x: Array, w: Array, scales: Array, biases: Array, transpose: bool = True, group_size: int = 64,
                     bits: int = 4) -> Array:
    """x (…, K) @ dequantized wᵀ (N, K), or @ w (K, N) without transpose."""
    matrix = dequantize(w, scales, biases, group_size, bits)
    return (x @ (ops.swapaxes(matrix, -1, -2) if transpose else matrix).astype(x.dtype)).astype(x.dtype)


def _quantized_take_rule(given: Given, group_size: int, bits: int) -> list[Aval]:
    return [((*given["indices"].shape, *_dequantized("quantized_take", given, group_size, bits)[1:]), float32)]


def _lower_quantized_take(lo: Lowering, node: Node, given: Given) -> None:
    *table, index = (lo.contiguous(v) for v in given.values())
    out = lo.result(node.values()[0])
    rows_ = flat(index.shape)
    lo.step("quantized_take", [out.reshaped(rows_, out.shape[-1])], [*table, index.reshaped(rows_)],
            [node.params["bits"], node.params["group_size"]])


@fused("w scales biases indices", _quantized_take_rule, _lower_quantized_take)
def quantized_take(w: Array, scales: Array, biases: Array, indices: Array, group_size: int = 64,
                   bits: int = 4) -> Array:
    """Rows of a quantized matrix (N, K) at integer indices, float32."""
    codes, *sides = (ops.take(a, indices, 0) for a in (w, scales, biases))
    return dequantize(codes, *(s.astype(float32) for s in sides), group_size, bits)

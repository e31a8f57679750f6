"""Quantized matrices, MLX's layout: codes packed along the last axis as a little-endian bit stream in uint32, and for
each group of a row a scale and, in the mode "affine", a bias.

| mode | group | bits | weight = |
|---|---|---|---|
| affine | 32, 64, 128 | 1, 2, 3, 4, 5, 6, 8 | scale · code + bias, both in the weight's dtype |
| mxfp4, mxfp8 | 32 | 4, 8 | scale (uint8 e8m0, a power of two) · e2m1 or e4m3 |
| nvfp4 | 16 | 4 | scale (uint8 e4m3) · e2m1 |
| fp8 | 16, 32, 64, 128 | 8 | scale (a float dtype) · e4m3; not MLX's, for FP8 checkpoints |

Source: OCP Microscaling Formats (MX) v1.0; the quantizers are MLX's.
"""
from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from . import elementwise, ops
from .array import Array
from .dtypes import Dtype, bfloat16, float32, float64, uint8, uint32
from .fused import Given, Gradients, fused, match
from .ggml import E2M1
from .node import Aval, Dim, Node, Shape, show
from .operands import broadcast_shapes
from .primitives import flat, unbroadcast

if TYPE_CHECKING:
    from .lowering import Lowering
    from .plan import View

WIDTHS, GROUPS = (1, 2, 3, 4, 5, 6, 8), (16, 32, 64, 128)
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {   # groups and bits, the defaults first
    "affine": ((64, 16, 32, 128), (4, 1, 2, 3, 5, 6, 8)), "mxfp4": ((32,), (4,)), "nvfp4": ((16,), (4,)),
    "mxfp8": ((32,), (8,)), "fp8": ((128, 16, 32, 64), (8,)),
}
FLOATS = 16                          # kernels call formats by their bits, and 16 + bits if these are floats


def settings(name: str, group_size: int | None, bits: int | None, mode: str) -> tuple[int, int]:
    """The group size and bits of a mode, its defaults for None. Raises ValueError for what the mode does not have."""
    if mode not in MODES:
        raise ValueError(f"[{name}] mode {mode!r}: one of {', '.join(MODES)} wanted")
    groups, widths = MODES[mode]
    group_size, bits = group_size or groups[0], bits or widths[0]
    if mode != "affine" and (group_size not in groups or bits not in widths):
        raise ValueError(f"[{name}] {mode} with {bits} bits in groups of {group_size}: {widths} bits in groups of "
                         f"{groups} wanted")
    return group_size, bits


def mode_of(bits: float, group_size: float, scales: Dtype, biases: bool) -> str | None:
    """The mode of codes of so many bits with such scales, with or without biases; None if there is none. MLX's rule:
    what the arrays are says it, for configs have been wrong about it."""
    mode = ("affine" if biases else "fp8" if scales is not uint8 else "mxfp8" if bits == 8
            else "nvfp4" if group_size == 16 else "mxfp4")
    groups, widths = MODES[mode]
    return mode if group_size in groups and bits in widths and (scales is not uint8 or not biases) else None


def kernel_format(bits: int, given: Container[str]) -> int:
    return bits if "biases" in given else FLOATS + bits


def _packed(name: str, columns: int, group_size: int, bits: int) -> int:
    """The number of words that `columns` codes take."""
    if not 0 < bits <= 8 or columns % group_size or columns * bits % 32:
        raise ValueError(f"[{name}] {columns} columns, groups of {group_size}, {bits} bits: whole groups, whole words "
                         "of 32 bits, and 1 to 8 bits wanted")
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
        bits = node.params["bits"]
        format = bits if kernel == "quantize" else kernel_format(bits, given)
        lo.step(kernel, *views, [format, node.params["group_size"]])

    return lower


def _kernel_bits(given: Given, bits: int, group_size: int, **params: Any) -> bool:
    dtypes = {v.dtype for v in given.values()} | {params.get("dtype")}
    return bits in WIDTHS and group_size in GROUPS and float64 not in dtypes


def _grouped(w: Array, group_size: int) -> Array:
    """(…, K) to (…, K / group_size, group_size) float32"""
    return ops.reshape(w.astype(float32), (*w.shape[:-1], -1, group_size))


def _words(codes: Array, bits: int) -> Array:
    """Codes (…, groups, group) uint32 to packed words."""
    stream = ops.bitwise_and(ops.right_shift(ops.expand_dims(codes, -1), ops.arange(bits, dtype=uint32)), 1)
    words = ops.reshape(stream, (*codes.shape[:-2], -1, 32))
    return ops.sum(ops.left_shift(words, ops.arange(32, dtype=uint32)), -1)


@fused("w", _quantize_rule, _lower_quantize("quantize"), _kernel_bits, kernel="quantize")
def _quantize(w: Array, group_size: int, bits: int) -> tuple[Array, Array, Array]:
    """The edge of larger magnitude and 0 are exact."""
    top = (1 << bits) - 1
    x = _grouped(w, group_size)
    low, high = ops.min(x, -1, keepdims=True), ops.max(x, -1, keepdims=True)
    size = ops.maximum((high - low) / top, 1e-7)
    side = ops.abs(low) > ops.abs(high)
    scale, edge = ops.where(side, size, -size), ops.where(side, low, high)
    zero = ops.round(edge / scale)
    scale = ops.where(zero == 0, scale, edge / ops.where(zero == 0, 1.0, zero))
    bias = ops.where(zero == 0, 0.0, edge)
    if bits == 1:
        scale, bias = size, low
    codes = ops.clip(ops.round((x - bias) / scale), 0.0, float(top)).astype(uint32)
    return _words(codes, bits), ops.squeeze(scale, -1).astype(w.dtype), ops.squeeze(bias, -1).astype(w.dtype)


def _quantize_floats(w: Array, group_size: int, bits: int) -> tuple[Array, Array]:
    """w (…, K) to e2m1 or e4m3 and scales uint8, as MLX rounds: e8m0 scales up, so that nothing is clipped."""
    _packed("quantize", w.shape[-1], group_size, bits)
    x = _grouped(w, group_size)
    most = ops.max(ops.abs(x), -1, keepdims=True) / (6.0 if bits == 4 else 448.0)
    if group_size == 16:
        scales = elementwise.to_fp8(most)
    else:
        exponent = ops.ceil(ops.log2(most))
        scales = ops.where(most > 0, ops.clip(exponent + 127, 0, 254), 127).astype(uint8)
    size = _factors(scales, group_size)
    x = x / ops.where(size == 0, 1.0, size)
    codes = elementwise.to_fp8(x) if bits == 8 else _to_fp4(x)
    return _words(codes.astype(uint32), bits), ops.squeeze(scales, -1)


def _to_fp4(x: Array) -> Array:
    """The nearest e2m1, of two as near the smaller one; no negative zero."""
    middles = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
    code = sum(((ops.abs(x) > middle).astype(uint8) for middle in middles), ops.zeros(x.shape, uint8))
    return ops.where(ops.logical_and(x < 0, code > 0), code + 8, code)


def quantize(w: Array, group_size: int | None = None, bits: int | None = None, mode: str = "affine", *,
             global_scale: Array | None = None) -> tuple[Array, ...]:
    """w (…, K) -> codes (…, K * bits / 32) uint32 and scales (…, K / group_size); affine: biases too, of w's dtype, by
    MLX's arithmetic: the edge of larger magnitude and 0 are exact. The table above has the modes. global_scale: the
    largest magnitude that nvfp4's scales are relative to."""
    group_size, bits = settings("quantize", group_size, bits, mode)
    if mode == "affine":
        return _quantize(w, group_size, bits)
    if mode == "fp8":
        raise ValueError("[quantize] mode 'fp8' is read, not made: mxfp8 is its like")
    return _quantize_floats(w if global_scale is None else w * _nv_factor(mode, global_scale, True), group_size, bits)


def _codes(w: Array, bits: int) -> Array:
    """Packed words (…, N) -> codes (…, N * 32 / bits) uint32."""
    stream = ops.bitwise_and(ops.right_shift(ops.expand_dims(w, -1), ops.arange(32, dtype=uint32)), 1)
    spaced = ops.reshape(stream, (*w.shape[:-1], -1, bits))
    return ops.sum(ops.left_shift(spaced, ops.arange(bits, dtype=uint32)), -1)


def _factors(scales: Array, group_size: int) -> Array:
    """Scales as float32: those of a float dtype are themselves, uint8 in groups of 16 e4m3, other uint8 e8m0."""
    if scales.dtype is not uint8:
        return scales.astype(float32)
    if group_size == 16:
        return elementwise.from_fp8(scales, float32)
    with np.errstate(over="ignore"):
        return ops.take(Array(np.ldexp(np.float32(1), np.arange(256) - 127)), scales, 0)


def _nv_factor(mode: str, global_scale: Array, quantize: bool = False) -> Array:
    if mode != "nvfp4":
        raise ValueError(f"[quantize] global_scale with mode {mode!r}: nvfp4 wanted")
    most = 6.0 * 448.0
    return most / global_scale if quantize else global_scale / most


def _dequantized(name: str, given: Given, group_size: int, bits: int) -> Shape:
    """The shape of the matrix that is packed in w, scales and, if there are, biases."""
    match(name, given, scales="... G", biases="... G")
    *lead, groups = given["scales"].shape
    words = _packed(name, groups * group_size, group_size, bits)
    scales = given["scales"].dtype
    if "biases" not in given and mode_of(bits, group_size, scales, False) is None:
        raise ValueError(f"[{name}] {bits} bits in groups of {group_size}, scales {scales} without biases are no mode")
    if given["w"].dtype is not uint32 or given["w"].shape != (*lead, words):
        raise ValueError(f"[{name}] w {given['w'].dtype}{show(given['w'].shape)}: uint32{show((*lead, words))} wanted "
                         f"for scales {show(given['scales'].shape)}, {bits} bits in groups of {group_size}")
    return (*lead, groups * group_size)


def _dequantize_rule(given: Given, group_size: int, bits: int, dtype: Dtype) -> list[Aval]:
    return [(_dequantized("dequantize", given, group_size, bits), dtype)]


@fused("w scales biases", _dequantize_rule, _lower_quantize("dequantize"), _kernel_bits, kernel="dequantize")
def _dequantize(w: Array, scales: Array, biases: Array | None, group_size: int, bits: int, dtype: Dtype) -> Array:
    codes = ops.reshape(_codes(w, bits), (*scales.shape, group_size))
    scale = ops.expand_dims(_factors(scales, group_size), -1)
    if biases is not None:
        wide = codes * scale + ops.expand_dims(biases.astype(float32), -1)
    else:
        wide = (ops.take(Array(E2M1), codes, 0) if bits == 4 else elementwise.from_fp8(codes, float32)) * scale
    return ops.reshape(wide, (*scales.shape[:-1], -1)).astype(dtype)


def parts(name: str, scales: Array, biases: Array | None, group_size: int | None, bits: int | None,
          mode: str) -> tuple[int, int]:
    """The group size and bits of the arrays of a mode."""
    group_size, bits = settings(name, group_size, bits, mode)
    if (biases is None) != (mode != "affine"):
        raise ValueError(f"[{name}] mode {mode!r} with{'out' if biases is None else ''} biases: affine has biases, no "
                         "other mode has")
    return group_size, bits


def dequantize(w: Array, scales: Array, biases: Array | None = None, group_size: int | None = None,
               bits: int | None = None, mode: str = "affine", global_scale: Array | None = None,
               dtype: Dtype | None = None) -> Array:
    """Codes (…, K * bits / 32), scales and biases (…, K / group_size) -> (…, K) of `dtype`: by default the scales' if
    they are floats, else bfloat16."""
    group_size, bits = parts("dequantize", scales, biases, group_size, bits, mode)
    dtype = dtype or (bfloat16 if scales.dtype is uint8 else scales.dtype)
    if global_scale is None:
        return _dequantize(w, scales, biases, group_size, bits, dtype)
    return (_dequantize(w, scales, biases, group_size, bits, float32) * _nv_factor(mode, global_scale)).astype(dtype)


class _Precision(threading.local):
    on = False


_PRECISION = _Precision()


def is_precise() -> bool:
    return _PRECISION.on


@contextmanager
def precise() -> Iterator[None]:
    """Quantized products that are built inside, and their gradients, are exact to float32. The others are as fast as
    the machine can: activations in 8 bits a group or bfloat16 forwards, bfloat16 backwards, sums in float32."""
    before, _PRECISION.on = _PRECISION.on, True
    try:
        yield
    finally:
        _PRECISION.on = before


def _quantized_matmul_rule(given: Given, transpose: bool, group_size: int, bits: int, precise: bool) -> list[Aval]:
    x, shape = given["x"], _dequantized("quantized_matmul", given, group_size, bits)
    n, k = shape[-2:] if transpose else shape[:-3:-1]
    if x.shape[-1] != k:
        raise ValueError(f"[quantized_matmul] x {show(x.shape)} @ w {show(shape)}{' transposed' if transpose else ''}: "
                         f"inner sizes {x.shape[-1]} and {k} differ")
    batch = broadcast_shapes(x.shape[:-2], shape[:-2], name="quantized_matmul")
    return [((*batch, *x.shape[-2:-1], n), x.dtype)]


def _quantized_matmul_vjp(cts: list[Array], given: dict[str, Array], ys: list[Array], transpose: bool,
                          **params: Any) -> Gradients:
    matrix = {name: given.get(name) for name in ("w", "scales", "biases")}
    x = _quantized_matmul(cts[0], **matrix, transpose=not transpose, **params)
    return {"x": unbroadcast(x, given["x"].shape)}


def _lower_quantized_matmul(lo: Lowering, node: Node, given: Given) -> None:
    p, [y] = node.params, node.values()
    x, *codes = (lo.contiguous(v) for v in given.values())
    ints = [kernel_format(p["bits"], given), p["group_size"], int(p["transpose"]), int(not p["precise"])]
    lo.step("quantized_matmul", [_two_axes(lo.result(y))], [_two_axes(x), *codes], ints)


def _kernel_quantized_matmul(given: Given, **params: Any) -> bool:
    x, w = given["x"], given["w"]
    flat_ = len(x.shape) == 2 or len(x.shape) > 2 and not any(isinstance(s, Dim) for s in x.shape)
    return flat_ and x.dtype is float32 and len(w.shape) == 2 and _kernel_bits(given, **params)


@fused("x w scales biases", _quantized_matmul_rule, _lower_quantized_matmul, _kernel_quantized_matmul,
       kernel="quantized_matmul", vjp=_quantized_matmul_vjp, rows=("x",))
def _quantized_matmul(x: Array, w: Array, scales: Array, biases: Array | None, transpose: bool, group_size: int,
                      bits: int, precise: bool) -> Array:
    matrix = _dequantize(w, scales, biases, group_size, bits, x.dtype)
    return x @ (ops.swapaxes(matrix, -1, -2) if transpose else matrix)


def quantized_matmul(x: Array, w: Array, scales: Array, biases: Array | None = None, transpose: bool = True,
                     group_size: int | None = None, bits: int | None = None, mode: str = "affine") -> Array:
    """x (…, K) @ dequantized wᵀ (N, K), as `precise` says, or @ w (K, N) without transpose, in float32."""
    group_size, bits = parts("quantized_matmul", scales, biases, group_size, bits, mode)
    return _quantized_matmul(x, w, scales, biases, transpose, group_size, bits, is_precise() or not transpose)


def qqmm(x: Array, w: Array, scales: Array | None = None, group_size: int | None = None, bits: int | None = None,
         mode: str = "nvfp4", global_scale_x: Array | None = None, global_scale_w: Array | None = None) -> Array:
    """x (…, K) @ wᵀ, both quantized in the mode nvfp4 or mxfp8: x on the fly, w (N, K) too unless it has scales."""
    if mode not in ("nvfp4", "mxfp8"):
        raise ValueError(f"[qqmm] mode {mode!r}: nvfp4 or mxfp8 wanted")

    def rounded(a: Array, global_scale: Array | None) -> Array:
        codes, scales = quantize(a, group_size, bits, mode, global_scale=global_scale)
        return dequantize(codes, scales, None, group_size, bits, mode, global_scale, float32)

    matrix = (rounded(w, global_scale_w) if scales is None
              else dequantize(w, scales, None, group_size, bits, mode, global_scale_w, float32))
    return (rounded(x, global_scale_x) @ ops.swapaxes(matrix, -1, -2)).astype(x.dtype)


def _quantized_take_rule(given: Given, group_size: int, bits: int) -> list[Aval]:
    return [((*given["indices"].shape, *_dequantized("quantized_take", given, group_size, bits)[1:]), float32)]


def _lower_quantized_take(lo: Lowering, node: Node, given: Given) -> None:
    *table, index = (lo.contiguous(v) for v in given.values())
    out = lo.result(node.values()[0])
    rows_ = flat(index.shape)
    lo.step("quantized_take", [out.reshaped(rows_, out.shape[-1])], [*table, index.reshaped(rows_)],
            [kernel_format(node.params["bits"], given), node.params["group_size"]])


@fused("w scales biases indices", _quantized_take_rule, _lower_quantized_take, kernel="quantized_take")
def _quantized_take(w: Array, scales: Array, biases: Array | None, indices: Array, group_size: int, bits: int) -> Array:
    codes, *sides = (ops.take(a, indices, 0) for a in (w, scales, biases) if a is not None)
    return _dequantize(codes, *(*sides, None)[:2], group_size, bits, float32)


def quantized_take(w: Array, scales: Array, biases: Array | None, indices: Array, group_size: int | None = None,
                   bits: int | None = None, mode: str = "affine") -> Array:
    """Rows of a quantized matrix (N, K) at integer indices, float32."""
    group_size, bits = parts("quantized_take", scales, biases, group_size, bits, mode)
    return _quantized_take(w, scales, biases, indices, group_size, bits)

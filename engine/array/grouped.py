"""Products of many matrices: gathered by index (experts), by segments, by blocks; and the Hadamard transform."""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from . import ops
from .array import Array
from .dtypes import Dtype, bool_, float32, float64, int32, promote
from .fused import Given, fused
from .node import Aval, Node, Shape, show
from .operands import array_of, broadcast_shapes
from .primitives import size_of
from .quantized import _dequantize, dequantize, kernel_format, parts

if TYPE_CHECKING:
    from .lowering import Lowering

__all__ = ["block_masked_mm", "gather_mm", "gather_qmm", "hadamard_transform", "segmented_mm"]


# gathered matrices: inputs have one batch axis, indices one axis

def _gather_rule(given: Given, group_size: int, bits: int) -> list[Aval]:
    a, b, side = given["a"], given["b"], given.get("scales")
    columns = b.shape[2] if side is None else b.shape[1]
    return [((given["lhs"].shape[0], a.shape[1], columns), float64 if a.dtype is float64 else float32)]


def _lower_gather(lo: Lowering, node: Node, given: Given) -> None:
    views = [lo.view(v) if name == "b" and "scales" not in given else lo.contiguous(v) for name, v in given.items()]
    lo.step("gather_mm", [lo.result(node.values()[0])], views, [
        kernel_format(node.params["bits"], given) if "scales" in given else 0, node.params["group_size"]])


def _kernel_takes(given: Given, group_size: int, bits: int, **_: Any) -> bool:
    return given["a"].dtype is not float64 and group_size in (0, 16, 32, 64, 128)


@fused("a b scales biases lhs rhs", _gather_rule, _lower_gather, _kernel_takes, kernel="gather_mm")
def _gathered(a: Array, b: Array, scales: Array | None, biases: Array | None, lhs: Array, rhs: Array,
              group_size: int = 0, bits: int = 0) -> Array:
    """a (A, M, K) at lhs (R) times b (B, K, N) at rhs (R), or times quantized (B, N, K) transposed -> (R, M, N)."""
    wide = float64 if a.dtype is float64 else float32
    b, *sides = [ops.take(part, rhs, 0) for part in (b, scales, biases) if part is not None]
    matrix = ops.swapaxes(_dequantize(b, *(*sides, None)[:2], group_size, bits, wide), 1, 2) if bits else b
    return ops.take(a, lhs, 0).astype(wide) @ matrix.astype(wide)


def _matrices(name: str, a: Array) -> Array:
    if a.ndim < 2:
        raise ValueError(f"[{name}] {show(a.shape)}: matrices wanted")
    return ops.reshape(a, (size_of(a.shape[:-2]), *a.shape[-2:]))


def _indices(name: str, given: Array | None, batch: Shape) -> Array:
    indices = ops.reshape(ops.arange(size_of(batch)), batch) if given is None else array_of(given)
    if indices.dtype.kind not in "iu":
        raise ValueError(f"[{name}] indices {indices.dtype}{show(indices.shape)}: integers wanted")
    return ops.astype(indices, int32)


def _gather(name: str, a: Array, b: Array, sides: tuple[Array | None, Array | None], lhs: Array | None,
            rhs: Array | None, dtype: Dtype, **params: int) -> Array:
    left, right = _indices(name, lhs, a.shape[:-2]), _indices(name, rhs, b.shape[:-2])
    shape = broadcast_shapes(left.shape, right.shape, name=name)
    flat = [ops.reshape(ops.broadcast_to(i, shape), (-1,)) for i in (left, right)]
    matrices = [None if m is None else _matrices(name, m) for m in (a, b, *sides)]
    out = _gathered(*matrices, *flat, **params)
    return ops.reshape(out, (*shape, *out.shape[1:])).astype(dtype)


def gather_mm(a: Any, b: Any, lhs_indices: Array | None = None, rhs_indices: Array | None = None, *,
              sorted_indices: bool = False) -> Array:
    """Matrices of a (…, M, K) at lhs_indices times those of b (…, K, N) at rhs_indices, which count the matrices in
    order and broadcast -> (indices …, M, N). Products with the same matrix of b are one product; sorted_indices is
    accepted as in MLX, but not needed."""
    a, b = array_of(a), array_of(b)
    dtype = promote(a.dtype, b.dtype)
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2] or dtype.kind != "f":
        raise ValueError(f"[gather_mm] a {a.dtype}{show(a.shape)}, b {b.dtype}{show(b.shape)}: floats (…, M, K) and "
                         "(…, K, N) wanted")
    a, b = (ops.astype(x, float64) if dtype is float64 else x for x in (a, b))
    return _gather("gather_mm", a, b, (None, None), lhs_indices, rhs_indices, dtype)


def gather_qmm(x: Any, w: Array, scales: Array, biases: Array | None = None, lhs_indices: Array | None = None,
               rhs_indices: Array | None = None, transpose: bool = True, group_size: int | None = None,
               bits: int | None = None, mode: str = "affine", global_scale: Array | None = None, *,
               sorted_indices: bool = False) -> Array:
    """As gather_mm for matrices that mx.quantize packed: x (…, M, K) times the transposes of w (…, N, K), or times
    w (…, K, N) without transpose. global_scale is refused, as by MLX on the CPU."""
    x = array_of(x)
    group_size, bits = parts("gather_qmm", scales, biases, group_size, bits, mode)
    if global_scale is not None:
        raise ValueError("[gather_qmm] global_scale is not supported: multiply the result by it")
    inner = (scales.shape[-1] * group_size, w.shape[-2])[not transpose]
    if x.ndim < 2 or x.shape[-1] != inner:
        raise ValueError(f"[gather_qmm] x {show(x.shape)}: (…, M, {inner}) wanted")
    if transpose:
        return _gather("gather_qmm", x, w, (scales, biases), lhs_indices, rhs_indices, x.dtype, group_size=group_size,
                       bits=bits)
    return _gather("gather_qmm", x, dequantize(w, scales, biases, group_size, bits, mode), (None, None),
                   lhs_indices, rhs_indices, x.dtype)


# parts of a product

def segmented_mm(a: Any, b: Any, segments: Array) -> Array:
    """a (M, K) @ b (K, N) over parts of K: segments (…, 2) of first and end positions -> (…, M, N)."""
    a, b, segments = array_of(a), array_of(b), array_of(segments)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or segments.shape[-1:] != (2,):
        raise ValueError(f"[segmented_mm] a {show(a.shape)}, b {show(b.shape)}, segments {show(segments.shape)}: "
                         "(M, K), (K, N) and (…, 2) wanted")
    position = ops.arange(a.shape[1])
    inside = (position >= segments[..., :1].astype(int32)) & (position < segments[..., 1:].astype(int32))
    return ops.where(inside[..., None, :], a, ops.zeros_like(a)) @ b


def block_masked_mm(a: Any, b: Any, block_size: int = 64, mask_out: Array | None = None,
                    mask_lhs: Array | None = None, mask_rhs: Array | None = None) -> Array:
    """a (…, M, K) @ b (…, K, N) where each block of block_size² elements of the result, a or b counts as often as the
    mask of that matrix (…, rows / block_size, columns / block_size, rounded up) says: bool, or factors."""
    a, b = array_of(a), array_of(b)
    if block_size not in (32, 64):
        raise ValueError(f"[block_masked_mm] block_size {block_size}: 32 or 64 wanted")
    product = _masked(a, mask_lhs, block_size) @ _masked(b, mask_rhs, block_size)
    return _masked(product, mask_out, block_size)


def _masked(a: Array, mask: Array | None, block_size: int) -> Array:
    if mask is None:
        return a
    wanted = tuple(-(-n // block_size) for n in a.shape[-2:])
    if mask.shape[-2:] != wanted:
        raise ValueError(f"[block_masked_mm] mask {show(mask.shape)}: (…, {wanted[0]}, {wanted[1]}) wanted for "
                         f"{show(a.shape)}")
    wide = ops.repeat(ops.repeat(mask, block_size, -2), block_size, -1)[..., :a.shape[-2], :a.shape[-1]]
    return ops.where(wide, a, ops.zeros_like(a)) if mask.dtype is bool_ else a * wide.astype(a.dtype)


# Hadamard matrices: Williamson's construction of the sizes 20 and 28 from the first rows of four circulants A, B, C, D
# (N. J. A. Sloane, A Library of Hadamard Matrices), and Paley's second of size 12 from the residues modulo 5.

CIRCULANTS = {20: ("+----", "+----", "++--+", "+-++-"), 28: ("+------", "++----+", "+-+--+-", "+--++--")}
RESIDUES = [0, 1, -1, -1, 1]


def _hadamard(size: int) -> np.ndarray:
    if size in CIRCULANTS:
        a, b, c, d = (_circulant([1 if sign == "+" else -1 for sign in row]) for row in CIRCULANTS[size])
        return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])
    if size == 12:
        border = np.ones((1, 5), int)
        conference = np.block([[np.zeros((1, 1), int), border], [border.T, _circulant(RESIDUES)]])
        return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(6, dtype=int), [[1, -1], [-1, -1]])
    return np.ones((1, 1), int) if size == 1 else np.kron([[1, 1], [1, -1]], _hadamard(size // 2))


def _circulant(row: list[int]) -> np.ndarray:
    return np.array([np.roll(row, i) for i in range(len(row))])


def hadamard_transform(a: Any, scale: float | None = None) -> Array:
    """The Walsh-Hadamard transform of the last axis, times `scale` (default: 1 / sqrt(n), which keeps lengths). n is a
    power of two, or 12, 20 or 28 times one."""
    a = array_of(a)
    n = a.shape[-1]
    odd = next((m for m in (1, 12, 20, 28) if n % m == 0 and (n // m).bit_count() == 1), 0)
    if not odd:
        raise ValueError(f"[hadamard_transform] {show(a.shape)}: a last axis of a power of two wanted, or of 12, 20 or "
                         "28 times one")
    a = a if a.dtype.inexact else ops.astype(a, float32)
    bits = (n // odd).bit_length() - 1
    left, right = odd << (bits - bits // 2), 1 << bits // 2
    outer = np.kron(_hadamard(odd), _hadamard(left // odd))
    first, last = (Array(m, a.dtype) for m in (outer, _hadamard(right)))
    out = first @ ops.reshape(a, (*a.shape[:-1], left, right)) @ last
    return ops.reshape(out, a.shape) * (1 / math.sqrt(n) if scale is None else scale)

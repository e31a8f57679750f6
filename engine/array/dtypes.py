"""Element types: names and promotion follow MLX, codes follow `enum lz_dtype` of engine/cpu/runtime.h."""
from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Dtype", "bool_", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16",
           "bfloat16", "float32", "float64", "complex64"]


class Dtype:
    """An element type. `kind` is one of b(ool) u i f c; bfloat16 is stored in NumPy as uint16."""

    __slots__ = ("name", "code", "size", "kind", "numpy")

    def __init__(self, name: str, code: int, kind: str, numpy: str):
        self.name, self.code, self.kind, self.numpy = name, code, kind, np.dtype(numpy)
        self.size = self.numpy.itemsize

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        return by_name, (self.name,)

    @property
    def inexact(self) -> bool:
        return self.kind in "fc"


DTYPES = [
    Dtype("bool", 0, "b", "?"),
    *(Dtype(f"uint{8 << i}", 1 + i, "u", f"u{1 << i}") for i in range(4)),
    *(Dtype(f"int{8 << i}", 5 + i, "i", f"i{1 << i}") for i in range(4)),
    Dtype("float16", 9, "f", "f2"), Dtype("bfloat16", 10, "f", "u2"), Dtype("float32", 11, "f", "f4"),
    Dtype("float64", 12, "f", "f8"), Dtype("complex64", 13, "c", "c8"),
]
bool_, uint8, uint16, uint32, uint64, int8, int16, int32, int64, float16, bfloat16, float32, float64, complex64 = DTYPES
NAMES = {d.name: d for d in DTYPES}
FROM_NUMPY = {d.numpy: d for d in DTYPES if d is not bfloat16}
SIGNED = {1: int8, 2: int16, 4: int32, 8: int64}


def by_name(name: str) -> Dtype:
    return NAMES[name]


def promote(a: Dtype, b: Dtype) -> Dtype:
    """The type of `a op b`, MLX's table: floats win over integers whatever their size."""
    if a is b:
        return a
    if a.kind == b.kind:
        if a.size == b.size:
            return float32                     # float16 and bfloat16
        return a if a.size > b.size else b
    low, high = sorted((a, b), key=lambda d: "buifc".index(d.kind))
    if (low.kind, high.kind) != ("u", "i") or high.size > low.size:
        return high
    return float32 if low is uint64 else SIGNED[2 * low.size]


def weak(scalar: bool | int | float | complex, other: Dtype | None) -> Dtype:
    """The type a Python scalar takes beside an array of type `other` (None: on its own)."""
    if isinstance(scalar, bool | np.bool_):
        return other or bool_
    if isinstance(scalar, int | np.integer):
        if other is None:
            return int32 if -(1 << 31) <= scalar < 1 << 31 else int64
        return int32 if other is bool_ else other
    if isinstance(scalar, complex):
        return complex64
    return other if other is not None and other.inexact else float32


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16 (ties to even), NaN kept."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(x))


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return np.asarray(bits.astype(np.uint32) << 16).view(np.float32)

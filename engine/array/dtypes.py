"""Element types: names and promotion follow MLX, codes follow `enum lz_dtype` of engine/cpu/runtime.h."""
from __future__ import annotations

import functools
from typing import Any

import numpy as np

__all__ = [
    "Dtype", "DtypeCategory", "can_cast", "complexfloating", "finfo", "floating", "generic", "iinfo", "inexact",
    "integer", "isdtype", "issubdtype", "number", "result_type", "signedinteger", "unsignedinteger", "bool_",
    "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32",
    "float64", "complex64",
]


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


class DtypeCategory:
    """A set of types: those of these kinds."""

    __slots__ = ("name", "kinds")

    def __init__(self, name: str, kinds: str):
        self.name, self.kinds = name, frozenset(kinds)

    def __repr__(self) -> str:
        return f"DtypeCategory.{self.name}"


CATEGORIES = [DtypeCategory(name, kinds) for name, kinds in (
    ("complexfloating", "c"), ("floating", "f"), ("inexact", "fc"), ("signedinteger", "i"), ("unsignedinteger", "u"),
    ("integer", "iu"), ("number", "iufc"), ("generic", "biufc"))]
complexfloating, floating, inexact, signedinteger, unsignedinteger, integer, number, generic = CATEGORIES
KINDS = {"bool": "b", "signed integer": "i", "unsigned integer": "u", "integral": "iu", "real floating": "f",
         "complex floating": "c", "numeric": "iufc"}       # the array API's names


def issubdtype(arg1: Dtype | DtypeCategory, arg2: Dtype | DtypeCategory) -> bool:
    """Whether arg1 is arg2 or lies in it."""
    if isinstance(arg2, Dtype):
        return arg1 is arg2
    return (frozenset(arg1.kind) if isinstance(arg1, Dtype) else arg1.kinds) <= arg2.kinds


def isdtype(dtype: Dtype, kind: Dtype | str | tuple[Dtype | str, ...]) -> bool:
    """Whether dtype is of a kind, by the array API's names, or of one of several."""
    if isinstance(kind, tuple):
        return any(isdtype(dtype, k) for k in kind)
    if isinstance(kind, str) and kind not in KINDS:
        raise ValueError(f"[isdtype] kind {kind!r}: one of {', '.join(KINDS)} wanted")
    return dtype.kind in KINDS[kind] if isinstance(kind, str) else dtype is kind


def result_type(*arrays_and_dtypes: Any) -> Dtype:
    """The type that an operation on all of these has."""
    return functools.reduce(promote, (getattr(x, "dtype", x) for x in arrays_and_dtypes))


def can_cast(from_: Any, to: Dtype) -> bool:
    """Whether promotion goes from one type to the other."""
    return result_type(from_, to) is to


class finfo:
    """Limits of a floating type; of complex64 those of its parts."""

    __slots__ = ("dtype", "min", "max", "eps", "smallest_normal", "bits")

    def __init__(self, arg: Dtype):
        if not arg.inexact:
            raise ValueError(f"[finfo] {arg}: a floating type wanted")
        self.dtype = float32 if arg is complex64 else arg
        exponent, mantissa = {"float16": (15, 10), "bfloat16": (127, 7), "float32": (127, 23), "float64": (1023, 52)}[
            self.dtype.name]
        self.eps, self.smallest_normal, self.bits = 2.0**-mantissa, 2.0 ** (1 - exponent), 8 * self.dtype.size
        self.max = (2.0 - self.eps) * 2.0**exponent
        self.min = -self.max

    def __repr__(self) -> str:
        return f"finfo(min={self.min:g}, max={self.max:g}, dtype={self.dtype})"


class iinfo:
    """Limits of an integer type."""

    __slots__ = ("dtype", "min", "max", "bits")

    def __init__(self, arg: Dtype):
        if arg.kind not in "iu":
            raise ValueError(f"[iinfo] {arg}: an integer type wanted")
        self.dtype, self.bits = arg, 8 * arg.size
        self.min = -1 << self.bits - 1 if arg.kind == "i" else 0
        self.max = (1 << self.bits - (arg.kind == "i")) - 1

    def __repr__(self) -> str:
        return f"iinfo(min={self.min}, max={self.max}, dtype={self.dtype})"


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

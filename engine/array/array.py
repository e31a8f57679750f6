"""Array: the handle a program holds. It points to a Value; an in-place update points it to another one."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from .device import take_streams
from .dtypes import Dtype, bfloat16, from_bfloat16
from .node import Shape, Value, contiguous_strides, show, to_numpy
from .printing import elements

# ruff: noqa: E501, E704


class Array:
    """A lazy n-dimensional array with MLX's interface. Nothing is computed until `eval`, a conversion or a plan's run asks."""

    __slots__ = ("_value", "__weakref__")
    __array_priority__ = 100.0

    def __init__(self, obj: Any, dtype: Dtype | None = None):
        self._value: Value = operands.leaf(obj, dtype)

    @classmethod
    def of(cls, value: Value) -> Array:
        self = object.__new__(cls)
        self._value = value
        return self

    # facts

    @property
    def shape(self) -> Shape: return self._value.shape
    @property
    def dtype(self) -> Dtype: return self._value.dtype
    @property
    def ndim(self) -> int: return len(self.shape)
    @property
    def size(self) -> int: return int(np.prod([int(s) for s in self.shape], dtype=np.int64))
    @property
    def itemsize(self) -> int: return self.dtype.size
    @property
    def nbytes(self) -> int: return self.size * self.dtype.size
    @property
    def T(self) -> Array: return ops.transpose(self)
    @property
    def mT(self) -> Array: return ops.swapaxes(self, -1, -2)
    @property
    def real(self) -> Array: return mx.real(self)
    @property
    def imag(self) -> Array: return mx.imag(self)

    @property
    def evaluated(self) -> bool:
        """Whether the elements are in memory."""
        return self._value.buffer is not None

    # conversions, which evaluate

    def numpy(self) -> np.ndarray:
        """The elements as a read-only NumPy view of the same memory; bfloat16 becomes a float32 copy."""
        bits = to_numpy(self._evaluated())
        return from_bfloat16(bits) if self.dtype is bfloat16 else bits

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        other = dtype is not None and array.dtype != dtype
        if copy is False and (other or self.dtype is bfloat16):
            raise ValueError(f"[__array__] {self.dtype} to {dtype if other else array.dtype} needs a copy")
        return array.astype(dtype) if other else array.copy() if copy else array

    def item(self) -> Any:
        if self.size != 1:
            raise ValueError(f"[item] {self.dtype}{show(self.shape)} has {self.size} elements, 1 wanted")
        return self.numpy().item()

    def __dlpack__(self, *, stream: Any = None, max_version: tuple[int, int] | None = None,
                   dl_device: tuple[int, int] | None = None, copy: bool | None = None) -> Any:
        """A capsule on the same memory. It must not be written to: consumers of DLPack 1 are told so."""
        return interchange.to_dlpack(self._evaluated(), stream, max_version, dl_device, copy)

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        if api_version is not None:
            raise ValueError(f"[__array_namespace__] version {api_version!r}: no version of the standard is promised")
        return sys.modules[__package__]

    def __dlpack_device__(self) -> tuple[int, int]: return interchange.CPU
    def __buffer__(self, flags: int) -> memoryview: return to_numpy(self._evaluated()).data
    def __bytes__(self) -> bytes: return to_numpy(self._evaluated()).tobytes()
    def __complex__(self) -> complex: return complex(self.item())
    def tolist(self) -> Any: return self.numpy().tolist()
    def __bool__(self) -> bool: return bool(self.item())
    def __int__(self) -> int: return int(self.item())
    def __index__(self) -> int: return self.numpy().__index__()
    def __float__(self) -> float: return float(self.item())
    def __format__(self, spec: str) -> str: return format(self.item(), spec) if spec else str(self)
    def __hash__(self) -> int: return id(self)
    def __reduce__(self) -> tuple[Any, ...]: return _restore, (np.array(to_numpy(self._evaluated())), self.dtype.name)

    def _evaluated(self) -> Value:
        evaluate.eval(self)
        return self._value

    def __repr__(self) -> str:
        if evaluate.is_traced(self):
            return f"array(<traced> {self.dtype}{show(self.shape)})"
        return f"array({elements(self.numpy(), len('array('))}, dtype={self.dtype})"

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("[len] an array without axes has no length")
        return int(self.shape[0])

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))

    # indexing

    def __getitem__(self, index: Any) -> Array: return indexing.get(self, index)
    def __setitem__(self, index: Any, update: Any) -> None: self._value = indexing.put(self, index, update)._value
    @property
    def at(self) -> scatter.ArrayAt: return scatter.ArrayAt(self)
    def __copy__(self) -> Array: return Array.of(self._value)
    def __deepcopy__(self, memo: Any) -> Array: return Array.of(self._value)

    # operators

    def __add__(self, other: Any) -> Array: return ops.add(self, other)
    def __radd__(self, other: Any) -> Array: return ops.add(other, self)
    def __sub__(self, other: Any) -> Array: return ops.subtract(self, other)
    def __rsub__(self, other: Any) -> Array: return ops.subtract(other, self)
    def __mul__(self, other: Any) -> Array: return ops.multiply(self, other)
    def __rmul__(self, other: Any) -> Array: return ops.multiply(other, self)
    def __truediv__(self, other: Any) -> Array: return ops.divide(self, other)
    def __rtruediv__(self, other: Any) -> Array: return ops.divide(other, self)
    def __floordiv__(self, other: Any) -> Array: return ops.floor_divide(self, other)
    def __rfloordiv__(self, other: Any) -> Array: return ops.floor_divide(other, self)
    def __mod__(self, other: Any) -> Array: return ops.remainder(self, other)
    def __rmod__(self, other: Any) -> Array: return ops.remainder(other, self)
    def __pow__(self, other: Any) -> Array: return ops.power(self, other)
    def __rpow__(self, other: Any) -> Array: return ops.power(other, self)
    def __matmul__(self, other: Any) -> Array: return ops.matmul(self, other)
    def __rmatmul__(self, other: Any) -> Array: return ops.matmul(other, self)
    def __and__(self, other: Any) -> Array: return ops.bitwise_and(self, other)
    def __rand__(self, other: Any) -> Array: return ops.bitwise_and(other, self)
    def __or__(self, other: Any) -> Array: return ops.bitwise_or(self, other)
    def __ror__(self, other: Any) -> Array: return ops.bitwise_or(other, self)
    def __xor__(self, other: Any) -> Array: return ops.bitwise_xor(self, other)
    def __rxor__(self, other: Any) -> Array: return ops.bitwise_xor(other, self)
    def __lshift__(self, other: Any) -> Array: return ops.left_shift(self, other)
    def __rlshift__(self, other: Any) -> Array: return ops.left_shift(other, self)
    def __rshift__(self, other: Any) -> Array: return ops.right_shift(self, other)
    def __rrshift__(self, other: Any) -> Array: return ops.right_shift(other, self)
    def __eq__(self, other: Any) -> Any: return not isinstance(other, str | None) and ops.equal(self, other)
    def __ne__(self, other: Any) -> Any: return isinstance(other, str | None) or ops.not_equal(self, other)
    def __lt__(self, other: Any) -> Array: return ops.less(self, other)
    def __le__(self, other: Any) -> Array: return ops.less_equal(self, other)
    def __gt__(self, other: Any) -> Array: return ops.greater(self, other)
    def __ge__(self, other: Any) -> Array: return ops.greater_equal(self, other)
    def __pos__(self) -> Array: return Array.of(self._value)
    def __neg__(self) -> Array: return ops.negative(self)
    def __invert__(self) -> Array: return ops.bitwise_invert(self)
    def __abs__(self) -> Array: return ops.abs(self)

    def _become(self, other: Array) -> Array:
        self._value = other._value
        return self

    def __iadd__(self, other: Any) -> Array: return self._become(self + other)
    def __isub__(self, other: Any) -> Array: return self._become(self - other)
    def __imul__(self, other: Any) -> Array: return self._become(self * other)
    def __itruediv__(self, other: Any) -> Array: return self._become(self / other)
    def __ifloordiv__(self, other: Any) -> Array: return self._become(self // other)
    def __imod__(self, other: Any) -> Array: return self._become(self % other)
    def __ipow__(self, other: Any) -> Array: return self._become(self ** other)
    def __imatmul__(self, other: Any) -> Array: return self._become(self @ other)
    def __ilshift__(self, other: Any) -> Array: return self._become(self << other)
    def __irshift__(self, other: Any) -> Array: return self._become(self >> other)
    def __iand__(self, other: Any) -> Array: return self._become(self & other)
    def __ior__(self, other: Any) -> Array: return self._become(self | other)
    def __ixor__(self, other: Any) -> Array: return self._become(self ^ other)

    # functions that are methods as well

    def astype(self, dtype: Dtype) -> Array: return ops.astype(self, dtype)
    def view(self, dtype: Dtype) -> Array: return ops.view(self, dtype)
    def reshape(self, *shape: Any) -> Array: return ops.reshape(self, operands.unpack(shape))
    def transpose(self, *axes: Any) -> Array: return ops.transpose(self, operands.unpack(axes) or None)
    def flatten(self, start_axis: int = 0, end_axis: int = -1) -> Array: return ops.flatten(self, start_axis, end_axis)
    def squeeze(self, axis: Any = None) -> Array: return ops.squeeze(self, axis)
    def swapaxes(self, axis1: int, axis2: int) -> Array: return ops.swapaxes(self, axis1, axis2)
    def moveaxis(self, source: int, destination: int) -> Array: return ops.moveaxis(self, source, destination)
    def split(self, indices_or_sections: Any, axis: int = 0) -> list[Array]: return ops.split(self, indices_or_sections, axis)
    def sum(self, axis: Any = None, keepdims: bool = False) -> Array: return ops.sum(self, axis, keepdims)
    def prod(self, axis: Any = None, keepdims: bool = False) -> Array: return ops.prod(self, axis, keepdims)
    def max(self, axis: Any = None, keepdims: bool = False) -> Array: return ops.max(self, axis, keepdims)
    def min(self, axis: Any = None, keepdims: bool = False) -> Array: return ops.min(self, axis, keepdims)
    def any(self, axis: Any = None, keepdims: bool = False) -> Array: return ops.any(self, axis, keepdims)
    def all(self, axis: Any = None, keepdims: bool = False) -> Array: return ops.all(self, axis, keepdims)
    def mean(self, axis: Any = None, keepdims: bool = False) -> Array: return ops.mean(self, axis, keepdims)
    def var(self, axis: Any = None, keepdims: bool = False, ddof: int = 0, *, correction: int | None = None) -> Array: return ops.var(self, axis, keepdims, ddof if correction is None else correction)
    def std(self, axis: Any = None, keepdims: bool = False, ddof: int = 0, *, correction: int | None = None) -> Array: return ops.std(self, axis, keepdims, ddof if correction is None else correction)
    def logsumexp(self, axis: Any = None, keepdims: bool = False) -> Array: return ops.logsumexp(self, axis, keepdims)
    def argmax(self, axis: Any = None, keepdims: bool = False) -> Array: return ops.argmax(self, axis, keepdims)
    def argmin(self, axis: Any = None, keepdims: bool = False) -> Array: return ops.argmin(self, axis, keepdims)
    def cumsum(self, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True) -> Array: return mx.cumsum(self, axis, reverse=reverse, inclusive=inclusive)
    def cumprod(self, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True) -> Array: return mx.cumprod(self, axis, reverse=reverse, inclusive=inclusive)
    def cummax(self, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True) -> Array: return mx.cummax(self, axis, reverse=reverse, inclusive=inclusive)
    def cummin(self, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True) -> Array: return mx.cummin(self, axis, reverse=reverse, inclusive=inclusive)
    def logcumsumexp(self, axis: int | None = None, *, reverse: bool = False, inclusive: bool = True) -> Array: return mx.logcumsumexp(self, axis, reverse=reverse, inclusive=inclusive)
    def diag(self, k: int = 0) -> Array: return mx.diag(self, k)
    def diagonal(self, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Array: return mx.diagonal(self, offset, axis1, axis2)
    def conj(self) -> Array: return mx.conj(self)
    def abs(self) -> Array: return ops.abs(self)
    def exp(self) -> Array: return ops.exp(self)
    def log(self) -> Array: return ops.log(self)
    def log2(self) -> Array: return ops.log2(self)
    def log10(self) -> Array: return ops.log10(self)
    def log1p(self) -> Array: return ops.log1p(self)
    def sqrt(self) -> Array: return ops.sqrt(self)
    def rsqrt(self) -> Array: return ops.rsqrt(self)
    def square(self) -> Array: return ops.square(self)
    def sin(self) -> Array: return ops.sin(self)
    def cos(self) -> Array: return ops.cos(self)
    def reciprocal(self) -> Array: return ops.reciprocal(self)
    def round(self, decimals: int = 0) -> Array: return ops.round(self, decimals)


CONVERSIONS = ("of", "numpy", "item", "tolist")
take_streams(Array, [name for name in vars(Array) if not name.startswith("_") and name not in CONVERSIONS])


def _restore(bits: np.ndarray, dtype: str) -> Array:
    return operands.from_bits(bits, dtype)


def placeholder(shape: Shape, dtype: Dtype) -> Array:
    """An array without a value: an input of `lower`. The leading size may be a Dim."""
    contiguous_strides(shape)
    return Array.of(Value(tuple(shape), dtype))


from . import (  # noqa: E402
    evaluate,  # noqa: E402  (these modules need the class above)
    indexing,
    interchange,
    operands,
    ops,
    scatter,
)

mx: Any = sys.modules[__package__]   # for functions of the modules that come after this one

"""Arrays meet NumPy, DLPack and buffers: views of the same memory wherever type and layout allow.

bfloat16, which NumPy has not, crosses as its uint16 bits under DLPack's own name for it.
Source: https://dmlc.github.io/dlpack/latest/c_api.html
"""
from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .array import Array
from .dtypes import FROM_NUMPY, Dtype, bfloat16, complex64
from .node import Value, from_numpy, show, to_numpy

__all__ = ["asarray", "from_dlpack"]
CPU = (1, 0)                         # kDLCPU, the device of all our memory
UINT, BFLOAT = 1, 4                  # DLPack's type codes
CODE_AT = {b"dltensor": 20, b"dltensor_versioned": 52}     # the byte of DLTensor.dtype.code in each managed tensor

_name, _pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
_name.restype, _name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _recode(capsule: Any, old: int, new: int) -> bool:
    """Replaces the type code inside a capsule that nobody has consumed; whether it was there."""
    name = _name(capsule)
    code = ctypes.c_uint8.from_address(_pointer(capsule, name) + CODE_AT[name])
    if found := code.value == old:
        code.value = new
    return found


def to_dlpack(value: Value, stream: Any, max_version: Any, dl_device: Any, copy: bool | None) -> Any:
    """A capsule on a leaf's memory. Consumers of version 1 are told that it is read-only, older ones cannot be."""
    flagged = max_version is not None and tuple(max_version) >= (1, 0)
    array = to_numpy(value, writable=not flagged)
    capsule = array.__dlpack__(stream=stream, max_version=max_version, dl_device=dl_device, copy=copy)
    if value.dtype is bfloat16:
        _recode(capsule, UINT, BFLOAT)
    return capsule


class _Capsule:
    """Hands a capsule that was looked at on to NumPy."""

    def __init__(self, capsule: Any):
        self.capsule = capsule

    def __dlpack__(self, **options: Any) -> Any: return self.capsule
    def __dlpack_device__(self) -> tuple[int, int]: return CPU


def _import(x: Any) -> tuple[np.ndarray, Dtype]:
    if (device := x.__dlpack_device__()) != CPU:
        raise ValueError(f"[from_dlpack] memory of device {tuple(device)}: only the CPU's, {CPU}, can be shared")
    try:
        capsule = x.__dlpack__(max_version=(1, 0))
    except TypeError:                                      # a producer of before version 1
        capsule = x.__dlpack__()
    narrow = _recode(capsule, BFLOAT, UINT)
    bits = np.from_dlpack(_Capsule(capsule))
    if bits.dtype not in FROM_NUMPY:
        raise no_dtype(bits, "from_dlpack")
    return bits, bfloat16 if narrow else FROM_NUMPY[bits.dtype]


def no_dtype(array: np.ndarray, name: str) -> TypeError:
    return TypeError(f"[{name}] {array.dtype}{show(array.shape)}: the type has no dtype here")


def bits_of(obj: Any, name: str) -> tuple[np.ndarray, Dtype]:
    """The elements of a foreign object as NumPy holds them, without a copy where it is an array or a buffer."""
    if hasattr(obj, "__dlpack__") and not isinstance(obj, np.ndarray):
        return _import(obj)
    array = np.asarray(memoryview(obj) if isinstance(obj, bytes | bytearray) else obj)
    if (found := FROM_NUMPY.get(array.dtype)) is not None:
        return array, found
    if array.dtype.name == "bfloat16":                     # of the package ml_dtypes
        return array.view(np.uint16), bfloat16
    if array.dtype == np.complex128:
        return array.astype(np.complex64), complex64
    raise no_dtype(array, name)


def holds_arrays(items: Any) -> bool:
    """Whether a list, or one inside it, has arrays in it."""
    kinds = set(map(type, items))
    nested = not kinds.isdisjoint((list, tuple))
    return Array in kinds or nested and any(holds_arrays(item) for item in items if isinstance(item, list | tuple))


def stack(items: Any) -> Array:
    """The array of a nested list with arrays in it: lazy, of the type that all promote to."""
    return ops.stack([Array(item) for item in items])


def from_dlpack(x: Any, /, *, copy: bool | None = None) -> Array:
    """An array on the memory of any object that speaks DLPack, never written to; a copy only if `copy` is True.
    ValueError where the memory is another device's."""
    if isinstance(x, Array):
        return Array.of(x._value)
    bits, dtype = _import(x)
    return Array.of(from_numpy(bits.copy() if copy else bits, dtype, bool(copy)))


def asarray(a: Any, dtype: Dtype | None = None, *, copy: bool | None = None) -> Array:
    """An array on the memory of `a`, never written to: an array, or whatever has NumPy's, DLPack's or Python's buffer
    interface. The type is kept unless `dtype` names another one. copy: True always, False never (ValueError where it
    must), None where it must."""
    shared: Array | None = None
    if isinstance(a, Array):
        shared = Array.of(a._value)
    elif not isinstance(a, list | tuple | int | float | complex):
        bits, found = bits_of(a, "asarray")
        shared = Array.of(from_numpy(bits.copy() if copy else bits, found, bool(copy)))
    if shared is not None and dtype in (None, shared.dtype):
        return shared
    if copy is False:
        raise ValueError(f"[asarray] {type(a).__name__} to {dtype or 'an array'} needs a copy")
    return Array(a if shared is None else shared, dtype)


from . import ops  # noqa: E402

"""Test vectors of the kernels: small steps with the values that they must give, made by NumPy in float64.

The file of a kernel's name makes its vectors. The tests run them on the emulated device, `llm selftest metal` on a
real one.
"""
from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod

import numpy as np

from ..steps import Step, View

Operand = np.ndarray | tuple[np.ndarray, str]              # (uint16 bits, "bfloat16"), as engine.cpu.call takes them


@dataclass(frozen=True, eq=False)
class Vector:
    """One call of a kernel.

    outputs and inputs: arrays, whose memory may be shared (an output that is also an input is updated in place);
    outputs hold what is there before the call. expected: float64 (or integer) values of each output, None where
    anything may be.
    tolerance: the most |found - wanted| / max(1, |wanted|), one number or one for each output; 0 means equal.
    """

    id: str
    kernel: str
    outputs: Sequence[Operand]
    inputs: Sequence[Operand]
    ints: Sequence[int]
    floats: Sequence[float]
    expected: Sequence[np.ndarray | None]
    tolerance: float | Sequence[float]


FILES = sorted(module.name for module in pkgutil.iter_modules(__path__))


def vectors(*files: str) -> Iterator[Vector]:
    """All vectors, or those of these files."""
    for name in files or FILES:
        yield from import_module(f".{name}", __name__).vectors()


def rounded(values: np.ndarray, dtype: str) -> tuple[Operand, np.ndarray]:
    """An operand of these values in a dtype, and the float64 values that it really holds."""
    if dtype != "bfloat16":
        return (array := np.asarray(values).astype(dtype)), array.astype(np.float64)
    bits = np.asarray(values, np.float32).view(np.uint32)
    bits = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)       # to the nearest, ties to even
    return (bits, dtype), _widened(bits)


def zeros(shape: tuple[int, ...], dtype: str) -> Operand:
    return rounded(np.zeros(shape), dtype)[0]


def _widened(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def bind(vector: Vector) -> tuple[Step, list[np.ndarray]]:
    """The vector's step, and fresh bytes for each of its buffers: a View's `buffer` is an index of them."""
    memory: dict[int, tuple[int, np.ndarray]] = {}         # by the owner's id: buffer number, owner
    def view(operand: Operand) -> View:
        array, dtype = operand if isinstance(operand, tuple) else (operand, operand.dtype.name)
        number, owner = memory.setdefault(id(_owner(array)), (len(memory), _owner(array)))
        offset = array.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
        strides = tuple(s // array.itemsize for s in array.strides)
        if not array.size:                                 # whose strides NumPy forgets
            strides = tuple(prod(array.shape[i + 1:]) for i in range(array.ndim))
        return View(number, dtype, offset, array.shape, strides)

    outputs, inputs = (tuple(map(view, operands)) for operands in (vector.outputs, vector.inputs))
    step = Step(vector.kernel, outputs, inputs, tuple(map(int, vector.ints)), tuple(map(float, vector.floats)))
    return step, [owner.ravel("K").view(np.uint8).copy() for _, owner in memory.values()]


def _owner(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def results(step: Step, buffers: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs as they lie in the buffers; bfloat16 as float64."""
    found = []
    for view in step.outputs:
        dtype = np.dtype("uint16" if view.dtype == "bfloat16" else view.dtype)
        strides = tuple(s * dtype.itemsize for s in view.strides)
        array = np.ndarray(view.shape, dtype, buffers[view.buffer], view.offset, strides)
        found.append(_widened(array) if view.dtype == "bfloat16" else array)
    return found


def compare(vector: Vector, found: Sequence[np.ndarray]) -> str | None:
    """None where every output is as expected, else a sentence: which element, found, wanted, tolerance."""
    tolerances = vector.tolerance if isinstance(vector.tolerance, Sequence) else [vector.tolerance] * len(found)
    for i, (array, wanted, tolerance) in enumerate(zip(found, vector.expected, tolerances, strict=True)):
        if wanted is None:
            continue
        if array.shape != wanted.shape:
            return f"{vector.id}: output {i} has the shape {array.shape}, {wanted.shape} wanted"
        wrong = _wrong(array, wanted, tolerance)
        if wrong.any():
            at = tuple(map(int, np.argwhere(wrong)[0]))
            return (f"{vector.id}: output {i}{list(at)} is {float(array[at]):.9g}, {float(wanted[at]):.9g} "
                    f"wanted within {tolerance:g}; {np.count_nonzero(wrong)} of {wrong.size} elements are wrong")
    return None


def _wrong(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> np.ndarray:
    if found.dtype.kind in "biu" and wanted.dtype.kind in "biu":
        return found != wanted                             # integers beyond 2**53 too
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    same = (found == wanted) | np.isnan(found) & np.isnan(wanted)              # infinities too
    with np.errstate(invalid="ignore"):
        near = np.abs(found - wanted) <= tolerance * np.maximum(1.0, np.abs(wanted))
    return ~same & ~(near & np.isfinite(wanted))

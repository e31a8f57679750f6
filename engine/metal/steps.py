"""What the kernels' encoders speak: a Step of a plan comes in, the dispatches that do it on the GPU go out.

An encoder is a function `encode(step) -> list[Dispatch]` in the file of the kernel's name; it raises Unsupported where
the GPU's kernel cannot do the step, which then runs on the CPU, over the same memory.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np

SIZES = {"bool": 1, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
         "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8}
MSL = {"bool": "bool", "uint8": "uchar", "uint16": "ushort", "uint32": "uint", "uint64": "ulong", "int8": "char",
       "int16": "short", "int32": "int", "int64": "long", "float16": "half", "bfloat16": "bfloat", "float32": "float"}


class Unsupported(Exception):
    """A step that the GPU's kernels cannot do: the text says why, in a few words."""


@dataclass(frozen=True)
class View:
    """A strided window on a buffer: offset in bytes, strides in elements (0 repeats). Sizes are numbers."""

    buffer: int
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Row-major without gaps; axes of one element do not count."""
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != expected:
                return False
            expected *= n
        return True

    @property
    def type(self) -> str:
        """The Metal type of its elements."""
        if self.dtype not in MSL:
            raise Unsupported(f"{self.dtype} does not exist in Metal")
        return MSL[self.dtype]


@dataclass(frozen=True)
class Step:
    """One call of a kernel, with the parameters of docs/cpu.md's table."""

    kernel: str
    outputs: tuple[View, ...]
    inputs: tuple[View, ...]
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()
    longest: int | None = None       # tokens of the longest sequence, where the host knows that they are not more


@dataclass(frozen=True, eq=False)
class Scratch:
    """Memory between the dispatches of one step. The same object is the same memory."""

    nbytes: int


FAULT = Scratch(12)                    # one for all steps, 0 before a run: not 0, index, size of the first wrong index
Operand = View | Scratch | bytes


@dataclass(frozen=True)
class Dispatch:
    """One launch: `function` of `file`.metal, compiled with these macros and function constants.

    arguments: by the argument's name in the source: a View, a Scratch, or bytes (at most 4,096) for `constant` ones.
    Arguments that the function constants leave unused may be missing. groups: threadgroups; threads: of one each.
    """

    file: str
    function: str
    arguments: Mapping[str, Operand]
    groups: tuple[int, int, int]
    threads: tuple[int, int, int]
    defines: Mapping[str, str | int] = field(default_factory=dict)
    constants: Mapping[str, int | float | bool] = field(default_factory=dict)
    source: str = ""                 # generated text instead of the file's


def struct(*fields: int | float) -> bytes:
    """A parameter block of 4-byte fields: Python's ints as int, or uint from 2^31 on, floats as float."""
    return b"".join(np.float32(f).tobytes() if isinstance(f, float) else int(f).to_bytes(4, "little", signed=f < 2**31)
                    for f in fields)


def ceil(n: int, unit: int) -> int:
    return -(-n // unit)

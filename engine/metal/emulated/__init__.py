"""A Metal device for machines without one: compiles the kernels' text for the CPU and runs every GPU thread of it.

`load()` is the Objective-C runtime and Metal driver (driver.cpp) that engine/metal talks to; `library`, `run`, `call`
run single kernels for the tests. metal_stdlib is the standard library, fibers.cpp the GPU. All is compiled by c++ (or
CXX) at first use and kept in the user's cache folder. LAZULITE_METAL_SANITIZE=thread or undefined: for a sanitizer.
"""
from __future__ import annotations

import ctypes
import functools
import mmap
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .. import msl
from ..steps import FAULT, Dispatch, Scratch, Step, View
from ..vectors import Operand, Vector, bind
from .compiler import compile_kernels, compile_runtime, sanitizer

LIBC = ctypes.CDLL(None)
PARTIAL = {"scatter"}                         # kernels that write some elements of their output and keep the others


def load() -> ctypes.CDLL:
    """The library with objc_msgSend, MTLCreateSystemDefaultDevice and what else a Metal host calls."""
    return _load(sanitizer())


@functools.cache
def _load(sanitizer: str) -> ctypes.CDLL:
    path = str(compile_runtime(sanitizer))
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)          # the kernels' libraries find lz_meet and expf there
    library.lz_run.restype = ctypes.c_char_p
    library.lz_set_compiler(_compile_for_driver)
    return library


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
def _compile_for_driver(source: bytes, path: int, error: int, size: int) -> None:
    """newLibraryWithSource: the library's path, or else what is wrong, in memory of the driver."""
    try:
        place, answer = path, str(compile_kernels(source.decode()))
    except Exception as problem:                                  # nothing may pass through the driver's C
        place, answer = error, str(problem)
    ctypes.memmove(place, answer.encode()[:size - 1] + b"\0", min(size, len(answer.encode()) + 1))


# ---------------------------------------------------------------- single kernels, for tests

class _Function(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("body", ctypes.c_void_p), ("arguments", ctypes.c_void_p)]


class _Constant(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("index", ctypes.c_int), ("type", ctypes.c_int), ("size", ctypes.c_int),
                ("value", ctypes.c_void_p)]


def _table(library: ctypes.CDLL, kind: Any, name: str) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    first = ctypes.addressof(ctypes.c_char.in_dll(library, name))
    while (row := kind.from_address(first + len(rows) * ctypes.sizeof(kind))).name:
        rows[row.name.decode()] = row
    return rows


class Library:
    """The kernels of one source. Compiling and running need no device."""

    def __init__(self, text: str) -> None:
        self.runtime = load()
        self.library = ctypes.CDLL(str(compile_kernels(text)))
        self.functions = _table(self.library, _Function, "lz_functions")
        self.constants = _table(self.library, _Constant, "lz_constants")

    def run(self, function: str, pointers: Mapping[int, int | np.ndarray], groups: Sequence[int],
            threads: Sequence[int], constants: Mapping[str, int | float | bool] | None = None,
            schedule: int = 0) -> None:
        """One dispatch. pointers: by buffer index; schedule: 0 in turn, 1 greedy and backwards, others at random.
        RuntimeError says what the kernel did wrong, in which thread."""
        for name, constant in self.constants.items():             # those not given are poisoned
            ctypes.memset(constant.value, 0xff, constant.size)
            if constants and name in constants:
                value = np.array(constants[name], {3: "f4", 16: "f2"}.get(constant.type, f"i{constant.size}"))
                ctypes.memmove(constant.value, value.tobytes(), constant.size)
        addresses = (ctypes.c_void_p * msl.BUFFERS)()
        for i, pointer in pointers.items():
            addresses[i] = pointer.ctypes.data if isinstance(pointer, np.ndarray) else pointer
        sizes = (ctypes.c_uint * 3), (*groups, 1, 1)[:3], (*threads, 1, 1)[:3]
        error = self.runtime.lz_run(ctypes.byref(self.functions[function]), addresses, sizes[0](*sizes[1]),
                                    sizes[0](*sizes[2]), ctypes.c_uint(schedule))
        if error:
            raise RuntimeError(error.decode())


library = functools.lru_cache(None)(Library)


class Guarded:
    """Memory that ends at a page that nobody may touch: a copy of the data, or 0xff bytes."""

    def __init__(self, nbytes: int, data: bytes | np.ndarray | None = None) -> None:
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.map = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
        self.end = self.map.ctypes.data + size
        self.bytes = self.map[size - nbytes:size]
        self.bytes[:] = 0xff if data is None else np.frombuffer(data, np.uint8)
        LIBC.mprotect(ctypes.c_void_p(self.end), mmap.PAGESIZE, 0)


def run(encode: Callable[[Step], list[Dispatch]], step: Step, buffers: list[np.ndarray], schedule: int = 0) -> None:
    """A step on buffers (bytes; a View's `buffer` is an index), in place: the encoder's dispatches, one after another.

    What a step writes and does not read is 0xff bytes before. RuntimeError says what a kernel did wrong.
    """
    read = {view.buffer for view in step.inputs}
    written = set() if step.kernel in PARTIAL else {view.buffer for view in step.outputs} - read
    guarded = [Guarded(len(b), None if i in written else b) for i, b in enumerate(buffers)]
    scratch = {FAULT: Guarded(FAULT.nbytes, bytes(FAULT.nbytes))}
    for dispatch in encode(step):
        if 0 not in dispatch.groups:
            _dispatch(dispatch, guarded, scratch, schedule)
    fault, index, size = scratch[FAULT].bytes.view(np.int32)
    if fault:
        raise IndexError(f"{step.kernel}: index {index} is out of bounds for size {size}")
    for buffer, memory in zip(buffers, guarded, strict=True):
        buffer[:] = memory.bytes


def call(encode: Callable[[Step], list[Dispatch]], kernel: str, outputs: Sequence[Operand], inputs: Sequence[Operand],
         ints: Sequence[int] = (), floats: Sequence[float] = (), schedule: int = 0) -> list[np.ndarray]:
    """A step on NumPy arrays. An operand is an array, or (uint16 array, "bfloat16"). Fills and returns the outputs."""
    step, buffers = bind(Vector(kernel, kernel, outputs, inputs, ints, floats, [], 0))
    run(encode, step, buffers, schedule)
    arrays = [o[0] if isinstance(o, tuple) else o for o in outputs]
    for array, view in zip(arrays, step.outputs, strict=True):
        array[...] = np.ndarray(array.shape, array.dtype, buffers[view.buffer].data, view.offset, array.strides)
    return arrays


def _dispatch(dispatch: Dispatch, buffers: Sequence[Guarded], scratch: dict[Scratch, Guarded], schedule: int) -> None:
    text = msl.source(dispatch.file, dispatch.defines, dispatch.source)
    arguments = msl.parse(text).kernels[dispatch.function].buffers
    memory = {name: _memory(value, buffers, scratch) for name, value in dispatch.arguments.items()}
    pointers = {arguments[name].index: place.bytes.ctypes.data + offset for name, (place, offset) in memory.items()}
    try:
        library(text).run(dispatch.function, pointers, dispatch.groups, dispatch.threads, dispatch.constants, schedule)
    except RuntimeError as error:
        raise RuntimeError(f"{dispatch.file}.metal: {error}{''.join(_past(str(error), memory))}") from None


def _memory(value: View | Scratch | bytes, buffers: Sequence[Guarded],
            scratch: dict[Scratch, Guarded]) -> tuple[Guarded, int]:
    """What an argument is bound to: memory, and the offset in it."""
    if isinstance(value, View):
        return buffers[value.buffer], value.offset
    if isinstance(value, Scratch):
        return scratch.setdefault(value, Guarded(value.nbytes)), 0
    return Guarded(len(value), value), 0


def _past(error: str, memory: Mapping[str, tuple[Guarded, int]]) -> Iterator[str]:
    """Which argument a bad address is just past."""
    if match := re.search(r"bad address (0x[0-9a-f]+)", error):
        for name, (place, _) in memory.items():
            if 0 <= int(match[1], 16) - place.end < mmap.PAGESIZE:
                yield f": {int(match[1], 16) - place.end} bytes after the end of {name}'s buffer"

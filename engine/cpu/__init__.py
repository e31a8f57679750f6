"""The native CPU runtime: one plain C library (runtime.h), loaded with ctypes. A plan crosses the border, not an op."""

import ctypes
import functools
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_int, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..errors import UserError

MAX_DIMS = 8
INTEGERS = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
DTYPES = (*INTEGERS, "float16", "bfloat16", "float32", "float64", "complex64")  # the codes of runtime.h, in order
ISAS = ("portable", "avx2", "avx512", "amx", "neon")


class _View(ctypes.Structure):
    _fields_ = [
        ("buffer", c_int32),
        ("dtype", c_int32),
        ("ndim", c_int32),
        ("pad", c_int32),
        ("offset", c_int64),
        ("shape", c_int64 * MAX_DIMS),
        ("strides", c_int64 * MAX_DIMS),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        ("kernel", c_char_p),
        ("n_out", c_int32),
        ("n_in", c_int32),
        ("n_int", c_int32),
        ("n_float", c_int32),
        ("views", POINTER(_View)),
        ("ints", POINTER(c_int64)),
        ("floats", POINTER(c_double)),
    ]


class _Array(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int32),
        ("ndim", c_int32),
        ("shape", c_int64 * MAX_DIMS),
        ("strides", c_int64 * MAX_DIMS),
    ]

    def numpy(self) -> np.ndarray:
        """The memory as NumPy sees it; bfloat16 as its uint16 bits."""
        dtype = np.dtype("uint16" if DTYPES[self.dtype] == "bfloat16" else DTYPES[self.dtype])
        strides = tuple(s * dtype.itemsize for s in self.strides[: self.ndim])
        shape = tuple(self.shape[: self.ndim])
        interface = {"version": 3, "typestr": dtype.str, "shape": shape, "strides": strides, "data": (self.data, False)}
        return np.asarray(SimpleNamespace(__array_interface__=interface))


_KEPT: list[Any] = []
_HostCall = ctypes.CFUNCTYPE(c_int, c_int64, c_int, c_int, POINTER(_Array), c_void_p, c_int)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "lz_error": (c_char_p, []),
    "lz_isa": (c_char_p, []),
    "lz_kernels": (c_char_p, []),
    "lz_opcodes": (c_char_p, []),
    "lz_set_isa": (c_int, [c_char_p]),
    "lz_set_host": (None, [_HostCall]),
    "lz_threads": (c_int, []),
    "lz_set_threads": (c_int, [c_int]),
    "lz_alloc": (c_void_p, [c_uint64]),
    "lz_free": (None, [c_void_p]),
    "lz_memory": (None, [POINTER(c_uint64)] * 3),
    "lz_clear_cache": (None, []),
    "lz_reset_peak": (None, []),
    "lz_set_memory_limit": (c_uint64, [c_uint64]),
    "lz_set_cache_limit": (c_uint64, [c_uint64]),
    "lz_load": (c_void_p, [POINTER(_Step), c_int, c_int, POINTER(c_int64), c_int, c_uint64]),
    "lz_run": (c_int, [c_void_p] * 4),  # buffers, dims and microseconds as ctypes arrays, without a conversion
    "lz_unload": (None, [c_void_p]),
}


def library_path() -> Path:
    """Where the native library is: LAZULITE_LIB, or beside this package (an editable install has two folders)."""
    if override := os.environ.get("LAZULITE_LIB"):
        return Path(override)
    name = {"darwin": "liblazulite.dylib", "win32": "lazulite.dll"}.get(sys.platform, "liblazulite.so")
    for folder in __path__:
        if (found := Path(folder, name)).exists():
            return found
    raise ImportError(f"{name} is not in {', '.join(__path__)}: build it with `pip install .`, or set LAZULITE_LIB")


class Buffer:
    """Bytes from the runtime's allocator, 64-byte aligned, given back when the object dies. `pointer` is an address."""

    __slots__ = ("pointer", "nbytes", "_free", "__weakref__")
    donatable = True                 # a plan may overwrite it, once nobody else refers to it

    def __init__(self, library: ctypes.CDLL, nbytes: int) -> None:
        self._free = library.lz_free
        self.pointer: int = library.lz_alloc(nbytes) or 0
        if not self.pointer:
            raise MemoryError(library.lz_error().decode())
        self.nbytes = nbytes

    def __del__(self) -> None:
        self._free(self.pointer)


def _host_call(compute: Any, number: int, n_out: int, n_in: int, arrays: Any, error: int, room: int) -> int:
    try:
        views = [arrays[i].numpy() for i in range(n_out + n_in)]
        compute(number, views[:n_out], views[n_out:])
    except BaseException as failure:  # KeyboardInterrupt too: the run must not go on with what is not there
        text = str(failure).encode("ascii", "replace")[: room - 1] + b"\0"
        ctypes.memmove(error, text, len(text))
        return 1
    return 0


class Runtime:
    """The library's calls. One per process (`runtime()`); instruction set and threads are the process's too."""

    def __init__(self, isa: str | None = None) -> None:
        self._library = ctypes.CDLL(str(library_path()))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        self._compute: Any = None
        if isa is not None:
            self.set_isa(isa)
        self.kernels = frozenset(self._text("lz_kernels").split())
        self.opcodes = {name: number for number, name in enumerate(self._text("lz_opcodes").split())}
        if self._library.lz_isa() is None:  # what LAZULITE_ISA forces is checked now, not at the first plan
            raise UserError(str(self._failure()), "Unset LAZULITE_ISA, or name a set that this machine has.")

    def _text(self, call: str) -> str:
        text = getattr(self._library, call)()
        if text is None:
            raise self._failure()
        return text.decode()

    def _failure(self) -> RuntimeError:
        return RuntimeError(self._library.lz_error().decode())

    @property
    def isa(self) -> str:
        """The instruction set of plans loaded from now on."""
        return self._text("lz_isa")

    def set_isa(self, name: str) -> None:
        """Choose the instruction set of plans loaded from now on. RuntimeError where this machine lacks it."""
        if self._library.lz_set_isa(name.encode()):
            raise self._failure()

    def isas(self) -> list[str]:
        """The instruction sets that this library holds and this machine can run."""
        before = self.isa
        usable = [name for name in ISAS if self._library.lz_set_isa(name.encode()) == 0]
        self.set_isa(before)
        return usable

    @property
    def threads(self) -> int:
        """Threads that run a plan together."""
        if (n := self._library.lz_threads()) == 0:
            raise self._failure()
        return n

    def set_threads(self, n: int) -> None:
        """Run plans on n threads; 0, or more than the affinity mask and the cgroup's quota allow: on as many as these.

        More threads than cores would only take turns, which costs microseconds at every step.
        """
        if self._library.lz_set_threads(min(n, 0)):
            raise self._failure()
        self._library.lz_set_threads(min(n, self.threads))

    def set_host(self, compute: Callable[[int, list[np.ndarray], list[np.ndarray]], None]) -> None:
        """What steps named host:NAME call: compute(number, outputs, inputs), which must not run plans itself."""
        if compute is not self._compute:
            self._compute, call = compute, _HostCall(functools.partial(_host_call, compute))
            _KEPT.append(call)  # the library may call it as long as the process lives
            self._library.lz_set_host(call)

    def alloc(self, nbytes: int) -> Buffer:
        """nbytes of uninitialised memory. MemoryError when there is none."""
        return Buffer(self._library, nbytes)

    def memory(self) -> dict[str, int]:
        """Bytes handed out now (active), at most so far (peak), and kept for reuse (cached)."""
        numbers = [c_uint64() for _ in range(3)]
        self._library.lz_memory(*map(byref, numbers))
        return dict(zip(("active", "peak", "cached"), (n.value for n in numbers), strict=True))

    def clear_cache(self) -> None:
        """Give the blocks kept for reuse, and the plans' arena, back to the system."""
        self._library.lz_clear_cache()

    def reset_peak(self) -> None:
        """The peak counts from what is active now."""
        self._library.lz_reset_peak()

    def set_memory_limit(self, nbytes: int) -> int:
        """A guideline: beyond it freed blocks go back to the system before new ones are taken. Returns the last one."""
        return self._library.lz_set_memory_limit(nbytes)

    def set_cache_limit(self, nbytes: int) -> int:
        """The most bytes of freed blocks that are kept for reuse. Returns the last limit."""
        return self._library.lz_set_cache_limit(nbytes)

    def load(self, steps: Iterable[Any], n_buffers: int, max_dims: Sequence[int], arena_bytes: int) -> "Plan":
        """Make steps ready to run; buffer 0 is the arena of all plans. RuntimeError says what is wrong.

        A step has kernel, outputs, inputs, ints and floats. A view (an output or input) has buffer (its number), dtype
        (an index of DTYPES, or an object with .code), offset (bytes), shape and strides (items); shape[0] = -1 - d is
        dims[d].
        """
        native, keep = _steps(list(steps))
        dims = (c_int64 * len(max_dims))(*max_dims)
        handle = self._library.lz_load(native, len(native), n_buffers, dims, len(max_dims), arena_bytes)
        del keep
        if not handle:
            raise self._failure()
        return Plan(self._library, handle, n_buffers)

    def run(self, plan: "Plan", pointers: Any, dims: Any, times: Any = None) -> None:
        """Run a loaded plan. pointers: addresses by buffer number (0 is ignored); dims: the symbolic sizes.

        Each is a sequence, or a ctypes array that the caller keeps and updates (c_void_p, c_int64): then nothing is
        converted. times: a c_double array that receives microseconds per step.
        """
        if not isinstance(pointers, ctypes.Array):
            pointers = (c_void_p * len(pointers))(*pointers)
        if not isinstance(dims, ctypes.Array):
            dims = (c_int64 * len(dims))(*dims)
        if self._library.lz_run(plan.handle, pointers, dims, times):
            raise self._failure()


    adopt = None                     # any memory will do as it lies
    asynchronous = False

    def start(self, plan: "Plan", pointers: Any, dims: Any) -> int:
        """`run`: the cores that compute are those that would go on meanwhile. Returns a number for `wait`."""
        self.run(plan, pointers, dims)
        return 0

    def wait(self, started: int | None = None) -> None:
        """Returns at once: what was started is done."""

    def info(self) -> dict[str, str | int]:
        """What this runtime adds to a device's facts."""
        return {"isa": self.isa, "threads": self.threads}

    def set_wired_limit(self, nbytes: int) -> int:
        """Nothing is wired here: the pages are the system's. Returns 0."""
        return 0


class Plan:
    """A plan loaded into the library, unloaded when the object dies."""

    def __init__(self, library: ctypes.CDLL, handle: int, n_buffers: int) -> None:
        self.handle, self.n_buffers = handle, n_buffers
        weakref.finalize(self, library.lz_unload, handle).atexit = False


def _steps(steps: list[Any]) -> tuple[Any, list[Any]]:
    """The C form of the steps, and what must stay alive while it is used."""
    keep: list[Any] = []
    native = (_Step * len(steps))()
    for to, step in zip(native, steps, strict=True):
        views = (_View * (len(step.outputs) + len(step.inputs)))(*map(_view, [*step.outputs, *step.inputs]))
        ints = (c_int64 * len(step.ints))(*step.ints)
        floats = (c_double * len(step.floats))(*step.floats)
        to.kernel = step.kernel.encode()
        to.n_out, to.n_in, to.n_int, to.n_float = map(len, (step.outputs, step.inputs, step.ints, step.floats))
        to.views, to.ints, to.floats = views, ints, floats
        keep += views, ints, floats
    return native, keep


def _view(view: Any) -> _View:
    ndim = len(view.shape)
    if ndim > MAX_DIMS:
        raise RuntimeError(f"a view has {ndim} axes, the most is {MAX_DIMS}: shape {tuple(view.shape)}")
    code = getattr(view.dtype, "code", view.dtype)
    shape, strides = (c_int64 * MAX_DIMS)(*view.shape), (c_int64 * MAX_DIMS)(*view.strides)
    return _View(view.buffer, code, ndim, 0, view.offset, shape, strides)


@functools.cache
def runtime() -> Runtime:
    """The process's runtime, loaded at the first call."""
    return Runtime()


class _ArrayView:
    """A view on all of a NumPy array, given alone or as (array, name of the dtype that its bits are)."""

    def __init__(self, buffer: int, operand: Any) -> None:
        self.array, name = operand if isinstance(operand, tuple) else (operand, operand.dtype.name)
        self.buffer, self.dtype, self.offset, self.shape = buffer, DTYPES.index(name), 0, self.array.shape
        self.strides = [s // self.array.itemsize for s in self.array.strides]


class _Call:
    def __init__(
        self, kernel: str, outputs: list[Any], inputs: list[Any], ints: list[int], floats: list[float]
    ) -> None:
        self.kernel, self.outputs, self.inputs, self.ints, self.floats = kernel, outputs, inputs, ints, floats


def call(
    kernel: str,
    outputs: Sequence[Any],
    inputs: Sequence[Any],
    ints: Iterable[int] = (),
    floats: Iterable[float] = (),
    isa: str | None = None,
) -> None:
    """Run one kernel on NumPy arrays: a plan of one step. Strides are passed on; outputs are written in place.

    An operand is an array, or (array of uint16, "bfloat16"). An array given twice is one buffer, so a kernel that
    updates in place can be called. isa: the instruction set of this call only.
    """
    native = runtime()
    views = [_ArrayView(i + 1, operand) for i, operand in enumerate([*outputs, *inputs])]
    step = _Call(kernel, views[: len(outputs)], views[len(outputs) :], list(map(int, ints)), list(map(float, floats)))
    before = native.isa
    if isa is not None:
        native.set_isa(isa)
    try:
        plan = native.load([step], len(views) + 1, [], 0)
    finally:
        native.set_isa(before)
    native.run(plan, [0] + [np.asarray(v.array).ctypes.data for v in views], [])

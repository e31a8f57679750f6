"""A Metal device for machines without one: compiles the kernels' text for the CPU and runs every GPU thread of it.

`load()` is the Objective-C runtime and Metal driver (driver.cpp) that engine/metal talks to; `library`, `run`, `call`
run single kernels for the tests. metal_stdlib is the standard library, fibers.cpp the GPU. All is compiled by c++ (or
CXX) at first use and kept in the user's cache folder. LAZULITE_METAL_SANITIZE=thread or undefined: for a sanitizer.
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from .. import msl
from ..steps import FAULT, Dispatch, Scratch, Step, View
from ..vectors import Operand, Vector, bind

FOLDER = Path(__file__).parent
FLAGS = ["-std=c++17", "-fPIC", "-shared", "-fno-math-errno"]
KERNELS = ["-O1", "-nostdlib", "-fvisibility=hidden", "-fsigned-char", "-fno-strict-aliasing", "-ffp-contract=off",
           "-fno-exceptions", "-fno-rtti", "-fno-asynchronous-unwind-tables", "-Werror=vla"]
SANITIZERS = {"": [], "thread": ["-g", "-fsanitize=thread"],
              "undefined": ["-g", "-fsanitize=undefined", "-lubsan"]}
BUILT_IN = {"thread_position_in_grid": "grid", "thread_position_in_threadgroup": "place",
            "threadgroup_position_in_grid": "group", "threads_per_threadgroup": "size",
            "threadgroups_per_grid": "groups", "threads_per_grid": "total",
            "thread_index_in_threadgroup": "t.index", "thread_index_in_simdgroup": "t.index % 32",
            "simdgroup_index_in_threadgroup": "t.index / 32", "threads_per_simdgroup": "32",
            "simdgroups_per_threadgroup": "(t.size[0] * t.size[1] * t.size[2] + 31) / 32",
            "thread_index_in_quadgroup": "t.index % 4", "quadgroup_index_in_threadgroup": "t.index / 4"}
PARTIAL = {"scatter"}                         # kernels that write some elements of their output and keep the others
INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]+<metal_\w+>", re.M)      # metal_stdlib has them all
ATTRIBUTE = re.compile(r"\[\[\s*\w[^;{}]*?\]\]")
NAMES = r"\w+\s*(?:\[[^;\]]*\]\s*)*"
VARIABLE = re.compile(rf"\bthreadgroup\s+([\w:]+(?:<[^;>]*>)?)\s+({NAMES}(?:,\s*{NAMES})*);")


# ---------------------------------------------------------------- compiling

def cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lazulite" / "metal"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


@functools.cache
def _compiler() -> tuple[list[str], bytes]:
    """The command, and what changes when the code that it makes does."""
    command = compiler()
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"the emulated Metal device needs a C++17 compiler; {command[0]}: {error}",
                        "Install g++, or name another one in CXX.") from None
    info = Path("/proc/cpuinfo")
    if info.exists() and " f16c " in info.read_text():
        command.append("-mf16c")              # half in the processor instead of calls
    texts = [(FOLDER / name).read_bytes() for name in ("metal_stdlib", "msl.h", "fibers.cpp", "driver.cpp")]
    return command, b"\0".join([" ".join(command).encode(), version, *texts])


def _compile(suffix: str, text: str, *flags: str, file: str = "-") -> Path:
    """The compiled text (or file), from the cache if it is there. UserError shows the compiler's first errors."""
    command, identity = _compiler()
    key = hashlib.sha256(b"\0".join([identity, repr((FLAGS, flags)).encode(), text.encode()])).hexdigest()[:32]
    path = cache() / f"{key}{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            made, kind = Path(folder) / path.name, ["-x", "c++-header" if suffix == ".gch" else "c++"]
            done = subprocess.run([*command, *FLAGS, f"-I{FOLDER}", "-o", made, *kind, file, *flags],
                                  input=text.encode(), capture_output=True)
            if done.returncode:
                raise UserError("the kernel does not compile", _errors(done.stderr.decode()))
            made.rename(path)
    return path


def _errors(output: str) -> str:
    lines = output.splitlines()
    first = [i for i, line in enumerate(lines) if "error:" in line][:5] or [0]
    return "\n".join(line for i in first for line in lines[i:i + 3])


def _sanitizer() -> str:
    return os.environ.get("LAZULITE_METAL_SANITIZE", "")


@functools.cache
def _header(*flags: str) -> str:
    """The folder of the precompiled standard library: a tenth of a second less for every kernel."""
    path = _compile(".gch", "", *flags, file=str(FOLDER / "metal_stdlib"))
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    link = folder / "metal_stdlib.gch"
    if not link.exists():
        link.symlink_to(path)
    return str(folder)


def compile_kernels(text: str) -> Path:
    """A library of the kernels of a Metal source."""
    flags = [*KERNELS, *SANITIZERS[_sanitizer()]]
    return _compile(".so", _cpp(text), *flags, f"-I{_header(*flags)}", "-x", "none", "-lgcc")


def _cpp(text: str) -> str:
    """The same lines as C++, and the tables of msl.h."""
    source = msl.parse(text)
    number = iter(range(10**6))

    def variables(match: re.Match[str]) -> str:
        kind = match[1]
        out = []
        for name in re.finditer(r"(\w+)\s*((?:\[[^;\]]*\]\s*)*)(?:,|$)", match[2]):
            out.append(f"typedef {kind} {name[1]}_type{name[2]}; {name[1]}_type& {name[1]} = "
                       f"*({name[1]}_type*)msl::lz_threadgroup({next(number)}, sizeof({name[1]}_type));")
        return " ".join(out)

    body = ATTRIBUTE.sub(lambda m: "\n" * m[0].count("\n"), VARIABLE.sub(variables, INCLUDE.sub("", text)))
    functions, wrappers = [], []
    for name, kernel in source.kernels.items():
        call = ", ".join(_passed(a) for a in kernel.arguments)
        names = "".join(f'{{"{a.name}", {a.index}}}, ' for a in kernel.buffers.values())
        wrappers.append(f"static void call_{name}(void** a, const msl::Ids& t) {{ {name}({call}); }}\n"
                        f"static const msl::Argument arguments_{name}[] = {{{names}{{}}}};\n")
        functions.append(f'{{"{name}", call_{name}, arguments_{name}}}, ')
    constants = "".join(f'{{"{c.name}", {c.index}, {msl.DATA_TYPES[c.type]}, sizeof({c.name}), &{c.name}}}, '
                        for c in source.constants.values())
    export = 'extern "C" __attribute__((visibility("default"))) const'
    return (f'#include <metal_stdlib>\n#line 1 "source"\n{body}\n#line 1 "table"\n{"".join(wrappers)}namespace msl {{\n'
            f'{export} Function lz_functions[] = {{{"".join(functions)}{{}}}};\n'
            f"{export} Constant lz_constants[] = {{{constants}{{}}}};\n}}\n")


def _passed(a: msl.Argument) -> str:
    if a.attribute == "buffer":
        return f"({a.type})a[{a.index}]" if a.type.endswith("*") else f"*({a.type[:-1]}*)a[{a.index}]"
    if a.attribute in msl.POSITIONS:
        return f"place<{a.type.removeprefix('const ')}>(t.{BUILT_IN[a.attribute]})"
    return f"{a.type}({BUILT_IN[a.attribute]})"


# ---------------------------------------------------------------- the device

def load() -> ctypes.CDLL:
    """The library with objc_msgSend, MTLCreateSystemDefaultDevice and what else a Metal host calls."""
    return _load(_sanitizer())


@functools.cache
def _load(sanitizer: str) -> ctypes.CDLL:
    text = "".join(f'#include "{FOLDER / name}"\n' for name in ("fibers.cpp", "driver.cpp"))
    define = ["-DTHREAD_SANITIZER"] if sanitizer == "thread" else []
    path = _compile(".so", text, "-O2", *define, "-x", "none", "-Wl,--no-as-needed", "-lm", "-ldl")
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)     # the kernels' libraries find lz_meet and expf there
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
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(self.end), mmap.PAGESIZE, 0)


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

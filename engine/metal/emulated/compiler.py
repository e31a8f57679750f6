"""Metal's text as C++, compiled: macros take the address spaces away, tables say what there is (msl.h)."""
from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...errors import UserError
from .. import msl

FOLDER = Path(__file__).parent
# Compiling takes longer than running here: unrolling loops doubles it, sanitizers want no optimization at all.
FLAGS = ["-std=c++17", "-fPIC", "-shared", "-fno-math-errno"]
KERNELS = ["-O1", "-fno-tree-loop-optimize", "-nostdlib", "-fvisibility=hidden", "-fsigned-char", "-ffp-contract=off",
           "-fno-strict-aliasing", "-fno-exceptions", "-fno-rtti", "-fno-asynchronous-unwind-tables", "-Werror=vla"]
SANITIZERS = {"": [], "thread": ["-O0", "-g1", "-fsanitize=thread"],
              "undefined": ["-O0", "-g1", "-fsanitize=undefined", "-lubsan"]}
LIBRARY, RUNTIME = ("metal_stdlib", "msl.h"), ("msl.h", "fibers.cpp", "driver.cpp")
BUILT_IN = {"thread_position_in_grid": "grid", "thread_position_in_threadgroup": "place",
            "threadgroup_position_in_grid": "group", "threads_per_threadgroup": "size",
            "threadgroups_per_grid": "groups", "threads_per_grid": "total",
            "thread_index_in_threadgroup": "t.index", "thread_index_in_simdgroup": "t.index % 32",
            "simdgroup_index_in_threadgroup": "t.index / 32", "threads_per_simdgroup": "32",
            "simdgroups_per_threadgroup": "(t.size[0] * t.size[1] * t.size[2] + 31) / 32",
            "thread_index_in_quadgroup": "t.index % 4", "quadgroup_index_in_threadgroup": "t.index / 4"}
INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]+<metal_\w+>", re.M)      # metal_stdlib has them all
ATTRIBUTE = re.compile(r"\[\[\s*\w[^;{}]*?\]\]")
NAMES = r"\w+\s*(?:\[[^;\]]*\]\s*)*"
VARIABLE = re.compile(rf"\bthreadgroup\s+([\w:]+(?:<[^;>]*>)?)\s+({NAMES}(?:,\s*{NAMES})*);")


def cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lazulite" / "metal"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def command() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


@functools.cache
def _compiler() -> tuple[list[str], bytes]:
    """The command with the flags of all, and what it answers: both decide about the code that it makes."""
    words, info = command(), Path("/proc/cpuinfo")
    try:
        version = subprocess.run([*words, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"the emulated Metal device needs a C++17 compiler; {words[0]}: {error}",
                        "Install g++, or name another one in CXX.") from None
    if info.exists() and " f16c " in info.read_text():
        words.append("-mf16c")                # half in the processor instead of calls
    return [*words, *FLAGS, f"-I{FOLDER}"], version


def _compile(suffix: str, files: Sequence[str], text: str, *flags: str, main: str = "-") -> Path:
    """The compiled text (or main file), from the cache if it is there. files: what else the result depends on.
    UserError shows the compiler's first errors."""
    words, version = _compiler()
    parts = [version, *(part.encode() for part in (*words, *flags, text)), *((FOLDER / f).read_bytes() for f in files)]
    path = cache() / f"{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            made, kind = Path(folder) / path.name, "c++-header" if suffix == ".gch" else "c++"
            done = subprocess.run([*words, "-o", made, "-x", kind, main, *flags], input=text.encode(),
                                  capture_output=True)
            if done.returncode:
                raise UserError("the kernel does not compile", _errors(done.stderr.decode()))
            made.rename(path)
    return path


def _errors(output: str) -> str:
    lines = output.splitlines()
    first = [i for i, line in enumerate(lines) if "error:" in line][:5] or [0]
    return "\n".join(line for i in first for line in lines[i:i + 3])


def sanitizer() -> str:
    return os.environ.get("LAZULITE_METAL_SANITIZE", "")


@functools.cache
def _header(*flags: str) -> str:
    """The folder of the precompiled standard library: a tenth of a second less for every kernel."""
    path = _compile(".gch", LIBRARY, "", *flags, main=str(FOLDER / "metal_stdlib"))
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (folder / "metal_stdlib.gch").symlink_to(path)
    return str(folder)


def compile_kernels(text: str) -> Path:
    """A library of the kernels of a Metal source."""
    flags = [*KERNELS, *SANITIZERS[sanitizer()]]
    return _compile(".so", LIBRARY, _cpp(text), *flags, f"-I{_header(*flags)}", "-x", "none", "-lgcc")


@functools.cache
def compile_runtime(sanitizer: str) -> Path:
    """The library of the GPU and its driver."""
    define = ["-DTHREAD_SANITIZER"] if sanitizer == "thread" else []
    text = "".join(f'#include "{name}"\n' for name in RUNTIME)
    return _compile(".so", RUNTIME, text, "-O2", *define, "-x", "none", "-Wl,--no-as-needed", "-lm", "-ldl")


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

    body = VARIABLE.sub(variables, INCLUDE.sub("", msl.without_comments(text)))
    body = ATTRIBUTE.sub(lambda m: "\n" * m[0].count("\n"), body)
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

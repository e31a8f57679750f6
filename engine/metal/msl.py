"""What the host must know of a Metal source: its kernels, their arguments and function constants. Not a compiler.

`source` assembles the text that goes to the Metal compiler; `parse` reads the signatures in it. From `device const T*`
(read) and `device T*` (written) come the barriers between kernels.
"""
from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

FOLDER = Path(__file__).parent
BUFFERS = 31                                  # argument table of a compute encoder
DATA_TYPES = {"float": 3, "half": 16, "int": 29, "uint": 33, "short": 37, "ushort": 41, "char": 45, "uchar": 49,
              "bool": 53, "long": 81, "ulong": 85}                # MTLDataType
POSITIONS = {"thread_position_in_grid", "thread_position_in_threadgroup", "threadgroup_position_in_grid",
             "threads_per_threadgroup", "threadgroups_per_grid", "threads_per_grid"}
INDICES = {"thread_index_in_threadgroup", "thread_index_in_simdgroup", "simdgroup_index_in_threadgroup",
           "threads_per_simdgroup", "simdgroups_per_threadgroup", "thread_index_in_quadgroup",
           "quadgroup_index_in_threadgroup"}
WIDTH = re.compile(r"(?:const\s+)?(?:uint|ushort)([23]?)")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
KERNEL = re.compile(r"(?:\bkernel|\[\[\s*kernel\s*\]\])\s+(\w+)\s+(\w+)\s*\(")
ARGUMENT = re.compile(r"(.*?)(\w+)\s*\[\[\s*(\w+)\s*(?:\(\s*(\w+)\s*\))?[^\]]*\]\]", re.S)
CONSTANT = re.compile(r"\bconstant\s+(\w+)\s+(\w+)\s*\[\[\s*function_constant\(\s*(\d+)\s*\)\s*\]\]")
HEADERS = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\n"  # before macros, whose names they may use
DIRECTIVE = re.compile(r"^#line (\d+)[^\n]*\n", re.M)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"common\.h"[^\n]*$', re.M)


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel. attribute: "buffer" (index: its place in the argument table) or the built-in value."""

    name: str
    type: str
    attribute: str
    index: int
    line: int

    @property
    def written(self) -> bool:
        return self.type.startswith("device") and not self.constant

    @property
    def constant(self) -> bool:
        return bool(re.search(r"\bconst(ant)?\b", self.type))


@dataclass(frozen=True)
class Kernel:
    name: str
    arguments: tuple[Argument, ...]
    line: int

    @functools.cached_property
    def buffers(self) -> dict[str, Argument]:
        """The arguments that a host binds, by name."""
        return {a.name: a for a in self.arguments if a.attribute == "buffer"}


@dataclass(frozen=True)
class Constant:
    """A function constant: `constant int K [[function_constant(0)]];`"""

    name: str
    type: str
    index: int


@dataclass(frozen=True)
class Source:
    kernels: Mapping[str, Kernel]
    constants: Mapping[str, Constant]


def source(file: str, defines: Mapping[str, str | int] | None = None, text: str = "") -> str:
    """The text for the Metal compiler: macros, then `file`.metal (or `text` in its place) with common.h put in.

    newLibraryWithSource knows no include path; #line keeps the line numbers of the files in its messages.
    """
    macros = "".join(f"#define {name} {value}\n" for name, value in (defines or {}).items())
    return HEADERS + macros + _assembled(file, text)


@functools.lru_cache(4096)
def _assembled(file: str, text: str) -> str:
    def include(match: re.Match[str]) -> str:
        after = text.count("\n", 0, match.start()) + 2
        return f'#line 1 "common.h"\n{(FOLDER / "common.h").read_text()}\n#line {after} "{file}.metal"'

    text = text or (FOLDER / f"{file}.metal").read_text()
    return f'#line 1 "{file}.metal"\n' + INCLUDE.sub(include, text)


@functools.lru_cache(4096)
def parse(text: str) -> Source:
    """The kernels and function constants of a source; UserError names the line of what Metal would refuse."""
    text = without_comments(text)
    constants = [Constant(m[2], m[1], int(m[3])) for m in CONSTANT.finditer(text)]
    for i, constant in enumerate(constants):
        if constant.type not in DATA_TYPES:
            raise UserError(f"function constant {constant.name} has type {constant.type}",
                            f"One of {list(DATA_TYPES)}.")
        if twin := next((c for c in constants[:i] if c.index == constant.index or c.name == constant.name), None):
            raise UserError(f"function constants {twin.name} and {constant.name} share a name or index",
                            "Give each its own.")
    kernels: dict[str, Kernel] = {}
    for kernel in _kernels(text):
        if kernel.name in kernels:
            raise UserError(f"kernel {kernel.name} is there twice: line {kernels[kernel.name].line} and {kernel.line}",
                            "Give each its own name.")
        kernels[kernel.name] = kernel
    return Source(kernels, {c.name: c for c in constants})


def without_comments(text: str) -> str:
    """Spaces in their place, so that lines keep their numbers."""
    return COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def _line(text: str, at: int) -> int:
    """The line number at a place, as the last #line before it says."""
    directive = None
    for directive in DIRECTIVE.finditer(text, 0, at):  # noqa: B007 - the last one counts
        pass
    return int(directive[1]) + text.count("\n", directive.end(), at) if directive else text.count("\n", 0, at) + 1


def _kernels(text: str) -> Iterator[Kernel]:
    for match in KERNEL.finditer(text):
        line, end = _line(text, match.start()), _closing(text, match.end())
        if match[1] != "void":
            raise UserError(f"line {line}: kernel {match[2]} returns {match[1]}", "Kernels return void.")
        arguments = tuple(_argument(match[2], part, _line(text, match.end() + at))
                          for at, part in _split(text[match.end():end]))
        _check(match[2], line, arguments)
        yield Kernel(match[2], arguments, line)


def _closing(text: str, at: int) -> int:
    depth = 1
    for i in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    raise UserError(f"line {_line(text, at)}: the kernel's argument list has no end", "Close the parenthesis.")


def _split(text: str) -> Iterator[tuple[int, str]]:
    """The arguments between commas, with their places."""
    depth = start = 0
    for i, c in enumerate(text + ","):
        depth += {"(": 1, "<": 1, "[": 1, ")": -1, ">": -1, "]": -1}.get(c, 0)
        if c == "," and depth == 0:
            if part := text[start:i].strip():
                yield start + text[start:i].index(part[0]), part
            start = i + 1


def _argument(kernel: str, text: str, line: int) -> Argument:
    match = ARGUMENT.fullmatch(text)
    if match is None:
        raise UserError(f"line {line}: kernel {kernel}: argument {' '.join(text.split())!r} has no attribute",
                        "Write `device const T* x [[buffer(0)]]`, `constant P& p [[buffer(1)]]` or a built-in value.")
    kind, name, attribute, index = " ".join(match[1].split()).replace(" *", "*").replace(" &", "&"), *match.groups()[1:]
    where = f"line {line}: kernel {kernel}: argument {name}"
    if attribute == "buffer":
        if not (index or "").isdigit() or int(index) >= BUFFERS:
            raise UserError(f"{where} has buffer index {index}", f"The highest is {BUFFERS - 1}.")
        if not re.match(r"(const\s+)?(device|constant)\b.*[*&]$", kind):
            raise UserError(f"{where} has type {kind}", "Buffers are `device T*`, `device const T*` or `constant T&`.")
        return Argument(name, re.sub(r"^const (device)", r"\1 const", kind), attribute, int(index), line)
    if attribute not in POSITIONS | INDICES:
        raise UserError(f"{where} has attribute {attribute}", f"One of {sorted(POSITIONS | INDICES)}.")
    width = WIDTH.fullmatch(kind)
    if not width or (width[1] and attribute in INDICES):
        raise UserError(f"{where} has type {kind}", "uint or ushort" + ("" if attribute in INDICES else ", of 1 to 3."))
    return Argument(name, kind, attribute, -1, line)


def _check(kernel: str, line: int, arguments: tuple[Argument, ...]) -> None:
    """What only the whole list shows: an index given twice, positions of different widths."""
    seen: dict[int, str] = {}
    for a in arguments:
        if a.attribute == "buffer" and seen.setdefault(a.index, a.name) != a.name:
            raise UserError(f"line {a.line}: kernel {kernel}: {seen[a.index]} and {a.name} share a buffer index",
                            f"Index {a.index} is taken: give each its own.")
    widths = {WIDTH.fullmatch(a.type)[1] for a in arguments if a.attribute in POSITIONS}    # type: ignore[index]
    if len(widths) > 1:
        raise UserError(f"line {line}: kernel {kernel}: positions have different widths", "All scalar, all 2 or all 3.")

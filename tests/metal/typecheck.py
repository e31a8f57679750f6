"""Metal source judged without Apple's compiler: libclang reads it as C++ for OpenCL, which has the same address spaces.

What that front end takes and Metal does not is found by a walk over the tree.
"""
from __future__ import annotations

import atexit
import functools
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from clang.cindex import Cursor, CursorKind, Diagnostic, Index, StorageClass, TranslationUnit, Type, TypeKind, conf

HEADERS = Path(__file__).parent / "check"
FLAGS = ["-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "--target=spir64", f"-I{HEADERS}",
         "-Wno-pragma-once-outside-header", "-Wno-unknown-attributes", "-Wno-ignored-attributes",
         "-Wno-unknown-pragmas", "-Wno-tautological-compare", "-Wuninitialized", "-Wsometimes-uninitialized",
         "-Wconditional-uninitialized", "-Wpre-c++17-compat",  # Metal 3 is C++14
         "-Xclang", "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space,"
                    "+__cl_clang_non_portable_kernel_param_types"]
NAME = "kernels.metal"
CONSTANT = re.compile(r"^constant(?=[^;=]*\[\[\s*function_constant)", re.MULTILINE)
REFUSED = {CursorKind.GOTO_STMT: "goto", CursorKind.LAMBDA_EXPR: "lambdas", CursorKind.CXX_NEW_EXPR: "new",
           CursorKind.CXX_DELETE_EXPR: "delete", CursorKind.CXX_THROW_EXPR: "throw", CursorKind.CXX_TRY_STMT: "try",
           CursorKind.CXX_DYNAMIC_CAST_EXPR: "dynamic_cast", CursorKind.CXX_TYPEID_EXPR: "typeid"}
FUNCTIONS = CursorKind.FUNCTION_DECL, CursorKind.FUNCTION_TEMPLATE, CursorKind.CXX_METHOD
TYPED = {*FUNCTIONS, CursorKind.VAR_DECL, CursorKind.PARM_DECL}
USES = {CursorKind.CALL_EXPR, CursorKind.DECL_REF_EXPR}
NOTED = {*FUNCTIONS, CursorKind.VAR_DECL, *USES}
LEAVES = {CursorKind.DECL_REF_EXPR, CursorKind.TYPE_REF, CursorKind.INTEGER_LITERAL, CursorKind.FLOATING_LITERAL,
          CursorKind.CXX_BOOL_LITERAL_EXPR}
JUDGED = {*REFUSED, *TYPED, CursorKind.CALL_EXPR, CursorKind.BINARY_OPERATOR}
POINTED = re.compile(r"__(?:global|constant|local|private)\b")
SPACE = re.compile(r"__(?:global|constant|local)\b")


def findings(text: str) -> list[str]:
    """What is wrong with a source, a line each: `number: the line: why`. Empty when all is well."""
    lines, (unit, _, walked) = text.splitlines(), _read(text)
    return [f"{n}: {lines[n - 1].strip() if 0 < n <= len(lines) else ''}: {why}"
            for n, why in sorted({*_diagnosed(unit), *walked})]


def needed(text: str, kernel: str) -> set[str]:
    """The function constants that a kernel uses, in functions that it calls too: Metal wants all of them."""
    _, calls, _ = _read(text)
    start = next((usr for usr, name in calls.kernels.items() if name == kernel))
    return {calls.constants[usr] for usr in calls.reached(start) if usr in calls.constants}


@functools.lru_cache(1)
def _read(text: str) -> tuple[TranslationUnit, Calls, set[tuple[int, str]]]:
    text = CONSTANT.sub("extern constant", text)           # OpenCL wants an initializer otherwise
    unit = Index.create().parse(NAME, [*FLAGS, *_headers()], [(NAME, text)])
    calls, walked = Calls(), set()
    for top in unit.cursor.get_children():
        if top.location.file and top.location.file.name == NAME:
            walked.update(_walked(top, None, calls))
    return unit, calls, walked


@functools.cache
def _headers() -> list[str]:
    """The standard library's declarations, parsed once."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    text = "#include <metal_stdlib>\n"
    unit = Index.create().parse("all.h", FLAGS, [("all.h", text)], TranslationUnit.PARSE_INCOMPLETE)
    unit.save(f"{folder}/all.pch")
    return ["-include-pch", f"{folder}/all.pch"]


def _diagnosed(unit: TranslationUnit) -> Iterator[tuple[int, str]]:
    for diagnostic in unit.diagnostics:
        if diagnostic.severity >= Diagnostic.Warning:
            places = [d.location for d in (diagnostic, *reversed(diagnostic.children)) if str(d.location.file) == NAME]
            yield places[0].line if places else 0, diagnostic.spelling  # a template's error: where it was called


class Calls:
    """What functions use, by USR: functions that they call, and function constants."""

    def __init__(self) -> None:
        self.used: dict[str, set[str]] = {}
        self.kernels: dict[str, str] = {}
        self.constants: dict[str, str] = {}

    def reached(self, start: str) -> set[str]:
        found: set[str] = set()
        ways = [start]
        while ways:
            new = self.used.get(ways.pop(), set()) - found
            found |= new
            ways += new
        return found

    def note(self, cursor: Cursor, kind: CursorKind, function: Cursor | None) -> None:
        if kind in FUNCTIONS:
            self.kernels[cursor.get_usr()] = cursor.spelling
        elif function is None and kind is CursorKind.VAR_DECL and cursor.storage_class is StorageClass.EXTERN:
            self.constants[cursor.get_usr()] = cursor.spelling
        elif function and kind in USES and (used := cursor.referenced):
            template = conf.lib.clang_getSpecializedCursorTemplate(used)
            self.used.setdefault(function.get_usr(), set()).add((template or used).get_usr())


def _walked(cursor: Cursor, function: Cursor | None, calls: Calls) -> list[tuple[int, str]]:
    """What Metal refuses in a node and below it; `function`: which it is in."""
    kind, found = cursor.kind, []
    if kind in NOTED:
        calls.note(cursor, kind, function)
    function = cursor if kind in FUNCTIONS else function
    for child in () if kind in LEAVES else cursor.get_children():
        found += _walked(child, function, calls)
    if kind in JUDGED and (reasons := [*_judged(cursor, kind, function)]):
        found += [(cursor.location.line, why) for why in reasons]
    if kind in FUNCTIONS and cursor.get_usr() in calls.reached(cursor.get_usr()):
        found.append((cursor.location.line, f"{cursor.spelling} calls itself"))
    return found


def _judged(cursor: Cursor, kind: CursorKind, function: Cursor | None) -> Iterator[str]:
    """What Metal refuses in one node."""
    if kind in REFUSED:
        yield f"Metal has no {REFUSED[kind]}"
    if kind is CursorKind.CXX_METHOD and cursor.is_virtual_method():
        yield "Metal has no virtual functions"
    if kind is CursorKind.VAR_DECL and function and cursor.storage_class is StorageClass.STATIC:
        yield "Metal has no static variables in functions"
    if kind in TYPED and _nowhere(typed := cursor.result_type if kind in FUNCTIONS else cursor.type):
        yield f"a pointer or reference without an address space: {typed.spelling}"
    if kind is CursorKind.CALL_EXPR and _copies(cursor):
        yield "a struct is copied from another address space: copy its members"
    if kind is CursorKind.BINARY_OPERATOR and re.fullmatch("half[234]?", cursor.type.spelling):
        yield "arithmetic in half: half is for memory, compute in float"


def _nowhere(typed: Type) -> bool:
    """Whether it points to no address space: then it is generic here, and an error in Metal."""
    return typed.kind in (TypeKind.POINTER, TypeKind.LVALUEREFERENCE) and not POINTED.search(
        typed.get_pointee().spelling)


def _copies(call: Cursor) -> bool:
    """Whether a copy or an assignment of a struct has its operands in different address spaces."""
    called, operands = call.referenced, list(call.get_arguments())
    if called is None or call.type.spelling.endswith("bfloat"):
        return False
    if called.kind is CursorKind.CONSTRUCTOR:
        spaces = {"__private", *map(_space, operands)}
    elif called.spelling == "operator=":
        spaces = set(map(_space, operands))
    else:
        return False
    return len(spaces) > 1


def _space(expression: Cursor) -> str:
    while "__generic" in expression.type.spelling and (inner := list(expression.get_children())):
        expression = inner[0]                              # below the cast that the call needs
    found = SPACE.search(expression.type.spelling)
    return found[0] if found else "__private"

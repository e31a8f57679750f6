"""Elementwise chains: the step's program written as Metal.

The text depends on the program alone. Shapes, strides and constants are in a parameter block, and dtypes and the number
of axes are function constants, so that few texts are compiled.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from ..cpu import runtime
from .steps import SIZES, Dispatch, Step, Unsupported, View, ceil, struct

CLASSES = {0: "float", 2: "long", 3: "ulong"}              # of the registers
DTYPES = list(SIZES)                                       # their numbers are the runtimes'
MAX_AXES, THREADS, ITEMS = 8, 256, 4                       # ITEMS: of a thread
EXPRESSIONS = {                                            # by opcode; others are calls of a function of that name
    "neg": "negative(a)", "abs": "magnitude(a)", "sign": "sign_of(a)", "round": "rint(a)", "square": "mul(a, a)",
    "reciprocal": "1.0f / a", "relu": "maximum(a, T(0))", "logical_not": "a == T(0)", "bit_not": "~a",
    "isnan": "a != a",
    "isinf": "fabs(a) == INFINITY", "div": "a / b", "remainder": "modulo(a, b)", "pow": "power(a, b)", "eq": "a == b",
    "ne": "a != b", "lt": "a < b", "le": "a <= b", "gt": "a > b", "ge": "a >= b",
    "logical_and": "a != T(0) && b != T(0)", "logical_or": "a != T(0) || b != T(0)", "bit_and": "a & b",
    "bit_or": "a | b", "bit_xor": "a ^ b", "where": "a != T(0) ? b : c"}
BINARY = ("add", "sub", "mul", "floor_div", "maximum", "minimum", "atan2", "logaddexp", "shl", "shr")
WRAPPED = {"bool": "a != T(0)", "uint8": "T(uchar(a))", "uint16": "T(ushort(a))", "uint32": "T(uint(a))", "uint64": "a",
           "int8": "T(char(a))", "int16": "T(short(a))", "int32": "T(int(a))", "int64": "a"}


def elementwise(step: Step) -> list[Dispatch]:
    cls, _, n_constants, *rest = step.ints
    n_in, n_out, size = len(step.inputs), len(step.outputs), step.outputs[0].size
    views = [*step.inputs, *step.outputs]
    if cls not in CLASSES:
        raise Unsupported("float64 or complex numbers")
    if size >= 2**32 or len(views) > 30:
        raise Unsupported(f"{size} items of {len(views)} operands")
    shape, strides = merged(views)
    text = source(CLASSES[cls], n_in, n_constants, tuple(rest[:n_out]), tuple(rest[n_out:]))
    p = struct(size, *padded(shape, *strides)) + (_constants(step.floats, cls) or struct(0))
    names = [*(f"i{k}" for k in range(n_in)), *(f"o{k}" for k in range(n_out))]
    dtypes = {f"D{k}": code(view) for k, view in enumerate(views)}
    return [Dispatch("elementwise", "elementwise", dict(zip(names, views, strict=True)) | {"p": p},
                     (ceil(size, THREADS * ITEMS), 1, 1), (THREADS, 1, 1),
                     constants={"AXES": len(shape), "WIDE": is_wide(views)} | dtypes, source=text)]


def code(view: View) -> int:
    """The number of a dtype that Metal has."""
    return DTYPES.index(view.dtype) if view.type else 0


def is_wide(views: Sequence[View]) -> bool:
    """Whether some offset in elements is beyond 31 bits."""
    return any(sum((n - 1) * abs(s) for n, s in zip(v.shape, v.strides, strict=True)) >= 2**31 for v in views)


def merged(views: Sequence[View]) -> tuple[list[int], list[list[int]]]:
    """The shape of all views with as few axes as their strides allow, at least one, and the strides of each view.
    Unsupported where these do not fit a parameter block."""
    axes: list[tuple[int, list[int]]] = []
    for i, n in enumerate(views[0].shape):
        strides = [v.strides[i] for v in views]
        if n == 1:
            continue
        if axes and axes[-1][1] == [s * n for s in strides]:
            axes[-1] = axes[-1][0] * n, strides
        else:
            axes.append((n, strides))
    axes = axes or [(1, [0] * len(views))]
    if len(axes) > MAX_AXES or any(abs(s) >= 2**31 for _, strides in axes for s in strides):
        raise Unsupported(f"{len(axes)} axes with strides {axes}")
    return [n for n, _ in axes], [[strides[k] for _, strides in axes] for k in range(len(views))]


def padded(*rows: Sequence[int]) -> list[int]:
    """Rows of a parameter block, each as long as axes can be."""
    return [n for row in rows for n in [*row, *[0] * (MAX_AXES - len(row))]]


def _constants(floats: Sequence[float], cls: int) -> bytes:
    if cls == 0:
        return np.array(floats, np.float32).tobytes()
    return b"".join((int(f) % 2**64).to_bytes(8, "little") for f in floats)


@cache
def functions() -> str:
    return Path(__file__).with_name("elementwise.metal").read_text()


@cache
def opcodes() -> list[str]:
    return list(runtime().opcodes)


@cache
def source(register: str, n_in: int, n_constants: int, outputs: tuple[int, ...], program: tuple[int, ...]) -> str:
    """The kernel's text. Every result has a register of its own, so that programs that differ in their use are one."""
    n_views, n_loaded = n_in + len(outputs), n_in + n_constants
    name = {r: f"r{r}" for r in range(n_loaded)}
    lines = [f"const T r{k} = get<T>(i{k}, D{k}, {_place(k)});" for k in range(n_in)]
    lines += [f"const T r{n_in + k} = {_constant(register, k)};" for k in range(n_constants)]
    for i in range(0, len(program), 5):
        op, target, *operands = program[i:i + 5]
        lines.append(f"const T r{n_loaded + i // 5} = T({_expression(opcodes()[op], operands, name)});")
        name[target] = f"r{n_loaded + i // 5}"
    lines += [f"put<T>(o{k}, D{n_in + k}, {_place(n_in + k)}, {name[r]});" for k, r in enumerate(outputs)]
    buffers = [*(f"device const uchar* i{k} [[buffer({k})]]" for k in range(n_in)),
               *(f"device uchar* o{k} [[buffer({n_in + k})]]" for k in range(len(outputs))),
               f"constant Params& p [[buffer({n_views})]]", "uint group [[threadgroup_position_in_grid]]",
               "uint thread_index [[thread_position_in_threadgroup]]"]
    dtypes = "\n".join(f"constant int D{k} [[function_constant({2 + k})]];" for k in range(n_views))
    words = max(1, n_constants * (1 if register == "float" else 2))
    return f"""{functions()}
{dtypes}
typedef {register} T;
struct Params {{ uint size, shape[{MAX_AXES}]; int strides[{n_views}][{MAX_AXES}]; uint c[{words}]; }};

kernel void elementwise({", ".join(buffers)}) {{
  for (uint k = 0; k < {ITEMS}; k++) {{
    const uint at = (group * {ITEMS} + k) * {THREADS} + thread_index;
    if (at >= p.size) return;
    {(chr(10) + "    ").join(lines)}
  }}
}}
"""


def _place(view: int) -> str:
    return f"offset(at, AXES, WIDE, p.shape, p.strides[{view}])"


def _constant(register: str, k: int) -> str:
    if register == "float":
        return f"as_type<float>(p.c[{k}])"
    return f"T(ulong(p.c[{2 * k}]) | ulong(p.c[{2 * k + 1}]) << 32)"


def _expression(op: str, operands: Sequence[int], name: Mapping[int, str]) -> str:
    if op == "wrap":                                       # its second operand is a dtype
        expression = WRAPPED[DTYPES[operands[1]]]
    else:
        expression = EXPRESSIONS.get(op) or (f"{op}(a, b)" if op in BINARY else f"{op}(a)")
    return re.sub(r"\b[abc]\b", lambda m: name[operands["abc".index(m[0])]], expression)

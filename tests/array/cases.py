"""The table of op cases: a function on arrays, the same in NumPy, and the inputs to draw; test_cases.py checks them."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.special

from lazulite.engine import array as mx


@dataclass(frozen=True)
class Input:
    """kind: normal, positive (0.3 … 2.3), unit (-0.9 … 0.9), distinct (a shuffled grid), int (low … high - 1), bool,
    complex. dtype: a name, float32 and int32 without one."""

    shape: tuple[int, ...]
    kind: str = "normal"
    low: int = 0
    high: int = 8
    dtype: str | None = None


@dataclass(frozen=True)
class Case:
    """fn takes arrays, reference float64, int64, bool or complex128 ndarrays; both return one or a tuple. A bare shape
    is an Input of normal floats. grad, vmap, half, empty: whether there are gradients, batches, 16-bit floats, sizes of
    0. tolerance: of float32, relative to the largest magnitude."""

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: tuple[Input | tuple[int, ...], ...]
    grad: bool = True
    vmap: bool = True
    tolerance: float = 1e-5
    half: bool = True
    empty: bool = True


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus_tanh(x):
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def elementwise(kind: str, **references: Callable[..., Any]) -> list[Case]:
    """Rows of functions of one, two or three operands of the same kind, a letter each: `add2`."""
    rows = []
    for key, reference in references.items():
        name, count = (key[:-1], int(key[-1])) if key[-1] in "23" and key not in LOGS else (key, 1)
        rows.append(Case(name if kind in ("normal", "positive", "unit") else f"{name} {kind}", getattr(mx, name),
                         reference, (Input((3, 4), kind, 1),) * count))
    return rows


def reduced(name: str, axis: Any, kind: str = "distinct") -> Case:
    ours, theirs = getattr(mx, name), getattr(np, name)
    return Case(f"{name} over {axis} of {kind}", lambda x: ours(x, axis), lambda x: theirs(x, axis=axis),
                (Input(B, kind),))


def traced(fn, x):
    """Value and gradient of fn of one array, as a tuple."""
    return tuple(mx.value_and_grad(fn)(x))


CUBE = mx.custom_function(lambda x: x * x * x)
CUBE.vjp(lambda x, cotangent, output: cotangent * 3 * x * x)
LOGS = ("log2", "arctan2")
A, B = (3, 4), (2, 3, 4)
DISTINCT = Input(B, "distinct")
INTS = Input((3, 4), "int")

CASES = [
    *elementwise(
        "normal", negative=np.negative, abs=np.abs, sign=np.sign, floor=np.floor, ceil=np.ceil, round=np.rint,
        square=np.square, relu=lambda x: np.maximum(x, 0), exp=np.exp, expm1=np.expm1, sin=np.sin, cos=np.cos,
        tan=np.tan, sinh=np.sinh, cosh=np.cosh, tanh=np.tanh, arctan=np.arctan, arcsinh=np.arcsinh,
        erf=scipy.special.erf,
        sigmoid=sigmoid, silu=lambda x: x * sigmoid(x),
        gelu=lambda x: x * (1 + scipy.special.erf(x / math.sqrt(2))) / 2,
        gelu_tanh=softplus_tanh, add2=np.add, subtract2=np.subtract, multiply2=np.multiply, maximum2=np.maximum,
        minimum2=np.minimum, logaddexp2=np.logaddexp, equal2=np.equal, not_equal2=np.not_equal, less2=np.less,
        less_equal2=np.less_equal, greater2=np.greater, greater_equal2=np.greater_equal, isnan=np.isnan, isinf=np.isinf,
        isfinite=np.isfinite),
    *elementwise(
        "positive", log=np.log, log2=np.log2, log10=np.log10, log1p=np.log1p, sqrt=np.sqrt,
        rsqrt=lambda x: 1 / np.sqrt(x), reciprocal=np.reciprocal, divide2=np.divide, power2=np.power,
        floor_divide2=np.floor_divide, remainder2=np.remainder),
    *elementwise("unit", arcsin=np.arcsin, arccos=np.arccos, arctanh=np.arctanh, erfinv=scipy.special.erfinv),
    *elementwise("int", add2=np.add, floor_divide2=np.floor_divide, remainder2=np.remainder,
                 bitwise_and2=np.bitwise_and, bitwise_or2=np.bitwise_or, bitwise_xor2=np.bitwise_xor,
                 left_shift2=np.left_shift,
                 right_shift2=np.right_shift, bitwise_invert=np.invert, abs=np.abs),
    *elementwise("bool", logical_and2=np.logical_and, logical_or2=np.logical_or, logical_not=np.logical_not),
    Case("arctan2", mx.arctan2, np.arctan2, (A, A)),
    Case("arccosh", lambda x: mx.arccosh(x + 1), lambda x: np.arccosh(x + 1), (Input(A, "positive"),)),
    Case("a broadcast sum", mx.add, np.add, ((2, 1, 4), (3, 1))),
    Case("a scalar operand", lambda x: 2 - x / 3, lambda x: 2 - x / 3, (A,)),
    Case("an integer power", lambda x: x**3, lambda x: x**3, (A,)),
    Case("where", mx.where, np.where, (Input(A, "bool"), A, (4,))),
    Case("clip", lambda x: mx.clip(x, -0.5, 0.5), lambda x: np.clip(x, -0.5, 0.5), (A,)),
    Case("divmod", lambda a, b: tuple(mx.divmod(a, b)), np.divmod, (Input(A, "positive"), Input(A, "positive"))),
    Case("astype", lambda x: x.astype(mx.float32) * 2, lambda x: x * 2, (A,), half=False),
    Case("astype of integers", lambda x: x.astype(mx.float32), lambda x: x.astype(float), (INTS,)),
    Case("isclose", mx.isclose, np.isclose, (A, A)), Case("allclose", mx.allclose, np.allclose, (A, A), vmap=False),
    Case("array_equal", mx.array_equal, np.array_equal, (INTS, INTS), vmap=False),

    # movements
    Case("reshape", lambda x: mx.reshape(x, (4, 6)), lambda x: x.reshape(4, 6), (B,)),
    Case("flatten", lambda x: mx.flatten(x, 1), lambda x: x.reshape(2, 12), (B,)),
    Case("unflatten", lambda x: mx.unflatten(x, 1, (2, 2)), lambda x: x.reshape(3, 2, 2), (A,)),
    Case("expand_dims", lambda x: mx.expand_dims(x, (0, -1)), lambda x: np.expand_dims(x, (0, -1)), (A,)),
    Case("squeeze", lambda x: mx.squeeze(x, 1), lambda x: np.squeeze(x, 1), ((3, 1, 4),)),
    Case("transpose", lambda x: mx.transpose(x, (2, 0, 1)), lambda x: np.transpose(x, (2, 0, 1)), (B,)),
    Case("swapaxes", lambda x: mx.swapaxes(x, 0, -1), lambda x: np.swapaxes(x, 0, -1), (B,)),
    Case("moveaxis", lambda x: mx.moveaxis(x, 0, 2), lambda x: np.moveaxis(x, 0, 2), (B,)),
    Case("broadcast_to", lambda x: mx.broadcast_to(x, (2, 3, 4)), lambda x: np.broadcast_to(x, (2, 3, 4)), ((3, 1),)),
    Case("broadcast_arrays", lambda *xs: tuple(mx.broadcast_arrays(*xs)), lambda *xs: tuple(np.broadcast_arrays(*xs)),
         (A, (2, 1, 1))),
    Case("view", lambda x: mx.view(x, mx.uint8), lambda x: x.astype("<i4").view(np.uint8), (INTS,)),
    Case("contiguous", lambda x: mx.contiguous(x.T), lambda x: x.T, (A,)),
    Case("slice", lambda x: x[:, 2:0:-1], lambda x: x[:, 2:0:-1], (B,)),
    Case("getitem", lambda x: x[1, None, ..., ::2], lambda x: x[1, None, ..., ::2], (B,)),
    Case("split", lambda x: tuple(mx.split(x, [1, 3], 2)), lambda x: tuple(np.split(x, [1, 3], 2)), (B,)),
    Case("flip", lambda x: mx.flip(x, 1), lambda x: np.flip(x, 1), (B,)),
    Case("tile", lambda x: mx.tile(x, (2, 1, 2)), lambda x: np.tile(x, (2, 1, 2)), (A,)),
    Case("repeat", lambda x: mx.repeat(x, 2, 1), lambda x: np.repeat(x, 2, 1), (A,)),
    Case("depends", lambda x, y: mx.depends(x * 2, y * 3), lambda x, y: x * 2, (A, A)),

    # joining and writing
    Case("concatenate", lambda *xs: mx.concatenate(xs, 1), lambda *xs: np.concatenate(xs, 1), (A, (3, 1), (3, 2))),
    Case("stack", lambda *xs: mx.stack(xs, 1), lambda *xs: np.stack(xs, 1), (A, A)),
    Case("pad", lambda x: mx.pad(x, ((1, 0), (2, 1)), constant_values=5.0),
         lambda x: np.pad(x, ((1, 0), (2, 1)), constant_values=5), (A,)),
    Case("tril", mx.tril, np.tril, (B,)), Case("triu", lambda x: mx.triu(x, 1), lambda x: np.triu(x, 1), (B,)),

    # reductions
    *(reduced(name, axis) for name in ("sum", "prod", "max", "min", "mean", "var", "std")
      for axis in (None, 1, (0, 2))),
    *(reduced(name, 0, kind) for name in ("any", "all", "sum") for kind in ("bool", "int")),
    reduced("argmax", 1), reduced("argmin", 1),
    Case("argmax of all", mx.argmax, np.argmax, (DISTINCT,), vmap=True),
    Case("sum keepdims", lambda x: mx.sum(x, 1, keepdims=True), lambda x: np.sum(x, 1, keepdims=True), (B,)),
    Case("prod with a zero", lambda x: mx.prod(x * mx.array([1, 0, 1, 1]), -1),
         lambda x: np.prod(x * [1, 0, 1, 1], -1), (A,)),
    Case("logsumexp", lambda x: mx.logsumexp(x, -1), lambda x: np.log(np.sum(np.exp(x), -1)) + 0 * np.max(x, -1), (B,)),
    Case("var ddof", lambda x: mx.var(x, 0, ddof=1), lambda x: np.var(x, 0, ddof=1), (A,)),

    # products and gathers
    Case("matmul", mx.matmul, np.matmul, ((3, 4), (4, 5))),
    Case("matmul of vectors", mx.matmul, np.matmul, ((4,), (4,))),
    Case("matmul of a vector", mx.matmul, np.matmul, ((4,), (2, 4, 3))),
    Case("matmul of batches", mx.matmul, np.matmul, ((2, 1, 3, 4), (5, 4, 2))),
    Case("addmm", lambda c, a, b: mx.addmm(c, a, b, 0.5, 2.0), lambda c, a, b: 0.5 * (a @ b) + 2 * c,
         ((5,), (3, 4), (4, 5))),
    Case("inner", mx.inner, np.inner, (A, (5, 4))), Case("outer", mx.outer, np.outer, ((3,), (4,))),
    Case("take", lambda x, i: mx.take(x, i, 1), lambda x, i: np.take(x, i, 1), (B, Input((2, 2), "int", -3, 3))),
    Case("take one", lambda x: mx.take(x, -1, 1), lambda x: np.take(x, -1, 1), (B,)),
    Case("take flat", mx.take, np.take, (B, Input((5,), "int", 0, 24))),
    Case("take with two arrays", lambda x, i, j: x[i, :, j], lambda x, i, j: x[i, :, j],
         (B, Input((3,), "int", 0, 2), Input((3,), "int", -4, 4))),

    # marks and functions as one node, as a gradient leaves them in the graph
    Case("stop_gradient", lambda x: traced(lambda a: (a * mx.stop_gradient(mx.sin(a))).sum(), x),
         lambda x: ((x * np.sin(x)).sum(), np.sin(x)), (A,), grad=False),
    Case("checkpoint", lambda x: traced(lambda a: mx.checkpoint(mx.sin)(a).sum(), x),
         lambda x: (np.sin(x).sum(), np.cos(x)), (A,)),
    Case("custom_function", lambda x: traced(lambda a: CUBE(a).sum(), x), lambda x: ((x**3).sum(), 3 * x**2), (A,)),
]

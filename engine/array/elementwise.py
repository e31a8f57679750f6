"""Elementwise functions of mlx.core: they promote, broadcast and make nodes."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import ops
from .array import Array
from .dtypes import Dtype, bfloat16, bool_, finfo, float32, uint8, uint32
from .node import Value, apply, show
from .operands import alias, array_of, broadcast_shapes, cast, operands, spread
from .primitives import RESULT, TABLE

__all__ = [
    "abs", "acos", "acosh", "add", "allclose", "arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctan2",
    "arctanh", "array_equal", "asin", "asinh", "astype", "atan", "atan2", "atanh", "bitwise_and", "bitwise_invert",
    "bitwise_left_shift", "bitwise_or", "bitwise_right_shift", "bitwise_xor", "ceil", "clip", "conj", "conjugate",
    "cos", "cosh", "degrees", "divide", "divmod", "equal", "erf", "erfinv", "exp", "expm1", "floor", "floor_divide",
    "from_fp8", "gelu", "gelu_tanh", "greater", "greater_equal", "imag", "isclose", "isfinite", "isinf", "isnan",
    "isneginf", "isposinf", "left_shift", "less", "less_equal", "log", "log10", "log1p", "log2", "logaddexp",
    "logical_and", "logical_not", "logical_or", "logical_xor", "maximum", "minimum", "multiply", "nan_to_num",
    "negative", "not_equal", "positive", "pow", "power", "radians", "real", "reciprocal", "relu", "remainder",
    "right_shift", "round", "rsqrt", "sigmoid", "sign", "silu", "sin", "sinh", "sqrt", "square", "subtract", "tan",
    "tanh", "to_fp8", "trunc", "where",
]
REAL = "buif"                        # the kinds of types that ops without complex numbers accept


def _unary(name: str, accepts: str = "buifc") -> Callable[[Any], Array]:
    primitive, inexact = TABLE[name], RESULT[name] == "inexact"

    def op(a: Any) -> Array:
        value = array_of(a)._value
        if value.dtype.kind not in accepts:
            raise _refused(name, value)
        return Array.of(apply(primitive, cast(value, float32) if inexact and not value.dtype.inexact else value)[0])

    return _named(op, name)


def _binary(name: str, accepts: str = "buifc") -> Callable[[Any, Any], Array]:
    primitive, inexact = TABLE[name], RESULT[name] == "inexact"

    def op(a: Any, b: Any) -> Array:
        x, y = operands(name, a, b, inexact=inexact)
        if x.dtype.kind not in accepts:
            raise _refused(name, x)
        return Array.of(apply(primitive, x, y)[0])

    return _named(op, name)


def _named(op: Callable[..., Array], name: str) -> Callable[..., Array]:
    op.__name__ = op.__qualname__ = name
    op.__doc__ = f"Elementwise {name}, with broadcasting and promotion."
    return op


def _refused(name: str, value: Value) -> ValueError:
    return ValueError(f"[{name}] {value.dtype}{show(value.shape)}: not a type it is defined for")


sign, square, negative = _unary("sign"), _unary("square"), _unary("negative", "uifc")
sqrt, rsqrt, reciprocal = _unary("sqrt"), _unary("rsqrt"), _unary("reciprocal")
exp, expm1, log, log2, log10, log1p = (_unary(n) for n in ("exp", "expm1", "log", "log2", "log10", "log1p"))
sin, cos, tan, sinh, cosh, tanh = (_unary(n) for n in ("sin", "cos", "tan", "sinh", "cosh", "tanh"))
arcsin, arccos, arctan = asin, acos, atan = [_unary(n) for n in ("arcsin", "arccos", "arctan")]
arcsinh, arccosh, arctanh = asinh, acosh, atanh = [_unary(n) for n in ("arcsinh", "arccosh", "arctanh")]
arctan2 = atan2 = _binary("arctan2", REAL)
erf, erfinv, sigmoid, relu = (_unary(n, REAL) for n in ("erf", "erfinv", "sigmoid", "relu"))
silu, gelu, gelu_tanh = (_unary(n, REAL) for n in ("silu", "gelu", "gelu_tanh"))
add, subtract, multiply, divide = (_binary(n) for n in ("add", "subtract", "multiply", "divide"))
power = pow = _binary("power")
floor_divide, remainder = (_binary(n, REAL) for n in ("floor_divide", "remainder"))
maximum, minimum, logaddexp = (_binary(n, REAL) for n in ("maximum", "minimum", "logaddexp"))
equal, not_equal = _binary("equal"), _binary("not_equal")
less, less_equal, greater, greater_equal = (
    _binary(n, REAL) for n in ("less", "less_equal", "greater", "greater_equal"))
logical_and, logical_or, logical_not = _binary("logical_and"), _binary("logical_or"), _unary("logical_not")
bitwise_and, bitwise_or, bitwise_xor = (_binary(n, "bui") for n in ("bitwise_and", "bitwise_or", "bitwise_xor"))
left_shift = bitwise_left_shift = _binary("left_shift", "ui")
right_shift = bitwise_right_shift = _binary("right_shift", "ui")
_abs, _magnitude, _invert = _unary("abs"), _unary("magnitude"), _unary("bitwise_invert", "ui")
_isnan, _isinf = _unary("isnan"), _unary("isinf")
_conjugate, _imag = _unary("conjugate"), _unary("imag")
_rounding = {name: _unary(name, REAL) for name in ("floor", "ceil", "round")}


def abs(a: Any) -> Array:
    a = array_of(a)
    return alias(a) if a.dtype.kind in "bu" else _magnitude(a) if a.dtype.kind == "c" else _abs(a)


def positive(a: Any) -> Array:
    return alias(array_of(a))


def conjugate(a: Any) -> Array:
    a = array_of(a)
    return _conjugate(a) if a.dtype.kind == "c" else alias(a)


conj = conjugate


def real(a: Any) -> Array:
    a = array_of(a)
    return astype(a, float32) if a.dtype.kind == "c" else alias(a)


def imag(a: Any) -> Array:
    a = array_of(a)
    return _imag(a) if a.dtype.kind == "c" else ops.zeros_like(a)


def floor(a: Any) -> Array:
    a = array_of(a)
    return _rounding["floor"](a) if a.dtype.inexact else alias(a)


def ceil(a: Any) -> Array:
    a = array_of(a)
    return _rounding["ceil"](a) if a.dtype.inexact else alias(a)


def trunc(a: Any) -> Array:
    """Towards zero."""
    a = array_of(a)
    return where(a < 0, ceil(a), floor(a)) if a.dtype.inexact else alias(a)


def round(a: Any, decimals: int = 0) -> Array:
    """To the nearest, ties to even."""
    a = array_of(a)
    if not a.dtype.inexact:
        return alias(a)
    return _rounding["round"](a * 10.0**decimals) * 10.0**-decimals if decimals else _rounding["round"](a)


def isnan(a: Any) -> Array:
    a = array_of(a)
    return _isnan(a) if a.dtype.inexact else ops.zeros(a.shape, bool_)


def isinf(a: Any) -> Array:
    a = array_of(a)
    return _isinf(a) if a.dtype.inexact else ops.zeros(a.shape, bool_)


def isfinite(a: Any) -> Array:
    return logical_not(logical_or(isnan(a), isinf(a)))


def isposinf(a: Any) -> Array:
    a = array_of(a)
    return equal(a, math.inf) if a.dtype.inexact else ops.zeros(a.shape, bool_)


def isneginf(a: Any) -> Array:
    a = array_of(a)
    return equal(a, -math.inf) if a.dtype.inexact else ops.zeros(a.shape, bool_)


def nan_to_num(a: Any, nan: float = 0, posinf: float | None = None, neginf: float | None = None) -> Array:
    """NaN and infinities replaced; infinities by the largest numbers of the type unless others are given."""
    a = array_of(a)
    if not a.dtype.inexact:
        return alias(a)
    if a.dtype.kind == "c":
        return nan_to_num(real(a), nan, posinf, neginf) + 1j * nan_to_num(imag(a), nan, posinf, neginf)
    limits = finfo(a.dtype)
    top, bottom = limits.max if posinf is None else posinf, limits.min if neginf is None else neginf
    return where(isnan(a), nan, where(isposinf(a), top, where(isneginf(a), bottom, a)))


def degrees(a: Any) -> Array:
    """Of radians."""
    return _floats(a) * (180 / math.pi)


def radians(a: Any) -> Array:
    """Of degrees."""
    return _floats(a) * (math.pi / 180)


def _floats(a: Any) -> Array:
    a = array_of(a)
    return a if a.dtype.inexact else astype(a, float32)


def logical_xor(a: Any, b: Any) -> Array:
    return not_equal(astype(array_of(a), bool_), astype(array_of(b), bool_))


def bitwise_invert(a: Any) -> Array:
    a = array_of(a)
    return logical_not(a) if a.dtype is bool_ else _invert(a)


def divmod(a: Any, b: Any) -> list[Array]:
    return [floor_divide(a, b), remainder(a, b)]


def where(condition: Any, x: Any, y: Any) -> Array:
    """x where the condition holds, else y."""
    c = cast(array_of(condition)._value, bool_)
    yes, no = operands("where", x, y)
    shape = broadcast_shapes(c.shape, yes.shape, name="where")
    return Array.of(apply(TABLE["where"], *(spread(v, shape) for v in (c, yes, no)))[0])


def clip(a: Any, a_min: Any = None, a_max: Any = None) -> Array:
    """Not below a_min, not above a_max; None is no bound."""
    if a_min is None and a_max is None:
        raise ValueError("[clip] a_min and a_max are None: at least one wanted")
    low = alias(array_of(a)) if a_min is None else maximum(a, a_min)
    return low if a_max is None else minimum(low, a_max)


def astype(a: Any, dtype: Dtype) -> Array:
    return Array.of(cast(array_of(a)._value, dtype))


def isclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Array:
    a, b = array_of(a), array_of(b)
    near = logical_or(logical_and(abs(a - b) <= atol + rtol * abs(b), isfinite(b)), equal(a, b))
    return logical_or(near, logical_and(isnan(a), isnan(b))) if equal_nan else near


def allclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Array:
    return ops.all(isclose(a, b, rtol, atol, equal_nan))


def array_equal(a: Any, b: Any, equal_nan: bool = False) -> Array:
    a, b = array_of(a), array_of(b)
    if a.shape != b.shape:
        return ops.full((), False)
    same = equal(a, b)
    return ops.all(logical_or(same, logical_and(isnan(a), isnan(b))) if equal_nan else same)


def to_fp8(x: Any) -> Array:
    """The nearest 8-bit floats e4m3 (sign, 4 bits of exponent, 3 of mantissa) as uint8; 448 at most, and for NaN."""
    x = astype(array_of(x), float32)
    size = where(abs(x) < 448, abs(x), 448)
    exponent = floor(log2(maximum(size, 2.0**-6)))         # -6: that of the smallest normal number
    code = (exponent + 6) * 8 + round(size * power(2.0, 3 - exponent))
    sign_bit = bitwise_and(right_shift(ops.view(x, uint32), 24), 128)
    return astype(code, uint8) + astype(sign_bit, uint8)


def from_fp8(x: Any, dtype: Dtype = bfloat16) -> Array:
    """The numbers that 8-bit floats e4m3 stand for."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    values = np.where(codes & 127 == 127, np.nan, np.where(codes < 128, size, -size))
    return ops.take(Array(values, dtype), array_of(x), 0)

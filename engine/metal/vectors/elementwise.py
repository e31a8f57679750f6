"""elementwise: every opcode in every class of registers, all casts, strides, constants, in place. One program has many
results, so that few texts are compiled."""
from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..elementwise import opcodes
from ..steps import MSL
from . import Vector, rounded, zeros

Function = Callable[..., np.ndarray]
_erf, _erfc = (np.vectorize(f, otypes=[float]) for f in (math.erf, math.erfc))


@np.vectorize
def _erfinv(x: float) -> float:
    if not abs(x) < 1:
        return math.copysign(math.inf, x) if abs(x) == 1 else math.nan
    return statistics.NormalDist().inv_cdf((x + 1) / 2) / math.sqrt(2)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, x.dtype.type(0))


def _where(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(c, a, b)


ANY: dict[str, Function] = {                               # of floats and of integers
    "neg": np.negative, "abs": np.abs, "sign": np.sign, "square": np.square, "relu": _relu,
    "logical_not": np.logical_not, "isnan": np.isnan}
FLOATS: dict[str, Function] = ANY | {
    "floor": np.floor, "ceil": np.ceil, "round": np.rint, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
    "reciprocal": lambda x: 1 / x, "exp": np.exp, "expm1": np.expm1, "log": np.log, "log2": np.log2, "log10": np.log10,
    "log1p": np.log1p, "sin": np.sin, "cos": np.cos, "tan": np.tan, "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh,
    "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "asinh": np.arcsinh, "acosh": np.arccosh,
    "atanh": np.arctanh, "erf": _erf, "erfinv": _erfinv, "sigmoid": _sigmoid, "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * 0.5 * _erfc(x * -math.sqrt(0.5)), "isinf": np.isinf,
    "gelu_tanh": lambda x: x * _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))}
BOTH: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "floor_div": np.floor_divide, "remainder": np.remainder,
    "maximum": np.maximum, "minimum": np.minimum, "eq": np.equal, "ne": np.not_equal, "lt": np.less,
    "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "logical_and": np.logical_and,
    "logical_or": np.logical_or, "where": _where}
PAIRS: dict[str, Function] = BOTH | {
    "div": np.divide, "pow": np.power, "atan2": np.arctan2, "logaddexp": np.logaddexp}
WHOLE: dict[str, Function] = ANY | {"bit_not": np.invert}
WHOLE_PAIRS: dict[str, Function] = BOTH | {
    "bit_and": np.bitwise_and, "bit_or": np.bitwise_or, "bit_xor": np.bitwise_xor}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, 2.0**23 + 1, -8388607.5, -3.0]
NUMBERS = {"int64": 2, "uint64": 3}                        # class of registers; 0 for floats
# MSL's exact mode: pow within 16 units in the last place, exp, sin … 4, tan 6; our own functions within 8
TOLERANCE = 2e-6
AT_ONCE = 16                                               # results of a program


def vectors() -> Iterator[Vector]:
    with np.errstate(all="ignore"):
        yield from [*_functions(), *_integers(), *_casts(), *_views(), *_programs()]


def _functions() -> Iterator[Vector]:
    rng = np.random.default_rng(1)
    spans = [(-1, 1), (-9, 9), (-80, 80), (-1e-3, 1e-3), (-3e4, 3e4)]
    x = np.concatenate([SPECIAL, *(rng.uniform(*span, 200) for span in spans)]).astype(np.float32)
    yield from _each("float32", FLOATS, [x])
    near = np.round(rng.uniform(-9, 9, (2, 700)), 1)
    pairs = np.concatenate([np.array(np.meshgrid(SPECIAL, SPECIAL)).reshape(2, -1), near], 1).astype(np.float32)
    yield from _each("float32", PAIRS, [*pairs, pairs[0, ::-1].copy()])


def _integers() -> Iterator[Vector]:
    rng = np.random.default_rng(2)
    for dtype in NUMBERS:
        limits = np.iinfo(dtype)
        edge = np.array([limits.min, limits.max, 0, 1, limits.max - 1, 7, limits.max // 2], dtype)
        a, b = (np.concatenate([g.ravel(), rng.integers(0, 1000, 300).astype(dtype)]) for g in np.meshgrid(edge, edge))
        yield from _each(dtype, WHOLE, [a])
        yield from _each(dtype, WHOLE_PAIRS, [a, b, b[::-1].copy()])
        bits: dict[str, Function] = {"shl": np.left_shift, "shr": np.right_shift, "pow": lambda a, n: _power(a, n % 70)}
        yield from _each(dtype, bits, [a, (b % 70).astype(dtype)])
    a = rng.integers(-2**40, 2**40, 700)
    codes = list(MSL)[:9]
    wraps = [n for k in range(9) for n in (opcodes().index("wrap"), 1 + k, 0, k, 0)]
    yield Vector("elementwise-wrap", "elementwise", [np.zeros_like(a) for _ in codes], [a],
                 [2, 9, 0, *range(1, 10), *wraps], [], [a.astype(dtype).astype(np.int64) for dtype in codes], 0)
    negative = np.array([2, 1, -1, -1]), np.array([-1, -5, -2, -3])
    yield _vector("int64-pow-negative", "int64", ["pow"], negative, [np.array([0, 1, 1, -1])])


def _power(a: np.ndarray, n: np.ndarray) -> np.ndarray:
    result = np.ones_like(a)
    for i in range(70):
        result = np.where(n > i, result * a, result)       # NumPy's wraps around as well
    return result


def _each(dtype: str, functions: dict[str, Function], operands: Sequence[np.ndarray]) -> Iterator[Vector]:
    """Programs of one instruction for each result."""
    names = list(functions)
    for k in range(0, len(names), AT_ONCE):
        some = names[k:k + AT_ONCE]
        exact = [x.astype(np.float64) if dtype == "float32" else x for x in operands]
        wanted = [functions[name](*exact[:_arity(functions[name], name, len(exact))]) for name in some]
        if dtype == "float32":
            wanted = [np.asarray(w).astype(np.float32).astype(np.float64) for w in wanted]
        yield _vector(f"{dtype}-{some[0]}-to-{some[-1]}", dtype, some, operands, wanted)


def _arity(function: Function, name: str, given: int) -> int:
    return given if name == "where" else min(2, given)


def _vector(note: str, dtype: str, names: Sequence[str], operands: Sequence[np.ndarray],
            wanted: Sequence[np.ndarray]) -> Vector:
    n = len(operands)
    code = [v for k, name in enumerate(names) for v in (opcodes().index(name), n + k, 0, 1, 2)]
    return Vector(f"elementwise-{note}", "elementwise", [np.zeros(operands[0].shape, dtype) for _ in names], operands,
                  [NUMBERS.get(dtype, 0), len(names), 0, *range(n, n + len(names)), *code], [], wanted,
                  TOLERANCE if dtype == "float32" else 0)


def _casts() -> Iterator[Vector]:
    """A copy to every dtype, through the registers that hold the source without loss."""
    values = np.random.default_rng(5).uniform(0, 100, 601)
    for source in MSL:
        operand, exact = rounded(values, source)
        results = [rounded(exact, target) for target in MSL]
        outputs = [zeros((601,), target) for target in MSL]
        cls = 0 if "float" in source else NUMBERS.get(source, 2)
        yield Vector(f"elementwise-cast-{source}", "elementwise", outputs, [operand], [cls, 0, 0, *[0] * len(MSL)], [],
                     [wanted for _, wanted in results], 0)


def _views() -> Iterator[Vector]:
    """a - b of slices, permutations, reversed and repeated axes, and over the memory of an operand."""
    base = np.random.default_rng(6).standard_normal((9, 23, 41)).astype(np.float32)
    other = np.arange(9 * 23 * 41, dtype=np.float32).reshape(base.shape) + 0.5
    cases: dict[str, Function] = {
        "none": lambda x: x[:0], "one": lambda x: x[:1, :1, :1], "slice": lambda x: x[1:8:2, ::-1, 3:],
        "scalar": lambda x: x[0, 0, 0], "turned": lambda x: x.transpose(2, 0, 1),
        "repeated": lambda x: np.broadcast_to(x[:1], x.shape), "whole": lambda x: x}
    program = [0, 1, 0, 2, opcodes().index("sub"), 2, 0, 1, 0]
    for name, view in cases.items():
        for beside, second in (("whole", np.array), ("alike", lambda x: x)):
            a, b = view(base), second(view(other))
            yield Vector(f"elementwise-view-{name}-{beside}", "elementwise", [np.zeros(a.shape, np.float32)], [a, b],
                         program, [], [a.astype(np.float64) - b], 1e-7)
    into = np.zeros((50, 30), np.float32)
    x = base.ravel()[:700].reshape(28, 25)
    yield Vector("elementwise-view-into-a-slice", "elementwise", [into[3:31, 27:2:-1]], [x, x], program, [],
                 [x * 0.0], 0)
    for start in (0, 1):                                   # 4-byte alignment only
        place = other.copy().ravel()[start:start + 5001]
        yield Vector(f"elementwise-in-place-{start}", "elementwise", [place], [place, base.ravel()[:5001]], program, [],
                     [place.astype(np.float64) - base.ravel()[:5001]], 1e-6)


def _programs() -> Iterator[Vector]:
    """Constants, operands of other dtypes, a repeated row and number, registers used again."""
    rng = np.random.default_rng(7)
    op = opcodes().index
    x, s = rng.standard_normal((37, 61)).astype(np.float32), np.float32(3)
    w, weight = rounded(rng.standard_normal(61), "float16")
    flags = rng.integers(0, 2, (37, 61)).astype(bool)
    code = [op("mul"), 6, 0, 1, 0, op("add"), 7, 6, 4, 0, op("mul"), 7, 7, 2, 0, op("sub"), 7, 7, 5, 0,
            op("where"), 8, 3, 7, 6]
    product = x * weight
    operands = [x, np.broadcast_to(np.asarray(w), x.shape), np.broadcast_to(s, x.shape), flags]
    total = (product + 0.5) * 3 - 2
    yield Vector("elementwise-program", "elementwise",
                 [np.zeros_like(x), np.zeros((37, 61), np.float16), np.zeros_like(x)], operands,
                 [0, 5, 2, 7, 6, 8, *code], [0.5, 2.0],
                 [total, product, np.where(flags, total, product)], [1e-6, 1e-3, 1e-6])    # a half has 11 bits
    i = rng.integers(-2**31, 2**31, 1030).astype(np.int32)
    yield Vector("elementwise-integer-constants", "elementwise", [np.zeros(1030, np.int64)], [i],
                 [2, 2, 2, 4, op("mul"), 3, 0, 1, 0, op("add"), 4, 3, 2, 0], [2.0**33, -5.0],
                 [i.astype(np.int64) * 2**33 - 5], 0)
    yield Vector("elementwise-fill", "elementwise", [np.zeros((5, 300), np.float32)], [], [0, 0, 1, 0], [1.5],
                 [np.full((5, 300), 1.5)], 0)

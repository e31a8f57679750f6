"""elementwise: every opcode in every register class against NumPy (float64) or torch; dtypes, strides, programs."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lazulite.engine import cpu

OP = cpu.runtime().opcodes
CLASSES = {np.float32: 0, np.float64: 1, np.int64: 2, np.uint64: 3}
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, 1e-40, -1e-40, 2.0**23 + 1, -8388607.5]


def run(op: str, *operands: Any, isa: str, out: Any = None) -> Any:
    """The result of one instruction on arrays of one dtype, which is the registers' class too."""
    out = np.empty_like(operands[0]) if out is None else out
    n = len(operands)
    code = [OP[op], n, *range(n), *[0] * (3 - n)]
    cpu.call("elementwise", [out], operands, [CLASSES[operands[0].dtype.type], 1, 0, n, *code], isa=isa)
    return out


def with_torch(name: str) -> Callable[..., Any]:
    return lambda *xs: getattr(torch.special, name)(*map(torch.from_numpy, xs)).numpy()


def logistic(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def gelu(x: Any) -> Any:
    return x * 0.5 * with_torch("erfc")(x * -np.sqrt(0.5))


def gelu_tanh(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


# name, reference, range of the operand, units in the last place allowed for float32
UNARY: list[tuple[str, Callable[[Any], Any], tuple[float, float], float]] = [
    ("neg", np.negative, (-9, 9), 0),
    ("abs", np.abs, (-9, 9), 0),
    ("sign", np.sign, (-9, 9), 0),
    ("floor", np.floor, (-1e4, 1e4), 0),
    ("ceil", np.ceil, (-1e4, 1e4), 0),
    ("round", np.rint, (-1e4, 1e4), 0),
    ("sqrt", np.sqrt, (0, 1e6), 0.5),
    ("rsqrt", lambda x: 1 / np.sqrt(x), (1e-4, 1e4), 2),
    ("square", np.square, (-9, 9), 0.5),
    ("reciprocal", lambda x: 1 / x, (1e-4, 1e4), 0.5),
    ("exp", np.exp, (-87, 88.7), 2),
    ("expm1", np.expm1, (-3, 3), 2),
    ("log", np.log, (1e-6, 10), 2),
    ("log2", np.log2, (1e-6, 10), 3),
    ("log10", np.log10, (1e-6, 10), 3),
    ("log1p", np.log1p, (-0.99, 9), 2),
    ("sin", np.sin, (-3e5, 3e5), 2),
    ("cos", np.cos, (-3e5, 3e5), 2),
    ("tan", np.tan, (-9, 9), 3),
    ("sinh", np.sinh, (-9, 9), 3),
    ("cosh", np.cosh, (-9, 9), 3),
    ("tanh", np.tanh, (-9, 9), 2),
    ("asin", np.arcsin, (-1, 1), 3),
    ("acos", np.arccos, (-1, 1), 3),
    ("atan", np.arctan, (-9, 9), 3),
    ("asinh", np.arcsinh, (-9, 9), 3),
    ("acosh", np.arccosh, (1, 9), 3),
    ("atanh", np.arctanh, (-0.99, 0.99), 3),
    ("erf", with_torch("erf"), (-5, 5), 2),
    ("erfinv", with_torch("erfinv"), (-0.999, 0.999), 5),
    ("sigmoid", logistic, (-80, 80), 4),
    ("silu", lambda x: x * logistic(x), (-80, 80), 4),
    ("gelu", gelu, (-12, 9), 7),
    ("gelu_tanh", gelu_tanh, (-1, 9), 4),
    ("relu", lambda x: np.maximum(x, 0), (-9, 9), 0),
    ("logical_not", np.logical_not, (-1, 1), 0),
    ("isnan", np.isnan, (-1, 1), 0),
    ("isinf", np.isinf, (-1, 1), 0),
]
FLOAT_BINARY: list[tuple[str, Callable[[Any, Any], Any], float]] = [
    ("add", np.add, 0.5),
    ("sub", np.subtract, 0.5),
    ("mul", np.multiply, 0.5),
    ("div", np.divide, 0.5),
    ("floor_div", np.floor_divide, 0),
    ("remainder", np.remainder, 1),
    ("maximum", np.maximum, 0),
    ("minimum", np.minimum, 0),
    ("atan2", np.arctan2, 3),
    ("logaddexp", np.logaddexp, 40),  # cancels where the result is near 0
    ("eq", np.equal, 0),
    ("ne", np.not_equal, 0),
    ("lt", np.less, 0),
    ("le", np.less_equal, 0),
    ("gt", np.greater, 0),
    ("ge", np.greater_equal, 0),
    ("logical_and", np.logical_and, 0),
    ("logical_or", np.logical_or, 0),
]
INEXACT = {"div", "atan2", "logaddexp"}
INT_BINARY = [row[:2] for row in FLOAT_BINARY if row[0] not in INEXACT]
INT_BINARY += [("bit_and", np.bitwise_and), ("bit_or", np.bitwise_or), ("bit_xor", np.bitwise_xor)]
INT_UNARY = [row[:2] for row in UNARY if row[0] in {"neg", "abs", "sign", "square", "relu", "logical_not"}]
INT_UNARY += [("bit_not", np.invert)]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("op, reference, domain, allowed", UNARY, ids=[row[0] for row in UNARY])
def test_unary(
    op: str, reference: Any, domain: tuple[float, float], allowed: float, isa: str, rng: Any, ulps: Any
) -> None:
    x = rng.uniform(*domain, 2001).astype(np.float32)
    assert ulps(run(op, x, isa=isa), reference(x.astype(np.float64))) <= allowed + 0.01
    doubles = rng.uniform(*domain, 77)
    np.testing.assert_allclose(run(op, doubles, isa=isa), reference(doubles), rtol=1e-13, atol=1e-13)
    special = np.array(SPECIAL, np.float32)
    wanted = reference(special.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(run(op, special, isa=isa), wanted, rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("op, reference, allowed", FLOAT_BINARY, ids=[row[0] for row in FLOAT_BINARY])
def test_binary(op: str, reference: Any, allowed: float, isa: str, rng: Any, ulps: Any) -> None:
    a, b = (np.round(rng.uniform(-9, 9, 1001), 1).astype(np.float32) for _ in range(2))
    assert ulps(run(op, a, b, isa=isa), reference(a.astype(np.float64), b.astype(np.float64))) <= allowed + 0.01
    grid = np.array(np.meshgrid(SPECIAL, SPECIAL), np.float32).reshape(2, -1)
    wanted = reference(*grid).astype(np.float32)
    np.testing.assert_allclose(run(op, *grid, isa=isa), wanted, rtol=1e-5, atol=1e-38)
    doubles = grid.astype(np.float64)
    np.testing.assert_allclose(run(op, *doubles, isa=isa), reference(*doubles).astype(float), rtol=1e-14)


WIDE = [
    ("expm1", np.expm1, (-80, 88.7)), ("expm1", np.expm1, (-1e-3, 1e-3)), ("log10", np.log10, (0.9, 1.1)),
    ("log1p", np.log1p, (-1e-3, 1e-3)), ("log1p", np.log1p, (0, 1e9)), ("tan", np.tan, (-1e3, 1e3)),
    ("sinh", np.sinh, (-0.1, 0.1)), ("sinh", np.sinh, (-89.4, 89.4)), ("cosh", np.cosh, (-89.4, 89.4)),
    ("atan", np.arctan, (-1e4, 1e4)), ("asin", np.arcsin, (-0.1, 0.1)), ("asinh", np.arcsinh, (-0.1, 0.1)),
    ("asinh", np.arcsinh, (-1e12, 1e12)), ("acosh", np.arccosh, (1, 1.01)), ("acosh", np.arccosh, (1, 1e12)),
    ("atanh", np.arctanh, (-0.01, 0.01)), ("sigmoid", logistic, (-87, 87)), ("tanh", np.tanh, (-0.01, 0.01)),
]  # fmt: skip


@pytest.mark.parametrize("op, reference, domain", WIDE)
def test_ends_of_the_domain(
    op: str, reference: Callable[[Any], Any], domain: tuple[float, float], isa: str, rng: Any, ulps: Any
) -> None:
    x = rng.uniform(*domain, 3001).astype(np.float32)
    assert ulps(run(op, x, isa=isa), reference(x.astype(np.float64))) <= 4


def test_pow_as_in_c(isa: str, rng: Any, ulps: Any) -> None:
    """Signs, zeros, infinities, NaN and integer exponents; then magnitudes near the ends of float32."""
    bases = [*SPECIAL, 2.0, -2.0, 3.0, -3.0]
    a, b = np.array(np.meshgrid(bases, [*bases, 0.25, -1.5]), np.float32).reshape(2, -1)
    wanted = np.power(a.astype(np.float64), b).astype(np.float32)
    np.testing.assert_allclose(run("pow", a, b, isa=isa), wanted, rtol=1e-6)
    for low, high, exponent in [(1e-3, 1e3, 12), (0.99, 1.01, 8000), (1, 1.0001, 80000)]:
        x, y = (rng.uniform(*ends, 2001).astype(np.float32) for ends in [(low, high), (-exponent, exponent)])
        assert ulps(run("pow", x, y, isa=isa), x.astype(np.float64) ** y) <= 2


def test_pow(isa: str, rng: Any, ulps: Any) -> None:
    a, b = rng.uniform(0, 9, 1001).astype(np.float32), rng.uniform(-9, 9, 1001).astype(np.float32)
    assert ulps(run("pow", a, b, isa=isa), a.astype(np.float64) ** b) <= 2
    base, exponent = np.meshgrid([-3, -1, 0, 1, 2, 10], [0, 1, 2, 5, 63])
    base, exponent = base.ravel().astype(np.int64), exponent.ravel().astype(np.int64)
    np.testing.assert_array_equal(run("pow", base, exponent, isa=isa), base**exponent)
    assert run("pow", np.array([2, 1, -1, -1]), np.array([-1, -5, -2, -3]), isa=isa).tolist() == [0, 1, 1, -1]


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_integers(dtype: Any, isa: str, rng: Any) -> None:
    limits = np.iinfo(dtype)
    edge = np.array([limits.min, limits.max, 0, 1, limits.max - 1, 7, limits.max // 2], dtype)
    a, b = (np.concatenate([g.ravel(), rng.integers(0, 1000, 600).astype(dtype)]) for g in np.meshgrid(edge, edge))
    for op, reference in INT_BINARY:
        np.testing.assert_array_equal(run(op, a, b, isa=isa), reference(a, b).astype(dtype), err_msg=op)
    for op, unary in INT_UNARY:
        np.testing.assert_array_equal(run(op, a, isa=isa), unary(a).astype(dtype), err_msg=op)
    shift = (b % 70).astype(dtype)
    for op, binary in [("shl", np.left_shift), ("shr", np.right_shift)]:
        np.testing.assert_array_equal(run(op, a, shift, isa=isa), binary(a, shift), err_msg=op)


@pytest.mark.parametrize("dtype", list(CLASSES))
def test_where(dtype: Any, isa: str, rng: Any) -> None:
    c, a, b = (rng.integers(0, most, 900).astype(dtype) for most in (3, 99, 99))
    np.testing.assert_array_equal(run("where", c, a, b, isa=isa), np.where(c, a, b))


@pytest.mark.parametrize("name", ["bool", "uint8", "uint16", "uint32", "int8", "int16", "int32", "int64"])
def test_wrap(name: str, isa: str, rng: Any) -> None:
    a = rng.integers(-(2**40), 2**40, 700)
    out = np.empty_like(a)
    cpu.call("elementwise", [out], [a], [2, 1, 0, 1, OP["wrap"], 1, 0, cpu.DTYPES.index(name), 0], isa=isa)
    np.testing.assert_array_equal(out, a.astype(name).astype(np.int64))


NAMES = [name for name in cpu.DTYPES if name != "complex64"]


def typed(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


def operand(array: Any, name: str) -> Any:
    return (array.view(np.uint16), name) if name == "bfloat16" else array


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_cast(source: str, target: str, isa: str, rng: Any) -> None:
    """A copy between any two dtypes, through the registers that hold the source without loss."""
    x = (rng.standard_normal(601) * 20).astype(typed(source))
    if source.startswith(("float", "bfloat")) and target.startswith("uint"):
        x = np.abs(x)
    through = {"float64": 1, "uint64": 3}.get(source, 0 if "float" in source else 2)
    out = np.empty(601, typed(target))
    cpu.call("elementwise", [operand(out, target)], [operand(x, source)], [through, 0, 0, 0], isa=isa)
    np.testing.assert_array_equal(out, x.astype(typed(target)))


def test_half_floats_round_as_numpy_rounds(isa: str) -> None:
    """All float16 and bfloat16 values, and floats around and between them."""
    halves = np.arange(65536, dtype=np.uint16)
    for name, dtype in [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)]:
        exact = halves.view(dtype).astype(np.float32)
        sides = [np.nextafter(exact, np.float32(s)) for s in (-np.inf, 0, np.inf)]
        near = np.concatenate([*sides, exact, exact * 1.0001])
        widened, out = np.empty(65536, np.float32), np.empty(near.size, dtype)
        cpu.call("elementwise", [widened], [(halves, name)], [0, 0, 0, 0], isa=isa)
        cpu.call("elementwise", [operand(out, name)], [near], [0, 0, 0, 0], isa=isa)
        np.testing.assert_array_equal(widened, exact)
        np.testing.assert_array_equal(out.astype(np.float32), near.astype(dtype).astype(np.float32))


def test_a_program(isa: str, rng: Any) -> None:
    """Two results, constants, a broadcast operand of another dtype, a scalar, reuse of registers."""
    x, w = rng.standard_normal((37, 61)).astype(np.float32), rng.standard_normal(61).astype(np.float16)
    s = np.float32(3)
    operands = [x, np.broadcast_to(w, x.shape), np.broadcast_to(s, x.shape)]
    out, product = np.empty_like(x), np.empty(x.shape, np.float64)
    code = [OP["mul"], 5, 0, 1, 0, OP["add"], 6, 5, 3, 0, OP["mul"], 6, 6, 2, 0, OP["sub"], 6, 6, 4, 0]
    cpu.call("elementwise", [out, product], operands, [0, 4, 2, 6, 5, *code], [0.5, 2.0], isa=isa)
    np.testing.assert_array_equal(product, (x * w).astype(np.float64))
    np.testing.assert_array_equal(out, (x * w + np.float32(0.5)) * s - 2)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_views(data: st.DataObject) -> None:
    """Slices, permutations, reversed and repeated axes, in the operands and in the result."""
    isa = data.draw(st.sampled_from(cpu.runtime().isas()))
    dtype = data.draw(st.sampled_from([np.float32, np.int64, np.float16]))
    shape = data.draw(st.lists(st.integers(0, 30), max_size=4).filter(lambda s: np.prod(s) < 20_000))

    def view(name: str, repeat: bool) -> Any:
        sizes = [2 * n + 1 for n in shape]
        base = np.arange(np.prod(sizes, dtype=int), dtype=dtype).reshape(sizes)
        for axis, n in enumerate(shape):
            step = data.draw(st.sampled_from([1, 2, -1]), label=name)
            base = np.moveaxis(np.moveaxis(base, axis, 0)[::step][:n], 0, axis)
        if repeat and shape and shape[0] and data.draw(st.booleans()):
            base = np.broadcast_to(base[:1], base.shape)
        return base

    a, b, out = view("a", True), view("b", True), view("out", False)
    cpu.call("elementwise", [out], [a, b], [2 if dtype == np.int64 else 0, 1, 0, 2, OP["sub"], 2, 0, 1, 0], isa=isa)
    np.testing.assert_array_equal(out, a - b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int32])
@pytest.mark.parametrize("order", [(1, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0)])
def test_transposed(order: tuple[int, ...], dtype: Any, isa: str, threads: Any, rng: Any) -> None:
    """Blocks of 16 x 32 with tails on every side, an operand that is not transposed, and one that is repeated."""
    threads(2)
    x = (rng.standard_normal((37, 50, 19)[: len(order)]) * 50).astype(dtype).transpose(order)
    y = (rng.standard_normal(x.shape) * 50).astype(dtype)
    z = np.broadcast_to(y[:, :1], x.shape)
    cls, out = (2 if dtype == np.int32 else 1 if dtype == np.float64 else 0), np.empty(x.shape, dtype)
    program = [cls, 2, 0, 3, OP["sub"], 3, 0, 1, 0, OP["maximum"], 3, 3, 2, 0]
    cpu.call("elementwise", [out], [x, y, z], program, isa=isa)
    wide = np.float32 if dtype == np.float16 else dtype
    np.testing.assert_array_equal(out, np.maximum(x.astype(wide) - y.astype(wide), z.astype(wide)).astype(dtype))


def test_every_second_item(isa: str, rng: Any) -> None:
    x = rng.standard_normal(1401).astype(np.float32)
    np.testing.assert_array_equal(run("neg", x[::2], isa=isa, out=np.empty(701, np.float32)), -x[::2])


def test_a_result_larger_than_caches(isa: str, threads: Any, rng: Any) -> None:
    threads(2)
    x = np.arange((16 << 20) // 4 + 777, dtype=np.float32)
    for start in (0, 1):  # aligned or not
        out = np.zeros(x.size + 1, np.float32)[start : start + x.size]
        np.testing.assert_array_equal(run("add", x, x, isa=isa, out=out), x + x)


def test_in_place(isa: str, threads: Any, rng: Any) -> None:
    threads(2)
    x = rng.standard_normal(100_003).astype(np.float32)
    wanted = x + x
    run("add", x, x, isa=isa, out=x)
    np.testing.assert_array_equal(x, wanted)


def test_every_set_gives_the_same_integers_and_the_same_simple_floats(isa: str, rng: Any) -> None:
    a, b = rng.standard_normal(999).astype(np.float32), rng.standard_normal(999).astype(np.float32)
    for op in ("add", "div", "sqrt", "floor", "round", "maximum", "remainder", "lt"):
        operands = [np.abs(a)] if op == "sqrt" else [a] if op in ("floor", "round") else [a, b]
        np.testing.assert_array_equal(run(op, *operands, isa=isa), run(op, *operands, isa="portable"))


BAD = [
    ([0, 1, 0, 1, 999, 1, 0, 0, 0], "no such opcode"),
    ([0, 1, 0, 1, OP["bit_and"], 1, 0, 0, 0], "does not exist for this class"),
    ([0, 1, 0, 64, OP["add"], 1, 0, 0, 0], "an output's register is not in 0..63"),
    ([0, 1, 0, 1, OP["add"], 1, 0, 64, 0], "a register is not in 0..63"),
    ([5, 0, 0, 0], "class must be 0"),
    ([0, 1, 0, 0], "the number of ints differs"),
    ([0, 0, 1, 0], "the number of constants differs"),
]


@pytest.mark.parametrize("ints, message", BAD)
def test_a_wrong_program_is_refused(ints: list[int], message: str) -> None:
    x = np.zeros(4, np.float32)
    with pytest.raises(RuntimeError, match=rf"\[elementwise\] .*{message}"):
        cpu.call("elementwise", [x], [x], ints)

"""Op cases: value against NumPy in float64, for every dtype, for strided and empty inputs, for symbolic sizes."""
import functools
from dataclasses import dataclass
from typing import Any

import mlx.core as mlx
import numpy as np
import pytest
from numpy_runtime import erf, erfinv

from lazulite.engine import array as mx

FLOATS = {"float32": 2e-6, "float64": 1e-12, "float16": 2e-3, "bfloat16": 2e-2}
rng = np.random.default_rng(0)


@dataclass
class Case:
    name: str
    reference: Any
    low: float = -3.0
    high: float = 3.0
    operands: int = 1
    scale: float = 1.0                  # multiplies the dtype's tolerance


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def gelu_tanh(x):
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


CASES = [
    Case("exp", np.exp), Case("expm1", np.expm1), Case("log", np.log, 0.1, 9), Case("log2", np.log2, 0.1, 9),
    Case("log10", np.log10, 0.1, 9), Case("log1p", np.log1p, -0.9, 9, scale=4), Case("sqrt", np.sqrt, 0, 9),
    Case("rsqrt", lambda x: 1 / np.sqrt(x), 0.1, 9), Case("square", np.square),
    Case("reciprocal", lambda x: 1 / x, 0.5, 3),
    Case("sin", np.sin), Case("cos", np.cos), Case("tan", np.tan, -1, 1), Case("sinh", np.sinh), Case("cosh", np.cosh),
    Case("tanh", np.tanh), Case("arcsin", np.arcsin, -0.9, 0.9), Case("arccos", np.arccos, -0.9, 0.9),
    Case("arctan", np.arctan), Case("arcsinh", np.arcsinh), Case("arccosh", np.arccosh, 1.1, 9),
    Case("arctanh", np.arctanh, -0.9, 0.9), Case("erf", erf), Case("erfinv", erfinv, -0.9, 0.9, scale=8),
    Case("sigmoid", sigmoid), Case("silu", lambda x: x * sigmoid(x)), Case("gelu", gelu), Case("gelu_tanh", gelu_tanh),
    Case("relu", lambda x: np.maximum(x, 0)), Case("negative", np.negative), Case("abs", np.abs), Case("sign", np.sign),
    Case("floor", np.floor), Case("ceil", np.ceil), Case("round", np.rint), Case("add", np.add, operands=2),
    Case("subtract", np.subtract, operands=2), Case("multiply", np.multiply, operands=2),
    Case("divide", np.divide, 0.5, 3, 2), Case("floor_divide", np.floor_divide, 0.5, 3, 2),
    Case("remainder", np.remainder, 0.5, 3, 2, 4), Case("power", np.power, 0.5, 3, 2, 4),
    Case("maximum", np.maximum, operands=2), Case("minimum", np.minimum, operands=2),
    Case("arctan2", np.arctan2, operands=2),
    Case("logaddexp", np.logaddexp, operands=2), Case("less", np.less, operands=2), Case("equal", np.equal, operands=2),
    Case("greater_equal", np.greater_equal, operands=2), Case("isnan", np.isnan), Case("logical_not", np.logical_not),
    Case("logical_and", np.logical_and, operands=2),
]


def wide(a):
    """The elements as NumPy sees them, in float64."""
    return np.asarray(a).astype(np.float64)


def close(got, want, tolerance):
    np.testing.assert_allclose(wide(got), np.asarray(want, np.float64), rtol=tolerance, atol=tolerance)


def layouts(make, dtype):
    """Row-major, transposed, sliced backwards, broadcast, empty, 0-d."""
    x = [make((4, 6)), make((6, 4)), make((8, 6)), make((6,)), make((0, 6)), make(())]
    a = [mx.array(v, dtype) for v in x]
    return [a[0], a[1].T, a[2][::-2], mx.broadcast_to(a[3], (4, 6)), a[4], a[5]]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_elementwise(case, runtime):
    for name, tolerance in FLOATS.items():
        draw = functools.partial(rng.uniform, case.low, case.high)
        for xs in zip(*(layouts(draw, getattr(mx, name)) for _ in range(case.operands)), strict=True):
            got, want = getattr(mx, case.name)(*xs), case.reference(*map(wide, xs))
            assert got.shape == want.shape and (got.dtype is xs[0].dtype or got.dtype is mx.bool_)
            if case.name == "floor_divide" and name in ("float16", "bfloat16"):
                continue                # the quotient's rounding decides
            close(got, want, max(tolerance * case.scale, 1e-6 if case.name == "erfinv" else 0))


NAMES = ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16",
         "float32"]


def their(name):
    return mlx.bool_ if name == "bool" else getattr(mlx, name)


def ours(name):
    return mx.bool_ if name == "bool" else getattr(mx, name)


@pytest.mark.parametrize("name", NAMES)
def test_promotion_is_mlx(name):
    a, b = mx.zeros((1,), ours(name)), mlx.zeros((1,), their(name))
    for other in NAMES:
        found, wanted = (a + mx.zeros((1,), ours(other))).dtype, (b + mlx.zeros((1,), their(other))).dtype
        assert repr(found) == str(wanted).split(".")[-1], other
    for scalar in (True, 3, 2.5):
        for op in ("add", "divide", "maximum", "less"):
            found, wanted = getattr(mx, op)(a, scalar).dtype, getattr(mlx, op)(b, scalar).dtype
            assert repr(found) == str(wanted).split(".")[-1], (op, scalar)
    for op in ["sum", "prod", "max", "min", "any", "mean", "var", "logsumexp", "exp", "sqrt"]:
        if op in ("logsumexp", "var") and name == "bool":
            continue
        assert repr(getattr(mx, op)(a).dtype) == str(getattr(mlx, op)(b).dtype).split(".")[-1], op


@pytest.mark.parametrize("name", NAMES[:9])
def test_integers_wrap_as_numpy(name, runtime):
    dtype = np.dtype(name)
    x, y = np.frombuffer(rng.bytes(100 * 8), np.uint8 if name == "bool" else dtype)[:100].reshape(2, 50)
    if name == "bool":
        x, y = x > 99, y > 99
    a, b = mx.array(x), mx.array(y)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(np.asarray(a * b + a), x * y + x)
        if name != "bool":
            np.testing.assert_array_equal(np.asarray((a + b) // 3), (x + y) // dtype.type(3))
            np.testing.assert_array_equal(np.asarray((a - b) > 0), (x - y) > 0)
            np.testing.assert_array_equal(np.asarray(a % mx.maximum(b, 1)), x % np.maximum(y, 1))
            np.testing.assert_array_equal(np.asarray(~a), ~x)
        np.testing.assert_array_equal(np.asarray(a & b | a ^ b), x & y | x ^ y)


@pytest.mark.parametrize("source", NAMES)
def test_astype(source, runtime):
    x = rng.integers(0, 2 if source == "bool" else 100, 40)
    a = mx.array(x).astype(ours(source))
    for target in NAMES:
        got = wide(a.astype(ours(target)))
        np.testing.assert_array_equal(got, (x != 0) if target == "bool" else x, target)
        np.testing.assert_array_equal(wide((a.astype(ours(target)) * ours_one(target)).astype(mx.float32)), got, target)


def ours_one(name):
    return mx.array(1).astype(ours(name))


def test_casts_that_round_are_not_fused_away(runtime):
    x = mx.array([1.0001, 2.9, 300.7])
    np.testing.assert_array_equal(wide(x.astype(mx.float16).astype(mx.float32) - x) != 0, [True, True, True])
    assert ((x.astype(mx.int32)).astype(mx.float32) + 0.5).tolist() == [1.5, 2.5, 300.5]
    assert (mx.array([5, 0]).astype(mx.bool_).astype(mx.int32) + 1).tolist() == [2, 1]
    assert (mx.array([300]).astype(mx.uint8).astype(mx.int32) + 1).tolist() == [45]


REDUCTIONS = ["sum", "prod", "max", "min", "mean", "var", "std", "argmax", "argmin", "logsumexp", "any", "all"]


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name, runtime):
    def reference(x, axis, keepdims):
        if name == "logsumexp":
            return np.log(np.sum(np.exp(x), axis=axis, keepdims=keepdims))
        return getattr(np, name)(x, axis=axis, keepdims=keepdims)

    for dtype, tolerance in FLOATS.items():
        a = mx.array(rng.uniform(-1, 1, (3, 4, 5)), getattr(mx, dtype))
        for x in (a, a.transpose(2, 0, 1), a[:, ::2]):
            for axis in (None, 0, 1, -1) + (() if name.startswith("arg") else ((0, 2), (-1, 0))):
                for keepdims in (False, True):
                    got, want = getattr(mx, name)(x, axis, keepdims), reference(wide(x), axis, keepdims)
                    assert got.shape == want.shape
                    close(got, want, 4 * tolerance)


def test_reductions_of_nothing(runtime):
    x = mx.zeros((0, 3))
    assert x.sum(0).tolist() == [0, 0, 0] and x.prod().item() == 1 and x.all().item() and not x.any().item()
    assert x.sum(1).shape == (0,)
    with pytest.raises(ValueError, match=r"\[max\] \(0, 3\) has no elements"):
        mx.max(x)


MATMULS = [((3, 4), (4, 5)), ((4,), (4,)), ((4,), (4, 5)), ((3, 4), (4,)), ((2, 3, 4), (4, 5)),
           ((2, 1, 3, 4), (5, 4, 2)), ((0, 4), (4, 2)), ((3, 0), (0, 2)), ((7, 1), (1, 3))]


@pytest.mark.parametrize("shapes", MATMULS, ids=str)
def test_matmul(shapes, runtime):
    for dtype, tolerance in FLOATS.items():
        x, y = (rng.uniform(-1, 1, s) for s in shapes)
        a, b = mx.array(x, getattr(mx, dtype)), mx.array(y, getattr(mx, dtype))
        close(a @ b, wide(a) @ wide(b), 4 * tolerance)
        if a.ndim > 1 and b.ndim > 1:
            want = np.swapaxes(wide(a) @ wide(b), -1, -2)
            close(mx.swapaxes(b, -1, -2) @ mx.swapaxes(a, -1, -2), want, 4 * tolerance)


MOVEMENTS = {
    "reshape": lambda m, x: m.reshape(x, (4, -1)),
    "transpose": lambda m, x: m.transpose(x, (2, 0, 1)),
    "reshape of transpose": lambda m, x: m.reshape(m.transpose(x, (1, 0, 2)), (6, 4)),
    "swapaxes": lambda m, x: m.swapaxes(x, 0, -1),
    "moveaxis": lambda m, x: m.moveaxis(x, 0, 2),
    "expand_dims": lambda m, x: m.expand_dims(x, (0, 2)),
    "squeeze": lambda m, x: m.squeeze(m.expand_dims(x, 1)),
    "broadcast_to": lambda m, x: m.broadcast_to(x, (2, 2, 3, 4)),
    "flip": lambda m, x: m.flip(x, 1),
    "tile": lambda m, x: m.tile(x, (2, 1, 3)),
    "repeat": lambda m, x: m.repeat(x, 3, 1),
    "concatenate": lambda m, x: m.concatenate([x, x * 2, x[:, :, ::-1]], 1),
    "stack": lambda m, x: m.stack([x, x + 1], -1),
    "split": lambda m, x: m.split(x, 2, 2)[1],
    "pad": lambda m, x: m.pad(x, ((1, 0), (0, 2), (1, 1))),
    "tril": lambda m, x: m.tril(x[0]),
    "triu": lambda m, x: m.triu(x[0], 1),
    "outer": lambda m, x: m.outer(x[0, 0], x[0, 1]),
    "clip": lambda m, x: m.clip(x, 3, 8),
    "where": lambda m, x: m.where(x > 4, x, -x),
    "take": lambda m, x: m.take(x, m.array([[0, 2], [-1, 1]]), 1),
    "take flat": lambda m, x: m.take(x, m.array([5, -1])),
    "take_along_axis": lambda m, x: m.take_along_axis(x, m.argmax(x, axis=1, keepdims=True), 1),
    "full": lambda m, x: m.full((2, 3), 7.0) + x[0, 0, 0],
    "eye": lambda m, x: m.eye(3, 4, 1),
    "inner": lambda m, x: m.inner(x[0], x[1]),
    "isclose": lambda m, x: m.isclose(x, x + 1e-9),
    "allclose": lambda m, x: m.allclose(x, x),
    "arange": lambda m, x: m.arange(1, 9, 3),
}


@pytest.mark.parametrize("name", MOVEMENTS)
def test_movements_are_numpy(name, runtime):
    x = np.arange(24).reshape(2, 3, 4).astype(np.float32)
    f = MOVEMENTS[name]
    want = f(np, x)
    for a in (mx.array(x), mx.array(x) + mx.zeros((2, 3, 4))):        # a leaf moves at once, a result in the plan
        got = f(mx, a)
        assert got.shape == np.shape(want)
        np.testing.assert_array_equal(np.asarray(got), want)


def test_views_of_leaves_share_memory():
    x = mx.array(np.arange(12, dtype=np.float32).reshape(3, 4))
    base = x._value.buffer
    assert all(v._value.buffer is base for v in (x.T, x[1:, ::-1], x.reshape(2, 6), x.view(mx.uint16)))
    source = np.arange(6, dtype=np.uint16)
    assert np.shares_memory(np.asarray(mx.asarray(source)), source)
    bits = np.array([1.5, -2], np.float32).view(np.uint16)[1::2]
    assert mx.asarray(bits.copy()).view(mx.bfloat16).tolist() == [1.5, -2]


SYMBOLIC = {
    "elementwise": lambda x, w, m: m.exp(x) * 2 + w[0],
    "norm": lambda x, w, m: m.fast.rms_norm(x, w[0], 1e-5),
    "softmax": lambda x, w, m: m.softmax(x, -1),
    "reduce": lambda x, w, m: m.sum(x * x, -1),
    "linear": lambda x, w, m: x @ w.T,
    "matmul": lambda x, w, m: x @ w,
    "heads": lambda x, w, m: m.swapaxes(x.reshape(-1, 2, 4), 1, 2) + 1,
    "join": lambda x, w, m: m.concatenate([x, x[:, :3]], 1),
    "total": lambda x, w, m: m.max(x),
    "take": lambda x, w, m: m.take(w, m.argmax(x, -1), 0),
    "columns": lambda x, w, m: m.take(x, m.array([3, 0]), 1),
    "split": lambda x, w, m: m.split(x, 2, -1)[1] - 1,
    "pad": lambda x, w, m: m.pad(x, ((0, 0), (1, 2))),
    "where": lambda x, w, m: m.where(m.expand_dims(m.arange(x.shape[0]), 1) > 1, x, w[0]),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_leading_axis(name, runtime):
    f, t = SYMBOLIC[name], mx.Dim("T", 5)
    w = mx.array(rng.normal(size=(8, 8)))
    x = mx.placeholder((t, 8), mx.float32)
    y = f(x, w, mx)
    executable = mx.lower([y], [x], kernels=runtime.kernels).load()
    values = rng.normal(size=(5, 8)).astype(np.float32)
    executable.set_input(0, values)
    for size in (3, 1, 0, 5):
        if name == "total" and size == 0:
            continue
        executable.run(T=size)
        got = np.asarray(executable.output(0))[:size] if y.shape else np.asarray(executable.output(0))
        want = np.asarray(f(mx.array(values[:size]), w, mx)) if size else got
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


T = mx.Dim("T", 5)
ERRORS = {
    "[matmul] a (8, 512) @ b (256, 64): inner sizes 512 and 256 differ":
        lambda: mx.zeros((8, 512)) @ mx.zeros((256, 64)),
    "[add] (3, 4) and (5,): axis -1 has 4 and 5": lambda: mx.zeros((3, 4)) + mx.zeros(5),
    "[reshape] (3, 4) does not fit (5, -1)": lambda: mx.zeros((3, 4)).reshape(5, -1),
    "[reshape] (T, 4) does not fit (20,): 'T' is symbolic and must stay whole":
        lambda: mx.placeholder((T, 4), mx.float32).reshape(20),
    "[transpose] axis 1 of (4, T) is symbolic and must lead": lambda: mx.placeholder((T, 4), mx.float32).T,
    "[sum] axis 0 of (T, 4) is symbolic and must lead": lambda: mx.placeholder((T, 4), mx.float32).sum(0),
    "[add] (T, 4) and (5, 4): axis -2 has T and 5": lambda: mx.placeholder((T, 4), mx.float32) + mx.zeros((5, 4)),
    "[squeeze] axis 0 of (3, 4) has size 3, 1 wanted": lambda: mx.zeros((3, 4)).squeeze(0),
    "[array] 300 does not fit uint8": lambda: mx.zeros(3, mx.uint8) + 300,
    "[concatenate] (3, 4) and (3, 5) differ outside axis 0":
        lambda: mx.concatenate([mx.zeros((3, 4)), mx.zeros((3, 5))]),
    "[rms_norm] weight (5,): axis C is 5, 4 wanted by the arrays before it":
        lambda: mx.fast.rms_norm(mx.zeros((3, 4)), mx.zeros(5), 1e-5),
    "[item] float32(3,) has 3 elements, 1 wanted": lambda: mx.zeros(3).item(),
    "[take] indices float32(3,): integers wanted": lambda: mx.take(mx.zeros(3), mx.zeros(3)),
    "[eval] a placeholder float32(T,) has no value: pass it as an input":
        lambda: mx.eval(mx.placeholder((T,), mx.float32) + 1),
    "[negative] bool(3,): not a type it is defined for": lambda: -mx.zeros(3, mx.bool_),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_what_was_found(message):
    with pytest.raises(ValueError) as error:
        ERRORS[message]()
    assert str(error.value) == message


def test_deep_graphs_do_not_recurse(runtime):
    x = mx.array([1.0])
    for _ in range(5000):
        x = x + 1
    assert x.item() == 5001


def test_random_scalars_make_long_programs(runtime):
    x, total = mx.array([2.0, 3.0]), 0.0
    y = x
    for i in range(100):
        y = y + x * float(i)
        total += i
    np.testing.assert_allclose(np.asarray(y), np.array([2.0, 3.0]) * (1 + total), rtol=1e-6)

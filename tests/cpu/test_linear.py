"""linear against its definition in float64 NumPy: every instruction set, ragged shapes, all weights and epilogues."""

from math import erf

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazulite.engine import cpu

ISAS = cpu.runtime().isas()
TOKENS = [0, 1, 2, 3, 4, 5, 8, 9, 16, 33, 70, 23, 35]  # by thirds: 35 meets 640 inputs, more than tiles take at a time


def words(k: int, bits: int) -> int:
    """k or twice that, so that a row of codes is whole words."""
    return k * (1 + (k * bits % 32 != 0))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """(N, K) codes -> (N, K bits / 32) uint32, low bits first."""
    stream = codes.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little").view(np.uint32)


def stored(x: np.ndarray, dtype: str):
    """x in a float type: (what a kernel is given, the float64 values that it holds)."""
    if dtype != "bfloat16":
        x = x.astype(dtype)
        return x, x.astype(np.float64)
    bits = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return (bits, dtype), (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


FP4, FP8 = 20, 24  # formats of floats: (name, format, group, dtype of the scales)
FLOATS = [("mxfp4", FP4, 32, "uint8"), ("nvfp4", FP4, 16, "uint8"), ("mxfp8", FP8, 32, "uint8"),
          ("fp8", FP8, 128, "float32"), ("fp8", FP8, 64, "bfloat16"), ("fp8", FP8, 16, "float16")]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def floats(rng, n: int, k: int, format: int, group: int, dtype: str):
    """Codes and scales of floats, and the numbers that ml_dtypes says they are."""
    codes = rng.integers(0, 16 if format == FP4 else 256, (n, k)).astype(np.uint8)
    codes[codes % 128 == 127] = 0  # NaN
    values = E2M1[codes] if format == FP4 else codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) / 64
    if dtype != "uint8":
        scale, s = stored(rng.uniform(-1, 1, (n, k // group)) / 64, dtype)
        values *= 64
    elif group == 16:
        scale = rng.integers(0, 40, (n, k // group)).astype(np.uint8)
        s = scale.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    else:
        scale = rng.integers(120, 127, (n, k // group)).astype(np.uint8)
        s = np.exp2(scale.astype(np.float64) - 127)
        if format == FP8:
            values *= 64
    return [pack(codes, format - 16), scale], values * np.repeat(s, group, 1)


def weight(rng, n: int, k: int, bits: int, group: int, dtype: str):
    """Inputs of one weight, and its float64 matrix."""
    if bits > 8:
        return floats(rng, n, k, bits, group, dtype)
    if not bits:
        w, exact = stored(rng.standard_normal((n, k)) / 8, dtype)
        return [w], exact
    codes = rng.integers(0, 1 << bits, (n, k))
    scale, s = stored(rng.uniform(-1, 1, (n, k // group)) / (1 << bits), dtype)
    bias, b = stored(rng.uniform(-1, 1, (n, k // group)) / 2, dtype)
    return [pack(codes, bits), scale, bias], codes * np.repeat(s, group, 1) + np.repeat(b, group, 1)


def gelu(v: np.ndarray, tanh: bool) -> np.ndarray:
    u = np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)) if tanh else np.vectorize(erf)(v / np.sqrt(2))
    return v * 0.5 * (1 + u)


GATES = {2: lambda v: v / (1 + np.exp(-v)), 3: lambda v: gelu(v, False), 4: lambda v: gelu(v, True)}


def linear(rng, isa, t, ns, k, bits=0, group=64, dtype="float32", norm=0, epilogue=0, bias=0, precise=0,
           outlier=1.0):
    """Runs the kernel. (its outputs, the definition's) outlier: a factor of one number in every other token."""
    x = rng.standard_normal((t, k)).astype(np.float32)
    x[::2, k // 2] *= outlier
    inputs, exact = [x], x.astype(np.float64)
    if norm:
        g, gain = stored(rng.uniform(0.5, 2, k), dtype if dtype != "uint8" else "float32")
        inputs.append(g)
        exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5) * gain
    wanted, biases = [], []
    for n in ns:
        arrays, w = weight(rng, n, k, bits, group, dtype)
        inputs += arrays
        wanted.append(exact @ w.T)
        if bias:
            b, added = stored(rng.standard_normal(n), dtype if dtype != "uint8" else "float32")
            biases.append(b)
            wanted[-1] += added
    inputs += biases
    if epilogue == 1:
        inputs.append(rng.standard_normal((t, ns[0])).astype(np.float32))
        wanted[0] += inputs[-1]
    elif epilogue:
        wanted = [GATES[epilogue](wanted[0]) * wanted[1]]
    got = [np.full(w.shape, np.nan, np.float32) for w in wanted]
    cpu.call("linear", got, inputs, [len(ns), bits, group, norm, epilogue, bias, precise], [1e-5], isa=isa)
    return got, wanted


def check(got, wanted, tolerance):
    for g, w in zip(got, wanted, strict=True):
        if w.size:
            assert np.sqrt(((g - w) ** 2).mean()) <= tolerance * np.sqrt((w**2).mean())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_quantized(isa, bits, group, dtype):
    rng = np.random.default_rng(bits + group)
    for t in TOKENS:
        n, k = [1, 17, 65, 130][t % 4], words(group * [1, 3, 5][t % 3], bits)
        check(*linear(rng, isa, t, [n], k, bits, group, dtype), 2e-4 if t <= 4 else 1.5e-2)
        check(*linear(rng, isa, t, [n], k, bits, group, dtype, precise=1), 2e-4)


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (4, 128), (8, 32)])
def test_outliers(isa, bits, group):
    """One int8 for a group with an outlier would be wrong by more than 1.5e-2 of the output."""
    for t in (5, 8, 9, 16, 23, 40):
        rng = np.random.default_rng(t)
        check(*linear(rng, isa, t, [33], 640, bits, group, outlier=100.0), 4e-3)


@pytest.mark.parametrize(("name", "format", "group", "dtype"), FLOATS)
def test_floats(isa, name, format, group, dtype):
    rng = np.random.default_rng(group)
    for t in TOKENS:
        n, k = [1, 17, 65, 130][t % 4], 2 * group * [1, 3, 5][t % 3]
        exact, coarse = (1e-5, 5e-3) if format == FP8 else (2e-4, 1.5e-2)  # AMX rounds activations to bfloat16
        check(*linear(rng, isa, t, [n], k, format, group, dtype), exact if t <= 4 else coarse)
        if t in (2, 9, 70):  # a gate and a residual, three outputs
            check(*linear(rng, isa, t, [n, n], k, format, group, dtype, norm=1, epilogue=2, bias=1), 3e-2)
            check(*linear(rng, isa, t, [n, 5, 33], k, format, group, dtype), coarse)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dense(isa, dtype):
    rng = np.random.default_rng(0)
    for t in TOKENS:
        for n, k in [(1, 1), (17, 7), (65, 100), (130, 576)]:
            check(*linear(rng, isa, t, [n], k, dtype=dtype), (1e-6 if dtype == "float32" else 4e-6) * np.sqrt(k) + 1e-6)


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("epilogue", [0, 1, 2, 3, 4])
def test_epilogues(isa, bits, epilogue):
    rng = np.random.default_rng(epilogue)
    for t in [1, 3, 5, 40]:
        for norm, bias in [(0, 0), (1, 0), (0, 1), (1, 1)]:
            ns = {0: [33, 16, 5], 1: [70]}.get(epilogue, [70, 70])
            tolerance = (1e-5 if not bits else 3e-4 if t <= 4 else 2e-2)
            check(*linear(rng, isa, t, ns, 192, bits, 64, "float32", norm, epilogue, bias), tolerance)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_integer_part_is_exact(isa, bits, group):
    """Scale 1, bias 0 and integer activations whose largest is the code's: every step is exact, on every set."""
    rng = np.random.default_rng(1)
    two, one = (16256, 0), (127, 0)
    for t, (top, precise) in [(1, two), (3, two), (7, one), (16, one), (60, one), (6, (16256, 1)), (40, (16256, 1))]:
        k, n = words(3 * group, bits), 70
        x = rng.integers(-top // 64, top // 64 + 1, (t, k)).astype(np.float32)
        x[:, :: min(group, 64)] = top * (-1) ** np.arange(k // min(group, 64))  # so that sums stay below 2^24
        codes = rng.integers(0, 1 << bits, (n, k))
        scale, bias = np.ones((n, k // group), np.float32), np.zeros((n, k // group), np.float32)
        y = np.empty((t, n), np.float32)
        cpu.call("linear", [y], [x, pack(codes, bits), scale, bias], [1, bits, group, 0, 0, 0, precise], [0], isa=isa)
        assert np.array_equal(y, x.astype(np.int64) @ codes.T)


@settings(max_examples=60, deadline=None)
@given(
    isa=st.sampled_from(ISAS), t=st.integers(0, 60), ns=st.lists(st.integers(1, 80), min_size=1, max_size=4),
    groups=st.integers(1, 6), bits=st.sampled_from([0, 2, 3, 4, 5, 6, 8]), group=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]), norm=st.integers(0, 1), bias=st.integers(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(isa, t, ns, groups, bits, group, dtype, norm, bias, seed):
    rng = np.random.default_rng(seed)
    k = words(group * groups, bits) if bits else group * groups - seed % 16
    got, wanted = linear(rng, isa, t, ns, k, bits, group, dtype, norm=norm, bias=bias)
    tolerance = (1e-1 if t > 4 else 2e-3) if bits else 1e-4
    for g, w in zip(got, wanted, strict=True):
        assert not np.isnan(g).any()
        assert np.abs(g - w).max(initial=0) <= tolerance * np.sqrt(k)


def test_residual_in_place():
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((3, 64)).astype(np.float32), rng.standard_normal((70, 64)).astype(np.float32)
    y = rng.standard_normal((3, 70)).astype(np.float32)
    wanted = y + x.astype(np.float64) @ w.T
    cpu.call("linear", [y], [x, w, y], [1, 0, 0, 0, 1, 0, 0], [0])
    np.testing.assert_allclose(y, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("ints", "said"),
    [
        ([1, 7, 64, 0, 0, 0, 0], "bits must be"),
        ([1, 4, 48, 0, 0, 0, 0], "group must be"),
        ([1, 4, 128, 0, 0, 0, 0], "multiple of the group"),
        ([1, 4, 64, 0, 2, 0, 0], "want two"),
        ([1, 4, 32, 0, 0, 0, 0], "one column a group"),
    ],
)
def test_bad_steps_are_named(ints, said):
    x, w, s = np.zeros((2, 64), np.float32), np.zeros((5, 8), np.uint32), np.zeros((5, 1), np.float32)
    with pytest.raises(RuntimeError, match=said):
        cpu.call("linear", [np.zeros((2, 5), np.float32)], [x, w, s, s], ints, [0])

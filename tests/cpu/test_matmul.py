"""matmul against NumPy in float64: shapes with every kind of tail, strides, broadcasting, dtypes, instruction sets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazulite.engine import cpu

ISAS = cpu.runtime().isas()
EPSILON = {"float64": 1e-15, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}


def stored(x, dtype):
    """What a kernel is given, and the float64 values that it holds."""
    if dtype != "bfloat16":
        x = x.astype(dtype)
        return x, x.astype(np.float64)
    bits = (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return (bits, dtype), (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def laid(x, columns_first):
    """x with the same values, in memory by columns if asked."""
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2) if columns_first else x


def product(isa, a, b, dtype="float32", out="float32", a_columns=False, b_columns=False, o_columns=False):
    a, a64 = stored(a, dtype)
    b, b64 = stored(b, dtype)
    turn = lambda x, c: (laid(x[0], c), x[1]) if isinstance(x, tuple) else laid(x, c)  # noqa: E731
    wanted = a64 @ b64
    o = laid(np.full(wanted.shape, 7, np.uint16 if out == "bfloat16" else out), o_columns)
    cpu.call("matmul", [(o, out) if out == "bfloat16" else o], [turn(a, a_columns), turn(b, b_columns)], isa=isa)
    got = (o.astype(np.uint32) << 16).view(np.float32) if out == "bfloat16" else o
    scale = np.abs(a64) @ np.abs(b64)
    assert np.all(np.abs(got - wanted) <= (EPSILON[out] + 1e-6) * scale + 1e-30)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_shapes(isa, dtype):
    rng = np.random.default_rng(0)
    shapes = [(1, 1, 1), (2, 3, 4), (1, 200, 33), (200, 1, 33), (3, 70, 64), (97, 130, 515), (6, 64, 16), (5, 17, 1030)]
    for m, n, k in [*shapes, (8, 600, 40), (70, 7, 100), (0, 3, 2), (3, 2, 0)]:
        for flags in range(8):
            a, b = rng.standard_normal((m, k)), rng.standard_normal((k, n))
            product(isa, a, b, dtype, dtype if dtype == "float64" else "float32", flags & 1, flags & 2, flags & 4)


@pytest.mark.parametrize("shape", [(1, 3, 5), (7, 8, 576), (50, 8, 100), (64, 32, 33), (13, 0, 20), (1, 1, 1)])
def test_a_thin_product_is_added(isa, threads, shape):
    """To rows that may be part of a wider matrix, by factors in either order of memory."""
    threads(2)
    rng = np.random.default_rng(4)
    m, k, n = shape
    for flags in range(4):
        a, b = (rng.standard_normal(s).astype(np.float32) for s in ((m, k), (k, n)))
        o = rng.standard_normal((m, n + 3)).astype(np.float32)
        rest, wanted = o[:, n:].copy(), o[:, :n] + a.astype(np.float64) @ b
        cpu.call("add_product", [o[:, :n]], [laid(a, flags & 1), laid(b, flags & 2)], isa=isa)
        np.testing.assert_allclose(o[:, :n], wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(o[:, n:], rest)


@pytest.mark.parametrize("out", ["float32", "float16", "bfloat16"])
def test_batches_broadcast(isa, out):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((3, 1, 5, 20)), rng.standard_normal((4, 20, 18))
    product(isa, a, b, out=out)
    o = np.empty((3, 4, 5, 18), np.float32)
    x, y = a.astype(np.float32), b.astype(np.float32)
    cpu.call("matmul", [o], [np.broadcast_to(x, (3, 4, 5, 20)), np.broadcast_to(y, (3, 4, 20, 18))], isa=isa)
    np.testing.assert_allclose(o, x @ y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(130, 600, 190), (33, 1100, 33), (64, 32, 1000), (300, 40, 70)])
def test_large_products_on_two_threads(isa, threads, shape, dtype):
    """Packed for both threads; rows, columns and depth with tails, in every order of memory."""
    threads(2)
    rng = np.random.default_rng(2)
    m, k, n = shape
    for flags in range(4):
        a, b = rng.standard_normal((m, k)), rng.standard_normal((k, n))
        product(isa, a, b, dtype, dtype, flags & 1, flags & 2)


def test_batches(isa, threads):
    """Joined into rows where b is shared; small ones apart, large ones one after the other."""
    threads(2)
    rng = np.random.default_rng(3)
    for a, b in [
        ((5, 7, 20), (20, 40)),
        ((2, 3, 7, 20), (3, 20, 40)),
        ((2, 3, 90, 80), (1, 3, 80, 100)),
        ((9, 64, 32), (9, 32, 64)),
    ]:
        product(isa, rng.standard_normal(a), rng.standard_normal(b))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_few_rows(isa, threads, rows, dtype):
    threads(2)
    rng = np.random.default_rng(4)
    for flags in range(4):
        a, b = rng.standard_normal((rows, 203)), rng.standard_normal((203, 1075))
        product(isa, a, b, dtype, "float32", flags & 1, flags & 2)
        product(isa, b.T, a.T, dtype, "float32", flags & 1, flags & 2, True)


@settings(max_examples=40, deadline=None)
@given(
    isa=st.sampled_from(ISAS), m=st.integers(0, 40), n=st.integers(0, 90), k=st.integers(0, 60),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "float64"]),
    flags=st.integers(0, 7), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_shape(isa, m, n, k, dtype, flags, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((m, k)), rng.standard_normal((k, n))
    product(isa, a, b, dtype, dtype if dtype == "float64" else "float32", flags & 1, flags & 2, flags & 4)


def test_inner_sizes_must_agree():
    with pytest.raises(RuntimeError, match="inner sizes"):
        cpu.call("matmul", [np.zeros((2, 3), np.float32)], [np.zeros((2, 4), np.float32), np.zeros((5, 3), np.float32)])

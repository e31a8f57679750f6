"""sort and argsort against NumPy: every dtype, lengths around the borders between methods, any number of threads."""

from typing import Any

import numpy as np
import pytest

from lazulite.engine import cpu

DTYPES = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32",
          "float64"]


def run(kernel: str, x: Any, isa: str, kth: int = -1) -> Any:
    out = np.empty(x.shape, np.uint32 if kernel == "argsort" else x.dtype)
    cpu.call(kernel, [out], [x], ints=[kth], isa=isa)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (5, 17), (4, 65), (2, 3, 130), (2, 5000)])
def test_rows(dtype: str, shape: Any, isa: str, rng: Any) -> None:
    x = (rng.standard_normal(shape) * 60).astype(dtype)
    np.testing.assert_array_equal(run("sort", x, isa), np.sort(x, -1))
    np.testing.assert_array_equal(run("argsort", x, isa), np.argsort(x, -1, kind="stable"))


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32", "float64"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_long_row_is_shared(dtype: str, count: int, isa: str, rng: Any, threads: Any) -> None:
    threads(count)
    x = (rng.standard_normal((1, 100_001)) * 1e4).astype(dtype)
    np.testing.assert_array_equal(run("sort", x, isa), np.sort(x, -1))
    np.testing.assert_array_equal(run("argsort", x, isa), np.argsort(x, -1, kind="stable"))


@pytest.mark.parametrize("make", [np.zeros_like, np.sort, lambda x: np.sort(x)[:, ::-1], lambda x: np.round(x)])
def test_orders_that_are_hard_to_part(make: Any, isa: str, rng: Any) -> None:
    x = make(rng.standard_normal((1, 70_000)).astype(np.float32))
    np.testing.assert_array_equal(run("sort", x, isa), np.sort(x))
    np.testing.assert_array_equal(run("argsort", x, isa), np.argsort(x, kind="stable"))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nan_is_last_and_zeros_are_equal(dtype: str, isa: str) -> None:
    x = np.array([[np.nan, 1, -np.inf, 0.0, -0.0, np.inf, -np.nan, -3, 0.0]], dtype)
    np.testing.assert_array_equal(run("sort", x, isa), np.sort(x))
    np.testing.assert_array_equal(run("argsort", x, isa), np.argsort(x, kind="stable"))


@pytest.mark.parametrize("n", [5, 900, 20_000, 80_000])
@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8"])
def test_partition(n: int, dtype: str, isa: str, rng: Any, threads: Any) -> None:
    threads(3)
    x = (rng.standard_normal((1, n)) * 40).astype(dtype)
    for kth in (0, n // 3, n - 1):
        for found in (run("sort", x, isa, kth), np.take_along_axis(x, run("argsort", x, isa, kth).astype(int), 1)):
            np.testing.assert_array_equal(np.sort(found), np.sort(x))
            assert found[0, kth] == np.sort(x)[0, kth]
            assert found[0, :kth].max(initial=found[0, kth]) <= found[0, kth] <= found[0, kth:].min()


def test_strides(isa: str, rng: Any) -> None:
    x = rng.standard_normal((40, 6, 5)).astype(np.float32).transpose(2, 1, 0)[:, :, ::-1]
    out = np.empty((40, 5, 6), np.float32).transpose(1, 2, 0)
    cpu.call("sort", [out], [x], ints=[-1], isa=isa)
    np.testing.assert_array_equal(out, np.sort(x))

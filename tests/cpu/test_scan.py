"""scan against NumPy's accumulate in float64 or int64, along memory and across it, whatever the threads."""

from typing import Any

import numpy as np
import pytest

from lazulite.engine import cpu

OPS = [(np.add, 0), (np.multiply, 1), (np.maximum, -np.inf), (np.minimum, np.inf), (np.logaddexp, -np.inf)]


def run(op: int, x: Any, isa: str, reverse: int = 0, exclusive: int = 0, dtype: Any = None) -> Any:
    out = np.empty(x.shape, dtype or x.dtype)
    cpu.call("scan", [out], [x], ints=[op, reverse, exclusive], isa=isa)
    return out


def reference(op: int, x: Any, reverse: int = 0, exclusive: int = 0) -> Any:
    ufunc, none = OPS[op]
    x = x[:, ::-1] if reverse else x
    y = ufunc.accumulate(x, 1, dtype=np.float64 if x.dtype.kind == "f" else np.int64)
    y = np.concatenate([np.full_like(y[:, :1], none), y[:, :-1]], 1) if exclusive else y
    return y[:, ::-1] if reverse else y


@pytest.mark.parametrize("op", range(5))
@pytest.mark.parametrize("shape", [(3, 7, 1), (2, 1024, 1), (1, 3000, 1), (2, 9, 130), (3, 50, 2)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reverse, exclusive", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_floats(op: int, shape: Any, dtype: str, reverse: int, exclusive: int, isa: str, rng: Any) -> None:
    x = (rng.standard_normal(shape) * (0.01 if op == 1 else 1) + (op == 1)).astype(dtype)
    found, wanted = run(op, x, isa, reverse, exclusive), reference(op, x, reverse, exclusive)
    np.testing.assert_allclose(found, wanted, rtol=1e-4 if dtype == "float32" else 1e-9, atol=1e-4)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("op", range(4))
@pytest.mark.parametrize("shape", [(2, 2000, 1), (2, 20, 3)])
def test_integers(dtype: str, op: int, shape: Any, isa: str, rng: Any) -> None:
    info = np.iinfo(dtype)
    x = rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    np.testing.assert_array_equal(run(op, x, isa), OPS[op][0].accumulate(x, 1, dtype=dtype))
    if op > 1:
        edge = info.min if op == 2 else info.max
        np.testing.assert_array_equal(run(op, x, isa, 0, 1)[:, 0], np.full((shape[0], shape[2]), edge))


def test_counts_of_bool(isa: str, rng: Any) -> None:
    x = rng.random((1, 5000, 1)) < 0.5
    np.testing.assert_array_equal(run(0, x, isa, dtype=np.int32), np.cumsum(x, 1))


@pytest.mark.parametrize("op, name", [(0, "float32"), (0, "float16"), (2, "float32"), (3, "int32")])
@pytest.mark.parametrize("reverse", [0, 1])
def test_a_long_row_is_the_same_for_all_threads(op: int, name: str, reverse: int, isa: str, rng: Any,
                                                threads: Any) -> None:
    x = (rng.standard_normal((1, 200_001, 1)) * (100 if name == "int32" else 0.1)).astype(name)
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(run(op, x, isa, reverse))
    rtol, atol = (2e-3, 0.05) if name == "float16" else (1e-5, 1e-3)
    np.testing.assert_allclose(found[0], reference(op, x, reverse), rtol, atol)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_a_long_row_is_written_past_the_caches(isa: str, rng: Any) -> None:
    x = rng.random((1, 1_500_003, 1)).astype(np.float32)
    np.testing.assert_allclose(run(0, x, isa), np.cumsum(x, 1, dtype=np.float64), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 5000, 1), (1, 30, 40)])
def test_nan_stays(shape: Any, isa: str, rng: Any) -> None:
    x = rng.standard_normal(shape).astype(np.float32)
    x[0, 20] = np.nan
    for op in (0, 2, 3):
        np.testing.assert_array_equal(np.isnan(run(op, x, isa)), np.isnan(np.cumsum(x, 1)))

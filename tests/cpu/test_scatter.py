"""scatter against NumPy's ufunc.at and assignment, take_along against take_along_axis."""

from typing import Any

import numpy as np
import pytest

from lazulite.engine import cpu

UFUNCS = [None, np.add, np.multiply, np.maximum, np.minimum]


def reference(op: int, x: Any, index: Any, updates: Any) -> Any:
    out, at = x.copy(), list(np.indices(updates.shape))
    at[-2] = np.broadcast_to(index, updates.shape).astype(int)
    if UFUNCS[op]:
        UFUNCS[op].at(out, tuple(at), updates)
    else:
        out[tuple(at)] = updates
    return out


DTYPES = ["bool", "uint8", "int8", "uint16", "int32", "uint64", "float16", "float32", "float64", "complex64"]


@pytest.mark.parametrize(("dtype", "op"), [(d, op) for d in DTYPES for op in range(5 if d != "complex64" else 3)])
def test_dtypes(dtype: str, op: int, isa: str, rng: Any) -> None:
    x, updates = ((rng.standard_normal(s) * 3).astype(dtype) for s in ((2, 5, 20), (2, 9, 20)))
    index = rng.integers(-5, 5, (1, 9, 1)) + np.zeros((2, 1, 1), int)
    out = x.copy()
    cpu.call("scatter", [out], [np.broadcast_to(index, updates.shape), updates], ints=[op], isa=isa)
    np.testing.assert_allclose(out, reference(op, x, index, updates), rtol=1e-2 if dtype == "float16" else 1e-5)


@pytest.mark.parametrize("shape, count", [((1, 3000, 1), 5000), ((1, 40, 700), 90), ((300, 8, 3), 20), ((7, 1), 4),
                                          ((5, 6), 0)])
@pytest.mark.parametrize("rows", [True, False])
def test_every_split_among_threads(shape: Any, count: int, rows: bool, isa: str, rng: Any, threads: Any) -> None:
    wide = (*shape[:-2], count, shape[-1])
    x, updates = rng.standard_normal(shape).astype(np.float32), rng.standard_normal(wide).astype(np.float32)
    index = rng.integers(0, shape[-2], (count, 1) if rows else wide, dtype=np.int32)
    found = []
    for many in (1, 2, 6):
        threads(many)
        found.append(x.copy())
        cpu.call("scatter", [found[-1]], [np.broadcast_to(index, wide), updates], ints=[1], isa=isa)
        np.testing.assert_array_equal(found[-1], found[0])
        np.testing.assert_array_equal(found[-1], reference(1, x, index, updates))


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "complex64"])
@pytest.mark.parametrize("rows", [True, False])
def test_take_along(dtype: str, rows: bool, isa: str, rng: Any) -> None:
    x = (rng.standard_normal((3, 8, 70)) * 9).astype(dtype).transpose(0, 1, 2)[:, ::-1]
    index = np.broadcast_to(rng.integers(-8, 8, (3, 300, 1 if rows else 70)), (3, 300, 70))
    out = np.empty((3, 300, 70), dtype)
    cpu.call("take_along", [out], [x, index], isa=isa)
    np.testing.assert_array_equal(out, np.take_along_axis(x, index, 1))


@pytest.mark.parametrize("index", [4, -5])
def test_an_index_out_of_range_is_an_error(index: int) -> None:
    x, at = np.zeros((4, 2)), np.full((1, 2), index)
    with pytest.raises(RuntimeError, match=rf"\[scatter\] index {index} is out of range for size 4"):
        cpu.call("scatter", [x], [at, np.ones((1, 2))], ints=[0])
    with pytest.raises(RuntimeError, match=rf"\[take_along_axis\] index {index} is out of range for size 4"):
        cpu.call("take_along", [np.empty((1, 2))], [x, at])

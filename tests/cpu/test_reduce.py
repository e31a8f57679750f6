"""reduce against NumPy in float64: every operation, dtype and direction, and sizes that are split among threads."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazulite.engine import cpu

OPS = ["sum", "prod", "max", "min", "any", "all", "argmax", "argmin"]


def reduce(op: str, x: Any, axes: tuple[int, ...], isa: str, out_dtype: Any = None, name: str | None = None) -> Any:
    """op of x over axes by the kernel; name: the dtype that x's bits are, where NumPy has none."""
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    dtype = out_dtype or {"any": bool, "all": bool, "argmax": np.uint32, "argmin": np.uint32}.get(op, x.dtype)
    out = np.empty([x.shape[axis] for axis in kept], dtype)
    view = x.transpose([*kept, *axes])
    source = (view.view(np.uint16), name) if name else view
    cpu.call("reduce", [out], [source], ints=[OPS.index(op), len(axes)], isa=isa)
    return out


SHAPES = [
    ((7,), (0,)), ((5, 33), (1,)), ((33, 70), (0,)), ((3, 40, 5), (1,)), ((4, 3, 50), (0, 2)), ((2, 3, 4), (0, 1, 2)),
    ((40, 10), (1,)), ((70, 1023), (1,)), ((131, 20), (0,)), ((3, 70, 37), (1,)), ((3, 20, 4, 18), (1, 2)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "int64", "uint64", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape, axes", SHAPES)
def test_value(dtype: str, shape: Any, axes: tuple[int, ...], isa: str, rng: Any) -> None:
    x = (rng.standard_normal(shape) * 3).astype(dtype)
    for op in OPS:
        over = axes[0] if op.startswith("arg") or len(axes) == 1 else axes
        items = np.sign(x) if op == "prod" and dtype == "float16" else x
        wanted = getattr(np, op)(items.astype(np.float64) if dtype.startswith("float") else items, axis=over)
        wide = np.float32 if dtype == "float16" and op in OPS[:4] else None
        result = reduce(op, items, axes[:1] if op.startswith("arg") else axes, isa, wide)
        with np.errstate(over="ignore"):  # a product may be infinite in float32
            wanted = wanted.astype(result.dtype)
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5, err_msg=op)


LARGE = [
    ((300_001,), (0,)),
    ((7, 9000, 33), (1,)),
    ((90_000, 3), (1,)),
    ((3, 100_003), (1,)),
    ((20_000, 20), (0,)),
    ((3000, 1500), (0,)),
    ((40, 5000), (1,)),
]


@pytest.mark.parametrize("shape, axes", LARGE)
def test_large_sums_are_exact_and_independent_of_threads(
    shape: Any, axes: tuple[int, ...], isa: str, threads: Any, rng: Any
) -> None:
    x = rng.uniform(0, 1, shape).astype(np.float32)
    wanted = x.sum(axes, dtype=np.float64)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(reduce("sum", x, axes, isa))
        assert reduce("argmax", np.moveaxis(x, -1, 0), (0,), isa).tolist() == x.argmax(-1).tolist()
    np.testing.assert_allclose(results[0], wanted, rtol=3e-7)
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_bfloat16(isa: str, rng: Any) -> None:
    x = rng.standard_normal((9, 100)).astype(ml_dtypes.bfloat16)
    out = reduce("sum", x, (1,), isa, np.float32, "bfloat16")
    np.testing.assert_allclose(out, x.astype(np.float64).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [0, 17, 99])
def test_nan_is_the_largest_and_the_smallest(place: int, isa: str, rng: Any) -> None:
    x = rng.standard_normal((2, 100)).astype(np.float32)
    x[1, place] = np.nan
    for op in ("max", "min", "sum", "argmax", "argmin"):
        np.testing.assert_allclose(reduce(op, x, (1,), isa), getattr(np, op)(x, axis=1), rtol=1e-5)
        np.testing.assert_allclose(reduce(op, x.T.copy(), (0,), isa), getattr(np, op)(x, axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    "shape, axis", [((3000, 40), 0), ((40, 90), 1), ((5, 300, 21), 1), ((60, 12), 1), ((2, 70_000), 1)]
)
def test_nan_and_place_in_every_loop(shape: Any, axis: int, isa: str, threads: Any, rng: Any) -> None:
    threads(2)
    x = rng.integers(-50, 50, shape).astype(np.float32)  # with equals, of which the first wins
    for _ in range(2):
        for op in ("max", "min", "argmax", "argmin"):
            np.testing.assert_array_equal(reduce(op, x, (axis,), isa), getattr(np, op)(x, axis=axis))
        x.reshape(-1)[rng.integers(0, x.size, 30)] = np.nan


@pytest.mark.parametrize("fill", [-np.inf, np.inf, 0.0])
def test_the_first_of_equals_wins(fill: float, isa: str) -> None:
    x = np.full((2, 700), fill, np.float32)
    assert reduce("argmax", x, (1,), isa).tolist() == [0, 0] == reduce("argmin", x, (1,), isa).tolist()


def test_no_items(isa: str) -> None:
    x = np.zeros((3, 0), np.float32)
    assert reduce("sum", x, (1,), isa).tolist() == [0, 0, 0]
    assert reduce("max", x, (1,), isa).tolist() == [-np.inf] * 3
    assert reduce("sum", x, (0,), isa).shape == (0,)
    with pytest.raises(RuntimeError, match=r"\[reduce\] argmax and argmin of no items"):
        reduce("argmax", x, (1,), isa)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_and_axes(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(lambda s: np.prod(s) < 50_000))
    order = data.draw(st.permutations(range(len(shape))))
    axes = tuple(data.draw(st.lists(st.sampled_from(range(len(shape))), min_size=1, unique=True)))
    isa = data.draw(st.sampled_from(cpu.runtime().isas()))
    x = np.random.default_rng(len(shape)).integers(-9, 9, shape).astype(np.int32).transpose(order)
    np.testing.assert_array_equal(reduce("sum", x, axes, isa), x.sum(axes))
    floats = x.astype(np.float32)
    np.testing.assert_array_equal(reduce("sum", floats, axes, isa), floats.sum(axes))

"""reduce: every fold over rows, columns and mixtures, of few long and of many short results."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from . import Vector, rounded

OPS = ["sum", "prod", "max", "min", "any", "all", "argmax", "argmin"]
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [              # and the reduced axes
    ((7,), (0,)), ((5, 33), (1,)), ((33, 70), (0,)), ((4, 3, 50), (0, 2)), ((2, 3, 4), (0, 1, 2)), ((40, 1), (1,)),
    ((3, 41, 5), (1,)), ((9, 300), (1,))]
LONG: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((70_001,), (0,)), ((9000, 11), (0,)), ((20_000, 3), (0,))]
DTYPES = ["bool", "uint8", "int16", "int32", "uint32", "int64", "uint64", "float16", "bfloat16"]      # and float32


def vectors() -> Iterator[Vector]:
    rng = np.random.default_rng(3)
    for dtype in DTYPES:
        for op in OPS:
            shape, axes = SHAPES[(OPS.index(op) + DTYPES.index(dtype)) % len(SHAPES)]
            yield _vector(op, rng.standard_normal(shape) * 3, dtype, axes)
    for op in OPS:
        for shape, axes in SHAPES:
            yield _vector(op, rng.integers(-4, 4, shape), "float32", axes)     # with equals, of which the first wins
    for op, (shape, axes) in [(op, case) for op in ("sum", "max", "argmin") for case in LONG]:
        yield _vector(op, rng.uniform(0, 1, shape), "float32", axes)
        yield _vector(op, rng.integers(-2**31, 2**31, shape), "int64", axes)
    yield from _corners()


def _corners() -> Iterator[Vector]:
    x = np.random.default_rng(4).standard_normal((3, 100))
    x[0, 17] = x[0, 40] = np.nan
    x[1] = -np.inf
    for op in ("sum", "max", "min", "argmax", "argmin"):
        yield _vector(op, x, "float32", (1,), "-nan")
        yield _vector(op, x.T, "float32", (0,), "-nan")
    yield _vector("sum", np.zeros((3, 0)), "float32", (1,), "-empty")
    yield _vector("sum", np.full((2, 40), 2**62), "int64", (1,), "-wraps")
    yield _vector("prod", np.full((2, 40), 3), "uint64", (1,), "-wraps")


def _vector(op: str, values: np.ndarray, dtype: str, axes: tuple[int, ...], note: str = "") -> Vector:
    axes = axes[-1:] if op.startswith("arg") else axes
    kept = [axis for axis in range(values.ndim) if axis not in axes]
    operand, exact = rounded(np.sign(values) if op == "prod" and dtype == "float16" else values, dtype)
    whole = dtype if dtype.startswith(("u", "i")) else "int64" if dtype == "bool" else ""
    items = operand.astype(whole) if isinstance(operand, np.ndarray) and whole else exact
    view = (operand[0] if isinstance(operand, tuple) else operand).transpose([*kept, *axes])
    with np.errstate(all="ignore"):
        wide = {"dtype": whole} if whole and op in ("sum", "prod") else {}
        wanted = np.asarray(getattr(np, op)(items, axis=axes[0] if len(axes) == 1 else axes, **wide))
        wanted = wanted if whole else np.where(np.abs(wanted) > 3.4e38, np.copysign(np.inf, wanted), wanted)
    kind = "uint32" if op.startswith("arg") else "bool" if op in ("any", "all") else whole or "float32"
    shape = "x".join(map(str, values.shape))
    # sums and products of n floats: n units in the last place at worst; those of LONG are blocked
    return Vector(f"reduce-{op}-{dtype}-{shape}-axes{''.join(map(str, axes))}{note}", "reduce",
                  [np.zeros(wanted.shape, kind)], [(view, dtype) if isinstance(operand, tuple) else view],
                  [OPS.index(op), len(axes)], [], [wanted], 1e-5 if op in ("sum", "prod") else 0)

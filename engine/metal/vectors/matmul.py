"""matmul: ragged tiles, mixtures of dtypes, transposed and repeated operands, vectors on either side."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from . import Operand, Vector, rounded, zeros

SHAPES = [(2, 2, 1), (7, 9, 33), (64, 64, 16), (65, 70, 40), (33, 130, 17), (0, 5, 3), (4, 3, 0)]      # M, N, K
THIN = [(1, 77, 300), (77, 1, 300), (1, 1, 5), (1, 8, 1000), (40, 1, 3), (3, 70, 33), (41, 4, 70), (4, 4, 9)]
HALVES = [("float16", "float32", "float32"), ("bfloat16", "bfloat16", "float32"), ("bfloat16", "float16", "bfloat16"),
          ("float32", "bfloat16", "float16")]
# float32: rounding of K products and sums; else half a unit in the last place of the result, at most 4 sqrt(K) large
TOLERANCES = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}
Turn = Callable[[np.ndarray], np.ndarray]


def vectors() -> Iterator[Vector]:
    for shape in SHAPES + THIN:
        yield _vector(shape, note="")
        yield _vector(shape, turn_a=_columns, note="-a-turned")
        yield _vector(shape, turn_b=_columns, note="-b-turned")
    for dtypes in HALVES:
        for shape in (SHAPES[1], SHAPES[3], THIN[0], THIN[1]):
            yield _vector(shape, dtypes)
    yield _vector((20, 12, 9), batch=(3,), note="-batch")
    yield _vector((20, 12, 9), batch=(2, 3), turn_b=lambda b: np.broadcast_to(b[:1], b.shape), note="-batch-repeated")
    yield _vector((1, 12, 9), batch=(2, 3), turn_a=lambda a: a.swapaxes(0, 1).copy().swapaxes(0, 1), note="-swapped")
    yield _vector((9, 12, 9), turn_a=lambda a: np.repeat(a, 2, 1)[::-1, ::2], note="-gaps")


def _columns(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _vector(sizes: tuple[int, int, int], dtypes: tuple[str, str, str] = ("float32",) * 3, batch: tuple[int, ...] = (),
            turn_a: Turn = _same, turn_b: Turn = _same, note: str = "") -> Vector:
    m, n, k = sizes
    rng = np.random.default_rng(m * 100 + n)
    operands: list[Operand] = []
    exact = []
    for shape, turn, dtype in zip(((*batch, m, k), (*batch, k, n)), (turn_a, turn_b), dtypes, strict=False):
        operand, real = rounded(rng.standard_normal(shape), dtype)
        operands.append((turn(operand[0]), dtype) if isinstance(operand, tuple) else turn(operand))
        exact.append(turn(real))
    kind = dtypes[2]
    return Vector(f"matmul-{m}x{n}x{k}-{'-'.join(dtypes)}{note}", "matmul", [zeros((*batch, m, n), kind)], operands,
                  [], [], [exact[0] @ exact[1]],
                  TOLERANCES[kind] * (max(1.0, math.sqrt(k) / 4) if kind == "float32" else 1))

"""Vectors of quantized_matmul, both orientations, and of gather_mm."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from . import Operand, Vector, rounded
from .linear import FORMATS, TOLERANCE, stored

ROWS = (1, 33, 0)                    # the ways of few tokens and of many
MATRICES = 3


def _matmul(rng: np.random.Generator, M: int, format: int, group: int, dtype: str, transposed: bool) -> Vector:
    shape = (35, 2 * group) if transposed or group == 16 else (70, group)
    arrays, w = stored(rng, shape, format, group, dtype)
    w = w.T if transposed else w
    x = rng.standard_normal((M, len(w))).astype(np.float32)
    return Vector(f"quantized_matmul-{format}-{group}-{dtype}-{M}{'-across' * (not transposed)}", "quantized_matmul",
                  [np.full((M, w.shape[1]), np.nan, np.float32)], [x, *arrays], [format, group, int(transposed), 0], [],
                  [x.astype(np.float64) @ w], TOLERANCE if transposed else 2 * TOLERANCE)


def _gather(rng: np.random.Generator, M: int, N: int, K: int, format: int, group: int, dtype: str,
            turned: bool) -> Vector:
    """turned: the matrices are (B, N, K), and floats are given as their transposes."""
    arrays, b = stored(rng, (MATRICES, N, K) if turned else (MATRICES, K, N), format, group, dtype)
    b = np.ascontiguousarray(b.swapaxes(1, 2)) if turned else b
    if not format and turned:
        arrays = [(a[0].swapaxes(1, 2), a[1]) if isinstance(a, tuple) else a.swapaxes(1, 2) for a in arrays]
    a, values = rounded(rng.standard_normal((5, M, K)), "float32" if format else dtype)
    lhs, rhs = rng.integers(-5, 5, 7).astype(np.int32), rng.integers(-MATRICES, MATRICES, 7).astype(np.int32)
    inputs: list[Operand] = [a, *arrays, lhs, rhs]
    return Vector(f"gather_mm-{format}-{dtype}-{M}x{N}x{K}{'-turned' * turned}", "gather_mm",
                  [np.full((7, M, N), np.nan, np.float32)], inputs, [format, group], [],
                  [values[lhs] @ b[rhs]], 2 * TOLERANCE)


def vectors() -> Iterator[Vector]:
    rng = np.random.default_rng(5)
    for i, (format, group, dtype) in enumerate(FORMATS):
        if format:
            for transposed in (True, False):
                yield _matmul(rng, ROWS[(i + transposed) % len(ROWS)], format, group, dtype, transposed)
        if format in (0, 4):
            for M, N, K in ((1, 5, 128), (33, 65, 256)):
                yield _gather(rng, M, N, K + (format == 0), format, group, dtype, True)
                if not format:
                    yield _gather(rng, M, N, K, format, group, dtype, False)
    yield _gather(rng, 5, 9, 64, 0, 0, "float32", True)

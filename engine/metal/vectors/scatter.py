"""scatter: every way to combine, whole rows and single items, repeated indices, of which the last one counts."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from . import Vector, rounded

OPS = ["set", "add", "multiply", "maximum", "minimum"]
DTYPES = ["int32", "uint8", "int64", "uint64", "float32", "bool"]
SHAPES = [(1, 9, 70, 5), (2, 5, 1, 40), (3, 4, 3, 2), (1, 6, 33, 0)]   # A, N, C, I


def vectors() -> Iterator[Vector]:
    rng = np.random.default_rng(13)
    for op in OPS:
        for dtype in DTYPES:
            for a, n, c, i in SHAPES:
                x, updates = (rng.integers(0, 99, shape).astype(dtype) for shape in ((a, n, c), (a, i, c)))
                each = rng.integers(-n, n, (a, i, c))
                yield _vector(f"{op}-{dtype}-{a}x{n}x{c}-{i}", op, x, each, updates)
        x, updates = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 50), (9, 50)))
        rows = np.broadcast_to(rng.integers(0, 6, (9, 1)).astype(np.uint32), (9, 50))
        yield _vector(f"{op}-rows", op, x, rows, updates)
        yield _vector(f"{op}-turned", op, np.asfortranarray(x), rows, np.asfortranarray(updates))
    (bits, name), exact = rounded(np.arange(12.0).reshape(4, 3), "bfloat16")
    twos = np.full((1, 3), 0x4000, np.uint16), name
    yield Vector("scatter-bfloat16", "scatter", [(bits, name)], [np.array([[1, 1, 1]]), twos], [1], [],
                 [exact + np.array([[0], [2], [0], [0]])], 0)


def _vector(note: str, op: str, x: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> Vector:
    place: list[np.ndarray] = list(np.indices(indices.shape, sparse=True))
    place[-2] = indices.astype(int)
    wanted = x.astype(np.float64) if x.dtype.kind == "f" else x.copy()
    if op == "set":
        for at in np.ndindex(indices.shape):
            wanted[(*at[:-2], int(indices[at]), at[-1])] = updates[at]
    else:
        getattr(np, op).at(wanted, tuple(place), updates)
    # float32: sums and products of at most 40 numbers
    return Vector(f"scatter-{note}", "scatter", [x], [indices, updates], [OPS.index(op)], [], [wanted],
                  1e-6 if x.dtype.kind == "f" else 0)

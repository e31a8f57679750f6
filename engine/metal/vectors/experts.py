"""Vectors of experts: every epilogue and some formats, few pairs of token and expert and many."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from . import Operand, Vector, rounded
from .linear import FP4, FP8, GATES, stored

FORMATS = [(0, 0, "float32"), (0, 0, "bfloat16"), (3, 16, "float32"), (4, 64, "bfloat16"), (8, 32, "bfloat16"),
           (FP4, 32, "uint8"), (FP8, 16, "float16")]
SHAPES = [(0, 2, 4), (1, 2, 4), (1, 8, 16), (7, 2, 13), (9, 1, 2), (50, 3, 5)]             # tokens, choices, experts
TOLERANCE = 2e-5                     # two float32 products, one after the other


def make(T: int, choices: int, count: int, format: int, group: int, dtype: str, epilogue: int, bias: bool) -> Vector:
    rng = np.random.default_rng(T + count + format)
    C, inner = (64, 128) if format else (37, 70)
    x = rng.standard_normal((T, C)).astype(np.float32)
    chosen = np.array([rng.permutation(count)[:choices] for _ in range(T)], np.int32).reshape(T, choices)
    share = rng.random((T, choices)).astype(np.float32)
    matrices = [stored(rng, (count, *shape), format, group, dtype) for shape in ((inner, C), (inner, C), (C, inner))]
    gate, up, down = (w for _, w in matrices)
    other = dtype if dtype == "bfloat16" else "float32"
    biases = [rounded(rng.standard_normal(w.shape[:2]) * bias, other) for w in (gate, up, down)]
    (_, b), (_, c), (_, d) = biases
    wanted = np.zeros((T, C))
    for t in range(T):
        for e, part in zip(chosen[t], share[t], strict=True):
            wanted[t] += part * (down[e] @ GATES[epilogue](gate[e] @ x[t] + b[e], up[e] @ x[t] + c[e]) + d[e])
    operands: list[Operand] = [x, chosen, share, *(a for arrays, _ in matrices for a in arrays)]
    return Vector(f"experts-{T}x{choices}of{count}-{format}-{dtype}-epilogue{epilogue}{'-bias' * bias}", "experts",
                  [np.full((T, C), np.nan, np.float32)], operands + [b for b, _ in biases] * bias,
                  [format, group, epilogue, int(bias)], [], [wanted], TOLERANCE)


def vectors() -> Iterator[Vector]:
    for i, (format, group, dtype) in enumerate(FORMATS):
        for j, (T, choices, count) in enumerate(SHAPES):
            yield make(T, choices, count, format, group, dtype, 2 + (i + j) % 4, bool((i + j) % 2))

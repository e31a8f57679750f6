"""softmax, rms_norm, layer_norm: rows of every length, dtypes, a row that is not there, one in place."""
from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from . import Operand, Vector, rounded, zeros

TYPES = {"float32": 4e-6, "float16": 1e-3, "bfloat16": 8e-3}           # half a unit in the last place of the result
SHAPES = [(0, 8), (1, 1), (3, 7), (2, 33), (5, 129), (2, 576), (1, 4100)]
EPS = 1e-5


def vectors() -> Iterator[Vector]:
    rng = np.random.default_rng(8)
    for dtype in TYPES:
        for shape in SHAPES:
            x, w, b = rng.standard_normal(shape) * 4, rng.standard_normal(shape[1]), rng.standard_normal(shape[1])
            for kernel in ("softmax", "rms_norm", "layer_norm"):
                yield _vector(kernel, x, w, b, dtype, "x".join(map(str, shape)))
    yield _vector("layer_norm", 1000 + rng.standard_normal((2, 300)), np.ones(300), np.zeros(300), "float32", "far")
    ends = np.array([[-math.inf, 0, 1, -math.inf], [-math.inf] * 4, [0, math.nan, 1, 2], [200.0, 100, -200, 0]])
    yield _vector("softmax", ends, ends[0], ends[0], "float32", "ends")
    x = rng.standard_normal((4, 40)).astype(np.float32)
    yield Vector("softmax-in-place", "softmax", [x], [x], [], [], [_softmax(x.astype(np.float64))], TYPES["float32"])
    turned = np.asfortranarray(x)
    yield Vector("softmax-turned", "softmax", [np.zeros_like(x)], [turned], [], [], [_softmax(x.astype(np.float64))],
                 TYPES["float32"])


def _softmax(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        e = np.exp(x - x.max(1, keepdims=True, initial=-math.inf))
        return e / e.sum(1, keepdims=True)


def _rms_norm(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(1, keepdims=True) + EPS) * w


def _vector(kernel: str, x: np.ndarray, w: np.ndarray, b: np.ndarray, dtype: str, note: str) -> Vector:
    operands: list[Operand] = []
    exact: list[np.ndarray] = []
    for values, name in ((x, dtype), (w, dtype if x.shape[0] % 2 else "float32"), (b, dtype)):
        operand, real = rounded(values, name)
        operands, exact = [*operands, operand], [*exact, real]
    n = ("softmax", "rms_norm", "layer_norm").index(kernel)
    x, w, b = exact
    wanted = (lambda: _softmax(x), lambda: _rms_norm(x, w), lambda: _rms_norm(x - x.mean(1, keepdims=True), w) + b)[n]()
    tolerance = 2e-4 if note == "far" else TYPES[dtype]    # far: the mean of 1000s has 24 bits
    return Vector(f"{kernel}-{dtype}-{note}", kernel, [zeros(x.shape, dtype)], operands[:1 + n], [],
                  [EPS] if n else [], [wanted], tolerance)

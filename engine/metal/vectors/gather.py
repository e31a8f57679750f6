"""take, take_along, quantized_take: items of every size, indices of every integer type, negative ones, strides."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from . import Vector, rounded, zeros
from .quantize import FORMATS, dequantized, packed

DTYPES = ["bool", "uint8", "int16", "float16", "float32", "int64", "uint64"]
INDICES = ["int32", "uint32", "int64", "uint8", "int8", "int16", "uint64"]
SHAPES = [((1, 7, 64), 5), ((2, 90, 1), 500), ((2, 4, 3), 0), ((1, 30, 300), 6), ((3, 5, 2), 9)]     # (A, N, C), I


def vectors() -> Iterator[Vector]:
    rng = np.random.default_rng(10)
    for dtype, kind in zip(DTYPES, INDICES, strict=True):
        for shape, count in SHAPES:
            x = (rng.standard_normal(shape) * 50).astype(dtype)
            least = 0 if kind.startswith("u") else -shape[1]
            index = rng.integers(least, shape[1], count).astype(kind)
            note = f"{dtype}-{'x'.join(map(str, shape))}-{count}-{kind}"
            yield Vector(f"take-{note}", "take", [np.zeros((shape[0], count, shape[2]), dtype)], [x, index], [], [],
                         [x[:, index.astype(int)]], 0)
            each = rng.integers(least, shape[1], (shape[0], 4, shape[2])).astype(kind)
            yield Vector(f"take_along-{note}", "take_along", [np.zeros(each.shape, dtype)], [x, each], [], [],
                         [np.take_along_axis(x, each.astype(int), 1)], 0)
    x = rng.standard_normal((6, 4, 5)).astype(np.float32)
    turned, index = x.transpose(2, 0, 1), np.array([5, 0, 0, -1])
    yield Vector("take-strides", "take", [np.zeros((5, 4, 4), np.float32)], [turned, index], [], [],
                 [turned[:, index]], 0)
    yield Vector("take-rows", "take", [np.zeros((4, 5), np.float32)], [x[:, 1], index], [], [], [x[:, 1][index]], 0)
    operand, exact = rounded(x[:, 0], "bfloat16")
    yield Vector("take-bfloat16", "take", [zeros((4, 5), "bfloat16")], [operand, index], [], [], [exact[index]], 0)
    for format, group, side in FORMATS:
        parts = packed(rng, 9, 128, format, group, side)
        wanted = dequantized(parts, 128, format, group)[[3, 0, -1, 8]]
        yield Vector(f"quantized_take-{format}-{group}-{side}", "quantized_take", [np.zeros((4, 128), np.float32)],
                     [*(operand for operand, _ in parts), np.array([3, 0, -1, 8], np.int32)], [format, group], [],
                     [wanted], 1e-6)

"""quantize against MLX's arithmetic in float32, equal in every bit; dequantize of every format."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from . import Operand, Vector, rounded, zeros

SIDES = ("float32", "float16", "bfloat16")
FORMATS: list[tuple[int, int, str]] = [                    # of codes.h, group, dtype of scales
    *((bits, (16, 32, 64, 128)[bits % 4], SIDES[bits % 3]) for bits in (1, 2, 3, 4, 5, 6, 8)), (4, 64, "bfloat16"),
    (3, 16, "float32"), (20, 32, "uint8"), (20, 16, "uint8"), (24, 32, "uint8"), (20, 32, "float16"),
    (24, 64, "float32")]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
TOLERANCES = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}      # half a unit in the last place
Part = tuple[Operand, np.ndarray]


def vectors() -> Iterator[Vector]:
    rng = np.random.default_rng(11)
    for bits in (1, 2, 3, 4, 5, 6, 8):
        for dtype, group in zip(SIDES, (32, 64, 128) if bits % 2 else (16, 32, 64), strict=True):
            x = rng.standard_normal((7, 384))
            x[0], x[1], x[2], x[3, 5], x[4] = 0, 0.3, np.abs(x[2]), 1000, -np.abs(x[4]) * 1e-9
            yield _quantize(x, dtype, bits, group)
    for i, (format, group, side) in enumerate(FORMATS):
        parts = packed(rng, 3, 256, format, group, side)
        kind = SIDES[i % 3]
        yield Vector(f"dequantize-{format}-{group}-{side}-{kind}", "dequantize",
                     [zeros((3, 256), kind)], [operand for operand, _ in parts], [format, group],
                     [], [dequantized(parts, 256, format, group)], TOLERANCES[kind])


def _quantize(x: np.ndarray, dtype: str, bits: int, group: int) -> Vector:
    operand, exact = rounded(x, dtype)
    v, most = exact.astype(np.float32).reshape(len(x), -1, group), np.float32((1 << bits) - 1)
    low, high = v.min(2), v.max(2)
    size, side = np.maximum((high - low) / most, np.float32(1e-7)), np.abs(low) > np.abs(high)
    scale, edge = np.where(side, size, -size), np.where(side, low, high)
    zero = np.rint(edge / scale)
    with np.errstate(all="ignore"):
        scale, bias = np.where(zero != 0, edge / zero, scale), np.where(zero != 0, edge, np.float32(0))
    if bits == 1:
        scale, bias = size, low
    codes = np.clip(np.rint((v - bias[..., None]) / scale[..., None]), 0, most).astype(np.uint8)
    words = _words(codes.reshape(x.shape), bits)
    sides = [rounded(s, dtype) for s in (scale, bias)]
    blank = [zeros(scale.shape, dtype) for _ in sides]
    return Vector(f"quantize-{bits}-{group}-{dtype}", "quantize", [np.zeros_like(words), *blank], [operand],
                  [bits, group], [], [words, *(wanted for _, wanted in sides)], 0)


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    stream = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little").view(np.uint32)


def packed(rng: np.random.Generator, rows: int, columns: int, format: int, group: int, side: str) -> list[Part]:
    """Codes, scales and biases of a random matrix, each with the numbers that it stands for."""
    bits = format & 15
    codes = rng.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    codes[codes == 127] = 126                              # NaN of e4m3
    codes[codes == 255] = 254
    values = E2M1[codes] if format == 20 else _e4m3(codes) if format == 24 else codes.astype(float)
    shape = (rows, columns // group)
    if side == "uint8":
        scales = rng.integers(*((40, 70) if group == 16 else (120, 132)), shape).astype(np.uint8)
        exact = _e4m3(scales) if group == 16 else 2.0 ** (scales.astype(float) - 127)
        return [(_words(codes, bits), values), (scales, exact)]
    sides = [rounded(rng.uniform(-0.1, 0.1, shape), side) for _ in range(2 if format < 16 else 1)]
    return [(_words(codes, bits), values), *sides]


def dequantized(parts: Sequence[Part], columns: int, format: int, group: int) -> np.ndarray:
    values, scale, *bias = (exact for _, exact in parts)
    return values * np.repeat(scale, group, 1) + (np.repeat(bias[0], group, 1) if bias else 0.0)


def _e4m3(codes: np.ndarray) -> np.ndarray:
    exponent, mantissa = codes >> 3 & 15, (codes & 7).astype(float)
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(float) - 10))
    return np.where(codes < 128, size, -size)

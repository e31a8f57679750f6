"""Vectors of linear: every format, type and epilogue, with 0 to 70 tokens."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import erf
from typing import Any

import numpy as np

from . import Operand, Vector, rounded

Values = np.ndarray[Any, np.dtype[np.float64]]
FP4, FP8 = 20, 24
FORMATS = [                          # format, group, dtype of the floats or of the scales
    (0, 0, "float32"), (0, 0, "float16"), (0, 0, "bfloat16"), (1, 32, "float16"), (2, 128, "bfloat16"),
    (3, 16, "float32"), (4, 32, "float16"), (4, 64, "bfloat16"), (4, 128, "float32"), (5, 64, "float32"),
    (6, 64, "float16"), (8, 32, "bfloat16"), (FP4, 32, "uint8"), (FP4, 16, "uint8"), (FP8, 32, "uint8"),
    (FP8, 128, "float32"), (FP8, 64, "bfloat16"), (FP8, 16, "float16")]
TOLERANCE = 1e-5                     # float32 sums of some hundred products, whose squares add up to about 1
EPS = 1e-5


# ---------------------------------------------------------------- stored matrices

def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """(…, K) codes as a stream of low bits first: (…, K bits / 32) uint32."""
    stream = codes.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little").view(np.uint32)


def small_floats(codes: np.ndarray, exponents: int, mantissas: int) -> Values:
    """Floats of a sign, an exponent and a mantissa, the bias 2 ** (exponents - 1) - 1. Source: OCP MX v1.0"""
    exponent, mantissa = codes >> mantissas & (1 << exponents) - 1, codes & (1 << mantissas) - 1
    bias, part = (1 << exponents - 1) - 1, mantissa / (1 << mantissas)
    size = np.where(exponent == 0, part * 2.0 ** (1 - bias), (1 + part) * np.exp2(exponent.astype(float) - bias))
    return np.where(codes >> exponents + mantissas, -size, size)


def stored(rng: np.random.Generator, shape: Sequence[int], format: int, group: int,
           dtype: str) -> tuple[list[Operand], Values]:
    """The arrays of a random matrix (…, K), and its values: of size 1 / sqrt(K), so that products have size 1."""
    size, K = 1 / np.sqrt(shape[-1]), shape[-1]
    if not format:
        w, values = rounded(rng.standard_normal(shape) * size, dtype)
        return [w], values
    bits = format & 15
    codes = rng.integers(0, 1 << bits, shape)
    sides = (*shape[:-1], K // group)
    if format < FP4:
        scale, s = rounded(rng.uniform(-2, 2, sides) * size / (1 << bits), dtype)
        bias, b = rounded(rng.uniform(-1, 1, sides) * size, dtype)
        return [pack(codes, bits), scale, bias], codes * np.repeat(s, group, -1) + np.repeat(b, group, -1)
    codes[codes % 128 == 127] = 0                          # no number
    values = small_floats(codes, *((2, 1) if format == FP4 else (4, 3)))
    most = size / (4 if format == FP4 else 256)
    if dtype != "uint8":
        scale, s = rounded(rng.uniform(-1, 1, sides) * most, dtype)
    elif group == 16:
        scale = rng.integers(0, 24, sides).astype(np.uint8)
        s = small_floats(scale, 4, 3)
    else:
        scale = rng.integers(-3, 1, sides).astype(np.int64) + int(np.log2(most)) + 127
        scale, s = scale.astype(np.uint8), np.exp2(scale - 127.0)
    return [pack(codes, bits), scale], values * np.repeat(s, group, -1)


def columns(format: int, group: int, groups: int) -> int:
    """The inner size of so many groups, whole words of codes; an odd one for floats."""
    if not format:
        return 33 * groups + 1
    return group * groups * (1 + (group * groups * (format & 15) % 32 != 0))


# ---------------------------------------------------------------- the definition

def _gelu(v: Values, tanh: bool) -> Values:
    inner = np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)) if tanh else np.vectorize(erf, [float])(v / np.sqrt(2))
    return v * 0.5 * (1 + inner)


def _clamped_swish(v: Values, up: Values) -> Values:
    v = np.minimum(v, 7)
    return v / (1 + np.exp(-1.702 * v)) * (np.clip(up, -7, 7) + 1)


GATES: dict[int, Callable[[Values, Values], Values]] = {
    2: lambda v, up: v / (1 + np.exp(-v)) * up, 3: lambda v, up: _gelu(v, False) * up,
    4: lambda v, up: _gelu(v, True) * up, 5: _clamped_swish}


def make(id: str, T: int, sizes: Sequence[int], K: int, format: int = 0, group: int = 0, dtype: str = "float32", *,
         norm: bool = False, bias: bool = False, epilogue: int = 0, gap: int = 0, other: str = "float32") -> Vector:
    """A vector of random operands. gap: columns between the rows of x; other: the dtype of norm and bias."""
    rng = np.random.default_rng(T + K + format)
    x = rng.standard_normal((T, K + gap)).astype(np.float32)[:, :K]
    inputs: list[Operand] = [x]
    rows = x.astype(np.float64)
    if norm:
        gain, factor = rounded(rng.uniform(0.5, 1.5, K), other)
        inputs.append(gain)
        rows = rows / np.sqrt((rows**2).mean(1, keepdims=True) + EPS) * factor
    matrices = [stored(rng, (N, K), format, group, dtype) for N in sizes]
    biases = [rounded(rng.standard_normal(N), other) for N in sizes] if bias else []
    inputs += [a for arrays, _ in matrices for a in arrays] + [b for b, _ in biases]
    expected = [rows @ w.T for _, w in matrices]
    expected = [y + b for y, (_, b) in zip(expected, biases, strict=True)] if bias else expected
    outputs = [np.full(y.shape, np.nan, np.float32) for y in expected]
    if epilogue == 1:                                      # in place
        outputs = [rng.standard_normal(expected[0].shape).astype(np.float32)]
        inputs.append(outputs[0])
        expected = [expected[0] + outputs[0]]
    elif epilogue:
        outputs, expected = outputs[:1], [GATES[epilogue](*expected)]
    ints = [len(sizes), format, group, int(norm), epilogue, int(bias), 0]
    return Vector(f"linear-{id}", "linear", outputs, inputs, ints, [EPS], expected, TOLERANCE)


def vectors() -> Iterator[Vector]:
    for i, (format, group, dtype) in enumerate(FORMATS):
        for T, sizes, groups in ((1, [13], 5), *[(2 + i // 2, [9], 3)] * (i % 2 and i < 14), (33, [70], 2)):
            K = columns(format, group, groups)
            yield make(f"{format}-{group}-{dtype}-{T}x{sizes[0]}x{K}", T, sizes, K, format, group, dtype)
    for format, group, dtype in ((0, 0, "bfloat16"), (4, 64, "bfloat16"), (FP4, 32, "uint8")):
        for T in (1, 9, 33):
            for epilogue, sizes in enumerate(([9, 1, 70], [17], [37, 37], [5, 5], [64, 64], [8, 8])):
                for norm, bias in ((False, False), (True, True)) if epilogue < 3 else ((True, False),):
                    id = f"epilogue{epilogue}{'-norm' * norm}{'-bias' * bias}-{format}-{T}x{sizes[0]}"
                    yield make(id, T, sizes, 128 if format else 50, format, group, dtype, norm=norm, bias=bias,
                               epilogue=epilogue)
    for T in (0, 8, 9, 15, 17, 64):
        yield make(f"tokens-{T}", T, [5], 20)
    for T in (1, 2, 40):
        yield make(f"strided-{T}", T, [65], 32, 4, 32, gap=5)
        yield make(f"weights-{T}", T, [3, 8, 1, 17, 9, 2], 32, bias=True)                  # more than one dispatch has
        yield make(f"types-{T}", T, [11, 11], 64, 8, 32, "float16", norm=True, bias=True, epilogue=2, other="bfloat16")
    for K in (1, 3, 4, 127, 513):
        yield make(f"inner-{K}", 1, [9], K)

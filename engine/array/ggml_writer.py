"""Numbers as ggml's quantized blocks, and MLX's codes as blocks where ggml has that layout.

Formulas: https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c (the reference quantizers)
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BLOCK = 32                           # elements
HALF = np.finfo(np.float16).max


def inverse(scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)[:, None]


def q8_0(x: np.ndarray) -> tuple[np.ndarray, ...]:
    scale = np.abs(x).max(1) / np.float32(127)
    y = x * inverse(scale)
    codes = np.trunc(y + np.copysign(np.float32(0.5), y))            # halves away from zero
    return (codes + 128).astype(np.uint8), scale


def q4_0(x: np.ndarray) -> tuple[np.ndarray, ...]:
    edge = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)[:, 0]
    scale = edge / np.float32(-8)
    codes = np.trunc((x.astype(np.float64) * inverse(scale) + 8.5).astype(np.float32))  # a fused multiply-add
    return codes.clip(0, 15).astype(np.uint8), scale


def q4_1(x: np.ndarray) -> tuple[np.ndarray, ...]:
    low = x.min(1)
    scale = (x.max(1) - low) / np.float32(15)
    codes = np.trunc((x - low[:, None]) * inverse(scale) + np.float32(0.5))
    return codes.clip(0, 15).astype(np.uint8), scale, low


class Layout(NamedTuple):
    """Blocks of 32: a float16 scale, a float16 minimum if there is one, then the codes. `zero` is the code of 0."""

    bits: int
    zero: int | None
    quantize: Callable[[np.ndarray], tuple[np.ndarray, ...]]

    @property
    def size(self) -> int:
        return 2 + 2 * (self.zero is None) + BLOCK * self.bits // 8


LAYOUTS = {"Q8_0": Layout(8, 128, q8_0), "Q4_0": Layout(4, 8, q4_0), "Q4_1": Layout(4, None, q4_1)}


def blocks(kind: str, codes: np.ndarray, *floats: np.ndarray) -> np.ndarray:
    """Codes (n, 32) u8, scales (n) and for Q4_1 minima (n) as the bytes of n blocks."""
    heads = [x.astype("<f2").view(np.uint8).reshape(-1, 2) for x in floats]
    if LAYOUTS[kind].bits == 8:
        return np.hstack([*heads, codes ^ np.uint8(128)])             # signed
    return np.hstack([*heads, codes[:, :16] | codes[:, 16:] << 4])


def encode(kind: str, values: np.ndarray) -> np.ndarray:
    """float32 values, whole blocks in order, as bytes (n, size)."""
    with np.errstate(over="ignore"):
        codes, *floats = LAYOUTS[kind].quantize(values.reshape(-1, BLOCK))
        return blocks(kind, codes, *floats)


def same_codes(bits: int, scales: np.ndarray, biases: np.ndarray) -> str | None:
    """The type whose blocks say exactly what codes with these scales and biases say, if there is one."""
    s, b = scales.astype(np.float32), biases.astype(np.float32)
    for kind, layout in LAYOUTS.items():
        floats = (s,) if layout.zero is not None else (s, b)
        half = all((np.abs(x) <= HALF).all() and (x.astype(np.float16) == x).all() for x in floats)
        if layout.bits == bits and half and (layout.zero is None or (b == -layout.zero * s).all()):
            return kind
    return None


def keep(kind: str, words: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """MLX's packed codes (…, words), scales and biases (…, groups of 32 or more) as the bytes of blocks."""
    bits, raw = LAYOUTS[kind].bits, words.reshape(-1).view(np.uint8)
    codes = raw if bits == 8 else np.stack([raw & 15, raw >> 4], 1)
    codes = codes.reshape(-1, BLOCK)
    times = len(codes) // scales.size                                  # blocks in a group
    floats = [np.repeat(x.reshape(-1), times) for x in (scales, biases)][: 1 + (LAYOUTS[kind].zero is None)]
    return blocks(kind, codes, *floats)

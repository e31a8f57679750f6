"""ggml's quantized blocks as codes, scales and biases: w = scale·q + bias. Codes are the file's, shifted to start at 0;
those of MXFP4 are floats e2m1 and have no biases.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
CHUNK = 4096
Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # codes (n, elements) u8 or packed; scales, biases (n, groups)
NL4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16)


def fields(packed: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Every byte holds 8 / bits fields, lowest first; a run of bytes gives all its first ones, then its second."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    split = packed.reshape(len(packed), -1, 1, run) >> shifts & np.uint8((1 << bits) - 1)
    return split.reshape(len(packed), -1)


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)[:, None]


def centred(codes: np.ndarray, scales: np.ndarray, zero: int) -> Parts:
    """Codes whose zero is `zero`. Float16 scales stay so where the biases, zero times a power of two, fit as well."""
    biases = scales.astype(np.float32) * -zero
    fits = scales.dtype == np.float16 and np.abs(biases).max(initial=0) <= np.finfo(np.float16).max
    return (codes, scales, biases.astype(np.float16)) if fits else (codes, scales.astype(np.float32), biases)


def unshuffle(blocks: np.ndarray) -> np.ndarray:
    """16 bytes of nibbles, byte j = elements j and j + 16, to 4 words of 8 elements in order. [n] V16 -> [4n] u32"""
    x = blocks.copy().view(np.uint64)
    for shift, mask in ((4, 0x00F000F000F000F0), (8, 0x0000FF000000FF00), (16, 0x00000000FFFF0000)):
        t = x >> np.uint64(shift)  # swap neighbours of 4, 8 and 16 bits: even nibbles sink to the low half
        t ^= x
        t &= np.uint64(mask)
        x ^= t
        t <<= np.uint64(shift)
        x ^= t
    return x.view(np.uint32).reshape(-1, 2, 2).swapaxes(1, 2).reshape(-1)


def q4_0(b: np.ndarray) -> Parts:
    return centred(unshuffle(b["q"]), b["d"][:, None], 8)


def q4_1(b: np.ndarray) -> Parts:
    return unshuffle(b["q"]), b["d"][:, None], b["m"][:, None]


def fifth(b: np.ndarray) -> np.ndarray:
    return fields(b["q"], 4, 16) | np.unpackbits(b["h"], axis=1, bitorder="little") << 4


def q5_0(b: np.ndarray) -> Parts:
    return centred(fifth(b), b["d"][:, None], 16)


def q5_1(b: np.ndarray) -> Parts:
    return fifth(b), b["d"][:, None], b["m"][:, None]


def q8_0(b: np.ndarray) -> Parts:
    return centred(b["q"] ^ np.uint8(128), b["d"][:, None], 128)


def q2_k(b: np.ndarray) -> Parts:
    return fields(b["q"], 2, 32), wide(b["d"]) * (b["s"] & 15), wide(b["m"]) * -(b["s"] >> 4).astype(np.float32)


def q3_k(b: np.ndarray) -> Parts:
    low, high = fields(b["s"][:, :8], 4, 8), fields(b["s"][:, 8:], 2, 4)
    scales = wide(b["d"]) * ((low | high << 4).astype(np.float32) - 32)
    return centred(fields(b["q"], 2, 32) | fields(b["h"], 1, 32) << 2, scales, 4)


def sixes(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8 scales and 8 minima of 6 bits from 12 bytes: those of the first four groups lie whole in the first 8 bytes."""
    d, m, rest = s[:, :4], s[:, 4:8], s[:, 8:]
    return (np.hstack([d & 63, rest & 15 | d >> 2 & 48]).astype(np.float32),
            np.hstack([m & 63, rest >> 4 | m >> 2 & 48]).astype(np.float32))


def q4_k(b: np.ndarray) -> Parts:
    scales, minima = sixes(b["s"])
    return fields(b["q"], 4, 32), wide(b["d"]) * scales, -wide(b["m"]) * minima


def q5_k(b: np.ndarray) -> Parts:
    codes, scales, biases = q4_k(b)
    return codes | fields(b["h"], 1, 32) << 4, scales, biases


def q6_k(b: np.ndarray) -> Parts:
    scales = wide(b["d"]) * b["s"].view(np.int8).astype(np.float32)
    return centred(fields(b["q"], 4, 64) | fields(b["h"], 2, 32) << 4, scales, 32)


def iq4_nl(b: np.ndarray) -> Parts:
    """A table of 16 numbers, as codes of 8 bits."""
    return centred((NL4 + 128).astype(np.uint8)[fields(b["q"], 4, 16)], b["d"][:, None], 128)


def mxfp4(b: np.ndarray) -> Parts:
    """Floats e2m1, and a power of two as e8m0."""
    return fields(b["q"], 4, 16), b["d"][:, None], None


class Block(NamedTuple):
    """`layout` are a block's fields in bytes; its elements have codes of `bits` in groups of `group`."""

    layout: list[tuple[Any, ...]]
    bits: int
    group: int
    unpack: Callable[[np.ndarray], Parts]
    mode: str = "affine"


D, M, HALF, V16 = ("d", "<f2"), ("m", "<f2"), ("q", "u1", 16), ("q", "V16")
BLOCKS = {
    "Q4_0": Block([D, V16], 4, 32, q4_0),
    "Q4_1": Block([D, M, V16], 4, 32, q4_1),
    "Q5_0": Block([D, ("h", "u1", 4), HALF], 5, 32, q5_0),
    "Q5_1": Block([D, M, ("h", "u1", 4), HALF], 5, 32, q5_1),
    "Q8_0": Block([D, ("q", "u1", 32)], 8, 32, q8_0),
    "Q2_K": Block([("s", "u1", 16), ("q", "u1", 64), D, M], 2, 16, q2_k),
    "Q3_K": Block([("h", "u1", 32), ("q", "u1", 64), ("s", "u1", 12), D], 3, 16, q3_k),
    "Q4_K": Block([D, M, ("s", "u1", 12), ("q", "u1", 128)], 4, 32, q4_k),
    "Q5_K": Block([D, M, ("s", "u1", 12), ("h", "u1", 32), ("q", "u1", 128)], 5, 32, q5_k),
    "Q6_K": Block([("q", "u1", 128), ("h", "u1", 64), ("s", "u1", 16), D], 6, 16, q6_k),
    "IQ4_NL": Block([D, HALF], 8, 32, iq4_nl),
    "MXFP4": Block([("d", "u1"), HALF], 4, 32, mxfp4, "mxfp4"),
}


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes, a multiple of 32, as a little-endian stream of `bits` each in uint32 words."""
    if bits == 8 or codes.dtype == np.uint32:  # packed already
        return codes.reshape(-1).view(np.uint32)
    eights = codes.reshape(-1, 8)
    if bits == 4:
        return (eights[:, ::2] | eights[:, 1::2] << 4).reshape(-1).view(np.uint32)
    stream = np.zeros(len(eights), np.uint64)
    for i in range(8):
        stream |= eights[:, i].astype(np.uint64) << np.uint64(bits * i)
    return stream.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1).view(np.uint32)


def _chunks(block: Block, raw: np.ndarray) -> Iterator[Parts]:
    """Few blocks at a time, so that they stay in the cache."""
    blocks = raw.view(block.layout).reshape(-1)
    return (block.unpack(blocks[start : start + CHUNK]) for start in range(0, len(blocks), CHUNK))


def read(kind: str, raw: np.ndarray) -> list[np.ndarray]:
    """Codes as packed words, scales and, if there are, biases of blocks (bytes), all flat."""
    block = BLOCKS[kind]
    parts = [[pack(codes, block.bits), *(side.reshape(-1) for side in sides if side is not None)]
             for codes, *sides in _chunks(block, raw)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def expand(kind: str, raw: np.ndarray) -> np.ndarray:
    """The numbers of blocks (bytes) as float16, flat."""
    with np.errstate(over="ignore"):
        return np.concatenate([_numbers(*part).astype(np.float16).reshape(-1) for part in _chunks(BLOCKS[kind], raw)])


def _numbers(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray | None) -> np.ndarray:
    codes = codes.reshape(*scales.shape, -1)
    if biases is None:
        return np.ldexp(E2M1[codes], scales.astype(np.int32)[..., None] - 127)
    return scales.astype(np.float32)[..., None] * codes + biases.astype(np.float32)[..., None]

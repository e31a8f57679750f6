"""random: Threefry of odd and even numbers of words, in bytes, halves and words; the values are those that the paper's
authors published for it (Random123, kat_vectors), where there are some."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from . import Vector

PUBLISHED = [((0, 0), (0x6B200159, 0x99BA4EFE))]           # key, words of counter (0, 0)


def vectors() -> Iterator[Vector]:
    for key, words in PUBLISHED:                           # one word alone: its counter is (0, 0)
        yield _vector(np.array([key], np.uint32), np.array([words[:1]], np.uint32), "-published")
    keys = np.random.default_rng(12).integers(0, 2**32, (3, 2)).astype(np.uint32)
    for items in (1, 2, 7, 8, 33, 600):
        for dtype in (np.uint8, np.uint16, np.uint32):
            yield _vector(keys, np.stack([threefry(key, items, dtype) for key in keys]))
    yield _vector(keys[:0], np.zeros((0, 5), np.uint32))


def _vector(keys: np.ndarray, wanted: np.ndarray, note: str = "") -> Vector:
    return Vector(f"random-{len(keys)}x{wanted.shape[1]}-{wanted.dtype}{note}", "random", [np.zeros_like(wanted)],
                  [keys], [], [], [wanted], 0)


def threefry(key: np.ndarray, items: int, dtype: np.dtype | type) -> np.ndarray:
    """So many items of Threefry-2x32's words for one key (2) uint32. Salmon et al. 2011."""
    words = -(-items * np.dtype(dtype).itemsize // 4)
    first = np.arange(words - words // 2, dtype=np.uint32)
    second = np.where(first < words // 2, first + np.uint32(len(first)), 0).astype(np.uint32)
    keys = [*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
    first, second = first + keys[0], second + keys[1]
    for i in range(5):
        for r in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            first = first + second
            second = (second << r | second >> (32 - r)) ^ first
        first, second = first + keys[(i + 1) % 3], second + keys[(i + 2) % 3] + np.uint32(i + 1)
    return np.concatenate([first, second[:words // 2]]).view(dtype)[:items]

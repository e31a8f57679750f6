"""Cases of grouped.py, against NumPy, and SciPy's Hadamard matrices."""
from __future__ import annotations

import numpy as np
import scipy.linalg
from cases import Case, Input

from lazulite.engine import array as mx

RNG = np.random.default_rng(0)
LEFT, RIGHT = Input((4, 2), "int", 0, 6), Input((2,), "int", 0, 3)
SEGMENTS = np.array([[0, 2], [2, 5], [4, 4]])
MASKS = [RNG.integers(0, 2, shape) for shape in ((2, 2), (2, 3), (3, 2))]
PACKED = mx.quantize(mx.array(RNG.standard_normal((3, 5, 64)), mx.float32), 32, 4)
UNPACKED = np.asarray(mx.dequantize(*PACKED, 32, 4), float)


def gathered(a, b, left, right):
    a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    left, right = np.broadcast_arrays(left, right)
    return a[left] @ b[right]


def blocks(a, mask):
    return a * np.kron(mask, np.ones((32, 32)))[:len(a), :a.shape[1]]


def masked(a, b):
    out, left, right = MASKS
    return blocks(blocks(a, left) @ blocks(b, right), out)


def transformed(size: int) -> Case:
    return Case(f"hadamard_transform of {size}", mx.hadamard_transform,
                lambda x: x @ scipy.linalg.hadamard(size).T / size**0.5, ((3, size),), empty=False)


CASES = [
    Case("gather_mm", mx.gather_mm, gathered, ((2, 3, 2, 5), (3, 5, 4), LEFT, RIGHT), empty=False),
    Case("gather_mm of all", lambda a, b: mx.gather_mm(a, b), lambda a, b: a @ b, ((3, 2, 5), (3, 5, 4)), empty=False),
    Case("gather_qmm", lambda x, i, j: mx.gather_qmm(x, *PACKED, i, j, group_size=32),
         lambda x, i, j: gathered(x, UNPACKED.swapaxes(1, 2), i, j), ((6, 2, 64), LEFT, RIGHT), empty=False),
    Case("gather_qmm, not transposed", lambda x, j: mx.gather_qmm(x, *PACKED, None, j, False, 32),
         lambda x, j: gathered(x, UNPACKED, np.arange(2), j), ((2, 3, 5), RIGHT), empty=False),
    Case("segmented_mm", lambda a, b: mx.segmented_mm(a, b, mx.array(SEGMENTS)),
         lambda a, b: np.stack([a[:, i:j] @ b[i:j] for i, j in SEGMENTS]), ((3, 5), (5, 4)), empty=False),
    Case("block_masked_mm", lambda a, b: mx.block_masked_mm(a, b, 32, *(mx.array(m > 0) for m in MASKS)), masked,
         ((40, 70), (70, 33)), empty=False),
    Case("block_masked_mm by factors", lambda a, b: mx.block_masked_mm(a, b, 32, *map(mx.array, MASKS)), masked,
         ((40, 70), (70, 33)), empty=False),
    *(transformed(size) for size in (1, 2, 8, 32)),
]

"""Cases of sorting.py, against NumPy."""
from __future__ import annotations

import numpy as np
from cases import Case, Input

from lazulite.engine import array as mx

X = Input((3, 7, 2), "distinct")
TIES = Input((4, 9), "int", 0, 4)


def along(name: str, axis, given: Input = X, **options) -> Case:
    return Case(f"{name} over {axis} of {given.kind}", lambda x: getattr(mx, name)(x, axis),
                lambda x: getattr(np, name)(x, axis, **options), (given,))


def unique(x):
    """Six of the values, and what tells them apart."""
    values, first, inverse, counts = np.unique(x, return_index=True, return_inverse=True, return_counts=True)
    pad = 6 - len(values)
    return (np.append(values, [values[0]] * pad), np.append(first, [first[0]] * pad),
            inverse.reshape(x.shape), np.append(counts, [0] * pad))


CASES = [
    *(along("sort", axis) for axis in (-1, 1, 0, None)), along("sort", 1, TIES),
    *(along("argsort", axis, kind="stable") for axis in (-1, 1, None)), along("argsort", 1, TIES, kind="stable"),
    Case("partition", lambda x: mx.partition(x, 3, 1)[:, 3], lambda x: np.sort(x, 1)[:, 3], (X,)),
    Case("argpartition", lambda x: mx.take_along_axis(x, mx.argpartition(x, -2, 1), 1)[:, -2],
         lambda x: np.sort(x, 1)[:, -2], (X,)),
    Case("topk", lambda x: mx.sort(mx.topk(x, 3, 1), 1), lambda x: np.sort(x, 1)[:, -3:], (X,), empty=False),
    Case("topk of all", lambda x: mx.sort(mx.topk(x, 5, None)), lambda x: np.sort(x, None)[-5:], (X,), empty=False),
    *(Case(f"median over {axis}", lambda x, axis=axis: mx.median(x, axis), lambda x, axis=axis: np.median(x, axis),
           (X,), empty=False) for axis in (1, 0, (0, 2), None)),
    Case("median of integers", lambda x: mx.median(x, 0, keepdims=True), lambda x: np.median(x, 0, keepdims=True),
         (TIES,), empty=False),
    Case("minmax", lambda x: mx.minmax(x, 1), lambda x: (x.min(1), x.max(1)), (X,)),
    *(Case(f"searchsorted {side}", lambda t, v, side=side: mx.searchsorted(mx.sort(t), v, side),
           lambda t, v, side=side: np.searchsorted(np.sort(t), v, side),
           (Input((9,), "int"), Input((4, 3), "int", -1, 9)))
      for side in ("left", "right")),
    Case("unique", lambda x: mx.unique(x, 6, True, True, True), unique, (TIES,), vmap=False, empty=False),
    Case("unique, truncated", lambda x: mx.unique(x, 2), lambda x: np.unique(x)[:2], (TIES,), vmap=False, empty=False),
]

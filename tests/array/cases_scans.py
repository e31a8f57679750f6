"""Cases of scans.py, against NumPy's accumulate."""
from __future__ import annotations

import numpy as np
from cases import Case, Input

from lazulite.engine import array as mx

SCANS = {"cumsum": (np.add, 0.0, "normal"), "cumprod": (np.multiply, 1.0, "positive"),
         "cummax": (np.maximum, -np.inf, "distinct"), "cummin": (np.minimum, np.inf, "distinct"),
         "logcumsumexp": (np.logaddexp, -np.inf, "normal")}


def scan(name: str, axis, shape, reverse: bool = False, inclusive: bool = True) -> Case:
    ufunc, none, kind = SCANS[name]

    def reference(x):
        x, along = (x.reshape(-1), 0) if axis is None else (x, axis)
        x = np.flip(x, along) if reverse else x
        y = ufunc.accumulate(x, along)
        if not inclusive:
            edge = np.full_like(np.take(y, [0], along), none)
            y = np.concatenate([edge, np.delete(y, -1, along)], along)
        return np.flip(y, along) if reverse else y

    return Case(f"{name} over {axis} of {shape}{' reversed' * reverse}{' exclusive' * (not inclusive)}",
                lambda x: getattr(mx, name)(x, axis, reverse=reverse, inclusive=inclusive), reference,
                (Input(shape, kind),), tolerance=2e-5, empty=inclusive,
                grad=inclusive or np.isfinite(none))


CASES = [scan(name, axis, shape, reverse, inclusive) for name in SCANS
         for axis, shape, reverse, inclusive in [(1, (2, 5, 3), False, True), (-1, (2, 6), True, True),
                                                 (0, (6, 3), False, False), (1, (3, 6), True, False)]]
CASES += [scan("cumsum", None, (2, 3)), scan("cumsum", 0, (3000,), True), scan("cummax", 1, (2, 2500)),
          Case("cumsum of integers", lambda x: mx.cumsum(x, 1), lambda x: np.cumsum(x, 1), (Input((3, 5), "int"),)),
          Case("cumsum of bool", lambda x: mx.cumsum(x, 0), lambda x: np.cumsum(x, 0), (Input((3, 5), "bool"),)),
          Case("cumsum as float32", lambda x: mx.cumsum(x, 0, dtype=mx.float32), lambda x: np.cumsum(x, 0, dtype=float),
               (Input((3, 5), "int"),))]

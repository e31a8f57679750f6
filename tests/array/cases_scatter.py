"""Cases of scatter.py: writes at indices, against NumPy's ufunc.at and assignments."""
from __future__ import annotations

import numpy as np
from cases import Case, Input

from lazulite.engine import array as mx

X, ROWS, PAIR = (5, 4), Input((3,), "int", -5, 5), Input((2, 3), "int", 0, 4)
UFUNCS = {"add": np.add, "subtract": np.subtract, "multiply": np.multiply, "divide": np.divide, "maximum": np.maximum,
          "minimum": np.minimum}


def at(op: str, index, *inputs, name: str = "", **options) -> Case:
    """index: of what follows x and the updates, to the index; the same for both."""
    def ours(x, updates, *indices):
        return getattr(x.at[index(*indices)], op)(updates)

    def reference(x, updates, *indices):
        x = x.copy()
        UFUNCS[op].at(x, index(*indices), updates)
        return x

    return Case(f"at {name or 'rows'} {op}", ours, reference, inputs, **options)


def assigned(name: str, index, *inputs) -> Case:
    def ours(x, updates, *indices):
        x = mx.Array.of(x._value)
        x[index(*indices)] = updates
        return x

    def reference(x, updates, *indices):
        x = x.copy()
        x[index(*indices)] = updates
        return x

    return Case(f"assign {name}", ours, reference, inputs)


def put_along(x, indices, values, axis):
    x = x.copy()
    np.put_along_axis(x, indices.astype(int), values, axis)
    return x


def sliced(x, update, start):
    x = x.copy()
    x[start[0]:start[0] + 2, :, start[1]:start[1] + 3] = update
    return x


CASES = [
    *(at(op, lambda i: i, X, Input((3, 4), "positive"), ROWS, tolerance=2e-5) for op in ("add", "subtract", "multiply",
                                                                                     "divide")),
    *(at(op, lambda i: i, Input(X, "distinct"), (3, 4), ROWS) for op in ("maximum", "minimum")),
    at("add", lambda i: (slice(None), i), X, (5, 2, 3), PAIR, name="columns"),
    at("add", lambda i, j: (i, j), X, (3,), ROWS, Input((3,), "int", 0, 4), name="pairs"),
    at("add", lambda i, j: (i, slice(1, 3), j), (5, 4, 6), (3, 2), ROWS, Input((3,), "int", 0, 6), name="apart"),
    at("multiply", lambda: (slice(0, 4, 2), None, 1), X, (2, 1), name="slice"),
    at("add", lambda i: i, Input(X, "int"), Input((3, 4), "int"), ROWS, name="integer rows"),
    assigned("rows", lambda i: i, X, (3, 4), ROWS),
    assigned("columns of a window", lambda i: (slice(1, None), i), (5, 8), (4, 2, 3), PAIR),
    assigned("one number", lambda i: (i, i), (4, 4), (), Input((3,), "int", 0, 4)),
    Case("take_along_axis", lambda x, i: mx.take_along_axis(x, i, 1),
         lambda x, i: np.take_along_axis(x, i, 1), (X, Input((5, 7), "int", -4, 4))),
    Case("take_along_axis of one column", lambda x, i: mx.take_along_axis(x, i, 0),
         lambda x, i: np.take_along_axis(x, i, 0), ((5, 4, 2), Input((3, 1, 2), "int", 0, 5))),
    Case("take_along_axis of all", lambda x, i: mx.take_along_axis(x, i),
         lambda x, i: np.take_along_axis(x, i, None), (X, Input((6,), "int", 0, 20))),
    Case("put_along_axis", lambda x, i, v: mx.put_along_axis(x, i, v, 1),
         lambda x, i, v: put_along(x, i, v, 1), (X, Input((5, 3), "int", 0, 4), (5, 1))),
    Case("a slice from an array", lambda x, s: mx.slice(x, s, (0, 2), (2, 3, 3)),
         lambda x, s: x[s[0]:s[0] + 2, :, s[1]:s[1] + 3], ((5, 3, 6), Input((2,), "int", 0, 3)), empty=False),
    Case("slice_update from an array", lambda x, u, s: mx.slice_update(x, u, s, (0, 2)), sliced,
         ((5, 3, 6), (2, 3, 3), Input((2,), "int", 0, 3)), empty=False),
]

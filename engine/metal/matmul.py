"""Products of dense matrices."""
from __future__ import annotations

from math import prod

from .elementwise import code, is_wide, merged, padded
from .steps import Dispatch, Step, Unsupported, View, ceil, struct

TILE, FEW = 64, 4                      # FEW: rows or columns that are done one by one


def matmul(step: Step) -> list[Dispatch]:
    (a, b), [o] = step.inputs, step.outputs
    if min(o.shape[-2:]) > FEW:
        return [_dispatch("matmul", a, b, o)]
    if o.shape[-1] > o.shape[-2]:                          # oᵀ = bᵀ aᵀ: few rows are few columns
        a, b, o = _turned(b), _turned(a), _turned(o)
    return [_dispatch("matvec", _spread(a, o.shape[-1]), _columns(b), _columns(o))]


def _columns(v: View) -> View:
    """The columns of (..., M, N) as N matrices (..., N, M, 1)."""
    *batch, m, n = range(len(v.shape))
    return View(v.buffer, v.dtype, v.offset, (*(v.shape[i] for i in [*batch, n, m]), 1),
                (*(v.strides[i] for i in [*batch, n, m]), 0))


def _spread(v: View, n: int) -> View:
    """(..., M, K) as (..., n, M, K), the same n times."""
    return View(v.buffer, v.dtype, v.offset, (*v.shape[:-2], n, *v.shape[-2:]), (*v.strides[:-2], 0, *v.strides[-2:]))


def _turned(v: View) -> View:
    return View(v.buffer, v.dtype, v.offset, (*v.shape[:-2], v.shape[-1], v.shape[-2]),
                (*v.strides[:-2], v.strides[-1], v.strides[-2]))


def _dispatch(function: str, a: View, b: View, o: View) -> Dispatch:
    m, k, n = *a.shape[-2:], o.shape[-1]
    shape, strides = merged([View(v.buffer, v.dtype, v.offset, v.shape[:-2], v.strides[:-2]) for v in (a, b, o)])
    if max(abs(s) for v in (a, b, o) for s in v.strides[-2:]) >= 2**24:
        raise Unsupported("rows too far apart")
    vector = function == "matvec"
    sizes = (1, m, k) if vector else (m, n, k)
    p = struct(*sizes, *(s for v in (a, b, o) for s in v.strides[-2:]), *padded(shape, *strides))
    beside = abs(a.strides[-2]) < abs(a.strides[-1])
    constants = {"A": code(a), "B": code(b), "O": code(o), "A_TURNED": beside,
                 "B_TURNED": abs(b.strides[-2]) < abs(b.strides[-1]), "BATCH": len(shape), "WIDE": is_wide((a, b, o)),
                 "BESIDE": beside}
    groups = (ceil(m, 32 if beside else 8), 1) if vector else (ceil(n, TILE), ceil(m, TILE))
    return Dispatch("matmul", function, {"a": a, "b": b, "o": o, "p": p}, (*groups, prod(shape)),
                    (256 if vector else 128, 1, 1), constants=constants)

"""Gathers of rows or items: a thread for each item."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .elementwise import code
from .steps import FAULT, SIZES, Dispatch, Step, Unsupported, View, ceil, struct

THREADS = 256


def take(step: Step) -> list[Dispatch]:
    """Of whole rows, or, where the indices have the result's shape, of single items."""
    x, indices, out = (axes(v) for v in (*step.inputs, *step.outputs))
    p = params(out, x.shape[1], out, x, indices)
    return [_dispatch("take", out, {"o": out, "x": x, "indices": indices, "p": p},
                      {"SIZE": SIZES[x.dtype], "INDEX": code(indices)})]


take_along = take


def quantized_take(step: Step) -> list[Dispatch]:
    format, group = step.ints
    w, scales, *biases, _ = step.inputs
    if not all(v.contiguous for v in (w, scales, *biases)):
        raise Unsupported("codes with gaps")
    out, indices = axes(step.outputs[0]), axes(step.inputs[-1])
    p = params(out, w.shape[0], out, axes(w), indices)
    return [_dispatch("quantized_take", out,
                      {"o": out, "w": w, "scales": scales, "biases": (*biases, scales)[0], "indices": indices, "p": p},
                      {"INDEX": code(indices), "SCALE": code(scales), "CODES": format, "SHARED": group})]


def _dispatch(name: str, result: View, arguments: Mapping[str, Any], constants: Mapping[str, int]) -> Dispatch:
    """A thread for each item of the result: neighbours along its columns, short rows together."""
    lead, count, columns = result.shape
    across = 1
    while across < min(columns, THREADS):
        across *= 2
    return Dispatch("gather", name, {**arguments, "fault": FAULT},
                    (ceil(columns, across), ceil(count, THREADS // across), lead), (across, THREADS // across, 1),
                    constants=constants)


def params(result: View, rows: int, *views: View) -> bytes:
    return struct(result.shape[2], result.shape[1], rows, *(s for v in views for s in v.strides))


def axes(v: View) -> View:
    """(A, I, C) of (A, I, C), (I, C) or, of indices for whole rows, (I)."""
    after = len(v.shape) == 1
    lead = 3 - len(v.shape) - after
    shape, strides = (*[1] * lead, *v.shape, *[1] * after), (*[0] * lead, *v.strides, *[0] * after)
    return View(v.buffer, v.dtype, v.offset, shape, strides)

"""Matrices to codes and back."""
from __future__ import annotations

from typing import Any

from .elementwise import code
from .steps import Dispatch, Scratch, Step, Unsupported, View, ceil, struct

THREADS = 256


def quantize(step: Step) -> list[Dispatch]:
    [x], [w, scales, biases] = step.inputs, step.outputs
    sides = Scratch(8 * scales.size)
    constants, p = _constants(step, x, scales), struct(*x.shape)
    first: dict[str, Any] = {"x": x, "scales": scales, "biases": biases, "sides": sides, "p": p}
    second: dict[str, Any] = {"x": x, "w": w, "sides": sides, "p": p}
    return [Dispatch("quantize", "quantize_sides", first, (ceil(scales.size, THREADS // 32), 1, 1), (THREADS, 1, 1),
                     constants=constants),
            Dispatch("quantize", "quantize", second, (ceil(w.shape[1], THREADS), x.shape[0], 1), (THREADS, 1, 1),
                     constants=constants)]


def dequantize(step: Step) -> list[Dispatch]:
    [out], (w, scales, *biases) = step.outputs, step.inputs
    matrix: dict[str, Any] = {"w": w, "scales": scales, "biases": (*biases, scales)[0]}
    return [Dispatch("quantize", "dequantize", matrix | {"o": out, "p": struct(*out.shape)},
                     (ceil(out.shape[1], THREADS), out.shape[0], 1), (THREADS, 1, 1),
                     constants=_constants(step, out, scales))]


def _constants(step: Step, x: View, scales: View) -> dict[str, int]:
    if not all(v.contiguous for v in (*step.inputs, *step.outputs)):
        raise Unsupported("matrices with gaps")
    return {"X": code(x), "SIDE": code(scales), "CODES": step.ints[0], "SHARED": step.ints[1]}

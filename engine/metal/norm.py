"""Softmax and the norms: a threadgroup for each row."""
from __future__ import annotations

from .elementwise import code
from .steps import Dispatch, Step, ceil, struct


def softmax(step: Step) -> list[Dispatch]:
    x, [y] = step.inputs[0], step.outputs
    rows, columns = x.shape
    names = dict(zip(("x", "y", "w", "b"), (x, y, *step.inputs[1:]), strict=False))
    steps = [v.strides[0] for v in step.inputs[1:]]
    p = struct(columns, *x.strides, *y.strides, *steps, *[0] * (2 - len(steps)), *map(float, step.floats or [0.0]))
    threads = min(1024, 32 * ceil(columns, 128))           # 4 columns each, while the threadgroup can grow
    return [Dispatch("norm", step.kernel, names | {"p": p}, (rows, 1, 1), (threads, 1, 1),
                     constants={name.upper(): code(view) for name, view in names.items()})]


rms_norm = layer_norm = softmax

"""What recurrent layers do to the sequences of a step: short_conv and gated_delta."""
from __future__ import annotations

from .rope import check_rows
from .steps import Dispatch, Operand, Step, Unsupported, ceil, struct

ROWS = 32                                     # tokens of a threadgroup that clears the rows of nobody
LARGEST = 256                                 # head size: a lane has a quarter of it in registers
SEQUENCES = ("slots", "starts", "counts", "lengths")


def short_conv(step: Step) -> list[Dispatch]:
    (y, states), (x, weight, _, *sequences) = step.outputs, step.inputs
    check_rows(x, y, weight, states)
    tokens, channels = x.shape
    params = struct(tokens, sequences[0].size, states.shape[0], x.strides[0], 0, 0, 0, 0, 0, 0.0, 0.0)
    arguments: dict[str, Operand] = dict(x=x, weight=weight, y=y, states=states, p=params)
    return [Dispatch("delta", "short_conv", arguments | dict(zip(SEQUENCES, sequences, strict=True)),
                     (ceil(channels, 256), sequences[0].size + ceil(tokens, ROWS), 1), (256, 1, 1),
                     dict(TAPS=weight.shape[1], D=1), dict(C=channels))]


def gated_delta(step: Step) -> list[Dispatch]:
    (o, states), (q, k, v, decay, rate, _, *sequences) = step.outputs, step.inputs
    check_rows(q, k, v, o, states, decay, rate)
    (tokens, heads, columns), (_, key_heads, size) = v.shape, k.shape
    if size > LARGEST:
        raise Unsupported(f"a head of {size} numbers")
    strides = [view.strides[axis] for axis in (0, 1) for view in (q, k, v)]
    params = struct(tokens, sequences[0].size, states.shape[0], *strides, *map(float, step.floats))
    arguments: dict[str, Operand] = dict(q=q, k=k, v=v, decay=decay, rate=rate, o=o, states=states, p=params)
    return [Dispatch("delta", "gated_delta", arguments | dict(zip(SEQUENCES, sequences, strict=True)),
                     (ceil(columns, 32), heads, sequences[0].size + ceil(tokens, ROWS)), (128, 1, 1),
                     dict(TAPS=1, D=size), dict(H=heads, K=key_heads, E=columns))]

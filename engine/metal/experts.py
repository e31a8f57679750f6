"""experts: tokens through the gated experts that they chose."""
from __future__ import annotations

from functools import partial

from .linear import Arguments, check_matrices, named, parts_of, product
from .steps import FAULT, Dispatch, Scratch, Step, Unsupported, ceil, struct

MOST_CHOICES, MOST_EXPERTS = 16, 1024      # simdgroups, or threads, of a threadgroup
TILE = 32                            # pairs of token and expert in a threadgroup
MANY = 4                             # pairs an expert from where on they are sorted, so that they share its matrices


def experts(step: Step) -> list[Dispatch]:
    format, group, epilogue, has_bias = step.ints
    x, chosen, share, *weights = step.inputs
    y, per = step.outputs[0], parts_of(format)
    gate, up, down = (weights[j * per:(j + 1) * per] for j in range(3))
    gate_bias, up_bias, down_bias = weights[3 * per:] if has_bias else (None, None, None)
    if not y.size:
        return []
    check_matrices([gate, up, down], [gate_bias, up_bias, down_bias])
    if not all(v.contiguous for v in (x, chosen, share, y)):
        raise Unsupported("strided activations")
    (T, C), choices, (count, inner) = x.shape, chosen.shape[1], gate[0].shape[:2]
    if choices > MOST_CHOICES or count > MOST_EXPERTS:
        raise Unsupported(f"{choices} of {count} experts, at most {MOST_CHOICES} of {MOST_EXPERTS} wanted")
    pairs = T * choices
    hidden, rising, falling = Scratch(4 * pairs * inner), (C, inner, inner), (inner, C)
    make = partial(product, stored=(format, group), matrix=gate, bias=gate_bias, CHOICES=choices, MATRICES=count)
    choice: Arguments = {"chosen": chosen, "fault": FAULT}
    rise: Arguments = {"x": x, **choice, **named("w0 s0 b0", gate), **named("w1 s1 b1", up), "c0": gate_bias,
                       "c1": up_bias, "y": hidden, "p": struct(pairs, C, 0.0)}
    if pairs < MANY * count:
        fall = choice | named("w scales biases", down) | {"x": hidden, "share": share, "c": down_bias, "y": y}
        return [make("experts", rise, (ceil(inner, 4), pairs, 1), rising, tokens=1, epilogue=epilogue),
                make("experts_down", fall, (ceil(C, 4), T, 1), falling, tokens=1, threads=32 * choices)]
    tiles = pairs // TILE + min(count, pairs)    # the most there can be: each expert has one that is not full
    parts = Scratch(4 * pairs * C)
    table: Arguments = {"places": Scratch(4 * pairs), "tiles": Scratch(12 * tiles)}
    fall = table | named("w0 s0 b0", down) | {"x": hidden, "c0": down_bias, "y": parts, "p": struct(pairs, inner, 0.0)}
    return [make("experts_sort", choice | table | {"p": struct(pairs, tiles, 0.0)}, (1, 1, 1), rising, tokens=TILE,
                 threads=32 * ceil(count, 32)),
            make("experts", rise | table, (ceil(inner, 32), tiles, 1), rising, tokens=TILE, epilogue=epilogue),
            make("experts", fall, (ceil(C, 64), tiles, 1), falling, tokens=TILE, DOWN=True),
            make("experts_sum", {"x": parts, "share": share, "y": y}, (ceil(C, 64), T, 1), falling, tokens=TILE,
                 threads=64)]

"""Sampling: the step sample."""
from __future__ import annotations

from .steps import Dispatch, Operand, Scratch, Step, Unsupported, ceil, struct

LARGEST = 2**19                               # vocabulary: sums of its weights fit 64 bits
THREADS = 1024                                # of a row
PART = 4096                                   # logits of a threadgroup of the first look


def sample(step: Step) -> list[Dispatch]:
    tokens, logprobs, ids, values = step.outputs
    logits, params, ints, history, bias_ids, biases, masks = step.inputs
    rows, vocabulary = logits.shape
    if vocabulary > LARGEST or any(view.size and view.shape[-1] > 1 and view.strides[-1] != 1
                                   for view in (*step.inputs, *step.outputs)):
        raise Unsupported(f"logits {logits.shape} with strides {logits.strides}")
    if not rows:
        return []
    parts, count = Scratch(12 * rows * 32), min(32, ceil(vocabulary, PART))
    strided = logits, params, ints, history, bias_ids, biases, masks, ids, values
    p = struct(*(view.strides[0] for view in strided))
    constants = dict(V=vocabulary, PARTS=count)
    first: dict[str, Operand] = dict(logits=logits, parts=parts, p=p)
    arguments = first | dict(params=params, ints=ints, history=history, bias_ids=bias_ids, biases=biases, masks=masks,
                             room=Scratch(4 * rows * vocabulary), tokens=tokens, logprobs=logprobs, ids=ids,
                             values=values)
    return [Dispatch("sample", "look", first, (count, rows, 1), (256, 1, 1), constants=constants),
            Dispatch("sample", "sample", arguments, (rows, 1, 1), (THREADS, 1, 1), constants=constants)]

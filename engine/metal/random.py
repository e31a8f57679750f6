"""Random bits of keys."""
from __future__ import annotations

from .steps import SIZES, Dispatch, Step, ceil, struct

THREADS = 256


def random(step: Step) -> list[Dispatch]:
    [out], [keys] = step.outputs, step.inputs
    rows, items = out.shape
    size = SIZES[out.dtype]
    words = ceil(items * size, 4)
    return [Dispatch("random", "random", {"keys": keys, "o": out, "p": struct(items, words)},
                     (ceil(words - words // 2, THREADS), rows, 1), (THREADS, 1, 1), constants={"SIZE": size})]

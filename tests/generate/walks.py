"""Random answers under a constraint: what no model would say shows what a grammar allows."""

from functools import cache
from typing import Any

import numpy as np


def allowed(words: np.ndarray | None, size: int) -> np.ndarray:
    """The ids that a mask allows."""
    return np.arange(size) if words is None else np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


@cache
def closers(tokenizer: Any) -> list[int]:
    marks = [i for i in range(tokenizer.vocab_size) if tokenizer.spell(i) in (b'"', b"}", b"]")]
    return [*marks, *tokenizer.eos_token_ids]


def walk(constraint: Any, tokenizer: Any, seed: int, steps: int = 400) -> tuple[list[int], bool]:
    """Random tokens among those that are allowed, and whether the constraint was met in time. Ends, quotes and brackets
    are taken more often than others, or few texts would end."""
    rng, ids, closing = np.random.default_rng(seed), [], closers(tokenizer)
    while not constraint.finished and len(ids) < steps:
        ids_now = allowed(constraint.mask(), tokenizer.vocab_size)
        assert len(ids_now), "nothing is allowed"
        ends = np.intersect1d(ids_now, closing)
        token = int(rng.choice(ends if len(ends) and rng.random() < 0.3 else ids_now))
        constraint.advance(token)
        ids.append(token)
    return ids, constraint.finished

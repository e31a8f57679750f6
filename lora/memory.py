"""How much memory training takes, before it begins, and how to take less."""
from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..engine import array as mx
from ..engine.errors import UserError
from .data import IGNORED, Batch
from .trainer import Trainer

HEAD_ROWS = HEAD_SLICE = 2048          # that linear_cross_entropy holds at once, outside the arena


class Estimate(NamedTuple):
    """Bytes. `program`: the interpreter, libraries, rows and plans."""

    program: int
    weights: int
    state: int                         # moments and summed gradients
    step: int                          # what a step computes and keeps meanwhile

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 1e6:,.0f}" for name, value in zip(self._fields, self, strict=True))
        return f"{self.total / 1e9:.2f} GB (MB: {parts})"


def resident() -> int:
    """Bytes of this process that are in memory."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak()


def peak() -> int:
    """The most that `resident` has been."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def estimate(trainer: Trainer, tokens: int, rows: int, before: int) -> Estimate:
    """What training takes whose largest batch has `tokens` tokens of `rows` rows: the plan of its step is made, and
    says how much it needs. before: what was resident before the model was loaded."""
    lengths = np.full(rows, tokens // rows, np.int32)
    batch = Batch(np.zeros(tokens, np.int32), np.full(tokens, IGNORED, np.int32), lengths, ())
    state = mx.get_array_buffer_size(trainer.optimizer.state, list(trainer.sums.values()))
    weights = sum(array.nbytes for _, array in trainer.model.named_parameters())
    config = trainer.model.config
    head = 4 * min(tokens, HEAD_ROWS) * (min(HEAD_SLICE, config.vocab_size) + 2 * config.hidden_size)
    step = trainer.plan(batch).arena + head
    now = resident()                                       # with the weights, unless they are mapped and still unread
    return Estimate(now - weights if now - before > weights else now, weights, state, step)


class Choice(NamedTuple):
    checkpoint: int
    batch_size: int
    accumulate: int


def choices(batch_size: int, accumulate: int, blocks: int) -> list[Choice]:
    """Ways to do the same step, from the fastest to the smallest: to compute MLPs again costs little, whole blocks more
    than to divide the batch, as long as a batch keeps several rows."""
    parts = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    return [Choice(again, batch_size // n, accumulate * n)
            for kinds in ((0, blocks), (2 * blocks,)) for n in parts for again in kinds]


def fit(trainer: Trainer, limit: int, before: int, options: list[tuple[Choice, int]]) -> Choice:
    """The first of the choices, each with the tokens of its largest batch, that stays under the limit. UserError that
    names the smallest if none does."""
    least: Estimate | None = None
    for choice, tokens in options:
        trainer.model.checkpointed = choice.checkpoint
        found = estimate(trainer, tokens, choice.batch_size, before)
        if found.total <= limit:
            return choice
        least = min(least or found, found, key=lambda e: e.total)
    raise UserError(f"[lora] fit is {limit / 1e9:.2f} GB, the least that training takes is {least}",
                    "lower --max-seq-length or --rank, or take a model of fewer bits")

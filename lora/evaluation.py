"""How well a model predicts rows: the loss of the supervised tokens, perplexity, and the distance to another model."""
from __future__ import annotations

import math
from typing import Any, NamedTuple

from ..engine import array as mx
from ..engine import nn
from ..engine.errors import UserError
from .data import IGNORED, Batch, Row, filled, pack, rooms

TOKENS = 1024                          # of a batch; a longer row is a batch of its own


class Score(NamedTuple):
    loss: float                        # nats a token
    tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def arrays(batch: Batch) -> tuple[mx.Array, mx.Array, mx.Array]:
    return mx.array(batch.tokens), mx.array(batch.targets), mx.array(batch.lengths)


def summed(model: Any, tokens: mx.Array, targets: mx.Array, lengths: mx.Array) -> mx.Array:
    """The sum of the losses of the supervised tokens, in float32: tokens and targets (T), lengths (B)."""
    return mx.sum(model.loss(tokens, targets, nn.Context.packed(lengths, tokens.shape[0])))


def batches(rows: list[Row], tokens: int = TOKENS) -> list[Batch]:
    """Rows one after another, longest first, in few sizes."""
    groups = list(filled(sorted(rows, key=lambda row: -len(row.tokens)), tokens))
    sizes = rooms([sum(len(row.tokens) for row in group) for group in groups])
    return [pack(group, sizes, max(map(len, groups))) for group in groups]


def score(model: Any, rows: list[Row]) -> Score:
    """Loss and perplexity over the supervised tokens of all rows."""
    model.eval()
    run = mx.compile(lambda *batch: summed(model, *batch))
    total, count = 0.0, 0
    for batch in batches(rows):
        total += float(run(*arrays(batch)).item())
        count += batch.supervised
    if not count:
        raise UserError("[eval] no token to predict in the data", "every row needs two tokens at least")
    return Score(total / count, count, len(rows))


class Distance(NamedTuple):
    """Means over the supervised tokens, p the other model's distribution and q this one's."""

    kl: float                          # Σ p log(p / q), nats
    same: float                        # share of tokens where both have the same most likely one


def distance(model: Any, other: Any, rows: list[Row]) -> Distance:
    """How far a model is from another of the same vocabulary."""
    if model.config.vocab_size != other.config.vocab_size:
        raise UserError(f"[eval] the models have {model.config.vocab_size} and {other.config.vocab_size} tokens",
                        "--against needs a model with the same vocabulary")

    def compare(tokens: mx.Array, targets: mx.Array, lengths: mx.Array) -> tuple[mx.Array, mx.Array]:
        logits = [m(tokens, nn.Context.packed(lengths, tokens.shape[0])) for m in (other, model)]
        p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in logits)
        counted = targets != IGNORED
        kl = mx.sum(mx.where(counted, mx.sum(mx.exp(p) * (p - q), axis=-1), 0.0))
        return kl, mx.sum(counted & (mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)))

    run, kl, same, count = mx.compile(compare), 0.0, 0, 0
    for batch in batches(rows, TOKENS // 4):
        found = run(*arrays(batch))
        kl, same, count = kl + found[0].item(), same + found[1].item(), count + batch.supervised
    return Distance(kl / count, same / count)

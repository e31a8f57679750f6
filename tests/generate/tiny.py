"""A tiny random Llama in float32, and when two texts of it count as the same.

What a sequence says must not depend on who shares its steps. Float sums do, in their last bits: with pages in float32
its logits differ by up to 1e-6. So two texts are the same if, where they part, both tokens come of logits that differ
by no more than some times that.
"""

from typing import Any

import numpy as np

from lazulite.engine import array as mx
from lazulite.engine import nn
from lazulite.engine.generate import Sampling
from lazulite.models.config import Config
from lazulite.models.llama import Model

VOCABULARY, CONTEXT = 97, 256
POISON = VOCABULARY - 1  # in a poisoned model its embedding is not a number


def tiny(seed: int = 0, context: int = CONTEXT, poisoned: bool = False) -> Any:
    rng = np.random.default_rng(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": context}
    model = Model(Config.from_dict({"model_type": "llama", **sizes, **heads}))
    weights = {path: rng.standard_normal(w.shape) * 0.3 for path, w in model.named_parameters()}
    if poisoned:
        weights["model.embed_tokens.weight"][POISON] = np.nan
    model.load_weights((path, mx.array(w.astype(np.float32))) for path, w in weights.items())
    return model


def prompt(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(0, POISON, length).tolist()


def logits(model: Any, tokens: list[int]) -> np.ndarray:
    """After the last of the tokens, all of them in one step."""
    caches = nn.caches(model.cache_spec(), -(-len(tokens) // nn.PAGE), dtype=mx.float32)
    context = nn.Context.single(len(tokens), caches)
    return np.asarray(model(mx.array(tokens, dtype=mx.int32), context))[-1]


def near_tie(model: Any, tokens: list[int], length: int, sampling: Sampling, found: set[int]) -> bool:
    """Whether after `tokens`, `length` of them the prompt, all of `found` come of logits that differ by 2e-5 or so."""
    rows, size = 300, len(tokens)
    noise = np.random.default_rng(0).standard_normal((rows, VOCABULARY)) * 2e-5
    noisy = (logits(model, tokens) + noise).astype(np.float32)
    params = np.tile(np.array(sampling.params(), np.float32), (rows, 1))
    ints = np.tile(np.array(sampling.ints(length, size - length), np.int32), (rows, 1))
    biases = [[*sampling.logit_bias] or [0]], [[*sampling.logit_bias.values()] or [0]]
    others = [np.array([tokens], np.int32), np.array(biases[0], np.int32), np.array(biases[1], np.float32)]
    masks = np.zeros((rows, -(-VOCABULARY // 32)), np.uint32)
    drawn = mx.fast.sample(*map(mx.array, (noisy, params, ints, *others, masks)))[0]
    return found <= set(np.asarray(drawn).tolist())


def assert_same(model: Any, prompt: list[int], sampling: Sampling, one: list[int], other: list[int]) -> None:
    """Two answers to the prompt are the same, or part at a near tie."""
    parted = next((i for i, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) == 2), None)
    if parted is None:
        assert len(one) == len(other)
    else:
        pair = {one[parted], other[parted]}
        assert near_tie(model, prompt + one[:parted], len(prompt), sampling, pair), f"token {parted}: {one} {other}"


class Spells:
    """A constraint that allows one text only."""

    def __init__(self, tokens: list[int]):
        self.tokens, self.at = tokens, 0

    @property
    def finished(self) -> bool:
        return self.at == len(self.tokens)

    def _mask(self, at: int) -> np.ndarray:
        bits = np.zeros(-(-VOCABULARY // 32) * 32, bool)
        bits[self.tokens[at] if at < len(self.tokens) else 0] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def mask(self) -> np.ndarray:
        return self._mask(self.at)

    def advance(self, token: int) -> None:
        assert token == self.tokens[self.at]
        self.at += 1

    def draft(self, tokens: list[int]) -> int:
        right = [a == b for a, b in zip(tokens, self.tokens[self.at :], strict=False)]
        return right.index(False) if False in right else len(right)

    def masks(self, tokens: list[int]) -> list[np.ndarray]:
        return [self._mask(self.at + i) for i in range(len(tokens) + 1)]


def repeating(period: int, count: int) -> list[int]:
    return [(3 + 7 * (i % period)) % 90 for i in range(period * count)]

"""short_conv and gated_delta: loops over the tokens of each sequence in float64."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from . import Vector

EPS = 1e-6
MIXES = {  # (tokens of this step, tokens before it) of each sequence
    "decode": [(1, 5)], "fresh": [(1, 0)], "prompt": [(37, 0)], "nothing": [(0, 0)], "none": [],
    "mixed": [(3, 0), (1, 9), (18, 2), (0, 4), (16, 0), (2, 40)],
}


def _sequences(mix: Sequence[tuple[int, int]], rng: np.random.Generator) -> tuple[list[np.ndarray], int, int]:
    """slots, starts, counts, lengths of sequences with a row of nobody between them; tokens; slots in all."""
    counts, before = np.array(mix, np.int32).reshape(-1, 2).T
    starts = np.cumsum([1, *(counts + 1)])[:-1].astype(np.int32)
    slots = rng.permutation(len(mix) + 2)[:len(mix)].astype(np.int32)
    return [slots, starts, counts.copy(), counts + before], int(counts.sum()) + len(mix) + 1, len(mix) + 2


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _conv(mix: str, channels: int, taps: int) -> Vector:
    rng = np.random.default_rng(channels)
    table, tokens, slots = _sequences(MIXES[mix], rng)
    x = _normal(rng, tokens, 2 * channels)[:, :channels]                                  # part of wider rows
    weight, states = _normal(rng, channels, taps), _normal(rng, slots, taps - 1, channels)
    y, after = np.zeros(x.shape), states.astype(float)
    for slot, start, count, length in zip(*table, strict=True):
        history = np.zeros(states.shape[1:]) if count == length else states[slot]
        rows = np.concatenate([history, x[start:start + count]]).astype(float)
        for i in range(count):
            total = (rows[i:i + taps] * weight.T).sum(0)
            y[start + i] = total / (1 + np.exp(-total))
        after[slot] = rows[len(rows) - taps + 1:] if count else states[slot]
    # a sum of `taps` products and a sigmoid
    return Vector(f"short_conv-{mix}-C{channels}-W{taps}", "short_conv", [np.empty(x.shape, np.float32), states],
                  [x, weight, states, *table], [], [], [y, after], [2e-6, 0])


def _delta(mix: str, heads: int, values: int, size: int, columns: int) -> Vector:
    rng = np.random.default_rng(size)
    table, tokens, slots = _sequences(MIXES[mix], rng)
    both, v = _normal(rng, tokens, 2 * heads, size), _normal(rng, tokens, values, columns)
    q, k = both[:, :heads], both[:, heads:]
    decay, rate = -rng.exponential(0.5, (tokens, values)), rng.random((tokens, values)).astype(np.float32)
    decay = np.where(rng.random(decay.shape) < 0.1, -200.0, decay).astype(np.float32)     # some forget everything
    states = _normal(rng, slots, values, size, columns)
    o, after = np.zeros(v.shape), states.astype(float)
    unit_q, unit_k = (np.repeat(x / np.sqrt((x.astype(float)**2).sum(-1, keepdims=True) + EPS), values // heads, 1)
                      for x in (q, k))
    for slot, start, count, length in zip(*table, strict=True):
        state = np.zeros(states.shape[1:]) if count == length else states[slot].astype(float)
        for t in range(start, start + count):
            state = state * np.exp(decay[t].astype(float))[:, None, None]
            change = rate[t][:, None] * (v[t] - np.einsum("hde,hd->he", state, unit_k[t]))
            state = state + unit_k[t][..., None] * change[:, None]
            o[t] = np.einsum("hde,hd->he", state, unit_q[t]) * size**-0.5
        if count:
            after[slot] = state
    # the state's error does not grow: each token takes as much of it away as it adds
    return Vector(f"gated_delta-{mix}-K{heads}-H{values}-D{size}-E{columns}", "gated_delta",
                  [np.empty(v.shape, np.float32), states], [q, k, v, decay, rate, states, *table], [],
                  [size**-0.5, EPS], [o, after], 1e-5)


def vectors() -> Iterator[Vector]:
    for mix in MIXES:
        for channels, taps in ((70, 4), (257, 2), (3, 1)):
            yield _conv(mix, channels, taps)
        for shape in ((2, 4, 16, 24), (1, 1, 64, 33), (1, 3, 7, 5), (1, 2, 128, 40)):
            yield _delta(mix, *shape)

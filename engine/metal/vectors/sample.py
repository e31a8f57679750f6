"""sample in float64: filters in the order of vLLM and of OpenAI's and Hugging Face's penalties, draws, logprobs.

A row whose random number lies within 1e-6 of the border between two tokens would be a tie of rounding: its counter is
raised until it is none.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from . import Vector

PARAMS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")       # columns of params and ints
INTS = ("top_k", "seed", "seed_high", "counter", "history_length", "prompt_length", "sequence", "biases", "masked",
        "likeliest", "target")
TOP = 20
Row = dict[str, Any]                           # settings by name; bias: {token: bias}, allowed: tokens
DEFAULT: Row = {"temperature": 1.0, "top_p": 1.0, "repetition": 1.0}
HISTORY = [3, 4, 4, 5, 3, 5, 5, 5, 9]
NEAR = 1e-6
# sums of float32 exponentials, and the last bit of a logit of size 30
TOLERANCE = [0, 1e-5, 0, 1e-5]


def edited(z: np.ndarray, row: Row, history: Sequence[int]) -> np.ndarray:
    """Logits (V) after penalties for the history, biases and masks, in float64."""
    z, prompt = np.array(z, float), row.get("prompt_length", 0)
    for t in set(history):
        z[t] = z[t] / row["repetition"] if z[t] > 0 else z[t] * row["repetition"]
    for t in set(history[prompt:]):
        z[t] -= row.get("presence", 0) + row.get("frequency", 0) * list(history[prompt:]).count(t)
    for t, bias in row.get("bias", {}).items():
        z[t] += bias
    if "allowed" in row:
        z[~np.isin(np.arange(len(z)), list(row["allowed"]))] = -np.inf
    return z


def probabilities(z: np.ndarray, row: Row) -> np.ndarray:
    """What a row draws from: z (V) edited, then temperature, top_k, top_p, min_p."""
    z = z / row["temperature"]
    p = np.exp(z - z.max())
    order = np.lexsort((np.arange(len(z)), -z))
    if row.get("top_k"):
        p[order[row["top_k"]:]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[(before >= row["top_p"]) & (before > 0)]] = 0
    p[p < row.get("min_p", 0) * p.max()] = 0
    return p / p.sum()


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10: four words. Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011)."""
    c, k, word = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & word, (a >> 32) ^ c[3] ^ k[1], a & word]
        k = [(k[0] + 0x9E3779B9) & word, (k[1] + 0xBB67AE85) & word]
    return c


def _uniform(row: Row) -> float:
    """The row's random number: 53 bits in [0, 1)."""
    first, second, *_ = philox([row.get("counter", 0), 0, 0, 0], [row.get("seed", 0), row.get("seed_high", 0)])
    return ((first >> 5) * 2**26 + (second >> 6)) / 2**53


def _drawn(z: np.ndarray, row: Row) -> int:
    """The row's token; raises its counter out of ties."""
    if not np.isfinite(z.max(initial=-np.inf)):
        return -1
    if "target" in row:
        return row["target"] - 1
    z = edited(z, row, HISTORY[:row.get("history_length", 0)])
    if not np.isfinite(z.max()) or row["temperature"] == 0:
        return int(z.argmax()) if np.isfinite(z.max()) else -1
    borders = np.cumsum(probabilities(z, row))
    while np.abs(borders[:-1] - (u := _uniform(row))).min(initial=1) < NEAR:
        row["counter"] = row.get("counter", 0) + 1
    return int(np.argmax(borders > u))


def _vector(name: str, logits: np.ndarray, settings: Sequence[Row]) -> Vector:
    rows = [DEFAULT | {"sequence": r % 2, "biases": len(row.get("bias", ())), "masked": "allowed" in row} | row
            for r, row in enumerate(settings)]
    z = np.broadcast_to(np.asarray(logits, np.float32), (len(rows), np.shape(logits)[-1]))
    vocabulary = z.shape[1]
    with np.errstate(all="ignore"):
        wanted = np.array([_drawn(line, row) for line, row in zip(z, rows, strict=True)], np.int32)
        lse = np.log(np.exp(z.astype(float)).sum(1))
        logprobs = np.where(wanted < 0, np.nan, z[np.arange(len(z)), wanted] - lse)
    params = np.array([[row.get(n, 0) for n in PARAMS] for row in rows], np.float32)
    ints = np.array([[row.get(n, 0) for n in INTS] for row in rows], np.uint32).view(np.int32)
    bias_ids, biases = np.full((2, 8), -1, np.int32), np.full((2, 8), np.nan, np.float32)
    bits = np.zeros((len(rows), -(-vocabulary // 32) * 32), bool)
    for row, mask in zip(rows, bits, strict=True):
        for i, (token, bias) in enumerate(row.get("bias", {}).items()):
            bias_ids[row["sequence"], i], biases[row["sequence"], i] = token, bias
        mask[list(row.get("allowed", ()))] = True
    masks = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
    ids, values = np.full((len(rows), TOP), -1, np.int32), np.full((len(rows), TOP), np.nan, np.float32)  # all bits set
    told, tops = ids.copy(), values.astype(float)
    for r, row in enumerate(rows):
        order = np.argsort(-z[r], kind="stable")[:row.get("likeliest", 0)]
        told[r, :len(order)], tops[r, :len(order)] = order, z[r, order] - lse[r]
    return Vector(f"sample-{name}", "sample",
                  [np.empty(len(rows), np.int32), np.empty(len(rows), np.float32), ids, values],
                  [z.copy(), params, ints, np.array([[*HISTORY, 0]] * 2, np.int32), bias_ids, biases, masks], [], [],
                  [wanted, logprobs, told, tops], TOLERANCE)


DRAWS: list[Row] = [
    {}, {"temperature": 0.6}, {"temperature": 1.7, "top_k": 7}, {"top_p": 0.8}, {"top_p": 0.0}, {"min_p": 0.1},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    {"repetition": 1.5, "presence": 0.5, "frequency": 0.4, "prompt_length": 3, "history_length": 9, "top_k": 12},
    {"bias": {7: 3.0, 8: -100.0, 299: 2.5, 3: 0.5}, "temperature": 0.9, "frequency": 0.4, "history_length": 9},
    {"allowed": range(100, 171), "top_p": 0.9}, {"temperature": 0.05, "top_p": 0.99}, {"top_k": 299},
    {"allowed": [0, 31, 32, 63, 299], "bias": {31: 2.0, 5: 100.0}, "temperature": 1.5, "repetition": 1.2},
]
CHOICES: list[Row] = [
    {}, {"repetition": 3.0, "history_length": 9}, {"repetition": 3.0, "history_length": 2},
    {"presence": 5.5, "history_length": 9}, {"frequency": 2.0, "history_length": 9, "prompt_length": 4},
    {"bias": {9: 100.0}}, {"allowed": [4, 6]}, {"allowed": []}, {"allowed": [3], "bias": {3: -np.inf}},
    {"target": 7}, {"target": 1, "temperature": 2.0}]


def vectors() -> Iterator[Vector]:
    rng = np.random.default_rng(5)
    for vocabulary in (1, 5, 1000, 5000):
        z = rng.standard_normal((6, vocabulary)) * 3
        z[1] = np.round(z[1])                  # ties: the lowest id wins
        z[2, vocabulary // 2 + 1:] = -np.inf
        z[3], z[4, -1], z[5, 0] = -np.inf, np.nan, np.inf
        yield _vector(f"greedy-V{vocabulary}", z, [{"temperature": 0}] * 3 + [{"temperature": t} for t in (0, 1, 1)])
    z = rng.standard_normal(300) * 2
    z[40:60] = z[40]                           # ties
    for i, row in enumerate(DRAWS):
        yield _vector(f"draw-{i}", z, [row | {"seed": 11, "seed_high": i, "counter": c} for c in range(3)])
    z = np.round(rng.standard_normal(9000) * 2, 1)
    yield _vector("draw-V9000", z, [{"counter": c} | row for c in range(1) for row in (
        {}, {"top_k": 50}, {"top_k": 4000}, {"top_p": 0.7}, {"top_k": 2000, "top_p": 0.95, "min_p": 1e-3})])
    words = 2**32 - 1                          # of equal weights the random number's highest bits choose
    yield _vector("draw-equal", np.zeros(1 << 12), [{"counter": c, "seed": s, "seed_high": h} for c, s, h in (
        (0, 0, 0), (1, 2, 3), (words, words, words), (7, 0, 9))])
    z = np.array([2.0, 1.9, 1.0, 3.0, 2.5, 2.8, -1.0, 0.5, 0.0, -3.0])
    yield _vector("choices", z, [{"temperature": 0} | row for row in CHOICES])
    for vocabulary, n in ((1000, 20), (20, 20), (300, 7), (3, 3)):
        z = np.round(rng.standard_normal((2, vocabulary)), 1)
        yield _vector(f"likeliest-V{vocabulary}-{n}", z, [{"likeliest": n, "counter": 3}, {
            "likeliest": 2, "temperature": 0.1, "bias": {0: 50.0}, "allowed": [0]}])

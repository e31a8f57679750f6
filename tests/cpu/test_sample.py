"""sample against NumPy: each filter's formula, the distribution drawn, Philox's known answers, reproducibility."""

import numpy as np
import pytest

from lazulite.engine import cpu

PARAMS = ["temperature", "top_p", "min_p", "repetition", "presence", "frequency"]
INTS = ["top_k", "seed", "seed_high", "counter", "history_length", "prompt_length"]
DEFAULT = {"temperature": 1.0, "top_p": 1.0, "repetition": 1.0}


def sample(isa, logits, rows, history=()):
    """rows: one dict of settings a row of logits (R, V)."""
    params, ints = np.zeros((len(rows), 8), np.float32), np.zeros((len(rows), 8), np.int32)
    ids = np.tile(np.array([*history, 0], np.int32), (len(rows), 1))
    for r, row in enumerate(rows):
        row = DEFAULT | {"history_length": len(history)} | row
        params[r, :6] = [row.get(name, 0) for name in PARAMS]
        ints[r, :6] = np.array([row.get(name, 0) for name in INTS], np.uint32).view(np.int32)
    tokens, logprobs = np.full(len(rows), -9, np.int32), np.full(len(rows), np.nan, np.float32)
    inputs = [np.ascontiguousarray(logits, np.float32), params, ints, ids]
    cpu.call("sample", outputs=[tokens, logprobs], inputs=inputs, isa=isa)
    return tokens, logprobs


def probabilities(z, row, history=()):
    """What a row draws from, in float64, in the order of vLLM and of OpenAI's and Hugging Face's penalties."""
    row = DEFAULT | row
    z, prompt = np.array(z, float), row.get("prompt_length", 0)
    for t in set(history):
        z[t] = z[t] / row["repetition"] if z[t] > 0 else z[t] * row["repetition"]
    for t in set(history[prompt:]):
        z[t] -= row.get("presence", 0) + row.get("frequency", 0) * list(history[prompt:]).count(t)
    z /= row["temperature"]
    p = np.exp(z - z.max())
    order = np.lexsort((np.arange(len(z)), -z))
    if row.get("top_k"):
        p[order[row["top_k"] :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[(before >= row["top_p"]) & (before > 0)]] = 0
    p[p < row.get("min_p", 0) * p.max()] = 0
    return p / p.sum()


def philox(counter, key):
    """Philox4x32-10 as in Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011)."""
    c, k, word = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & word, (a >> 32) ^ c[3] ^ k[1], a & word]
        k = [(k[0] + 0x9E3779B9) & word, (k[1] + 0xBB67AE85) & word]
    return c


def test_philox_known_answers(isa):
    ones = 0xFFFFFFFF
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123, kat_vectors
    assert philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    rows = [
        {"counter": c, "seed": s, "seed_high": h} for c, s, h in [(0, 0, 0), (1, 2, 3), (ones, ones, ones), (7, 0, 9)]
    ]
    expected = [philox([r["counter"], 0, 0, 0], [r["seed"], r["seed_high"]])[0] >> 16 for r in rows]
    # of 2^16 equal weights, the one drawn is the uniform's top 16 bits
    tokens, logprobs = sample(isa, np.zeros((len(rows), 1 << 16)), rows)
    assert tokens.tolist() == expected
    np.testing.assert_allclose(logprobs, -16 * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("V", [1, 5, 16, 255, 256, 1000, 49152])
def test_greedy(isa, V):
    rng = np.random.default_rng(V)
    z = (rng.standard_normal((5, V)) * 3).astype(np.float32)
    z[1] = np.round(z[1])  # many ties: the lowest id wins
    z[2] -= 1e4
    z[3, V // 2 :] = -np.inf if V > 1 else 0
    z64 = z.astype(float)
    lse = z64.max(1) + np.log(np.exp(z64 - z64.max(1, keepdims=True)).sum(1))
    tokens, logprobs = sample(isa, z, [{"temperature": 0}] * 5)
    np.testing.assert_array_equal(tokens, z.argmax(1))
    np.testing.assert_allclose(logprobs, z64.max(1) - lse, atol=3e-3 if V > 1 else 0, rtol=1e-6)
    np.testing.assert_allclose(logprobs[[0, 1, 3, 4]], (z64.max(1) - lse)[[0, 1, 3, 4]], atol=3e-6)


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 7},
    {"top_p": 0.8},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    {"repetition": 1.5, "presence": 0.5, "frequency": 0.4, "prompt_length": 3, "top_k": 12},
]


@pytest.mark.parametrize("row", SETTINGS, ids=str)
def test_draws_follow_the_distribution(isa, row):
    history = [3, 4, 4, 5, 3, 5, 5, 5, 9]
    z = np.random.default_rng(5).standard_normal(300).astype(np.float32) * 2
    z[40:60] = z[40]  # ties
    p = probabilities(z, row, history)
    draws = 20000 if isa == "portable" else 4000
    rows = [row | {"seed": 11, "counter": i} for i in range(draws)]
    tokens, logprobs = sample(isa, np.tile(z, (draws, 1)), rows, history)
    counts = np.bincount(tokens, minlength=300)
    assert not counts[p == 0].any()
    np.testing.assert_allclose(logprobs[0], z[tokens[0]] - np.log(np.exp(z.astype(float)).sum()), atol=1e-5)
    big = p * draws >= 5
    seen, expected = np.append(counts[big], counts[~big].sum()), np.append(p[big], p[~big].sum()) * draws
    chi2 = ((seen - expected) ** 2 / np.maximum(expected, 5)).sum()  # mean: the number of bins; variance: twice that
    assert chi2 < len(seen) + 4 * np.sqrt(2 * len(seen)) + 4


def test_penalties_choose(isa):
    z, history = np.array([[2.0, 1.9, 1.0, -1.0]]), [0, 0, 1]
    for row, token in [
        ({}, 0),
        ({"repetition": 3.0}, 2),  # 2 / 3, 1.9 / 3
        ({"repetition": 3.0, "prompt_length": 3}, 2),  # the prompt counts
        ({"presence": 0.5}, 0),
        ({"frequency": 0.5}, 1),  # twice 0, once 1
        ({"frequency": 0.5, "prompt_length": 2}, 0),  # the prompt does not
        ({"presence": 1.0, "frequency": 0.1, "prompt_length": 0}, 2),
    ]:
        assert sample(isa, z, [row | {"temperature": 0}], history)[0].item() == token, row


def test_seeds_reproduce(isa):
    z = np.tile(np.random.default_rng(0).standard_normal(5000), (40, 1))
    rows = [{"seed": i % 20, "temperature": 0.9, "top_p": 0.9} for i in range(40)]
    tokens = sample(isa, z, rows)[0]
    np.testing.assert_array_equal(tokens, sample("portable", z, rows)[0])
    np.testing.assert_array_equal(tokens[:20], tokens[20:])
    assert len(set(tokens)) > 10
    assert [sample(isa, z[:1], [row])[0].item() for row in rows[:5]] == tokens[:5].tolist()

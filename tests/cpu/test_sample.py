"""sample against NumPy: each filter's formula, the distribution drawn, Philox's known answers, reproducibility."""

import numpy as np
import pytest

from lazulite.engine import cpu
from lazulite.engine.metal.vectors import sample as reference
from lazulite.engine.metal.vectors.sample import DEFAULT, INTS, PARAMS, TOP, philox


def kernel(isa, logits, rows, history=()):
    """rows: one dict of settings a row of logits (R, V), each of a sequence; bias: {token: bias}, allowed: tokens."""
    logits = np.ascontiguousarray(logits, np.float32)
    size = len(rows), 1 + max(len(row.get("bias", ())) for row in rows)
    params, ints = np.zeros((len(rows), 6), np.float32), np.zeros((len(rows), 11), np.int32)
    histories = np.tile(np.array([*history, 0], np.int32), (len(rows), 1))
    bias_ids, biases = np.full(size, -1, np.int32), np.full(size, np.nan, np.float32)
    bits = np.ones((len(rows), -(-logits.shape[1] // 32) * 32), bool)
    for r, row in enumerate(rows):
        bias, masked = row.get("bias", {}), "allowed" in row
        row = DEFAULT | {"history_length": len(history), "sequence": r, "biases": len(bias), "masked": masked} | row
        params[r] = [row.get(name, 0) for name in PARAMS]
        ints[r] = np.array([row.get(name, 0) for name in INTS], np.uint32).view(np.int32)
        bias_ids[r, : len(bias)], biases[r, : len(bias)] = list(bias), list(bias.values())
        if masked:
            bits[r] = np.isin(np.arange(bits.shape[1]), list(row["allowed"]))
    masks = np.packbits(bits, axis=1, bitorder="little").view("<u4")
    outputs = [np.full(len(rows), -9, np.int32), np.full(len(rows), 9, np.float32)]
    outputs += [np.full((len(rows), TOP), -9, np.int32), np.full((len(rows), TOP), 9, np.float32)]
    cpu.call("sample", outputs=outputs, inputs=[logits, params, ints, histories, bias_ids, biases, masks], isa=isa)
    return outputs


def sample(isa, logits, rows, history=()):
    return kernel(isa, logits, rows, history)[:2]


def probabilities(z, row, history=()):
    row = DEFAULT | row
    return reference.probabilities(reference.edited(z, row, history), row)


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
    {"bias": {7: 3.0, 8: -100.0, 299: 2.5, 3: 0.5}, "temperature": 0.9, "frequency": 0.4},
    {"allowed": range(100, 171), "top_p": 0.9},
    {"allowed": [0, 31, 32, 63, 299], "bias": {31: 2.0, 5: 100.0}, "temperature": 1.5, "repetition": 1.2},
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


@pytest.mark.parametrize("V", [1, 7, 32, 33, 1000, 49152])
def test_the_mask_chooses_among_what_is_allowed(isa, V):
    rng = np.random.default_rng(V)
    z = rng.standard_normal((6, V)).astype(np.float32)
    allowed = [sorted(set(rng.integers(0, V, size).tolist())) for size in (1, 2, 5, 30, V)]
    rows = [{"allowed": tokens, "temperature": 0} for tokens in allowed] + [{"temperature": 0}]
    tokens, logprobs = sample(isa, z, rows)
    wanted = [a[int(np.argmax(z[r, a]))] for r, a in enumerate(allowed)] + [int(z[5].argmax())]
    assert tokens.tolist() == wanted
    z = z.astype(float)
    np.testing.assert_allclose(logprobs, z[np.arange(6), wanted] - np.log(np.exp(z).sum(1)), atol=1e-5)  # of all tokens


@pytest.mark.parametrize(("V", "n"), [(1, 1), (5, 20), (20, 20), (300, 1), (1000, 7), (49152, 20)])
def test_the_likeliest_tokens(isa, V, n):
    z = np.round(np.random.default_rng(n).standard_normal((3, V)).astype(np.float32), 1)  # many ties: lowest id first
    rows = [{"likeliest": n}, {"likeliest": n, "temperature": 0.1, "bias": {0: 50.0}, "allowed": [0]}, {}]
    tokens, logprobs, ids, values = kernel(isa, z, rows)
    z64, count = z.astype(float), min(n, V)
    lse = np.log(np.exp(z64).sum(1, keepdims=True))
    order = np.argsort(-z, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(ids[:2, :count], order[:2])
    np.testing.assert_allclose(values[:2, :count], (np.take_along_axis(z64, order, 1) - lse)[:2], atol=1e-5)
    assert tokens[1] == 0 and (ids[2] == -9).all(), "a row that asks for none gets none"
    for r in range(2):
        assert all(values[r, i] == logprobs[r] for i in range(count) if ids[r, i] == tokens[r])


def test_a_target_is_not_drawn(isa):
    z = np.random.default_rng(3).standard_normal((4, 500)).astype(np.float32)
    tokens, logprobs = sample(isa, z, [{"target": t + 1, "top_k": 1} for t in (0, 7, 499, 31)])
    assert tokens.tolist() == [0, 7, 499, 31]
    lse = np.log(np.exp(z.astype(float)).sum(1))
    np.testing.assert_allclose(logprobs, z[np.arange(4), tokens] - lse, atol=1e-5)


@pytest.mark.parametrize("at", [0, 300, 999])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_an_answer_say_so_and_leave_the_others(isa, at, temperature):
    z = np.random.default_rng(4).standard_normal((5, 1000)).astype(np.float32)
    rows = [{"temperature": temperature, "seed": 5}] * 3 + [{"temperature": temperature, "allowed": []}]
    rows += [{"temperature": temperature, "allowed": [3], "bias": {3: -np.inf}}]
    undisturbed = sample(isa, z, rows)
    z[1, at] = np.nan
    tokens, logprobs = sample(isa, z, rows)
    assert tokens[[1, 3, 4]].tolist() == [-1, -1, -1] and np.isnan(logprobs[[1, 3, 4]]).all()
    np.testing.assert_array_equal(tokens[[0, 2]], undisturbed[0][[0, 2]])
    np.testing.assert_array_equal(logprobs[[0, 2]], undisturbed[1][[0, 2]])
    z[1] = -np.inf
    assert sample(isa, z, rows)[0][1] == -1
    z[1, at] = np.inf
    assert sample(isa, z, rows)[0][1] == -1


def test_rows_of_a_sequence_share_its_history_and_biases(isa):
    z = np.tile(np.array([3.0, 2.9, 2.8, -1.0]), (3, 1))
    rows = [{"temperature": 0, "presence": 1.0, "history_length": n, "sequence": 1} for n in (0, 1, 2)]
    assert sample(isa, z, rows, [0, 1])[0].tolist() == [0, 1, 2]
    rows = [{"bias": {3: 9.0}, "temperature": 0}, {"temperature": 0, "sequence": 0, "biases": 1}, {"temperature": 0}]
    assert sample(isa, z, rows)[0].tolist() == [3, 3, 0]

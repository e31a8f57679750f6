"""short_conv and gated_delta against NumPy loops in float64: any mix of chunks, decodes and fresh starts."""
import numpy as np
import pytest

from lazulite.engine import cpu

MIXES = {  # (tokens of this step, tokens before it) of each sequence
    "one decode": [(1, 5)], "one fresh token": [(1, 0)], "a prompt": [(37, 0)], "whole chunks": [(32, 16)],
    "everything": [(3, 0), (1, 9), (50, 2), (0, 4), (16, 0), (17, 1), (2, 40)], "nothing": [(0, 0)],
}


def sequences(mix, rng, gap=0):
    """slots, starts, counts, lengths of sequences with `gap` rows of nobody between them; tokens; slots in all."""
    counts, before = np.array(mix, np.int32).T.copy()
    starts = np.cumsum([gap, *(counts + gap)])[:-1].astype(np.int32)
    slots = rng.permutation(len(mix) + 2)[: len(mix)].astype(np.int32)
    tokens = int(counts.sum()) + gap * (len(mix) + 1)
    return [slots, starts, counts, (counts + before).astype(np.int32)], tokens, len(mix) + 2


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def conv_loop(x, weight, states, table):
    y, after, past = np.zeros(x.shape), states.astype(float), weight.shape[1] - 1
    for slot, start, count, length in zip(*table, strict=True):
        history = np.zeros(states.shape[1:]) if count == length else states[slot]
        tokens = np.concatenate([history, x[start : start + count]]).astype(float)
        for i in range(count):
            total = (tokens[i : i + past + 1] * weight.T).sum(0)
            y[start + i] = total / (1 + np.exp(-total))
        after[slot] = tokens[len(tokens) - past :] if count else states[slot]
    return y, after


def delta_loop(q, k, v, decay, rate, states, table, scale, eps):
    o, after, group = np.zeros(v.shape), states.astype(float), v.shape[1] // k.shape[1]
    unit = lambda x: x / np.sqrt((x.astype(float) ** 2).sum(-1, keepdims=True) + eps)  # noqa: E731
    q, k = (np.repeat(unit(x), group, 1) for x in (q, k))
    for slot, start, count, length in zip(*table, strict=True):
        state = np.zeros(states.shape[1:]) if count == length else states[slot].astype(float)
        for t in range(start, start + count):
            state = state * np.exp(decay[t])[:, None, None]
            change = rate[t][:, None] * (v[t] - np.einsum("hde,hd->he", state, k[t]))
            state = state + k[t][..., None] * change[:, None]
            o[t] = np.einsum("hde,hd->he", state, q[t]) * scale
        if count:
            after[slot] = state
    return o, after


def close(found, wanted, tolerance=2e-5):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max(initial=0)))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("channels, width", [(70, 4), (16, 2), (3, 1), (130, 5)])
def test_short_conv(mix, channels, width, isa, rng, threads):
    threads(3)
    table, tokens, slots = sequences(MIXES[mix], rng, gap=int(mix == "everything"))
    x = normal(rng, tokens, 2 * channels)[:, :channels]     # part of wider rows
    weight, states = normal(rng, channels, width), normal(rng, slots, width - 1, channels)
    y, after = np.full((tokens, channels), np.nan, np.float32), states.copy()
    cpu.call("short_conv", [y, after], [x, weight, after, *table], isa=isa)
    for found, wanted in zip((y, after), conv_loop(x, weight, states, table), strict=True):
        close(found, wanted)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("K, H, D, E", [(2, 4, 16, 24), (1, 1, 64, 64), (3, 3, 40, 72), (1, 3, 7, 5), (1, 2, 128, 128)])
def test_gated_delta(mix, K, H, D, E, isa, rng, threads):
    threads(3)
    table, tokens, slots = sequences(MIXES[mix], rng, gap=int(mix == "everything"))
    both, v = normal(rng, tokens, 2 * K, D), normal(rng, tokens, H, E)
    q, k = both[:, :K], both[:, K:]
    decay, rate = -rng.exponential(0.5, (tokens, H)).astype(np.float32), rng.random((tokens, H)).astype(np.float32)
    states = normal(rng, slots, H, D, E)
    o, after = np.full(v.shape, np.nan, np.float32), states.copy()
    cpu.call("gated_delta", [o, after], [q, k, v, decay, rate, after, *table], floats=[D**-0.5, 1e-6], isa=isa)
    for found, wanted in zip((o, after), delta_loop(q, k, v, decay, rate, states, table, D**-0.5, 1e-6), strict=True):
        close(found, wanted)


def test_strong_and_no_decay(isa, rng):
    """Decays that underflow between the tokens of a chunk, beside some that keep everything for 300 tokens."""
    table, tokens, _ = sequences([(300, 0)], rng)
    q, k, v = normal(rng, tokens, 1, 32), normal(rng, tokens, 1, 32), normal(rng, tokens, 2, 32)
    decay = np.stack([np.zeros(tokens), rng.choice([-200.0, -1e-3, 0.0], tokens)], 1).astype(np.float32)
    rate, states = np.ones((tokens, 2), np.float32), np.zeros((3, 2, 32, 32), np.float32)
    o = np.empty_like(v)
    wanted = delta_loop(q, k, v, decay, rate, states.copy(), table, 1.0, 1e-6)
    cpu.call("gated_delta", [o, states], [q, k, v, decay, rate, states, *table], floats=[1.0, 1e-6], isa=isa)
    for found, want in zip((o, states), wanted, strict=True):
        close(found, want)


def test_a_wrong_slot_is_an_error():
    one = np.zeros((1, 1, 8), np.float32)
    numbers = [np.array([n], np.int32) for n in (2, 0, 1, 1)]
    states = np.zeros((2, 1, 8, 8), np.float32)
    with pytest.raises(RuntimeError, match="slot 2 of 2"):
        cpu.call("gated_delta", [one.copy(), states], [one, one, one, one[0, :, :1], one[0, :, :1], states, *numbers],
                 floats=[1.0, 1e-6])

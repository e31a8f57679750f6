"""paged_attention against the formula in float64, over ragged batches, cache dtypes, features and instruction sets."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lazulite.engine import cpu

PAGE = 32
DTYPES = ["float32", "float16", "bfloat16", "int8"]


def tolerance(isa, dtype):
    return 2e-2 if isa == "amx" and dtype != "float32" else 2e-5  # bfloat16 tiles; the others keep float32


def bf16(x):
    u = np.asarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


class Batch:
    """A random ragged batch: shuffled pages, gaps between sequences, NaN wherever nothing may be read."""

    def __init__(self, seed, counts, depths, D=64, K=2, group=3, dtype="float16"):
        rng = np.random.default_rng(seed)
        self.counts = np.array(counts, np.int32)
        self.lengths = self.counts + np.array(depths, np.int32)
        B, P = len(counts), max(1, -(-int(self.lengths.max(initial=0)) // PAGE)) + 1
        N = B * P + 2
        self.group, self.dtype = group, dtype
        self.table = rng.permutation(N)[: B * P].reshape(B, P).astype(np.int32)
        self.starts, T = np.zeros(B, np.int32), int(rng.integers(3))
        for b in rng.permutation(B):
            self.starts[b] = T
            T += counts[b] + int(rng.integers(2))
        T = max(T, 1)
        self.q = rng.standard_normal((T, K * group, D)).astype(np.float32)
        k, v = rng.standard_normal((2, N, K, PAGE, D)).astype(np.float32)
        self.sinks = rng.standard_normal(K * group).astype(np.float32)
        self.scales = rng.uniform(0.002, 0.02, (2, N, K, PAGE)).astype(np.float32)
        if dtype == "int8":
            k, v = np.rint(k * 40).clip(-127, 127).astype(np.int8), np.rint(v * 40).clip(-127, 127).astype(np.int8)
            self.k, self.v = k * self.scales[0][..., None].astype(float), v * self.scales[1][..., None].astype(float)
        elif dtype != "bfloat16":
            k, v = k.astype(dtype), v.astype(dtype)
            self.k, self.v = k.astype(float), v.astype(float)
        else:
            k, v = bf16(k), bf16(v)
            self.k, self.v = ((x.astype(np.uint32) << 16).view(np.float32).astype(float) for x in (k, v))
        free = np.ones((N, PAGE), bool)
        for b in range(B):
            for p in range(self.lengths[b]):
                free[self.table[b, p // PAGE], p % PAGE] = False
        poison = {"bfloat16": 0x7FC0, "int8": 7}.get(dtype, np.nan)
        for x in (k, v):
            x[np.broadcast_to(free[:, None, :], x.shape[:3])] = poison
        self.scales[:, np.broadcast_to(free[:, None, :], self.scales.shape[1:])] = np.nan
        self.pages = [np.ascontiguousarray(k.transpose(0, 1, 3, 2)), v]

    def run(self, isa, window=0, causal=True, cap=0.0, sinks=False):
        pages = [(x, "bfloat16") for x in self.pages] if self.dtype == "bfloat16" else self.pages
        quantized = self.dtype == "int8"
        inputs = [self.q, *pages, self.table, self.starts, self.counts, self.lengths]
        inputs += [self.sinks] * sinks + list(self.scales) * quantized
        out = np.full_like(self.q, np.nan)
        ints = [window, int(causal), int(sinks), int(quantized)]
        floats = [self.q.shape[2] ** -0.5, cap]
        cpu.call("paged_attention", outputs=[out], inputs=inputs, ints=ints, floats=floats, isa=isa)
        return out

    def expected(self, window=0, causal=True, cap=0.0, sinks=False):
        out = np.zeros(self.q.shape)
        for b, length in enumerate(self.lengths):
            k, v = (
                x[self.table[b]].transpose(1, 0, 2, 3).reshape(x.shape[1], -1, x.shape[3]) for x in (self.k, self.v)
            )
            for j in range(self.counts[b]):
                own, p = length - self.counts[b] + j, np.arange(length)
                seen = p[(p <= own if causal else p >= 0) & ((p > own - window) | (window == 0))]
                for h in range(self.q.shape[1]):
                    s = k[h // self.group, seen] @ self.q[self.starts[b] + j, h] * self.q.shape[2] ** -0.5
                    s = cap * np.tanh(s / cap) if cap else s
                    e = np.exp(np.append(s, self.sinks[h] if sinks else -np.inf))
                    out[self.starts[b] + j, h] = e[:-1] / e.sum() @ v[h // self.group, seen]
        return out


sequences = st.lists(
    st.tuples(st.sampled_from([0, 1, 1, 1, 2, 5, 33, 90]), st.sampled_from([0, 0, 1, 31, 32, 100, 300])), max_size=5
)


@settings(max_examples=25, deadline=None)
@given(
    batch=sequences,
    D=st.sampled_from([8, 40, 64, 80, 128]),
    K=st.integers(1, 3),
    group=st.sampled_from([1, 3, 4, 8]),
    dtype=st.sampled_from(DTYPES),
    window=st.sampled_from([0, 0, 1, 40, 128]),
    causal=st.booleans(),
    cap=st.sampled_from([0.0, 2.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
@example(batch=[(32, 100)], D=128, K=1, group=3, dtype="float16", window=1, causal=True, cap=0.0, sinks=False, seed=0)
def test_is_the_formula(isa, batch, D, K, group, dtype, window, causal, cap, sinks, seed):
    case = Batch(seed, [c for c, _ in batch], [d for _, d in batch], D, K, group, dtype)
    expected = case.expected(window, causal, cap, sinks)
    np.testing.assert_allclose(case.run(isa, window, causal, cap, sinks), expected, atol=tolerance(isa, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D, group", [(64, 3), (96, 1), (256, 2)])
def test_long_sequences_split_over_threads(isa, D, group, dtype):
    case = Batch(0, [1, 4, 60], [2900, 1300, 700], D, 1, group, dtype)
    np.testing.assert_allclose(case.run(isa), case.expected(), atol=tolerance(isa, dtype))


def test_ragged_equals_solo(isa):
    counts, depths = [70, 1, 1, 3, 100], [0, 500, 31, 64, 200]
    case = Batch(1, counts, depths)
    together = case.run(isa)
    for b, (count, start) in enumerate(zip(counts, case.starts, strict=True)):
        solo = Batch(1, counts, depths)
        solo.q = case.q[start : start + count].copy()
        solo.table, solo.starts = case.table[b : b + 1], np.zeros(1, np.int32)
        solo.counts, solo.lengths = case.counts[b : b + 1], case.lengths[b : b + 1]
        # with bfloat16 tiles, where a tile is cut decides by which maximum its weights are rounded
        np.testing.assert_allclose(together[start : start + count], solo.run(isa), atol=4e-3 if isa == "amx" else 1e-6)


def test_rejects(isa):
    case = Batch(0, [2], [5])
    case.starts[0] = 99
    with pytest.raises(Exception, match="do not fit"):
        case.run(isa)
    case.starts[0], case.q = 0, np.zeros((4, 6, 20), np.float32)
    with pytest.raises(Exception, match="multiple of 8"):
        case.run(isa)

"""The kernels of training against NumPy in float64: products with codes, the head with its loss, ragged attention."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from lazulite.engine import array as mx
from lazulite.engine import cpu

FAST = 1e-2                          # of the largest: bfloat16 has 8 bits
EXACT = 5e-6
FORMATS = [(4, 32, "affine"), (8, 64, "affine"), (3, 128, "affine"), (2, 32, "affine"), (6, 16, "affine"),
           (4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")]


def packed(rng, rows, columns, bits, group, mode):
    """A format's number in steps, its arrays, and the matrix that they stand for."""
    codes = mx.quantize(mx.array(rng.standard_normal((rows, columns)), mx.float32), group, bits, mode)
    matrix = mx.dequantize(*codes, *[None] * (3 - len(codes)), group, bits, mode, dtype=mx.float32)
    number = bits if mode == "affine" else 16 + bits
    return number, [np.array(c) for c in codes], np.array(matrix, np.float64)


def error(found, wanted):
    return np.abs(found - wanted).max() / max(1e-9, np.abs(wanted).max())


@pytest.mark.parametrize("bits, group, mode", FORMATS)
@pytest.mark.parametrize("m, n", [(1, 64), (5, 200), (33, 72), (130, 300)])
def test_quantized_matmul(isa, rng, m, n, bits, group, mode):
    number, codes, matrix = packed(rng, n, 384, bits, group, mode)
    for turned, fast in np.ndindex(2, 2):
        x = rng.standard_normal((m, 384 if turned else n)).astype(np.float32)
        wanted = x @ (matrix.T if turned else matrix)
        out = np.full(wanted.shape, np.nan, np.float32)
        cpu.call("quantized_matmul", [out], [x, *codes], ints=[number, group, turned, fast], isa=isa)
        assert error(out, wanted) < (FAST if fast else EXACT)


def test_quantized_matmul_refuses(rng):
    number, codes, _ = packed(rng, 64, 64, 4, 32, "affine")
    x, out = np.zeros((2, 32), np.float32), np.zeros((2, 64), np.float32)
    with pytest.raises(RuntimeError, match="codes must be uint32"):
        cpu.call("quantized_matmul", [out], [x, *codes], ints=[number, 32, 1, 0])


def head_reference(x, targets, matrix, cap):
    scores = x.astype(np.float64) @ matrix.T
    logits = np.tanh(scores / cap) * cap if cap else scores
    lse = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) + logits.max(1, keepdims=True)
    counts, hot = targets >= 0, np.eye(len(matrix))[np.maximum(targets, 0)]
    slope = (np.exp(logits - lse) - hot) * (1 - (logits / cap) ** 2 if cap else 1)
    return np.where(counts, lse[:, 0] - (logits * hot).sum(1), 0), np.where(counts[:, None], slope, 0) @ matrix


@pytest.mark.parametrize("kind", [np.float32, np.float16, bfloat16, (4, 32, "affine"), (8, 32, "mxfp8")], ids=str)
@pytest.mark.parametrize("t, v", [(1, 40), (37, 70), (130, 2500), (600, 333), (2100, 40)])
def test_linear_cross_entropy(isa, rng, kind, t, v):
    """In chunks of rows (600), with slices of classes (2,500), and a whole chunk without targets (of 37)."""
    number, group, arrays = 0, 0, []
    if isinstance(kind, tuple):
        group = kind[1]
        number, arrays, matrix = packed(rng, v, 64, *kind)
    else:
        arrays = [(rng.standard_normal((v, 64)) * 0.3).astype(kind)]
        matrix = arrays[0].astype(np.float64)
    x, targets = rng.standard_normal((t, 64)).astype(np.float32) * 0.3, rng.integers(-1, v, t).astype(np.int32)
    targets[:t if t == 37 else 0] = -1
    for cap, fast in ((0.0, 0), (5.0, 0), (0.0, 1), (5.0, 1)):
        loss, dx = np.full(t, np.nan, np.float32), np.full(x.shape, np.nan, np.float32)
        step = dict(ints=[number, group, fast], floats=[cap], isa=isa)
        cpu.call("linear_cross_entropy", [loss, dx], [x, targets, *arrays], **step)
        wanted = head_reference(x, targets, matrix, cap)
        limit = 2 * FAST if fast else EXACT
        assert error(loss, wanted[0]) < limit and error(dx, wanted[1]) < limit
        alone = np.full(t, np.nan, np.float32)
        cpu.call("linear_cross_entropy", [alone], [x, targets, *arrays], **step)
        assert (alone == loss).all()


def test_targets_beyond_the_classes():
    x, w, loss = np.zeros((2, 4), np.float32), np.zeros((3, 4), np.float32), np.zeros(2, np.float32)
    with pytest.raises(RuntimeError, match="target 3 of row 1: there are 3 classes"):
        cpu.call("linear_cross_entropy", [loss], [x, np.array([0, 3], np.int32), w], ints=[0, 0, 0], floats=[0.0])


def ragged_reference(q, k, v, starts, counts, do, window, cap, sinks):
    """o, and the gradients of q, k, v, sequence by sequence and head by head."""
    o, dq, dk, dv = (np.zeros(a.shape) for a in (do, q, k, v))
    each = q.shape[1] // k.shape[1]
    for (start, count), h in [(s, h) for s in zip(starts, counts, strict=True) for h in range(q.shape[1])]:
        rows, g = slice(start, start + count), h // each
        scores = q[rows, h] @ k[rows, g].T * 0.3
        capped = np.tanh(scores / cap) * cap if cap else scores
        back = np.arange(count)[:, None] - np.arange(count)
        seen = (back >= 0) & (back < (window or count))
        e = np.where(seen, np.exp(capped), 0)
        p = e / (e.sum(1, keepdims=True) + (0 if sinks is None else np.exp(sinks[h])))
        o[rows, h] = p @ v[rows, g]
        ds = p * (do[rows, h] @ v[rows, g].T - (do[rows, h] * o[rows, h]).sum(1, keepdims=True)) * 0.3
        ds = ds * (1 - (capped / cap) ** 2 if cap else 1)
        dq[rows, h] += ds @ k[rows, g]
        dk[rows, g] += ds.T @ q[rows, h]
        dv[rows, g] += p.T @ do[rows, h]
    return o, dq, dk, dv


@settings(max_examples=8, deadline=None)
@given(counts=st.lists(st.integers(0, 150), min_size=1, max_size=4), heads=st.sampled_from([(1, 1), (6, 2), (3, 3)]),
       d=st.sampled_from([8, 20, 64]), window=st.sampled_from([0, 1, 70]), cap=st.sampled_from([0.0, 2.0]),
       sinks=st.booleans(), gap=st.integers(0, 3))
def test_ragged_attention(isa, counts, heads, d, window, cap, sinks, gap):
    rng = np.random.default_rng(sum(counts))
    starts = np.concatenate([[0], np.cumsum(np.array(counts) + gap)[:-1]])
    t = int(starts[-1] + counts[-1] + gap + 1)
    q, k, v, do = (rng.standard_normal((t, h, n)).astype(np.float32) for h, n in zip(
        (heads[0], heads[1], heads[1], heads[0]), (d, d, d + 4, d + 4), strict=True))
    sink = rng.standard_normal(heads[0]).astype(np.float32) if sinks else None
    where = [starts.astype(np.int32), np.array(counts, np.int32)]
    o, lse = np.full(do.shape, np.nan, np.float32), np.full((t, heads[0]), np.nan, np.float32)
    cpu.call("ragged_attention_lse", [o, lse], [q, k, v, *where, *[sink] * sinks], ints=[window, int(sinks)],
             floats=[0.3, cap], isa=isa)
    found = [np.full(a.shape, np.nan, np.float32) for a in (q, k, v)]
    cpu.call("ragged_attention_grad", found, [q, k, v, *where, o, lse, do, np.zeros_like(lse)], ints=[window, 0],
             floats=[0.3, cap], isa=isa)
    wanted = ragged_reference(*(a.astype(np.float64) for a in (q, k, v)), starts, counts, do, window, cap, sink)
    for a, b in zip((o, *found), wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("starts, counts", [([0, 2], [3, 1]), ([0], [9]), ([-1], [2])])
def test_sequences_outside(starts, counts):
    q = np.zeros((4, 1, 8), np.float32)
    with pytest.raises(RuntimeError, match="ragged_attention"):
        cpu.call("ragged_attention_lse", [q.copy(), np.zeros((4, 1), np.float32)],
                 [q, q, q, np.array(starts, np.int32), np.array(counts, np.int32)], ints=[0, 0], floats=[1.0, 0.0])


@pytest.mark.parametrize("m, k, n", [(1024, 576, 8), (33, 100, 5), (576, 1000, 16), (7, 3000, 9)])
def test_thin_products(isa, rng, m, k, n):
    """A few columns: each row of a is read once; under a transpose the roles are exchanged."""
    a, b = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)
    for left, right in ((a, b), (a, np.asfortranarray(b)), (np.asfortranarray(a), b)):
        out = np.full((m, n), np.nan, np.float32)
        cpu.call("matmul", [out], [left, right], isa=isa)
        assert error(out, a.astype(np.float64) @ b) < EXACT

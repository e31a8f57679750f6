"""Rows for the ops that training adds: attention of packed rows, the head with its loss, quantized products."""
from __future__ import annotations

import numpy as np
from cases import Case, Input
from cases_fast import cross_entropy, softmax

from lazulite.engine import array as mx
from lazulite.engine.array import linear_cross_entropy as heads
from lazulite.engine.array import ragged

STARTS, COUNTS = np.array([0, 3, 3, 4], np.int32), np.array([3, 0, 1, 5], np.int32)  # of 11 tokens, 2 are nobody's
TARGETS = np.array([2, -1, 0, 4, -1], np.int32)
RNG = np.random.default_rng(0)
MATRIX = RNG.standard_normal((64, 64)).astype(np.float32)


def visible(t, window):
    """(T, T): which keys each token sees."""
    owner = np.full(t, -1)
    for b, (start, count) in enumerate(zip(STARTS, COUNTS, strict=True)):
        owner[start:start + count] = b
    back = np.arange(t)[:, None] - np.arange(t)
    return (owner[:, None] == owner) & (owner >= 0) & (back >= 0) & (back < (window or t))


def ragged_attention(window=0, softcap=0.0):
    """Token by token."""
    def reference(q, k, v, sinks=None):
        (t, h, _), heads_, seen = q.shape, k.shape[1], visible(len(q), window)
        out = np.zeros((t, h, v.shape[2]))
        for i, head in np.ndindex(t, h):
            if not seen[i].any():
                continue
            scores = k[seen[i], head * heads_ // h] @ q[i, head] * 0.5
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            p = softmax(np.concatenate([scores, [] if sinks is None else [sinks[head]]]))
            out[i, head] = p[:len(scores)] @ v[seen[i], head * heads_ // h]
        return out

    def fn(q, k, v, sinks=None):
        return mx.fast.ragged_attention(q, k, v, mx.array(STARTS), mx.array(COUNTS), scale=0.5, window=window,
                                        softcap=softcap, sinks=sinks)

    return fn, reference


def ragged_grad(q, k, v, o, lse, do, dlse):
    """As many heads of k as of q."""
    s = np.einsum("ihd,jhd->hij", q, k) * 0.5
    p = np.where(visible(len(q), 0), np.exp(np.minimum(s - lse.T[..., None], 50)), 0)
    ds = p * (np.einsum("ihd,jhd->hij", do, v) - ((do * o).sum(-1) - dlse).T[..., None]) * 0.5
    return (np.einsum("hij,jhd->ihd", ds, k), np.einsum("hij,ihd->jhd", ds, q), np.einsum("hij,ihd->jhd", p, do))


def head_loss(x, w, softcap=0.0):
    logits = x @ w.T
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    return np.where(TARGETS >= 0, cross_entropy(logits, np.maximum(TARGETS, 0)), 0)


def head_gradient(x, w):
    slope = softmax(x @ w.T) - np.eye(len(w))[np.maximum(TARGETS, 0)]
    return head_loss(x, w), np.where(TARGETS[:, None] >= 0, slope @ w, 0)


def quantized_product(transpose, bits):
    codes = mx.quantize(mx.array(MATRIX), 32, bits)
    matrix = np.array(mx.dequantize(*codes, 32, bits), np.float64)

    def fn(x):
        with mx.fast.precise():
            return mx.quantized_matmul(x, *codes, transpose=transpose, group_size=32, bits=bits)

    return fn, lambda x: x @ (matrix.T if transpose else matrix)


def quantized_head(x):
    codes = mx.quantize(mx.array(MATRIX), 32, 4)
    with mx.fast.precise():
        return mx.fast.linear_cross_entropy(x, mx.array(TARGETS), *codes, group_size=32, bits=4)


QKV, GROUPED = ((11, 2, 4),) * 3, ((11, 4, 4), (11, 2, 4), (11, 2, 3))
HEAD = dict(group_size=0, bits=0, softcap=0.0, precise=True)

CASES = [
    Case("ragged_attention", *ragged_attention(), QKV, empty=False),
    Case("ragged_attention window", *ragged_attention(window=2), GROUPED, empty=False),
    Case("ragged_attention softcap", *ragged_attention(softcap=0.7), GROUPED, empty=False),
    Case("ragged_attention sinks", *ragged_attention(window=3, softcap=2.0), (*GROUPED, (4,)), empty=False),
    Case("ragged_attention_grad", lambda q, k, v, *rest: ragged.ragged_attention_grad(
        q, k, v, mx.array(STARTS), mx.array(COUNTS), *rest, scale=0.5, window=0, softcap=0.0),
        ragged_grad, (*QKV, QKV[0], Input((11, 2), "positive"), QKV[0], (11, 2)), half=False, empty=False),
    Case("linear_cross_entropy", lambda x, w: mx.fast.linear_cross_entropy(x, mx.array(TARGETS), w), head_loss,
         ((5, 6), (7, 6)), half=False),
    Case("linear_cross_entropy softcap",
         lambda x, w: mx.fast.linear_cross_entropy(x, mx.array(TARGETS), w, softcap=0.8),
         lambda x, w: head_loss(x, w, 0.8), ((5, 6), (7, 6)), half=False),
    Case("linear_cross_entropy_grad", lambda x, w: heads.linear_cross_entropy_grad(
        x, mx.array(TARGETS), w, None, None, **HEAD), head_gradient, ((5, 6), (7, 6)), half=False),
    Case("linear_cross_entropy quantized", quantized_head,
         lambda x: head_loss(x, np.array(mx.dequantize(*mx.quantize(mx.array(MATRIX), 32, 4), 32, 4))), ((5, 64),),
         half=False),
    Case("quantized_matmul precise", *quantized_product(True, 4), ((3, 64),)),
    Case("quantized_matmul back", *quantized_product(False, 3), ((2, 3, 64),)),
]

"""Rows for the fused ops of mx.fast: each against its formula in NumPy."""
from __future__ import annotations

import numpy as np
from cases import Case, Input

from lazulite.engine import array as mx
from lazulite.engine.array import attention as dense
from lazulite.engine.array import norms


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x, w=1.0):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w


def layer_norm(x, w=1.0, b=0.0):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + b


def cross_entropy(x, t):
    top = x.max(-1, keepdims=True)
    lse = np.log(np.exp(x - top).sum(-1)) + top[..., 0]
    return lse - np.take_along_axis(x, t[..., None].astype(int), -1)[..., 0]


def rope(x, dims, traditional, offset, freqs=None, base=100.0, scale=0.5):
    """x (B, H, T, D) as pairs of real and imaginary parts, turned by complex factors."""
    wavelengths = base ** (np.arange(0, dims, 2) / dims) if freqs is None else freqs
    positions = np.reshape(offset, (-1, 1, 1)) + np.arange(x.shape[-2])[:, None]
    factor = np.exp(1j * scale * positions / wavelengths)[:, None]
    part = x[..., :dims]
    pairs = part[..., ::2] + 1j * part[..., 1::2] if traditional else part[..., :dims // 2] + 1j * part[..., dims // 2:]
    pairs = pairs * factor
    joined = np.stack([pairs.real, pairs.imag], -1).reshape(part.shape) if traditional else np.concatenate(
        [pairs.real, pairs.imag], -1)
    return np.concatenate([joined, x[..., dims:]], -1)


def attention(q, k, v, mask=None, sinks=None, causal=False):
    """Query by query."""
    (b, h, t, _), (_, heads, s, e) = q.shape, v.shape
    out, mask = np.zeros((b, h, t, e)), None if mask is None else np.broadcast_to(mask, (b, h, t, s))
    for at in np.ndindex(b, h, t):
        i, head, row = at
        scores = k[i, head * heads // h] @ q[at] * 0.5
        if causal:
            scores = np.where(np.arange(s) <= row + s - t, scores, -np.inf)
        if mask is not None:
            scores = np.where(mask[at], scores, -np.inf) if mask.dtype == bool else scores + mask[at]
        extra = [] if sinks is None else [sinks[head]]
        p = softmax(np.concatenate([scores, extra]))
        out[at] = p[:s] @ v[i, head * heads // h]
    return out


def norm_grad(centre):
    def reference(x, dy, w):
        centred = x - x.mean(-1, keepdims=True) * centre
        r = 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
        n, g = centred * r, dy * w
        dx = r * (g - centre * g.mean(-1, keepdims=True) - n * (g * n).mean(-1, keepdims=True))
        return dx, (dy * n).sum((0, 1)), *[dy.sum((0, 1))] * centre

    return reference


def cross_entropy_grad(x, t, lse, dlse, dpicked):
    return np.exp(x - lse[..., None]) * dlse[..., None] + np.eye(x.shape[-1])[t.astype(int)] * dpicked[..., None]


def attention_grad(q, k, v, o, lse, do, dlse):
    """As many heads of k as of q, no mask."""
    p = np.exp(0.5 * q @ k.swapaxes(-1, -2) - lse[..., None])
    ds = p * (do @ v.swapaxes(-1, -2) - (do * o).sum(-1, keepdims=True) + dlse[..., None]) * 0.5
    return ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ do


def attend(causal=False, mask=None):
    def fn(q, k, v, *rest):
        given = dict(zip(("mask", "sinks"), rest, strict=False)) if mask is None else {"mask": mx.array(mask)}
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5, **({"mask": "causal"} if causal else given))

    return fn


QKV, GROUPED = ((2, 2, 5, 4),) * 3, ((1, 4, 3, 4), (1, 2, 5, 4), (1, 2, 5, 3))
SEEN = np.tril(np.ones((3, 5), bool), 1)
TARGETS = Input((2, 3), "int", 0, 5)
X, C = (2, 3, 6), (6,)

CASES = [
    Case("softmax last", lambda x: mx.softmax(x, -1), softmax, (X,)),
    Case("rms_norm", lambda x, w: mx.fast.rms_norm(x, w, 1e-5), rms_norm, (X, C)),
    Case("rms_norm plain", lambda x: mx.fast.rms_norm(x, None, 1e-5), rms_norm, (X,)),
    Case("rms_norm vector", lambda x, w: mx.fast.rms_norm(x, w, 1e-5), rms_norm, ((17,), (17,))),
    Case("layer_norm", lambda x, w, b: mx.fast.layer_norm(x, w, b, 1e-5), layer_norm, (X, C, C)),
    Case("layer_norm plain", lambda x: mx.fast.layer_norm(x, None, None, 1e-5), layer_norm, (X,)),
    Case("layer_norm weight", lambda x, w: mx.fast.layer_norm(x, w, None, 1e-5), layer_norm, ((4, 33), (33,))),
    Case("fast.cross_entropy", mx.fast.cross_entropy, cross_entropy, ((2, 3, 5), TARGETS), half=False),
    Case("rope", lambda x: mx.fast.rope(x, 4, traditional=False, base=100.0, scale=0.5, offset=3),
         lambda x: rope(x, 4, False, 3), ((2, 2, 3, 6),)),
    Case("rope traditional",
         lambda x: mx.fast.rope(x, 6, traditional=True, base=100.0, scale=0.5, offset=mx.array([1, 7])),
         lambda x: rope(x, 6, True, [1, 7]), ((2, 2, 3, 6),)),
    Case("rope freqs", lambda x, f: mx.fast.rope(x, 6, traditional=False, base=None, scale=0.5, offset=2, freqs=f),
         lambda x, f: rope(x, 6, False, 2, f), ((1, 2, 3, 6), Input((3,), "positive")), half=False, vmap=False),
    Case("attention", attend(), attention, QKV),
    Case("attention causal", attend(causal=True), lambda q, k, v: attention(q, k, v, causal=True), GROUPED),
    Case("attention seen", attend(mask=SEEN), lambda q, k, v: attention(q, k, v, SEEN), GROUPED),
    Case("attention mask and sinks", attend(), attention, (*GROUPED, (4, 1, 5), (4,))),
    Case("attention blocks", attend(causal=True), lambda q, k, v: attention(q, k, v, causal=True),
         ((1, 2, 70, 4), (1, 1, 131, 4), (1, 1, 131, 5)), grad=False, vmap=False),
    Case("softmax_grad", norms.softmax_grad, lambda y, dy: y * (dy - (y * dy).sum(-1, keepdims=True)), (X, X)),
    Case("rms_norm_grad", lambda x, dy, w: norms.rms_norm_grad(x, dy, w, 1e-5), norm_grad(0), (X, X, C)),
    Case("layer_norm_grad", lambda x, dy, w: norms.layer_norm_grad(x, dy, w, 1e-5), norm_grad(1), (X, X, C),
         half=False),
    Case("cross_entropy_grad", norms.cross_entropy_grad, cross_entropy_grad,
         ((2, 3, 5), TARGETS, (2, 3), (2, 3), (2, 3))),
    Case("attention_grad", lambda q, k, v, *rest: dense.attention_grad(q, k, v, None, *rest, scale=0.5, causal=False),
         attention_grad, (*QKV, QKV[0], (2, 2, 5), QKV[0], (2, 2, 5)), half=False),
]

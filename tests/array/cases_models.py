"""Cases of what language models need: quantized weights, the paged cache, experts, sampling."""
import mlx.core as mlx
import numpy as np
from cases import Case, Input

from lazulite.engine import array as mx
from lazulite.engine.array.experts import experts

PACKED = (Input((5, 8), "int", 0, 1 << 32, "uint32"), (5, 2), (5, 2))     # 64 columns of 4 bits in groups of 32
PAGES, T, H, K, D, P = 3, 4, 4, 2, 8, 4
CACHE = (PAGES, K, D, P), (PAGES, K, P, D)
POSITIONS, SLOTS, FREQUENCIES = np.array([0, 1, 2, 5]), np.array([0, 1, 6, 11]), np.array([1.0, 0.5, 0.1, 0.02])
TABLE, STARTS, COUNTS, LENGTHS = np.array([[2, 0], [1, -1]]), np.array([0, 3]), np.array([3, 1]), np.array([6, 2])
CHOSEN = np.array([[0, 2], [1, 2], [2, 0]])


def ints(x):
    return mx.array(x, mx.int32)


def dequantized(w, scales, biases):
    codes = (w[..., None] >> np.arange(0, 32, 4) & 15).reshape(*scales.shape, -1)
    return (codes * scales[..., None] + biases[..., None]).reshape(*scales.shape[:-1], -1)


def quantized(w):
    return tuple(np.array(a) for a in mlx.quantize(mlx.array(w.astype("float32")), group_size=32, bits=4))


def rotated(x):
    angle = (POSITIONS[:, None] * FREQUENCIES)[:, None]
    (first, second), cos, sin = np.split(x, 2, -1), np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def appended(q, k, v, k_pages, v_pages):
    k_pages, v_pages = k_pages.copy(), v_pages.copy()
    for token, slot in enumerate(SLOTS):
        k_pages[slot // P, :, :, slot % P] = rotated(k)[token]
        v_pages[slot // P, :, slot % P] = v[token]
    return rotated(q), k_pages, v_pages


def attended(q, k_pages, v_pages):
    """Row by row: the keys of its sequence up to its own position."""
    out = np.zeros_like(q)
    for pages, start, count, length in zip(TABLE, STARTS, COUNTS, LENGTHS, strict=True):
        used = pages[pages >= 0]
        keys, values = np.concatenate(k_pages[used], 2), np.concatenate(v_pages[used], 1)
        for row in range(start, start + count):
            seen = length - count + row - start + 1
            for head in range(H):
                scores = q[row, head] @ keys[head // (H // K), :, :seen] * 0.5
                weights = np.exp(scores - scores.max())
                out[row, head] = weights / weights.sum() @ values[head // (H // K), :seen]
    return out


def mixed(x, share, gate, up, down):
    out = np.zeros_like(x)
    for t, chosen in enumerate(CHOSEN):
        for j, e in enumerate(chosen):
            h = gate[e] @ x[t]
            out[t] += share[t, j] * (down[e] @ (h / (1 + np.exp(-h)) * (up[e] @ x[t])))
    return out


RECURRENT = np.array([[1, 3], [0, 3], [3, 2], [3, 5]])  # slots, starts, counts, lengths: a new sequence, an old one


def convolved(x, weight, states):
    y, after, past = np.zeros_like(x), states.copy(), states.shape[1]
    for slot, start, count, length in RECURRENT.T:
        tokens = np.concatenate([states[slot] * (count != length), x[start:start + count]])
        for i in range(count):
            total = (tokens[i:i + past + 1] * weight.T).sum(0)
            y[start + i] = total / (1 + np.exp(-total))
        after[slot] = tokens[count:]
    return y, after


def delta(q, k, v, decay, rate, states):
    unit = lambda x: x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)  # noqa: E731
    o, after = np.zeros_like(v), states.copy()
    for slot, start, count, length in RECURRENT.T:
        for h in range(v.shape[1]):
            state = states[slot, h] * (count != length)
            for t in range(start, start + count):
                key = unit(k[t, h // 2])
                state = state * np.exp(-decay[t, h])
                state = state + np.outer(key, rate[t, h] * (v[t, h] - key @ state))
                o[t, h] = unit(q[t, h // 2]) * 0.5 @ state
            after[slot, h] = state
    return o, after


def greedy(shape):
    params = np.zeros((shape[0], 6), "float32")
    params[:, [1, 3]] = 1                                  # top_p and repetition that change nothing, temperature 0
    return params


CASES = [
    Case("short_conv", lambda *a: mx.fast.short_conv(*a, *map(ints, RECURRENT)), convolved,
         ((6, 5), (5, 3), (4, 2, 5)), half=False, empty=False, vmap=False),
    Case("gated_delta", lambda q, k, v, decay, *a: mx.fast.gated_delta(q, k, v, -decay, *a, *map(ints, RECURRENT),
                                                                      scale=0.5), delta,
         ((6, 1, 3), (6, 1, 3), (6, 2, 4), Input((6, 2), "positive"), (6, 2), (4, 2, 3, 4)), half=False, empty=False,
         vmap=False),
    Case("quantize", lambda w: mx.quantize(w, 32, 4), quantized, ((3, 64),), grad=False, empty=False),
    Case("dequantize", lambda *w: mx.dequantize(*w, group_size=32, bits=4), dequantized, PACKED, empty=False),
    Case("quantized_matmul", lambda x, *w: mx.quantized_matmul(x, *w, group_size=32, bits=4),
         lambda x, *w: x @ dequantized(*w).T, ((3, 64), *PACKED), tolerance=1e-2, empty=False),     # kernels round x
    Case("quantized_take", lambda i, *w: mx.quantized_take(*w, i, 32, 4), lambda i, *w: dequantized(*w)[i],
         (Input((2, 3), "int", 0, 5), *PACKED), half=False, empty=False),
    Case("rope_append", lambda *a: mx.fast.rope_append(*a, ints(POSITIONS), ints(SLOTS), mx.array(FREQUENCIES)),
         appended, ((T, H, D), (T, K, D), (T, K, D), *CACHE), half=False, empty=False, grad=False),
    Case("paged_attention",
         lambda *a: mx.fast.paged_attention(*a, *map(ints, (TABLE, STARTS, COUNTS, LENGTHS)), scale=0.5), attended,
         ((T, H, D), *CACHE), half=False, empty=False, grad=False),
    Case("experts", lambda x, share, *w: experts(x, ints(CHOSEN), share, *((a,) for a in w)), mixed,
         ((3, 8), (3, 2), (3, 6, 8), (3, 6, 8), (3, 8, 6)), half=False, empty=False, grad=False),
    Case("sample", lambda x: mx.fast.sample(x, mx.array(greedy(x.shape)), mx.zeros((x.shape[0], 11), mx.int32),
                                            *[mx.zeros((1, 1), dtype) for dtype in (mx.int32, mx.int32, mx.float32)],
                                            mx.zeros((x.shape[0], 1), mx.uint32))[:2],
         lambda x: (x.argmax(-1), x.max(-1) - np.log(np.exp(x).sum(-1))), (Input((2, 9), "distinct"),),
         grad=False, vmap=False, half=False, empty=False),
]

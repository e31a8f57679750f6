"""Rotary positions and attention as MLX's `mx.fast` has them: dense, with a batch axis."""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from . import ops
from .array import Array
from .dtypes import bool_, float32, int32
from .fused import Given, Gradients, fused, inexact, match, require, wide, wide_dtype
from .node import Aval, Node, Value, show
from .operands import array_of, broadcast_shapes
from .primitives import unbroadcast

if TYPE_CHECKING:
    from .lowering import Lowering

Arrays = dict[str, Array]


# rotary positions

def _rotate_rule(given: Given, **_: Any) -> list[Aval]:
    match("rotate", given, x="T H D", positions="T", inv_freq="F")
    require("rotate", given, int32, "positions")
    check_rotary("rotate", given["x"], given["inv_freq"])
    return [(given["x"].shape, given["x"].dtype)]


def check_rotary(name: str, x: Value, inv_freq: Value) -> None:
    if 2 * inv_freq.shape[0] > x.shape[-1]:
        raise ValueError(f"[{name}] inv_freq {show(inv_freq.shape)}: {x.shape[-1] // 2} pairs in a head at most")


def _lower_rotate(lo: Lowering, node: Node, given: Given) -> None:
    x = lo.rows(given["x"], 1)
    rest = [lo.contiguous(given[a]) for a in ("positions", "inv_freq")]
    p = node.params
    lo.step("rope", [lo.result(node.values()[0])], [x, *rest], [int(p["interleaved"])], [p["scale"]])


def _rotate_vjp(cts: list[Array], given: Arrays, ys: list[Array], **params: Any) -> Gradients:
    """Turns back."""
    x, positions, inv_freq = given.values()
    return {"x": rotate(cts[0].astype(x.dtype), -positions, inv_freq, **params), "positions": None}


@fused("x positions inv_freq", _rotate_rule, _lower_rotate, lambda given, **_: given["x"].dtype is float32,
       kernel="rope", vjp=_rotate_vjp)
def rotate(x: Array, positions: Array, inv_freq: Array, *, interleaved: bool = False, scale: float = 1.0) -> Array:
    """Rotates the first R of D of x (T,H,D) by positions (T) i32 * inv_freq (R/2): pairs are (i, i + R/2), or
    (2i, 2i + 1) if interleaved. scale multiplies cos and sin (the attention factor of some rotary kinds)."""
    half = inv_freq.shape[0]
    angle = ops.expand_dims(ops.expand_dims(positions, 1) * inv_freq, 1)
    cos, sin = ops.cos(angle) * scale, ops.sin(angle) * scale
    part = x[..., :2 * half]
    first, second = (part[..., ::2], part[..., 1::2]) if interleaved else (part[..., :half], part[..., half:])
    turned = first * cos - second * sin, second * cos + first * sin
    joined = [ops.reshape(ops.stack(turned, -1), (*x.shape[:-1], 2 * half))] if interleaved else list(turned)
    return ops.concatenate([*(j.astype(x.dtype) for j in joined), x[..., 2 * half:]], -1)


def rope(a: Array, dims: int, *, traditional: bool, base: float | None, scale: float, offset: int | Array,
         freqs: Array | None = None) -> Array:
    """Rotates the first `dims` channels of a (B, …, T, D) at positions scale * (offset + 0 … T-1); offset may differ
    for each of the batch (B). The wavelengths are base^(2i/dims), or freqs (dims/2). Pairs are halves, or neighbours if
    traditional."""
    if (base is None) == (freqs is None):
        raise ValueError("[rope] base and freqs: one of them wanted, the other None")
    if a.ndim < 3 or dims > a.shape[-1] or dims % 2:
        raise ValueError(f"[rope] a {show(a.shape)}, dims {dims}: axes (B, …, T, D) and an even dims <= D wanted")
    inv_freq = scale / freqs if freqs is not None else array_of(
        (scale * float(base or 0) ** (-np.arange(0, dims, 2) / dims)).astype(np.float32))
    batch, t, d, heads = a.shape[0], a.shape[-2], a.shape[-1], math.prod(a.shape[1:-2])
    start, steps = array_of(offset).astype(int32), ops.arange(t, dtype=int32)
    if start.size == 1:
        by_token = ops.transpose(ops.reshape(a, (batch * heads, t, d)), (1, 0, 2))
        turned = rotate(by_token, ops.reshape(start, (1,)) + steps, inv_freq, interleaved=traditional)
        return ops.reshape(ops.transpose(turned, (1, 0, 2)), a.shape)
    if start.shape != (batch,):
        raise ValueError(f"[rope] offset {show(start.shape)}: a scalar or {show((batch,))} wanted")
    positions = ops.flatten(ops.expand_dims(start, 1) + steps)
    by_token = ops.swapaxes(ops.reshape(a, (batch, heads, t, d)), 1, 2)
    turned = rotate(ops.reshape(by_token, (batch * t, heads, d)), positions, inv_freq, interleaved=traditional)
    return ops.reshape(ops.swapaxes(ops.reshape(turned, (batch, t, heads, d)), 1, 2), a.shape)


# scaled dot product attention. Between the directions it keeps the log-sum-exp of each row of scores, not the scores.

def _attention_rule(given: Given, **_: Any) -> list[Aval]:
    name = "scaled_dot_product_attention"
    sizes = match(name, given, q="B H T D", k="B K S D", v="B K S E", sinks="H", o="B H T E", lse="B H T",
                  do="B H T E", dlse="B H T")
    inexact(name, given, *(given.keys() - {"mask"}))
    q, scores = given["q"], (sizes["B"], sizes["H"], sizes["T"], sizes["S"])
    if sizes["H"] % max(1, sizes["K"]):
        raise ValueError(f"[{name}] q has {sizes['H']} heads, k {sizes['K']}: not a multiple")
    if "mask" in given and broadcast_shapes(given["mask"].shape, scores, name=name) != scores:
        raise ValueError(f"[{name}] mask {show(given['mask'].shape)} does not broadcast to {show(scores)}")
    if "do" in given:
        like = [(given[a].shape, given[a].dtype) for a in ("q", "k", "v")]
        return [*like, (scores, wide_dtype(q))] if _additive(given) else like
    return [((*q.shape[:-1], sizes["E"]), q.dtype), (q.shape[:-1], wide_dtype(q))]


def _additive(given: Given) -> bool:
    return "mask" in given and given["mask"].dtype is not bool_


def _lower_attention(lo: Lowering, node: Node, given: Given) -> None:
    """Results lie as (B, T, H, D), which is how the layers around attention see them."""
    outs = []
    for value in node.values():
        if len(value.shape) == 4:
            b, h, t, d = value.shape
            memory = lo.new((b, t, h, d), value.dtype)
            view = memory.moved(value.shape, (t * h * d, d, h * d, 1))
            lo.place(value, view)
            outs.append(view)
        else:
            outs.append(lo.result(value))
    p = node.params
    lo.step(node.primitive.kernel, outs, [lo.rows(v, 1) for v in given.values()], [int(p["causal"])], [p["scale"]])


def _kernel_attention(given: Given, causal: bool, **_: Any) -> bool:
    plain = all(v.dtype is float32 and 0 not in v.shape for v in given.values())
    return plain and given.keys().isdisjoint({"mask", "sinks"}) and (
        not causal or given["q"].shape[2] <= given["k"].shape[2])


def _scores(q: Array, k: Array, mask: Array | None, scale: float, causal: bool) -> Array:
    """(B,H,T,S), the lowest number where a key is not seen."""
    (b, h, t, d), (_, heads, s, _) = q.shape, k.shape
    grouped = ops.reshape(wide(q) * scale, (b, heads, h // max(1, heads) * t, d))
    scores = ops.reshape(grouped @ ops.swapaxes(wide(k), -1, -2), (b, h, t, s))
    low = float(np.finfo(scores.dtype.numpy).min)
    if causal:
        scores = ops.where(ops.arange(s) <= ops.expand_dims(ops.arange(t), 1) + (s - t), scores, low)
    if mask is None:
        return scores
    return ops.where(mask, scores, low) if mask.dtype is bool_ else scores + mask


@fused("q k v mask o lse do dlse", _attention_rule, _lower_attention, _kernel_attention)
def attention_grad(q: Array, k: Array, v: Array, mask: Array | None, o: Array, lse: Array, do: Array, dlse: Array, *,
                   scale: float, causal: bool) -> tuple[Array, ...]:
    """The gradients of q, k, v (and of an additive mask before its broadcast) of attention_lse, whose results o and lse
    have the gradients do and dlse."""
    (b, h, t, _), heads = q.shape, k.shape[1]
    p = ops.exp(_scores(q, k, mask, scale, causal) - ops.expand_dims(lse, -1))
    grouped = lambda x: ops.reshape(wide(x), (b, heads, h // max(1, heads) * t, x.shape[-1]))  # noqa: E731
    dp = ops.reshape(grouped(do) @ ops.swapaxes(wide(v), -1, -2), p.shape)
    ds = p * (dp - ops.expand_dims(_delta(o, do, dlse), -1))
    dq = ops.reshape(grouped(ds) @ wide(k) * scale, q.shape)
    dk = ops.swapaxes(grouped(ds), -1, -2) @ grouped(q) * scale
    dv = ops.swapaxes(grouped(p), -1, -2) @ grouped(do)
    gradients = dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
    return (*gradients, ds) if mask is not None and mask.dtype is not bool_ else gradients


def _delta(o: Array, do: Array, dlse: Array) -> Array:
    """What a row's scores have in common: the gradient of score s is p (gradient of p - delta)."""
    return ops.sum(wide(do) * wide(o), -1) - dlse


def _attention_vjp(cts: list[Array], given: Arrays, ys: list[Array], **params: Any) -> Gradients:
    (do, dlse), (o, lse) = cts, ys
    names = ("q", "k", "v", "mask")
    found = attention_grad(*(given.get(a) for a in names), o, lse, do, dlse, **params)
    gradients: Gradients = dict(zip(names, found, strict=False))
    if len(found) == 4:
        gradients["mask"] = unbroadcast(found[3], given["mask"].shape)
    if "sinks" in given:
        sink = ops.exp(ops.reshape(given["sinks"], (1, -1, 1)) - lse)
        gradients["sinks"] = -ops.sum(sink * _delta(o, do, dlse), (0, 2))
    return gradients


@fused("q k v mask sinks", _attention_rule, _lower_attention, _kernel_attention, vjp=_attention_vjp)
def attention_lse(q: Array, k: Array, v: Array, mask: Array | None, sinks: Array | None, *, scale: float,
                  causal: bool) -> tuple[Array, Array]:
    """softmax(scale q (B,H,T,D) kᵀ (B,K,S,D) + mask) v (B,K,S,E) and the log-sum-exp (B,H,T) of the scores. The softmax
    is taken in float32. sinks (H): one more score a head, without a value."""
    (b, h, t, _), (_, heads, s, e) = q.shape, v.shape
    scores = _scores(q, k, mask, scale, causal)
    if not s:
        return ops.zeros((b, h, t, e), q.dtype), ops.zeros((b, h, t), scores.dtype)
    top = ops.max(scores, -1, keepdims=True)
    sink = None if sinks is None else ops.reshape(wide(sinks), (1, h, 1, 1))
    top = top if sink is None else ops.maximum(top, sink)
    p = ops.exp(scores - top)
    total = ops.sum(p, -1, keepdims=True) + (0.0 if sink is None else ops.exp(sink - top))
    p = ops.reshape(p / total, (b, heads, h // max(1, heads) * t, s))
    out = ops.reshape(p @ wide(v), (b, h, t, e))
    return out.astype(q.dtype), ops.squeeze(ops.log(total) + top, -1)


def scaled_dot_product_attention(q: Array, k: Array, v: Array, *, scale: float, mask: str | Array | None = None,
                                 sinks: Array | None = None, force_fused: bool = False) -> Array:
    """softmax(scale q kᵀ + mask) v for q (B,H,T,D), k (B,K,S,D) and v (B,K,S,E), K a divisor of H. mask: "causal" (the
    last query sees the last key), a bool array of what is seen, or one that is added; it broadcasts to (B,H,T,S).
    sinks (H): one more score a head, without a value. force_fused: accepted as in MLX."""
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(f"[scaled_dot_product_attention] mask {mask!r}: 'causal', an array or None wanted")
    causal = isinstance(mask, str)
    return attention_lse(q, k, v, None if causal else mask, sinks, scale=scale, causal=causal)[0]  # type: ignore[arg-type]


def gated_delta_update(q: Array, k: Array, v: Array, gamma: Array, beta: Array, initial_state: Array | None = None,
                       mask: Array | None = None) -> list[Array]:
    """The gated delta rule, token by token, for q, k (B,T,K,D), v (B,T,H,E), decays gamma and rates beta (B,T,H), K a
    divisor of H; states S are (B,H,E,D) in float32, zeros at first:

        S = gamma S + beta (v - gamma S k) kᵀ, o = S q

    mask (B,T): tokens that count; the others leave the state alone and give 0. Returns o (B,T,H,E) and the last state.
    Yang et al. 2024, arXiv:2412.06464."""
    (b, t, heads, d), (h, e), dtype = k.shape, v.shape[2:], v.dtype
    given = {"q": q._value, "k": k._value, "v": v._value, "gamma": gamma._value, "beta": beta._value}
    match("gated_delta_update", given, q="B T K D", k="B T K D", v="B T H E", gamma="B T H", beta="B T H")
    if h % max(1, heads):
        raise ValueError(f"[gated_delta_update] v has {h} heads, k {heads}: not a multiple")
    state = ops.zeros((b, h, e, d)) if initial_state is None else wide(initial_state)
    q, k = (ops.repeat(wide(x), h // max(1, heads), 2) for x in (q, k))
    v, gamma, beta = wide(v), ops.expand_dims(wide(gamma), (-2, -1)), ops.expand_dims(wide(beta), -1)
    outs = []
    for i in range(t):
        kept, key = gamma[:, i] * state, ops.expand_dims(k[:, i], -2)
        change = beta[:, i] * (v[:, i] - ops.sum(kept * key, -1))
        new = kept + ops.expand_dims(change, -1) * key
        out = ops.sum(new * ops.expand_dims(q[:, i], -2), -1)
        if mask is not None:
            counts = ops.reshape(mask[:, i], (b, 1, 1))
            out, new = ops.where(counts, out, 0.0), ops.where(ops.expand_dims(counts, -1), new, state)
        state = new
        outs.append(out)
    return [ops.stack(outs, 1).astype(dtype), state]

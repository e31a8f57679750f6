"""Attention of packed rows without a cache, for training: T tokens of any number of sequences, one after another."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import ops
from .array import Array
from .dtypes import float32, int32
from .fused import Given, Gradients, fused, inexact, match, require, wide, wide_dtype
from .node import Aval, Node

if TYPE_CHECKING:
    from .lowering import Lowering

Arrays = dict[str, Array]
NOBODY = 1e30                        # the log-sum-exp of a token of no sequence: all its probabilities are 0
SHAPES = {"q": "T H D", "k": "T K D", "v": "T K E", "starts": "B", "counts": "B", "sinks": "H", "o": "T H E",
          "lse": "T H", "do": "T H E", "dlse": "T H"}


def _ragged_rule(given: Given, **_: Any) -> list[Aval]:
    name = "ragged_attention"
    sizes = match(name, given, **{a: SHAPES[a] for a in given})
    require(name, given, int32, "starts", "counts")
    inexact(name, given, *(given.keys() - {"starts", "counts"}))
    if sizes["H"] % max(1, sizes["K"]):
        raise ValueError(f"[{name}] q has {sizes['H']} heads, k {sizes['K']}: not a multiple")
    if "do" in given:
        return [(given[a].shape, given[a].dtype) for a in ("q", "k", "v")]
    q = given["q"]
    return [((*q.shape[:2], sizes["E"]), q.dtype), (q.shape[:2], wide_dtype(q))]


def _lower_ragged(lo: Lowering, node: Node, given: Given) -> None:
    p, outs = node.params, [lo.result(v) for v in node.values()]
    views = [lo.rows(v, 1) if len(v.shape) == 3 else lo.contiguous(v) for v in given.values()]
    lo.step(node.primitive.kernel, outs, views, [p["window"], int("sinks" in given)], [p["scale"], p["softcap"]])


def _kernel_ragged(given: Given, **_: Any) -> bool:
    return all(v.dtype in (float32, int32) and 0 not in v.shape for v in given.values())


def _scores(q: Array, k: Array, starts: Array, counts: Array, scale: float, window: int, softcap: float,
            ) -> tuple[Array, Array]:
    """Scores (K, H/K, T, T) and which of them (T, T) are seen."""
    (t, h, d), heads, at = q.shape, k.shape[1], ops.arange(q.shape[0])
    mine = ops.logical_and(ops.expand_dims(at, 1) >= starts, ops.expand_dims(at, 1) < starts + counts)
    owner = ops.where(ops.any(mine, 1), ops.argmax(mine.astype(int32), 1).astype(int32), -1)
    back = ops.expand_dims(at, 1) - at
    seen = ops.logical_and(ops.equal(ops.expand_dims(owner, 1), owner), ops.expand_dims(owner, 1) >= 0)
    seen = ops.logical_and(seen, back >= 0)
    if window:
        seen = ops.logical_and(seen, back < window)
    grouped = ops.transpose(ops.reshape(wide(q), (t, heads, h // heads, d)), (1, 2, 0, 3))
    scores = grouped @ ops.transpose(wide(k), (1, 2, 0))[:, None] * scale
    return ops.tanh(scores / softcap) * softcap if softcap else scores, seen


def _grouped(x: Array, heads: int) -> Array:
    """(T, H, …) by the heads of k: (K, H/K, T, …)"""
    split = ops.reshape(wide(x), (x.shape[0], heads, -1, *x.shape[2:]))
    return ops.transpose(split, (1, 2, 0, *range(3, split.ndim)))


def _by_token(x: Array) -> Array:
    """The way back from (K, H/K, T, D)."""
    return ops.reshape(ops.transpose(x, (2, 0, 1, 3)), (x.shape[2], -1, x.shape[-1]))


@fused("q k v starts counts o lse do dlse", _ragged_rule, _lower_ragged, _kernel_ragged)
def ragged_attention_grad(q: Array, k: Array, v: Array, starts: Array, counts: Array, o: Array, lse: Array, do: Array,
                          dlse: Array, *, scale: float, window: int, softcap: float) -> tuple[Array, Array, Array]:
    """The gradients of q, k, v of ragged_attention_lse, whose results o and lse have the gradients do and dlse."""
    heads = k.shape[1]
    scores, seen = _scores(q, k, starts, counts, scale, window, softcap)
    p = ops.where(seen, ops.exp(ops.where(seen, scores, 0.0) - ops.expand_dims(_grouped(lse, heads), -1)), 0.0)
    grad, values, delta = _grouped(do, heads), _grouped(v, heads), _grouped(_delta(o, do, dlse), heads)
    ds = p * (grad @ ops.swapaxes(values, -1, -2) - ops.expand_dims(delta, -1)) * scale
    if softcap:
        ds = ds * (1 - ops.square(scores / softcap))
    dk, dv = (ops.sum(ops.swapaxes(x, -1, -2) @ y, 1, keepdims=True) for x, y in ((ds, _grouped(q, heads)), (p, grad)))
    dq, dk, dv = (_by_token(x).astype(like.dtype) for x, like in ((ds @ _grouped(k, heads), q), (dk, k), (dv, v)))
    return dq, dk, dv


def _delta(o: Array, do: Array, dlse: Array) -> Array:
    """What a row's scores have in common: the gradient of score s is p (gradient of p - delta)."""
    return ops.sum(wide(do) * wide(o), -1) - dlse


def _ragged_vjp(cts: list[Array], given: Arrays, ys: list[Array], **params: Any) -> Gradients:
    (do, dlse), (o, lse) = cts, ys
    rest = [given[a] for a in ("q", "k", "v", "starts", "counts")]
    gradients: Gradients = dict(zip("qkv", ragged_attention_grad(*rest, o, lse, do, dlse, **params), strict=True))
    if "sinks" in given:
        gradients["sinks"] = -ops.sum(ops.exp(wide(given["sinks"]) - lse) * _delta(o, do, dlse), 0)
    return gradients | {"starts": None, "counts": None}


@fused("q k v starts counts sinks", _ragged_rule, _lower_ragged, _kernel_ragged, vjp=_ragged_vjp)
def ragged_attention_lse(q: Array, k: Array, v: Array, starts: Array, counts: Array, sinks: Array | None, *,
                         scale: float, window: int, softcap: float) -> tuple[Array, Array]:
    """ragged_attention, and the log-sum-exp (T,H) of the scores; of a token of no sequence it is NOBODY."""
    heads = k.shape[1]
    scores, seen = _scores(q, k, starts, counts, scale, window, softcap)
    scores = ops.where(seen, scores, -NOBODY)
    sink = None if sinks is None else ops.reshape(wide(sinks), (heads, -1, 1, 1))
    top = ops.max(scores, -1, keepdims=True)
    top = top if sink is None else ops.maximum(top, sink)
    e = ops.where(seen, ops.exp(scores - top), 0.0)
    total = ops.sum(e, -1, keepdims=True) + (0.0 if sink is None else ops.exp(sink - top))
    anybody = ops.any(seen, 1, keepdims=True)
    o = ops.where(anybody, e / ops.where(anybody, total, 1.0), 0.0) @ _grouped(v, heads)
    lse = ops.where(anybody, ops.log(ops.where(anybody, total, 1.0)) + top, NOBODY)
    return _by_token(o).astype(q.dtype), ops.squeeze(_by_token(lse), -1)


def ragged_attention(q: Array, k: Array, v: Array, starts: Array, counts: Array, *, scale: float, window: int = 0,
                     softcap: float = 0.0, sinks: Array | None = None) -> Array:
    """Causal attention of q (T,H,D), k (T,K,D) and v (T,K,E) within sequences, K a divisor of H: sequence b has tokens
    starts[b] … starts[b] + counts[b], and they see nothing else. window, softcap and sinks as in `paged_attention`. The
    softmax is taken in float32. Tokens of no sequence give 0."""
    return ragged_attention_lse(q, k, v, starts, counts, sinks, scale=scale, window=window,
                                softcap=softcap)[0]

"""What recurrent layers do to the sequences of a step: a short convolution and the gated delta rule, with their states.

Sequence b owns rows starts[b] … starts[b] + counts[b] of the T tokens and slot slots[b] of the states. One whose
lengths[b] == counts[b] begins: its states were zeros, whatever the slot holds. Rows of no sequence are 0.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import ops
from .array import Array
from .dtypes import float32, int32
from .fused import Given, fused, inexact, match, require
from .indexing import write_rows
from .node import Aval, Node

if TYPE_CHECKING:
    from .lowering import Lowering

SEQUENCES = {"slots": "B", "starts": "B", "counts": "B", "lengths": "B"}


def _check(name: str, given: Given, **patterns: str) -> dict[str, int]:
    sizes = match(name, given, **patterns, **SEQUENCES)
    require(name, given, int32, *SEQUENCES)
    require(name, given, given["states"].dtype, *patterns)
    inexact(name, given, "states")
    return sizes


def _suits(given: Given, **_: Any) -> bool:
    return given["states"].dtype is float32 and 0 not in given["states"].shape[1:]


def _lower(lo: Lowering, node: Node, given: Given, heads: int) -> None:
    """The kernel of the op's name, which updates the states in place; x, or q, k and v, have rows of `heads` axes."""
    states = lo.update(given["states"])
    rows = {a: lo.rows(v, heads) for a, v in given.items() if a in ("x", "q", "k", "v")}
    views = rows | {a: lo.contiguous(v) for a, v in given.items() if a not in rows and a != "states"}
    views["states"] = states
    y, after = node.values()
    lo.step(node.primitive.kernel, [lo.result(y), states], [views[a] for a in given], [],
            [node.params[p] for p in ("scale", "eps") if p in node.params])
    lo.place(after, states)


def _places(tokens: int, slots: Array, starts: Array, counts: Array, lengths: Array) -> tuple[Array, Array, Array]:
    """Of each token: the slot of its sequence or -1, how many of the sequence's tokens come before it in this step, and
    whether its sequence begins in this step."""
    row = ops.expand_dims(ops.arange(tokens), 1)
    mine = ops.logical_and(row >= starts, row < starts + counts)
    owner = ops.argmax(mine.astype(int32), 1)
    slot, start, fresh = (ops.take(x, owner, 0) for x in (slots, starts, lengths == counts))
    return ops.where(ops.any(mine, 1), slot, -1), ops.arange(tokens) - start, fresh


def _conv_rule(given: Given) -> list[Aval]:
    sizes = _check("short_conv", given, x="T C", weight="C W", states="N P C")
    if sizes["P"] != sizes["W"] - 1:
        raise ValueError(f"[short_conv] states keep {sizes['P']} tokens, {sizes['W'] - 1} wanted by weight")
    return [(given[a].shape, given[a].dtype) for a in ("x", "states")]


@fused("x weight states slots starts counts lengths", _conv_rule, lambda lo, node, given: _lower(lo, node, given, 1),
       _suits)
def short_conv(x: Array, weight: Array, states: Array, slots: Array, starts: Array, counts: Array,
               lengths: Array) -> tuple[Array, Array]:
    """silu(sum over j of weight[:, j] x[t - W + 1 + j]) for x (T,C), weight (C,W): each channel's own convolution over
    the last W tokens of its sequence, whose W - 1 before this step are in states (N,W-1,C). Returns that and the states
    after the step. The definition needs a T that is not symbolic."""
    (tokens, _), width, past = x.shape, weight.shape[1], states.shape[1]
    slot, place, fresh = _places(tokens, slots, starts, counts, lengths)
    table, total = ops.reshape(states, (-1, x.shape[1])), ops.zeros(x.shape, x.dtype)

    def at(slot: Array, place: Array, row: Array, fresh: Array) -> Array:
        """The sequence's token at `place` of this step, which is row `row` or, before 0, in its state."""
        before = ops.take(table, ops.clip(slot * past + place + past, 0, table.shape[0] - 1), 0)
        before = ops.where(ops.expand_dims(fresh, -1), 0.0, before)
        now = ops.take(x, ops.clip(row, 0, tokens - 1), 0)
        return ops.where(ops.expand_dims(place >= 0, -1), now, before)

    if not past:
        table = ops.zeros((1, x.shape[1]), x.dtype)
    for j in range(width):
        back = width - 1 - j
        total = at(slot, place - back, ops.arange(tokens) - back, fresh) * weight[:, j] + total
    y = ops.where(ops.expand_dims(slot >= 0, -1), ops.silu(total), 0.0)
    kept = [at(slots, counts - past + j, starts + counts - past + j, lengths == counts) for j in range(past)]
    return y, write_rows(states, slots, ops.stack(kept, 1)) if past else states


def _delta_rule(given: Given, **_: Any) -> list[Aval]:
    sizes = _check("gated_delta", given, q="T K D", k="T K D", v="T H E", decay="T H", rate="T H", states="N H D E")
    if sizes["H"] % max(1, sizes["K"]):
        raise ValueError(f"[gated_delta] v has {sizes['H']} heads, k {sizes['K']}: not a multiple")
    return [(given[a].shape, given[a].dtype) for a in ("v", "states")]


@fused("q k v decay rate states slots starts counts lengths", _delta_rule,
       lambda lo, node, given: _lower(lo, node, given, 2), _suits)
def gated_delta(q: Array, k: Array, v: Array, decay: Array, rate: Array, states: Array, slots: Array, starts: Array,
                counts: Array, lengths: Array, *, scale: float, eps: float = 1e-6) -> tuple[Array, Array]:
    """The gated delta rule, token by token for each head's state S (D,E):

        S = exp(decay) S, S = S + k rate (v - k S), o = q S

    q, k (T,K,D) are first divided by their lengths, sqrt(sum of squares + eps), q then multiplied by scale; v (T,H,E),
    K a divisor of H; decay, at most 0, and rate (T,H); states (N,H,D,E). Returns o (T,H,E) and the states after the
    step. The definition needs a T that is not symbolic. Yang et al. 2024, arXiv:2412.06464."""
    (tokens, heads, _), h = k.shape, v.shape[1]
    slot, place, fresh = _places(tokens, slots, starts, counts, lengths)
    fresh = ops.logical_and(fresh, place == 0)
    q, k = (ops.repeat(x * ops.rsqrt(ops.sum(x * x, -1, keepdims=True) + eps), h // heads, 1) for x in (q, k))
    kept, q, outs = ops.exp(decay), q * scale, []
    for t in range(tokens):
        state = ops.where(fresh[t], 0.0, ops.take(states, ops.maximum(slot[t:t + 1], 0), 0)[0])
        state = state * kept[t][:, None, None]
        change = rate[t][:, None] * (v[t] - ops.sum(state * k[t][..., None], 1))
        state = state + k[t][..., None] * change[:, None]
        outs.append(ops.where(slot[t] >= 0, ops.sum(state * q[t][..., None], 1), 0.0))
        states = write_rows(states, slot[t:t + 1], state[None])
    return ops.stack(outs, 0) if outs else ops.zeros(v.shape, v.dtype), states

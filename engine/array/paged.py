"""Paged attention and sampling: what generation adds to the fused ops."""
from __future__ import annotations

from typing import TYPE_CHECKING

from . import ops
from .array import Array
from .attention import check_rotary
from .dtypes import bfloat16, float16, float32, int8, int32, uint32
from .fused import Given, definition, fused, match, require, simple
from .indexing import write_rows
from .node import Aval, Node

if TYPE_CHECKING:
    from typing import Any

    from .lowering import Lowering


# the paged cache: k_pages (N,K,D,PAGE) is transposed so that scores of a page are vectors, v_pages (N,K,PAGE,D)

CACHE = {"k_pages": "N K D P", "v_pages": "N K P D", "k_scales": "N K P", "v_scales": "N K P"}
PAGE = 32                            # what the kernels are written for; definitions take pages of any size


def _kernel_pages(given: Given, **_: Any) -> bool:
    d, page = given["k_pages"].shape[-2:]
    stored = given["k_pages"].dtype is int8 if "k_scales" in given else given["k_pages"].dtype in (
        float32, float16, bfloat16)
    return page == PAGE and d % 8 == 0 and d <= 256 and stored


def _rope_append_rule(given: Given, **_: Any) -> list[Aval]:
    name = "rope_append"
    match(name, given, q="T H D", k="T K D", v="T K D", positions="T", slots="T", q_norm="D", k_norm="D", **CACHE)
    require(name, given, int32, "positions", "slots")
    require(name, given, float32, "q", "k", "v", "inv_freq", "q_norm", "k_norm", "k_scales", "v_scales")
    check_rotary(name, given["q"], given["inv_freq"])
    for one, other in (("q_norm", "k_norm"), ("k_scales", "v_scales")):
        if (one in given) != (other in given):
            raise ValueError(f"[{name}] {one} and {other}: one is None, both or neither wanted")
    return [(given[a].shape, given[a].dtype) for a in ("q", "k_pages", "v_pages", "k_scales", "v_scales") if a in given]


def _lower_rope_append(lo: Lowering, node: Node, given: Given) -> None:
    p, [q, *cache] = node.params, node.values()
    heads = {a: lo.rows(given[a], 2) for a in ("q", "k", "v")}
    pages = {a: lo.update(given[a]) for a in CACHE if a in given}
    others = {a: lo.contiguous(v) for a, v in given.items() if a not in heads and a not in pages}
    views = heads | pages | others
    lo.step("rope_append", [lo.result(q), *pages.values()], [views[a] for a in given],
            [int(p["interleaved"]), int("q_norm" in given), int("k_scales" in given)], [p["scale"], p["eps"]])
    for value, view in zip(cache, pages.values(), strict=True):
        lo.place(value, view)


@fused("q k v k_pages v_pages positions slots inv_freq q_norm k_norm k_scales v_scales", _rope_append_rule,
       _lower_rope_append, _kernel_pages)
def rope_append(q: Array, k: Array, v: Array, k_pages: Array, v_pages: Array, positions: Array, slots: Array,
                inv_freq: Array, *, interleaved: bool = False, scale: float = 1.0, q_norm: Array | None = None,
                k_norm: Array | None = None, eps: float = 1e-6, k_scales: Array | None = None,
                v_scales: Array | None = None) -> tuple[Array, ...]:
    """Norms (over D, if given) and rotates q (T,H,D) and k (T,K,D), writes k and v into the pages at slots (T) =
    page * PAGE + offset, -1 nowhere. Returns q, k_pages, v_pages (, k_scales, v_scales); int8 pages have a scale for
    each token and head. The definition needs a T that is not symbolic."""
    if q_norm is not None:
        q, k = definition("rms_norm")(q, q_norm, eps), definition("rms_norm")(k, k_norm, eps)
    q, k = (definition("rotate")(x, positions, inv_freq, interleaved=interleaved, scale=scale) for x in (q, k))
    if k_scales is None or v_scales is None:
        return q, _write(k_pages, k, slots, (0, 3, 1, 2)), _write(v_pages, v, slots, (0, 2, 1, 3))
    (k, k_scale), (v, v_scale) = _int8(k), _int8(v)
    return (q, _write(k_pages, k, slots, (0, 3, 1, 2)), _write(v_pages, v, slots, (0, 2, 1, 3)),
            _write(k_scales, k_scale, slots, (0, 2, 1)), _write(v_scales, v_scale, slots, (0, 2, 1)))


def _int8(x: Array) -> tuple[Array, Array]:
    scale = ops.max(ops.abs(x), -1) / 127.0
    return ops.round(x / ops.expand_dims(ops.where(scale == 0, 1.0, scale), -1)), scale


def _write(pages: Array, tokens: Array, slots: Array, order: tuple[int, ...]) -> Array:
    """Pages with `tokens` at their slots. order: the axes page, offset, head (, element) of the pages."""
    table = ops.transpose(pages, order)
    written = write_rows(ops.reshape(table, (-1, *table.shape[2:])), slots, tokens.astype(pages.dtype))
    return ops.transpose(ops.reshape(written, table.shape), [order.index(i) for i in range(pages.ndim)])


def _paged_attention_rule(given: Given, **_: Any) -> list[Aval]:
    name = "paged_attention"
    sizes = match(name, given, q="T H D", page_table="B M", starts="B", counts="B", lengths="B", sinks="H", **CACHE)
    require(name, given, int32, "page_table", "starts", "counts", "lengths")
    require(name, given, float32, "q", "sinks", "k_scales", "v_scales")
    if sizes["H"] % sizes["K"]:
        raise ValueError(f"[{name}] q has {sizes['H']} heads, k_pages {sizes['K']}: not a multiple")
    return [(given["q"].shape, float32)]


def _lower_paged_attention(lo: Lowering, node: Node, given: Given) -> None:
    p = node.params
    ints = [p["window"], int(p["causal"]), int("sinks" in given), int("k_scales" in given)]
    lo.step("paged_attention", [lo.result(node.values()[0])], [lo.contiguous(v) for v in given.values()], ints,
            [p["scale"], p["softcap"]])


@fused("q k_pages v_pages page_table starts counts lengths sinks k_scales v_scales", _paged_attention_rule,
       _lower_paged_attention, _kernel_pages)
def paged_attention(q: Array, k_pages: Array, v_pages: Array, page_table: Array, starts: Array, counts: Array,
                    lengths: Array, *, scale: float, causal: bool = True, window: int = 0, softcap: float = 0.0,
                    sinks: Array | None = None, k_scales: Array | None = None,
                    v_scales: Array | None = None) -> Array:
    """Attention of q (T,H,D) over pages. Sequence b owns rows starts[b] … starts[b] + counts[b], its last row is at
    position lengths[b] - 1, its tokens are in pages page_table[b]. A row sees positions up to its own if causal, and
    only the last `window` of them if not 0. softcap c: scores become c tanh(scores / c). sinks (H): one more score a
    head, without a value. Rows of no sequence are 0."""
    (t, h, d), (_, heads, _, page), slots = q.shape, k_pages.shape, page_table.shape[1]
    row = ops.expand_dims(ops.arange(t), 1)
    mine = ops.logical_and(row >= starts, row < starts + counts)
    owner = ops.argmax(mine.astype(int32), 1)
    length, pages = ops.take(lengths, owner, 0), ops.maximum(ops.take(page_table, owner, 0), 0)
    own = length - ops.take(counts, owner, 0) + ops.arange(t) - ops.take(starts, owner, 0)
    k, v = (_pages_of(*x, pages) for x in ((k_pages, k_scales, -2), (v_pages, v_scales, -1)))
    k = ops.reshape(ops.transpose(k, (0, 2, 3, 1, 4)), (t, heads, d, slots * page))
    v = ops.reshape(ops.transpose(v, (0, 2, 1, 3, 4)), (t, heads, slots * page, d))
    scores = ops.reshape(q, (t, heads, h // heads, d)) @ k * scale
    if softcap:
        scores = ops.tanh(scores / softcap) * softcap
    at, own, length = ops.arange(slots * page), ops.expand_dims(own, 1), ops.expand_dims(length, 1)
    seen = ops.logical_and(at < length, ops.any(mine, 1, keepdims=True))
    if causal:
        seen = ops.logical_and(seen, at <= own)
    if window:
        seen = ops.logical_and(seen, at > own - window)
    scores = ops.where(ops.expand_dims(seen, (1, 2)), scores, -1e30)
    top, sink = ops.max(scores, -1, keepdims=True), None
    if sinks is not None:
        sink = ops.reshape(sinks, (heads, h // heads, 1))
        top = ops.maximum(top, sink)
    e = ops.where(ops.expand_dims(seen, (1, 2)), ops.exp(scores - top), 0.0)
    total = ops.sum(e, -1, keepdims=True) + (0.0 if sink is None else ops.exp(sink - top))
    return ops.reshape(e / ops.where(total == 0, 1.0, total) @ v, (t, h, d))


def _pages_of(pages: Array, scales: Array | None, axis: int, index: Array) -> Array:
    """The pages (T, M, …) of each row's sequence in float32."""
    x = ops.take(pages, index, 0).astype(float32)
    return x if scales is None else x * ops.expand_dims(ops.take(scales, index, 0), axis)


# sampling: a definition in ops (sorts, a counter-based generator) is unreasonable; the tests' NumPy reference is it

PARAMS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
INTS = ("top_k", "seed", "seed_high", "counter", "history_length", "prompt_length", "sequence", "biases", "masked",
        "likeliest", "target")
TOP = 20                             # likeliest tokens of a row, at most


def _sample_rule(given: Given) -> list[Aval]:
    sizes = match("sample", given, logits="R V", params="R params", ints="R ints", history="S length",
                  bias_ids="S N", biases="S N", masks="R words")
    require("sample", given, float32, "logits", "params", "biases")
    require("sample", given, int32, "ints", "history", "bias_ids")
    require("sample", given, uint32, "masks")
    rows = sizes["R"]
    return [((rows,), int32), ((rows,), float32), ((rows, TOP), int32), ((rows, TOP), float32)]


@fused("logits params ints history bias_ids biases masks", _sample_rule, simple("sample"))
def sample(logits: Array, params: Array, ints: Array, history: Array, bias_ids: Array, biases: Array,
           masks: Array) -> tuple[Array, Array, Array, Array]:
    """Token ids (R) i32 and their log-probabilities (R) under the plain softmax, from logits (R,V); the likeliest
    tokens (R,TOP) i32 and theirs. params (R,6) f32 and ints (R,11) i32: the columns PARAMS and INTS. A row of ints
    says which row of history, bias_ids and biases (S, …) is its sequence's. masks (R, words) u32: a bit for each token,
    set if it is allowed. A row with a NaN, or with nothing allowed, gives -1."""
    raise NotImplementedError("[sample] the runtime has no kernel of that name")

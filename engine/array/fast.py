"""Fused ops. The body of each function is its definition in terms of other ops; `fused` makes it a row of the table
whose kernel is used where the runtime has one of that name. `definition(name)` is the body."""
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import ops
from .array import Array
from .dtypes import Dtype, bfloat16, float16, float32, float64, int8, int32, uint32
from .indexing import write_rows
from .node import Aval, Dim, Node, Shape, Value, apply, show
from .operands import Axes, array_of, axes_of, broadcast_shapes, constant
from .primitives import flat, row, size_of

if TYPE_CHECKING:
    from .lowering import Lowering
    from .plan import View

Given = dict[str, Value]
DEFINITIONS: dict[str, Callable[..., Any]] = {}


def definition(name: str) -> Callable[..., Any]:
    """The op in terms of other ops, with the op's own signature."""
    return DEFINITIONS[name]


def fused(arrays: str, rule: Callable[..., list[Aval]], lower: Callable[..., None] | None,
          suits: Callable[..., bool] = lambda given, **params: True,
          ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """arrays: the arguments that are arrays; rule, lower and suits (whether the kernel takes them) see those that are
    not None by name."""
    def decorate(define: Callable[..., Any]) -> Callable[..., Any]:
        name, names, signature = define.__name__, arrays.split(), inspect.signature(define)
        DEFINITIONS[name] = define

        def expand(*inputs: Array, present: tuple[str, ...], **params: Any) -> Any:
            return define(**dict.fromkeys(names) | dict(zip(present, inputs, strict=True)) | params)

        def named_rule(*values: Value, present: tuple[str, ...], **params: Any) -> list[Aval]:
            return rule(dict(zip(present, values, strict=True)), **params)

        def inputs_of(node: Node) -> Given:
            return dict(zip(node.params["present"], node.inputs, strict=True))

        def named_lower(lo: Lowering, node: Node) -> None:
            assert lower is not None
            lower(lo, node, inputs_of(node))

        primitive = row(name, named_rule, named_lower, definition=expand, kernel=name,
                        suits=lambda node: suits(inputs_of(node), **node.params))

        @functools.wraps(define)
        def op(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            params = bound.arguments
            given = {a: array_of(params[a])._value for a in names if params[a] is not None}
            params = {k: v for k, v in params.items() if k not in names}
            results = [Array.of(v) for v in apply(primitive, *given.values(), present=tuple(given), **params)]
            return results[0] if len(results) == 1 else tuple(results)

        return op

    return decorate


def match(name: str, given: Given, **patterns: str) -> dict[str, int]:
    """Unifies named sizes: match("rms_norm", given, x="... C", weight="C") -> {"C": 64}."""
    sizes: dict[str, int] = {}
    for argument, pattern in patterns.items():
        if argument not in given:
            continue
        letters, shape = pattern.split(), given[argument].shape
        if letters[0] == "...":
            letters, shape = letters[1:], shape[len(shape) - len(letters) + 1:]
        if len(letters) != len(shape):
            raise ValueError(f"[{name}] {argument} {show(given[argument].shape)}: axes {pattern} wanted")
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"[{name}] {argument} {show(shape)}: axis {letter} is {size}, "
                                 f"{sizes[letter]} wanted by the arrays before it")
    return sizes


def require(name: str, given: Given, wanted: Dtype, *arguments: str) -> None:
    for a in arguments:
        if a in given and given[a].dtype is not wanted:
            raise ValueError(f"[{name}] {a} {given[a].dtype}{show(given[a].shape)}: {wanted} wanted")


def simple(kernel: str, floats: str = "", ints: str = "") -> Callable[..., None]:
    """A lowering that hands over all inputs row-major; parameters by name."""
    def lower(lo: Lowering, node: Node, given: Given) -> None:
        inputs = [lo.contiguous(v) for v in given.values()]
        p = node.params
        lo.step(kernel, [lo.result(v) for v in node.values()], inputs, [int(p[i]) for i in ints.split()],
                [p[f] for f in floats.split()])

    return lower


# softmax and norms, over the last axis

def _like_x(name: str) -> Callable[..., list[Aval]]:
    def rule(given: Given, **_: Any) -> list[Aval]:
        match(name, given, x="... C", weight="C", bias="C")
        if not given["x"].dtype.inexact:
            raise ValueError(f"[{name}] x {given['x'].dtype}{show(given['x'].shape)}: floats wanted")
        return [(given["x"].shape, given["x"].dtype)]

    return rule


def _lower_norm(kernel: str, **defaults: float) -> Callable[..., None]:
    """A missing weight or bias is a vector of its default."""
    def lower(lo: Lowering, node: Node, given: Given) -> None:
        x = given["x"]
        missing = {name: constant(value, float32) for name, value in defaults.items() if name not in given}
        for value in missing.values():
            lo.scalars[value] = value.node.params["value"]  # type: ignore[union-attr]
        views = [lo.view((given | missing)[name]).broadcast(x.shape[-1:]) for name in defaults]
        lo.step(kernel, [by_rows(lo.result(node.values()[0]))], [by_rows(lo.contiguous(x)), *map(lo.packed, views)], [],
                [node.params["eps"]])

    return lower


def by_rows(view: View) -> View:
    """(…, C) as (R, C); a symbolic axis followed by others stays as it is."""
    lead = view.shape[:-1]
    symbolic = any(isinstance(s, Dim) for s in lead)
    return view if len(lead) == 1 or symbolic else view.reshaped(size_of(lead), view.shape[-1])


def _lower_softmax(lo: Lowering, node: Node, given: Given) -> None:
    lo.step("softmax", [by_rows(lo.result(node.values()[0]))], [by_rows(lo.contiguous(given["x"]))])


def _not_float64(given: Given, **_: Any) -> bool:
    return given["x"].dtype is not float64


def _wide(x: Array) -> Array:
    return x if x.dtype is float64 else x.astype(float32)


@fused("x", _like_x("softmax"), _lower_softmax, _not_float64)
def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis."""
    e = ops.exp(x - ops.max(x, -1, keepdims=True))
    return e / ops.sum(e, -1, keepdims=True)


def softmax_axes(a: Any, axis: Axes = None, precise: bool = False) -> Array:
    """exp(a) / sum(exp(a)) over the given axes, or over all. It is always computed in float32 or wider."""
    a = array_of(a)
    a = a if a.dtype.inexact else a.astype(float32)
    axes = axes_of("softmax", axis, a.ndim)
    order = [i for i in range(a.ndim) if i not in axes] + list(axes)
    last = ops.transpose(a, order)
    flat_ = last if len(axes) == 1 else ops.reshape(last, (*last.shape[:a.ndim - len(axes)], -1))
    return ops.transpose(ops.reshape(softmax(flat_), last.shape), [order.index(i) for i in range(a.ndim)])


@fused("x weight", _like_x("rms_norm"), _lower_norm("rms_norm", weight=1.0), _not_float64)
def rms_norm(x: Array, weight: Array | None, eps: float) -> Array:
    """x (…, C) / sqrt(mean(x²) + eps) * weight (C)."""
    wide = _wide(x)
    normed = wide * ops.rsqrt(ops.mean(ops.square(wide), -1, keepdims=True) + eps)
    return (normed if weight is None else normed * weight).astype(x.dtype)


@fused("x weight bias", _like_x("layer_norm"), _lower_norm("layer_norm", weight=1.0, bias=0.0),
       _not_float64)
def layer_norm(x: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
    """(x (…, C) - mean) / sqrt(variance + eps) * weight (C) + bias (C)."""
    centred = _wide(x) - ops.mean(_wide(x), -1, keepdims=True)
    normed = centred * ops.rsqrt(ops.mean(ops.square(centred), -1, keepdims=True) + eps)
    normed = normed if weight is None else normed * weight
    return (normed if bias is None else normed + bias).astype(x.dtype)


# rotary positions

def _rope_rule(given: Given, **_: Any) -> list[Aval]:
    match("rope", given, x="T H D", positions="T", inv_freq="F")
    require("rope", given, int32, "positions")
    _check_rotary("rope", given["x"], given["inv_freq"])
    return [(given["x"].shape, given["x"].dtype)]


def _check_rotary(name: str, x: Value, inv_freq: Value) -> None:
    if 2 * inv_freq.shape[0] > x.shape[-1]:
        raise ValueError(f"[{name}] inv_freq {show(inv_freq.shape)}: {x.shape[-1] // 2} pairs in a head at most")


def _lower_rope(lo: Lowering, node: Node, given: Given) -> None:
    x = lo.rows(given["x"], 1)
    rest = [lo.contiguous(given[a]) for a in ("positions", "inv_freq")]
    p = node.params
    lo.step("rope", [lo.result(node.values()[0])], [x, *rest], [int(p["interleaved"])], [p["scale"]])


@fused("x positions inv_freq", _rope_rule, _lower_rope, lambda given, **_: given["x"].dtype is float32)
def rope(x: Array, positions: Array, inv_freq: Array, *, interleaved: bool = False, scale: float = 1.0) -> Array:
    """Rotates the first R of D of x (T,H,D) by positions (T) i32 * inv_freq (R/2): pairs are (i, i + R/2), or
    (2i, 2i + 1) if interleaved. scale multiplies cos and sin (the attention factor of some rotary kinds)."""
    half = inv_freq.shape[0]
    angle = ops.expand_dims(ops.expand_dims(positions, 1) * inv_freq, 1)
    cos, sin = ops.cos(angle) * scale, ops.sin(angle) * scale
    part = x[..., :2 * half]
    first, second = (part[..., ::2], part[..., 1::2]) if interleaved else (part[..., :half], part[..., half:])
    turned = first * cos - second * sin, second * cos + first * sin
    joined = [ops.reshape(ops.stack(turned, -1), (*x.shape[:-1], 2 * half))] if interleaved else list(turned)
    return ops.concatenate([*joined, x[..., 2 * half:]], -1).astype(x.dtype)


# the paged cache: k_pages (N,K,D,PAGE) is transposed so that scores of a page are vectors, v_pages (N,K,PAGE,D)

CACHE = {"k_pages": "N K D P", "v_pages": "N K P D", "k_scales": "N K P", "v_scales": "N K P"}
PAGE = 32                            # what the kernels are written for; definitions take pages of any size


def _kernel_pages(given: Given, **_: Any) -> bool:
    d, page = given["k_pages"].shape[-2:]
    stored = given["k_pages"].dtype is int8 if "k_scales" in given else given["k_pages"].dtype in (float16, bfloat16)
    return page == PAGE and d % 8 == 0 and d <= 256 and stored


def _rope_append_rule(given: Given, **_: Any) -> list[Aval]:
    name = "rope_append"
    match(name, given, q="T H D", k="T K D", v="T K D", positions="T", slots="T", q_norm="D", k_norm="D", **CACHE)
    require(name, given, int32, "positions", "slots")
    require(name, given, float32, "q", "k", "v", "k_scales", "v_scales")
    _check_rotary(name, given["q"], given["inv_freq"])
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
    q, k = (definition("rope")(x, positions, inv_freq, interleaved=interleaved, scale=scale) for x in (q, k))
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

def _sample_rule(given: Given) -> list[Aval]:
    sizes = match("sample", given, logits="R V", params="R eight", ints="R eight", history="R length")
    require("sample", given, float32, "logits", "params")
    require("sample", given, int32, "ints", "history")
    return [((sizes["R"],), int32), ((sizes["R"],), float32)]


@fused("logits params ints history", _sample_rule, simple("sample"))
def sample(logits: Array, params: Array, ints: Array, history: Array) -> tuple[Array, Array]:
    """Token ids (R) i32 and their log-probabilities (R) under the plain softmax, from logits (R,V). params (R,8) f32:
    temperature (0: the largest), top_p, min_p, repetition, presence, frequency. ints (R,8) i32: top_k, seed low and
    high, counter, history length, prompt length. history (R, …) i32: the sequence so far."""
    raise NotImplementedError("[sample] the runtime has no kernel of that name")


# affine quantization, MLX's layout: codes packed along the last axis as a little-endian bit stream in uint32

def _packed(name: str, columns: int, group_size: int, bits: int) -> int:
    """The number of words that `columns` codes take."""
    if not 1 < bits <= 8 or columns % group_size or columns * bits % 32:
        raise ValueError(f"[{name}] {columns} columns, groups of {group_size}, {bits} bits: whole groups, whole words "
                         "of 32 bits, and 2 to 8 bits wanted")
    return columns * bits // 32


def _quantize_rule(given: Given, group_size: int, bits: int) -> list[Aval]:
    *lead, columns = given["w"].shape
    words = _packed("quantize", columns, group_size, bits)
    side = (*lead, columns // group_size), given["w"].dtype
    return [((*lead, words), uint32), side, side]


def _two_axes(view: View) -> View:
    return view.reshaped(flat(view.shape[:-1]), view.shape[-1])


def _lower_quantize(kernel: str) -> Callable[..., None]:
    def lower(lo: Lowering, node: Node, given: Given) -> None:
        views = [_two_axes(lo.result(v)) for v in node.values()], [_two_axes(lo.contiguous(v)) for v in given.values()]
        lo.step(kernel, *views, [node.params["bits"], node.params["group_size"]])

    return lower


def _kernel_bits(given: Given, bits: int, group_size: int, **_: Any) -> bool:
    return bits in (4, 8) and group_size in (16, 32, 64, 128) and all(v.dtype is not float64 for v in given.values())


@fused("w", _quantize_rule, _lower_quantize("quantize"), _kernel_bits)
def quantize(w: Array, group_size: int = 64, bits: int = 4) -> tuple[Array, Array, Array]:
    """w (…, K) -> codes (…, K * bits / 32) uint32, scales and biases (…, K / group_size), by MLX's arithmetic: the edge
    of larger magnitude and 0 are exact; w = scale * code + bias."""
    top = (1 << bits) - 1
    x = ops.reshape(w.astype(float32), (*w.shape[:-1], -1, group_size))
    low, high = ops.min(x, -1, keepdims=True), ops.max(x, -1, keepdims=True)
    scale = ops.maximum((high - low) / top, 1e-7)
    side = ops.abs(low) > ops.abs(high)
    scale, edge = ops.where(side, scale, -scale), ops.where(side, low, high)
    zero = ops.round(edge / scale)
    scale = ops.where(zero == 0, scale, edge / ops.where(zero == 0, 1.0, zero))
    bias = ops.where(zero == 0, 0.0, edge)
    codes = ops.clip(ops.round((x - bias) / scale), 0.0, float(top)).astype(uint32)
    stream = ops.bitwise_and(ops.right_shift(ops.expand_dims(codes, -1), ops.arange(bits, dtype=uint32)), 1)
    words = ops.reshape(stream, (*w.shape[:-1], -1, 32))
    packed = ops.sum(ops.left_shift(words, ops.arange(32, dtype=uint32)), -1)
    return packed, ops.squeeze(scale, -1).astype(w.dtype), ops.squeeze(bias, -1).astype(w.dtype)


def _codes(w: Array, bits: int) -> Array:
    """Packed words (…, N) -> codes (…, N * 32 / bits) uint32."""
    stream = ops.bitwise_and(ops.right_shift(ops.expand_dims(w, -1), ops.arange(32, dtype=uint32)), 1)
    spaced = ops.reshape(stream, (*w.shape[:-1], -1, bits))
    return ops.sum(ops.left_shift(spaced, ops.arange(bits, dtype=uint32)), -1)


def _dequantized(name: str, given: Given, group_size: int, bits: int) -> Shape:
    """The shape of the matrix that is packed in w, scales, biases."""
    match(name, given, scales="... G", biases="... G")
    *lead, groups = given["scales"].shape
    words = _packed(name, groups * group_size, group_size, bits)
    require(name, given, uint32, "w")
    if given["w"].shape != (*lead, words):
        raise ValueError(f"[{name}] w {show(given['w'].shape)}: {show((*lead, words))} wanted for scales "
                         f"{show(given['scales'].shape)}, {bits} bits in groups of {group_size}")
    return (*lead, groups * group_size)


def _dequantize_rule(given: Given, group_size: int, bits: int) -> list[Aval]:
    return [(_dequantized("dequantize", given, group_size, bits), given["scales"].dtype)]


@fused("w scales biases", _dequantize_rule, _lower_quantize("dequantize"), _kernel_bits)
def dequantize(w: Array, scales: Array, biases: Array, group_size: int = 64, bits: int = 4) -> Array:
    """Codes (…, K * bits / 32), scales and biases (…, K / group_size) -> (…, K) of the scales' dtype."""
    codes = ops.reshape(_codes(w, bits), (*scales.shape, group_size))
    wide = codes * ops.expand_dims(scales.astype(float32), -1) + ops.expand_dims(biases.astype(float32), -1)
    return ops.reshape(wide, (*scales.shape[:-1], -1)).astype(scales.dtype)


def _quantized_matmul_rule(given: Given, transpose: bool, group_size: int, bits: int) -> list[Aval]:
    x, shape = given["x"], _dequantized("quantized_matmul", given, group_size, bits)
    n, k = shape[-2:] if transpose else shape[:-3:-1]
    if x.shape[-1] != k:
        raise ValueError(f"[quantized_matmul] x {show(x.shape)} @ w {show(shape)}{' transposed' if transpose else ''}: "
                         f"inner sizes {x.shape[-1]} and {k} differ")
    batch = broadcast_shapes(x.shape[:-2], shape[:-2], name="quantized_matmul")
    return [((*batch, *x.shape[-2:-1], n), x.dtype)]


@fused("x w scales biases", _quantized_matmul_rule, None)
def quantized_matmul(x: Array, w: Array, scales: Array, biases: Array, transpose: bool = True, group_size: int = 64,
                     bits: int = 4) -> Array:
    """x (…, K) @ dequantized wᵀ (N, K), or @ w (K, N) without transpose."""
    matrix = dequantize(w, scales, biases, group_size, bits)
    return (x @ (ops.swapaxes(matrix, -1, -2) if transpose else matrix).astype(x.dtype)).astype(x.dtype)


def _quantized_take_rule(given: Given, group_size: int, bits: int) -> list[Aval]:
    return [((*given["indices"].shape, *_dequantized("quantized_take", given, group_size, bits)[1:]), float32)]


def _lower_quantized_take(lo: Lowering, node: Node, given: Given) -> None:
    *table, index = (lo.contiguous(v) for v in given.values())
    out = lo.result(node.values()[0])
    rows_ = flat(index.shape)
    lo.step("quantized_take", [out.reshaped(rows_, out.shape[-1])], [*table, index.reshaped(rows_)],
            [node.params["bits"], node.params["group_size"]])


@fused("w scales biases indices", _quantized_take_rule, _lower_quantized_take)
def quantized_take(w: Array, scales: Array, biases: Array, indices: Array, group_size: int = 64,
                   bits: int = 4) -> Array:
    """Rows of a quantized matrix (N, K) at integer indices, float32."""
    codes, *sides = (ops.take(a, indices, 0) for a in (w, scales, biases))
    return dequantize(codes, *(s.astype(float32) for s in sides), group_size, bits)



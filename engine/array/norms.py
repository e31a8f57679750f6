"""Over the last axis: softmax, norms, cross-entropy. Their gradients are fused ops as well."""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import ops
from .array import Array
from .dtypes import float32
from .fused import Given, Gradients, by_rows, fused, inexact, kernel_rows, match, wide, wide_dtype
from .node import Aval, Node, show
from .operands import Axes, array_of, axes_of, constant
from .primitives import flat

if TYPE_CHECKING:
    from .lowering import Lowering

COLUMNS = {"weight": 1.0, "bias": 0.0}                     # arguments (C); a missing one is a vector of its default
Arrays = dict[str, Array]


def _rows_rule(name: str, *sides: str) -> Callable[..., list[Aval]]:
    """Results: one like x (…, C), and one (C) for each side, of its dtype, or a wide one where it is missing."""
    def rule(given: Given, **_: Any) -> list[Aval]:
        match(name, given, **{a: "C" if a in COLUMNS else "... C" for a in given})
        inexact(name, given, *given)
        x = given["x"]
        return [(x.shape, x.dtype), *((x.shape[-1:], given[s].dtype if s in given else wide_dtype(x)) for s in sides)]

    return rule


def _lower_rows(kernel: str, *columns: str) -> Callable[..., None]:
    """Hands over arrays (…, C) as rows, then the columns."""
    def lower(lo: Lowering, node: Node, given: Given) -> None:
        missing = {a: constant(COLUMNS[a], float32) for a in columns if a not in given}
        for value in missing.values():
            lo.scalars[value] = value.node.params["value"]  # type: ignore[union-attr]
        views = [by_rows(lo.contiguous(v)) for a, v in given.items() if a not in COLUMNS]
        size = given["x"].shape[-1:]
        views += [lo.packed(lo.view((given | missing)[a]).broadcast(size)) for a in columns]
        first, *rest = (lo.result(v) for v in node.values())
        lo.step(kernel, [by_rows(first), *rest], views, [], [node.params[p] for p in ("eps",) if p in node.params])

    return lower


def _sum_rows(x: Array) -> Array:
    """(…, C) -> (C)"""
    return ops.sum(x, tuple(range(x.ndim - 1))) if x.ndim > 1 else x


# softmax

@fused("x dy", _rows_rule("softmax_grad"), _lower_rows("softmax_grad"), kernel_rows, rows=("x", "dy"))
def softmax_grad(x: Array, dy: Array) -> Array:
    """The gradient of softmax where it is x and has the gradient dy, both (…, C)."""
    y, dy = wide(x), wide(dy)
    return (y * (dy - ops.sum(y * dy, -1, keepdims=True))).astype(x.dtype)


def _softmax_vjp(cts: list[Array], given: Arrays, ys: list[Array]) -> Gradients:
    return {"x": softmax_grad(ys[0], cts[0])}


@fused("x", _rows_rule("softmax"), _lower_rows("softmax"), kernel_rows, vjp=_softmax_vjp, rows=("x",))
def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis."""
    e = ops.exp(wide(x) - wide(ops.max(x, -1, keepdims=True)))
    return (e / ops.sum(e, -1, keepdims=True)).astype(x.dtype)


def softmax_axes(a: Any, axis: Axes = None, *, precise: bool = False) -> Array:
    """exp(a) / sum(exp(a)) over the given axes, or over all. It is always computed in float32 or wider."""
    a = array_of(a)
    a = a if a.dtype.inexact else a.astype(float32)
    axes = axes_of("softmax", axis, a.ndim)
    order = [i for i in range(a.ndim) if i not in axes] + list(axes)
    last = ops.transpose(a, order)
    flat_ = last if len(axes) == 1 else ops.reshape(last, (*last.shape[:a.ndim - len(axes)], -1))
    return ops.transpose(ops.reshape(softmax(flat_), last.shape), [order.index(i) for i in range(a.ndim)])


# norms

@fused("x dy weight", _rows_rule("rms_norm_grad", "weight"), _lower_rows("rms_norm_grad", "weight"), kernel_rows)
def rms_norm_grad(x: Array, dy: Array, weight: Array | None, eps: float) -> tuple[Array, Array]:
    """The gradients dx and dweight (C) of rms_norm whose result has the gradient dy."""
    w, dy = wide(x), wide(dy)
    r = ops.rsqrt(ops.mean(ops.square(w), -1, keepdims=True) + eps)
    normed, g = w * r, dy if weight is None else dy * weight
    dx = r * (g - normed * ops.mean(g * normed, -1, keepdims=True))
    dweight = _sum_rows(dy * normed)
    return dx.astype(x.dtype), dweight if weight is None else dweight.astype(weight.dtype)


def _rms_norm_vjp(cts: list[Array], given: Arrays, ys: list[Array], eps: float) -> Gradients:
    dx, dweight = rms_norm_grad(given["x"], cts[0], given.get("weight"), eps)
    return {"x": dx, "weight": dweight}


@fused("x weight", _rows_rule("rms_norm"), _lower_rows("rms_norm", "weight"), kernel_rows, vjp=_rms_norm_vjp,
       rows=("x",))
def rms_norm(x: Array, weight: Array | None, eps: float) -> Array:
    """x (…, C) / sqrt(mean(x²) + eps) * weight (C)."""
    w = wide(x)
    normed = w * ops.rsqrt(ops.mean(ops.square(w), -1, keepdims=True) + eps)
    return (normed if weight is None else normed * weight).astype(x.dtype)


@fused("x dy weight", _rows_rule("layer_norm_grad", "weight", "bias"), _lower_rows("layer_norm_grad", "weight"),
       kernel_rows)
def layer_norm_grad(x: Array, dy: Array, weight: Array | None, eps: float) -> tuple[Array, Array, Array]:
    """The gradients dx, dweight (C) and dbias (C) of layer_norm whose result has the gradient dy."""
    w, dy = wide(x), wide(dy)
    centred = w - ops.mean(w, -1, keepdims=True)
    r = ops.rsqrt(ops.mean(ops.square(centred), -1, keepdims=True) + eps)
    normed, g = centred * r, dy if weight is None else dy * weight
    dx = r * (g - ops.mean(g, -1, keepdims=True) - normed * ops.mean(g * normed, -1, keepdims=True))
    dweight = _sum_rows(dy * normed)
    return dx.astype(x.dtype), dweight if weight is None else dweight.astype(weight.dtype), _sum_rows(dy)


def _layer_norm_vjp(cts: list[Array], given: Arrays, ys: list[Array], eps: float) -> Gradients:
    dx, dweight, dbias = layer_norm_grad(given["x"], cts[0], given.get("weight"), eps)
    return {"x": dx, "weight": dweight, "bias": dbias}


@fused("x weight bias", _rows_rule("layer_norm"), _lower_rows("layer_norm", "weight", "bias"), kernel_rows,
       vjp=_layer_norm_vjp, rows=("x",))
def layer_norm(x: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
    """(x (…, C) - mean) / sqrt(variance + eps) * weight (C) + bias (C)."""
    w = wide(x)
    centred = w - ops.mean(w, -1, keepdims=True)
    normed = centred * ops.rsqrt(ops.mean(ops.square(centred), -1, keepdims=True) + eps)
    normed = normed if weight is None else normed * weight
    return (normed if bias is None else normed + bias).astype(x.dtype)


# cross-entropy: logits are read once in each direction, and never normalised in memory

def _cross_entropy_rule(given: Given) -> list[Aval]:
    name, logits, lead = "cross_entropy", given["x"], given["x"].shape[:-1]
    inexact(name, given, "x", *(given.keys() - {"targets", "x"}))
    for a in given.keys() - {"x"}:
        if given[a].shape != lead:
            raise ValueError(f"[{name}] logits {show(logits.shape)}, {a} {show(given[a].shape)}: {show(lead)} wanted")
    if given["targets"].dtype.kind not in "iu":
        raise ValueError(f"[{name}] targets {given['targets'].dtype}{show(given['targets'].shape)}: integers wanted")
    return [(logits.shape, logits.dtype)] if "lse" in given else [(lead, wide_dtype(logits))] * 2


def _kernel_cross_entropy(given: Given, **_: Any) -> bool:
    return kernel_rows(given) and all(given[a].dtype is float32 for a in given.keys() - {"x", "targets"})


def _lower_cross_entropy(lo: Lowering, node: Node, given: Given) -> None:
    logits, *others = (lo.contiguous(v) for v in given.values())
    rows = flat(logits.shape[:-1])
    outs = [lo.result(v) for v in node.values()]
    lo.step(node.primitive.kernel, [by_rows(o) if "lse" in given else o.reshaped(rows) for o in outs],
            [by_rows(logits), *(v.reshaped(rows) for v in others)])


def _one_hot(targets: Array, classes: int) -> Array:
    return ops.equal(ops.arange(classes, dtype=targets.dtype), ops.expand_dims(targets, -1))


@fused("x targets lse dlse dpicked", _cross_entropy_rule, _lower_cross_entropy, _kernel_cross_entropy,
       rows=("x", "targets", "lse", "dlse", "dpicked"))
def cross_entropy_grad(x: Array, targets: Array, lse: Array, dlse: Array, dpicked: Array) -> Array:
    """The gradient of logits x (…, C) whose log-sum-exp (…) has the gradient dlse and x[…, targets] dpicked."""
    p = ops.exp(wide(x) - ops.expand_dims(lse, -1)) * ops.expand_dims(dlse, -1)
    picked = ops.where(_one_hot(targets, x.shape[-1]), ops.expand_dims(dpicked, -1), 0.0)
    return (p + picked).astype(x.dtype)


def _cross_entropy_vjp(cts: list[Array], given: Arrays, ys: list[Array]) -> Gradients:
    (dloss, dlse), lse = cts, ys[1]
    return {"x": cross_entropy_grad(given["x"], given["targets"], lse, dloss + dlse, -dloss)}


@fused("x targets", _cross_entropy_rule, _lower_cross_entropy, _kernel_cross_entropy, vjp=_cross_entropy_vjp,
       rows=("x", "targets"))
def cross_entropy_lse(x: Array, targets: Array) -> tuple[Array, Array]:
    """lse - x[…, targets] and lse, the log-sum-exp of logits x (…, C)."""
    x = wide(x)
    top = ops.max(x, -1, keepdims=True)
    lse = ops.log(ops.sum(ops.exp(x - top), -1)) + ops.squeeze(top, -1)
    return lse - ops.sum(ops.where(_one_hot(targets, x.shape[-1]), x, 0.0), -1), lse


def cross_entropy(logits: Array, targets: Array) -> Array:
    """-log softmax(logits (…, C))[targets (…)] in float32 for each row, as `mlx.core.fast.cross_entropy`."""
    return cross_entropy_lse(logits, targets)[0]

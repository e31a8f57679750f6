"""Losses. `reduction` is "none" (a loss for each element or row), "mean" or "sum"."""
from __future__ import annotations

import math

from .. import array as mx
from .linear import Embedding, Linear, QuantizedEmbedding, QuantizedLinear
from .module import Module

__all__ = [
    "binary_cross_entropy", "cosine_similarity_loss", "cross_entropy", "gaussian_nll_loss", "hinge_loss",
    "huber_loss", "kl_div_loss", "l1_loss", "linear_cross_entropy", "log_cosh_loss", "margin_ranking_loss", "mse_loss",
    "nll_loss", "smooth_l1_loss", "triplet_loss",
]
WITH_WEIGHT = Linear | Embedding | QuantizedLinear | QuantizedEmbedding
REDUCTIONS = {"none": lambda loss: loss, "mean": mx.mean, "sum": mx.sum}


def _reduce(loss: mx.Array, reduction: str, weights: mx.Array | None = None) -> mx.Array:
    if reduction not in REDUCTIONS:
        raise ValueError(f"[loss] reduction is {reduction!r}, wanted one of {', '.join(REDUCTIONS)}")
    if weights is not None:
        _alike("loss", loss=loss, weights=weights)
        loss = loss * weights
    return REDUCTIONS[reduction](loss)


def _alike(name: str, **arrays: mx.Array) -> None:
    if len({a.shape for a in arrays.values()}) > 1:
        raise ValueError(f"[{name}] {', '.join(f'{n} {a.shape}' for n, a in arrays.items())}: one shape wanted")


def _at(x: mx.Array, index: mx.Array, axis: int) -> mx.Array:
    """x without `axis`: the elements that `index` names."""
    return mx.take_along_axis(x, mx.expand_dims(index, axis), axis).squeeze(axis)


def linear_cross_entropy(head: Module, x: mx.Array, targets: mx.Array, softcap: float = 0.0) -> mx.Array:
    """−log softmax(head(x))[targets] of each row of x (T, C), in float32; 0 where the target is −1.

    head: a layer or an embedding, plain or quantized, whose logits are never in memory together; any other module's
    are. softcap c: logits are c tanh(logits / c).
    """
    if isinstance(head, WITH_WEIGHT) and getattr(head, "bias", None) is None:
        codes = {a: getattr(head, a) for a in ("scales", "biases", "group_size", "bits", "mode") if hasattr(head, a)}
        return mx.fast.linear_cross_entropy(x, targets, head.weight, **codes, softcap=softcap)
    logits = head(x)
    logits = mx.tanh(logits / softcap) * softcap if softcap else logits
    return mx.where(targets >= 0, mx.fast.cross_entropy(logits, mx.maximum(targets, 0)), 0.0)


def cross_entropy(
    logits: mx.Array, targets: mx.Array, weights: mx.Array | None = None, axis: int = -1,
    label_smoothing: float = 0.0, reduction: str = "none",
) -> mx.Array:
    """−Σ p log softmax(logits): targets are probabilities p of the logits' shape, or classes, a shape without `axis`.

    weights: one for each loss. label_smoothing: this part of p is spread over all classes.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"[cross_entropy] label_smoothing is {label_smoothing}: at least 0 and below 1 wanted")
    at = axis % logits.ndim
    without = (*logits.shape[:at], *logits.shape[at + 1:])
    probabilities = targets.ndim == logits.ndim
    if targets.shape != (logits.shape if probabilities else without):
        raise ValueError(f"[cross_entropy] logits {logits.shape}, targets {targets.shape}: {logits.shape} or "
                         f"{without} wanted")
    if not probabilities and not label_smoothing and at == logits.ndim - 1:
        return _reduce(mx.fast.cross_entropy(logits, targets).astype(logits.dtype), reduction, weights)
    logits = logits - mx.stop_gradient(mx.max(logits, axis, keepdims=True))
    score = mx.sum(logits * targets, axis) if probabilities else _at(logits, targets, axis)
    if label_smoothing:
        score = (1 - label_smoothing) * score + label_smoothing * mx.mean(logits, axis)
    return _reduce(mx.log(mx.sum(mx.exp(logits), axis)) - score, reduction, weights)


def binary_cross_entropy(
    inputs: mx.Array, targets: mx.Array, weights: mx.Array | None = None, with_logits: bool = True,
    reduction: str = "mean",
) -> mx.Array:
    """−t log p − (1 − t) log(1 − p), where p is sigmoid(inputs), or the inputs themselves without with_logits."""
    _alike("binary_cross_entropy", inputs=inputs, targets=targets)
    if with_logits:
        loss = mx.logaddexp(inputs, 0) - inputs * targets
    else:
        log_p, log_q = (mx.maximum(mx.log(p), -100) for p in (inputs, 1 - inputs))
        loss = -(targets * log_p + (1 - targets) * log_q)
    return _reduce(loss, reduction, weights)


def l1_loss(predictions: mx.Array, targets: mx.Array, reduction: str = "mean") -> mx.Array:
    """|p − t|"""
    _alike("l1_loss", predictions=predictions, targets=targets)
    return _reduce(mx.abs(predictions - targets), reduction)


def mse_loss(predictions: mx.Array, targets: mx.Array, reduction: str = "mean") -> mx.Array:
    """(p − t)²"""
    _alike("mse_loss", predictions=predictions, targets=targets)
    return _reduce(mx.square(predictions - targets), reduction)


def nll_loss(inputs: mx.Array, targets: mx.Array, axis: int = -1, reduction: str = "none") -> mx.Array:
    """−inputs[target]: inputs are log-probabilities, targets are classes."""
    return _reduce(-_at(inputs, targets, axis), reduction)


def gaussian_nll_loss(
    inputs: mx.Array, targets: mx.Array, vars: mx.Array, full: bool = False, eps: float = 1e-6,
    reduction: str = "mean",
) -> mx.Array:
    """½ (log v + (t − x)² / v), v = max(vars, eps); full: with the constant ½ log 2π."""
    _alike("gaussian_nll_loss", inputs=inputs, targets=targets, vars=vars)
    variance = mx.maximum(vars, eps)
    loss = 0.5 * (mx.log(variance) + mx.square(targets - inputs) / variance)
    return _reduce(loss + 0.5 * math.log(2 * math.pi) if full else loss, reduction)


def kl_div_loss(inputs: mx.Array, targets: mx.Array, axis: int = -1, reduction: str = "none") -> mx.Array:
    """Σ exp(t) (t − x): both are log-probabilities."""
    return _reduce(mx.sum(mx.exp(targets) * (targets - inputs), axis), reduction)


def smooth_l1_loss(
    predictions: mx.Array, targets: mx.Array, beta: float = 1.0, reduction: str = "mean"
) -> mx.Array:
    """½ d² / beta where d = |p − t| is below beta, d − ½ beta elsewhere."""
    _alike("smooth_l1_loss", predictions=predictions, targets=targets)
    d = mx.abs(predictions - targets)
    return _reduce(mx.where(d < beta, (0.5 / beta) * mx.square(d), d - 0.5 * beta), reduction)


def triplet_loss(
    anchors: mx.Array, positives: mx.Array, negatives: mx.Array, axis: int = -1, p: int = 2, margin: float = 1.0,
    eps: float = 1e-6, reduction: str = "none",
) -> mx.Array:
    """max(|a − positive| − |a − negative| + margin, 0) with p-norms."""
    near, far = (mx.power(mx.sum(mx.power(mx.abs(anchors - x), p), axis) + eps, 1 / p) for x in (positives, negatives))
    return _reduce(mx.maximum(near - far + margin, 0), reduction)


def hinge_loss(inputs: mx.Array, targets: mx.Array, reduction: str = "none") -> mx.Array:
    """max(1 − x t, 0), targets −1 or 1."""
    return _reduce(mx.maximum(1 - inputs * targets, 0), reduction)


def huber_loss(inputs: mx.Array, targets: mx.Array, delta: float = 1.0, reduction: str = "none") -> mx.Array:
    """½ e² where e = |x − t| is below delta, delta (e − ½ delta) elsewhere."""
    e = mx.abs(inputs - targets)
    near = mx.minimum(e, delta)
    return _reduce(0.5 * mx.square(near) + delta * (e - near), reduction)


def log_cosh_loss(inputs: mx.Array, targets: mx.Array, reduction: str = "none") -> mx.Array:
    """log cosh(x − t)"""
    e = inputs - targets
    return _reduce(mx.logaddexp(e, -e) - math.log(2), reduction)


def cosine_similarity_loss(
    x1: mx.Array, x2: mx.Array, axis: int = 1, eps: float = 1e-8, reduction: str = "none"
) -> mx.Array:
    """x1 · x2 / max(|x1| |x2|, eps)"""
    dot, square1, square2 = (mx.sum(x * y, axis) for x, y in ((x1, x2), (x1, x1), (x2, x2)))
    return _reduce(dot / mx.maximum(mx.sqrt(square1) * mx.sqrt(square2), eps), reduction)


def margin_ranking_loss(
    inputs1: mx.Array, inputs2: mx.Array, targets: mx.Array, margin: float = 0.0, reduction: str = "none"
) -> mx.Array:
    """max(−t (x1 − x2) + margin, 0), targets −1 or 1."""
    _alike("margin_ranking_loss", inputs1=inputs1, inputs2=inputs2, targets=targets)
    return _reduce(mx.maximum(-targets * (inputs1 - inputs2) + margin, 0), reduction)

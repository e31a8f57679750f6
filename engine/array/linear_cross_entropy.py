"""The output head and its cross-entropy in one: logits of a few rows at a time, their loss, and the gradient of x."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import ops
from .array import Array
from .dtypes import float32, int32
from .fused import Given, Gradients, by_rows, fused, inexact, require, wide, wide_dtype
from .node import Aval, Dim, Node, show
from .primitives import flat
from .quantized import _dequantize, _dequantized, _kernel_bits, is_precise, kernel_format, parts

if TYPE_CHECKING:
    from .lowering import Lowering

Arrays = dict[str, Array]
NAME, ROWS = "linear_cross_entropy", 256


def _rule(given: Given, group_size: int, bits: int, **_: Any) -> list[Aval]:
    x, targets = given["x"], given["targets"]
    inexact(NAME, given, "x")
    require(NAME, given, int32, "targets")
    shape = given["weight"].shape if not bits else _dequantized(NAME, _codes(given), group_size, bits)
    if len(shape) != 2 or shape[1] != x.shape[-1]:
        raise ValueError(f"[{NAME}] weight {show(shape)}: (V, C) wanted for x {show(x.shape)}")
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"[{NAME}] targets {show(targets.shape)}: {show(x.shape[:-1])} wanted for x {show(x.shape)}")
    return [(targets.shape, wide_dtype(x))]


def _grad_rule(given: Given, **params: Any) -> list[Aval]:
    return [*_rule(given, **params), (given["x"].shape, given["x"].dtype)]


def _codes(given: dict[str, Any]) -> dict[str, Any]:
    return {"w": given["weight"], **{a: given[a] for a in ("scales", "biases") if a in given}}


def _lower(lo: Lowering, node: Node, given: Given) -> None:
    p, values = node.params, node.values()
    x, targets, *weight = (lo.contiguous(v) for v in given.values())
    loss, *unit = (lo.result(v) for v in values)
    rows = flat(given["targets"].shape)
    bits = kernel_format(p["bits"], given) if p["bits"] else 0
    fast = not p["precise"] and given["weight"].dtype is not float32
    lo.step(NAME, [loss.reshaped(rows), *map(by_rows, unit)], [by_rows(x), targets.reshaped(rows), *weight],
            [bits, p["group_size"], int(fast)], [p["softcap"]])


def _suits(given: Given, bits: int, group_size: int, **_: Any) -> bool:
    if given["x"].dtype is not float32 or len(given["x"].shape) != 2 and any(
            isinstance(s, Dim) for s in given["x"].shape):
        return False
    return not bits or _kernel_bits(_codes(given), bits, group_size)


def _matrix(weight: Array, scales: Array | None, biases: Array | None, group_size: int, bits: int) -> Array:
    return wide(weight) if scales is None else _dequantize(weight, scales, biases, group_size, bits, float32)


def _slope(x: Array, targets: Array, matrix: Array, softcap: float) -> tuple[Array, Array]:
    """The loss of each row, and its gradient of the logits before the cap."""
    scores = wide(x) @ ops.swapaxes(matrix, -1, -2)
    logits = ops.tanh(scores / softcap) * softcap if softcap else scores
    top = ops.max(logits, -1, keepdims=True)
    lse = ops.log(ops.sum(ops.exp(logits - top), -1, keepdims=True)) + top
    one_hot = ops.equal(ops.arange(matrix.shape[0]), ops.expand_dims(targets, -1))
    counts, picked = ops.expand_dims(targets >= 0, -1), ops.sum(ops.where(one_hot, logits, 0.0), -1, keepdims=True)
    slope = ops.where(counts, ops.exp(logits - lse) - one_hot.astype(logits.dtype), 0.0)
    slope = slope * (1 - ops.square(logits / softcap)) if softcap else slope
    return ops.squeeze(ops.where(counts, lse - picked, 0.0), -1), slope


@fused("x targets weight scales biases", _grad_rule, _lower, _suits, kernel=NAME, rows=("x", "targets"))
def linear_cross_entropy_grad(x: Array, targets: Array, weight: Array, scales: Array | None, biases: Array | None, *,
                              group_size: int, bits: int, softcap: float, precise: bool) -> tuple[Array, Array]:
    """The loss of each row, and its gradient of x (…, C)."""
    matrix = _matrix(weight, scales, biases, group_size, bits)
    loss, slope = _slope(x, targets, matrix, softcap)
    return loss, (slope @ matrix).astype(x.dtype)


def _vjp(cts: list[Array], given: Arrays, ys: list[Array], **params: Any) -> Gradients:
    x, targets, weight, *sides = (given.get(a) for a in ("x", "targets", "weight", "scales", "biases"))
    assert x is not None and targets is not None and weight is not None
    _, unit = linear_cross_entropy_grad(x, targets, weight, *sides, **params)
    gradients: Gradients = {"x": ops.expand_dims(cts[0], -1) * unit, "targets": None}
    if not params["bits"]:
        gradients["weight"] = _weight_grad(x, targets, weight, cts[0], params["softcap"])
    return gradients


def _weight_grad(x: Array, targets: Array, weight: Array, dloss: Array, softcap: float) -> Array:
    """Of a dense head that is trained: a few rows of logits at a time."""
    x, targets, dloss = ops.reshape(x, (-1, x.shape[-1])), ops.flatten(targets), ops.flatten(dloss)
    found = ops.zeros(weight.shape, wide_dtype(x._value))
    for i in range(0, x.shape[0], ROWS):
        rows = x[i:i + ROWS]
        slope = _slope(rows, targets[i:i + ROWS], wide(weight), softcap)[1] * dloss[i:i + ROWS, None]
        found = found + ops.swapaxes(slope, -1, -2) @ wide(rows)
    return found


@fused("x targets weight scales biases", _rule, _lower, _suits, kernel=NAME, vjp=_vjp, rows=("x", "targets"))
def _linear_cross_entropy(x: Array, targets: Array, weight: Array, scales: Array | None, biases: Array | None, *,
                          group_size: int, bits: int, softcap: float, precise: bool) -> Array:
    return _slope(x, targets, _matrix(weight, scales, biases, group_size, bits), softcap)[0]


def linear_cross_entropy(x: Array, targets: Array, weight: Array, scales: Array | None = None,
                         biases: Array | None = None, *, group_size: int | None = None, bits: int | None = None,
                         mode: str = "affine", softcap: float = 0.0) -> Array:
    """-log softmax(logits)[targets] in float32 for each row of x (…, C), where logits = x weightᵀ (V, C), or those of
    codes with scales and biases as in `quantized_matmul`; softcap c: c tanh(logits / c). targets (…) int32: a row of
    target -1 has loss 0, and is left out before the head. The logits are never in memory together, and a gradient of x
    is computed in the same pass. The products are as `precise` says."""
    group_size, bits = (0, 0) if scales is None else parts(NAME, scales, biases, group_size, bits, mode)
    return _linear_cross_entropy(x, targets, weight, scales, biases, group_size=group_size, bits=bits, softcap=softcap,
                                 precise=is_precise())

"""Mixtures of experts: every token goes through a few of many gated MLPs."""
from __future__ import annotations

from typing import TYPE_CHECKING

from . import ops
from .array import Array
from .dtypes import float32, int32
from .fused import Given, definition, fused, match, require
from .node import Aval, Node
from .quantized import _dequantize, is_precise, kernel_format

if TYPE_CHECKING:
    from .lowering import Lowering

SWISH_LIMIT, SWISH_SLOPE = 7.0, 1.702
ACTIVATIONS = {                      # of gate and up; in the order of the kernel's epilogues from 2 on
    "silu": lambda gate, up: ops.silu(gate) * up,
    "gelu": lambda gate, up: ops.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: ops.gelu_tanh(gate) * up,
    "clamped_swish": lambda gate, up: _clamped_swish(gate, up)}
WEIGHTS = ("gate", "up", "down")
ARRAYS = (["x", "chosen", "share"] + [w + part for w in WEIGHTS for part in ("", "_scales", "_biases")]
          + [f"{w}_bias" for w in WEIGHTS])


def _clamped_swish(gate: Array, up: Array) -> Array:
    """gpt-oss: min(gate, 7) sigmoid(1.702 min(gate, 7)) (up, within -7 … 7, + 1)"""
    gate = ops.minimum(gate, SWISH_LIMIT)
    return gate * ops.sigmoid(SWISH_SLOPE * gate) * (ops.clip(up, -SWISH_LIMIT, SWISH_LIMIT) + 1)


def _rule(given: Given, activation: str, group_size: int, bits: int) -> list[Aval]:
    sizes = match("experts", given, x="T C", chosen="T k", share="T k", gate="E I a", up="E I a", down="E C b")
    require("experts", given, float32, "x", "share")
    require("experts", given, int32, "chosen")
    wanted = [n * bits // 32 if bits else n for n in (sizes["C"], sizes["I"])]
    if [sizes["a"], sizes["b"]] != wanted:
        raise ValueError(f"[experts] inner sizes of gate and down are {sizes['a']} and {sizes['b']}, {wanted[0]} and "
                         f"{wanted[1]} wanted for {sizes['C']} channels and {sizes['I']} hidden ones, {bits} bits")
    return [(given["x"].shape, float32)]


def _lower(lo: Lowering, node: Node, given: Given) -> None:
    p = node.params
    format = kernel_format(p["bits"], [name.removeprefix("gate_") for name in given]) if p["bits"] else 0
    ints = [format, p["group_size"], 2 + list(ACTIVATIONS).index(p["activation"]), int("gate_bias" in given)]
    lo.step("experts", [lo.result(node.values()[0])], [lo.contiguous(v) for v in given.values()], ints)


@fused(" ".join(ARRAYS), _rule, _lower, kernel="experts")
def _experts(x: Array, chosen: Array, share: Array, gate: Array, gate_scales: Array | None, gate_biases: Array | None,
             up: Array, up_scales: Array | None, up_biases: Array | None, down: Array, down_scales: Array | None,
             down_biases: Array | None, gate_bias: Array | None, up_bias: Array | None, down_bias: Array | None,
             activation: str, group_size: int, bits: int) -> Array:
    def multiply(rows: Array, bias: Array | None, *matrix: Array | None) -> Array:
        """rows (T, k or 1, K, 1) by each chosen expert's matrix: (T, k, N, 1)"""
        w, *sides = (ops.take(part, chosen, 0) for part in matrix if part is not None)
        w = _dequantize(w, *(*sides, None)[:2], group_size, bits, float32) if bits else w.astype(float32)
        return w @ rows if bias is None else w @ rows + ops.take(bias, chosen, 0)[..., None]

    rows = x[:, None, :, None]
    hidden = ACTIVATIONS[activation](multiply(rows, gate_bias, gate, gate_scales, gate_biases),
                                     multiply(rows, up_bias, up, up_scales, up_biases))
    return ops.sum(multiply(hidden, down_bias, down, down_scales, down_biases)[..., 0] * share[..., None], 1)


def experts(x: Array, chosen: Array, share: Array, gate: tuple[Array, ...], up: tuple[Array, ...],
            down: tuple[Array, ...], biases: tuple[Array, ...] = (), *, activation: str = "silu", group_size: int = 0,
            bits: int = 0) -> Array:
    """x (T, C) -> (T, C): the sum over j of share[t, j] · down(act(gate(x)) · up(x)) of expert chosen[t, j] (T, k).

    gate and up (E, I, C), down (E, C, I) are a dense weight each, or codes, scales [and biases] with bits > 0; `biases`
    are gate's, up's (E, I) and down's (E, C). activation: one of ACTIVATIONS. Only chosen experts are read.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"[experts] activation {activation!r}: one of {', '.join(ACTIVATIONS)} wanted")
    weights = [part for w in (gate, up, down) for part in (*w, None, None)[:3]]
    op = definition("_experts") if bits and is_precise() else _experts
    return op(x, chosen, share, *weights, *(*biases, None, None, None)[:3], activation, group_size, bits)

"""Mixtures of experts: a router chooses few of many MLPs for each token."""
from __future__ import annotations

import re

from ..engine import array as mx
from ..engine import nn
from ..engine.errors import UserError
from ..engine.nn.linear import codes
from .config import Config


class Stack(nn.Module):
    """A matrix for each expert: weight (E, out, in), bias (E, out) or None; `mx.fast.experts` multiplies by them."""

    bias: mx.Array | None

    def __init__(self, experts: int, input_dims: int, output_dims: int, bias: bool = False):
        self.weight = mx.zeros((experts, output_dims, input_dims))
        self.bias = mx.zeros((experts, output_dims)) if bias else None

    def matrix(self) -> tuple[mx.Array, ...]:
        return (self.weight,)

    def to_quantized(self, group_size: int = 64, bits: int = 4, mode: str = "affine") -> QuantizedStack:
        return QuantizedStack(self, group_size, bits, mode)


class QuantizedStack(Stack):
    """Codes (E, out, in·bits/32) uint32, scales and, in the mode affine, biases (E, out, in/group_size)."""

    biases: mx.Array | None

    def __init__(self, dense: Stack, group_size: int, bits: int, mode: str):
        self.group_size, self.bits, self.mode, self.bias = group_size, bits, mode, dense.bias
        self.weight, self.scales, self.biases = codes(dense.weight, group_size, bits, mode)

    def matrix(self) -> tuple[mx.Array, ...]:
        return tuple(part for part in (self.weight, self.scales, self.biases) if part is not None)


class Experts(nn.Module):
    """The experts' MLPs, under MLX's names."""

    def __init__(self, experts: int, channels: int, hidden: int, activation: str = "silu", bias: bool = False):
        self.activation = activation
        self.gate_proj, self.up_proj = (Stack(experts, channels, hidden, bias) for _ in range(2))
        self.down_proj = Stack(experts, hidden, channels, bias)

    def __call__(self, x: mx.Array, chosen: mx.Array, share: mx.Array) -> mx.Array:
        """x (T, C), chosen (T, k) int32, share (T, k) to (T, C)"""
        stacks = self.gate_proj, self.up_proj, self.down_proj
        biases = tuple(s.bias for s in stacks if s.bias is not None)
        formats = {(getattr(s, "bits", 0), getattr(s, "group_size", 0), getattr(s, "mode", "")) for s in stacks}
        if len(formats) > 1:
            raise UserError(f"[experts] gate, up and down have different formats {sorted(formats)}: one wanted")
        [(bits, group, _)] = formats
        gate, up, down = (s.matrix() for s in stacks)
        return mx.fast.experts(x, chosen, share, gate, up, down, biases, activation=self.activation, bits=bits,
                               group_size=group)


class MoE(nn.Module):
    """softmax(gate(x)) says which `top_k` experts a token goes to, and with which shares."""

    def __init__(self, config: Config, experts: int, top_k: int, hidden: int, normalize: bool = True):
        self.top_k, self.normalize = top_k, normalize
        self.gate = nn.Linear(config.hidden_size, experts, bias=False)
        self.switch_mlp = Experts(experts, config.hidden_size, hidden, config.hidden_act)

    def __call__(self, x: mx.Array) -> mx.Array:
        shares = mx.softmax(self.gate(x), axis=-1)
        chosen = best(shares, self.top_k)
        share = mx.take_along_axis(shares, chosen, axis=-1)
        if self.normalize:
            share = share / mx.sum(share, axis=-1, keepdims=True)
        return self.switch_mlp(x, chosen, share)


def best(scores: mx.Array, k: int) -> mx.Array:
    """The columns of the k largest of each row: (T, E) to (T, k) int32."""
    return mx.argsort(-scores, axis=-1)[:, :k].astype(mx.int32)


def stacked(weights: dict[str, mx.Array], pattern: str, name: str) -> dict[str, mx.Array]:
    """Weights of single experts as one: what `pattern` matches, with the expert's number as group `e`, goes to `name`,
    a template of the match."""
    single: dict[str, dict[int, mx.Array]] = {}
    rest = {}
    for path, weight in weights.items():
        if match := re.fullmatch(pattern, path):
            single.setdefault(match.expand(name), {})[int(match["e"])] = weight
        else:
            rest[path] = weight
    return rest | {path: mx.stack([parts[e] for e in sorted(parts)]) for path, parts in single.items()}

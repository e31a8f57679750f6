"""Recurrent layers: x (…, T, in) to the hidden states of all steps (…, T, hidden). Steps are unrolled."""
from __future__ import annotations

import math
from collections.abc import Callable

from .. import array as mx
from .init import draw
from .module import Module

__all__ = ["GRU", "LSTM", "RNN"]


def _affine(x: mx.Array, weight: mx.Array, bias: mx.Array | None) -> mx.Array:
    return x @ weight.T if bias is None else x @ weight.T + bias


def _steps(x: mx.Array) -> list[mx.Array]:
    return [x[..., t, :] for t in range(x.shape[-2])]


class _Recurrent(Module):
    """Weights named `inputs` (G·hidden, in), `states` (G·hidden, hidden) and `biases` for G gates."""

    gates: int
    inputs, states = "Wx", "Wh"
    biases: tuple[str, ...] = ("bias",)

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True):
        scale, self.hidden_size = 1 / math.sqrt(hidden_size), hidden_size
        rows = self.gates * hidden_size
        setattr(self, self.inputs, draw((rows, input_size), scale))
        setattr(self, self.states, draw((rows, hidden_size), scale))
        for name in self.biases:
            size = hidden_size if name == "bhn" else rows
            setattr(self, name, draw((size,), scale) if bias else None)

    def _extra_repr(self) -> str:
        bias = getattr(self, self.biases[0]) is not None
        return f"input_dims={getattr(self, self.inputs).shape[1]}, hidden_size={self.hidden_size}, bias={bias}"


class RNN(_Recurrent):
    """h' = f(x Wxhᵀ + h Whhᵀ + bias), f = tanh by default."""

    gates, inputs, states = 1, "Wxh", "Whh"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True,
        nonlinearity: Callable[[mx.Array], mx.Array] | None = None,
    ):
        if nonlinearity is not None and not callable(nonlinearity):
            raise ValueError(f"[RNN] nonlinearity is {nonlinearity!r}: a function wanted")
        super().__init__(input_size, hidden_size, bias)
        self.nonlinearity = nonlinearity or mx.tanh

    def _extra_repr(self) -> str:
        return super()._extra_repr().replace(", bias", f", nonlinearity={self.nonlinearity}, bias")

    def __call__(self, x: mx.Array, hidden: mx.Array | None = None) -> mx.Array:
        states = []
        for step in _steps(_affine(x, self.Wxh, self.bias)):
            hidden = self.nonlinearity(step if hidden is None else step + hidden @ self.Whh.T)
            states.append(hidden)
        return mx.stack(states, -2)


class GRU(_Recurrent):
    """r, z = σ(x Wxᵀ + h Whᵀ + b), n = tanh(x Wxᵀ + b + r (h Whᵀ + bhn)), h' = (1 − z) n + z h; rows r, z, n."""

    gates, biases = 3, ("b", "bhn")

    def __call__(self, x: mx.Array, hidden: mx.Array | None = None) -> mx.Array:
        states, wide = [], 2 * self.hidden_size
        if hidden is None:
            hidden = mx.zeros((*x.shape[:-2], self.hidden_size), x.dtype)
        for step in _steps(_affine(x, self.Wx, self.b)):
            past = hidden @ self.Wh.T
            r, z = mx.split(mx.sigmoid(step[..., :wide] + past[..., :wide]), 2, -1)
            n = past[..., wide:] if self.bhn is None else past[..., wide:] + self.bhn
            n = mx.tanh(step[..., wide:] + r * n)
            hidden = (1 - z) * n + z * hidden
            states.append(hidden)
        return mx.stack(states, -2)


class LSTM(_Recurrent):
    """i, f, g, o = x Wxᵀ + h Whᵀ + bias, c' = σ(f) c + σ(i) tanh(g), h' = σ(o) tanh(c'). Returns all h and all c."""

    gates = 4

    def __call__(
        self, x: mx.Array, hidden: mx.Array | None = None, cell: mx.Array | None = None
    ) -> tuple[mx.Array, mx.Array]:
        hiddens, cells = [], []
        for step in _steps(_affine(x, self.Wx, self.bias)):
            i, f, g, o = mx.split(step if hidden is None else step + hidden @ self.Wh.T, 4, -1)
            new = mx.sigmoid(i) * mx.tanh(g)
            cell = new if cell is None else mx.sigmoid(f) * cell + new
            hidden = mx.sigmoid(o) * mx.tanh(cell)
            hiddens.append(hidden)
            cells.append(cell)
        return mx.stack(hiddens, -2), mx.stack(cells, -2)

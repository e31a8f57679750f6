"""The order of a plan: what is cheap is computed again for readers that come much later, and the numbers stay."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from lazulite.engine import array as mx
from lazulite.engine import nn

T, C, F, LAYERS = 256, 64, 128, 16
FLOATS = {"gated": C + 2 * F, "normed": 2 * C + F, "chain": C + F}     # of a token that a layer must keep
rng = np.random.default_rng(0)
MATRICES = {name: [rng.standard_normal(shape).astype(np.float32) * 0.05 for _ in range(LAYERS)]
            for name, shape in (("gate", (C, F)), ("up", (C, F)), ("down", (F, C)))}
X = rng.standard_normal((T, C)).astype(np.float32)


def layer(kind, lib, x, gate, up, down):
    theirs = torch.nn.functional.silu, torch.nn.RMSNorm(C, 1e-5, dtype=torch.float64)
    silu, norm = (mx.silu, nn.RMSNorm(C)) if lib is mx else theirs
    if kind == "gated":
        return x + (silu(x @ gate) * (x @ up)) @ down
    if kind == "normed":
        h = norm(x)
        return x + silu(h @ gate) @ down
    return x + lib.tanh(lib.sin(silu(x @ gate) * 0.5)) @ down


def total(kind, lib, x, weights):
    for triple in zip(*weights, strict=True):
        x = layer(kind, lib, x, *triple)
    return (x * x).sum() if lib is torch else mx.sum(mx.square(x))


@pytest.mark.parametrize("kind", FLOATS)
def test_only_products_wait_for_the_gradient(kind):
    weights = [[mx.array(w) for w in part] for part in MATRICES.values()]
    step = mx.compile(lambda w, x: mx.value_and_grad(lambda w: total(kind, mx, x, w))(w))
    near = 6 * T * 5 * F * 4                               # of the last layers nothing is far, and all is kept
    assert step.plan(weights, mx.array(X)).arena < LAYERS * T * FLOATS[kind] * 4 + near
    value, found = step(weights, mx.array(X))
    theirs = [[torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in part] for part in MATRICES.values()]
    wanted = total(kind, torch, torch.tensor(X, dtype=torch.float64), theirs)
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-4)
    for ours, part in zip(found, theirs, strict=True):
        for a, b in zip(ours, part, strict=True):
            if b.grad is not None:
                scale = b.grad.abs().max().item()
                np.testing.assert_allclose(np.asarray(a), b.grad.numpy(), atol=1e-4 * scale)


def test_outputs_and_donated_inputs_keep_their_values():
    """`first` is an output, and read again at the end of a chain; the state is overwritten in its own memory."""
    state = {"x": mx.array(np.ones((T, F)), mx.float32)}

    def run(x):
        state["x"] = mx.exp(state["x"] * 0.1)
        y, w = x, mx.ones((F, F)) * 0.01
        first = mx.tanh(y @ w)
        twice = first * 2
        y = y + twice @ w
        for _ in range(60):
            y = mx.tanh(y @ w) + y
        return mx.sum(y * state["x"] + twice), first

    w, ones = np.full((F, F), 0.01), np.ones((T, F))
    step, wanted, first = mx.compile(run, inputs=state, outputs=state), ones, np.tanh(ones @ w)
    y = ones + 2 * first @ w
    for _ in range(60):
        y = np.tanh(y @ w) + y
    for _ in range(3):
        wanted = np.exp(0.1 * wanted)
        found, seen = step(mx.array(ones, mx.float32))
        assert found.item() == pytest.approx((y * wanted + 2 * first).sum(), rel=1e-4)
        np.testing.assert_allclose(np.asarray(seen), first, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(state["x"]), wanted, rtol=1e-5)

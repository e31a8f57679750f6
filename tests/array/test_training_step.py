"""What makes a training step small: gradients as early as they can be, checkpoints, the head's one pass, precision."""
from __future__ import annotations

import functools

import numpy as np
import pytest

from lazulite.engine import array as mx
from lazulite.engine import nn
from lazulite.engine.array.plan import runtime

T, C, LAYERS = 64, 32, 12


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {name: [mx.array(rng.standard_normal(shape) * 0.2, mx.float32) for _ in range(LAYERS)]
            for name, shape in (("wide", (4 * C, C)), ("a", (C, 2)), ("b", (2, 4 * C)), ("back", (C, 4 * C)))}


def loss(adapters, weights, x, checkpointed):
    """Layers of frozen matrices with low-rank products beside them, and a norm over all gradients' inputs."""
    for wide, back, a, b in zip(weights["wide"], weights["back"], *adapters, strict=True):
        def layer(x, wide=wide, back=back, a=a, b=b):
            return x + mx.silu(x @ wide.T + (x @ a) @ b) @ back.T
        x = mx.checkpoint(layer)(x) if checkpointed else layer(x)
    return mx.sum(mx.square(x))


def step(weights, checkpointed):
    """Adapters after a step that is clipped by the norm of all gradients, so that none is an output of its own."""
    def run(adapters, x):
        value, gradients = mx.value_and_grad(lambda p: loss(p, weights, x, checkpointed))(adapters)
        norm = mx.sqrt(sum(mx.sum(mx.square(g)) for part in gradients for g in part))
        return value, nn.tree_map(lambda p, g: p - g / norm, adapters, gradients)

    return mx.compile(run)


def test_memory_of_checkpoints(weights):
    """Of a checkpointed layer only its input lives until its gradient: T C floats. Without, at least what silu read."""
    x, adapters = mx.array(np.random.default_rng(1).standard_normal((T, C)), mx.float32), [weights["a"], weights["b"]]
    plain, saved = (step(weights, on) for on in (False, True))
    layer, inputs = 4 * T * 4 * C * 4, LAYERS * T * C * 4
    assert plain.plan(adapters, x).arena > LAYERS * T * 4 * C * 4
    assert saved.plan(adapters, x).arena < inputs + 3 * layer
    (v0, p0), (v1, p1) = plain(adapters, x), saved(adapters, x)
    assert v0.item() == v1.item()
    for one, other in zip(p0, p1, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def head(bits):
    w = mx.array(np.random.default_rng(2).standard_normal((96, C)), mx.float32)
    return mx.quantize(w, 32, bits) if bits else (w,)


@pytest.mark.parametrize("bits", [0, 4])
def test_loss_and_gradient_in_one_pass(bits):
    weight, targets = head(bits), mx.array([3, -1, 0, 95] * 4, mx.int32)
    fn = lambda x: mx.sum(mx.fast.linear_cross_entropy(x, targets, *weight, group_size=32, bits=4))  # noqa: E731
    x = mx.placeholder((16, C), mx.float32)
    kernels = [s.kernel for s in mx.lower(list(mx.value_and_grad(fn)(x)), [x]).steps]
    if "linear_cross_entropy" in runtime().kernels:
        assert kernels.count("linear_cross_entropy") == 1
        assert not {"matmul", "linear", "quantized_matmul"} & set(kernels)


def test_rows_without_targets():
    """A chunk without any, and nothing at all."""
    x, targets = mx.ones((700, C)), np.full(700, -1, np.int32)
    for some in (0, 600):
        targets[some:some + 5] = 7
        fn = functools.partial(mx.fast.linear_cross_entropy, targets=mx.array(targets), weight=head(0)[0])
        value, gradient = mx.value_and_grad(lambda x, fn=fn: mx.sum(fn(x)))(x)
        assert value.item() > 0
        assert (np.abs(np.array(gradient)).sum(1) > 0).tolist() == (targets >= 0).tolist()
    none = mx.fast.linear_cross_entropy(x, mx.full((700,), -1, mx.int32), *head(0))
    assert np.array(none).tolist() == [0.0] * 700


def test_gradient_of_a_dense_head():
    """In pieces of 256 rows, equal to the whole."""
    rng = np.random.default_rng(3)
    x, w = mx.array(rng.standard_normal((600, C)), mx.float32), head(0)[0]
    targets = mx.array(rng.integers(-1, 96, 600), mx.int32)

    def whole(x, w):
        losses = mx.fast.cross_entropy(x @ w.T, mx.maximum(targets, 0))
        return mx.sum(mx.where(targets >= 0, losses, 0.0))

    found = mx.grad(lambda x, w: mx.sum(mx.fast.linear_cross_entropy(x, targets, w)), (0, 1))(x, w)
    for a, b in zip(found, mx.grad(whole, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(mx.max(mx.abs(b)).item()))


def test_precision_of_quantized_products():
    """precise: float32 both ways. Without: a hundredth, forwards and backwards."""
    rng = np.random.default_rng(4)
    x, dy = (mx.array(rng.standard_normal((64, n)), mx.float32) for n in (128, 96))
    codes = mx.quantize(mx.array(rng.standard_normal((96, 128)), mx.float32), 32, 4)
    matrix = np.array(mx.dequantize(*codes, 32, 4), np.float64)
    wanted = np.array(x) @ matrix.T, np.array(dy) @ matrix
    product = lambda x: mx.quantized_matmul(x, *codes, group_size=32, bits=4)  # noqa: E731
    with mx.fast.precise():
        exact = [a[0] for a in mx.vjp(product, [x], [dy])]
    for limit, found in ((1e-5, exact), (2e-2, [a[0] for a in mx.vjp(product, [x], [dy])])):
        for a, b in zip(found, wanted, strict=True):
            assert np.abs(np.array(a) - b).max() < limit * np.abs(b).max()


def test_packed_context():
    context = nn.Context.packed([3, 1, 2])
    assert np.array(context.positions).tolist() == [0, 1, 2, 0, 0, 1]
    assert np.array(context.starts).tolist() == [0, 3, 4]
    run = mx.compile(lambda lengths: nn.Context.packed(lengths, 6).positions)
    assert np.array(run(mx.array([2, 0, 2], mx.int32)))[:4].tolist() == [0, 1, 0, 1]
    assert np.array(run(mx.array([1, 5, 0], mx.int32))).tolist() == [0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("head_of", [lambda: nn.Linear(C, 96, bias=False), lambda: nn.Linear(C, 96),
                                     lambda: nn.Embedding(96, C), lambda: nn.QuantizedEmbedding(96, C, 32, 8)])
def test_loss_of_a_head(head_of):
    module, x = head_of(), mx.array(np.random.default_rng(5).standard_normal((8, C)), mx.float32)
    targets = mx.array([0, 5, -1, 95, 1, 2, -1, 3], mx.int32)
    with mx.fast.precise():
        logits = getattr(module, "as_linear", module)(x) if not isinstance(module, nn.Linear) else module(x)
        wanted = mx.where(targets >= 0, nn.losses.cross_entropy(mx.tanh(logits / 3) * 3, mx.maximum(targets, 0)), 0.0)
        found = nn.losses.linear_cross_entropy(module, x, targets, 3.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)

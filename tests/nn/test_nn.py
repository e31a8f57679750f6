"""The module tree, and layers against NumPy in float64."""
import math

import numpy as np
import pytest

from lazulite.engine import array as mx
from lazulite.engine import nn


class Pair(nn.Module):
    def __init__(self):
        self.layers = [nn.Linear(4, 3), nn.Linear(3, 2, bias=False)]
        self.norm = nn.RMSNorm(2)
        self._table = mx.zeros((7,))


def test_paths_are_weight_names() -> None:
    assert [name for name, _ in Pair().named_parameters()] == [
        "layers.0.weight", "layers.0.bias", "layers.1.weight", "norm.weight"
    ]
    assert [path for path, _ in Pair().named_modules()] == ["", "layers.0", "layers.1", "norm"]


def test_parameters_and_update() -> None:
    pair = Pair()
    tree = pair.parameters()
    assert tree["layers"][1]["weight"].shape == (2, 3) and nn.tree_unflatten(nn.tree_flatten(tree)) == tree
    pair.update({"norm": {"weight": mx.array([2.0, 3.0])}})
    assert pair.norm.weight.tolist() == [2.0, 3.0]


@pytest.mark.parametrize(("weights", "strict", "message"), [
    ({}, True, "4 missing: layers.0.bias, layers.0.weight, layers.1.weight, norm.weight"),
    ({"norm.bias": (2,)}, False, "1 unexpected: norm.bias"),
    ({"norm.weight": (3,)}, False, r"1 of another shape: norm.weight \(3,\), wanted \(2,\)"),
])
def test_load_weights_names_what_is_wrong(weights: dict, strict: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pair().load_weights([(name, mx.zeros(shape)) for name, shape in weights.items()], strict)


def test_load_weights_keeps_dtypes_and_buffers() -> None:
    weight = mx.zeros((2,), dtype=mx.float16)
    assert Pair().load_weights([("norm.weight", weight)], strict=False).norm.weight is weight


def test_swap_replaces_where_asked() -> None:
    pair = nn.swap(Pair(), lambda path, module: nn.Linear(3, 5) if path == "layers.1" else None)
    assert [layer.weight.shape for layer in pair.layers] == [(3, 4), (5, 3)]


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def layer_norm(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + b


LAYERS = {
    "linear": (nn.Linear(16, 8), lambda x, w, b: x @ w.T + b),
    "linear without bias": (nn.Linear(16, 8, bias=False), lambda x, w: x @ w.T),
    "rms_norm": (nn.RMSNorm(16), lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w),
    "layer_norm": (nn.LayerNorm(16), layer_norm),
}


@pytest.mark.parametrize("row", LAYERS)
def test_layer(row: str) -> None:
    layer, definition = LAYERS[row]
    drawn = {name: draw(*w.shape) for name, w in layer.named_parameters()}
    layer.load_weights([(name, mx.array(w)) for name, w in drawn.items()])
    x = draw(5, 16)
    wanted = definition(*(a.astype(np.float64) for a in (x, *drawn.values())))
    np.testing.assert_allclose(np.asarray(layer(mx.array(x))), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_twins(bits: int) -> None:
    """A quantized layer computes with the weights that its codes stand for."""
    linear, table = nn.Linear(64, 8), nn.Embedding(10, 64)
    linear.load_weights([("weight", mx.array(draw(8, 64))), ("bias", mx.array(draw(8)))])
    table.load_weights([("weight", mx.array(draw(10, 64)))])
    x, ids = mx.array(draw(3, 64)), mx.array([3, 9, 3], dtype=mx.int32)
    for layer, inputs, definition in [
        (linear, x, lambda w, b: np.asarray(x) @ w.T + b),
        (table, ids, lambda w: w[[3, 9, 3]]),
    ]:
        twin = layer.to_quantized(group_size=32, bits=bits)
        dense = mx.dequantize(twin.weight, twin.scales, twin.biases, 32, bits)
        bias = [np.asarray(layer.bias)] if layer is linear else []
        np.testing.assert_allclose(np.asarray(twin(inputs)), definition(np.asarray(dense), *bias), atol=5e-3)
    twin = table.to_quantized(32, bits)
    dense = np.asarray(mx.dequantize(twin.weight, twin.scales, twin.biases, 32, bits))
    np.testing.assert_allclose(np.asarray(twin.as_linear(x)), np.asarray(x) @ dense.T, atol=5e-3)
    np.testing.assert_allclose(np.asarray(table.as_linear(x)), np.asarray(x) @ np.asarray(table.weight).T, atol=1e-4)


@pytest.mark.parametrize(("name", "definition"), [
    ("silu", lambda x: x / (1 + np.exp(-x))),
    ("gelu", lambda x: x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2),
    ("gelu_approx", lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2),
])
def test_activation(name: str, definition) -> None:
    x = 3 * draw(100)
    np.testing.assert_allclose(np.asarray(getattr(nn, name)(mx.array(x))), definition(x.astype(np.float64)), atol=3e-6)


def test_context_of_one_sequence() -> None:
    context = nn.Context.single(3, [nn.LayerCache.empty(2, 4, 8, mx.int8)], start=31)
    assert context.positions.tolist() == context.slots.tolist() == [31, 32, 33]
    assert context.page_table.tolist() == [[0, 1]] and (context.lengths.item(), context.counts.item()) == (34, 3)
    assert context.layers[0].k.shape == (2, 4, 8, 32) and context.layers[0].v_scales.shape == (2, 4, 32)

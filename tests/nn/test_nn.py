"""What language models use: paths of weights, quantized layers, the context of a step."""
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


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


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


def test_context_of_one_sequence() -> None:
    context = nn.Context.single(3, [nn.LayerCache.empty(2, 4, 8, mx.int8)], start=31)
    assert context.positions.tolist() == context.slots.tolist() == [31, 32, 33]
    assert context.page_table.tolist() == [[0, 1]] and (context.lengths.item(), context.counts.item()) == (34, 3)
    assert context.layers[0].k.shape == (2, 4, 8, 32) and context.layers[0].v_scales.shape == (2, 4, 32)

"""What is drawn: with one seed, initializers, new layers and dropout give the numbers of mlx.nn."""
import mlx.core as mlx
import mlx.nn as theirs
import numpy as np
import pytest

from lazulite.engine import array as mx
from lazulite.engine import nn

INITIALIZERS = [  # name, arguments, shape, options of the call
    ("constant", (0.5,), (3, 4), {}), ("normal", (1.0, 0.2), (3, 4), {}), ("uniform", (-2.0, 3.0), (3, 4), {}),
    ("identity", (), (4, 4), {}), ("glorot_normal", (), (3, 4), {}), ("glorot_normal", (), (3, 2, 2, 4), {"gain": 2.0}),
    ("glorot_uniform", (), (6, 4), {}), ("he_normal", (), (3, 4), {}),
    ("he_normal", (), (3, 5, 4), {"mode": "fan_out", "gain": 0.5}), ("he_uniform", (), (3, 4), {}),
    ("sparse", (0.4,), (3, 5), {}), ("sparse", (0.5, 1.0, 0.1), (4, 4), {}), ("orthogonal", (), (4, 4), {}),
    ("orthogonal", (2.0,), (5, 3), {}),
]
LAYERS = [
    ("Linear", (5, 3)), ("Bilinear", (4, 3, 2)), ("Embedding", (6, 4)), ("Conv1d", (4, 6, 3)),
    ("Conv2d", (4, 6, 3, 1, 0, 1, 2)),
    ("Conv3d", (2, 3, 2)), ("ConvTranspose2d", (2, 3, 2)), ("RNN", (3, 4)), ("GRU", (3, 4)), ("LSTM", (3, 4, False)),
    ("MultiHeadAttention", (8, 2)), ("TransformerEncoder", (2, 8, 2)), ("TransformerDecoder", (1, 8, 2)),
    ("QuantizedLinear", (64, 8)), ("QuantizedEmbedding", (8, 64)),
]


def both(make) -> list:
    results = []
    for xp, library in ((mx, nn), (mlx, theirs)):
        xp.random.seed(5)
        results.append(make(xp, library))
    return results


@pytest.mark.parametrize(("name", "arguments", "shape", "options"), INITIALIZERS)
def test_initializer(name: str, arguments: tuple, shape: tuple, options: dict) -> None:
    found, wanted = both(lambda xp, library: getattr(library.init, name)(*arguments)(xp.zeros(shape), **options))
    np.testing.assert_allclose(np.asarray(found), np.array(wanted), rtol=1e-4, atol=1e-5)


def test_initializers_keep_to_dtype_and_say_what_they_take() -> None:
    assert nn.init.he_normal(mx.float16)(mx.zeros((2, 3))).dtype is mx.float16
    for name, shape in (("he_normal", (3,)), ("identity", (2, 3)), ("sparse", (2,)), ("orthogonal", (2, 2, 2))):
        make = getattr(nn.init, name)
        with pytest.raises(ValueError, match="wanted"):
            make(0.5)(mx.zeros(shape)) if name == "sparse" else make()(mx.zeros(shape))


@pytest.mark.parametrize(("name", "arguments"), LAYERS)
def test_new_layer(name: str, arguments: tuple) -> None:
    found, wanted = both(lambda xp, library: getattr(library, name)(*arguments))
    for (path, w), (other, v) in zip(found.named_parameters(), nn.tree_flatten(wanted.parameters()), strict=True):
        assert path == other
        np.testing.assert_allclose(np.asarray(w), np.array(v), rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(("name", "shape", "dropped"), [
    ("Dropout", (50, 40), (50, 40)), ("Dropout2d", (4, 5, 6, 30), (4, 1, 1, 30)), ("Dropout2d", (5, 6, 30), (1, 1, 30)),
    ("Dropout3d", (4, 2, 3, 2, 30), (4, 1, 1, 1, 30)),
])
def test_dropout(name: str, shape: tuple, dropped: tuple) -> None:
    found, wanted = both(lambda xp, library: getattr(library, name)(0.3)(xp.ones(shape)))
    np.testing.assert_allclose(np.asarray(found), np.array(wanted), rtol=1e-6)
    y = np.asarray(found)
    kept = np.broadcast_to(y[tuple(slice(0, s) for s in dropped)], shape)
    np.testing.assert_array_equal(y, kept)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.7)}
    layer = getattr(nn, name)(0.3).eval()
    np.testing.assert_array_equal(np.asarray(layer(mx.ones(shape))), np.ones(shape))
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        getattr(nn, name)(1.0)


def test_batch_norm_remembers() -> None:
    x = np.random.default_rng(0).standard_normal((8, 5, 3)).astype(np.float32) * 2 + 1
    layers = [library.BatchNorm(3, momentum=0.2) for library in (nn, theirs)]
    for layer, xp in zip(layers, (mx, mlx), strict=True):
        for part in (x[:4], x[4:]):
            layer(xp.array(part))
    ours, other = layers
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(np.asarray(ours[name]), np.array(other[name]), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(ours.eval()(mx.array(x))), np.array(other.eval()(mlx.array(x))), atol=1e-5)
    nn.Sequential(ours).unfreeze()
    assert ours.trainable_parameters().keys() == {"weight", "bias"}
    with pytest.raises(ValueError, match="more than one value a channel"):
        nn.BatchNorm(3)(mx.ones((1, 3)))

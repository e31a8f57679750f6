"""Every layer against its twin in mlx.nn: names, representation, value, and gradients of parameters and inputs."""
import mlx.core as mlx
import mlx.nn as theirs
import numpy as np
import pytest

from lazulite.engine import array as mx
from lazulite.engine import nn

ACTIVATIONS = {
    "CELU": {"alpha": 0.7}, "ELU": {"alpha": 0.7}, "GELU": {}, "GLU": {}, "SELU": {}, "HardShrink": {"lambd": 0.3},
    "HardTanh": {}, "Hardswish": {}, "LeakyReLU": {"negative_slope": 0.1}, "LogSigmoid": {}, "LogSoftmax": {},
    "Mish": {}, "PReLU": {"num_parameters": 6}, "ReLU": {}, "ReLU2": {}, "ReLU6": {}, "SiLU": {}, "Sigmoid": {},
    "Softmax": {}, "Softmin": {}, "Softplus": {}, "Softshrink": {"lambd": 0.3}, "Softsign": {},
    "Step": {"threshold": 0.2}, "Tanh": {},
}
LAYERS = [  # name, arguments, shapes of the inputs (integers: ids below 5), options of the call
    *((name, options, [(4, 6)], {}) for name, options in ACTIVATIONS.items()),
    ("GELU", {"approx": "fast"}, [(4, 6)], {}),
    ("GELU", {"approx": "tanh"}, [(4, 6)], {}),
    ("GLU", {"axis": 0}, [(4, 6)], {}),
    ("Identity", {}, [(4, 6)], {}),
    ("Linear", {"input_dims": 6, "output_dims": 5}, [(2, 4, 6)], {}),
    ("Linear", {"input_dims": 6, "output_dims": 5, "bias": False}, [(6,)], {}),
    ("Bilinear", {"input1_dims": 6, "input2_dims": 4, "output_dims": 5}, [(2, 3, 6), (2, 3, 4)], {}),
    ("Bilinear", {"input1_dims": 6, "input2_dims": 4, "output_dims": 5, "bias": False}, [(3, 6), (3, 4)], {}),
    ("Embedding", {"num_embeddings": 5, "dims": 6}, [("ids", 2, 3)], {}),
    ("Conv1d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3}, [(2, 9, 4)], {}),
    ("Conv1d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
     [(2, 9, 4)], {}),
    ("Conv2d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}, [(2, 7, 6, 4)], {}),
    ("Conv2d", {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 2), "stride": (2, 1), "dilation": 2,
                "bias": False}, [(2, 8, 7, 4)], {}),
    ("Conv3d", {"in_channels": 2, "out_channels": 3, "kernel_size": 2, "stride": 2}, [(1, 4, 5, 6, 2)], {}),
    ("ConvTranspose1d", {"in_channels": 4, "out_channels": 3, "kernel_size": 3, "stride": 2, "padding": 1,
                         "output_padding": 1}, [(2, 5, 4)], {}),
    ("ConvTranspose2d", {"in_channels": 4, "out_channels": 3, "kernel_size": 3, "stride": 2}, [(2, 3, 4, 4)], {}),
    ("ConvTranspose3d", {"in_channels": 2, "out_channels": 3, "kernel_size": 2, "stride": 2}, [(1, 2, 3, 2, 2)], {}),
    ("MaxPool1d", {"kernel_size": 2}, [(2, 8, 3)], {}),
    ("MaxPool1d", {"kernel_size": 3, "stride": 2, "padding": 1}, [(2, 9, 3)], {}),
    ("MaxPool2d", {"kernel_size": (2, 3), "stride": 2}, [(2, 8, 9, 3)], {}),
    ("MaxPool3d", {"kernel_size": 2, "stride": 1, "padding": 1}, [(1, 3, 4, 5, 2)], {}),
    ("AvgPool1d", {"kernel_size": 4, "stride": 2}, [(2, 9, 3)], {}),
    ("AvgPool2d", {"kernel_size": 4}, [(2, 8, 4, 3)], {}),
    ("AvgPool2d", {"kernel_size": 3, "stride": 2, "padding": (1, 0)}, [(2, 8, 7, 3)], {}),
    ("AvgPool3d", {"kernel_size": 2}, [(1, 4, 4, 5, 2)], {}),
    ("RMSNorm", {"dims": 6}, [(2, 4, 6)], {}),
    ("LayerNorm", {"dims": 6}, [(2, 4, 6)], {}),
    ("LayerNorm", {"dims": 6, "bias": False}, [(2, 4, 6)], {}),
    ("LayerNorm", {"dims": 6, "affine": False}, [(2, 4, 6)], {}),
    ("InstanceNorm", {"dims": 4, "affine": True}, [(2, 5, 6, 4)], {}),
    ("InstanceNorm", {"dims": 4}, [(2, 5, 4)], {}),
    ("GroupNorm", {"num_groups": 3, "dims": 6}, [(2, 5, 6)], {}),
    ("GroupNorm", {"num_groups": 3, "dims": 6, "pytorch_compatible": True}, [(2, 5, 3, 6)], {}),
    ("GroupNorm", {"num_groups": 2, "dims": 6, "affine": False}, [(2, 6)], {}),
    ("BatchNorm", {"num_features": 6}, [(4, 6)], {}),
    ("BatchNorm", {"num_features": 6, "affine": False, "momentum": 0.3}, [(4, 3, 2, 6)], {}),
    ("BatchNorm", {"num_features": 6, "track_running_stats": False}, [(4, 3, 6)], {}),
    ("RNN", {"input_size": 4, "hidden_size": 5}, [(2, 6, 4)], {}),
    ("RNN", {"input_size": 4, "hidden_size": 5, "bias": False}, [(6, 4), (5,)], {}),
    ("GRU", {"input_size": 4, "hidden_size": 5}, [(2, 6, 4)], {}),
    ("GRU", {"input_size": 4, "hidden_size": 5, "bias": False}, [(2, 3, 4), (2, 5)], {}),
    ("LSTM", {"input_size": 4, "hidden_size": 5}, [(2, 6, 4)], {}),
    ("LSTM", {"input_size": 4, "hidden_size": 5, "bias": False}, [(3, 4), (5,), (5,)], {}),
    ("MultiHeadAttention", {"dims": 8, "num_heads": 2}, [(2, 5, 8), (2, 4, 8), (2, 4, 8)], {}),
    ("MultiHeadAttention", {"dims": 8, "num_heads": 2, "query_input_dims": 6, "key_input_dims": 4, "value_dims": 4,
                            "value_output_dims": 3, "bias": True}, [(2, 5, 6), (2, 4, 4), (2, 4, 4), (5, 4)], {}),
    ("TransformerEncoder", {"num_layers": 2, "dims": 8, "num_heads": 2}, [(2, 5, 8), (5, 5)], {}),
    ("TransformerEncoder", {"num_layers": 1, "dims": 8, "num_heads": 2, "mlp_dims": 12, "norm_first": False,
                            "checkpoint": True}, [(2, 5, 8)], {"mask": None}),
    ("TransformerDecoder", {"num_layers": 1, "dims": 8, "num_heads": 2, "norm_first": False},
     [(2, 5, 8), (2, 4, 8), (5, 5), (5, 4)], {}),
    ("Transformer", {"dims": 8, "num_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1},
     [(2, 4, 8), (2, 5, 8), (4, 4), (5, 5), (5, 4)], {}),
    ("RoPE", {"dims": 6}, [(2, 3, 5, 8)], {"offset": 3}),
    ("RoPE", {"dims": 8, "traditional": True, "base": 100.0, "scale": 0.5}, [(2, 3, 5, 8)], {}),
    ("SinusoidalPositionalEncoding", {"dims": 8}, [(3, 4)], {}),
    ("SinusoidalPositionalEncoding", {"dims": 2, "cos_first": True, "full_turns": True, "scale": 1.0}, [(3,)], {}),
    ("ALiBi", {}, [(2, 6, 4, 5)], {}),
    ("ALiBi", {}, [(2, 4, 1, 5)], {"offset": 4}),
    *(("Upsample", {"scale_factor": scale, "mode": mode, "align_corners": corners}, [(2, 4, 5, 3)], {})
      for scale, mode, corners in (
          (2, "nearest", False), ((1.5, 0.5), "nearest", False), (2, "linear", False), ((2.5, 0.6), "linear", True),
          (2, "cubic", False), ((1.5, 0.5), "cubic", True))),
    ("Upsample", {"scale_factor": 0.5, "mode": "linear", "antialias": True}, [(2, 9, 3)], {}),
    ("Upsample", {"scale_factor": (0.4, 1.5), "mode": "cubic", "antialias": True}, [(2, 9, 8, 3)], {}),
    ("Dropout", {"p": 0.0}, [(4, 6)], {}),
]


def draw(seed: int, shape: tuple) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if shape[:1] == ("ids",):
        return rng.integers(0, 5, shape[1:]).astype(np.int32)
    return rng.standard_normal(shape).astype(np.float32)


def leaves(tree) -> list:
    return [leaf for _, leaf in nn.tree_flatten(tree)]


def run(xp, layer, arrays: list[np.ndarray], options: dict) -> tuple[list, dict]:
    """All results, and the gradients of a weighted sum of them, by the path of a parameter or the place of an input."""
    floats = [i for i, a in enumerate(arrays) if a.dtype == np.float32]
    results = []

    def total(parameters, inputs):
        layer.update(parameters)
        given = [inputs.get(str(i), xp.array(a)) for i, a in enumerate(arrays)]
        results[:] = leaves(layer(*given, **options))
        return sum((y * xp.array(draw(7, y.shape))).sum() for y in results)

    inputs = {str(i): xp.array(arrays[i]) for i in floats}
    parameters = layer.trainable_parameters()
    gradients = xp.grad(total, argnums=(0, 1))(parameters, inputs)
    layer.update(parameters)
    values = [np.array(y) for y in leaves(layer(*map(xp.array, arrays), **options))]
    return values, {path: np.array(g) for path, g in nn.tree_flatten(list(gradients))}


def twins(name: str, arguments: dict):
    ours, other = getattr(nn, name)(**arguments), getattr(theirs, name)(**arguments)
    weights = {path: draw(len(path), w.shape) for path, w in ours.named_parameters() if "running" not in path}
    ours.load_weights([(path, mx.array(w)) for path, w in weights.items()], strict=False)
    other.load_weights([(path, mlx.array(w)) for path, w in weights.items()], strict=False)
    return ours, other


@pytest.mark.parametrize(
    ("name", "arguments", "shapes", "options"), LAYERS, ids=[f"{row[0]}-{i}" for i, row in enumerate(LAYERS)])
def test_layer(name: str, arguments: dict, shapes: list, options: dict) -> None:
    ours, other = twins(name, arguments)
    assert repr(ours).split(", nonlinearity")[0] == repr(other).split(", nonlinearity")[0]
    assert {p: w.shape for p, w in ours.named_parameters()} == {
        p: w.shape for p, w in nn.tree_flatten(other.parameters())}
    arrays = [draw(i, shape) for i, shape in enumerate(shapes)]
    found, found_gradients = run(mx, ours, arrays, options)
    wanted, wanted_gradients = run(mlx, other, arrays, options)
    for y, w in zip(found, wanted, strict=True):
        assert y.dtype == w.dtype
        np.testing.assert_allclose(y, w, rtol=1e-5, atol=2e-5)
    assert found_gradients.keys() == wanted_gradients.keys()
    for path, gradient in wanted_gradients.items():
        np.testing.assert_allclose(found_gradients[path], gradient, rtol=1e-4, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("call", [
    lambda xp, nn: nn.MultiHeadAttention.create_additive_causal_mask(4),
    lambda xp, nn: nn.MultiHeadAttention.create_additive_causal_mask(3, xp.float16),
    lambda xp, nn: nn.ALiBi.create_alibi_matrix(6, 5, 12, offset=2),
    lambda xp, nn: nn.ALiBi.create_alibi_slope(4, xp.float16),
    lambda xp, nn: nn.ALiBi()(xp.zeros((1, 2, 3, 4)), mask=xp.ones((3, 4))),
    lambda xp, nn: nn.TransformerEncoder(1, 8, 2).apply(xp.ones_like)(xp.ones((1, 3, 8)), mask="causal"),
])
def test_functions(call) -> None:
    found, wanted = call(mx, nn), call(mlx, theirs)
    assert str(found.dtype) == str(wanted.dtype).split(".")[-1]
    np.testing.assert_allclose(np.asarray(found), np.array(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("make", "shape", "message"), [
    (lambda: nn.Conv2d(3, 4, 3, groups=2), None, r"\[Conv2d\] 3 channels in 2 groups: a multiple wanted"),
    (lambda: nn.MaxPool2d((2, 0)), None, r"\[MaxPool2d\] kernel_size is \(2, 0\): 2 of at least 1 wanted"),
    (lambda: nn.AvgPool1d(5), (1, 3, 2), r"\[AvgPool1d\] \(1, 3, 2\): axis 1 is shorter than a window of 5"),
    (lambda: nn.GroupNorm(4, 6), None, r"\[GroupNorm\] 6 channels in 4 groups: a multiple wanted"),
    (lambda: nn.LayerNorm(4, eps=0.0), None, r"\[LayerNorm\] eps is 0.0: more than 0 wanted"),
    (lambda: nn.BatchNorm(4), (2, 2, 2, 2, 4), "2, 3 or 4 axes wanted"),
    (lambda: nn.MultiHeadAttention(6, 4), None, "6 channels in 4 heads: a multiple wanted"),
    (lambda: nn.Upsample(2, "area"), None, "mode is 'area', wanted nearest, linear or cubic"),
    (lambda: nn.Upsample((2, 2)), (1, 3, 2), r"scale_factor \(2.0, 2.0\): one a spatial axis wanted"),
    (lambda: nn.GELU("exact"), None, "approx is 'exact', wanted one of none, precise, tanh, fast"),
    (lambda: nn.SinusoidalPositionalEncoding(5), None, "dims is 5: positive and even wanted"),
    (lambda: nn.RNN(2, 3, nonlinearity="tanh"), None, "nonlinearity is 'tanh': a function wanted"),
    (lambda: nn.Dropout2d(0.5), (2, 3), r"\[Dropout2d\] \(2, 3\): 2 axes before the channels wanted"),
])
def test_errors(make, shape: tuple | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer = make()
        layer(mx.zeros(shape))

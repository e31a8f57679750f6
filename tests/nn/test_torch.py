"""Layers against their twins in torch: value and gradients. Torch has the channels after the batch, ours come last."""
import numpy as np
import pytest
import torch
from torch import nn as tnn

from lazulite.engine import array as mx
from lazulite.engine import nn


def last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def transposed(x: np.ndarray) -> np.ndarray:
    """(in, out, …) to (out, …, in)"""
    return last(np.swapaxes(x, 0, 1))


def same(x: np.ndarray) -> np.ndarray:
    return x


WEIGHT = {"weight": ("weight", same)}
SAME = {"weight": ("weight", same), "bias": ("bias", same)}
CONV = {"weight": ("weight", last), "bias": ("bias", same)}
BACK = {"weight": ("weight", transposed), "bias": ("bias", same)}
LSTM = {"weight_ih_l0": ("Wx", same), "weight_hh_l0": ("Wh", same), "bias_ih_l0": ("bias", same)}
GRU = {"weight_ih_l0": ("Wx", same), "weight_hh_l0": ("Wh", same), "bias_ih_l0": ("b", same)}
ROWS = {  # our layer, torch's, the shape of torch's input, our weights from torch's
    "linear": (lambda: nn.Linear(5, 3), lambda: tnn.Linear(5, 3), (4, 5), SAME),
    "embedding": (lambda: nn.Embedding(5, 3), lambda: tnn.Embedding(5, 3), "ids", WEIGHT),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, groups=2), lambda: tnn.Conv1d(4, 6, 3, 2, 1, groups=2), (2, 4, 9),
               CONV),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=2), lambda: tnn.Conv2d(4, 6, (3, 2), dilation=2), (2, 4, 8, 7),
               CONV),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), lambda: tnn.Conv3d(2, 3, 2, padding=1), (1, 2, 3, 4, 3), CONV),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 3, 3, 2, 1, output_padding=1),
                         lambda: tnn.ConvTranspose1d(4, 3, 3, 2, 1, output_padding=1), (2, 4, 5), BACK),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 3, 3, 2, dilation=2),
                         lambda: tnn.ConvTranspose2d(4, 3, 3, 2, dilation=2), (2, 4, 5, 3), BACK),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, 2, 1), lambda: tnn.ConvTranspose3d(2, 3, 2, 2, 1),
                         (1, 2, 3, 2, 3), BACK),
    "layer_norm": (lambda: nn.LayerNorm(5), lambda: tnn.LayerNorm(5), (4, 5), SAME),
    "rms_norm": (lambda: nn.RMSNorm(5), lambda: tnn.RMSNorm(5, eps=1e-5), (4, 5), WEIGHT),
    "batch_norm": (lambda: nn.BatchNorm(4), lambda: tnn.BatchNorm2d(4), (3, 4, 2, 5), SAME),
    "instance_norm": (lambda: nn.InstanceNorm(4), lambda: tnn.InstanceNorm2d(4), (3, 4, 2, 5), {}),
    "group_norm": (lambda: nn.GroupNorm(2, 6, pytorch_compatible=True), lambda: tnn.GroupNorm(2, 6), (3, 6, 5), SAME),
    "max_pool1d": (lambda: nn.MaxPool1d(3, 2, 1), lambda: tnn.MaxPool1d(3, 2, 1), (2, 4, 9), {}),
    "max_pool2d": (lambda: nn.MaxPool2d(2), lambda: tnn.MaxPool2d(2), (2, 4, 8, 6), {}),
    "max_pool3d": (lambda: nn.MaxPool3d(2, 1), lambda: tnn.MaxPool3d(2, 1), (1, 2, 4, 5, 3), {}),
    "avg_pool2d": (lambda: nn.AvgPool2d(3, 2, 1), lambda: tnn.AvgPool2d(3, 2, 1), (2, 4, 8, 7), {}),
    "nearest": (lambda: nn.Upsample(2), lambda: tnn.Upsample(scale_factor=2), (2, 3, 4, 5), {}),
    "bilinear": (lambda: nn.Upsample(2, "linear"), lambda: tnn.Upsample(scale_factor=2, mode="bilinear"), (2, 3, 4, 5),
                 {}),
    "corners": (lambda: nn.Upsample(3, "linear", True),
                lambda: tnn.Upsample(scale_factor=3, mode="bilinear", align_corners=True), (2, 3, 4, 5), {}),
    "bicubic": (lambda: nn.Upsample(2, "cubic"), lambda: tnn.Upsample(scale_factor=2, mode="bicubic"), (2, 3, 4, 5),
                {}),
    "lstm": (lambda: nn.LSTM(3, 4), lambda: tnn.LSTM(3, 4, batch_first=True), (2, 5, 3), LSTM),
    "gru": (lambda: nn.GRU(3, 4), lambda: tnn.GRU(3, 4, batch_first=True), (2, 5, 3), GRU),
}
SEQUENCES = ("linear", "embedding", "layer_norm", "rms_norm", "lstm", "gru")  # channels are last in torch too


def compare(found: mx.Array, wanted: np.ndarray, what: str = "") -> None:
    np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-4, rtol=1e-4, err_msg=what)


@pytest.mark.parametrize("name", ROWS)
def test_like_torch(name: str) -> None:
    make, make_twin, shape, names = ROWS[name]
    torch.manual_seed(0)
    ours, twin = make(), make_twin()
    for path, w in twin.named_parameters():
        if path == "bias_hh_l0":
            w.data.zero_()                                  # ours has one bias
        else:
            w.data.normal_()
    ours.load_weights([(to, mx.array(np.ascontiguousarray(move(getattr(twin, path).detach().numpy()))))
                       for path, (to, move) in names.items()], strict=False)
    if name == "gru":
        ours.bhn = mx.zeros((4,))
    rng, arrange = np.random.default_rng(0), same if name in SEQUENCES else last
    x = rng.integers(0, 5, (2, 3)) if shape == "ids" else rng.standard_normal(shape).astype(np.float32)
    given = torch.tensor(x, requires_grad=shape != "ids")
    wanted = twin(given)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    weight = rng.standard_normal(wanted.shape).astype(np.float32)
    (wanted * torch.tensor(weight)).sum().backward()

    def total(parameters, x):
        ours.update(parameters)
        y = ours(x)
        return (y[0] if isinstance(y, tuple) else y) * mx.array(np.ascontiguousarray(arrange(weight)))

    here = mx.array(np.ascontiguousarray(arrange(x)))
    parameters = ours.trainable_parameters()
    compare(total(parameters, here), arrange(wanted.detach().numpy() * weight))
    gradients = mx.grad(lambda *args: total(*args).sum())(parameters, here)
    for path, (to, move) in names.items():
        compare(gradients[to], move(getattr(twin, path).grad.numpy()), to)
    if shape != "ids":
        gradient = mx.grad(lambda *args: total(*args).sum(), argnums=1)(parameters, here)
        compare(gradient, arrange(given.grad.numpy()))

"""Codes and scales equal to mlx's own quantizer; which tensors are quantized."""
import mlx.core as mlx
import numpy as np
import pytest

from lazulite.engine import array as mx
from lazulite.engine import nn
from lazulite.engine.errors import UserError
from lazulite.quant import Format, Quantizer, quantize


def groups(seed: int) -> np.ndarray:
    """Rows that reach the quantizer's corners: one-sided, constant, zero, tiny and lopsided groups."""
    random = np.random.default_rng(seed)
    w = random.standard_normal((12, 256))
    w[1], w[2], w[3], w[4] = np.abs(w[1]), -np.abs(w[2]), 0.0, 0.7
    w[5] *= 1e-6
    w[6, ::64] = 30.0
    w[7, ::64] = -30.0
    return w.astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_equal_to_mlx(bits: int, group_size: int, dtype: str) -> None:
    w = groups(bits * group_size)
    ours = mx.quantize(mx.array(w).astype(getattr(mx, dtype)), group_size, bits)
    theirs = mlx.quantize(mlx.array(w).astype(getattr(mlx, dtype)), group_size, bits)
    for name, a, b in zip(("codes", "scales", "biases"), ours, theirs, strict=True):
        b = b if b.dtype == mlx.uint32 else b.astype(mlx.float32)
        np.testing.assert_array_equal(np.asarray(a), np.array(b), name)
    wide = [ours[0], *(a.astype(mx.float32) for a in ours[1:])]  # as mlx rounds each operation to the weight's dtype
    dense = mlx.dequantize(theirs[0], *(a.astype(mlx.float32) for a in theirs[1:]), group_size, bits)
    np.testing.assert_allclose(np.asarray(mx.dequantize(*wide, group_size, bits)), np.array(dense), atol=4e-6)


class Small(nn.Module):
    def __init__(self):
        self.embed_tokens = nn.Embedding(8, 64)
        self.layers = [nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 64)]
        self.norm = nn.RMSNorm(64)


def choose(path: str) -> bool | Format:
    return Format(32, 8) if path == "layers.2" else path != "embed_tokens"


def test_tree_and_tensors_are_quantized_alike() -> None:
    small, quantizer = Small(), Quantizer(Format(64, 4), choose)
    by_tensor = {}
    for name, w in small.named_parameters():
        by_tensor |= quantizer(name, w) or {name: w}
    config = quantize(small, 4, 64, choose)
    assert config == quantizer.config == {
        "group_size": 64, "bits": 4, "mode": "affine", "layers.2": {"group_size": 32, "bits": 8, "mode": "affine"}
    }
    assert [type(module).__name__ for _, module in small.named_modules()] == [
        "Small", "Embedding", "QuantizedLinear", "Linear", "QuantizedLinear", "RMSNorm"
    ]  # rows of 96 are not whole groups of 64
    assert {name: w.shape for name, w in small.named_parameters()} == {name: w.shape for name, w in by_tensor.items()}


@pytest.mark.parametrize("arguments", [(48, 4), (64, 7), (64, 4, "mxfp4")])
def test_unknown_formats(arguments: tuple) -> None:
    with pytest.raises(UserError, match=r"\[quantize\] .* wanted one of"):
        Format(*arguments)

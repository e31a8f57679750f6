"""mxfp4, nvfp4, mxfp8 (and affine codes of one bit) against mlx: bytes, numbers, products; recipes."""
import mlx.core as mlx
import mlx.nn as mlx_nn
import numpy as np
import pytest

from lazulite.engine import array as mx
from lazulite.engine import nn
from lazulite.engine.errors import UserError
from lazulite.quant import Format, Quantizer, recipe

MODES = ["mxfp4", "nvfp4", "mxfp8"]


def weights(seed: int = 0) -> np.ndarray:
    """Rows that reach the quantizers' corners: zeros, powers of two, one sign, tiny, large and lopsided groups."""
    random = np.random.default_rng(seed)
    w = random.standard_normal((33, 128)).astype(np.float32)
    w[1], w[2], w[3], w[4] = 0, np.abs(w[2]), 0.75, -6.0
    w[5] *= 1e-3
    w[6] *= 200
    w[7, ::16] = 448
    w[8] = np.tile([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.1, -1.25, -1.75, -2.5, -3.5, -5, 0], 8)  # ties
    return w


def as_float(a) -> np.ndarray:
    return np.array(a.astype(mlx.float32)) if isinstance(a, mlx.array) else np.asarray(a.astype(mx.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_bytes_are_mlx(mode: str, dtype: str) -> None:
    w = weights()[:32]
    ours = mx.quantize(mx.array(w).astype(getattr(mx, dtype)), mode=mode)
    theirs = mlx.quantize(mlx.array(w).astype(getattr(mlx, dtype)), mode=mode)
    assert len(ours) == len(theirs) == 2 and ours[1].dtype is mx.uint8
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.array(b))
    plain, wide = mx.dequantize(*ours, mode=mode), mx.dequantize(*ours, mode=mode, dtype=mx.float32)
    assert plain.dtype is mx.bfloat16
    np.testing.assert_array_equal(as_float(plain), as_float(mlx.dequantize(*theirs, mode=mode)))
    np.testing.assert_array_equal(as_float(wide), as_float(mlx.dequantize(*theirs, mode=mode, dtype=mlx.float32)))


@pytest.mark.parametrize("mode", MODES)
def test_every_code_and_every_scale(mode: str) -> None:
    group, bits = (16, 4) if mode == "nvfp4" else (32, 4 if mode == "mxfp4" else 8)
    codes = np.resize(np.arange(256, dtype=np.uint8), (256, group * bits // 8)).copy()
    codes[codes % 128 == 127] = 0 if bits == 8 else 127                # NaN
    scales = np.arange(256, dtype=np.uint8)[:, None].copy()
    scales[scales % 128 == 127] = 0 if mode == "nvfp4" else 127        # NaN, and what overflows
    scales[251:] = 0
    args = codes.view(np.uint32), scales
    ours = mx.dequantize(*map(mx.array, args), mode=mode, dtype=mx.float32)
    theirs = mlx.dequantize(*map(mlx.array, args), mode=mode, dtype=mlx.float32)
    np.testing.assert_array_equal(as_float(ours), as_float(theirs))


@pytest.mark.parametrize("global_scale", [3.5, 1000.0])
def test_nvfp4_with_a_global_scale(global_scale: float) -> None:
    w, given = weights()[8:24], np.float32(global_scale)
    ours = mx.quantize(mx.array(w), mode="nvfp4", global_scale=mx.array(given))
    theirs = mlx.quantize(mlx.array(w), mode="nvfp4", global_scale=mlx.array(given))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.array(b))
    back = mx.dequantize(*ours, mode="nvfp4", global_scale=mx.array(given), dtype=mx.float32)
    wanted = mlx.dequantize(*theirs, mode="nvfp4", global_scale=mlx.array(given), dtype=mlx.float32)
    np.testing.assert_allclose(as_float(back), as_float(wanted), rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 12, 70])
@pytest.mark.parametrize("mode", MODES)
def test_products(mode: str, rows: int) -> None:
    w = weights()[8:28] / 8
    packed, x = mx.quantize(mx.array(w), mode=mode), np.random.default_rng(rows).standard_normal((rows, 128))
    exact = as_float(mx.dequantize(*packed, mode=mode, dtype=mx.float32)).astype(np.float64)
    tolerance = (2e-4 if rows <= 4 else 2e-2) * np.abs(x @ exact.T).max()
    x32 = mx.array(x.astype(np.float32))
    np.testing.assert_allclose(as_float(mx.quantized_matmul(x32, *packed, mode=mode)), x @ exact.T, atol=tolerance)
    back = mx.quantized_matmul(x32[:, :20], *packed, transpose=False, mode=mode)
    np.testing.assert_allclose(as_float(back), x[:, :20] @ exact, atol=2e-2 * np.abs(exact).max() * 20)
    grad = mx.grad(lambda x: mx.quantized_matmul(x, *packed, mode=mode).sum())(x32)
    np.testing.assert_allclose(as_float(grad)[0], exact.sum(0), atol=2e-2 * np.abs(exact).sum(0).max())


@pytest.mark.parametrize("mode", MODES)
def test_rows_and_gathered_products(mode: str) -> None:
    w = np.stack([weights(i)[8:28] / 8 for i in range(3)])
    packed, theirs = mx.quantize(mx.array(w), mode=mode), mlx.quantize(mlx.array(w), mode=mode)
    exact = as_float(mx.dequantize(*packed, mode=mode, dtype=mx.float32))
    index = mx.array([[3, 0], [-1, 2]])
    found = mx.quantized_take(packed[0][1], packed[1][1], None, index, mode=mode)
    np.testing.assert_array_equal(as_float(found), exact[1][[[3, 0], [-1, 2]]])
    x = np.random.default_rng(0).standard_normal((4, 2, 128)).astype(np.float32)
    which = np.array([2, 0, 0, 1], np.int32)
    ours = mx.gather_qmm(mx.array(x), *packed, rhs_indices=mx.array(which), mode=mode)
    wanted = mlx.gather_qmm(mlx.array(x), *theirs, rhs_indices=mlx.array(which), mode=mode)
    np.testing.assert_allclose(as_float(ours), as_float(wanted), atol=1e-4 * np.abs(as_float(wanted)).max())


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
def test_qqmm(mode: str) -> None:
    """The definition: both sides rounded to the mode. (mlx has it on GPUs only.)"""
    w, x = weights()[8:28], np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    rounded = [as_float(mlx.dequantize(*mlx.quantize(mlx.array(a), mode=mode), mode=mode)) for a in (x, w)]
    wanted = rounded[0].astype(np.float64) @ rounded[1].T
    packed = mx.quantize(mx.array(w), mode=mode)
    for arguments in [(mx.array(w),), packed]:
        found = mx.qqmm(mx.array(x), *arguments, mode=mode)
        np.testing.assert_allclose(as_float(found), wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("mode", MODES)
def test_layers(mode: str) -> None:
    ours, theirs = nn.Linear(128, 64), mlx_nn.Linear(128, 64)
    theirs.weight, theirs.bias = (mlx.array(np.asarray(a)) for a in (ours.weight, ours.bias))
    ours, theirs = ours.to_quantized(mode=mode), theirs.to_quantized(mode=mode)
    assert (ours.group_size, ours.bits, ours.mode, ours.biases) == (theirs.group_size, theirs.bits, mode, None)
    assert {name for name, _ in ours.named_parameters()} == {"weight", "scales", "bias"}
    np.testing.assert_array_equal(np.asarray(ours.scales), np.array(theirs.scales))
    x = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    np.testing.assert_allclose(as_float(ours(mx.array(x))), as_float(theirs(mlx.array(x))), atol=2e-3)
    table = nn.Embedding(16, 64).to_quantized(mode=mode)
    rows = mx.dequantize(table.weight, table.scales, mode=mode, dtype=mx.float32)
    np.testing.assert_array_equal(as_float(table(mx.array([3, 5]))), as_float(rows)[[3, 5]])
    np.testing.assert_array_equal(as_float(table.dequantized()), as_float(rows))


@pytest.mark.parametrize(("activation", "tokens"), [("silu", 1), ("clamped_swish", 9)])
@pytest.mark.parametrize("mode", [*MODES, "fp8"])
def test_experts(mode: str, activation: str, tokens: int) -> None:
    random, made = np.random.default_rng(0), "mxfp8" if mode == "fp8" else mode
    draw = lambda *shape: mx.array(random.standard_normal(shape).astype(np.float32) / 4)  # noqa: E731
    matrices = [mx.quantize(draw(4, n, k), mode=made) for n, k in [(64, 32), (64, 32), (32, 64)]]
    wide = [(mx.dequantize(*m, mode=made, dtype=mx.float32),) for m in matrices]
    if mode == "fp8":                                                  # the same with scales that are floats
        matrices = [(codes, 2.0 ** (scales.astype(mx.float32) - 127)) for codes, scales in matrices]
        found = mx.dequantize(*matrices[0], group_size=32, mode="fp8")
        np.testing.assert_array_equal(as_float(found), as_float(wide[0][0]))
    chosen = mx.array(random.integers(0, 4, (tokens, 2)).astype(np.int32))
    arguments = draw(tokens, 32), chosen, mx.abs(draw(tokens, 2))
    format = dict(bits=8 if made == "mxfp8" else 4, group_size=16 if mode == "nvfp4" else 32)
    found = as_float(mx.fast.experts(*arguments, *matrices, activation=activation, **format))
    wanted = as_float(mx.fast.experts(*arguments, *wide, activation=activation))
    np.testing.assert_allclose(found, wanted, atol=2e-2 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_bit(dtype: str) -> None:
    w = weights()[:32]
    ours = mx.quantize(mx.array(w).astype(getattr(mx, dtype)), 64, 1)
    theirs = mlx.quantize(mlx.array(w).astype(getattr(mlx, dtype)), 64, 1)
    np.testing.assert_array_equal(np.asarray(ours[0]), np.array(theirs[0]))
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_array_equal(as_float(a), as_float(b))
    x = mx.array(weights(1)[:3])
    exact = as_float(mx.dequantize(*(a.astype(mx.float32) if a.dtype is not mx.uint32 else a for a in ours), 64, 1))
    found = as_float(mx.quantized_matmul(x, *ours, group_size=64, bits=1))
    np.testing.assert_allclose(found, as_float(x) @ exact.T, atol=2e-3 * np.abs(exact).max() * 128**0.5)


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(mode="int4"), "mode 'int4'"), (dict(mode="mxfp4", bits=8), "mxfp4 with 8 bits"),
    (dict(mode="nvfp4", group_size=32), "nvfp4 with 4 bits in groups of 32"), (dict(mode="fp8"), "read, not made"),
])
def test_modes_that_are_none(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mx.quantize(mx.array(weights()), **arguments)


def test_biases_belong_to_affine() -> None:
    codes, scales, biases = mx.quantize(mx.array(weights()), 32, 4)
    with pytest.raises(ValueError, match="affine has biases, no other mode has"):
        mx.dequantize(codes, scales, None, 32, 4)
    with pytest.raises(ValueError, match="affine has biases, no other mode has"):
        mx.quantized_matmul(mx.array(weights()), codes, scales, biases, mode="mxfp4")


def test_recipes() -> None:
    choose = recipe("mixed_4_6", 16)
    bits = {i: choose(f"model.layers.{i}.self_attn.v_proj").bits for i in range(16)}
    assert [i for i, b in bits.items() if b == 6] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert choose("lm_head").bits == 6 and choose("model.layers.0.mlp.up_proj").bits == 4
    quantizer = Quantizer(Format(64, 4), choose)
    assert quantizer("model.layers.0.mlp.down_proj.weight", mx.array(weights())) is not None
    assert quantizer.config["model.layers.0.mlp.down_proj"] == {"group_size": 64, "bits": 6, "mode": "affine"}
    with pytest.raises(UserError, match="recipe is 'mixed_1_2', wanted one of mixed_2_6, mixed_3_4"):
        recipe("mixed_1_2", 16)


@pytest.mark.parametrize("mode", MODES)
def test_a_format_has_the_defaults_of_its_mode(mode: str) -> None:
    codes, scales = mlx.quantize(mlx.array(weights()[:32]), mode=mode)
    format = Format(mode=mode)
    assert (format.group_size, format.bits) == (128 // scales.shape[1], codes.shape[1] // 4)
    parts = Quantizer(format)("up.weight", mx.array(weights()[:32]))
    assert parts is not None and list(parts) == ["up.weight", "up.scales"]

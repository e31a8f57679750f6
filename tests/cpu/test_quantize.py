"""quantize against mlx's own quantizer and a NumPy port of it, bit for bit; dequantize is the way back."""

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazulite.engine import cpu

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def operand(x):
    return (x.view(np.uint16), "bfloat16") if x.dtype == ml_dtypes.bfloat16 else x


def quantize(x, bits, group, isa):
    n, k = x.shape
    w, (s, b) = np.empty((n, k * bits // 32), np.uint32), (np.empty((n, k // group), x.dtype) for _ in range(2))
    cpu.call("quantize", [w, operand(s), operand(b)], [operand(x)], [bits, group], isa=isa)
    return w, s, b


def by_numpy(x, bits, group):
    """The formula of mlx in float32: codes, scales, biases."""
    v = x.astype(np.float32).reshape(len(x), -1, group)
    low, high, most = v.min(2), v.max(2), np.float32((1 << bits) - 1)
    s, side = np.maximum((high - low) / most, np.float32(1e-7)), np.abs(low) > np.abs(high)
    s, edge = np.where(side, s, -s), np.where(side, low, high)
    q0 = np.rint(edge / s)
    with np.errstate(all="ignore"):
        s, b = np.where(q0 != 0, edge / q0, s), np.where(q0 != 0, edge, np.float32(0))
    q = np.clip(np.rint((v - b[..., None]) / s[..., None]), 0, most).astype(np.uint32)
    stream = q.reshape(len(x), -1, 1) >> np.arange(bits, dtype=np.uint32) & 1
    words = np.packbits(stream.reshape(len(x), -1), axis=1, bitorder="little").view(np.uint32)
    return words, s.astype(x.dtype), b.astype(x.dtype)


def samples(rng, n, k, dtype):
    """Gaussians, and rows with a constant, zeros, one sign, one outlier."""
    x = rng.standard_normal((n + 5, k)).astype(np.float32)
    x[0], x[1], x[2], x[3, 5], x[4] = 0, 0.3, np.abs(x[2]), 1000, -np.abs(x[4]) * 1e-9
    return x.astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_bit_equal_to_mlx(isa, bits, group, dtype):
    x = samples(np.random.default_rng(bits), 70, 384, dtype)
    got = quantize(x, bits, group, isa)
    wanted = by_numpy(x, bits, group)
    if group > 16:
        source = mx.array(x.view(np.uint16)).view(mx.bfloat16) if dtype == "bfloat16" else mx.array(x)
        w, s, b = mx.quantize(source, group_size=group, bits=bits, stream=mx.cpu)
        as_numpy = lambda a: np.array(a.view(mx.uint16)).view(x.dtype) if dtype == "bfloat16" else np.array(a)  # noqa: E731
        wanted = np.array(w), as_numpy(s), as_numpy(b)
    for g, w in zip(got, wanted, strict=True):
        assert np.array_equal(g.view(np.uint8), w.view(np.uint8))


@settings(max_examples=40, deadline=None)
@given(
    isa=st.sampled_from(cpu.runtime().isas()), n=st.integers(0, 5), groups=st.integers(1, 5), seed=st.integers(0, 99),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]), group=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from(list(DTYPES)), scale=st.floats(1e-4, 1e3),
)  # fmt: skip
def test_round_trip(isa, n, groups, bits, group, dtype, scale, seed):
    groups *= 1 + (groups * group * bits % 32 != 0)  # whole words
    x = (np.random.default_rng(seed).standard_normal((n, groups * group)) * scale).astype(DTYPES[dtype])
    w, s, b = quantize(x, bits, group, isa)
    stream = np.unpackbits(w.view(np.uint8), axis=1, bitorder="little").reshape(*x.shape, bits)
    codes = stream @ (1 << np.arange(bits))
    scales, biases = (np.repeat(v.astype(np.float64), group, 1) for v in (s, b))
    exact, size = codes.reshape(x.shape) * scales + biases, np.abs(biases) + (1 << bits) * np.abs(scales)
    for (name, out), tolerance in zip(DTYPES.items(), (1e-6, 1e-3, 8e-3), strict=True):
        y = np.empty(x.shape, out)
        cpu.call("dequantize", [operand(y)], [w, operand(s), operand(b)], [bits, group], isa=isa)
        assert np.all(np.abs(y.astype(np.float64) - exact) <= tolerance * size + 1e-7), name


FLOATS = {"mxfp4": (20, 32), "nvfp4": (20, 16), "mxfp8": (24, 32)}  # format of codes.h, group


@pytest.mark.parametrize("mode", FLOATS)
def test_floats_are_read_as_mlx_reads_them(isa, mode):
    """dequantize, quantized_take and gather_mm of e2m1 and e4m3, bytes by mlx."""
    rng, (format, group) = np.random.default_rng(0), FLOATS[mode]
    packed = mx.quantize(mx.array(rng.standard_normal((3, 37, 96)).astype(np.float32)), mode=mode)
    exact = np.array(mx.dequantize(*packed, mode=mode, dtype=mx.float32))
    codes, scales = (np.array(part) for part in packed)
    for dtype in (np.float32, ml_dtypes.bfloat16):  # which both hold all of these numbers
        y = np.empty((37, 96), dtype)
        cpu.call("dequantize", [operand(y)], [codes[0], scales[0]], [format, group], isa=isa)
        assert np.array_equal(y.astype(np.float32), exact[0])
    rows, index = np.empty((4, 96), np.float32), np.array([3, 36, -1, 0], np.int32)
    cpu.call("quantized_take", [rows], [codes[1], scales[1], index], [format, group], isa=isa)
    assert np.array_equal(rows, exact[1][index])
    a, which = rng.standard_normal((2, 5, 96)).astype(np.float32), np.array([2, 0, 2], np.int32)
    left, out = np.array([0, 1, 1], np.int32), np.empty((3, 5, 37), np.float32)
    cpu.call("gather_mm", [out], [a, codes, scales, left, which], [format, group], isa=isa)
    wanted = a[left].astype(np.float64) @ exact[which].swapaxes(1, 2)
    np.testing.assert_allclose(out, wanted, atol=1e-5 * np.abs(wanted).max())

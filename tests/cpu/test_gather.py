"""take against NumPy, quantized_take against mlx's own quantizer."""

from typing import Any

import numpy as np
import pytest

from lazulite.engine import cpu


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "float16", "float32", "int64", "complex64"])
@pytest.mark.parametrize("shape, count", [((1, 7, 64), 5), ((2, 500, 1), 1500), ((2, 4, 3), 0), ((1, 300, 40), 600)])
def test_take(dtype: str, shape: Any, count: int, isa: str, rng: Any) -> None:
    x = (rng.standard_normal(shape) * 50).astype(dtype)
    index = rng.integers(-shape[1], shape[1], count, dtype=np.int32)
    out = np.empty((shape[0], count, shape[2]), dtype)
    cpu.call("take", [out], [x, index], isa=isa)
    np.testing.assert_array_equal(out, x[:, index])


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint32", "int64", "uint64"])
def test_take_from_strided_rows(dtype: str, isa: str, rng: Any) -> None:
    x = rng.standard_normal((6, 4, 5)).astype(np.float32).transpose(2, 0, 1)
    index = np.array([5, 0, 0, 3], dtype)
    out = np.empty((5, 4, 4), np.float32)
    cpu.call("take", [out], [x, index], isa=isa)
    np.testing.assert_array_equal(out, x[:, index.astype(int)])


@pytest.mark.parametrize("index", [4, -5, 2**31])
def test_an_index_out_of_range_is_an_error(index: int) -> None:
    with pytest.raises(RuntimeError, match=rf"\[take\] index {index} is out of range for size 4"):
        cpu.call("take", [np.empty((1, 1, 2))], [np.zeros((1, 4, 2)), np.array([index])])


@pytest.mark.parametrize("bits, group", [(2, 32), (3, 64), (4, 32), (4, 64), (5, 64), (6, 64), (8, 128)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_quantized_take(bits: int, group: int, dtype: str, isa: str, rng: Any) -> None:
    mx = pytest.importorskip("mlx.core")
    table = mx.array(rng.standard_normal((11, 256)).astype(dtype))
    quantized = mx.quantize(table, group_size=group, bits=bits)
    parts = [np.array(part) for part in quantized]
    index = np.array([3, 0, -1, 10, 3], np.int32)
    out = np.empty((5, 256), np.float32)
    cpu.call("quantized_take", [out], [*parts, index], ints=[bits, group], isa=isa)
    exact = [quantized[0], *(part.astype(mx.float32) for part in quantized[1:])]
    wanted = np.array(mx.dequantize(*exact, group_size=group, bits=bits))[index]
    np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=1e-6)


def test_a_quantized_row_that_does_not_fit_is_refused() -> None:
    scales = np.ones((4, 2), np.float32)
    inputs = [np.zeros((4, 16), np.uint32), scales, scales, np.zeros(1, np.int32)]
    with pytest.raises(RuntimeError, match=r"\[quantized_take\] codes must be uint32, 32 / bits of them"):
        cpu.call("quantized_take", [np.empty((1, 64), np.float32)], inputs, ints=[4, 32])

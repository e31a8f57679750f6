"""gather_mm against NumPy; quantized matrices are mlx's."""

from typing import Any

import numpy as np
import pytest

from lazulite.engine import cpu


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("rows, n, k", [(1, 5, 7), (3, 64, 40), (1, 130, 600), (50, 33, 16)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dense(rows: int, n: int, k: int, transposed: bool, dtype: str, isa: str, rng: Any, threads: Any) -> None:
    threads(3)
    a = rng.standard_normal((6, rows, k)).astype(dtype)
    b = rng.standard_normal((4, n, k) if transposed else (4, k, n)).astype(dtype)
    b = b.swapaxes(1, 2) if transposed else b
    left, right = rng.integers(-6, 6, 150, np.int32), rng.integers(0, 3, 150, np.int32)
    out = np.empty((150, rows, n), np.float32)
    cpu.call("gather_mm", [out], [a, b, left, right], ints=[0, 0], isa=isa)
    close(out, a[left].astype(np.float64) @ b[right].astype(np.float64))


@pytest.mark.parametrize("bits, group", [(2, 64), (3, 32), (4, 32), (4, 64), (6, 64), (8, 128)])
def test_quantized(bits: int, group: int, isa: str, rng: Any) -> None:
    mx = pytest.importorskip("mlx.core")
    packed = mx.quantize(mx.array(rng.standard_normal((3, 75, 640)).astype(np.float32)), group, bits)
    matrix = np.array(mx.dequantize(*packed, group, bits), np.float64)
    a = rng.standard_normal((5, 2, 640)).astype(np.float32)
    left, right = rng.integers(0, 5, 9), rng.integers(0, 3, 9)
    out = np.empty((9, 2, 75), np.float32)
    cpu.call("gather_mm", [out], [a, *map(np.array, packed), left, right], ints=[bits, group], isa=isa)
    close(out, a[left] @ matrix.swapaxes(1, 2)[right])


def test_an_index_out_of_range_is_an_error() -> None:
    one = np.ones((1, 1, 1), np.float32)
    with pytest.raises(RuntimeError, match=r"\[gather_mm\] index 1 is out of range for size 1"):
        cpu.call("gather_mm", [one.copy()], [one, one, np.array([0]), np.array([1])], ints=[0, 0])

"""softmax, rms_norm and layer_norm against float64."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lazulite.engine import cpu

EPS = 1e-5


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x: Any, w: Any) -> Any:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * w


def layer_norm(x: Any, w: Any, b: Any) -> Any:
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + EPS) * w + b


KERNELS: list[tuple[Callable[..., Any], int]] = [(softmax, 0), (rms_norm, 1), (layer_norm, 2)]
DTYPES = [("float32", np.float32, 2e-6), ("float16", np.float16, 2e-3), ("bfloat16", ml_dtypes.bfloat16, 1e-2)]


@pytest.mark.parametrize("reference, n_weights", KERNELS, ids=[k.__name__ for k, _ in KERNELS])
@pytest.mark.parametrize("name, dtype, tolerance", DTYPES, ids=[d[0] for d in DTYPES])
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (1, 576), (5, 2049), (0, 64)])
def test_value(
    reference: Any, n_weights: int, name: str, dtype: Any, tolerance: float, shape: Any, isa: str, rng: Any
) -> None:
    arrays = [rng.standard_normal(size).astype(dtype) for size in [shape] + [shape[1:]] * n_weights]
    out = np.empty(shape, dtype)
    operands = [(a.view(np.uint16), name) if name == "bfloat16" else a for a in [out, *arrays]]
    floats = [EPS] if n_weights else []
    cpu.call(reference.__name__, operands[:1], operands[1:], floats=floats, isa=isa)
    wanted = reference(*(a.astype(np.float64) for a in arrays)) if out.size else np.empty(shape)
    np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=tolerance, atol=tolerance)


def test_rows_may_be_strided(isa: str, rng: Any) -> None:
    x, out = rng.standard_normal((4, 40)).astype(np.float32)[:, :33], np.zeros((4, 50), np.float32)
    cpu.call("softmax", [out[:, 7:40]], [x], isa=isa)
    np.testing.assert_allclose(out[:, 7:40], softmax(x.astype(np.float64)), rtol=1e-6)
    assert not out[:, :7].any() and not out[:, 40:].any()


def test_softmax_of_large_and_masked_scores(isa: str) -> None:
    x = np.array([[1e30, 1e30, -np.inf], [88.0, -1e30, 87.0]], np.float32)
    out = np.empty_like(x)
    cpu.call("softmax", [out], [x], isa=isa)
    np.testing.assert_allclose(out, softmax(x.astype(np.float64)), rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_very_wide_softmax_is_shared_in_pieces(rows: int, isa: str, threads: Any, rng: Any) -> None:
    threads(2)
    x = (rng.standard_normal((rows, (1 << 17) + 21)) * 5).astype(np.float32)
    x[0, : 1 << 15] = -np.inf  # pieces without any finite score
    out = np.empty_like(x)
    cpu.call("softmax", [out], [x], isa=isa)
    np.testing.assert_allclose(out, softmax(x.astype(np.float64)), rtol=2e-6, atol=1e-12)
    x[-1, 70_000] = np.nan
    cpu.call("softmax", [out], [x], isa=isa)
    assert np.isnan(out[-1]).all() and (rows == 1 or np.isfinite(out[0]).all())


def test_results_larger_than_caches(isa: str, threads: Any, rng: Any) -> None:
    threads(2)
    x, w = rng.standard_normal((4400, 1004)).astype(np.float32), rng.standard_normal(1004).astype(np.float32)
    out = np.empty_like(x)
    cpu.call("rms_norm", [out], [x, w], floats=[EPS], isa=isa)
    np.testing.assert_allclose(out, rms_norm(x, w), rtol=1e-5, atol=1e-5)


def test_a_weight_of_another_size_is_refused() -> None:
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(RuntimeError, match=r"\[rms_norm\] a weight must be \(C\)"):
        cpu.call("rms_norm", [x], [x, x[0, :7]], floats=[EPS])

"""conv against torch, for every way the kernel lays a convolution out."""

from typing import Any

import numpy as np
import pytest

from lazulite.engine import cpu

torch = pytest.importorskip("torch")


def run(x: Any, w: Any, out: Any, isa: str, stride: Any = (1, 1, 1), padding: Any = (0, 0, 0),
        dilation: Any = (1, 1, 1), groups: int = 1) -> Any:
    cpu.call("conv", [out], [x, w], ints=[*stride, *padding, *dilation, 1, 1, 1, groups, 0], isa=isa)
    return out


def reference(x: Any, w: Any, **options: Any) -> Any:
    x, w = (torch.from_numpy(np.ascontiguousarray(np.moveaxis(a.astype(np.float64), -1, 1))) for a in (x, w))
    return np.moveaxis(torch.nn.functional.conv3d(x, w, **options).numpy(), 1, -1)


@pytest.mark.parametrize("x, w, options", [
    ((2, 1, 9, 8, 3), (10, 1, 3, 3, 3), {"padding": (0, 1, 1)}),  # lines as they lie
    ((1, 1, 12, 13, 5), (70, 1, 3, 2, 5), {"stride": (1, 2, 2), "padding": (0, 2, 1)}),  # two panels
    ((2, 4, 5, 6, 8), (33, 2, 3, 2, 8), {"dilation": (1, 1, 2)}),
    ((1, 1, 6, 6, 600), (16, 1, 3, 3, 600), {}),  # a line is longer than a block
    ((3, 1, 1, 40, 12), (12, 1, 1, 5, 4), {"groups": 3}),
    ((2, 1, 7, 7, 40), (40, 1, 3, 3, 1), {"groups": 40, "padding": (0, 1, 1)}),  # channel by channel
])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_against_torch(x: Any, w: Any, options: Any, dtype: str, isa: str, rng: Any, threads: Any) -> None:
    threads(3)
    x, w = (rng.standard_normal(s).astype(dtype) for s in (x, w))
    wanted = reference(x, w, **options)
    found = run(x, w, np.empty(wanted.shape, dtype), isa, **options)
    tolerance = {"float32": 1e-5, "float16": 2e-3, "float64": 1e-12}[dtype]
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max(initial=1))


def test_rows_of_channels_may_lie_apart(isa: str, rng: Any) -> None:
    x = rng.standard_normal((2, 1, 8, 9, 6)).astype(np.float32)[:, :, ::-1, ::2, :4]
    w = rng.standard_normal((5, 1, 2, 3, 4)).astype(np.float32)
    wanted = reference(x, w)
    np.testing.assert_allclose(run(x, w, np.empty(wanted.shape, np.float32), isa), wanted, rtol=1e-5, atol=1e-4)


def test_channels_that_do_not_fit_are_refused() -> None:
    x, w, out = (np.zeros((1, 1, 3, 3, c), np.float32) for c in (4, 3, 1))
    with pytest.raises(RuntimeError, match=r"\[conv\] the channels of x, w and the output do not fit the groups"):
        run(x, w, out, "portable")

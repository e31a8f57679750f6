"""Cases of convolution.py, against torch in float64 (NumPy for convolve)."""
from __future__ import annotations

import numpy as np
import torch
from cases import Case

from lazulite.engine import array as mx

CONV = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}
TRANSPOSED = {1: torch.nn.functional.conv_transpose1d, 2: torch.nn.functional.conv_transpose2d,
              3: torch.nn.functional.conv_transpose3d}


def first(x):
    """Channels last -> a tensor with channels first."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def last(x):
    return np.moveaxis(x.numpy(), 1, -1)


def general(x, w, stride=1, padding=0, kernel_dilation=1, input_dilation=1, groups=1, flip=False):
    """Spread out and padded with zeros by hand: torch has neither for a convolution."""
    axes = x.ndim - 2
    spread = (input_dilation,) * axes if isinstance(input_dilation, int) else input_dilation
    wide = np.zeros((len(x), *((n - 1) * d + 1 for n, d in zip(x.shape[1:-1], spread, strict=True)), x.shape[-1]))
    wide[(slice(None), *(slice(None, None, d) for d in spread))] = x
    before, after = padding if isinstance(padding, tuple) else ([padding] * axes,) * 2
    wide = np.pad(wide, [(0, 0), *zip(before, after, strict=True), (0, 0)])
    w = np.flip(w, tuple(range(1, axes + 1))) if flip else w
    return last(CONV[axes](first(wide), first(w), stride=stride, dilation=kernel_dilation, groups=groups))


def conv(x, w, **options) -> Case:
    says = " ".join(f"{k} {v}" for k, v in options.items())
    return Case(f"conv_general {x} {w} {says}", lambda x, w: mx.conv_general(x, w, **options),
                lambda x, w: general(x, w, **options), (x, w), empty=False, tolerance=2e-5)


def transposed(axes: int, x, w, **options) -> Case:
    def reference(x, w):
        weight = first(w).transpose(0, 1)
        return last(TRANSPOSED[axes](first(x), weight, **options))

    return Case(f"conv_transpose{axes}d {options}", lambda x, w: getattr(mx, f"conv_transpose{axes}d")(x, w, **options),
                reference, (x, w), empty=False, tolerance=2e-5)


CASES = [
    conv((2, 7, 3), (4, 3, 3)), conv((2, 7, 3), (4, 2, 3), stride=2, padding=1),
    conv((1, 5, 6, 2), (3, 2, 3, 2), padding=1, kernel_dilation=2), conv((1, 4, 3, 4), (6, 2, 2, 2), groups=2),
    conv((1, 5, 4, 3), (3, 2, 2, 1), groups=3, padding=1), conv((2, 5, 4, 2), (2, 2, 3, 2), flip=True, stride=(2, 1),
                                                                padding=([1, 0], [0, 2])),
    conv((1, 3, 4, 2), (2, 2, 2, 2), input_dilation=(2, 3), stride=2, padding=1),
    conv((1, 3, 4, 3, 2), (2, 2, 2, 2, 2), padding=1),
    transposed(1, (2, 4, 3), (2, 3, 3), stride=2, padding=1, output_padding=1),
    transposed(2, (1, 3, 4, 2), (3, 2, 3, 2), stride=2, dilation=2),
    transposed(3, (1, 2, 3, 2, 2), (2, 2, 2, 2, 2), stride=2),
    Case("conv1d", lambda x, w: mx.conv1d(x, w, 2, 1), lambda x, w: general(x, w, 2, 1), ((1, 6, 2), (3, 3, 2)),
         empty=False),
    Case("conv2d", lambda x, w: mx.conv2d(x, w, 1, 1, 2), lambda x, w: general(x, w, 1, 1, 2),
         ((1, 6, 5, 2), (3, 3, 2, 2)), empty=False),
    Case("conv3d", lambda x, w: mx.conv3d(x, w), general, ((1, 3, 3, 3, 1), (2, 2, 2, 2, 1)), empty=False),
    *(Case(f"convolve {mode}", lambda a, v, mode=mode: mx.convolve(a, v, mode),
           lambda a, v, mode=mode: np.convolve(a, v, mode), ((9,), (4,)), empty=False)
      for mode in ("full", "same", "valid")),
]

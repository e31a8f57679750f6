"""Convolutions. x (N, …, in) to (N, …, out) with 1, 2 or 3 spatial axes; weights are (out, …, in / groups)."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .. import array as mx
from .init import draw
from .module import Module

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]
Sizes = int | Sequence[int]


class _Conv(Module):
    """`op` is a function of engine.array; the attributes named in `shown` are its arguments after the weight."""

    op: str
    shown: tuple[str, ...]
    bias: mx.Array | None

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sizes, bias: bool, groups: int = 1, **options: Any
    ):
        if in_channels % groups:
            raise ValueError(f"[{type(self).__name__}] {in_channels} channels in {groups} groups: a multiple wanted")
        axes = int(self.op[-2])
        window = (kernel_size,) * axes if isinstance(kernel_size, int) else tuple(kernel_size)
        scale = math.sqrt(1 / (in_channels // groups * math.prod(window)))
        self.weight = draw((out_channels, *window, in_channels // groups), scale)
        self.bias = mx.zeros((out_channels,)) if bias else None
        for name, value in options.items():
            wide = isinstance(value, int) and axes > 1 and name != "dilation"
            setattr(self, name, (value,) * axes if wide else value)
        self.groups = groups

    def _extra_repr(self) -> str:
        out, *window, channels = self.weight.shape
        options = "".join(f", {name}={getattr(self, name)}" for name in self.shown)
        size = window[0] if len(window) == 1 else tuple(window)
        return f"{channels * self.groups}, {out}, kernel_size={size}{options}, bias={self.bias is not None}"

    def __call__(self, x: mx.Array) -> mx.Array:
        y = getattr(mx, self.op)(x, self.weight, *(getattr(self, name) for name in self.shown))
        return y if self.bias is None else y + self.bias


class Conv1d(_Conv):
    """x (N, L, in) to (N, L', out)."""

    op, shown = "conv1d", ("stride", "padding", "dilation", "groups")

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes = 1, padding: Sizes = 0,
        dilation: Sizes = 1, groups: int = 1, bias: bool = True,
    ):
        super().__init__(in_channels, out_channels, kernel_size, bias, groups, stride=stride, padding=padding,
                         dilation=dilation)


class Conv2d(Conv1d):
    """x (N, H, W, in) to (N, H', W', out)."""

    op = "conv2d"


class Conv3d(_Conv):
    """x (N, D, H, W, in) to (N, D', H', W', out)."""

    op, shown = "conv3d", ("stride", "padding", "dilation")

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes = 1, padding: Sizes = 0,
        dilation: Sizes = 1, bias: bool = True,
    ):
        super().__init__(in_channels, out_channels, kernel_size, bias, stride=stride, padding=padding,
                         dilation=dilation)


class ConvTranspose1d(_Conv):
    """x (N, L, in) to (N, L', out), where a Conv1d with these options has the shapes the other way round."""

    op, shown = "conv_transpose1d", ("stride", "padding", "dilation", "output_padding")

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sizes, stride: Sizes = 1, padding: Sizes = 0,
        dilation: Sizes = 1, output_padding: Sizes = 0, bias: bool = True,
    ):
        super().__init__(in_channels, out_channels, kernel_size, bias, stride=stride, padding=padding,
                         dilation=dilation, output_padding=output_padding)


class ConvTranspose2d(ConvTranspose1d):
    """x (N, H, W, in) to (N, H', W', out): see ConvTranspose1d."""

    op = "conv_transpose2d"


class ConvTranspose3d(ConvTranspose1d):
    """x (N, D, H, W, in) to (N, D', H', W', out): see ConvTranspose1d."""

    op = "conv_transpose3d"

"""Normalizations. Channels are the last axis."""
from __future__ import annotations

import math

from .. import array as mx
from .module import Module

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]


class _Norm(Module):
    """(x − mean) / sqrt(variance + eps) · weight + bias; a subclass says over what. Both are None where not affine."""

    weight: mx.Array | None
    bias: mx.Array | None

    def __init__(self, dims: int, eps: float, affine: bool, bias: bool = True):
        if eps <= 0:
            raise ValueError(f"[{type(self).__name__}] eps is {eps}: more than 0 wanted")
        self.weight = mx.ones((dims,)) if affine else None
        self.bias = mx.zeros((dims,)) if affine and bias else None
        self.dims, self.eps = dims, eps

    def _extra_repr(self) -> str:
        return f"{self.dims}, eps={self.eps}, affine={self.weight is not None}"

    def _scaled(self, x: mx.Array) -> mx.Array:
        return x if self.weight is None else x * self.weight + self.bias

    def _over(self, x: mx.Array) -> mx.Array:
        """The mean of x (N, …, C) over its positions, which stay with size 1."""
        return mx.mean(x, tuple(range(1, x.ndim - 1)), keepdims=True)

    def _normed(self, x: mx.Array) -> mx.Array:
        centred = x - self._over(x)
        return self._scaled(centred * mx.rsqrt(self._over(mx.square(centred)) + self.eps))


class RMSNorm(Module):
    """x / sqrt(mean(x²) + eps) · weight over the channels, Zhang and Sennrich 2019, arxiv.org/abs/1910.07467"""

    def __init__(self, dims: int, eps: float = 1e-5):
        if eps <= 0:
            raise ValueError(f"[RMSNorm] eps is {eps}: more than 0 wanted")
        self.weight, self.eps = mx.ones((dims,)), eps

    def _extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"

    def __call__(self, x: mx.Array) -> mx.Array:
        return mx.fast.rms_norm(x, self.weight, self.eps)


class LayerNorm(_Norm):
    """Over the channels, Ba et al. 2016, arxiv.org/abs/1607.06450"""

    def __init__(self, dims: int, eps: float = 1e-5, affine: bool = True, bias: bool = True):
        super().__init__(dims, eps, affine, bias)

    def __call__(self, x: mx.Array) -> mx.Array:
        return mx.fast.layer_norm(x, self.weight, self.bias, self.eps)


class InstanceNorm(_Norm):
    """Over the positions of x (N, …, C), Ulyanov et al. 2016, arxiv.org/abs/1607.08022"""

    def __init__(self, dims: int, eps: float = 1e-5, affine: bool = False):
        super().__init__(dims, eps, affine)

    def __call__(self, x: mx.Array) -> mx.Array:
        if x.ndim < 3:
            raise ValueError(f"[InstanceNorm] {x.shape}: (N, …, C) with at least 3 axes wanted")
        return self._normed(x)


class GroupNorm(_Norm):
    """Over the positions of x (N, …, C) and groups of channels, Wu and He 2018, arxiv.org/abs/1803.08494

    A group is every num_groups-th channel, or, if pytorch_compatible, channels side by side.
    """

    def __init__(
        self, num_groups: int, dims: int, eps: float = 1e-5, affine: bool = True, pytorch_compatible: bool = False
    ):
        if num_groups <= 0 or dims <= 0 or dims % num_groups:
            raise ValueError(f"[GroupNorm] {dims} channels in {num_groups} groups: a multiple wanted")
        super().__init__(dims, eps, affine)
        self.num_groups, self.pytorch_compatible = num_groups, pytorch_compatible

    def _extra_repr(self) -> str:
        return f"{self.num_groups}, {super()._extra_repr()}, pytorch_compatible={self.pytorch_compatible}"

    def __call__(self, x: mx.Array) -> mx.Array:
        return self._normed(x)

    def _over(self, x: mx.Array) -> mx.Array:
        means = super()._over(x)                            # of channels, then of groups: both read x along its rows
        groups = (self.num_groups, -1) if self.pytorch_compatible else (-1, self.num_groups)
        split = means.reshape(*means.shape[:-1], *groups)
        pooled = mx.mean(split, -1 if self.pytorch_compatible else -2, keepdims=True)
        return mx.broadcast_to(pooled, split.shape).reshape(means.shape)


class BatchNorm(_Norm):
    """Over all axes but the channels, Ioffe and Szegedy 2015, arxiv.org/abs/1502.03167

    In training with the batch's statistics, of which it keeps a running mean; otherwise with that.
    """

    _constant = frozenset({"running_mean", "running_var"})

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True,
        track_running_stats: bool = True,
    ):
        super().__init__(num_features, eps, affine)
        self.momentum, self.track_running_stats = momentum, track_running_stats
        if track_running_stats:
            self.running_mean, self.running_var = mx.zeros((num_features,)), mx.ones((num_features,))

    def _extra_repr(self) -> str:
        rest = f"affine={self.weight is not None}, track_running_stats={self.track_running_stats}"
        return f"{self.dims}, eps={self.eps}, momentum={self.momentum}, {rest}"

    def __call__(self, x: mx.Array) -> mx.Array:
        axes, count = tuple(range(x.ndim - 1)), math.prod(x.shape[:-1])
        if not 2 <= x.ndim <= 4:
            raise ValueError(f"[BatchNorm] {x.shape}: 2, 3 or 4 axes wanted")
        if self.training and count == 1:
            raise ValueError(f"[BatchNorm] {x.shape}: training wants more than one value a channel")
        if self.track_running_stats and not self.training:
            mean, variance = self.running_mean, self.running_var
        else:
            mean, variance = mx.mean(x, axes), mx.var(x, axes)
        if self.track_running_stats and self.training:
            kept, unbiased = 1 - self.momentum, variance * (count / (count - 1))
            self.running_mean = kept * self.running_mean + self.momentum * mean
            self.running_var = kept * self.running_var + self.momentum * unbiased
        return self._scaled((x - mean) * mx.rsqrt(variance + self.eps))

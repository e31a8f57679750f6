"""OLMo 2: norms after attention and MLP, and over all of q and all of k."""
from typing import Any

from ..engine import array as mx
from ..engine import nn
from .blocks import AFTER, Attention, Decoder


class OlmoAttention(Attention):
    q_norm: nn.RMSNorm
    k_norm: nn.RMSNorm

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.q_norm, self.k_norm = (nn.RMSNorm(p.weight.shape[0], self.eps) for p in (self.q_proj, self.k_proj))

    def qkv(self, x: mx.Array) -> tuple[mx.Array, mx.Array, mx.Array]:
        parts = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        q, k, v = (part.reshape(x.shape[0], -1, self.head_dim) for part in parts)
        return q, k, v

    def norms(self) -> list[mx.Array | None]:
        return [None, None]


class Model(Decoder):
    norms = AFTER

    def attention(self, layer: int, **options: Any) -> nn.Module:
        return OlmoAttention(self.config, layer, self._ropes[self.kind(layer)], **options)

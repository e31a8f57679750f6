"""Qwen 3 MoE: Qwen 3 with a mixture of experts."""
from typing import Any

from ..engine import nn
from . import qwen2_moe
from .blocks import MLP, Decoder
from .moe import MoE


class Model(qwen2_moe.Model):
    config_class = qwen2_moe.MoeConfig
    qk_norm = True

    def attention(self, layer: int, **options: Any) -> nn.Module:
        return Decoder.attention(self, layer, **options)

    def mlp(self, layer: int) -> nn.Module:
        return MoE(*self.config.moe()) if self.config.sparse(layer) else MLP(self.config)

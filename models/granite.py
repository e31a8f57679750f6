"""Granite 3: Llama with factors on embeddings, scores, residuals and logits."""
from dataclasses import dataclass
from typing import Any

from ..engine import array as mx
from ..engine import nn
from .blocks import Block, Decoder
from .config import Config


@dataclass
class GraniteConfig(Config):
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0


class Model(Decoder):
    config_class = GraniteConfig
    config: GraniteConfig

    def attention(self, layer: int, **options: Any) -> nn.Module:
        return super().attention(layer, scale=self.config.attention_multiplier, **options)

    def block(self, layer: int) -> nn.Module:
        residual = self.config.residual_multiplier
        return Block(self.config, self.attention(layer), self.mlp(layer), residual=residual)

    def embed(self, tokens: mx.Array, context: nn.Context) -> mx.Array:
        return super().embed(tokens, context) * self.config.embedding_multiplier

    @property
    def logit_scale(self) -> float:
        return 1 / self.config.logits_scaling

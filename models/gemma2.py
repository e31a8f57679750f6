"""Gemma 2: Gemma with norms around attention and MLP, soft caps on scores and logits, every second layer a window."""
from dataclasses import dataclass
from typing import Any

from ..engine import nn
from . import gemma
from .blocks import AROUND
from .config import Config


@dataclass
class Gemma2Config(gemma.GemmaConfig):
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float = 0.0
    final_logit_softcapping: float = 0.0
    sliding_window: int = 4096
    sliding_window_pattern: int = 2


class Model(gemma.Model):
    config_class: type[Config] = Gemma2Config
    norms = AROUND

    def __init__(self, config: Gemma2Config):
        self.softcap = config.final_logit_softcapping
        super().__init__(config)

    def attention(self, layer: int, **options: Any) -> nn.Module:
        c = self.config
        assert isinstance(c, Gemma2Config)
        scale = c.query_pre_attn_scalar**-0.5
        return super().attention(layer, scale=scale, softcap=c.attn_logit_softcapping, **options)

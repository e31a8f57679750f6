"""Gemma: norms about 1, embeddings grown by the root of their width, a tied head."""
from dataclasses import dataclass

from ..engine import array as mx
from ..engine import nn
from .blocks import Decoder, OffsetNorm
from .config import Config


@dataclass
class GemmaConfig(Config):
    head_dim: int = 256
    hidden_act: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.hidden_act == "gelu":  # what Gemma's configs call gelu has always been the approximation
            self.hidden_act = "gelu_pytorch_tanh"
        super().__post_init__()


class Model(Decoder):
    config_class: type[Config] = GemmaConfig
    norm = OffsetNorm

    def embed(self, tokens: mx.Array, context: nn.Context) -> mx.Array:
        return super().embed(tokens, context) * self.config.hidden_size**0.5

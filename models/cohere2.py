"""Command R7B: attention and MLP side by side behind one centred norm; positions only where there is a window."""
from dataclasses import dataclass
from functools import partial

from ..engine import array as mx
from ..engine import nn
from . import rope
from .blocks import Block, Decoder
from .config import Config


@dataclass
class Cohere2Config(Config):
    sliding_window: int = 4096
    sliding_window_pattern: int = 4
    tie_word_embeddings: bool = True
    layer_norm_eps: float = 1e-5
    logit_scale: float = 0.0625

    def __post_init__(self) -> None:
        self.rms_norm_eps = self.layer_norm_eps
        super().__post_init__()


class Parallel(Block):
    def __call__(self, x: mx.Array, context: nn.Context, lean: bool = False) -> mx.Array:
        h = self.input_layernorm(x)
        return x + self.self_attn(h, context) + (mx.checkpoint(self.mlp) if lean else self.mlp)(h)


class Model(Decoder):
    config_class = Cohere2Config
    config: Cohere2Config
    norm = partial(nn.LayerNorm, bias=False)

    def rope(self, layer_type: str) -> nn.Rope:
        return rope.NONE if layer_type == "full_attention" else rope.rope(self.config, interleaved=True)

    def block(self, layer: int) -> nn.Module:
        norms = ("input_layernorm", "", "", "")
        return Parallel(self.config, self.attention(layer), self.mlp(layer), norms=norms, norm=self.norm)

    @property
    def logit_scale(self) -> float:
        return self.config.logit_scale

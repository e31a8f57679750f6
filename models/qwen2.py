"""Qwen 1.5, 2 and 2.5: Llama with biases on q, k and v. If windows are used, layers from max_window_layers on slide."""
from dataclasses import dataclass
from typing import Any

from ..engine import nn
from .blocks import Decoder
from .config import Config


@dataclass
class QwenConfig(Config):
    use_sliding_window: bool = False
    max_window_layers: int = 0

    def __post_init__(self) -> None:
        if self.use_sliding_window and not self.layer_types:
            self.layer_types = ["full_attention" if i < self.max_window_layers else "sliding_attention"
                                for i in range(self.num_hidden_layers)]
        self.sliding_window = self.sliding_window if self.use_sliding_window else 0
        super().__post_init__()


@dataclass
class Qwen2Config(QwenConfig):
    attention_bias: bool = True


class Model(Decoder):
    config_class: type[Config] = Qwen2Config

    def attention(self, layer: int, **options: Any) -> nn.Module:
        return super().attention(layer, out_bias=False, **options)

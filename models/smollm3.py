"""SmolLM 3: Llama with no positions in every fourth layer."""
from dataclasses import dataclass, field

from ..engine import nn
from .blocks import Decoder
from .config import Config
from .rope import NONE


@dataclass
class SmolLM3Config(Config):
    tie_word_embeddings: bool = True
    no_rope_layers: list[int] = field(default_factory=list)   # 1 where a layer has positions
    no_rope_layer_interval: int = 4

    def __post_init__(self) -> None:
        places = range(self.num_hidden_layers)
        rotated = self.no_rope_layers or [(i + 1) % self.no_rope_layer_interval for i in places]
        self.layer_types = ["full_attention" if rotated[i] else "no_rope" for i in places]
        super().__post_init__()


class Model(Decoder):
    config_class = SmolLM3Config

    def rope(self, layer_type: str) -> nn.Rope:
        return NONE if layer_type == "no_rope" else super().rope(layer_type)

"""SmolLM 3: Llama with no positions in every fourth layer, which is also where windows are, if they are used."""
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
    use_sliding_window: bool = False

    def __post_init__(self) -> None:
        places = range(self.num_hidden_layers)
        rotated = self.no_rope_layers or [(i + 1) % self.no_rope_layer_interval for i in places]
        far = "sliding_attention" if self.use_sliding_window and self.sliding_window else "full_attention"
        kinds = self.layer_types or ["full_attention" if rotated[i] else far for i in places]
        self.layer_types = [kinds[i] if rotated[i] else f"no_rope_{kinds[i]}" for i in places]
        super().__post_init__()


class Model(Decoder):
    config_class = SmolLM3Config

    def rope(self, layer_type: str) -> nn.Rope:
        return NONE if layer_type.startswith("no_rope") else super().rope(layer_type)

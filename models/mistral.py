"""Mistral: Llama whose every layer looks back `sliding_window` tokens."""
from .blocks import Decoder


class Model(Decoder):
    def window(self, layer: int) -> int:
        return self.config.sliding_window

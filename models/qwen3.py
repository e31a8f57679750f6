"""Qwen 3: Llama whose heads' q and k are normed."""
from .blocks import Decoder
from .qwen2 import QwenConfig


class Model(Decoder):
    config_class = QwenConfig
    qk_norm = True

"""Llama 1–3.x, and what shares its shape: SmolLM, SmolLM2, Yi, TinyLlama. The blocks' defaults are Llama's."""
from .blocks import Decoder


class Model(Decoder):
    pass

"""Layers on `engine.array`: a tree of modules whose attribute paths are weight names."""
from .activations import gelu, gelu_approx, silu
from .attention import PAGE, Context, LayerCache, Rope, attend
from .linear import Embedding, Linear, QuantizedEmbedding, QuantizedLinear
from .module import Module, swap, tree_flatten, tree_unflatten
from .norm import LayerNorm, RMSNorm

__all__ = [
    "PAGE", "Context", "Embedding", "LayerCache", "LayerNorm", "Linear", "Module", "QuantizedEmbedding",
    "QuantizedLinear", "RMSNorm", "Rope", "attend", "gelu", "gelu_approx", "silu", "swap", "tree_flatten",
    "tree_unflatten",
]

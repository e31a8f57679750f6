"""Layers on `engine.array`, with MLX's names: a tree of modules whose attribute paths are weight names."""
# ruff: noqa: F401, F403
from ..array.trees import tree_flatten, tree_map, tree_map_with_path, tree_merge, tree_reduce, tree_unflatten
from . import init, losses
from .activations import *
from .attention import PAGE, Cache, Context, LayerCache, PageSpec, Rope, StateCache, StateSpec, attend, caches
from .convolution import *
from .dropout import *
from .init import loading
from .linear import *
from .module import Module, checkpoint, swap, value_and_grad
from .norm import *
from .positions import *
from .recurrent import *
from .resampling import *
from .transformer import *

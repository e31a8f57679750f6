"""A Hugging Face folder, an MLX folder or a GGUF file to a Module, and back."""
from .load import build, load
from .weights import read

__all__ = ["build", "load", "read"]

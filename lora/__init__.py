"""Fine-tuning: adapters and their files, data, the trainer, fusing, evaluation."""
from .adapter import Adapter, Method, Pair, load_adapter, prepare
from .formats import read, write

__all__ = ["Adapter", "Method", "Pair", "load_adapter", "prepare", "read", "write"]

"""Generation: token ids in, token ids out, and the thin layer that makes text of them."""

from .engine import Engine
from .pages import OutOfPages, Pages
from .sampling import Sampling
from .sequence import Sequence
from .stop import Stops
from .text import Response, generate, peak_memory, stream_generate

__all__ = [
    "Engine",
    "OutOfPages",
    "Pages",
    "Response",
    "Sampling",
    "Sequence",
    "Stops",
    "generate",
    "peak_memory",
    "stream_generate",
]

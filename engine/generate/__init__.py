"""Generation: token ids in, token ids out, and the thin layer that makes text of them."""

from .engine import Engine
from .pages import OutOfPages, Pages
from .sampling import Sampling
from .scheduler import Finish, Overloaded, Prompt, Request, Scheduler, Ticket
from .sequence import Sequence, Token
from .stats import Histogram, Stats
from .stop import Stops
from .text import Response, generate, peak_memory, stream_generate

__all__ = [
    "Engine",
    "Finish",
    "Histogram",
    "OutOfPages",
    "Overloaded",
    "Pages",
    "Prompt",
    "Request",
    "Response",
    "Sampling",
    "Scheduler",
    "Sequence",
    "Stats",
    "Stops",
    "Ticket",
    "Token",
    "generate",
    "peak_memory",
    "stream_generate",
]

"""A sequence: its tokens, the pages that hold their keys and values, and how it goes on and ends."""

from collections.abc import Iterable

from .pages import ROOT
from .sampling import Sampling


class Sequence:
    """`tokens` grows from the prompt; the first `cached` of them have their keys and values in `pages`."""

    def __init__(self, prompt: Iterable[int], sampling: Sampling, eos: Iterable[int] = ()):
        self.tokens = list(prompt)
        self.prompt_length = len(self.tokens)
        self.sampling = sampling
        self.eos = frozenset(() if sampling.ignore_eos else eos)
        self.pages: list[int] = []
        self.chain = ROOT  # of the full pages
        self.cached = self.reused = 0  # reused: tokens that were found in the cache, never computed
        self.logprob = 0.0  # of the last token
        self.finish_reason: str | None = None

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    def append(self, token: int, logprob: float, context: int) -> None:
        """Takes a sampled token; `context` is the most tokens that a sequence may have."""
        self.tokens.append(token)
        self.logprob = logprob
        if token in self.eos:
            self.finish_reason = "stop"
        elif self.generated >= self.sampling.max_tokens or len(self.tokens) >= context:
            self.finish_reason = "length"

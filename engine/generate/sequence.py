"""A sequence: its tokens, the pages that hold their keys and values, and how it goes on and ends."""

from collections.abc import Iterable
from typing import NamedTuple

from .constraint import Constraint
from .pages import ROOT
from .sampling import Sampling
from .speculation import Lookup

WHOLE = 2**31


class Token(NamedTuple):
    """A token. logprob: under the model's own distribution, at temperature 1; top: the likeliest, best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sequence:
    """`tokens` grows from the prompt; the first `cached` of them have their keys and values in `pages`."""

    def __init__(
        self,
        prompt: Iterable[int],
        sampling: Sampling,
        eos: Iterable[int] = (),
        *,
        adapter: str | None = None,
        constraint: Constraint | None = None,
        prompt_logprobs: bool = False,
    ):
        self.tokens = list(prompt)
        self.prompt_length = len(self.tokens)
        self.sampling, self.adapter, self.constraint = sampling, adapter, constraint
        self.eos = frozenset(() if sampling.ignore_eos else eos)
        self.pages: list[int] = []
        self.chain = ROOT  # of the full pages
        self.state = -1  # the slot of its recurrent states
        self.cached = self.reused = 0  # reused: tokens that were found in the cache, never computed
        self.chunk = WHOLE  # most tokens of the next step
        self.lookup = Lookup()
        self.draft: list[int] = []  # a guess of what follows, which the next step verifies
        self.fresh: list[Token] = []  # what the last step brought
        self.tells = prompt_logprobs
        self.told: list[Token] = []  # the prompt's tokens after the first, with their logprobs, if they are asked for
        self.finish_reason: str | None = None  # "stop", "length" or "error"
        self.error: Exception | None = None

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def telling(self) -> bool:
        """Whether logprobs of the prompt are wanted still."""
        return self.tells and len(self.told) < self.prompt_length - 1

    def restart(self, root: int) -> None:
        """Nothing is cached: all tokens are to run, and to be told, from the first one on."""
        self.cached, self.chain, self.draft = 0, root, []
        if not self.generated:
            self.reused, self.told = 0, []

    @property
    def logprob(self) -> float:
        """Of the last token."""
        return self.fresh[-1].logprob if self.fresh else 0.0

    def append(self, token: Token, context: int) -> None:
        """Takes a sampled token, unless the constraint raises; `context`: most tokens that a sequence may have."""
        ends = token.id in self.eos
        if self.constraint and not ends:
            self.constraint.advance(token.id)
        self.tokens.append(token.id)
        self.fresh.append(token)
        if ends or (self.constraint and self.constraint.finished):
            self.finish_reason = "stop"
        elif self.generated >= self.sampling.max_tokens or len(self.tokens) >= context:
            self.finish_reason = "length"

    def fail(self, error: Exception) -> None:
        self.finish_reason, self.error = "error", error

"""A bound on thinking: after so many tokens the model has to end it."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np

from .constraint import TAIL, Constraint


class Budget:
    """A Constraint: once `most` tokens were thought, only the tokens of `end` may come, then what `then` allows.

    begin, end: the texts around the model's thinking; opened: the prompt ends with `begin`, whose tokens do not count.
    An answer that begins with anything else is not thought.
    """

    def __init__(
        self, tokenizer: Any, begin: str, end: str, most: int, *, opened: bool = False, then: Constraint | None = None
    ) -> None:  # fmt: skip
        self.spell, self.words, self.ids = tokenizer.spell, -(-tokenizer.vocab_size // 32), tokenizer.encode(end, False)
        self.begin, self.end, self.left, self.then = begin.encode(), end.encode(), most, then
        self.open: bool | None = opened or None  # None: what was said so far may be the beginning of `begin`
        self.tail = b""

    @property
    def finished(self) -> bool:
        return self.then is not None and self.then.finished

    @property
    def wanted(self) -> int | None:
        """The token of `end` that must come next."""
        return self.ids[-self.left] if self.open and self.left <= 0 else None

    def mask(self) -> np.ndarray | None:
        if self.wanted is None:
            return self.then.mask() if self.then else None
        words = np.zeros(self.words, np.uint32)
        words[self.wanted // 32] = 1 << self.wanted % 32
        return words

    def advance(self, token: int) -> None:
        self._see(token)
        if self.then:
            self.then.advance(token)

    def draft(self, tokens: Sequence[int]) -> int:
        count = len(self._walk(tokens)) - 1
        return self.then.draft(tokens[:count]) if self.then else count

    def masks(self, tokens: Sequence[int]) -> list[np.ndarray | None]:
        states = self._walk(tokens)
        rest = self.then.masks(tokens) if self.then else [None] * len(states)
        return [mask if state.wanted is None else state.mask() for state, mask in zip(states, rest, strict=True)]

    def _walk(self, tokens: Sequence[int]) -> list["Budget"]:
        """The states now and after each token, as far as they are allowed."""
        states = [self]
        for token in tokens:
            state = copy(states[-1])
            if state.wanted not in (None, token):
                break
            state._see(token)
            states.append(state)
        return states

    def _see(self, token: int) -> None:
        if self.open is False:
            return
        self.tail = (self.tail + self.spell(token))[-TAIL:]
        if self.open:
            self.left -= 1
            self.open = self.end not in self.tail and -self.left < len(self.ids)
        elif self.tail.lstrip().startswith(self.begin):
            self.open, self.tail = True, b""
        elif not self.begin.startswith(self.tail.lstrip()):
            self.open = False

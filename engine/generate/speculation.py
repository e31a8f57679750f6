"""Drafts by prompt lookup: where the last tokens stood before in the same text, what followed them may follow again.

(Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.) A step then verifies the draft with the tokens that it is
for. Nothing but time is at stake, so a draft is made only where measured acceptance and step times say that it pays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import Engine
    from .sequence import Sequence

NGRAM = 3  # tokens that have to recur
EXACT = 4  # rows of a step that `linear` computes as precisely as one (docs/cpu.md): a draft never goes beyond them
LONGEST = 8  # tokens of a draft
FIRST_GUESS = 0.5  # of the share of right tokens


class Lookup:
    """Where each n-gram of one sequence was last followed, and how often drafts from there came true."""

    def __init__(self) -> None:
        self.following: dict[tuple[int, ...], int] = {}
        self.read = 0
        self.luck = FIRST_GUESS  # chance that the next token of a draft is right

    def draft(self, tokens: list[int], most: int) -> list[int]:
        for i in range(self.read, len(tokens) - NGRAM):
            self.following[tuple(tokens[i : i + NGRAM])] = i + NGRAM
        self.read = max(self.read, len(tokens) - NGRAM)
        at = self.following.get(tuple(tokens[-NGRAM:]))
        return tokens[at : at + most] if at else []

    def learn(self, drafted: int, accepted: int) -> None:
        tried = min(drafted, accepted + 1)
        self.luck += 0.2 * (accepted / tried - self.luck)

    def forget(self) -> None:
        """Bad luck fades, so that a text that begins to repeat itself is tried again."""
        self.luck += 0.01 * (FIRST_GUESS - self.luck)

    def expected(self, drafted: int) -> float:
        """Right tokens of so many."""
        return sum(self.luck**i for i in range(1, drafted + 1))


def propose(engine: Engine, sequences: list[Sequence]) -> None:
    """Gives those sequences a draft that are likely to gain by it; all of them are to decode one token each."""
    batch = len(sequences)
    room = min(engine.max_draft, EXACT - batch if batch <= EXACT else engine.max_draft)
    if room < 1 or engine.recurrent or batch not in engine.pace.decode:
        return
    best, tokens, rows = batch / (engine.pace.seconds(batch) or 1.0), float(batch), batch
    for s in sorted(sequences, key=lambda s: -s.lookup.luck):
        draft = s.lookup.draft(s.tokens, min(room - (rows - batch), LONGEST))
        if draft and s.constraint:
            draft = draft[: s.constraint.draft(draft)]
        if not draft:
            continue
        more = s.lookup.expected(len(draft))
        rate = (tokens + more) / (engine.pace.seconds(rows + len(draft)) or 1.0)
        if rate <= best:
            s.lookup.forget()
            engine.pace.fade(rows + len(draft))
            continue
        s.draft, best, tokens, rows = draft, rate, tokens + more, rows + len(draft)

"""The pool of cache pages: who holds which, and the tokens that a full page was made from.

A page is an index into every layer's cache arrays, room for PAGE tokens. A full page is kept under the key (chain of
its predecessors, its tokens); a dict compares keys as well as hashing them, so that a page is only ever found by its
very tokens. A chain is a serial number, never used twice: what followed an evicted page is not found again.
Pages that nobody holds keep their contents until room is needed, the least recently used go first.
Every adapter has a chain of its own to begin with, as the same tokens have other keys and values under it.
"""

from collections import OrderedDict
from collections.abc import Sequence as Tokens
from itertools import count

from ..errors import UserError
from ..nn.attention import PAGE

Key = tuple[int, tuple[int, ...]]
ROOT = 0  # the chain before the first page


class OutOfPages(UserError):
    """Every page of the pool is held by a sequence."""


class Pages:
    """`size` pages, counted by reference."""

    def __init__(self, size: int):
        self.references = [0] * size
        self.idle = OrderedDict.fromkeys(range(size))  # pages that nobody holds, the next to be taken first
        self.kept: dict[Key, tuple[int, int]] = {}  # key -> (page, the chain that ends with it)
        self.keys: dict[int, Key] = {}  # page -> the key it is kept under
        self.serial = count(ROOT + 1)
        self.roots: dict[str | None, int] = {None: ROOT}

    def root(self, adapter: str | None = None) -> int:
        """The chain before the first page of a text under that adapter."""
        if adapter not in self.roots:
            self.roots[adapter] = next(self.serial)
        return self.roots[adapter]

    def allocate(self) -> int:
        """A page with one reference; what it held is forgotten."""
        if not self.idle:
            what = f"[pages] all {len(self.references)} cache pages of {PAGE} tokens are in use"
            raise OutOfPages(what, "release a sequence, or give the engine more pages")
        page, _ = self.idle.popitem(last=False)
        if page in self.keys:
            del self.kept[self.keys.pop(page)]
        self.references[page] = 1
        return page

    def hold(self, page: int) -> None:
        self.idle.pop(page, None)
        self.references[page] += 1

    def release(self, pages: Tokens[int]) -> None:
        """Drops one reference of each page, the end of the chain first: a prefix outlives what followed it."""
        for page in reversed(pages):
            self.references[page] -= 1
            if not self.references[page]:
                self.idle[page] = None
                self.idle.move_to_end(page, last=page in self.keys)  # without contents: the next to be taken

    def keep(self, page: int, chain: int, tokens: Tokens[int]) -> int:
        """Makes a full page findable after `chain`; returns the chain that ends with these tokens."""
        key = chain, tuple(tokens)
        if key not in self.kept:
            self.kept[key] = page, next(self.serial)
            self.keys[page] = key
        return self.kept[key][1]

    def forget(self, pages: Tokens[int]) -> None:
        """What these pages hold is not found any more."""
        for page in pages:
            if page in self.keys:
                del self.kept[self.keys.pop(page)]

    def match(self, tokens: Tokens[int], chain: int = ROOT, start: int = 0) -> tuple[list[int], int]:
        """The longest run of kept pages after `chain` that holds tokens[start:], held for the caller, and its chain."""
        pages = []
        for at in range(start, len(tokens) - PAGE + 1, PAGE):
            found = self.kept.get((chain, tuple(tokens[at : at + PAGE])))
            if found is None:
                break
            page, chain = found
            self.hold(page)
            pages.append(page)
        return pages, chain

"""The page pool under random use: no page is lost, held twice, or found by other tokens than its own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazulite.engine.generate import OutOfPages, Pages
from lazulite.engine.generate.pages import PAGE, ROOT

SIZE = 6


class User:
    """Takes pages as the engine does: match, allocate, keep, release."""

    def __init__(self, pool: Pages, tokens: list[int]):
        self.pool, self.tokens = pool, tokens
        self.pages, chain = pool.match(tokens)
        self.reused = len(self.pages)
        try:
            for start in range(self.reused * PAGE, len(tokens), PAGE):
                self.pages.append(pool.allocate())
                if len(full := tokens[start : start + PAGE]) == PAGE:
                    chain = pool.keep(self.pages[-1], chain, full)
        except OutOfPages:
            pass


def prompt(kinds: list[int], rest: int) -> list[int]:
    """Pages that repeat one token each, and a few tokens more."""
    return [kind for kind in kinds for _ in range(PAGE)] + [9] * rest


prompts = st.builds(prompt, st.lists(st.integers(0, 2), max_size=4), st.integers(0, PAGE - 1))


@given(st.lists(st.one_of(prompts, st.integers(0, 5)), max_size=30))
def test_references_are_counted(actions: list[list[int] | int]) -> None:
    pool, users, contents = Pages(SIZE), [], {}
    for action in actions:
        if isinstance(action, list):
            user = User(pool, action)
            for i, page in enumerate(user.pages):
                beginning = tuple(action[: (i + 1) * PAGE])
                if i < user.reused:
                    assert contents[page] == beginning, "a reused page holds these tokens after these tokens"
                contents[page] = beginning
            users.append(user)
        elif users:
            pool.release(users.pop(action % len(users)).pages)
        held = [page for user in users for page in user.pages]
        assert pool.references == [held.count(page) for page in range(SIZE)]
        assert set(pool.idle) == set(range(SIZE)) - set(held)
        assert all(pool.kept[key][0] == page for page, key in pool.keys.items()) and len(pool.kept) == len(pool.keys)


def test_a_prefix_is_found_and_outlives_what_followed() -> None:
    pool = Pages(3)
    first = User(pool, prompt([0, 1], 0))
    pool.release(first.pages)
    pool.allocate(), pool.allocate()  # one was never used, one is the end of the chain
    assert pool.match(prompt([0, 1], 0))[0] == first.pages[:1]


def test_the_same_page_after_other_tokens_is_another_page() -> None:
    pool = Pages(4)
    User(pool, prompt([0, 1], 0))
    assert pool.match(prompt([1], 0)) == ([], ROOT)
    assert len(pool.match(prompt([0, 2], 0))[0]) == 1


def test_an_exhausted_pool_says_so() -> None:
    pool = Pages(1)
    pool.allocate()
    with pytest.raises(OutOfPages, match="all 1 cache pages of 32 tokens are in use"):
        pool.allocate()


def test_an_adapter_has_pages_of_its_own_and_what_is_forgotten_is_not_found() -> None:
    pool, tokens = Pages(4), prompt([0, 1], 0)
    assert pool.root() == ROOT and pool.root("tone") == pool.root("tone") != pool.root("form")
    first = User(pool, tokens)
    assert pool.match(tokens, pool.root("tone")) == ([], pool.root("tone"))
    found, chain = pool.match(tokens[:PAGE])
    assert pool.match(tokens, chain, PAGE)[0] == first.pages[1:] and found == first.pages[:1]
    pool.forget(first.pages[:1])
    assert pool.match(tokens) == ([], ROOT) and len(pool.kept) == len(pool.keys) == 1

"""Stop strings against a plain reference that reads one character at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazulite.engine.generate import Stops

short = st.text("ab", min_size=1, max_size=4)


def reference(text: str, strings: tuple[str, ...]) -> str:
    """The text before the first stop string to be complete."""
    for end in range(1, len(text) + 1):
        ending = [s for s in strings if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(st.lists(st.text("abc", max_size=5), max_size=12), st.lists(short, max_size=3).map(tuple))
def test_any_split_gives_the_same_text(pieces: list[str], strings: tuple[str, ...]) -> None:
    stops, out, seen = Stops(strings), "", ""
    for piece in pieces:
        out, seen = out + stops.add(piece), seen + piece
        assert reference(seen, strings).startswith(out), "text was passed on that belongs to a stop string"
        if stops.found:
            break
    out += stops.finish()
    assert out == reference("".join(pieces), strings)


@pytest.mark.parametrize(("strings", "pieces", "passed"), [
    (("END",), ["the E", "N", "D and on"], ["the ", "", ""]),
    (("END",), ["the E", "N", "T"], ["the ", "", "ENT"]),
    (("\n\n", "###"), ["a\n", "\nb"], ["a", ""]),
    (("é",), ["caf", "é!"], ["caf", ""]),
    ((), ["all ", "of it"], ["all ", "of it"]),
])  # fmt: skip
def test_text_is_held_no_longer_than_needed(strings: tuple[str, ...], pieces: list[str], passed: list[str]) -> None:
    stops = Stops(strings)
    assert [stops.add(piece) for piece in pieces] == passed

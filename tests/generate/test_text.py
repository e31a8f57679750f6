"""Text as it streams, with the real tokenizer: no half characters, and all pieces together are the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazulite.models import read

TOKENIZER = read().tokenizer()  # of the default model


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40))
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    detokenizer = TOKENIZER.detokenizer()
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    pieces = [detokenizer.add(id) for id in ids] + [detokenizer.finish()]
    whole = TOKENIZER.decode(ids)
    assert "".join(pieces) == whole
    assert whole != text or not any("\ufffd" in piece for piece in pieces)  # a byte may lack in the vocabulary


@pytest.mark.parametrize("text", ["🥊", "👩‍👩‍👧‍👦 family", "naïve café", "中文字符", "नमस्ते"])
def test_a_character_of_several_tokens_comes_when_it_is_complete(text: str) -> None:
    detokenizer, ids = TOKENIZER.detokenizer(), TOKENIZER.encode(text, add_special_tokens=False)
    assert len(ids) > 1
    assert "".join(detokenizer.add(id) for id in ids) == text and detokenizer.finish() == ""


def test_a_text_cut_inside_a_character_ends_in_a_replacement() -> None:
    detokenizer, ids = TOKENIZER.detokenizer(), TOKENIZER.encode("🥊", add_special_tokens=False)
    assert detokenizer.add(ids[0]) == "" and detokenizer.finish() == "\ufffd"

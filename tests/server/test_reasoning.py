"""Thinking: split from the answer however it is cut, and a grammar begins after it."""

import json

import pytest
from dialects import FAMILIES, cut, parse, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from walks import allowed, walk

from lazulite.server import reasoning, tools
from lazulite.server.anthropic import MessagesRequest
from lazulite.server.grammars import budgeted, constrain

TAGS = {"hermes": "<think>", "opens": "<think>", "qwen-coder": "<think>", "mistral": "[THINK]"}
ASK = [{"role": "user", "content": "What is <think>?"}]
ROWS = [  # family, whether the prompt opens the thinking, answer, pieces
    ("hermes", False, "<think>\nOne.\n\nTwo.\n</think>\n\nSo.", [("reasoning", "One.\n\nTwo."), ("text", "So.")]),
    ("hermes", False, "  <think>x</think>y", [("reasoning", "x"), ("text", "y")]),
    ("hermes", False, "Answer <think>quoted</think>", [("text", "Answer <think>quoted</think>")]),
    ("hermes", False, "<think>never ends ", [("reasoning", "never ends ")]),
    ("hermes", False, "<think>\n\n</think>\n\nAnswer", [("text", "Answer")]),
    ("hermes", False, "<thin", [("text", "<thin")]),
    ("opens", True, "x < y </th> </think> z </think>", [("reasoning", "x < y </th>"), ("text", "z </think>")]),
    ("opens", True, "<think>again</think>yes", [("reasoning", "again"), ("text", "yes")]),
    ("mistral", False, "[THINK]a[/THINK]b", [("reasoning", "a"), ("text", "b")]),
    ("smollm", False, "<think>a</think>b", [("text", "<think>a</think>b")]),
    ("harmony", False, "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>",
     [("reasoning", "a"), ("text", "b")]),
    ("harmony", False, "<|channel|>analysis<|message|>never ends", [("reasoning", "never ends")]),
]  # fmt: skip


def prompt(family: str, opened: bool) -> str:
    text = tokenizer(family).apply_chat_template(ASK)
    assert not (tags := reasoning.tags(tokenizer(family))) or reasoning.is_open(text, tags) == opened
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_tags_are_the_models_own(family: str) -> None:
    tags = reasoning.tags(tokenizer(family))
    assert (tags.begin if tags else None) == TAGS.get(family)


@pytest.mark.parametrize(("family", "opened", "text", "pieces"), ROWS)
def test_thinking_is_split_from_the_answer(family, opened, text, pieces) -> None:
    parser = tools.parser(tokenizer(family), prompt(family, opened))
    assert parse(parser, [text]) == [(*piece, 0) for piece in pieces]


@given(row=st.sampled_from(ROWS), places=st.lists(st.integers(0, 200), max_size=20))
@settings(max_examples=150, deadline=None)
def test_pieces_do_not_depend_on_cuts(row, places) -> None:
    family, opened, text, pieces = row
    parser = tools.parser(tokenizer(family), prompt(family, opened))
    assert parse(parser, cut(text, places)) == [(*piece, 0) for piece in pieces]


def test_thinking_comes_as_text_when_nobody_wants_it_apart() -> None:
    text = "<think>a</think>b"
    assert parse(tools.parser(tokenizer("hermes"), "", reasoning=False), [text]) == [("text", text, 0)]


JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}
THINKS = [  # family, what is said before the answer begins
    ("opens", "Let me {see} }}.</think>"),
    ("hermes", "<think>Hm, true</think>"),
    ("mistral", "[THINK]Hm[/THINK]"),
    ("harmony", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("harmony", "<|channel|>final <|constrain|>json<|message|>"),
]


@pytest.mark.parametrize(("family", "thought"), THINKS)
def test_a_grammar_begins_after_thinking(family: str, thought: str) -> None:
    own = tokenizer(family)
    constraint = constrain(own, prompt=prompt(family, family == "opens"), format=JSON)
    tokens = own.encode(thought, False)
    assert constraint.draft(tokens) == len(tokens) == len(constraint.masks(tokens)) - 1
    for token in tokens:
        ids = set(allowed(constraint.mask(), own.vocab_size))
        assert token in ids and not ids & own.eos_token_ids  # it may not end before the answer
        constraint.advance(token)
    assert {own.spell(id) for id in allowed(constraint.mask(), own.vocab_size)} == {b"t", b"f"}
    ids, finished = walk(constraint, own, 0)
    assert finished and isinstance(json.loads(own.decode(ids)), bool)


def test_a_model_that_may_think_may_also_answer_at_once() -> None:
    own = tokenizer("hermes")
    constraint = constrain(own, prompt=prompt("hermes", False), format=JSON)
    begin = own.backend.token_to_id("<think>")
    assert {own.spell(id) for id in allowed(constraint.mask(), own.vocab_size)} == {b"t", b"f", b"<think>"}
    constraint.advance(own.encode("t")[0])
    assert begin not in allowed(constraint.mask(), own.vocab_size)


def test_thinking_that_the_template_has_closed_is_over() -> None:
    own = tokenizer("opens")
    constraint = constrain(own, prompt=prompt("opens", True) + "\n</think>\n\n", format=JSON)
    assert {own.spell(id) for id in allowed(constraint.mask(), own.vocab_size)} == {b"t", b"f"}


HARMONY = "<|channel|>analysis<|message|>"
LIMITED = [  # family, what begins the thinking, what ends it
    ("opens", "", "</think>"),
    ("hermes", "<think>", "</think>"),
    ("mistral", "[THINK]", "[/THINK]"),
    ("harmony", HARMONY, "<|end|>"),
]


@pytest.mark.parametrize(("family", "begin", "end"), LIMITED)
@pytest.mark.parametrize("said", [0, 3, 7])
def test_thinking_ends_with_its_budget(family: str, begin: str, end: str, said: int) -> None:
    """By itself after `said` tokens, or when 7 are spent; drafted tokens are held to it as sampled ones are."""
    own = tokenizer(family)
    limited = budgeted(own, prompt(family, family == "opens"), 7, None)
    opening, closing, thought = (own.encode(text, False) for text in (begin, end, "a longer thought"))
    tokens = [*opening, *thought[:said], *closing]
    assert limited.draft([*opening, *thought]) == len(opening) + 7
    assert limited.draft([*tokens, *thought]) == len(tokens) + len(thought)
    masks = limited.masks(tokens)
    for token, drafted in zip(tokens, masks, strict=False):
        mask = limited.mask()
        assert (mask is None) == (drafted is None)
        if mask is not None:
            assert [token] == [*allowed(mask, own.vocab_size)] == [*allowed(drafted, own.vocab_size)]
        limited.advance(token)
    assert limited.mask() is None is masks[-1]
    assert sum(mask is not None for mask in masks) == (len(closing) if said == 7 else 0)


def test_a_budget_of_an_answer_without_thinking_is_not_spent() -> None:
    own = tokenizer("hermes")
    limited = budgeted(own, prompt("hermes", False), 2, None)
    tokens = own.encode("<thin air and more", False)
    assert limited.draft(tokens) == len(tokens)
    assert limited.masks(tokens) == [None] * (len(tokens) + 1)
    assert budgeted(tokenizer("smollm"), "", 2, None) is None
    assert budgeted(own, "<think>\n</think>\n\n", 2, None) is None


@pytest.mark.parametrize(("family", "begin", "end"), LIMITED[:3])
def test_a_grammar_begins_where_the_budget_ends(family: str, begin: str, end: str) -> None:
    own = tokenizer(family)
    text = prompt(family, family == "opens")
    limited = budgeted(own, text, 4, constrain(own, prompt=text, format=JSON))
    for token in own.encode(begin + "hmmm", False):
        limited.advance(token)
    ending = own.encode(end, False)
    assert limited.draft([*ending, *own.encode("true")]) == len(ending) + 4
    assert limited.draft(own.encode("true")) == 0
    for token in ending:
        assert [*allowed(limited.mask(), own.vocab_size)] == [token]
        limited.advance(token)
    assert {own.spell(id) for id in allowed(limited.mask(), own.vocab_size)} == {b"t", b"f"}
    ids, finished = walk(limited, own, 0)
    assert finished and limited.finished and isinstance(json.loads(own.decode(ids)), bool)


@pytest.mark.parametrize(("kind", "budget"), [("enabled", 1024), ("disabled", None), ("adaptive", None)])
def test_anthropics_budget_is_the_jobs(kind: str, budget: int | None) -> None:
    thinking = {"type": kind, "budget_tokens": 1024}
    body = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 2000, "thinking": thinking}
    assert MessagesRequest.model_validate(body).job().budget == budget

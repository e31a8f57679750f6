"""Tool calls of every family: parsed from text however it is cut, never lost, and held to their schemas by grammars."""

import json
import re

import jsonschema
import pytest
from dialects import FAMILIES, cut, parse, tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from walks import walk

from lazulite.engine.errors import UserError
from lazulite.server import tools
from lazulite.server.grammars import constrain

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTIONS = {"weather": WEATHER, "now": EMPTY, "now_2": EMPTY}
TOOLS = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in FUNCTIONS.items()]
ANALYSIS = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
ROWS = [  # family, answer, pieces
    ("hermes", 'Hi <tool_call>\n{"name": "weather", "arguments": {"city": "</tool_call>\\"}"}}\n</tool_call>\n'
     '<tool_call>{"arguments": {}, "name": "now"}</tool_call> bye ',
     [("text", "Hi", 0), ("call", "weather", 0), ("arguments", '{"city": "</tool_call>\\"}"}', 0), ("call", "now", 1),
      ("arguments", "{}", 1), ("text", " bye ", 0)]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}}\n{"name": "now_2", "arguments": "{}"}</tool_call>',
     [("call", "now", 0), ("arguments", "{}", 0), ("call", "now_2", 1), ("arguments", "{}", 1)]),
    ("hermes", "<think>\nWhat?\n</think>\n\nIt is 5.", [("reasoning", "What?", 0), ("text", "It is 5.", 0)]),
    ("opens", 'What <tool_call>?\n</think>\n<tool_call>{"name": "now", "arguments": {}}',
     [("reasoning", "What <tool_call>?", 0), ("call", "now", 0), ("arguments", "{}", 0)]),
    ("smollm", 'Ok. <tool_call>[{"name": "now", "arguments": {}}, {"name": "weather", "arguments": {"days": 1}}]'
     "</tool_call>", [("text", "Ok.", 0), ("call", "now", 0), ("arguments", "{}", 0), ("call", "weather", 1),
                      ("arguments", '{"days": 1}', 1)]),
    ("smollm", "None <tool_call>[]</tool_call> helps", [("text", "None helps", 0)]),
    ("qwen-coder", "So:\n<tool_call>\n<function=weather>\n<parameter=city>\n  São\n\nP </parameter>\n"
     "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
     [("text", "So:", 0), ("call", "weather", 0), ("arguments", '{"city": "  São\\n\\nP ", "days": 3}', 0)]),
    ("llama", ' {"name": "weather", "parameters": {"city": "é"}}; {"name": "now", "parameters": {}}',
     [("call", "weather", 0), ("arguments", '{"city": "é"}', 0), ("call", "now", 1), ("arguments", "{}", 1)]),
    ("llama", 'See <|python_tag|>{"type": "function", "name": "now", "parameters": {}}',
     [("text", "See", 0), ("call", "now", 0), ("arguments", "{}", 0)]),
    ("mistral", 'x[TOOL_CALLS]weather[ARGS]{"city": "1"}[TOOL_CALLS]now[CALL_ID]abc[ARGS]{}',
     [("text", "x", 0), ("call", "weather", 0), ("arguments", '{"city": "1"}', 0), ("call", "now", 1),
      ("arguments", "{}", 1)]),
    ("mistral", "[THINK]Hm.[/THINK]Yes.", [("reasoning", "Hm.", 0), ("text", "Yes.", 0)]),
    ("mistral-list", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "1"}, "id": "abcdefghi"}]',
     [("call", "weather", 0), ("arguments", '{"city": "1"}', 0)]),
    ("harmony", ANALYSIS + "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant<|channel|>commentary "
     'to=functions.weather <|constrain|>json<|message|>{"city": "x"}<|call|>',
     [("reasoning", "Hm.", 0), ("text", "Wait.", 0), ("call", "weather", 0), ("arguments", '{"city": "x"}', 0)]),
    ("harmony", " to=functions.now<|channel|>commentary json<|message|>{}",
     [("call", "now", 0), ("arguments", "{}", 0)]),
    ("harmony", ANALYSIS + "<|channel|>final<|message|> Done.\n", [("reasoning", "Hm.", 0), ("text", " Done.\n", 0)]),
]  # fmt: skip
LOST = [  # what looks like a call and is none comes back as it is
    ("hermes", "a <tool_call> junk</tool_call> b "),
    ("hermes", 'a <tool_call>{"name": "weather", "arguments": {"city": }}</tool_call>'),
    ("hermes", 'a <tool_call>{"name": "weather", "arguments": {"city": NaN}}</tool_call>'),
    ("hermes", 'a <tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
    ("hermes", 'a <tool_call>{"name": "unknown", "arguments": {}}</tool_call> b'),
    ("hermes", 'a <tool_call>{"name": 7, "arguments": {}}</tool_call> b'),
    ("hermes", 'a <tool_call>\n{"name": "weather", "arguments": {"city": "Par'),
    ("hermes", "a <tool_call>" + "[" * 30),
    ("hermes", "a <tool_c"),
    ("hermes", "a <think>b</think> "),
    ("smollm", '<tool_call>[{"name": "weather"'),
    ("smollm", "<think>is no mark of this model</think>"),
    ("qwen-coder", "a <tool_call>\n<function=weather>\n<parameter=city>\nParis"),
    ("qwen-coder", "a <tool_call>\n<function=weather>\n<param"),
    ("qwen-coder", "a <tool_call>{}</tool_call>"),
    ("llama", ' {"answer": 42}'),
    ("llama", "a <|python_tag|>print(1)"),
    ("llama", ' {"name": "weather", "parameters": {"city": "Par'),
    ("mistral", "a [TOOL_CALLS]unknown[ARGS]{}"),
    ("mistral", "a [TOOL_CALLS]" + "x" * 400 + "[ARGS]{}"),
    ("mistral", "a [TOOL_CALLS]weather[ARGS]Paris"),
    ("mistral-list", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "x"'),
    ("harmony", "just text"),
    ("harmony", "<|channel|>commentary to=functions.unknown<|message|>{}"),
    ("harmony", "<|channel|>final no end"),
]
TEXTS = [(family, text) for family, text, _ in ROWS] + LOST


def parser(family: str, constrained: bool = False, **options: bool) -> tools.Parser:
    prompt = tokenizer(family).apply_chat_template([{"role": "user", "content": "?"}])
    return tools.parser(tokenizer(family), prompt, TOOLS, constrained=constrained, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_format_is_found_by_template_and_vocabulary(family: str) -> None:
    assert tools.detect(tokenizer(family)).name == {"opens": "hermes"}.get(family, family)
    assert tools.markers(tokenizer(family)) <= set(FAMILIES[family].special + FAMILIES[family].plain)


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize(("family", "text", "pieces"), ROWS, ids=[f"{row[0]}-{i}" for i, row in enumerate(ROWS)])
def test_answers_are_parsed(family: str, text: str, pieces: list[tuple[str, str, int]], constrained: bool) -> None:
    found = parser(family, constrained)
    assert parse(found, [text]) == pieces
    assert found.calls == sum(kind == "call" for kind, *_ in pieces)


@pytest.mark.parametrize(("family", "text"), LOST)
def test_what_is_no_call_stays_text(family: str, text: str) -> None:
    assert parse(parser(family), [text]) == [("text", text, 0)]


@pytest.mark.parametrize(("family", "text"), TEXTS)
def test_without_tools_calls_stay_text(family: str, text: str) -> None:
    kinds = {kind for kind, *_ in parse(tools.parser(tokenizer(family), ""), [text])}
    assert kinds <= {"text", "reasoning"}


@given(row=st.sampled_from(TEXTS), places=st.lists(st.integers(0, 500), max_size=30),
       constrained=st.booleans(), parallel=st.booleans(), reasoning=st.booleans())  # fmt: skip
@example(row=TEXTS[0], places=list(range(500)), constrained=True, parallel=True, reasoning=True)
@settings(max_examples=150, deadline=None)
def test_pieces_do_not_depend_on_cuts(row, places, constrained, parallel, reasoning) -> None:
    family, text = row
    options = {"constrained": constrained, "parallel": parallel, "reasoning": reasoning}
    whole = parse(parser(family, **options), [text])
    assert parse(parser(family, **options), cut(text, places)) == whole
    assert parse(parser(family, **options), list(text)) == whole


MARKS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "<|channel|>", "<|message|>",
     "<|start|>", "<|end|>", "<|python_tag|>", "<function=weather>", "<parameter=city>", "</parameter>", "</function>",
     '{"name": "now", "arguments": {}}', '{"name": "now", "parameters": ', "[", "]", "{", "}", '"', "\\", ",", ";", " ",
     "\n", "analysis", "final", "commentary", " to=functions.now", "now", "text", "é", "🙂"]
)  # fmt: skip


@given(family=st.sampled_from(list(FAMILIES)), parts=st.lists(MARKS, max_size=14),
       places=st.lists(st.integers(0, 400), max_size=12), constrained=st.booleans())  # fmt: skip
@settings(max_examples=250, deadline=None)
def test_any_mixture_of_marks_is_parsed_alike_and_keeps_its_words(family, parts, places, constrained) -> None:
    text = "".join(parts)
    whole = parse(parser(family, constrained), [text])
    assert parse(parser(family, constrained), cut(text, places)) == whole
    said = "".join(piece for _, piece, _ in whole)
    assert said.count("🙂") == text.count("🙂")  # stands for everything that is neither mark nor JSON of a call


def test_arguments_come_piece_by_piece_when_a_grammar_holds_them() -> None:
    found = parser("hermes", constrained=True)
    assert found.add('<tool_call>\n{"name": "weather", "arguments": {"ci')[-1].text == '{"ci'
    assert found.add('ty": "x')[0].text == 'ty": "x'
    assert found.finish() == []


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "harmony"])
def test_one_call_only(family: str) -> None:
    rows = [(text, pieces) for name, text, pieces in ROWS if name == family and any(p[2] == 1 for p in pieces)]
    for text, pieces in rows:
        found = parser(family, parallel=False)
        first = next(piece for piece in pieces if piece[0] == "call")
        assert [piece for piece in parse(found, [text]) if piece[0] == "call"] == [first]
        assert found.done and found.add("more") == []


# -- grammars --------------------------------------------------------------------------------------------------------


def called(family: str, ids: list[int], **options: bool) -> list[tuple[str, dict]]:
    """The calls of an answer, by the way of its tokens."""
    own = tokenizer(family)
    detokenizer = own.detokenizer(shown=tools.markers(own))
    texts = [detokenizer.add(id) for id in ids if id not in own.eos_token_ids] + [detokenizer.finish()]
    pieces = parse(parser(family, constrained=True, **options), texts)
    assert not [text for kind, text, _ in pieces if kind == "text" and text.strip()]
    names = [text for kind, text, _ in pieces if kind == "call"]
    return list(zip(names, (json.loads(text) for kind, text, _ in pieces if kind == "arguments"), strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", ["required", "weather", "now"])
def test_grammars_make_calls_that_fit_their_schemas(family: str, choice: str, seed: int) -> None:
    own = tokenizer(family)
    prompt = own.apply_chat_template([{"role": "user", "content": "?"}])
    named = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    constraint = constrain(own, prompt=prompt, tools=TOOLS, choice=named, parallel=bool(seed % 2))
    constraint.thinking = None  # that an answer may begin with thinking is tested in test_reasoning.py
    if family == "opens":
        for token in own.encode("Let me see.</think>", False):
            constraint.advance(token)
    ids, finished = walk(constraint, own, seed, 800)
    thought = own.encode("</think>", False) if family == "opens" else []
    calls = called(family, thought + ids) if finished else []
    for name, arguments in calls:
        assert choice in ("required", name)
        jsonschema.validate(arguments, FUNCTIONS[name])
    assert finished and calls and (seed % 2 or len(calls) == 1)


AUTO = [  # family, the text that begins a call
    ("hermes", "Well <tool_call>"), ("smollm", "Well <tool_call>"), ("mistral", "Well[TOOL_CALLS]"),
    ("mistral-list", "[TOOL_CALLS]"), ("harmony", "<|channel|>commentary to=functions."),
    ("opens", "Hm</think><tool_call>"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text"), AUTO)
def test_a_call_that_has_begun_is_held_to_its_schema(family: str, text: str) -> None:
    own = tokenizer(family)
    prompt = own.apply_chat_template([{"role": "user", "content": "?"}])
    for seed in range(3):
        constraint = constrain(own, prompt=prompt, tools=TOOLS, parallel=False)
        for token in own.encode(text, False):
            assert constraint.mask() is None and constraint.draft([token]) == 1
            constraint.advance(token)
        ids, finished = walk(constraint, own, seed)
        answer = own.encode(text, False) + ids
        pieces = parse(parser(family, constrained=True), [own.decode(answer, skip_special_tokens=False)])
        calls = [p for p in pieces if p[0] in ("call", "arguments")]
        jsonschema.validate(json.loads(calls[1][1]), FUNCTIONS[calls[0][1]])
        assert finished and len(calls) == 2


def test_without_a_call_the_answer_is_free_and_may_end() -> None:
    own = tokenizer("hermes")
    constraint = constrain(own, prompt="", tools=TOOLS)
    for token in own.encode("I see <tool_cal no call", False):
        assert constraint.mask() is None
        constraint.advance(token)
    constraint.advance(min(own.eos_token_ids))
    assert constraint.finished


def test_an_answer_is_json_or_a_call() -> None:
    own, schema = tokenizer("hermes"), {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
                                        "additionalProperties": False}  # fmt: skip
    seen = set()
    for seed in range(12):
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        constraint = constrain(own, prompt="<think>\n\n</think>", tools=TOOLS, format=wanted)
        ids, finished = walk(constraint, own, seed, 800)
        pieces = parse(parser("hermes", constrained=True), [own.decode(ids)])
        seen.add(pieces[0][0])
        if pieces[0][0] == "text":
            jsonschema.validate(json.loads(pieces[0][1]), schema)
        assert finished
    assert seen == {"text", "call"}


BAD = [  # tools, choice, format, what the error says
    (None, "required", None, "there are no tools"),
    (TOOLS, "sometimes", None, "[tool_choice] found 'sometimes'"),
    (TOOLS, {"type": "function", "function": {"name": "x"}}, None, "no tool is named 'x'"),
    (TOOLS, "auto", {"type": "regex", "regex": "a"}, "does not go with tools"),
    ([{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}], "required", None,
     '[tools] keyword "not" is not supported'),
    (None, "auto", {"type": "xml"}, "[response_format] found"),
    (None, "auto", {"type": "json_schema"}, "[response_format] found"),
]  # fmt: skip


@pytest.mark.parametrize(("given_tools", "choice", "format", "message"), BAD)
def test_what_cannot_be_constrained_is_said(given_tools, choice, format, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        constrain(tokenizer("hermes"), prompt="", tools=given_tools, choice=choice, format=format)


ODD = [
    {"type": None}, {"type": 5}, {"type": ["object", "null"]}, {"type": "string"}, {"properties": []},
    {"properties": {"a": True, "b": None, "c": 7}}, {"required": None}, {"required": 5, "properties": {"a": {}}},
    {"required": [5], "properties": {"a": {"type": "string", "maxLength": -1}}}, {"$defs": 5}, {"$ref": "#/$defs/x"},
    {"properties": {"a": {"type": "string", "maxLength": True, "pattern": "("}}}, {"properties": {"<>\n\"/": {}}},
    {"properties": {"a": {"$ref": "#"}}}, {"x-guidance": 5}, {"enum": []}, {"additionalProperties": 3},
]  # fmt: skip


@pytest.mark.parametrize("family", ["hermes", "qwen-coder", "harmony", "smollm"])
def test_odd_schemas_of_tools_are_used_or_refused(family: str) -> None:
    for strict in (False, True):
        for schema in ODD:
            odd = [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}}]
            try:
                assert constrain(tokenizer(family), prompt="", tools=odd, choice="required").mask() is not None
            except UserError as error:
                assert str(error).startswith("[tools] ")
            call = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
            assert parse(tools.parser(tokenizer(family), "", odd), [call])


def test_tools_that_are_not_strict_may_have_keywords_that_are_ignored() -> None:
    lax = [{"type": "function", "function": {"name": "f", "parameters": {"not": {}, "properties": {}}}}]
    assert constrain(tokenizer("hermes"), prompt="", tools=lax, choice="required") is not None

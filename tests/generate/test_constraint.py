"""Structured output: whatever is said under a constraint is valid, hostile grammars end with one line, drafts change
nothing."""

import json
import math
import re
from time import perf_counter
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from walks import allowed, walk

from lazulite.engine.errors import UserError
from lazulite.engine.generate import Engine, stream_generate
from lazulite.engine.generate.constraint import Compiler
from lazulite.models import load, read
from lazulite.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return read().tokenizer()


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Compiler:
    return Compiler(tokenizer)


def said(compiler: Compiler, tokenizer: Tokenizer, kind: str, source: object, seed: int) -> str | None:
    """A random text of the grammar; None if it did not end in time."""
    ids, finished = walk(compiler.start(compiler.compile(kind, source)), tokenizer, seed)
    text = b"".join(tokenizer.spell(id) for id in ids if id not in tokenizer.eos_token_ids)
    return text.decode() if finished else None


# -- whatever is said is valid ---------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "name", "größe", "日本", "🙂", 'quote"', "new\nline", "a b"])
STRINGS = st.one_of(
    st.just({"type": "string", "maxLength": 5}),
    st.builds(lambda low: {"type": "string", "minLength": low, "maxLength": low + 3}, st.integers(0, 3)),
    st.sampled_from([{"type": "string", "format": name} for name in ("ipv4", "uuid", "email")]),
    st.sampled_from([{"type": "string", "pattern": p} for p in ("^[a-z]{2,4}$", "^(é|日|🙂)+x$", r"^\\d{3}-\\w$")]),
)
SMALL = st.integers(-50, 50)
NUMBERS = st.one_of(
    st.builds(lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n}, SMALL, st.integers(0, 99)),
    st.builds(lambda low, n: {"type": "number", "minimum": low, "exclusiveMaximum": low + n}, SMALL, st.integers(1, 9)),
    st.just({"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100}),
)
WORDS = st.text(st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs"]), max_size=3)  # bytes the model has
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), WORDS, st.just([1, "x"]))
LEAVES = st.one_of(
    STRINGS, NUMBERS, st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}]),
    st.builds(lambda v: {"const": v}, VALUES),
    st.builds(lambda vs: {"enum": vs}, st.lists(VALUES, min_size=1, max_size=3)),
)  # fmt: skip


def objects(schemas: st.SearchStrategy) -> st.SearchStrategy:
    def build(properties: dict, needed: list, extra: object) -> dict:
        required = [name for name, keep in zip(properties, needed, strict=False) if keep]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": extra}

    needed = st.lists(st.booleans(), min_size=4, max_size=4)
    return st.builds(build, st.dictionaries(NAMES, schemas, max_size=4), needed, st.one_of(st.just(False), LEAVES))


def arrays(schemas: st.SearchStrategy) -> st.SearchStrategy:
    def build(items: dict, low: int, more: int) -> dict:
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + more}

    return st.builds(build, schemas, st.integers(0, 2), st.integers(0, 2))


def larger(schemas: st.SearchStrategy) -> st.SearchStrategy:
    several = st.builds(lambda s: {"anyOf": s}, st.lists(schemas, min_size=1, max_size=3))
    return st.one_of(objects(schemas), arrays(schemas), several)


REFERRED = st.just({"$ref": "#/$defs/x"})
SCHEMAS = st.builds(lambda s, x: s | {"$defs": {"x": x}}, st.recursive(LEAVES | REFERRED, larger, max_leaves=6), LEAVES)


@given(schema=SCHEMAS, seed=st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_json_validates(compiler: Compiler, tokenizer: Tokenizer, schema: dict, seed: int) -> None:
    text = said(compiler, tokenizer, "json_schema", schema, seed)
    if text is not None:
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(text))
        assert "\ufffd" not in text and not re.search(r"\s\s|[^ \S]", re.sub(r'"(?:[^"\\]|\\.)*"', "string", text))


REGEXES = [
    "[a-c]{3}x?", "(é|日本|🙂)+!", r"\d{3}-\d{4}", "a{2,4}", r"(?i)yes|no", r"[^\n]{1,8}\n", "", r"\p{Lu}\p{Ll}{3}\.",
]  # fmt: skip


@pytest.mark.parametrize("regex", REGEXES)
def test_regexes_match(compiler: Compiler, tokenizer: Tokenizer, regex: str) -> None:
    ours = regex.replace(r"\p{Lu}\p{Ll}", r"\w\w")  # Python's re has no classes of letters
    for seed in range(5):
        text = said(compiler, tokenizer, "regex", regex, seed)
        assert text is not None and re.fullmatch(ours, text)


def test_choices_and_lark(compiler: Compiler, tokenizer: Tokenizer) -> None:
    choices = ["yes", "no", 'say "x"\n', "né 🙂"]
    assert {said(compiler, tokenizer, "choice", choices, seed) for seed in range(40)} == set(choices)
    sums = 'start: term ("+" term)*\nterm: /[1-9]/ | "(" start ")"'
    texts = [said(compiler, tokenizer, "lark", sums, seed) for seed in range(20)]
    assert sum(text is not None for text in texts) > 10
    assert all(isinstance(eval(text), int) for text in texts if text is not None)


def test_special_tokens_are_never_text(compiler: Compiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.start(compiler.compile("regex", r"(?s:.*)"))
    ids = set(allowed(constraint.mask(), tokenizer.vocab_size))
    special = {id for id, token in tokenizer.added.items() if token.special}
    assert ids & special == tokenizer.eos_token_ids and tokenizer.encode("<", False)[0] in ids


def test_masks_have_a_bit_for_every_id(compiler: Compiler, tokenizer: Tokenizer) -> None:
    mask = compiler.start(compiler.compile("json_schema", {"type": "object"})).mask()
    assert mask.dtype == np.uint32 and mask.shape == (math.ceil(tokenizer.vocab_size / 32),)
    texts = {tokenizer.spell(id) for id in allowed(mask, tokenizer.vocab_size)}
    assert b"{" in texts and all(text.startswith(b"{") for text in texts)


SAID = [  # schema, what is said, whether a digit may follow
    ({"type": "integer"}, "1234567890123456789", False),
    ({"type": "integer"}, "123456789012345678", True),
    ({"type": "number"}, "0.1234567890123456789", False),
    ({"type": "array"}, "[1234567890123456789, 1", True),
    ({"type": "string"}, '"\\"12345678901234567890', True),
]


@pytest.mark.parametrize(("schema", "text", "goes_on"), SAID)
def test_numbers_end(compiler: Compiler, tokenizer: Tokenizer, schema: dict, text: str, goes_on: bool) -> None:
    constraint = compiler.start(compiler.compile("json_schema", schema))
    for token in tokenizer.encode(text, False):
        constraint.advance(token)
    assert goes_on == any(tokenizer.spell(id).isdigit() for id in allowed(constraint.mask(), tokenizer.vocab_size))


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12},
                   "age": {"type": "integer", "minimum": 0, "maximum": 130},
                   "languages": {"type": "array", "items": {"enum": ["fr", "de", "日本語"]}, "maxItems": 2}},
    "required": ["name", "age", "languages"],
    "additionalProperties": False,
}  # fmt: skip
SAMPLINGS = [
    {"temp": 0.0}, {"temp": 0.0, "repetition_penalty": 1.3}, {"temp": 1.0}, {"temp": 5.0}, {"temp": 1.0, "top_k": 1},
    {"temp": 1.5, "top_k": 40, "top_p": 0.9}, {"temp": 1.5, "min_p": 0.1}, {"temp": 1.0, "top_logprobs": 5},
    {"temp": 1.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
    {"temp": 0.0, "logit_bias": {107: -100.0, 0: 100.0}},
]  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> tuple[Any, Any, Engine]:
    model, tokenizer = load()
    return model, tokenizer, Engine(model, max_context=512)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_model_obeys_however_it_samples(compiler: Compiler, engine: Any, sampling: dict[str, Any]) -> None:
    model, tokenizer, shared = engine
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Describe a person as JSON."}])
    constraint = compiler.start(compiler.compile("json_schema", PERSON))
    options = {"engine": shared, "constraint": constraint, "max_tokens": 200, "seed": 1, **sampling}
    answer = list(stream_generate(model, tokenizer, tokenizer.encode(prompt, False), **options))
    jsonschema.validate(json.loads("".join(response.text for response in answer)), PERSON)
    assert answer[-1].finish_reason == "stop" and all(response.logprob > -math.inf for response in answer)


# -- drafts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [(), ("</think>",)])
@pytest.mark.parametrize(
    "text", ['{"a": [1, 2, {"b": null}]}', '{"a": nope}', "", '{"a": 1}}', '</think>{"a": 1}', "x</think>{}"]
)
def test_drafts_allow_what_would_be_allowed_and_change_nothing(compiler, tokenizer, text, after) -> None:
    grammar = compiler.compile("json_schema", {"type": "object"})
    constraint, other = compiler.start(grammar, after), compiler.start(grammar, after)
    tokens = [*tokenizer.encode(text, False), min(tokenizer.eos_token_ids), 5]
    before = constraint.mask()
    count = constraint.draft(tokens)
    masks = constraint.masks(tokens[:count])
    assert np.array_equal(before, constraint.mask()) and len(masks) == count + 1
    for token, mask in zip(tokens, masks[:count], strict=False):
        assert np.array_equal(mask, other.mask()) and token in allowed(mask, tokenizer.vocab_size)
        other.advance(token)
    assert other.finished or tokens[count] not in allowed(other.mask(), tokenizer.vocab_size)


def test_a_token_that_is_not_allowed_is_an_error(compiler: Compiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.start(compiler.compile("choice", ["yes"]))
    with pytest.raises(UserError, match=r"\[constraint\]"):
        constraint.advance(tokenizer.encode("no")[0])


def test_a_constraint_may_begin_late_and_again(compiler: Compiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.start(compiler.compile("regex", "[0-9]{2};"), ["<num>"], lazy=True, repeat=True)
    text, free = "a <num>12;b <num>34;c", []
    for token in tokenizer.encode(text, False):
        free.append(constraint.mask() is None)
        constraint.advance(token)
    assert not all(free) and free[0] and constraint.mask() is None and not constraint.finished
    constraint.advance(min(tokenizer.eos_token_ids))
    assert constraint.finished


def test_a_token_may_say_more_than_what_was_awaited(compiler: Compiler, tokenizer: Tokenizer) -> None:
    joined = next(id for id in range(tokenizer.vocab_size) if tokenizer.spell(id) == b'>"')
    constraint = compiler.start(compiler.compile("regex", '"[0-9]"'), ["<num>"])
    for token in [*tokenizer.encode("<num", False), joined, *tokenizer.encode('7"', False)]:
        assert constraint.draft([token]) == 1
        constraint.advance(token)
    assert constraint.finished


# -- what is refused -------------------------------------------------------------------------------------------------


def nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


LOOP = {"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}
ENDLESS = {"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}}}
BAD = [  # kind, source, what the error says
    ("json_schema", {"type": "object", "if": {}}, 'keyword "if" is not supported'),
    ("json_schema", {"properties": {"a": {"not": {}}}}, 'keyword "not" is not supported'),
    ("json_schema", {"type": "array", "uniqueItems": True}, 'keyword "uniqueItems" is not supported'),
    ("json_schema", {"$ref": "https://example.org/x"}, "https://example.org/x"),
    ("json_schema", {"$ref": "file:///etc/passwd"}, "file:///etc/passwd"),
    ("json_schema", {"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ("json_schema", {"type": "string", "format": "zip"}, "Unknown format: zip"),
    ("json_schema", {"type": "strin"}, "Invalid type: strin"),
    ("json_schema", {"type": 123}, "[json_schema]"),
    ("json_schema", {"type": "integer", "minimum": 3, "maximum": 1}, "minimum (3) is greater than maximum (1)"),
    ("json_schema", {"enum": []}, "[json_schema]"),
    ("json_schema", False, "[json_schema]"),
    ("json_schema", ["x"], "found a list, wanted an object"),
    ("json_schema", LOOP, "no text can satisfy it"),
    ("json_schema", nested(200), "recursion limit"),
    ("json_schema", nested(100_000), "nested too deeply"),
    ("json_schema", {"enum": [f"v{i}" for i in range(100_000)]}, "wanted at most"),
    ("json_schema", {"type": "object", "properties": {f"p{i}": {} for i in range(1200)}}, "[json_schema]"),
    ("json_schema", {"const": "\ud800"}, "[json_schema]"),
    ("json_schema", {"type": "number", "minimum": math.nan}, "[json_schema]"),
    ("regex", "(", "unclosed group"),
    ("regex", "\ud800", "[regex]"),
    ("regex", "(" * 1000 + "a" + ")" * 1000, "[regex]"),
    ("regex", "a" * 100_000, "wanted at most"),
    ("regex", r"(?<=a)b", "look-around"),
    ("regex", r"(a)\1", "backreferences"),
    ("lark", 'start: "', "[lark]"),
    ("lark", "start: missing", "[lark]"),
    ("lark", "start: start", "no text can satisfy it"),
    ("choice", [], "wanted a list"),
    ("choice", "yes", "wanted a list"),
    ("choice", ["a", 1], "wanted a list"),
]


@pytest.mark.parametrize(("kind", "source", "message"), BAD, ids=[f"{row[0]}-{i}" for i, row in enumerate(BAD)])
def test_bad_grammars_end_with_a_line(compiler: Compiler, kind: str, source: object, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        compiler.compile(kind, source)
    assert "\n" not in error.value.what and len(error.value.what) < 400 and error.value.what.startswith(f"[{kind}]")


BOMBS = [
    ("regex", "((a{1,1000}){1,1000}){1,1000}"),
    ("regex", "(x+x+)+y"),
    ("regex", "(a|b)*a(a|b){200}"),
    ("regex", "(.*a.{500}){20}b"),
    ("regex", r"\p{L}{900}.*\p{L}{900}"),
    ("json_schema", {"type": "string", "maxLength": 10**9}),
    ("json_schema", {"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}}),
    ("json_schema", {"type": "integer", "multipleOf": 9_973, "minimum": 0, "maximum": 10**9}),
    ("json_schema", ENDLESS | {"$ref": "#/$defs/n"}),
    ("lark", 'start: a\na: a a a a a a | "x"'),
]


@pytest.mark.parametrize(("kind", "source"), BOMBS)
def test_bombs_cost_little(compiler: Compiler, tokenizer: Tokenizer, kind: str, source: object) -> None:
    """They compile or are refused, and a step takes its time or ends with an error: never longer than a second."""
    try:
        constraint = compiler.start(compiler.compile(kind, source))
    except UserError:
        return
    longest, rng = 0.0, np.random.default_rng(0)
    for _ in range(60):
        begin = perf_counter()
        try:
            mask = constraint.mask()
            longest = max(longest, perf_counter() - begin)
            constraint.advance(int(rng.choice(allowed(mask, tokenizer.vocab_size))))
        except UserError as error:
            assert str(error).startswith("[constraint]")
            break
        if constraint.finished:
            break
    assert longest < 1.0


def refused(compiler: Compiler, kind: str, source: object) -> UserError | None:
    try:
        compiler.compile(kind, source)
    except UserError as error:
        return error
    return None


def test_what_was_compiled_is_kept_and_the_oldest_forgotten(tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("lazulite.engine.generate.constraint.KEPT", 2)
    compiler = Compiler(tokenizer)
    first = compiler.compile("choice", ["a"])
    assert compiler.compile("choice", ["a"]) is first
    errors = [error for _ in range(3) if (error := refused(compiler, "regex", "(")) is not None]
    assert len({id(error) for error in errors}) == len(errors) == 3  # one that is kept would grow by each traceback
    first = compiler.compile("choice", ["a"])
    for text in ("b", "c"):
        compiler.compile("choice", [text])
    assert compiler.compile("choice", ["a"]) is not first and len(compiler.kept) == 2


def test_a_compile_that_takes_too_long_is_given_up(tokenizer: Tokenizer) -> None:
    compiler = Compiler(tokenizer, seconds=0.001)
    with pytest.raises(UserError, match="took longer than 0.001 seconds"):
        compiler.compile("json_schema", {"type": "object", "properties": {f"p{i}": {} for i in range(900)}})

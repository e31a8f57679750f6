"""Structured output: a grammar says which tokens may come next, as one bit a token for the kernel `sample`.

Grammars (JSON schema, regex, Lark, a list of choices) are compiled by https://github.com/guidance-ai/llguidance.
A constraint may begin late, after a text that it waits for (the end of thinking, the beginning of a tool call).
"""

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import UserError

KEPT = 32  # compiled grammars
DIGITS = 19  # in a row, of a JSON number: as many as an int64 has; a model could go on for ever
TAIL = 128  # bytes in which an awaited text is looked for
LARGEST = {"json_schema": 256_000, "regex": 4_000, "lark": 64_000, "choice": 64_000, "tools": 512_000}  # characters
# A compile or a step that needs more ends with an error: about 20 ms a step (llguidance's README gives the rates).
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 200_000,
    "max_lexer_states": 16_000,  # of 0.5 kB, kept with the grammar
    "max_grammar_size": 100_000,
    "max_items_in_row": 4_000,
    "verbose_errors": False,
}
# White space only after a comma or colon, and one space there: a model could go on with it for ever.
JSON = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


class Constraint(Protocol):
    """What a sequence may say next. A mask has a bit for each id of the tokenizer, 32 in a word, lowest id first."""

    @property
    def finished(self) -> bool:
        """Nothing more may come."""

    def mask(self) -> np.ndarray | None:
        """(words) uint32, valid until the next call; None: every token is allowed."""

    def advance(self, token: int) -> None:
        """Takes the token that was sampled; UserError if it is not allowed."""

    def draft(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` would be allowed, one after another."""

    def masks(self, tokens: Sequence[int]) -> list[np.ndarray | None]:
        """The mask now and after each of `tokens`, which draft() allows; the state stays as it is."""


class Vocabulary(NamedTuple):
    """A tokenizer as llguidance wants it. Special tokens cannot be produced as text."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: int | None
    encode: Callable[[str], list[int]]

    def __call__(self, text: bytes | str) -> list[int]:
        return self.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


class Thinking(NamedTuple):
    """A model may begin its answer with the token `begin`, and then thinks until the text `end` (a regex)."""

    begin: int
    end: str


class Grammar(NamedTuple):
    """What was compiled: a matcher at its beginning, and whether it is about JSON."""

    matcher: Any
    json: bool


class Compiler:
    """Compiles grammars for one tokenizer, in threads, and keeps the last ones. May be used by several threads."""

    def __init__(self, tokenizer: Any, seconds: float = 5.0):
        import llguidance

        ids, ends = range(tokenizer.vocab_size), sorted(tokenizer.eos_token_ids)
        tokens = [tokenizer.spell(id) for id in ids]
        special = [id for id in ids if id in ends or (id in tokenizer.added and tokenizer.added[id].special)]
        words = Vocabulary(tokens, special, ends[0], None, lambda text: tokenizer.encode(text, False))
        self.backend = llguidance.LLTokenizer(llguidance.TokenizerWrapper(words), eos_token=ends)
        self.limits = llguidance.LLParserLimits(**LIMITS)
        self.tokens, self.ends, self.seconds = tokens, frozenset(ends), seconds
        self.open = pack(id not in ends for id in ids)  # a mask: anything but the end
        self.digits = pack(token[:1].isdigit() for token in tokens)
        self.kept: OrderedDict[tuple[str, str], Future[Grammar | tuple[str, str]]] = OrderedDict()
        self.lock = Lock()
        self.threads = ThreadPoolExecutor(2, "compile")

    def compile(self, kind: str, source: Any) -> Grammar:
        """kind: json_schema, regex, lark or choice; the source is a schema, a string or a list of strings.

        UserError for one that is wrong, too large, or takes longer than `seconds`."""
        key = kind, spelled(kind, source)
        with self.lock:
            found = self.kept.get(key) or self.threads.submit(self._compile, *key)
            self.kept[key] = found
            self.kept.move_to_end(key)
            while len(self.kept) > KEPT:
                self.kept.popitem(last=False)
        try:
            made = found.result(self.seconds)
        except Late:
            made = f"[{kind}] compiling it took longer than {self.seconds:g} seconds", "Make it smaller."
        if not isinstance(made, Grammar):
            raise UserError(*made)
        return made

    def start(self, grammar: Grammar, after: Sequence[str] = (), **options: Any) -> "Structure":
        return Structure(self, grammar, after, **options)

    def _compile(self, kind: str, text: str) -> Grammar | tuple[str, str]:
        """The grammar, or what is wrong with it and what to do."""
        from llguidance import LLMatcher

        language = kind if kind in ("json_schema", "regex") else "lark"
        try:
            grammar = getattr(LLMatcher, f"grammar_from_{language}")(text)
        except ValueError as error:  # half a character, NaN
            return explained(kind, str(error))
        matcher = LLMatcher(self.backend, grammar, limits=self.limits, log_level=0)
        probe = matcher.deep_copy()
        if not matcher.is_error():
            probe.compute_bitmask()  # some errors show in the first steps only
            probe.try_consume_tokens(self.backend.tokenize_str("{"))
            probe.compute_bitmask()
        if probe.is_error() or (probe.is_stopped() and not probe.is_accepting()):
            return explained(kind, probe.get_error())
        return Grammar(matcher, kind in ("json_schema", "tools"))


def spelled(kind: str, source: Any) -> str:
    """The source as one string, which is also what it is remembered by."""
    text = SPELL[kind](source)
    if len(text) > LARGEST[kind]:
        raise UserError(f"[{kind}] has {len(text)} characters, wanted at most {LARGEST[kind]}", "Make it smaller.")
    return text


def bounded(schema: Any, lenient: bool = False) -> str:
    """A JSON schema with our options. lenient: keywords that are not supported are ignored."""
    if not isinstance(schema, dict | bool):
        raise UserError(f"[json_schema] found a {type(schema).__name__}, wanted an object", 'As {"type": "object"}.')
    rules = schema if isinstance(schema, dict) else {} if schema else {"enum": []}
    try:
        return json.dumps(rules | {"x-guidance": JSON | {"lenient": lenient}}, ensure_ascii=False)
    except RecursionError:
        raise UserError("[json_schema] nested too deeply", "Make it flatter, or use $defs and $ref.") from None


def choices(texts: Any) -> str:
    if not texts or not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise UserError("[choice] wanted a list of one or more strings, none of them empty")
    return "start: " + " | ".join(map(quoted, texts))


SPELL: dict[str, Callable[[Any], str]] = {
    "json_schema": bounded,
    "regex": str,
    "lark": str,
    "choice": choices,
    "tools": str,  # Lark, written by us
}


def quoted(text: str) -> str:
    """A string of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def explained(kind: str, message: str) -> tuple[str, str]:
    """llguidance's message in a line, and what to do."""
    if keys := re.search(r"Unimplemented keys: \[(.*?)\]", message):
        return f"[{kind}] keyword {keys[1]} is not supported", "Leave it out; docs/structured.md lists what is."
    lines = [line.strip() for line in message.replace("<non-verbose/>", "").splitlines()]
    said = next((line for line in lines if line.startswith("error: ")), next(filter(None, lines), ""))
    if not said or "NoExtension" in said:
        return f"[{kind}] no text can satisfy it", "Look for rules that contradict each other or never end."
    return f"[{kind}] {said.removeprefix('error: ')[:200]}", "docs/structured.md lists what is supported."


def pack(allowed: Any) -> np.ndarray:
    """Booleans to a mask."""
    bits = np.packbits(np.fromiter(allowed, bool), bitorder="little")
    return np.pad(bits, (0, -len(bits) % 4)).view(np.uint32)


class Structure:
    """A grammar in use, see Constraint.

    after: texts (regexes) awaited one after another; the grammar begins where the last one ends. lazy: the answer may
    also end before it begins. repeat: when the grammar is done, the last of `after` is awaited again.
    """

    def __init__(
        self, compiler: Compiler, grammar: Grammar, after: Sequence[str] = (), *,
        lazy: bool = False, repeat: bool = False, thinking: Thinking | None = None,
    ):  # fmt: skip
        self.compiler, self.grammar = compiler, grammar
        self.after, self.lazy, self.repeat, self.thinking = tuple(after), lazy, repeat, thinking
        self.awaited, self.tail = self.after, b""
        self.matcher = grammar.matcher.deep_copy()
        self.quoted = self.escaped = False  # inside a JSON string, after a backslash in it
        self.digits = 0  # the last so many characters are, outside of strings
        self.finished = False

    def mask(self) -> np.ndarray | None:
        words = None if self.lazy else self.compiler.open
        if not self.awaited:
            words = np.frombuffer(self.matcher.compute_bitmask(), np.uint32)[: len(self.compiler.open)]
            self._check()
            if self.digits >= DIGITS and (rest := words & ~self.compiler.digits).any():
                words = rest
        if self.thinking and words is not None:
            words = words.copy()
            words[self.thinking.begin // 32] |= np.uint32(1 << self.thinking.begin % 32)
        return words

    def advance(self, token: int) -> None:
        thinking, self.thinking = self.thinking, None
        if thinking and token == thinking.begin:
            self.awaited = (thinking.end, *self.awaited)
        elif self.awaited:
            self._await(token)
        else:
            self._consume([token])
        self.finished |= token in self.compiler.ends

    def draft(self, tokens: Sequence[int]) -> int:
        return len(self._walk(tokens)) - 1

    def masks(self, tokens: Sequence[int]) -> list[np.ndarray | None]:
        return [probe.mask() for probe in self._walk(tokens)]

    def copy(self) -> "Structure":
        new = object.__new__(Structure)
        new.__dict__ |= self.__dict__ | {"matcher": self.matcher.deep_copy()}
        return new

    def _walk(self, tokens: Sequence[int]) -> list["Structure"]:
        """The states now and after each token, as far as they are allowed."""
        states = [self]
        for token in tokens:
            state = states[-1].copy()
            try:
                if state.finished or (state.awaited and not state.lazy and token in self.compiler.ends):
                    break
                state.advance(token)
            except UserError:
                break
            states.append(state)
        return states

    def _await(self, token: int) -> None:
        """Looks for the awaited text; what the token says beyond it belongs to the grammar, if that was the last."""
        self.tail += self.compiler.tokens[token]
        while self.awaited and (found := re.search(self.awaited[0].encode(), self.tail)):
            self.awaited, self.tail = self.awaited[1:], self.tail[found.end() :]
        if self.awaited:
            self.tail = self.tail[-TAIL:]
            return
        rest, self.tail = self.compiler.backend.tokenize_bytes(self.tail.strip()), b""
        if self.lazy and self.matcher.validate_tokens(rest) < len(rest):
            self.awaited = self.after[-1:]  # it only looked like it
        else:
            self._consume(rest)

    def _consume(self, tokens: list[int]) -> None:
        self.matcher.consume_tokens(tokens)
        self._check()
        if self.grammar.json:
            self._count(b"".join(self.compiler.tokens[token] for token in tokens))
        if self.matcher.is_stopped() and self.repeat:
            self.awaited, self.matcher = self.after[-1:], self.grammar.matcher.deep_copy()
        elif self.matcher.is_stopped():
            self.finished = True

    def _count(self, text: bytes) -> None:
        """Counts the digits at the end of what was said, outside strings."""
        for c in text:
            if self.escaped or c == ord("\\"):
                self.escaped = self.quoted and not self.escaped
            else:
                self.quoted ^= c == ord('"')
            self.digits = self.digits + 1 if ord("0") <= c <= ord("9") and not self.quoted else 0

    def _check(self) -> None:
        if self.matcher.is_error():
            raise UserError(f"[constraint] {self.matcher.get_error().splitlines()[0][:200]}")

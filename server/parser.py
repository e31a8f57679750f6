"""A model's answer, as it comes, to text, reasoning and tool calls.

The parser is a coroutine: straight-line code that yields when it needs more text. It decides by characters alone, never
by where a piece of text happens to end, so however an answer is split, the pieces add up to the same.
"""

import json
import re
from collections.abc import Generator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from .reasoning import Tags

Steps = Generator[None, None, Any]
HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
ENDS = ("<|start|>", "<|end|>", "<|call|>", "<|return|>")  # of a Harmony message; its header is
HEADER = re.compile(
    r"\s*(?:<\|start\|>)?(?:assistant)?\s*(?:to=(?:functions\.)?(?P<to>\S+?))?\s*"
    r"<\|channel\|>\s*(?P<channel>\w+)\s*(?:to=(?:functions\.)?(?P<later>[^\s<]+))?"
)
NAME = 300  # characters in which a name or a header must end


@dataclass(slots=True)
class Piece:
    """call: a tool call begins, `text` is the function's name; arguments: the next piece of its JSON text.
    `index` counts the calls of an answer."""

    kind: Literal["text", "reasoning", "call", "arguments"]
    text: str
    index: int = 0


class Unparsable(Exception):
    """What looked like a call is none."""


class Extent:
    """Finds the end of a JSON object or array, without judging it."""

    def __init__(self, depth: int = 0):
        self.depth, self.quoted, self.escaped = depth, False, False

    def add(self, text: str) -> int:
        """How many characters of `text` belong to the value; it is complete when `depth` is 0."""
        for i, c in enumerate(text):
            if self.escaped:
                self.escaped = False
            elif self.quoted:
                self.escaped, self.quoted = c == "\\", c != '"'
            elif c in '"{[}]':
                self.quoted = c == '"'
                self.depth += (c in "{[") - (c in "}]")
                if not self.depth and not self.quoted:
                    return i + 1
        return len(text)


class Parser:
    """style: how the model writes calls, see `Format` in tools.py. tools: JSON schemas of the functions by name, None:
    calls stay text. tags, opened: of its thinking. constrained: a grammar holds the model to its format, so arguments
    are passed on as they come; without it a call is held until it is whole and valid."""

    def __init__(
        self, style: str, begin: str, end: str, tools: dict[str, Any] | None, *,
        tags: Tags | None = None, opened: bool = False, reasoning: bool = True,
        parallel: bool = True, constrained: bool = False,
    ):  # fmt: skip
        self.style, self.begin, self.end, self.tools = style, begin, end, tools or {}
        self.tags, self.opened, self.reasoning = tags if reasoning else None, opened, reasoning
        self.parallel, self.constrained = parallel, constrained
        self.text = self.raw = self.gap = ""  # not read yet; read since a call began; white space between texts
        self.calls, self.said, self.done, self.ended = 0, False, False, False
        self.out: list[Piece] = []
        self.plain = not (self.tags or self.tools) and style != "harmony"  # there is nothing to look for
        self.machine = self._harmony() if style == "harmony" else self._answer()

    def add(self, text: str) -> list[Piece]:
        """What is certain with this text."""
        if self.plain:
            return [Piece("text", text)] if text else []
        self.text += text
        next(self.machine, None)
        out, self.out = [piece for piece in self.out if piece.text], []
        if len(out) < 2:
            return out
        return [Piece(kind, "".join(p.text for p in run), index) for (kind, index), run in groupby(out, _kind)]

    def finish(self) -> list[Piece]:
        """What was held back, when no more text will come."""
        self.ended = True
        return self.add("")

    # -- the shapes of answers ---------------------------------------------------------------------------------------

    def _answer(self) -> Steps:
        """Thinking, then text with calls in it."""
        after = False  # a mark, next to which white space is dropped
        if self.tags and ((yield from self._starts(self.tags.begin)) or self.opened):
            yield from self._pass("reasoning", (self.tags.end,), True)
            after = True
        if self.tools and self.style == "bare" and (yield from self._peek()) == "{":
            after = yield from self._attempt(self._bare())
        marks = (self.begin,) if self.tools and self.begin else ()
        while not self.done and (yield from self._pass("text", marks, after)):
            after = yield from self._attempt(getattr(self, f"_{self.style}")())

    def _harmony(self) -> Steps:
        """Messages with a header each: `<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>…`

        Source: https://cookbook.openai.com/articles/openai-harmony
        """
        while not self.done and (yield from self._peek()):
            if not (yield from self._attempt(self._message())):
                mark = yield from self._pass("text", (*ENDS, "<|channel|>"), False)
                self.text = mark + self.text if mark in ("<|start|>", "<|channel|>") else self.text

    def _message(self) -> Steps:
        header = HEADER.match((yield from self._read(("<|message|>",), NAME)))
        if not header:
            raise Unparsable
        to = header["to"] or header["later"]
        if not to:
            kind = "reasoning" if self.reasoning and header["channel"] == "analysis" else "text"
            yield from self._pass(kind, ENDS, False)
        elif to not in self.tools:
            raise Unparsable
        elif self.constrained:
            self._call(to)
            yield from self._pass("arguments", ENDS, True)
            self._complete()
        else:
            body = yield from self._read(ENDS, open=True)
            self._whole(to, body)

    # -- the shapes of calls, after their mark -----------------------------------------------------------------------

    def _listed(self) -> Steps:
        """{"name": …, "arguments": {…}} once, several times, or in a list."""
        calls, listed = self.calls, (yield from self._next()) == "["
        if listed:
            self._take(1)
        while (c := (yield from self._next())) and c in ("{,]" if listed else "{;"):
            if c == "{":
                yield from self._object()
                if self.done:
                    return
            else:
                self._take(1)
            if c == "]":
                break
        if calls == self.calls and c != "]":
            raise Unparsable
        yield from self._starts(self.end)

    _bare = _listed  # Llama: with a mark, or without one at the beginning of the answer

    def _named(self) -> Steps:
        """NAME[ARGS]{…}, or NAME[CALL_ID]…[ARGS]{…}; older models write a list."""
        if (yield from self._next()) in ("[", "{"):
            yield from self._listed()
            return
        name = yield from self._read(("[ARGS]",), NAME)
        name = name.partition("[CALL_ID]")[0].strip()
        if name not in self.tools or (yield from self._next()) != "{":
            raise Unparsable
        if self.constrained:
            self._call(name)
            yield from self._arguments()
        else:
            body = yield from self._value()
            self._whole(name, body)

    def _tagged(self) -> Steps:
        """<function=NAME> <parameter=KEY> value </parameter> … </function>"""
        yield from self._expect("<function=")
        name = (yield from self._read((">",), NAME)).strip()
        if name not in self.tools:
            raise Unparsable
        kinds = properties(self.tools[name])
        arguments: dict[str, Any] = {}
        while not (yield from self._starts("</function>")):
            yield from self._expect("<parameter=")
            key = yield from self._read((">",), NAME)
            text = yield from self._read(("</parameter>",))
            arguments[key] = typed(text.removeprefix("\n").removesuffix("\n"), kinds.get(key))
        self._whole(name, dumps(arguments))
        yield from self._starts(self.end)

    def _object(self) -> Steps:
        """{"name": …, "arguments": {…}}; passed on as it comes when the grammar has made it."""
        if self.constrained:
            extent, size = Extent(), 0
            while not (head := HEAD.match(self.text)) and not self.ended:
                size += extent.add(self.text[size:])
                if not extent.depth:
                    break
                yield
            if head and head[1] in self.tools:
                self._take(head.end())
                self._call(head[1])
                yield from self._arguments()
                yield from self._value(Extent(1))
                return
        body = yield from self._value()
        try:
            call = loads(body)
            given = call.get("arguments", call.get("parameters", {}))
            name, arguments = call["name"], given if isinstance(given, str) else dumps(given)
        except (ValueError, LookupError, AttributeError, RecursionError):
            raise Unparsable from None
        self._whole(name, arguments)

    # -- reading -----------------------------------------------------------------------------------------------------

    def _attempt(self, steps: Steps) -> Steps:
        """Runs `steps`; True when they found what they wanted. Else what they read is text."""
        try:
            yield from steps
            return True
        except Unparsable:
            self.out.append(Piece("text", self.raw))
            self.gap, self.said = "", True
            return False
        finally:
            self.raw = ""

    def _pass(self, kind: Any, ends: tuple[str, ...], after: bool) -> Steps:
        """Passes text on as `kind` until one of `ends`, which is read too and returned; "" at the end of the answer.
        White space before an end, and at the beginning if it is `after` one, is dropped."""
        self.raw = ""
        while True:
            if after:
                self.text = self.text.lstrip()
                after = not self.text
            at, end = first(self.text, ends)
            if end:
                size = len(self.text[:at].rstrip())
                self._emit(kind, size)
                self.gap = self.gap or self.text[: at - size]
                self._take(at - size + len(end))
                return end
            if self.ended:
                self._emit(kind, len(self.text))
                return ""
            size = len(self.text) - max((begun(self.text, end) for end in ends), default=0)
            self._emit(kind, len(self.text[:size].rstrip()) if ends else size)
            yield

    def _read(self, ends: tuple[str, ...], most: int = 1 << 62, open: bool = False) -> Steps:
        """The text before the first of `ends`, which is read too; it must come within `most` characters, or if the end
        of the answer is not as good (`open`)."""
        while True:
            at, end = first(self.text, ends)
            if end and at <= most:
                return self._take(at + len(end))[:at]
            if end or len(self.text) >= most + max(map(len, ends)):
                self._fail(most)
            if self.ended:
                return self._take(len(self.text)) if open else self._fail()
            yield

    def _value(self, extent: Extent | None = None) -> Steps:
        """The text of a JSON object or array."""
        extent, size = extent or Extent(), 0
        while True:
            size += extent.add(self.text[size:])
            if size and not extent.depth:
                return self._take(size)
            if self.ended:
                self._fail()
            yield

    def _arguments(self) -> Steps:
        """Passes a JSON object on, as far as it comes."""
        extent = Extent()
        while True:
            self._emit("arguments", extent.add(self.text))
            if not extent.depth or self.ended:
                break
            yield
        if not extent.depth:
            self._complete()

    def _starts(self, mark: str) -> Steps:
        """Whether `mark` comes next, white space aside; reads it if it does."""
        while len(self.text.lstrip()) < len(mark) and mark.startswith(self.text.lstrip()) and not self.ended:
            yield
        found = self.text.lstrip().startswith(mark)
        if found:
            self._take(len(self.text) - len(self.text.lstrip()) + len(mark))
        return found

    def _expect(self, mark: str) -> Steps:
        if not (yield from self._starts(mark)):
            raise Unparsable

    def _peek(self) -> Steps:
        """The next character that is no white space; "" at the end of the answer."""
        while not self.text.lstrip() and not self.ended:
            yield
        return self.text.lstrip()[:1]

    def _next(self) -> Steps:
        """The same, and reads the white space before it."""
        c = yield from self._peek()
        self._take(len(self.text) - len(self.text.lstrip()))
        return c

    def _take(self, size: int) -> str:
        taken, self.text = self.text[:size], self.text[size:]
        self.raw += taken
        return taken

    def _fail(self, size: int = 1 << 62) -> None:
        """This is no call, and the next `size` characters are part of what is none."""
        self._take(size)
        raise Unparsable

    # -- writing -----------------------------------------------------------------------------------------------------

    def _emit(self, kind: Any, size: int) -> None:
        """The next `size` characters."""
        if not size:
            return
        if kind == "text":
            if self.gap and self.said:
                self.out.append(Piece(kind, self.gap))
            self.gap, self.said = "", True
        self.out.append(Piece(kind, self.text[:size], self.calls - 1 if kind == "arguments" else 0))
        self.text = self.text[size:]

    def _call(self, name: str) -> None:
        self.out.append(Piece("call", name, self.calls))
        self.calls += 1
        self.raw = ""

    def _complete(self) -> None:
        self.done = not self.parallel

    def _whole(self, name: Any, arguments: str) -> None:
        """A call that is complete, if it is one."""
        try:
            valid = name in self.tools and isinstance(loads(arguments), dict)
        except (ValueError, TypeError, RecursionError):
            valid = False
        if not valid:
            raise Unparsable
        self._call(name)
        self.out.append(Piece("arguments", arguments.strip(), self.calls - 1))
        self._complete()


def _kind(piece: Piece) -> tuple[Any, int]:
    return piece.kind, piece.index


def first(text: str, marks: tuple[str, ...]) -> tuple[int, str]:
    """The first of `marks` in `text`, and where; "" if there is none."""
    return min(((at, mark) for mark in marks if (at := text.find(mark)) >= 0), default=(-1, ""))


def loads(text: str) -> Any:
    """JSON as the standard has it: json.loads takes NaN and Infinity too."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def dumps(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return json.dumps(value) if re.search("[\ud800-\udfff]", text) else text  # half a character cannot be sent


def begun(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    if mark[0] not in text:
        return 0
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def properties(schema: dict[str, Any]) -> dict[str, Any]:
    """What a client's schema says of its properties, if it is sound."""
    found = schema.get("properties")
    return found if isinstance(found, dict) else {}


def typed(text: str, schema: Any) -> Any:
    """A value written as text: a string if its schema says so or it is no JSON."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return loads(text)
    except (ValueError, RecursionError):
        return text

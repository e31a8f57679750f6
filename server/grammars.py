"""Grammars of answers: what a response_format, tools and tool_choice allow a model to say."""

import re
from functools import cache
from typing import Any

from ..engine.errors import UserError
from ..engine.generate.budget import Budget
from ..engine.generate.constraint import Compiler, Constraint, Structure, Thinking, bounded, quoted
from . import reasoning
from .parser import properties
from .tools import Format, detect

Tools = list[dict[str, Any]]
# Harmony: what is around thinking; where the answer begins.
ANALYSIS = reasoning.Tags("<|channel|>analysis<|message|>", "<|end|>")
FINAL = r"<\|channel\|>final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"


@cache
def compiler(tokenizer: Any) -> Compiler:
    return Compiler(tokenizer)


def constrain(
    tokenizer: Any, *, prompt: str, format: dict[str, Any] | None = None, tools: Tools | None = None,
    choice: Any = "auto", parallel: bool = True,
) -> Structure | None:  # fmt: skip
    """The constraint of an answer to `prompt`; None if it is free. May take seconds: it compiles.

    format: OpenAI's response_format, also {"type": "regex", "regex"} and {"type": "lark", "grammar"}. choice: OpenAI's
    tool_choice. UserError for a schema that is wrong, too large or not supported.
    """
    style, answer, tools = detect(tokenizer), wanted(format), chosen(tools, choice)
    after, thinking = begin(tokenizer, prompt)
    options: dict[str, Any] = {}
    if not tools and answer:
        kind, source = answer
        after += (FINAL,) * (style.name == "harmony")
    elif tools and (answer or choice != "auto"):
        lines = Lines(tokenizer, style, parallel)
        kind, source = "tools", lines.text(tools, answer if choice == "auto" else None)
    elif tools and style.trigger:  # the model is free until it begins a call
        kind, source = "tools", Lines(tokenizer, style, parallel, style.begin).text(tools)
        after, options = (*after, style.trigger), {"lazy": True, "repeat": parallel and not style.after}
    else:
        return None
    made = compiler(tokenizer)
    return made.start(made.compile(kind, source), after, thinking=thinking, **options)


def begin(tokenizer: Any, prompt: str) -> tuple[tuple[str, ...], Thinking | None]:
    """What has to pass before an answer to `prompt` begins: the end of its thinking, or of what the model may think."""
    tags = reasoning.tags(tokenizer)
    if tags and reasoning.is_open(prompt, tags):
        return (re.escape(tags.end),), None
    token = tokenizer.backend.token_to_id(tags.begin) if tags else None
    if not tags or token is None or prompt.rstrip().endswith(tags.end):  # the last: the template has closed it
        return (), None
    return (), Thinking(token, re.escape(tags.end))


def budgeted(tokenizer: Any, prompt: str, most: int, constraint: Constraint | None) -> Constraint | None:
    """The constraint of an answer whose thinking has at most so many tokens; the one given if none is to come."""
    tags = ANALYSIS if detect(tokenizer).name == "harmony" else reasoning.tags(tokenizer)
    if not tags or prompt.rstrip().endswith(tags.end):
        return constraint
    return Budget(tokenizer, *tags, most, opened=reasoning.is_open(prompt, tags), then=constraint)


def wanted(format: dict[str, Any] | None) -> tuple[str, Any] | None:
    """A response_format as kind and source of a grammar; None: text."""
    match format or {"type": "text"}:
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return "json_schema", {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": schema}} | {"type": "json_schema", "schema": schema}:
            return "json_schema", schema
        case {"type": "regex", "regex": str(regex)}:
            return "regex", regex
        case {"type": "lark", "grammar": str(lark)}:
            return "lark", lark
    shape = '{"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}'
    kind = format.get("type") if isinstance(format, dict) else None
    found = f"type {kind!r}" if isinstance(kind, str) else "no type"
    raise UserError(f"[response_format] found {found} or not its fields", f"Wanted {shape}, json_object or text.")


def chosen(tools: Tools | None, choice: Any) -> Tools:
    """The tools that an answer may call."""
    if choice == "none" or (choice == "auto" and not tools):
        return []
    if choice not in ("auto", "required") and not isinstance(choice, dict):
        raise UserError(f"[tool_choice] found {choice!r}", 'Wanted "none", "auto", "required" or a function.')
    if not tools:
        raise UserError("[tool_choice] there are no tools to choose from", "Give `tools`, or leave tool_choice out.")
    if isinstance(choice, str):
        return tools
    name = (choice.get("function") or choice).get("name")
    found = [tool for tool in tools if tool["function"]["name"] == name]
    if not found:
        raise UserError(f"[tool_choice] no tool is named {name!r}", "Name one of `tools`.")
    return found


class Lines:
    """Writes the Lark grammar of tool calls. passed: the mark that the model has already written."""

    def __init__(self, tokenizer: Any, style: Format, parallel: bool, passed: str = ""):
        self.style, self.parallel, self.passed = style, parallel and style.name != "harmony", passed
        self.special = {t.content: id for id, t in tokenizer.added.items() if t.special}
        self.lines: list[str] = []

    def text(self, tools: Tools, answer: tuple[str, Any] | None = None) -> str:
        """One call or more; or else `answer`, a JSON schema."""
        style, first = self.style, ""
        if style.name == "harmony" and not self.passed:
            first = f"({self.say('<|channel|>analysis<|message|>')} /(?s:.*)/ {self.say('<|end|><|start|>assistant')})?"
        several = self.parallel and not (self.passed and not style.after)
        more = f"({self.say(style.between)} call)*" if several else ""
        calls = " | ".join([self.call(i, tool["function"]) for i, tool in enumerate(tools)])
        start = f"{first} {self.say(style.before)} call {more} {self.say(style.after)}"
        if answer:
            if answer[0] != "json_schema":
                raise UserError(f"[response_format] {answer[0]} does not go with tools", "Leave one of them out.")
            final = self.say("<|channel|>final<|message|>") if first else ""
            start += f" | {first} {final} {value(answer[1])}"
        return "\n".join([f"start: {start}", f"call: {calls}", *self.lines])

    def call(self, i: int, function: dict[str, Any]) -> str:
        """The name of the rule of one function's call."""
        name, schema = function["name"], {"type": "object"} | (function.get("parameters") or {})
        lenient = not function.get("strict")
        if self.style.style == "tagged":
            keys = enumerate(properties(schema))
            arguments = " ".join(self.parameter(f"call{i}_{j}", key, schema) for j, key in keys)
        else:
            arguments = value(schema, lenient)
        self.lines.append(f"call{i}: {self.opening(name)} {arguments} {self.say(self.style.close)}")
        return f"call{i}"

    def opening(self, name: str) -> str:
        if self.style.name == "harmony" and self.passed:
            channel, json, message = map(self.say, ("<|channel|>", "<|constrain|>", "<|message|>"))
            return f'{quoted(name)} ({channel} "commentary")? (" " {json}? "json" | {json} "json")? {message}'
        return self.say(self.style.open.replace("{}", name))

    def parameter(self, rule: str, key: str, schema: dict[str, Any]) -> str:
        """<parameter=KEY>: a string as it is, up to the tag that ends it; anything else as JSON."""
        kind, required = properties(schema)[key], schema.get("required")
        kind = kind if isinstance(kind, dict) else {}
        if kind.get("type") == "string" and "enum" not in kind:
            most = f"{{0,{kind['maxLength']}}}" if isinstance(kind.get("maxLength"), int) else "*"
            self.lines.append(f"{rule}_text[lazy]: /(?s:.{most})\\n<\\/parameter>\\n/")
            body = f"{rule}_text"
        else:
            body = value({"$defs": schema.get("$defs", {})} | kind, True) + ' "\\n</parameter>\\n"'
        self.lines.append(f'{rule}: {quoted(f"<parameter={key}>")} "\\n" {body}')
        return rule if isinstance(required, list) and key in required else f"{rule}?"

    def say(self, text: str) -> str:
        """Text with special tokens in it, as Lark."""
        text = text.removeprefix(self.passed)
        marks = [mark for mark in self.special if mark in text]
        parts = re.split("(" + "|".join(map(re.escape, marks)) + ")", text) if marks else [text]
        return " ".join(f"<[{self.special[p]}]>" if p in self.special else quoted(p) for p in parts if p)


def value(schema: Any, lenient: bool = False) -> str:
    """JSON inside Lark."""
    return f"%json {bounded(schema, lenient)}"

"""The prompt of a conversation: what the model's chat template makes of its messages.

A template that would refuse them, or leave a system message out, gets them in another way.
"""

import json
from collections.abc import Callable
from typing import Any

from ..engine.errors import UserError
from .messages import Message, Messages


def render(tokenizer: Any, messages: Messages, tools: Messages | None = None, **variables: Any) -> str:
    """The prompt of a conversation. What the template refuses, or would leave out, is put in another way: REPAIRS."""
    try:
        return repaired(tokenizer, messages, tools, variables)
    except RecursionError:
        raise UserError("[messages] nested too deeply", "Make arguments and schemas flatter.") from None


def repaired(tokenizer: Any, messages: Messages, tools: Messages | None, variables: dict[str, Any]) -> str:
    template = str(tokenizer.template)
    told = [fitted(message, template) for message in messages]
    keys = ("name", "description", "parameters")
    tools = [{"type": "function", "function": {k: tool["function"][k] for k in keys}} for tool in tools or ()] or None
    if "xml_tools" in template:  # SmolLM 3's name for them
        variables, tools = {"xml_tools": tools, **variables}, None
    if "tools" not in template:
        told, tools = taught(told, tools), None
    if "tool_calls[0]" in template:
        told = one_call_each(told)
    prompt, refused = "", None
    for repair in (list, *REPAIRS):
        told = repair(told)
        try:
            prompt = tokenizer.apply_chat_template(told, tools=tools, **variables)
        except UserError as error:
            refused = refused or error
            continue
        if all(m["content"].strip() in prompt for m in told if m["role"] in ("system", "developer")):
            return prompt
    if refused and not prompt:
        raise refused
    return prompt


def fitted(message: Message, template: str) -> Message:
    """A message with the names that this template has for its parts."""
    new = dict(message)
    if new["role"] == "developer" and "developer" not in template:
        new["role"] = "system"
    if ".thinking" in template and "reasoning_content" in new:  # gpt-oss
        new["thinking"] = new.pop("reasoning_content")
    return new


def later_system(messages: Messages) -> Messages:
    """System messages at the beginning become one, later ones the user's."""
    start = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))
    rules = "\n\n".join(m["content"] for m in messages[:start])
    return [m | {"content": rules} for m in messages[: min(start, 1)]] + without_system(messages[start:])


def short_ids(messages: Messages) -> Messages:
    """Mistral's ids of calls have nine letters or digits."""
    ids: dict[Any, str] = {}

    def short(id: Any) -> str:
        return ids.setdefault(id, f"{len(ids):09d}")

    return [
        m
        | ({"tool_calls": [c | {"id": short(c["id"])} for c in m["tool_calls"]]} if "tool_calls" in m else {})
        | ({"tool_call_id": short(m["tool_call_id"])} if "tool_call_id" in m else {})
        for m in messages
    ]


def alternating(messages: Messages) -> Messages:
    """Neighbours of the same role become one."""
    told: Messages = []
    for m in messages:
        if told and m["role"] == told[-1]["role"] in ("user", "assistant") and "tool_calls" not in told[-1]:
            told[-1] = told[-1] | m | {"content": f"{told[-1]['content']}\n\n{m['content']}".strip()}
        else:
            told.append(m)
    return told


def without_system(messages: Messages) -> Messages:
    """The user says what the system would."""
    return [m | {"role": "user"} if m["role"] in ("system", "developer") else m for m in messages]


def spelled_arguments(messages: Messages) -> Messages:
    """Arguments as JSON text."""

    def spelled(call: Message) -> Message:
        function = call["function"]
        return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [m | {"tool_calls": [spelled(c) for c in m["tool_calls"]]} if "tool_calls" in m else m for m in messages]


def without_thoughts(messages: Messages) -> Messages:
    """What was thought in earlier turns is left out."""
    return [{k: v for k, v in m.items() if k not in ("reasoning_content", "thinking")} for m in messages]


def one_call_each(messages: Messages) -> Messages:
    """For a template that reads only the first call of a message: each call is followed by its own result."""
    told: Messages = []
    results = {m["tool_call_id"]: m for m in messages if m["role"] == "tool"}
    for m in messages:
        if len(m.get("tool_calls", ())) < 2:
            told += [m] if m["role"] != "tool" or m["tool_call_id"] in results else []
            continue
        for i, call in enumerate(m["tool_calls"]):
            told.append({**m, "tool_calls": [call], "content": "" if i else m["content"]})
            told += [results.pop(call["id"])] if call["id"] in results else []
    return told


# One after another, until the template takes the messages and leaves out no system message.
REPAIRS: tuple[Callable[[Messages], Messages], ...] = (
    later_system, short_ids, alternating, without_system, alternating, spelled_arguments, without_thoughts,
)  # fmt: skip
TEACH = """You can call functions. Their signatures are JSON schemas between these tags:
<tools>{}</tools>
To call one or more, answer with a JSON list between tags, and nothing else:
<tool_call>[{{"name": "function", "arguments": {{"argument": "value"}}}}]</tool_call>
If no function helps, answer as usual."""


def taught(messages: Messages, tools: Messages | None) -> Messages:
    """For a template that knows no tools: they are told in the system message, calls and results are text."""
    told = []
    for m in messages:
        if m["role"] == "tool":
            m = {"role": "user", "content": f"<tool_response>{m['content']}</tool_response>"}
        elif made := m.get("tool_calls"):
            text = json.dumps([call["function"] for call in made], ensure_ascii=False)
            m = {"role": "assistant", "content": f"{m['content']}<tool_call>{text}</tool_call>"}
        told.append(m)
    if not tools:
        return told
    rules = TEACH.format(json.dumps([tool["function"] for tool in tools], ensure_ascii=False))
    first = told[0]["role"] in ("system", "developer") if told else False
    said = f"{told[0]['content']}\n\n{rules}" if first else rules
    return [{"role": "system", "content": said}, *told[first:]]

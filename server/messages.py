"""Messages and tools of the three APIs to what chat templates want.

Template messages: {"role": system | developer | user | assistant | tool, "content": text}, an assistant's also with
"reasoning_content" and "tool_calls" (arguments as objects), a tool's with "tool_call_id" and "name".
"""

import json
import re
from typing import Any

from ..engine.errors import UserError

Messages = list[dict[str, Any]]
Message = dict[str, Any]
TEXT = ("text", "input_text", "output_text", "refusal")
ROLES = ("system", "developer", "user", "assistant", "tool")
BILLING = "x-anthropic-billing-header:"  # Claude Code's first system block; its hash would make every prompt another


# -- OpenAI chat -----------------------------------------------------------------------------------------------------


def chat(messages: Messages) -> Messages:
    """OpenAI's chat messages."""
    told, names = [], dict[Any, str]()
    for i, message in enumerate(messages):
        where, role = f"messages[{i}]", message.get("role")
        if role not in (*ROLES, "function"):
            raise UserError(f"{where}.role: found {role!r}", f"Wanted one of {', '.join(ROLES)}.")
        new = {"role": role, "content": content(message.get("content"), f"{where}.content")}
        if role == "assistant":
            new |= thoughts(message.get("reasoning_content") or message.get("reasoning"))
            new |= calls(message.get("tool_calls"), f"{where}.tool_calls", names)
        elif role in ("tool", "function"):
            id = message.get("tool_call_id")
            new |= {"role": "tool", "tool_call_id": id, "name": message.get("name") or names.get(id, "")}
        elif message.get("content") is None:
            raise UserError(f"{where}.content: missing", "Wanted a string, or a list of text parts.")
        told.append(new)
    return told


def content(value: Any, where: str) -> str:
    """A string, or the texts of a list of parts."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise UserError(f"{where}: found a {type(value).__name__}", "Wanted a string, or a list of text parts.")
    return "".join(part(item, f"{where}[{i}]") for i, item in enumerate(value))


def part(item: Any, where: str) -> str:
    kind = item.get("type") if isinstance(item, dict) else type(item).__name__
    if kind not in TEXT:
        raise UserError(f"{where}: {kind} is not supported", "This model reads text; send text parts only.")
    text = item.get("text", item.get("refusal"))
    if not isinstance(text, str):
        raise UserError(f"{where}.text: found a {type(text).__name__}, wanted a string")
    return text


def thoughts(text: Any) -> Message:
    return {"reasoning_content": text} if isinstance(text, str) and text else {}


def calls(found: Any, where: str, names: dict[Any, str]) -> Message:
    """An assistant's calls; `names` learns the name of each by its id."""
    if not found:
        return {}
    if not isinstance(found, list):
        raise UserError(f"{where}: found a {type(found).__name__}, wanted a list")
    made = []
    for i, call in enumerate(found):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}[{i}]: wanted a function with a name", CALL)
        made.append(called(call.get("id"), function["name"], function.get("arguments")))
        names[call.get("id")] = function["name"]
    return {"tool_calls": made}


CALL = 'As {"id": …, "type": "function", "function": {"name": …, "arguments": "{…}"}}.'


def called(id: Any, name: str, arguments: Any) -> Message:
    """A call as templates want it. Arguments that are no JSON stay the string that they are."""
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments or {}
    except (ValueError, RecursionError):
        value = arguments
    return {"id": id, "type": "function", "function": {"name": name, "arguments": value}}


# -- Anthropic messages ----------------------------------------------------------------------------------------------


def anthropic(messages: Messages, system: Any = None) -> Messages:
    """Anthropic's messages: tool results come in user messages and become messages of their own."""
    names: dict[Any, str] = {}
    told = turn("system", blocks(system, "system"), "system", names) if system else []
    for i, message in enumerate(messages):
        where, role = f"messages[{i}]", message.get("role")
        if role not in ("system", "user", "assistant"):
            raise UserError(f"{where}.role: found {role!r}", "Wanted user or assistant.")
        told += turn(role, blocks(message.get("content"), f"{where}.content"), f"{where}.content", names)
    return told


def blocks(value: Any, where: str) -> list[Any]:
    if not isinstance(value, str | list):
        raise UserError(f"{where}: found a {type(value).__name__}", "Wanted a string, or a list of blocks.")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def turn(role: str, blocks: list[Any], where: str, names: dict[Any, str]) -> Messages:
    """The messages that one of Anthropic's makes: results first, then what is said."""
    results: Messages = []
    said: Message = {"role": role}
    texts = []
    for j, block in enumerate(blocks):
        match block:
            case {"type": "tool_use", "id": id, "name": str(name)}:
                said.setdefault("tool_calls", []).append(called(id, name, block.get("input")))
                names[id] = name
            case {"type": "tool_result", "tool_use_id": id}:
                text = content(block.get("content"), f"{where}[{j}].content")
                results.append({"role": "tool", "content": text, "tool_call_id": id, "name": names.get(id, "")})
            case {"type": "thinking", "thinking": str(text)}:
                said["reasoning_content"] = said.get("reasoning_content", "") + text
            case {"type": "redacted_thinking"}:
                pass
            case _:
                texts.append(part(block, f"{where}[{j}]"))
    if role == "system":
        texts = ["\n\n".join(text for text in texts if not text.startswith(BILLING))]
    said["content"] = "".join(texts)
    return results + [said] * (not results or bool(texts))


# -- OpenAI responses ------------------------------------------------------------------------------------------------


def responses(input: str | list[Any], instructions: str | None = None) -> Messages:
    """The items of OpenAI's Responses: reasoning and calls become parts of the assistant's message."""
    told: Messages = [{"role": "system", "content": instructions}] if instructions else []
    names: dict[Any, str] = {}
    thought: Message = {}
    for i, item in enumerate([{"role": "user", "content": input}] if isinstance(input, str) else input):
        where = f"input[{i}]"
        match item:
            case {"type": "reasoning"}:
                parts = [*(item.get("content") or ()), *(item.get("summary") or ())]
                thought = thoughts("".join(str(part.get("text", "")) for part in parts if isinstance(part, dict)))
            case {"type": "function_call", "call_id": id, "name": str(name)}:
                if not told or told[-1]["role"] != "assistant":
                    told.append({"role": "assistant", "content": "", **thought})
                told[-1].setdefault("tool_calls", []).append(called(id, name, item.get("arguments")))
                names[id], thought = name, {}
            case {"type": "function_call_output", "call_id": id}:
                text = content(item.get("output"), f"{where}.output")
                told.append({"role": "tool", "content": text, "tool_call_id": id, "name": names.get(id, "")})
            case {"role": str(role)} if item.get("type", "message") == "message" and role in ROLES:
                told.append({"role": role, "content": content(item.get("content"), f"{where}.content")})
                if role == "assistant":
                    told[-1] |= thought
                    thought = {}
            case _:
                what = f"type {item.get('type')!r}, role {item.get('role')!r}" if isinstance(item, dict) else "it"
                raise UserError(f"{where}: {what} is not supported", "Wanted messages, function calls and outputs.")
    return told


# -- tools -----------------------------------------------------------------------------------------------------------


def tools_chat(tools: list[Any]) -> Messages:
    """OpenAI's tools, checked."""
    return [tool(found.get("function"), f"tools[{i}].function") for i, found in known(tools, ("function",))]


def tools_anthropic(tools: list[Any]) -> Messages:
    """Anthropic's own tools; those that its servers run are refused."""
    found = known(tools, (None, "custom"))
    return [tool({**row, "parameters": row.get("input_schema")}, f"tools[{i}]") for i, row in found]


def tools_responses(tools: list[Any]) -> Messages:
    """The functions; what a provider would run itself (web_search, …) is left out, as Codex expects."""
    return [tool(row, f"tools[{i}]") for i, row in known(tools, None) if row.get("type") == "function"]


def known(tools: list[Any], kinds: tuple[Any, ...] | None) -> list[tuple[int, dict[str, Any]]]:
    for i, row in enumerate(tools):
        if not isinstance(row, dict):
            raise UserError(f"tools[{i}]: found a {type(row).__name__}, wanted an object")
        if kinds and row.get("type") not in kinds:
            raise UserError(f"tools[{i}].type: {row.get('type')!r} is not supported", "Give functions of your own.")
    return list(enumerate(tools))


def tool(found: Any, where: str) -> Message:
    """A function as templates want it."""
    row = found if isinstance(found, dict) else {}
    name, schema = row.get("name"), row.get("parameters")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,128}", name, re.ASCII):
        raise UserError(f"{where}.name: found {name!r}", "Wanted 1 to 128 letters, digits, _, . and -.")
    if schema is not None and not isinstance(schema, dict):
        raise UserError(f"{where}.parameters: found a {type(schema).__name__}, wanted a JSON schema")
    function = {"name": name, "description": row.get("description") or "", "strict": bool(row.get("strict"))}
    return {"type": "function", "function": function | {"parameters": schema or {"type": "object", "properties": {}}}}

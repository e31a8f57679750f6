"""Scripted answers through the four APIs: what a model says becomes events and objects of the published shapes."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from lazulite.engine.generate import Finish, Token
from lazulite.server import generation
from lazulite.server.anthropic import MessagesRequest, MessagesWriter
from lazulite.server.app import create_app
from lazulite.server.chat import ChatRequest, ChatWriter
from lazulite.server.generation import Event
from lazulite.server.parser import Piece
from lazulite.server.responses import ResponsesRequest, ResponsesWriter
from lazulite.server.service import Service

HI = [{"role": "user", "content": "Hi"}]
SAID = [
    Piece("reasoning", "Let me "), Piece("reasoning", "think."), Piece("text", "I look "), Piece("text", "it up."),
    Piece("call", "find", 0), Piece("arguments", '{"q": "é', 0), Piece("arguments", '"}', 0),
    Piece("call", "now", 1), Piece("arguments", "{}", 1),
]  # fmt: skip
APIS: list[Any] = [
    (ChatRequest, ChatWriter, {"messages": HI}, ChatCompletion, ChatCompletionChunk),
    (ResponsesRequest, ResponsesWriter, {"input": "Hi"}, Response, ResponseStreamEvent),
    (MessagesRequest, MessagesWriter, {"messages": HI, "max_tokens": 50}, Message, RawMessageStreamEvent),
]


def told(service: Service, request: Any, writer: Any, body: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The whole and the events of what the model said."""
    usage: Callable[[], tuple[int, ...]] = lambda: (12, 0, 9, 2)  # noqa: E731
    made = SimpleNamespace(choices=[SimpleNamespace(matched=None)], usage=usage, prompt_tokens=12)
    events = [Event(0, [piece], Token(5, -0.5)) for piece in SAID] + [Event(0, [], None, "tool_calls")]
    whole, streamed = (writer(request.model_validate(body), made, service) for _ in range(2))
    for event in events:
        whole.take(event)
    text = streamed.begin() + "".join(map(streamed.event, events)) + streamed.ping() + streamed.end()
    data = [event.partition("data: ")[2] for event in text.split("\n\n") if "data: " in event]
    return whole.whole(), [json.loads(event) for event in data if event != "[DONE]"]


@pytest.mark.parametrize(("request_", "writer", "body", "whole", "part"), APIS, ids=["chat", "responses", "messages"])
def test_thinking_and_calls_have_the_published_shapes(
    service: Service, request_: Any, writer: Any, body: dict[str, Any], whole: Any, part: Any
) -> None:
    answer, events = told(service, request_, writer, body)
    TypeAdapter(whole).validate_json(json.dumps(answer), strict=True)
    for event in events:
        if event.get("type") != "ping":  # the SDK drops pings before its types
            TypeAdapter(part).validate_json(json.dumps(event), strict=True)


def test_chat_tells_reasoning_by_both_names_and_calls_as_deltas(service: Service) -> None:
    answer, events = told(service, *APIS[0][:3])
    message = answer["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "Let me think."
    assert message["content"] == "I look it up."
    functions = [call["function"] for call in message["tool_calls"]]
    assert functions == [{"name": "find", "arguments": '{"q": "é"}'}, {"name": "now", "arguments": "{}"}]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(d.get("reasoning", "") for d in deltas) == "".join(d.get("reasoning_content", "") for d in deltas)
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert ["id" in call for call in calls] == [True, False, False, True, False]
    assert "".join(call["function"]["arguments"] for call in calls if call["index"] == 0) == '{"q": "é"}'
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert events[-1]["choices"][0]["finish_reason"] == answer["choices"][0]["finish_reason"] == "tool_calls"


def test_responses_tell_items_one_after_another(service: Service) -> None:
    answer, events = told(service, *APIS[1][:3])
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == [item["type"] for item in events[-1]["response"]["output"]]
    assert done[2]["arguments"] == '{"q": "é"}' and done[1]["content"][0]["text"] == "I look it up."
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"] and kinds[-1] == "completed"
    assert kinds.count("output_item.added") == kinds.count("output_item.done") == 4


def test_messages_tell_blocks_one_after_another(service: Service) -> None:
    answer, events = told(service, *APIS[2][:3])
    assert [block["type"] for block in answer["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert answer["content"][2]["input"] == {"q": "é"} and answer["stop_reason"] == "tool_use"
    starts = [event["index"] for event in events if event["type"] == "content_block_start"]
    stops = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert starts == stops == [0, 1, 2, 3] and events[-1] == {"type": "message_stop"}


class Slow:
    """A scheduler whose engine takes its time, and then says this."""

    max_context, alive = 512, True

    def __init__(self, *said: Any) -> None:
        self.said = said

    def submit_all(self, requests: list[Any]) -> list[Any]:
        def answer() -> None:
            time.sleep(0.5)
            for event in self.said:
                requests[0].emit(event)

        threading.Thread(target=answer).start()
        return requests

    def cancel(self, ticket: Any) -> None:
        pass


async def ask(service: Service, path: str, body: dict[str, Any]) -> httpx.Response:
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
        return await client.post(path, json=body)


PINGS = [("/v1/chat/completions", ": ping"), ("/v1/messages", "event: ping"), ("/v1/responses", "response.in_progress")]


@pytest.mark.parametrize(("path", "ping"), PINGS)
def test_silence_is_filled_with_pings(
    service: Service, monkeypatch: pytest.MonkeyPatch, path: str, ping: str
) -> None:
    monkeypatch.setattr(generation, "SILENCE", 0.1)
    slow = Service(service.model, service.tokenizer, Slow(Finish("length")), ["slow"])
    body = {"input": "Hi"} if "responses" in path else {"messages": HI, "max_tokens": 5}
    assert asyncio.run(ask(slow, path, {**body, "stream": True})).text.count(ping) >= 3


def test_what_came_before_a_failure_is_told(service: Service) -> None:
    words = [Token(id, -1.0) for id in service.tokenizer.encode("One two three")]
    slow = Service(service.model, service.tokenizer, Slow(*words, Finish("timeout")), ["slow"])
    text = asyncio.run(ask(slow, "/v1/chat/completions", {"messages": HI, "stream": True})).text
    *told, failure, done = [event.removeprefix("data: ") for event in text.strip().split("\n\n")]
    assert "".join(json.loads(event)["choices"][0]["delta"]["content"] for event in told) == "One two three"
    assert json.loads(failure)["error"]["code"] == "timeout" and done == "[DONE]"


CODEX = {  # what Codex CLI sends, shortened
    "model": "tiny", "instructions": "You are a coding agent.", "stream": False, "store": False, "max_output_tokens": 4,
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be careful."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List files."}]},
        {"type": "reasoning", "summary": [], "encrypted_content": "x"},
        {"type": "function_call", "name": "shell", "arguments": '{"command": "ls"}', "call_id": "call_1"},
        {"type": "function_call_output", "call_id": "call_1", "output": "a.txt"},
    ],
    "tools": [
        {"type": "function", "name": "shell", "strict": False, "parameters": {"type": "object", "properties": {}}},
        {"type": "web_search"}, {"type": "namespace", "name": "mcp", "tools": []},
    ],
    "tool_choice": "auto", "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"},
    "include": ["reasoning.encrypted_content"], "prompt_cache_key": "x", "client_metadata": {"a": "b"},
}  # fmt: skip
CLAUDE = {  # what Claude Code sends, shortened
    "model": "tiny", "max_tokens": 32_000, "stream": False, "metadata": {"user_id": "x"},
    "system": [{"type": "text", "text": "x-anthropic-billing-header: cch=123;"},
               {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "List files.", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": ""},
            {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "a.txt"}]},
        {"role": "system", "content": "Remember the rules."},
    ],
    "tools": [{"name": "Bash", "description": "Runs.", "input_schema": {"type": "object", "properties": {}}}],
    "thinking": {"type": "adaptive"}, "output_config": {"effort": "medium"}, "context_management": {"edits": []},
}  # fmt: skip


@pytest.mark.parametrize(("path", "body"), [("/v1/responses", CODEX), ("/v1/messages?beta=true", CLAUDE)])
def test_agents_are_understood(service: Service, path: str, body: dict[str, Any]) -> None:
    answer = asyncio.run(ask(service, path, body))
    assert answer.status_code == 200, answer.text

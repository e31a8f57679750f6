"""POST /v1/messages and its count_tokens. Source: Anthropic's API reference and the types of its Python SDK."""

import json
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import Field

from . import messages, schemas
from .chat import check_choice
from .errors import ApiError
from .generation import Event, Generation
from .schemas import Body, Count, Name, Probability, Refused, Stop, Text
from .service import Job, Service, blamed
from .stream import named

STOPPED = {"length": "max_tokens", "tool_calls": "tool_use"}  # finish_reason: stop_reason


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None

    def openai(self) -> str | dict[str, Any]:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: Text | None = None


class OutputConfig(Body):
    effort: schemas.Effort | None = None
    format: schemas.Format | None = None


class CountRequest(Body):
    """What makes the prompt."""

    model: Name | None = None
    messages: schemas.Messages
    system: Text | list[dict[str, Any]] | None = None
    tools: schemas.Tools | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: schemas.Format | None = None  # the beta's name of output_config.format
    mcp_servers: Refused = None

    def job(self) -> Job:
        with blamed("tools"):
            tools = messages.tools_anthropic(self.tools) if self.tools else None
        with blamed("messages"):
            told = messages.anthropic(self.messages, self.system)
        choice = self.tool_choice or ToolChoice(type="auto")
        budget = self.thinking.budget_tokens if self.thinking and self.thinking.type == "enabled" else None
        check_choice(choice.openai(), tools)
        return Job(
            self.model, {}, told, tools=tools, choice=choice.openai(), variables=self.variables(),
            parallel=not choice.disable_parallel_tool_use, format=self.format(), fit=True, budget=budget,
        )  # fmt: skip

    def format(self) -> dict[str, Any] | None:
        """The format as chat spells it."""
        given = self.output_format or (self.output_config and self.output_config.format)
        if not given or given.get("type") != "json_schema":
            return given or None
        return {"type": "json_schema", "json_schema": {"name": "output", "schema": given.get("schema"), "strict": True}}

    def variables(self) -> dict[str, Any]:
        effort = self.output_config.effort if self.output_config else None
        found: dict[str, Any] = {"reasoning_effort": effort} if effort else {}
        if self.thinking and self.thinking.type != "adaptive":
            found["enable_thinking"] = self.thinking.type == "enabled"
        return found


class MessagesRequest(CountRequest):
    max_tokens: Count
    stream: bool | None = None
    stop_sequences: Stop | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    context_management: dict[str, Any] | None = None  # nothing is cleared: the client's own edits stand
    container: Refused = None

    def job(self) -> Job:
        job = super().job()
        job.sampling, job.max_tokens = schemas.sampling(self), self.max_tokens
        if self.stop_sequences:
            job.sampling["stop"] = tuple(self.stop_sequences)
        return job


class MessagesWriter:
    """The content blocks of a message as they are made, and the events that tell of it."""

    def __init__(self, body: MessagesRequest, generation: Generation, service: Service) -> None:
        self.body, self.generation, self.service = body, generation, service
        self.id = f"msg_{uuid4().hex}"
        self.content: list[dict[str, Any]] = []
        self.arguments = ""  # of the call that is open
        self.is_open = False
        self.stop_reason: str | None = None

    def begin(self) -> str:
        usage = {"input_tokens": self.generation.prompt_tokens, "output_tokens": 0}
        return named("message_start", {"type": "message_start", "message": {**self.message(), "usage": usage}})

    def ping(self) -> str:
        return named("ping", {"type": "ping"})

    def event(self, event: Event) -> str:
        if event.reason:
            stopped = "stop_sequence" if self.generation.choices[0].matched else "end_turn"
            self.stop_reason = STOPPED.get(event.reason, stopped)
        return "".join(map(self.piece, event.pieces))

    def end(self) -> str:
        closed = self.close()
        last = {k: self.message()[k] for k in ("stop_reason", "stop_sequence")}
        told = {"type": "message_delta", "delta": last, "usage": usage(self.generation)}
        return closed + named("message_delta", told) + named("message_stop", {"type": "message_stop"})

    def failed(self, error: ApiError) -> str:
        return named("error", error.anthropic(self.id))

    take = event

    def whole(self) -> dict[str, Any]:
        self.end()
        return self.message()

    def piece(self, piece: Any) -> str:
        kind, begun = KINDS[piece.kind], ""
        if piece.kind == "call" or not self.is_open or self.content[-1]["type"] != kind:
            begun = self.close() + self.open(kind, piece.text)
        return begun if piece.kind == "call" else begun + self.grow(kind, piece.text)

    def open(self, kind: str, name: str) -> str:
        block: dict[str, Any] = {"type": kind, **EMPTY[kind]}
        if kind == "tool_use":
            block |= {"id": f"toolu_{uuid4().hex[:24]}", "name": name}
        self.content.append(block)
        self.is_open, self.arguments = True, ""
        return self.tell("content_block_start", content_block=block)

    def grow(self, kind: str, text: str) -> str:
        if kind == "tool_use":
            self.arguments += text
            return self.tell("content_block_delta", delta={"type": "input_json_delta", "partial_json": text})
        self.content[-1][kind] += text
        return self.tell("content_block_delta", delta={"type": f"{kind}_delta", kind: text})

    def close(self) -> str:
        if not self.is_open:
            return ""
        self.is_open, signed = False, ""
        if self.content[-1]["type"] == "tool_use":
            self.content[-1] = called(self.content[-1], self.arguments)
        elif self.content[-1]["type"] == "thinking":
            signed = self.tell("content_block_delta", delta={"type": "signature_delta", "signature": ""})
        return signed + self.tell("content_block_stop")

    def tell(self, event: str, **fields: Any) -> str:
        return named(event, {"type": event, "index": len(self.content) - 1, **fields})

    def message(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.body.model or self.service.names[0],
            "content": self.content,
            "stop_reason": self.stop_reason,
            "stop_sequence": self.generation.choices[0].matched,
            "usage": usage(self.generation),
        }


KINDS = {"text": "text", "reasoning": "thinking", "call": "tool_use", "arguments": "tool_use"}
EMPTY: dict[str, dict[str, Any]] = {
    "text": {"text": ""},
    "thinking": {"thinking": "", "signature": ""},
    "tool_use": {"input": {}},
}


def called(block: dict[str, Any], arguments: str) -> dict[str, Any]:
    """A whole call has an object as its input; one that max_tokens cut short is shown as the text it is."""
    try:
        return {**block, "input": json.loads(arguments or "{}")}
    except ValueError:
        return {"type": "text", "text": f"{block['name']}({arguments}"}


def usage(generation: Generation) -> dict[str, Any]:
    prompt, cached, answer, _ = generation.usage()
    fresh = {"input_tokens": prompt - cached, "output_tokens": answer}
    return {**fresh, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached}

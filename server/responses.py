"""POST /v1/responses: every request brings its whole conversation. Source: OpenAI's OpenAPI document."""

from time import time
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import Field

from . import messages, schemas
from .chat import check_choice, spelled
from .errors import ApiError
from .generation import Event, Generation
from .schemas import Body, Count, Probability, Refused, Temperature, Templated, Text
from .service import Job, Service, blamed
from .stream import named

LOGPROBS = "message.output_text.logprobs"


class Reasoning(Body):
    effort: schemas.Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None  # reasoning comes whole: nothing is summed up
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(Body):
    format: schemas.Format | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(Templated):
    input: Text | schemas.Messages
    model: schemas.Name | None = None
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    text: TextFormat | None = None
    reasoning: Reasoning | None = None
    tools: schemas.Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: bool | None = None  # nothing is stored, and the answer says so
    user: Text | None = None
    prompt_cache_key: Text | None = None
    safety_identifier: Text | None = None
    background: Literal[False] | None = None
    previous_response_id: Refused = None
    conversation: Refused = None
    prompt: Refused = None
    max_tool_calls: Refused = None

    @property
    def logprobs(self) -> bool:
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())

    def job(self) -> Job:
        with blamed("tools"):
            tools = messages.tools_responses(self.tools) if self.tools else None
        with blamed("input"):
            told = messages.responses(self.input, self.instructions)
        sampling = schemas.sampling(self)
        if self.logprobs:
            sampling["top_logprobs"] = self.top_logprobs or 0
        if self.reasoning and self.reasoning.effort:
            self.reasoning_effort = self.reasoning.effort
        choice = "auto" if self.tool_choice is None else self.tool_choice
        if isinstance(choice, dict) and "name" in choice:  # flat here, nested in chat
            choice = {"type": "function", "function": {"name": choice["name"]}}
        check_choice(choice, tools)
        return Job(
            self.model, sampling, told, tools=tools, choice=choice, parallel=self.parallel_tool_calls is not False,
            format=self.format(), variables=self.variables(), max_tokens=self.max_output_tokens,
            limit="max_output_tokens",
        )  # fmt: skip

    def format(self) -> dict[str, Any] | None:
        """text.format as chat spells it."""
        given = self.text.format if self.text else None
        if not given or given.get("type") != "json_schema":
            return given
        return {"type": "json_schema", "json_schema": {k: v for k, v in given.items() if k != "type"}}


class ResponsesWriter:
    """The items of a response as they are made, and the events that tell of it."""

    def __init__(self, body: ResponsesRequest, generation: Generation, service: Service) -> None:
        self.body, self.generation, self.service = body, generation, service
        self.id, self.created, self.number = f"resp_{uuid4().hex}", time(), -1
        self.output: list[dict[str, Any]] = []
        self.item: dict[str, Any] | None = None  # the one that is open
        self.logprobs: list[dict[str, Any]] = []  # of tokens whose text is held back
        self.status, self.reason = "in_progress", ""

    # -- events

    def begin(self) -> str:
        return self.tell("response.created", response=self.response()) + self.ping()

    def ping(self) -> str:
        """Codex counts only events that it knows as signs of life."""
        return self.tell("response.in_progress", response=self.response())

    def event(self, event: Event) -> str:
        if self.body.logprobs and event.token is not None:
            self.logprobs += spelled(self.service.tokenizer, [event.token])["content"]
        self.reason = event.reason or self.reason
        return "".join(map(self.piece, event.pieces))

    def end(self) -> str:
        """Closes what is open; said once, also before `response()` is asked for the whole."""
        closed = self.close()
        if not self.output and self.reason:
            closed = self.open("text", "") + self.close()  # an empty answer is a message too
        self.status = "incomplete" if self.reason == "length" else "completed"
        return closed + self.tell(f"response.{self.status}", response=self.response())

    def failed(self, error: ApiError) -> str:
        self.status = "failed"
        return self.tell("response.failed", response={**self.response(), "error": said(error)})

    take = event

    def whole(self) -> dict[str, Any]:
        self.end()
        return self.response()

    def tell(self, event: str, **fields: Any) -> str:
        self.number += 1
        return named(event, {"type": event, "sequence_number": self.number, **fields})

    # -- items

    def piece(self, piece: Any) -> str:
        kind = KINDS[piece.kind]
        begun = ""
        if piece.kind == "call" or self.item is None or self.item["type"] != kind:
            begun = self.close() + self.open(piece.kind, piece.text)
        return begun if piece.kind == "call" else begun + self.grow(piece.text)

    def open(self, kind: str, name: str) -> str:
        self.item = NEW[kind](uuid4().hex[:24], name)
        self.output.append(self.item)
        opened = self.tell("response.output_item.added", output_index=self.at, item=self.item | EMPTY.get(kind, {}))
        if kind == "text":
            opened += self.tell("response.content_part.added", **self.place, part=self.item["content"][0])
        return opened

    def grow(self, text: str) -> str:
        assert self.item is not None
        if self.item["type"] == "function_call":
            self.item["arguments"] += text
            return self.tell("response.function_call_arguments.delta", **self.where, delta=text)
        part = self.item["content"][0]
        part["text"] += text
        if self.item["type"] == "reasoning":
            return self.tell("response.reasoning_text.delta", **self.place, delta=text)
        logprobs, self.logprobs = self.logprobs, []
        part["logprobs"] += logprobs
        return self.tell("response.output_text.delta", **self.place, delta=text, logprobs=logprobs)

    def close(self) -> str:
        if (item := self.item) is None:
            return ""
        item["status"] = "incomplete" if self.reason == "length" else "completed"
        if item["type"] == "function_call":
            given = {"name": item["name"], "arguments": item["arguments"]}
            closed = self.tell("response.function_call_arguments.done", **self.where, **given)
        elif item["type"] == "reasoning":
            closed = self.tell("response.reasoning_text.done", **self.place, text=item["content"][0]["text"])
        else:
            part = item["content"][0]
            whole = {"text": part["text"], "logprobs": part["logprobs"]}
            closed = self.tell("response.output_text.done", **self.place, **whole)
            closed += self.tell("response.content_part.done", **self.place, part=part)
        closed += self.tell("response.output_item.done", output_index=self.at, item=item)
        self.item = None
        return closed

    @property
    def at(self) -> int:
        return len(self.output) - 1

    @property
    def where(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": self.at}

    @property
    def place(self) -> dict[str, Any]:
        return {**self.where, "content_index": 0}

    # -- the whole

    def response(self) -> dict[str, Any]:
        body, service = self.body, self.service
        over = self.status in ("completed", "incomplete")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": self.status,
            "model": body.model or service.names[0],
            "output": self.output if over else [],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning_effort, "summary": None},
            "store": False,
            "temperature": service.defaults["temp"] if body.temperature is None else body.temperature,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": service.defaults.get("top_p", 1.0) if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": usage(self.generation) if over else None,
        }


KINDS = {"text": "message", "reasoning": "reasoning", "call": "function_call", "arguments": "function_call"}
NEW = {  # a piece's kind: the item that it opens, from an id and a function's name
    "text": lambda id, _: {
        "id": f"msg_{id}", "type": "message", "role": "assistant", "status": "in_progress",
        "content": [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}],
    },
    "reasoning": lambda id, _: {
        "id": f"rs_{id}", "type": "reasoning", "summary": [], "status": "in_progress",
        "content": [{"type": "reasoning_text", "text": ""}],
    },
    "call": lambda id, name: {
        "id": f"fc_{id}", "type": "function_call", "call_id": f"call_{id}", "name": name, "arguments": "",
        "status": "in_progress",
    },
}  # fmt: skip
EMPTY: dict[str, dict[str, Any]] = {"text": {"content": []}, "reasoning": {"content": []}}  # when an item is added


def said(error: ApiError) -> dict[str, str]:
    """A failure in the middle of a stream; the codes are the few that the API has."""
    return {"code": "server_error" if error.status >= 500 else "invalid_prompt", "message": error.message}


def usage(generation: Generation) -> dict[str, Any]:
    prompt, cached, answer, reasoning = generation.usage()
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": answer,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + answer,
    }

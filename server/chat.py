"""POST /v1/chat/completions. Source: OpenAI's OpenAPI document; how reasoning is shown, vLLM and llama.cpp."""

from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import Field, field_validator

from ..engine.generate.scheduler import Token
from . import messages, schemas
from .choices import LEAST, ChoicesWriter
from .errors import ApiError
from .generation import Event
from .parser import Piece
from .schemas import Count, Refused, Sampled, Templated, Text
from .service import Job, blamed
from .stream import Answer, dumps


class ChatRequest(Sampled, Templated):
    messages: schemas.Messages
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: Count | None = None
    response_format: schemas.Format | None = None
    tools: schemas.Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: Text | None = None  # every request shares the prefix cache
    safety_identifier: Text | None = None
    service_tier: Literal["auto", "default"] | None = None
    verbosity: Literal["medium"] | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    audio: Refused = None
    prediction: Refused = None
    web_search_options: Refused = None
    functions: Refused = None  # tools took their place
    function_call: Refused = None
    chat_template: Refused = None  # a template is a program: only the model's own is run

    @field_validator("top_logprobs")
    @classmethod
    def asked(cls, value: Any, info: Any) -> Any:
        if value and not info.data.get("logprobs"):
            raise ValueError("top_logprobs needs logprobs: true")
        return value

    def job(self) -> Job:
        with blamed("tools"):
            tools = messages.tools_chat(self.tools) if self.tools else None
        with blamed("messages"):
            told = messages.chat(self.messages)
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        sampling = schemas.sampling(self)
        if self.logprobs:
            sampling["top_logprobs"] = self.top_logprobs or 0
        choice = "auto" if self.tool_choice is None else self.tool_choice
        check_choice(choice, tools)
        return Job(
            self.model, sampling, told, tools=tools, choice=choice, parallel=self.parallel_tool_calls is not False,
            format=self.response_format, variables=self.variables(), n=self.n or 1, max_tokens=getattr(self, limit),
            limit=limit,
        )  # fmt: skip


def check_choice(choice: Any, tools: list[dict[str, Any]] | None) -> None:
    """A choice that must be met needs a tool that is there."""
    names = {tool["function"]["name"] for tool in tools or ()}
    if isinstance(choice, str) and (choice in ("auto", "none") or names):
        return
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    if name not in names:
        raise ApiError(400, "tool_choice names no function of tools", param="tool_choice")


class ChatWriter(ChoicesWriter):
    """chat.completion.chunk events."""

    PREFIX, WHOLE, CHUNK = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self) -> str:
        role = '"delta":{"role":"assistant","content":""}'
        return "".join(self.chunk(i, role) for i in range(len(self.answers)))

    def event(self, event: Event) -> str:
        logprobs = "null"
        if self.body.logprobs and event.token is not None:
            logprobs = dumps(spelled(self.service.tokenizer, [event.token]))
        deltas = [self.delta(piece) for piece in event.pieces]
        if logprobs != "null" and not deltas:
            deltas = ['"delta":{"content":""}']
        last = len(deltas) - 1
        text = "".join(self.chunk(event.choice, d, logprobs if i == last else "null") for i, d in enumerate(deltas))
        return text + self.chunk(event.choice, '"delta":{}', reason=event.reason) if event.reason else text

    def delta(self, piece: Piece) -> str:
        text = dumps(piece.text)
        if piece.kind == "text":
            return f'"delta":{{"content":{text}}}'
        if piece.kind == "reasoning":
            return f'"delta":{{"reasoning_content":{text},"reasoning":{text}}}'
        call: dict[str, Any] = {"index": piece.index, "function": {"arguments": piece.text}}
        if piece.kind == "call":
            call |= {"id": f"call_{uuid4().hex[:24]}", "type": "function"}
            call["function"] = {"name": piece.text, "arguments": ""}
        return f'"delta":{dumps({"tool_calls": [call]})}'

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        logprobs = spelled(self.service.tokenizer, answer.tokens) if self.body.logprobs else None
        return {"message": message(answer), "logprobs": logprobs}


def spelled(tokenizer: Any, tokens: list[Token]) -> dict[str, Any]:
    """Tokens with their rivals, each as text and as bytes: a token may be part of a character."""

    def row(id: int, value: float) -> dict[str, Any]:
        piece = tokenizer.piece(id)
        return {"token": piece.decode("utf-8", "replace"), "logprob": max(value, LEAST), "bytes": list(piece)}

    rows = [{**row(token.id, token.logprob), "top_logprobs": [row(*rival) for rival in token.top]} for token in tokens]
    return {"content": rows, "refusal": None}


def message(answer: Answer) -> dict[str, Any]:
    said: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.reasoning:
        said |= {"reasoning_content": answer.reasoning, "reasoning": answer.reasoning}
    if answer.calls:
        said["content"] = answer.text or None
        said["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in answer.calls
        ]
    return said

"""The two ways an answer leaves: whole, or as server-sent events while it is made. Both stop when the client goes."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from starlette.responses import Response

from ..engine.generate.scheduler import Token
from .errors import ApiError
from .generation import Event, Generation

dumps = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


@dataclass
class Call:
    name: str
    id: str
    arguments: str = ""


@dataclass
class Answer:
    """What one choice has said so far."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    reason: str | None = None

    def add(self, event: Event) -> None:
        self.tokens += event.told
        if event.token is not None:
            self.tokens.append(event.token)
        for piece in event.pieces:
            if piece.kind == "text":
                self.text += piece.text
            elif piece.kind == "reasoning":
                self.reasoning += piece.text
            elif piece.kind == "call":
                self.calls.append(Call(piece.text, f"call_{uuid4().hex[:24]}"))
            else:
                self.calls[piece.index].arguments += piece.text
        self.reason = event.reason or self.reason


class Writer(Protocol):
    """One API's way to tell of an answer: as events, or `take` them all and show the `whole`."""

    def __init__(self, body: Any, generation: Generation, service: Any) -> None: ...

    def begin(self) -> str: ...
    def event(self, event: Event) -> str: ...
    def ping(self) -> str: ...
    def end(self) -> str: ...
    def failed(self, error: ApiError) -> str: ...
    def take(self, event: Event) -> object: ...
    def whole(self) -> dict[str, Any]: ...


@asynccontextmanager
async def watched(generation: Generation, receive: Any) -> AsyncIterator[None]:
    """Cancels the generation when the client disconnects, and in the end whatever is left of it."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        generation.close()


async def collect(generation: Generation, receive: Any, take: Callable[[Event], object]) -> None:
    """Waits for the whole answer; `take` gets every event."""
    async with watched(generation, receive):
        async for events in generation:
            for event in events:
                take(event)


class EventStream(Response):
    """Status 200 from the first byte on: what fails later is an event of the stream."""

    def __init__(self, generation: Generation, writer: Writer) -> None:
        super().__init__(None, media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self.generation, self.writer = generation, writer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        last = scope["send"]  # past the layers in between, which want to see no more than the start

        async def write(text: str, more: bool = True) -> None:
            await last({"type": "http.response.body", "body": text.encode(), "more_body": more})

        writer = self.writer
        async with watched(self.generation, receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await write(writer.begin())
                async for events in self.generation:
                    if text := "".join(map(writer.event, events)) if events else writer.ping():
                        await write(text)
                await write(writer.end(), False)
            except ApiError as error:
                await write(writer.failed(error), False)


def data(value: Any) -> str:
    return f"data: {dumps(value)}\n\n"


def named(event: str, value: dict[str, Any]) -> str:
    return f"event: {event}\ndata: {dumps(value)}\n\n"

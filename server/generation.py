"""From the engine thread's tokens to the events of one request, on the event loop.

The engine thread puts tokens into one Mailbox, which wakes the loop at most once a step, and no more often than every
PACE seconds: what a token costs is mostly the system's send to its client. Text is made here, while the engine
computes: detokenizer → stop strings → parser of reasoning and tool calls.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from functools import partial
from math import nan
from time import perf_counter
from typing import Any, NamedTuple

from ..engine.errors import UserError
from ..engine.generate.scheduler import Finish, Overloaded, Prompt, Request, Token
from ..engine.generate.stop import Stops
from .errors import ApiError, complain, refused
from .parser import Piece

Mail = Token | Prompt | Finish
PACE = 0.04  # seconds between two deliveries; an answer's first token and its end do not wait
SILENCE = 15.0  # seconds without an event after which a stream is told to send a ping


class Event(NamedTuple):
    """What one token, or the end, means for one choice. reason: OpenAI's finish_reason."""

    choice: int
    pieces: list[Piece]
    token: Token | None = None
    reason: str | None = None
    told: list[Token] = []  # the prompt's tokens, where their logprobs were asked for


class Mailbox:
    """Carries what the engine thread emits to the event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.mail: deque[tuple[Generation, int, Mail]] = deque()
        self.expected, self.delivered = False, 0.0
        self.live: set[Generation] = set()

    def put(self, generation: "Generation", index: int, event: Mail) -> None:
        """Called on the engine thread."""
        self.mail.append((generation, index, event))
        urgent = isinstance(event, Finish) or index in generation.unheard
        if urgent or not self.expected:
            generation.unheard.discard(index)
            self.expected = True
            self.loop.call_soon_threadsafe(self.deliver if urgent else self.arrange)

    def arrange(self) -> None:
        """Delivers as soon as the pace allows; until then nothing wakes the loop."""
        self.loop.call_at(self.delivered + PACE, self.deliver)

    def deliver(self) -> None:
        self.expected = False  # first: what is put from here on is announced again
        self.delivered = self.loop.time()
        while self.mail:
            generation, index, event = self.mail.popleft()
            generation.pending.append((index, event))
            generation.ready.set()

    async def ping(self) -> None:
        """Wakes generations that have been silent, so that their streams show that they live."""
        while True:
            await asyncio.sleep(SILENCE)
            for generation in self.live:
                if perf_counter() - generation.heard > SILENCE:
                    generation.ready.set()

    def fail(self, error: Exception) -> None:
        """Ends whatever is under way: the engine will not answer any more."""
        for generation in list(self.live):
            for index in range(len(generation.choices)):
                generation.pending.append((index, Finish("error", error)))
            generation.ready.set()


class Choice:
    """One answer in the making."""

    def __init__(
        self, index: int, prompt: list[int], eos: Any, detokenizer: Any, stop: tuple[str, ...], parser: Any
    ) -> None:  # fmt: skip
        self.index, self.prompt, self.eos = index, prompt, eos
        self.detokenizer, self.stops, self.parser = detokenizer, Stops(stop), parser
        self.tokens = self.reasoning_tokens = self.cached_tokens = 0
        self.reason: str | None = None  # set: it has ended, what still comes is dropped
        self.matched: str | None = None  # the stop string that ended it

    def add(self, token: Token) -> Event:
        self.tokens += 1
        text = "" if token.id in self.eos else self.stops.add(self.detokenizer.add(token.id))
        pieces = self.parse(text) if text else []
        self.reasoning_tokens += bool(pieces) and pieces[0].kind == "reasoning"
        return Event(self.index, pieces, token)

    def told(self, prompt: Prompt) -> list[Token]:
        """The prompt's tokens; nothing comes before the first, so it has no logprob."""
        return [Token(self.prompt[0], nan), *prompt.tokens]

    def finish(self, finish: Finish) -> Event:
        """Lets go what was held back, and says why the answer ended."""
        rest = "" if self.stops.found else self.stops.add(self.detokenizer.finish()) + self.stops.finish()
        pieces = self.parse(rest) if rest else []
        if self.parser:
            pieces += self.parser.finish()
        called = self.parser is not None and self.parser.calls > 0
        cut = finish.reason == "length" and not self.complete
        self.reason = "length" if cut else "tool_calls" if called else "stop"
        self.cached_tokens = finish.cached_tokens
        if self.stops.found:
            self.matched = min(filter(self.stops.held.startswith, self.stops.strings), key=len)
        return Event(self.index, pieces, None, self.reason)

    def parse(self, text: str) -> list[Piece]:
        return self.parser.add(text) if self.parser else [Piece("text", text)]

    @property
    def complete(self) -> bool:
        """Nothing more is wanted, whatever the engine thinks."""
        return self.stops.found or (self.parser is not None and self.parser.done)


class Generation:
    """One request in the engine: an async iterator over lists of events, an empty list after a silence."""

    def __init__(self, mailbox: Mailbox, scheduler: Any, choices: list[Choice], prompt_tokens: int) -> None:
        self.mailbox, self.scheduler, self.choices, self.prompt_tokens = mailbox, scheduler, choices, prompt_tokens
        self.pending: list[tuple[int, Mail]] = []
        self.ready = asyncio.Event()
        self.tickets: list[Any] = []
        self.heard = perf_counter()
        self.open = len(choices)
        self.unheard = set(range(len(choices)))  # choices without a token yet; the engine thread's

    def submit(self, requests: list[dict[str, Any]]) -> None:
        """Hands one request for each choice to the scheduler; all or none."""
        self.mailbox.live.add(self)
        put = self.mailbox.put
        try:
            asked = [Request(**fields, emit=partial(put, self, index)) for index, fields in enumerate(requests)]
            self.tickets = self.scheduler.submit_all(asked)
        except Overloaded as error:
            self.close()
            raise ApiError(429, "The server is busy: its queue is full", retry_after=error.retry_after) from None
        except UserError as error:
            self.close()
            raise refused(error) from None

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        while self.open:
            await self.ready.wait()
            self.ready.clear()
            mail, self.pending = self.pending, []
            self.heard = perf_counter()
            events: list[Event] = []
            failure = None
            try:
                for index, item in mail:
                    events += filter(None, [self.take(self.choices[index], item)])
            except ApiError as error:
                failure = error
            if events or not mail:
                yield events
            if failure:  # after what came before it
                raise failure

    def take(self, choice: Choice, item: Mail) -> Event | None:
        if choice.reason:
            return None
        if isinstance(item, Prompt):
            return Event(choice.index, [], told=choice.told(item))
        if isinstance(item, Finish):
            return self.end(choice, item)
        if choice.complete:
            return None
        event = choice.add(item)
        if choice.complete:
            self.scheduler.cancel(self.tickets[choice.index])
        return event

    def end(self, choice: Choice, finish: Finish) -> Event:
        if finish.reason == "error":
            if isinstance(finish.error, UserError):
                raise refused(finish.error)
            complain("engine", finish.error or Exception())
            raise ApiError(500, "The engine failed at this request")
        if finish.reason == "timeout":
            raise ApiError(408, "The request took longer than the server's --timeout")
        if finish.reason == "cancelled" and not choice.complete:
            raise ApiError(503, "The server is shutting down", code="shutting_down", retry_after=10)
        self.open -= 1
        return choice.finish(finish)

    def close(self) -> None:
        """Cancels what is still running. Called however the answer ended."""
        self.mailbox.live.discard(self)
        for ticket, choice in zip(self.tickets, self.choices, strict=False):
            if not choice.reason:
                self.scheduler.cancel(ticket)

    def usage(self) -> tuple[int, int, int, int]:
        """Tokens of the prompt, of them cached, of the answers, of them reasoning."""
        answers = sum(choice.tokens for choice in self.choices)
        cached = max(choice.cached_tokens for choice in self.choices)
        return self.prompt_tokens, cached, answers, sum(choice.reasoning_tokens for choice in self.choices)

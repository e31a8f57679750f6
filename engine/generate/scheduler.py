"""The scheduler runs the requests of many users on one engine, in one thread of its own.

Each round is one ragged step: every decoding sequence, then chunks of prompts as long as the step keeps to its time.
Requests are admitted in order, when there are pages for their prompts. When pages run out, the newest gives its own
back and starts over later, its tokens kept. A request ends in exactly one Finish, whatever happens to it, and what goes
wrong with one request ends that request alone.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from threading import Condition, Thread
from time import monotonic
from typing import Any, NamedTuple

from .. import array as mx
from ..errors import UserError
from .constraint import Constraint
from .engine import Engine, token_bytes
from .pace import Pace
from .pages import PAGE
from .sampling import Sampling
from .sequence import Sequence, Token
from .speculation import propose
from .stats import Stats

CACHE_BYTES = 2**31  # of pages, when nothing is said
MAX_DRAFT = 32  # sampled rows of a step beside one a sequence


class Overloaded(Exception):
    """The queue is full, or no more requests are taken. retry_after: seconds after which it may be worth a try."""

    def __init__(self, what: str, retry_after: float):
        super().__init__(what)
        self.retry_after = retry_after


class Prompt(NamedTuple):
    """The prompt's tokens after the first, with their logprobs: emitted once, before the first Token."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Finish:
    """The last thing that a request emits. Seconds count from submit."""

    reason: str  # "stop", "length", "cancelled", "timeout" or "error"
    error: Exception | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the cache
    generated_tokens: int = 0
    queued_seconds: float = 0.0
    first_token_seconds: float | None = None
    seconds: float = 0.0


@dataclass
class Request:
    """emit is called on the engine's thread, for every token and then once with a Finish: it must not block."""

    prompt: list[int]
    sampling: Sampling
    eos: Collection[int]
    emit: Callable[[Token | Prompt | Finish], None]
    adapter: str | None = None
    constraint: Constraint | None = None
    timeout: float | None = None  # seconds from submit
    prompt_logprobs: bool = False


class Ticket:
    """A request on its way."""

    def __init__(self, request: Request):
        self.request = request
        self.sequence = Sequence(
            request.prompt, request.sampling, request.eos, adapter=request.adapter, constraint=request.constraint,
            prompt_logprobs=request.prompt_logprobs,
        )  # fmt: skip
        self.submitted = monotonic()
        self.cancelled = False
        self.started: float | None = None
        self.first_token: float | None = None
        self.last_token = self.submitted
        self.turn = 0  # the round in which its prompt last had a chunk

    @property
    def decoding(self) -> bool:
        return len(self.sequence.tokens) - self.sequence.cached == 1

    @property
    def ending(self) -> str | None:
        """Why it must end now, if it must."""
        if self.cancelled:
            return "cancelled"
        late = self.request.timeout is not None and monotonic() - self.submitted > self.request.timeout
        return "timeout" if late else None

    def needs(self, tokens: int) -> int:
        """Pages that it lacks to have so many tokens more in the cache."""
        return max(0, -(-(self.sequence.cached + tokens) // PAGE) - len(self.sequence.pages))

    @property
    def page(self) -> tuple[int, tuple[int, ...]] | None:
        """The key of the page that it fills next, if its prompt fills it."""
        s = self.sequence
        start = s.cached // PAGE * PAGE
        return (s.chain, tuple(s.tokens[start : start + PAGE])) if start + PAGE < len(s.tokens) else None

    @property
    def promised(self) -> int:
        """Pages that it lacks for all its tokens and the next one."""
        return self.needs(len(self.sequence.tokens) + 1 - self.sequence.cached)


class Scheduler:
    """Takes requests from any thread.

    max_running: sequences of a step; max_queued: requests that may wait beside them; cache_bytes: of all pages, in use
    or kept for their prefixes (default 2 GiB, or what one whole context needs if max_context is given); max_context:
    default what the model was made for, if the cache has room for it; cache_dtype: as Engine's; step_seconds: what a
    step should take while others wait for their next token; max_step: its most tokens; speculate: draft by prompt
    lookup where it pays; stuck_seconds: a step that takes longer is stuck.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_running: int = 16,
        max_queued: int = 64,
        max_context: int | None = None,
        cache_bytes: int | None = None,
        cache_dtype: mx.Dtype = mx.float16,
        step_seconds: float = 0.1,
        max_step: int = 512,
        speculate: bool = True,
        stuck_seconds: float = 60.0,
    ):
        context, pages = _sizes(model, max_running, max_context, cache_bytes, cache_dtype)
        self.engine = Engine(
            model, max_sequences=max_running, max_context=context, max_step=max_step, max_draft=MAX_DRAFT, pages=pages,
            cache_dtype=cache_dtype, pace=Pace(step_seconds),
        )  # fmt: skip
        self.max_context, self.max_running, self.max_queued = context, max_running, max_queued
        self.speculate, self.stuck_seconds = speculate, stuck_seconds
        self.waiting: deque[Ticket] = deque()
        self.running: list[Ticket] = []  # in the order of admission
        self._stats = Stats(pages_total=pages, page_bytes=self.engine.cache_bytes * PAGE)
        self._request_seconds = 1.0  # a moving average
        self._changed = Condition()
        self._open, self._closed, self._step_began = True, False, 0.0
        self._thread = Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False when the engine's thread has ended or one step takes longer than stuck_seconds."""
        began = self._step_began
        return self._thread.is_alive() and not (began and monotonic() - began > self.stuck_seconds)

    def submit(self, request: Request) -> Ticket:
        """Queues a request. Raises Overloaded, or UserError for what can never run."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Iterable[Request]) -> list[Ticket]:
        """Queues all of them or none: the choices of one answer."""
        tickets = [Ticket(request) for request in requests]
        for ticket in tickets:
            self.engine.check(ticket.sequence)
        with self._changed:
            if not self._open:
                raise Overloaded("[scheduler] it is shutting down", 5.0)
            room = self.max_queued + self.max_running - len(self.running) - len(self.waiting)
            if len(tickets) > room:
                turns = (len(self.waiting) + len(tickets)) / self.max_running
                wait = min(60.0, max(1.0, turns * self._request_seconds))
                raise Overloaded(f"[scheduler] {len(self.waiting)} requests wait, {self.max_queued} may", wait)
            self.waiting.extend(tickets)
            self._changed.notify_all()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request before the next step; it still emits its Finish. One that has ended stays as it is."""
        ticket.cancelled = True

    def drain(self, seconds: float) -> bool:
        """Takes no more requests and waits until all have ended; those that have not after `seconds` are cancelled."""
        with self._changed:
            self._open = False
            ended = self._changed.wait_for(lambda: not (self.waiting or self.running), seconds)
            for ticket in [*self.waiting, *self.running]:
                ticket.cancelled = True
            self._changed.wait_for(lambda: not (self.waiting or self.running), self.stuck_seconds if self.alive else 0)
        return ended

    def close(self) -> None:
        """Cancels everything and ends the thread."""
        self.drain(0)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(5)

    def stats(self) -> Stats:
        """A copy of the counts. (Its histograms go on counting.)"""
        pages, began, engine = self.engine.pages, self._step_began, self.engine
        return replace(
            self._stats, running=len(self.running), waiting=len(self.waiting), pages_kept=len(pages.kept),
            pages_used=len(pages.references) - len(pages.idle), step_age=monotonic() - began if began else 0.0,
            drafted=engine.drafted, accepted=engine.accepted, finished=dict(self._stats.finished),
        )  # fmt: skip

    def _loop(self) -> None:
        try:
            while not self._closed:
                self._turn()
        except BaseException as error:  # a bug: nobody is left waiting, and `alive` is False from now on
            self._open = False
            for ticket in [*self.running, *self.waiting]:
                self._emit(ticket, Finish("error", error if isinstance(error, Exception) else None))
            raise

    def _turn(self) -> None:
        """Waits for something to do, and does it."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self.running or self._closed)
            ended = self._admit()
        for ticket, reason in ended:
            self._finish(ticket, reason)
        self._round()
        if not self.running:
            with self._changed:
                self._changed.notify_all()

    def _admit(self) -> list[tuple[Ticket, str]]:
        """Starts those that wait, in order, as far as there is room; returns those that ended waiting."""
        ended = [(ticket, reason) for ticket in self.waiting if (reason := ticket.ending)]
        for ticket, _ in ended:
            self.waiting.remove(ticket)
        while self.waiting and len(self.running) < self.max_running and self._start(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        return ended

    def _start(self, ticket: Ticket) -> bool:
        """Takes the pages that hold its beginning, if there are enough for the rest. One alone always has room."""
        s, stats = ticket.sequence, self._stats
        self.engine.start(s)
        free = len(self.engine.pages.idle) - sum(t.promised for t in self.running) - len(self.running)
        if self.running and ticket.promised > free:
            self.engine.release(s)
            return False
        if ticket.started is None:
            ticket.started = monotonic()
            stats.queue_seconds.add(ticket.started - ticket.submitted)
            stats.prompt_tokens += s.prompt_length
            stats.prefix_queries += s.prompt_length
        ticket.turn = stats.steps
        return True

    def _round(self) -> None:
        """One step."""
        for ticket in [t for t in self.running if t.ending]:
            self._finish(ticket, ticket.ending or "")
        self._make_room()
        if not (tickets := self._choose()):
            return
        self._step_began = monotonic()
        self._stats.steps += 1
        sequences = [t.sequence for t in tickets]
        try:
            sampled = self.engine.step(sequences)
        except Exception as error:  # no one request is to blame: all of the step end
            for s in sequences:
                s.fail(error)
            sampled = sequences
        self._step_began = 0.0
        new = set(map(id, sampled))
        for ticket in tickets:
            if id(ticket.sequence) in new:
                self._deliver(ticket)

    def _make_room(self) -> None:
        """Preempts the newest until every decoding sequence has a page for its next token, and somebody can go on."""
        while len(self.running) > 1:
            free = len(self.engine.pages.idle) - sum(t.needs(1) for t in self.running if t.decoding)
            oldest = self.running[0]
            if free >= (0 if oldest.decoding else oldest.needs(1)):
                return
            ticket = self.running.pop()
            self.engine.release(ticket.sequence)
            self._stats.preemptions += 1
            with self._changed:
                self.waiting.appendleft(ticket)

    def _choose(self) -> list[Ticket]:
        """Who runs in this step; prompts take turns, with chunks that end at a page's border."""
        chosen = [t for t in self.running if t.decoding]
        free = len(self.engine.pages.idle) - sum(t.needs(1) for t in chosen)
        if self.speculate and chosen:
            self._propose(chosen, free)
            free -= sum(t.needs(1 + len(t.sequence.draft)) - t.needs(1) for t in chosen)
        decoded = sum(1 + len(t.sequence.draft) for t in chosen)
        budget = self.engine.pace.chunk(decoded, self.engine.max_step - decoded)
        prompts = sorted((t for t in self.running if not t.decoding), key=lambda t: t.turn)
        for ticket in prompts:
            self.engine.adopt(ticket.sequence)
        coming = {t.page for t in prompts if t.sequence.cached % PAGE}  # pages that somebody has begun
        for ticket in prompts:
            s, page = ticket.sequence, ticket.page
            if page and page in coming and not s.cached % PAGE and not s.telling:
                continue  # it will have it from another
            room = (len(s.pages) + free) * PAGE - s.cached
            if (count := _chunk(s, min(budget, room))) < 1:
                continue
            coming.add(page)
            free -= ticket.needs(count)
            budget -= count
            s.chunk, ticket.turn = count, self._stats.steps + 1
            chosen.append(ticket)
        return chosen

    def _propose(self, tickets: list[Ticket], free: int) -> None:
        """Drafts, unless pages are so few that they would cost somebody his."""
        if free > len(tickets):
            propose(self.engine, [t.sequence for t in tickets])

    def _deliver(self, ticket: Ticket) -> None:
        s, stats, now = ticket.sequence, self._stats, monotonic()
        if s.fresh and ticket.first_token is None:
            ticket.first_token = now
            stats.first_token_seconds.add(now - ticket.submitted)
            stats.prefix_hits += s.reused
            if s.tells:
                self._emit(ticket, Prompt(tuple(s.told)))
        elif s.fresh:
            for gap in [now - ticket.last_token, *[0.0] * (len(s.fresh) - 1)]:
                stats.inter_token_seconds.add(gap)
        ticket.last_token = now
        stats.generated_tokens += len(s.fresh)
        for token in s.fresh:
            self._emit(ticket, token)
        if s.finish_reason:
            self._finish(ticket, s.finish_reason, s.error)

    def _finish(self, ticket: Ticket, reason: str, error: Exception | None = None) -> None:
        if ticket in self.running:
            self.running.remove(ticket)
            self.engine.release(ticket.sequence)
        s, begin, now, stats = ticket.sequence, ticket.submitted, monotonic(), self._stats
        first = None if ticket.first_token is None else ticket.first_token - begin
        queued = (ticket.started or now) - begin
        stats.finished[reason] = stats.finished.get(reason, 0) + 1
        self._request_seconds += 0.1 * (now - begin - queued - self._request_seconds)
        self._emit(ticket, Finish(reason, error, s.prompt_length, s.reused, s.generated, queued, first, now - begin))

    def _emit(self, ticket: Ticket, event: Token | Prompt | Finish) -> None:
        try:
            ticket.request.emit(event)
        except Exception:  # nobody listens any more
            ticket.cancelled = True


def _chunk(s: Sequence, most: int) -> int:
    """How many tokens of a prompt run now: the rest of it, or up to the last border of a page that `most` reaches."""
    left = len(s.tokens) - s.cached
    if left <= most:
        return left
    border = (s.cached + most) // PAGE * PAGE
    return border - s.cached if border > s.cached else most


def _sizes(
    model: Any, running: int, context: int | None, cache_bytes: int | None, dtype: mx.Dtype
) -> tuple[int, int]:
    """Tokens of a context and pages of the pool: a whole context fits, and all running ones if the bytes allow."""
    each, limit = token_bytes(model, dtype=dtype), model.config.max_position_embeddings
    wanted = min(context or limit, limit)
    most = (cache_bytes or CACHE_BYTES) // (each * PAGE)
    needed = -(-wanted // PAGE)
    if context and cache_bytes and most < needed:
        what = f"[scheduler] cache_bytes {cache_bytes:,} hold {most * PAGE} tokens, wanted a context of {wanted}"
        raise UserError(what, f"allow {needed * PAGE * each:,} bytes, or a shorter context")
    if context:
        most = max(most, needed)
    if most < 2:
        raise UserError(f"[scheduler] cache_bytes {cache_bytes:,} hold {most * PAGE} tokens", "allow more bytes")
    return min(wanted, most * PAGE), min(most, running * needed)

"""The scheduler on a tiny random model: nothing that happens to the others changes what a request says."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lazulite.engine import array as mx
from lazulite.engine.errors import UserError
from lazulite.engine.generate import (
    Engine,
    Finish,
    Histogram,
    Overloaded,
    Prompt,
    Request,
    Sampling,
    Scheduler,
    Sequence,
    Ticket,
    Token,
    peak_memory,
)
from lazulite.engine.generate.budget import Budget
from lazulite.engine.generate.engine import token_bytes
from lazulite.engine.generate.pace import Pace
from lazulite.engine.generate.pages import PAGE
from lazulite.engine.generate.speculation import Lookup

MODEL = tiny.tiny()
POISONED = tiny.tiny(poisoned=True)
PAGE_BYTES = PAGE * token_bytes(MODEL, dtype=mx.float32)
NO_POISON = {tiny.POISON: -100.0}


class Stream:
    """What one request emits."""

    def __init__(self) -> None:
        self.events: Queue[Any] = Queue()
        self.tokens: list[Token] = []
        self.prompt: Prompt | None = None
        self.ticket: Ticket | None = None

    def next(self) -> Any:
        event = self.events.get(timeout=30)
        if isinstance(event, Token):
            self.tokens.append(event)
        elif isinstance(event, Prompt):
            self.prompt = event
        return event

    def finish(self) -> Finish:
        while not isinstance(event := self.next(), Finish):
            pass
        return event

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def ask(scheduler: Scheduler, prompt: list[int], sampling: Sampling | None = None, **options: Any) -> Stream:
    stream = Stream()
    request = Request(prompt, sampling or Sampling(max_tokens=8), options.pop("eos", ()), stream.events.put, **options)
    stream.ticket = scheduler.submit(request)
    return stream


@contextmanager
def serving(model: Any = MODEL, **options: Any) -> Iterator[Scheduler]:
    scheduler = Scheduler(model, cache_dtype=mx.float32, **options)
    try:
        yield scheduler
    finally:
        scheduler.close()
        assert not scheduler.alive
        assert not any(scheduler.engine.pages.references), "every page is back"


@contextmanager
def paused(scheduler: Scheduler) -> Iterator[None]:
    """The engine stands still in a step, so that requests can come together."""
    run, gate, inside = scheduler.engine.executable.run, threading.Event(), threading.Event()
    scheduler.engine.executable.run = lambda **sizes: (inside.set(), gate.wait(30), run(**sizes))  # type: ignore
    ask(scheduler, [1], Sampling(max_tokens=1))
    assert inside.wait(30)
    yield
    scheduler.engine.executable.run = run  # type: ignore[method-assign]
    gate.set()


def alone(prompt: list[int], sampling: Sampling, model: Any = MODEL) -> list[int]:
    """What the prompt gives in steps of its own, without drafts and without a cache from before."""
    engine = SOLO.setdefault(id(model), Engine(model, cache_dtype=mx.float32))
    engine.pages.forget(range(len(engine.pages.references)))
    sequence = Sequence(prompt, sampling)
    engine.start(sequence)
    while not sequence.finish_reason:
        engine.step([sequence])
    engine.release(sequence)
    return sequence.tokens[len(prompt) :]


SOLO: dict[int, Engine] = {}


def text(kinds: list[int], rest: int) -> list[int]:
    """A prompt of whole pages, each of one of a few kinds, so that prompts share beginnings; then some tokens more."""
    pages = np.random.default_rng(7).integers(0, tiny.POISON, (3, PAGE)).tolist()
    return [token for kind in kinds for token in pages[kind]] + [(5 * i + rest) % 90 for i in range(rest)]


prompts = st.builds(text, st.lists(st.integers(0, 2), max_size=4), st.integers(1, PAGE + 3))
samplings = st.builds(
    Sampling,
    max_tokens=st.integers(1, 40),
    temp=st.sampled_from([0.0, 0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {3: 5.0, 4: -100.0}]),
    seed=st.integers(0, 2**64 - 1),
)
CONFIGURATIONS = {
    "roomy": {"max_running": 6},
    "one by one": {"max_running": 1, "max_queued": 20},
    "small steps": {"max_running": 5, "max_step": 24},
    "few pages": {"max_running": 6, "cache_bytes": 9 * PAGE_BYTES, "max_context": 8 * PAGE},
    "no drafts": {"max_running": 6, "speculate": False},
    "all drafts": {"max_running": 3},
}


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def scheduler(request: Any) -> Iterator[Scheduler]:
    with serving(**CONFIGURATIONS[request.param]) as scheduler:
        if request.param == "all drafts":
            scheduler.engine.pace.seconds = lambda decoded: 0.0  # type: ignore[method-assign]  # every one seems to pay
        yield scheduler
        stats = scheduler.stats()
        assert request.param != "all drafts" or stats.accepted, "some of them came true"


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.tuples(prompts, samplings), min_size=2, max_size=7))
def test_in_a_crowd_a_request_says_what_it_says_alone(scheduler: Scheduler, asked: list[tuple[Any, Any]]) -> None:
    streams = [ask(scheduler, prompt, sampling) for prompt, sampling in asked]
    for (prompt, sampling), stream in zip(asked, streams, strict=True):
        finish = stream.finish()
        assert finish.reason == "length" and finish.generated_tokens == sampling.max_tokens == len(stream.ids)
        tiny.assert_same(MODEL, prompt, sampling, alone(prompt, sampling), stream.ids)
    assert not any(scheduler.engine.pages.references)


def test_few_pages_mean_preemption_and_change_nothing() -> None:
    with serving(max_running=4, cache_bytes=9 * PAGE_BYTES, max_context=8 * PAGE) as scheduler:
        sampling = Sampling(max_tokens=120, temp=0.8, seed=3)
        asked = [[7 * i + 1, 5, 9 + i] for i in range(4)]
        streams = [ask(scheduler, prompt, sampling) for prompt in asked]
        for prompt, stream in zip(asked, streams, strict=True):
            assert stream.finish().reason == "length"
            tiny.assert_same(MODEL, prompt, sampling, alone(prompt, sampling), stream.ids)
        assert scheduler.stats().preemptions > 0


def test_what_comes_together_is_computed_once() -> None:
    with serving(max_running=8) as scheduler:
        long = text([0, 1, 2, 0, 1], 20)
        with paused(scheduler):
            requests = [Stream() for _ in range(4)]
            sampling = [Sampling(max_tokens=3, temp=1.0, seed=i) for i in range(4)]
            pairs = zip(requests, sampling, strict=True)
            scheduler.submit_all(Request(long, s, (), stream.events.put) for stream, s in pairs)
        computed = [len(long) - stream.finish().cached_tokens for stream in requests]
        assert sum(computed) == len(long) + 3 * 20, "each page once, the end of the prompt by each"
        for stream, s in zip(requests, sampling, strict=True):
            tiny.assert_same(MODEL, long, s, alone(long, s), stream.ids)


def test_a_second_request_finds_the_first_ones_pages() -> None:
    with serving() as scheduler:
        long = text([2, 1, 0, 2], 5)
        first, again = (ask(scheduler, long).finish() for _ in range(2))
        assert (first.cached_tokens, again.cached_tokens) == (0, 4 * PAGE)
        stats = scheduler.stats()
        assert stats.prefix_hits == 4 * PAGE and stats.prefix_queries == 2 * len(long)
        assert stats.pages_kept >= 4 and stats.pages_used == 0


def test_others_get_tokens_while_a_long_prompt_runs_in_chunks() -> None:
    with serving(max_running=3, max_step=PAGE + 3) as scheduler:
        stream = ask(scheduler, [1, 2, 3], Sampling(max_tokens=200))
        stream.next()
        long = ask(scheduler, text([0, 1, 2, 2, 1], 9))
        between = 0
        while long.events.empty():
            stream.next()
            between += 1
        assert between >= 5, "a token for each chunk of a page"
        short = ask(scheduler, [4, 5], Sampling(max_tokens=2))
        assert short.finish().reason == long.finish().reason == "length"
        assert stream.finish().generated_tokens == 200


def test_prompts_take_turns() -> None:
    """A short prompt does not wait for the whole of a long one that came before."""
    with serving(max_running=3, max_step=PAGE + 2) as scheduler:
        with paused(scheduler):
            long = ask(scheduler, text([0, 1, 2, 2, 1, 0], 9), Sampling(max_tokens=1))
            short = ask(scheduler, [4, 5], Sampling(max_tokens=1))
        assert short.finish().seconds < long.finish().seconds


# cancelling, time and room


def test_cancel_in_the_queue_in_a_prompt_and_in_an_answer() -> None:
    with serving(max_running=2, max_step=PAGE) as scheduler:
        answering = ask(scheduler, [1, 2], Sampling(max_tokens=250))
        answering.next()
        with paused(scheduler):
            prompting = ask(scheduler, text([0, 1, 2, 2, 1, 0], 9))
            queued = ask(scheduler, [3])
        while scheduler.stats().waiting > 1:
            time.sleep(0.001)
        for stream in (queued, prompting, answering):
            assert stream.ticket
            scheduler.cancel(stream.ticket)
            assert stream.finish().reason == "cancelled"
        assert answering.tokens and not queued.tokens
        again = ask(scheduler, [1, 2], Sampling(max_tokens=20))
        assert again.finish().reason == "length" and again.ids == alone([1, 2], Sampling(max_tokens=20))
        scheduler.cancel(again.ticket)  # ended already
        time.sleep(0.05)
        assert again.events.empty()


def test_a_request_has_its_time_and_no_more() -> None:
    with serving(max_running=1) as scheduler:
        slow, run = 0.02, scheduler.engine.executable.run
        scheduler.engine.executable.run = lambda **sizes: (time.sleep(slow), run(**sizes))  # type: ignore[method-assign]
        running = ask(scheduler, [1], Sampling(max_tokens=200), timeout=0.3)
        queued = ask(scheduler, [2], timeout=0.1)
        finish = running.finish()
        assert finish.reason == "timeout" and 0.3 <= finish.seconds < 5 and finish.first_token_seconds
        late = queued.finish()
        assert late.reason == "timeout" and late.generated_tokens == 0 and late.first_token_seconds is None
        assert scheduler.stats().finished == {"timeout": 2}


def test_a_full_queue_refuses_all_or_none() -> None:
    with serving(max_running=1, max_queued=2) as scheduler, paused(scheduler):
        streams = [ask(scheduler, [i + 1]) for i in range(2)]
        with pytest.raises(Overloaded, match="requests wait, 2 may") as caught:
            scheduler.submit_all([Request([1], Sampling(), (), print)] * 2)
        assert 1 <= caught.value.retry_after <= 60
        assert scheduler.stats().waiting <= 2 and streams
    assert all(stream.finish().reason in ("length", "cancelled") for stream in streams)


@pytest.mark.parametrize(("prompt", "options", "wanted"), [
    ([], {}, "the prompt has 0 tokens, wanted 1 to 255"),
    ([1] * 256, {}, "the prompt has 256 tokens, wanted 1 to 255"),
    ([1, 97], {}, "prompt has token 97, wanted 0 to 96"),
    ([-1, 5], {}, "prompt has token -1, wanted 0 to 96"),
    ([1], {"sampling": Sampling(logit_bias={97: 1.0})}, "logit_bias has token 97, wanted 0 to 96"),
    ([1], {"adapter": "tone"}, "adapter 'tone' is unknown, wanted one of those loaded: none"),
])  # fmt: skip
def test_what_can_never_run_is_refused_at_once(prompt: list[int], options: dict[str, Any], wanted: str) -> None:
    with serving(max_running=1) as scheduler, pytest.raises(UserError, match=wanted):
        ask(scheduler, prompt, **options)


def test_a_cache_too_small_for_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="cache_bytes 16,384 hold 32 tokens, wanted a context of 128"):
        Scheduler(MODEL, max_context=128, cache_bytes=PAGE_BYTES, cache_dtype=mx.float32)
    with serving(cache_bytes=4 * PAGE_BYTES) as scheduler:
        assert scheduler.max_context == 4 * PAGE, "the context is what the cache has room for"


def test_draining_lets_all_finish_and_takes_no_more() -> None:
    with serving(max_running=2) as scheduler:
        streams = [ask(scheduler, [i + 1], Sampling(max_tokens=20)) for i in range(5)]
        assert scheduler.drain(30)
        assert [stream.finish().reason for stream in streams] == ["length"] * 5
        with pytest.raises(Overloaded, match="shutting down"):
            ask(scheduler, [1])


def test_draining_cancels_what_takes_too_long() -> None:
    with serving(max_running=1) as scheduler:
        run = scheduler.engine.executable.run
        scheduler.engine.executable.run = lambda **sizes: (time.sleep(0.01), run(**sizes))  # type: ignore[method-assign]
        streams = [ask(scheduler, [i + 1], Sampling(max_tokens=200)) for i in range(3)]
        assert not scheduler.drain(0.1)
        assert [stream.finish().reason for stream in streams] == ["cancelled"] * 3


# faults


class Fails:
    """A constraint that allows all, and fails in one of its calls after a while."""

    finished = False

    def __init__(self, where: str, after: int):
        self.where, self.left = where, after

    def _call(self, where: str) -> None:
        self.left -= where == self.where
        if self.left < 0:
            raise UserError(f"[constraint] {where} failed")

    def mask(self) -> Any:
        self._call("mask")

    def advance(self, token: int) -> None:
        self._call("advance")

    def draft(self, tokens: Any) -> int:
        return 0

    def masks(self, tokens: Any) -> Any:
        return []


fates = st.sampled_from(["whole", "whole", "cancelled", "error"])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.tuples(prompts, samplings, fates, st.integers(0, 20)), min_size=3, max_size=7))
def test_the_fates_of_others_change_nothing(scheduler: Scheduler, asked: list[tuple[Any, ...]]) -> None:
    def start(prompt: list[int], sampling: Sampling, fate: str, after: int) -> Stream:
        return ask(scheduler, prompt, sampling, constraint=Fails("advance", after) if fate == "error" else None)

    streams = [start(*each) for each in asked]
    for stream, (_, sampling, fate, after) in zip(streams, asked, strict=True):
        for _ in range(min(after, sampling.max_tokens) if fate == "cancelled" else 0):
            stream.next()
        if fate == "cancelled":
            scheduler.cancel(stream.ticket)
    for stream, (prompt, sampling, fate, after) in zip(streams, asked, strict=True):
        finish, whole = stream.finish(), alone(prompt, sampling)
        short = fate == "error" and after < sampling.max_tokens
        assert finish.reason in (["error"] if short else ["length", "cancelled"] if fate == "cancelled" else ["length"])
        count = after if short else len(stream.ids) if fate == "cancelled" else sampling.max_tokens
        tiny.assert_same(MODEL, prompt, sampling, whole[:count], stream.ids)
    assert not any(scheduler.engine.pages.references)


class Empty(Fails):
    """Allows nothing."""

    def mask(self) -> Any:
        return np.zeros(-(-tiny.VOCABULARY // 32), np.uint32)


POISONS: dict[str, dict[str, Any]] = {
    "a prompt that is not a number": {"prompt": [5, tiny.POISON, 6]},
    "a long one": {"prompt": [tiny.POISON] * 150},
    "one that becomes so": {"prompt": [5], "sampling": Sampling(logit_bias={tiny.POISON: 100.0}, max_tokens=20)},
    "a mask fails": {"prompt": [5], "constraint": Fails("mask", 4)},
    "a token is refused": {"prompt": [5], "constraint": Fails("advance", 4)},
    "nothing is allowed": {"prompt": [5], "constraint": Empty("", 0)},
}


@pytest.fixture(scope="module")
def poisoned() -> Iterator[Scheduler]:
    with serving(POISONED, max_running=5, speculate=False) as scheduler:
        yield scheduler


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_request_fails_alone(poisoned: Scheduler, poison: str) -> None:
    sampling = [Sampling(max_tokens=40, temp=i % 2, seed=i, logit_bias=NO_POISON) for i in range(3)]
    asked = [[3, 4, i] for i in range(3)]

    def neighbours() -> list[Stream]:
        return [ask(poisoned, prompt, s) for prompt, s in zip(asked, sampling, strict=True)]

    undisturbed = neighbours()
    assert [stream.finish().reason for stream in undisturbed] == ["length"] * 3
    for _ in range(2):
        streams, bad = neighbours(), ask(poisoned, **POISONS[poison])
        finish = bad.finish()
        assert finish.reason == "error" and isinstance(finish.error, UserError)
        assert [stream.finish().reason for stream in streams] == ["length"] * 3
        assert [stream.ids for stream in streams] == [stream.ids for stream in undisturbed]
    assert not any(poisoned.engine.pages.references)


def test_what_a_poisoned_request_left_in_pages_harms_nobody() -> None:
    with serving(POISONED, max_running=2, cache_bytes=8 * PAGE_BYTES) as scheduler:
        assert ask(scheduler, [tiny.POISON] * 200).finish().reason == "error"  # its pages are the next to be taken
        sampling = Sampling(max_tokens=30, logit_bias=NO_POISON)
        for prompt in ([1] * 100, [2] * 33, [3]):
            stream = ask(scheduler, prompt, sampling)
            assert stream.finish().reason == "length"
            tiny.assert_same(POISONED, prompt, sampling, alone(prompt, sampling, POISONED), stream.ids)
        assert ask(scheduler, [tiny.POISON] * 200).finish().cached_tokens == 0, "nor is it found again"


def test_a_step_that_fails_ends_its_requests_and_the_next_ones_run() -> None:
    with serving(max_running=2) as scheduler:
        run = scheduler.engine.executable.run

        def broken(**sizes: int) -> None:
            scheduler.engine.executable.run = run  # type: ignore[method-assign]
            raise RuntimeError("the runtime says no")

        scheduler.engine.executable.run = broken  # type: ignore[method-assign]
        finish = ask(scheduler, [1, 2, 3]).finish()
        assert finish.reason == "error" and "says no" in str(finish.error)
        stream = ask(scheduler, [1, 2, 3])
        assert stream.finish().reason == "length" and stream.ids == alone([1, 2, 3], Sampling(max_tokens=8))
        assert scheduler.alive


def test_a_listener_that_fails_is_gone() -> None:
    with serving(max_running=2) as scheduler:
        done = threading.Event()

        def emit(event: Any) -> None:
            if isinstance(event, Finish):
                done.set()
            raise RuntimeError("the loop is closed")

        scheduler.submit(Request([1, 2], Sampling(max_tokens=200), (), emit))
        stream = ask(scheduler, [1, 2, 3])
        assert done.wait(30) and stream.finish().reason == "length"
        assert scheduler.stats().finished == {"cancelled": 1, "length": 1}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_if_the_thread_dies_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(MODEL, max_running=1)

    def bug() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(scheduler, "_choose", bug)
    stream = ask(scheduler, [1])
    finish = stream.finish()
    assert finish.reason == "error" and "a bug" in str(finish.error)
    scheduler._thread.join(10)
    assert not scheduler.alive
    with pytest.raises(Overloaded):
        ask(scheduler, [1])
    scheduler.close()


def test_a_stuck_step_is_noticed() -> None:
    gate = threading.Event()
    with serving(max_running=1, stuck_seconds=0.1) as scheduler:
        run = scheduler.engine.executable.run
        scheduler.engine.executable.run = lambda **sizes: (gate.wait(30), run(**sizes))  # type: ignore[method-assign]
        assert scheduler.alive
        stream = ask(scheduler, [1])
        deadline = time.monotonic() + 20
        while scheduler.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not scheduler.alive and scheduler.stats().step_age > 0.1
        gate.set()
        assert stream.finish().reason == "length" and scheduler.alive


# what a request may ask for


def test_biases_top_logprobs_and_the_logprobs_of_a_prompt() -> None:
    tokens = text([0, 1], 10)
    with serving(max_running=2) as scheduler:
        sampling = Sampling(max_tokens=3, logit_bias={11: 30.0}, top_logprobs=5)
        other = ask(scheduler, [1, 2], Sampling(max_tokens=60))
        stream = ask(scheduler, tokens, sampling, prompt_logprobs=True)
        assert stream.finish().cached_tokens == 0 and stream.ids == [11, 11, 11]
        assert other.finish().reason == "length"
    assert stream.prompt
    told = [*stream.prompt.tokens, *stream.tokens]
    assert [token.id for token in told] == tokens[1:] + [11] * 3
    for i, token in enumerate(told, 1):
        row = tiny.logits(MODEL, (tokens + [11, 11])[:i]).astype(np.float64)
        row -= np.log(np.exp(row).sum())
        assert abs(row[token.id] - token.logprob) < 1e-4  # of the model's distribution: the bias does not count
        np.testing.assert_allclose([value for _, value in token.top], np.sort(row)[::-1][:5], atol=1e-4)


def test_the_end_of_sequence_and_a_finished_constraint_stop() -> None:
    with serving(max_running=2) as scheduler:
        ids = alone([1, 2], Sampling(max_tokens=30))
        end = ids[5]
        stream = ask(scheduler, [1, 2], Sampling(max_tokens=30), eos={end})
        assert stream.finish().reason == "stop" and stream.ids == ids[: ids.index(end) + 1]
        ignoring = ask(scheduler, [1, 2], Sampling(max_tokens=30, ignore_eos=True), eos={end})
        assert ignoring.finish().reason == "length" and ignoring.ids == ids
        stream = ask(scheduler, [1, 2], Sampling(max_tokens=30), constraint=tiny.Spells([3, 1, 4, 1, 5]))
        assert stream.finish().reason == "stop" and stream.ids == [3, 1, 4, 1, 5]


class Letters:
    """A tokenizer with a printable character for each id."""

    vocab_size = tiny.VOCABULARY

    def spell(self, id: int) -> bytes:
        return bytes([32 + id])

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [ord(c) - 32 for c in text]


@pytest.mark.parametrize("prompt", [[1, 2], tiny.repeating(5, 8)])  # the second one is drafted for
def test_thinking_ends_when_its_budget_is_spent(prompt: list[int]) -> None:
    with serving(max_running=2) as scheduler:
        sampling = Sampling(max_tokens=30, temp=0)
        free = alone(prompt, sampling)
        stream = ask(scheduler, prompt, sampling, constraint=Budget(Letters(), "<t>", "</t>", 9, opened=True))
        assert stream.finish().reason == "length"
        assert stream.ids[:13] == [*free[:9], *Letters().encode("</t>")] and len(stream.ids) == 30
        stream = ask(scheduler, prompt, sampling, constraint=Budget(Letters(), "<t>", "</t>", 9))
        assert stream.finish().reason == "length" and stream.ids == free  # it did not begin to think


# drafts


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft is tried: steps seem to cost nothing."""
    monkeypatch.setattr(Pace, "seconds", lambda self, decoded: 0.0)


def test_a_draft_that_comes_true_saves_steps(eager: None) -> None:
    with serving(max_running=2) as scheduler:
        tokens = tiny.repeating(5, 8)
        stream = ask(scheduler, tokens, Sampling(max_tokens=40), constraint=tiny.Spells(tiny.repeating(5, 9)[:40]))
        assert stream.finish().reason == "stop" and stream.ids == tiny.repeating(5, 9)[:40]
        stats = scheduler.stats()
        assert stats.accepted >= 20 and stats.drafted - stats.accepted <= 1 and stats.steps <= 22
        assert stats.inter_token_seconds.counts[0] >= stats.accepted and sum(stats.inter_token_seconds.counts) == 39


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(2, 9), samplings, st.integers(1, 3))
def test_drafts_change_no_text(period: int, sampling: Sampling, batch: int) -> None:
    prompt = tiny.repeating(period, 4)
    engine = DRAFTING
    engine.pages.forget(range(len(engine.pages.references)))
    sequences = [Sequence(prompt, sampling) for _ in range(batch)]
    plain = alone(prompt, sampling)
    rng = np.random.default_rng(period)
    for s in sequences:
        engine.start(s)
    while running := [s for s in sequences if not s.finish_reason]:
        for s in running:  # right drafts, drafts that are right at first, and wrong ones
            right = plain[s.generated : s.generated + int(rng.integers(0, 6))] if s.generated else []
            s.draft = [t if rng.random() < 0.8 else int(rng.integers(0, 90)) for t in right]
        engine.step(running)
    for s in sequences:
        engine.release(s)
        assert len(s.tokens) == len(prompt) + sampling.max_tokens
        tiny.assert_same(MODEL, prompt, sampling, plain, s.tokens[len(prompt) :])
    assert not any(engine.pages.references)


DRAFTING = Engine(MODEL, max_sequences=3, max_draft=12, cache_dtype=mx.float32)


def test_drafts_are_made_where_they_pay() -> None:
    lookup = Lookup()
    assert lookup.draft([1, 2, 3, 4, 5], 3) == []
    assert lookup.draft([1, 2, 3, 4, 5, 1, 2, 3], 3) == [4, 5, 1]
    assert lookup.draft([1, 2, 3, 4, 5, 1, 2, 3, 6, 1, 2, 3], 2) == [6, 1], "the last place counts"
    for _ in range(20):
        lookup.learn(drafted=3, accepted=0)
    assert lookup.expected(3) < 0.05
    for _ in range(400):
        lookup.forget()
    assert lookup.luck > 0.45
    for _ in range(20):
        lookup.learn(drafted=3, accepted=3)
    assert lookup.expected(3) > 2.9


@pytest.mark.parametrize(("four", "drafted"), [(1.05, True), (3.9, False)])
def test_measured_costs_decide(four: float, drafted: bool) -> None:
    with serving(max_running=1) as scheduler:
        scheduler.engine.pace.learn = lambda *measured: None  # type: ignore[method-assign]
        scheduler.engine.pace.decode = {1: 1.0, 2: four, 3: four, 4: four}
        tokens = tiny.repeating(5, 8)
        stream = ask(scheduler, tokens, Sampling(max_tokens=30), constraint=tiny.Spells(tiny.repeating(5, 7)[:30]))
        assert stream.finish().reason == "stop"
        assert (scheduler.stats().accepted > 10) == drafted


# the pace


@pytest.mark.parametrize("decoded", [0, 8])
@pytest.mark.parametrize(("fixed", "each"), [(0.01, 0.0004), (0.05, 0.0004), (0.0, 0.005), (0.06, 0.0001)])
def test_chunks_keep_a_step_to_its_time(decoded: int, fixed: float, each: float) -> None:
    """A step takes `fixed` seconds, more with a prompt of any size, and `each` for a token of a prompt."""
    pace, wanted = Pace(0.1), 0.1 if decoded else 0.4
    assert pace.chunk(decoded, 512) == 32, "nothing is known yet"
    pace.learn(8, 0, 0.02)
    for _ in range(20):
        chunk = pace.chunk(decoded, 512)
        pace.learn(decoded, chunk, 0.02 * (decoded > 0) + fixed + each * chunk)
    best = max(32, min(512, (wanted - fixed - 0.02 * (decoded > 0)) / each))
    assert pace.chunk(decoded, 512) == pytest.approx(best, rel=0.15)
    pace.learn(decoded, 3, 0.001)
    assert pace.chunk(decoded, 512) == pytest.approx(best, rel=0.15), "the short end of a prompt changes nothing"
    for _ in range(12):
        pace.learn(decoded, pace.chunk(decoded, 512), 5.0)
    assert pace.chunk(decoded, 512) == 32, "never less, or nothing would go on"
    assert pace.chunk(decoded, 5) == 5


def test_where_decoding_alone_is_slow_prompts_get_as_long_again() -> None:
    pace = Pace(0.1)
    pace.learn(8, 0, 0.4)
    for _ in range(20):
        pace.learn(8, chunk := pace.chunk(8, 512), 0.4 + chunk * 0.01)
    assert pace.chunk(8, 512) == pytest.approx(40, rel=0.15)


def test_a_step_never_run_takes_as_long_as_one_of_as_many_tiles() -> None:
    pace = Pace(0.1)
    pace.learn(16, 0, 1.0)
    pace.learn(20, 0, 2.0)
    assert [pace.seconds(n) for n in (3, 12, 16, 18, 24, 30)] == [0.0, 1.0, 1.0, 2.0, 2.0, 2.0]


def test_a_histogram_counts_by_size() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 7.0):
        histogram.add(value)
    assert histogram.counts == [2, 1, 1] and histogram.sum == 10.0


# adapters


class Adapted:
    """The tiny model with two adapters: each adds numbers of its own to a row's embedding of a sort."""

    def __init__(self) -> None:
        self.config, self.cache_spec = MODEL.config, MODEL.cache_spec
        self.adapters = SimpleNamespace(names=("tone", "form"), rows=None)
        rng = np.random.default_rng(1)
        self.table = mx.array(np.concatenate([np.zeros((1, 97)), rng.standard_normal((2, 97)) * 3]).astype(np.float32))

    def __call__(self, tokens: Any, context: Any, rows: Any) -> Any:
        assert self.adapters.rows is not None
        return MODEL(tokens, context, rows) + mx.take(self.table, mx.take(self.adapters.rows, rows), axis=0)


def test_each_row_has_its_own_adapter_and_each_adapter_its_own_prefixes() -> None:
    model, tokens = Adapted(), text([0, 1], 9)
    with serving(model, max_running=4, speculate=False) as scheduler:
        for cached in (0, 2 * PAGE):
            streams = [ask(scheduler, tokens, Sampling(max_tokens=1), adapter=name) for name in (None, "tone", "form")]
            assert [stream.finish().cached_tokens for stream in streams] == [cached] * 3
            for i, stream in enumerate(streams):
                wanted = tiny.logits(MODEL, tokens) + np.asarray(model.table)[i]
                assert stream.ids == [wanted.argmax()]
        assert len({stream.ids[0] for stream in streams}) > 1
        with pytest.raises(UserError, match="adapter 'x' is unknown, wanted one of those loaded: tone, form"):
            ask(scheduler, tokens, adapter="x")
    assert model.adapters.rows is None


# for hours


@pytest.mark.parametrize("count", [800, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_requests_leave_nothing_behind(count: int) -> None:
    rng = np.random.default_rng(5)
    with serving(max_running=8, max_queued=count, cache_bytes=16 * PAGE_BYTES) as scheduler:
        def some(count: int) -> None:
            streams = []
            for i in range(count):
                prompt = text(rng.integers(0, 3, rng.integers(0, 3)).tolist(), int(rng.integers(1, 30)))
                streams.append(ask(scheduler, prompt, Sampling(max_tokens=int(rng.integers(1, 6)))))
                if i % 7 == 0 and streams[-1].ticket:
                    scheduler.cancel(streams[-1].ticket)
            assert {stream.finish().reason for stream in streams} == {"length", "cancelled"}

        some(200)
        before = peak_memory()
        for _ in range(count // 200):
            some(200)
        assert peak_memory() - before < 8e6
        stats = scheduler.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
        assert sum(stats.finished.values()) == count + 200
        assert len(scheduler.engine.pages.kept) == len(scheduler.engine.pages.keys) <= 16

"""The engine on a tiny random model: whatever shares a step, a sequence gets the tokens that it would get alone."""

from statistics import median
from typing import Any

import numpy as np
import pytest
import tiny
from tiny import CONTEXT, VOCABULARY

from lazulite.engine import array as mx
from lazulite.engine.errors import UserError
from lazulite.engine.generate import Engine, Sampling, Sequence, generate, stream_generate
from lazulite.engine.generate.pace import Pace
from lazulite.engine.generate.pages import PAGE
from lazulite.engine.generate.speculation import Lookup

rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny()


@pytest.fixture(scope="module")
def engine(model: Any) -> Engine:
    return Engine(model, max_sequences=4, max_step=24, cache_dtype=mx.float32)


def prompt(length: int) -> list[int]:
    return tiny.prompt(rng, length)


def run(engine: Engine, *sequences: Sequence) -> list[list[int]]:
    """The generated tokens of sequences that start together."""
    for sequence in sequences:
        engine.start(sequence)
    while running := [sequence for sequence in sequences if not sequence.finish_reason]:
        engine.step(running)
    for sequence in sequences:
        engine.release(sequence)
    return [sequence.tokens[sequence.prompt_length :] for sequence in sequences]


def test_greedy_tokens_are_those_of_the_whole_model_run_again_and_again(model: Any) -> None:
    tokens = prompt(11)
    engine = Engine(model, cache_dtype=mx.bfloat16)
    got = run(Engine(model), Sequence(tokens, Sampling(max_tokens=40)))[0]
    for i, token in enumerate(got):
        logits = tiny.logits(model, tokens + got[:i])
        assert logits[token] >= logits.max() - 1e-2, f"token {i}"
    assert len(run(engine, Sequence(tokens, Sampling(max_tokens=5)))[0]) == 5


ASKED = [  # prompt length, sampling
    (1, {}), (33, {}), (70, {}), (5, {"temp": 1.0, "seed": 1}),
    (40, {"temp": 0.8, "top_k": 20, "top_p": 0.9, "seed": 2}), (9, {"repetition_penalty": 1.5}),
    (31, {"temp": 1.0, "seed": 3, "presence_penalty": 1.0, "frequency_penalty": 0.5}),
]  # fmt: skip


def test_a_batch_of_ragged_sequences_gives_what_each_gives_alone(model: Any, engine: Engine) -> None:
    asked = [(prompt(length), Sampling(max_tokens=7 + length, **options)) for length, options in ASKED]
    solo = Engine(model, max_step=512, cache_dtype=mx.float32)
    alone = [run(solo, Sequence(tokens, sampling))[0] for tokens, sampling in asked]
    for first in (0, 3):
        together = run(engine, *(Sequence(tokens, sampling) for tokens, sampling in asked[first : first + 4]))
        for case, one, other in zip(asked[first:], alone[first:], together, strict=False):
            tiny.assert_same(model, *case, one, other)


def test_following_on_is_packing_anew(model: Any, engine: Engine) -> None:
    sampling = Sampling(max_tokens=80, temp=1.0, seed=4, repetition_penalty=1.3)
    tokens = prompt(3)
    followed = run(engine, Sequence(tokens, sampling))[0]
    sequence = Sequence(tokens, sampling)
    engine.start(sequence)
    while not sequence.finish_reason:
        engine.step([sequence])
        engine._last = []
    engine.release(sequence)
    assert sequence.tokens[3:] == followed


def test_a_cached_prefix_is_not_computed_again_and_changes_nothing(engine: Engine) -> None:
    tokens, sampling = prompt(90), Sampling(max_tokens=50)
    first = run(engine, Sequence(tokens, sampling))[0]
    again = Sequence(tokens, sampling)
    assert run(engine, again)[0] == first
    assert again.reused == 90 // PAGE * PAGE
    longer = Sequence(tokens + first + [1], sampling)  # as a chat goes on: 140 tokens, of which 139 were cached
    run(engine, longer)
    assert longer.reused == 139 // PAGE * PAGE
    assert not any(engine.pages.references)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.int8])
def test_every_cache_dtype_keeps_the_likely_tokens(model: Any, dtype: mx.Dtype) -> None:
    tokens = prompt(60)
    sequence = Sequence(tokens, Sampling(max_tokens=1))
    got = run(Engine(model, cache_dtype=dtype), sequence)[0][0]
    logits = tiny.logits(model, tokens).astype(np.float64)
    assert logits[got] >= logits.max() - 0.2
    logprob = logits[got] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert abs(sequence.logprob - logprob) < 0.1


@pytest.mark.parametrize("length", [0, CONTEXT, CONTEXT + 50])
def test_a_prompt_that_does_not_fit_is_refused(engine: Engine, length: int) -> None:
    with pytest.raises(UserError, match=f"the prompt has {length} tokens, wanted 1 to {CONTEXT - 1}"):
        engine.start(Sequence(prompt(length), Sampling()))


def test_an_answer_ends_where_the_context_ends(engine: Engine) -> None:
    sequence = Sequence(prompt(CONTEXT - 3), Sampling(max_tokens=100))
    assert len(run(engine, sequence)[0]) == 3
    assert sequence.finish_reason == "length"


def test_the_python_of_a_decode_step_is_short(engine: Engine) -> None:
    sequence, times = Sequence(prompt(4), Sampling(max_tokens=100)), []
    engine.start(sequence)
    for _ in range(101):
        before = engine.python_seconds
        engine.step([sequence])
        times.append(engine.python_seconds - before)
    engine.release(sequence)
    assert median(times) < 100e-6


class Letters:
    """A tokenizer whose tokens are single characters; token 0 ends a text."""

    eos_token_ids = {0}

    def encode(self, text: str) -> list[int]:
        return [ord(c) % VOCABULARY for c in text]

    def detokenizer(self) -> Any:
        return self

    def add(self, token: int) -> str:
        return f"{token:02}"

    def finish(self) -> str:
        return "."


def test_stream_generate_counts_and_ends(model: Any) -> None:
    responses = list(stream_generate(model, Letters(), "Hello", max_tokens=9, ignore_eos=True))
    last = responses[-1]
    assert [r.generated_tokens for r in responses] == list(range(1, 10))
    assert [r.finish_reason for r in responses] == [None] * 8 + ["length"]
    assert "".join(r.text for r in responses) == "".join(f"{r.token:02}" for r in responses) + "."
    assert last.prompt_tokens == 5 and last.prefill_tokens_per_second > 0 and last.decode_tokens_per_second > 0
    assert all(r.logprob < 0 for r in responses) and last.peak_memory_bytes > 1e6


def test_a_stop_string_ends_across_tokens(model: Any) -> None:
    whole = generate(model, Letters(), "Hello", max_tokens=9, ignore_eos=True)
    stop = whole[5:9]  # begins in the middle of a token
    responses = list(stream_generate(model, Letters(), "Hello", max_tokens=9, ignore_eos=True, stop=stop))
    assert "".join(r.text for r in responses) == whole[: whole.index(stop)]
    assert responses[-1].finish_reason == "stop"


def test_the_end_of_sequence_ends_unless_it_is_ignored(model: Any) -> None:
    tokens = [r.token for r in stream_generate(model, Letters(), "Hello", max_tokens=9, ignore_eos=True)]
    ends = Letters()
    ends.eos_token_ids = {tokens[4]}
    responses = list(stream_generate(model, ends, "Hello", max_tokens=9))
    assert len(responses) == tokens.index(tokens[4]) + 1 and responses[-1].finish_reason == "stop"
    assert "".join(r.text for r in responses) == "".join(f"{t:02}" for t in tokens[: len(responses) - 1]) + "."


def test_an_abandoned_stream_gives_its_pages_back(model: Any, engine: Engine) -> None:
    stream = stream_generate(model, Letters(), "Hello", engine=engine)
    next(stream)
    stream.close()
    assert not any(engine.pages.references)


def test_a_stream_takes_constraints_and_tells_the_likeliest(model: Any) -> None:
    spelled = [3, 1, 4, 1, 5]
    options = {"constraint": tiny.Spells(spelled), "top_logprobs": 3, "max_tokens": 9}
    responses = list(stream_generate(model, Letters(), "Hello", **options))
    assert [r.token for r in responses] == spelled and responses[-1].finish_reason == "stop"
    for r in responses:
        assert len(r.top) == 3 and all(r.top[0][1] >= logprob for logprob in (r.logprob, r.top[1][1], r.top[2][1]))


@pytest.mark.parametrize("options", [{}, {"temp": 1.0, "seed": 2}, {"stop": "37"}, {"frequency_penalty": 1}], ids=str)
def test_drafts_change_no_stream(model: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(Pace, "seconds", lambda self, decoded: 0.0)  # every draft seems to pay
    monkeypatch.setattr(Lookup, "draft", lambda self, tokens, most: (tokens + guess)[-most:])
    guess: list[int] = []
    engine, asked = Engine(model, cache_dtype=mx.float32), {"max_tokens": 40, "ignore_eos": True, **options}
    plain = list(stream_generate(model, Letters(), "Hello", engine=engine, speculate=False, **asked))
    assert not engine.drafted
    engine.pages.forget(range(len(engine.pages.references)))
    guess = [r.token for r in plain[20:23]]  # right once, at the twentieth token
    drafted = list(stream_generate(model, Letters(), "Hello", engine=engine, **asked))
    assert engine.drafted and len(drafted) == len(plain)
    for one, other in zip(drafted, plain, strict=True):
        assert one._replace(logprob=0)[:8] == other._replace(logprob=0)[:8]
        assert abs(one.logprob - other.logprob) < 1e-4

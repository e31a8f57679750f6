"""The engine on the emulated GPU: its own test suite, a model of every kind, the command and the server.

Left out of the engine's suite: what runs no kernel or asks the CPU's runtime by name (devices, golden plans, names,
files, GGML's formats, exchange with NumPy), what measures time (that Python goes on while native code runs), and for
time test_cases, test_ops and test_transforms, which `LAZULITE_METAL=emulated LAZULITE_DEVICE=gpu pytest tests/array`
runs. float64, complex numbers, sorting, scans, linear algebra and convolutions run on the CPU over the same memory.
"""
from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lazulite.engine import array as mx
from lazulite.engine.generate import Engine, Sampling, Sequence
from lazulite.models import build, read

TESTS = Path(__file__).parents[1]
GPU = {"LAZULITE_METAL": "emulated", "LAZULITE_DEVICE": "gpu"}
sys.path[:0] = [str(TESTS / "models"), str(TESTS / "generate")]

import families  # noqa: E402
import tiny  # noqa: E402

_spec = importlib.util.spec_from_file_location("server_conftest", TESTS / "server" / "conftest.py")
assert _spec and _spec.loader
serving = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(serving)
folder, start = serving.folder, serving.start                    # fixtures: a tiny model with the real tokenizer


SUITES = {
    "arrays": ["array/test_fast.py", "array/test_indexing.py", "array/test_training_step.py", "array/test_threads.py",
               "-k", "not python_goes_on"],
    "plans": ["array/test_compile.py", "array/test_leaks.py", "array/test_random.py"],
    "layers": ["nn/test_layers.py", "nn/test_losses.py"],
    "training": ["nn/test_port.py", "optimizers"],
}


@pytest.fixture(scope="module")
def runs() -> dict[str, subprocess.Popen[str]]:
    """All at once: each mostly waits for one compiler."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return {name: subprocess.Popen([*command, *files], cwd=TESTS, env=os.environ | GPU, **pipes)
            for name, files in SUITES.items()}


@pytest.mark.parametrize("name", SUITES)
def test_the_engines_own_tests(name: str, runs: dict[str, subprocess.Popen[str]]) -> None:
    output, _ = runs[name].communicate(timeout=900)
    assert runs[name].returncode == 0 and " passed" in output, output[-6000:]


KINDS = {  # rows of families.py: what they show
    "biases": "biases of every product",
    "gpt_oss": "sinks, windows, mixtures of experts with biases",
    "gemma2": "soft caps, windows, norms around blocks, a scaled embedding",
    "qwen3": "norms of q and k",
    "qwen3_moe": "experts",
    "qwen3_5": "gated delta rule and convolutions beside attention",
    "phi3 partial": "part of a head turns",
    "one kv head": "all heads read one",
}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_of_each_kind_is_the_cpus(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a prompt and of three tokens after it, in parts of the largest: float32 sums in another order."""
    monkeypatch.setenv("LAZULITE_METAL", "emulated")
    kind, config = families.ROWS[name]
    families.reference(tmp_path, kind, **config)
    ids = np.random.default_rng(0).integers(0, families.TINY["vocab_size"], 40).tolist()
    rows = []
    for device in (mx.cpu, mx.gpu):
        with mx.stream(device):
            session = families.Session(build(read(tmp_path)), mx.float32)
            rows.append(np.concatenate([session(ids[:37]), *(session([i]) for i in ids[37:])]))
    assert np.abs(rows[1] - rows[0]).max() <= 2e-5 * np.abs(rows[0]).max()
    assert (rows[0].argmax(1) == rows[1].argmax(1)).all()


def conversation(device: mx.DeviceType) -> tuple[list[list[int]], int]:
    """Sequences that come and end at different times, one at random, one under a constraint, one with penalties; their
    tokens, and how often a step was under way when the one before it was read."""
    with mx.stream(device):
        engine, ahead = Engine(tiny.tiny(), max_sequences=4, cache_dtype=mx.float32), 0
        settings = [(9, {}), (40, {}), (14, dict(temp=1.0, seed=5)), (6, {}), (8, dict(frequency_penalty=0.5))]
        sequences = [Sequence(tiny.prompt(np.random.default_rng(i), 29 + i), Sampling(max_tokens=n, **options))
                     for i, (n, options) in enumerate(settings)]
        sequences[3].constraint = tiny.Spells([5, 6, 7, 8, 9, 10])
        waiting, running = sequences[2:], sequences[:2]
        for sequence in running:
            engine.start(sequence)
        while running:
            engine.step(running)
            ahead += engine._ahead is not None
            for sequence in [s for s in running if s.finish_reason]:
                running.remove(sequence)
                engine.release(sequence)
            if waiting and len(sequences[1].tokens) % 4 == 0:
                running.append(waiting.pop())
                engine.start(running[-1])
        return [s.tokens for s in sequences], ahead


def test_a_step_starts_before_the_one_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZULITE_METAL", "emulated")
    wanted, never = conversation(mx.cpu)
    found, ahead = conversation(mx.gpu)
    assert found == wanted and never == 0 and ahead > 15


def llm(*arguments: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "lazulite.cli", *arguments, "--json"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_command_and_the_server_say_what_they_say_on_the_cpu(folder: Path, start: Callable[..., Any]) -> None:
    question = ["-m", str(folder), "-p", "Why is the sky blue?", "--temp", "0", "--max-tokens", "12"]
    answers = [llm("generate", *question, **environment) for environment in ({}, GPU)]
    assert answers[0]["tokens"] == answers[1]["tokens"] and len(answers[1]["tokens"]) > 1
    body = {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "temperature": 0, "max_tokens": 12}
    with start(**GPU) as server:
        request = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            said = json.load(answer)["choices"][0]["message"]["content"]
    assert said == answers[1]["text"]


def test_the_bench_measures_the_gpu(folder: Path) -> None:
    found = llm("bench", "-m", str(folder), "-p", "16", "-g", "4", "-r", "1", **GPU)
    assert found["isa"] == "emulated" and [row["test"] for row in found["results"]] == ["pp16", "tg4"]
    assert all(row["tokens_per_second"] > 0 for row in found["results"])


@pytest.mark.slow
def test_the_default_models_words_are_the_cpus() -> None:
    """SmolLM2-135M, greedy, 8 tokens: minutes of emulation."""
    question = ["generate", "-p", "What is the capital of France?", "--temp", "0", "--max-tokens", "8"]
    assert llm(*question, **GPU)["tokens"] == llm(*question)["tokens"]

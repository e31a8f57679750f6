"""SmolLM2-135M-Instruct, the default model, held against transformers on the same dequantized weights."""
import runpy
from pathlib import Path

import numpy as np
import pytest
import smollm2
import torch

from lazulite.engine import array as mx
from lazulite.engine.generate import Engine, stream_generate
from lazulite.models import load, read

TIE = 1e-3  # of a logit: closer than this, either token is right
PROMPTS = [
    "The capital of France is", "Water boils at", "def fibonacci(n):", "Once upon a time, in a village by the sea,",
    "The three primary colors are", "To be, or not to be,", "2 + 2 =", "The Industrial Revolution began in",
    "Dear Sir or Madam,\n\nI am writing to", "Photosynthesis is the process by which",
]


@pytest.fixture(scope="module")
def ours():
    return load()


@pytest.fixture(scope="module")
def theirs():
    return smollm2.in_torch()


def logits_of(model, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


def test_logits(ours, theirs) -> None:
    model, tokenizer = ours
    ids = tokenizer.encode("The quick brown")  # few enough tokens for activations of 14 bits
    wanted = logits_of(theirs, ids)
    assert len(ids) == 3
    error = np.abs(np.asarray(model(mx.array(ids, dtype=mx.int32))) - wanted).max()
    assert error <= 3e-3 * np.abs(wanted).max()


@pytest.fixture(scope="module")
def engines(ours):
    """The engine whose steps are small enough for activations of 14 bits, and the one that reads prompts with 8."""
    return {name: Engine(ours[0], max_context=128, max_step=step) for name, step in (("exact", 4), ("fast", 512))}


@pytest.mark.parametrize(("kind", "prompt"), [("exact", p) for p in PROMPTS] + [("fast", p) for p in PROMPTS[:4]])
def test_greedy_tokens(kind: str, prompt: str, ours, theirs, engines) -> None:
    """Each of 64 tokens is the one that transformers finds likeliest after the same tokens, or close to it."""
    model, tokenizer = ours
    ids = tokenizer.encode(prompt)
    answer = stream_generate(
        model, tokenizer, prompt, engine=engines[kind], max_tokens=64, temp=0.0, ignore_eos=True
    )
    tokens = [response.token for response in answer]
    wanted = logits_of(theirs, ids + tokens)[len(ids) - 1 : -1]
    behind = wanted.max(1) - wanted[np.arange(len(tokens)), tokens]
    ties = {i: float(x) for i, x in enumerate(behind) if x}
    print(f"{kind} {prompt!r}: ties {ties}")
    assert len(tokens) == 64 and behind.max() <= {"exact": TIE, "fast": 0.3}[kind], ties


@pytest.mark.slow
def test_divergence_from_float32_activations() -> None:
    """The bars of issue 2, over 2,000 tokens of real text."""
    accuracy = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "accuracy.py"))
    files = read()
    ids = files.tokenizer().encode(accuracy["sample_text"]())[:2000]
    found = accuracy["measure"](files, ids)
    print(found)
    assert found["decode_kl"] <= 1e-5 and found["prefill_kl"] <= 1e-3 and found["prefill_top1"] >= 0.99

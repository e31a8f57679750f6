"""The default model under the scheduler. Its weights are quantized, so the number of tokens of a step chooses how sums
are taken, and a near tie may turn: where two greedy texts part, their tokens' logits are close."""

from queue import Queue
from typing import Any

import numpy as np
import pytest

from lazulite.engine import array as mx
from lazulite.engine.generate import Request, Sampling, Scheduler, Token, stream_generate
from lazulite.models import load

QUESTIONS = [
    "What is the capital of France?",
    "Why is the sky blue?",
    "Count: 1, 2, 3, 1, 2, 3, 1, 2, 3,",
    "Write a haiku about rain.",
]
NEAR = 0.3  # of logits; those of the second token are a few units behind elsewhere
OPTIONS: dict[str, Any] = {"max_tokens": 16, "temp": 0.0}


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load()


def encode(tokenizer: Any, question: str) -> list[int]:
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def collect(answer: "Queue[Any]") -> tuple[list[int], Any]:
    ids: list[int] = []
    while isinstance(event := answer.get(timeout=60), Token):
        ids.append(event.id)
    return ids, event


def test_together_cached_and_drafted_is_alone(loaded: Any) -> None:
    model, tokenizer = loaded
    prompts = [encode(tokenizer, question) for question in QUESTIONS]
    alone = [[r.token for r in stream_generate(model, tokenizer, p, speculate=False, **OPTIONS)] for p in prompts]
    scheduler = Scheduler(model, max_running=5, max_context=512)
    for cached in (False, True):
        answers: list[Queue[Any]] = [Queue() for _ in prompts for _ in range(2)]
        for i, answer in enumerate(answers):
            request = Request(prompts[i // 2], Sampling(**OPTIONS), tokenizer.eos_token_ids, answer.put)
            scheduler.submit(request)
        together, ends = zip(*map(collect, answers), strict=True)
        assert sum(end.cached_tokens for end in ends) >= 32 * len(prompts) * (2 if cached else 1)
        for i, ids in enumerate(together):
            prompt, one = prompts[i // 2], alone[i // 2]
            parted = next((at for at, pair in enumerate(zip(one, ids, strict=False)) if len(set(pair)) == 2), None)
            if parted is not None:
                logits = np.asarray(model(mx.array(prompt + one[:parted], dtype=mx.int32)))[-1]
                assert abs(logits[one[parted]] - logits[ids[parted]]) < NEAR
    scheduler.close()

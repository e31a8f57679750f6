"""What OpenAI's chat and completions share: answers told as numbered choices, whole or in chunks."""

from time import time
from typing import Any, ClassVar
from uuid import uuid4

from .errors import ApiError
from .generation import Event, Generation
from .service import Service
from .stream import Answer, data, dumps

LEAST = -9999.0  # stands for a logprob of minus infinity, which JSON does not have


class ChoicesWriter:
    """Events with one choice each. The parts that never change are written once."""

    PREFIX: ClassVar[str]  # of ids
    WHOLE: ClassVar[str]  # the object's name
    CHUNK: ClassVar[str]  # and that of a part

    def __init__(self, body: Any, generation: Generation, service: Service) -> None:
        self.body, self.generation, self.service = body, generation, service
        created, model = int(time()), body.model or service.names[0]
        self.about = {"id": f"{self.PREFIX}-{uuid4().hex}", "created": created, "model": model}
        self.head = dumps({**self.about, "object": self.CHUNK})[:-1]
        self.tail = ',"usage":null}\n\n' if body.usage_wanted else "}\n\n"
        self.answers = [Answer() for _ in generation.choices]

    def chunk(self, index: int, said: str, logprobs: str = "null", reason: str | None = None) -> str:
        """said: the field that tells what is new, as JSON."""
        ended = f'"{reason}"' if reason else "null"
        choice = f'{{"index":{index},{said},"logprobs":{logprobs},"finish_reason":{ended}}}'
        return f'data: {self.head},"choices":[{choice}]{self.tail}'

    def ping(self) -> str:
        return ": ping\n\n"

    def end(self) -> str:
        if not self.body.usage_wanted:
            return "data: [DONE]\n\n"
        return f'data: {self.head},"choices":[],"usage":{dumps(usage(self.generation))}}}\n\ndata: [DONE]\n\n'

    def failed(self, error: ApiError) -> str:
        return data(error.openai()) + "data: [DONE]\n\n"

    def take(self, event: Event) -> None:
        self.answers[event.choice].add(event)

    def whole(self) -> dict[str, Any]:
        choices = [
            {"index": i, **self.choice(i, answer), "finish_reason": answer.reason}
            for i, answer in enumerate(self.answers)
        ]
        return {**self.about, "object": self.WHOLE, "choices": choices, "usage": usage(self.generation)}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """What it said, and its logprobs."""
        raise NotImplementedError


def usage(generation: Generation) -> dict[str, Any]:
    prompt, cached, answer, reasoning = generation.usage()
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }

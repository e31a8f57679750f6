"""POST /v1/completions: raw text or token ids go on without a chat template. Source: OpenAI's OpenAPI document."""

from math import isnan
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..engine.generate.scheduler import Token
from . import schemas
from .choices import LEAST, ChoicesWriter
from .generation import Event, Generation
from .schemas import Refused, Sampled, Text, TokenId
from .service import Job, Service
from .stream import Answer, dumps

Ids = Annotated[list[TokenId], Field(min_length=1)]
Prompts = Annotated[list[Text | Ids], Field(min_length=1, max_length=64)]


def several(prompt: Any) -> Any:
    """A list of prompts, of one prompt."""
    alone = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int))
    return [prompt] if alone else prompt


class CompletionRequest(Sampled):
    prompt: Annotated[Prompts, BeforeValidator(several, json_schema_input_type=Text | Ids | Prompts)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    suffix: Refused = None

    def job(self) -> Job:
        sampling = schemas.sampling(self)
        if self.logprobs is not None:
            sampling["top_logprobs"] = self.logprobs
        most = 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default
        told = bool(self.echo and self.logprobs is not None)
        return Job(
            self.model, sampling, prompts=self.prompt, n=self.n or 1, max_tokens=most, prompt_logprobs=told
        )  # fmt: skip


class CompletionWriter(ChoicesWriter):
    """text_completion events."""

    PREFIX, WHOLE, CHUNK = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: CompletionRequest, generation: Generation, service: Service) -> None:
        super().__init__(body, generation, service)
        self.offsets = [0] * len(self.answers)

    def begin(self) -> str:
        """The prompts, unless they are to come with their logprobs."""
        now = self.body.echo and self.body.logprobs is None
        return "".join(self.chunk(i, self.text(self.echoed(i))) for i in range(len(self.answers)) if now)

    def echoed(self, index: int) -> str:
        """The prompt again, if that was asked for."""
        prompt = self.body.prompt[index // (self.body.n or 1)] if self.body.echo else ""
        return prompt if isinstance(prompt, str) else self.service.tokenizer.decode(prompt, skip_special_tokens=False)

    def text(self, text: str) -> str:
        return f'"text":{dumps(text)}'

    def event(self, event: Event) -> str:
        text, logprobs = "".join(piece.text for piece in event.pieces), "null"
        tokens = [*event.told, *filter(None, [event.token])]
        if self.body.logprobs is not None and tokens:
            rows = spelled(self.service.tokenizer, tokens, self.offsets[event.choice])
            self.offsets[event.choice] += sum(map(len, rows["tokens"]))
            text, logprobs = (self.echoed(event.choice) if event.told else text), dumps(rows)
        if not (text or event.reason or logprobs != "null"):
            return ""
        return self.chunk(event.choice, self.text(text), logprobs, event.reason)

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        logprobs = None if self.body.logprobs is None else spelled(self.service.tokenizer, answer.tokens)
        return {"text": self.echoed(index) + answer.text, "logprobs": logprobs}


def spelled(tokenizer: Any, tokens: list[Token], offset: int = 0) -> dict[str, Any]:
    """The older shape of logprobs: four lists side by side, offsets in characters of the text."""

    def name(id: int) -> str:
        return tokenizer.piece(id).decode("utf-8", "replace")

    def bounded(logprob: float) -> float | None:
        return None if isnan(logprob) else max(logprob, LEAST)

    names, offsets = [name(token.id) for token in tokens], list[int]()
    for spelling in names:
        offsets.append(offset)
        offset += len(spelling)
    return {
        "tokens": names,
        "token_logprobs": [bounded(token.logprob) for token in tokens],
        "top_logprobs": [{name(id): bounded(value) for id, value in token.top} for token in tokens],
        "text_offset": offsets,
    }

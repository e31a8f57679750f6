"""One model and its adapters under their public names, and the way of a request to the engine."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import time
from typing import Any, NamedTuple

from ..engine.errors import UserError
from ..engine.generate import Sampling
from . import tools as calls
from .errors import ApiError, refused, too_long
from .generation import Choice, Generation, Mailbox
from .grammars import budgeted, compiler, constrain
from .metrics import Metrics
from .prompts import render

PATIENCE = 30.0  # seconds that rendering, tokenizing and compiling one request may take


@dataclass
class Job:
    """What a request wants of the model, whichever API it came by.

    messages go through the chat template; prompts are raw text or token ids. `limit` is the field that asked for
    max_tokens. budget: how many of them may be thinking. fit: an answer longer than the context has room for is cut,
    not refused.
    """

    model: str | None
    sampling: dict[str, Any]
    messages: list[dict[str, Any]] | None = None
    prompts: list[str | list[int]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    choice: str | dict[str, Any] = "auto"
    parallel: bool = True
    format: dict[str, Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    n: int = 1
    prompt_logprobs: bool = False
    max_tokens: int | None = None
    budget: int | None = None
    limit: str = "max_tokens"
    fit: bool = False


class Prompt(NamedTuple):
    text: str
    ids: list[int]


class Service:
    """names: the model's, the first of them shown; adapters: theirs; defaults: the model's own sampling."""

    def __init__(
        self, model: Any, tokenizer: Any, scheduler: Any, names: list[str], *, adapters: tuple[str, ...] = (),
        generation_config: dict[str, Any] | None = None, timeout: float | None = None, max_queued: int = 64,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.scheduler = model, tokenizer, scheduler
        self.timeout, self.max_queued = timeout, max_queued
        self.names, self.adapters, self.created = names, adapters, int(time())
        config = model.config
        self.vocab, self.trained = min(config.vocab_size, tokenizer.vocab_size), config.max_position_embeddings
        self.context = scheduler.max_context
        self.longest = max(len(tokenizer.piece(id)) for id in range(self.vocab))  # bytes of a token
        self.defaults = {"temp": 1.0, **advised(generation_config or {})}
        self.registry: dict[str, str | None] = dict.fromkeys(names)
        self.registry |= {name: a for a in adapters for name in (a, *(f"{base}:{a}" for base in names))}
        self.threads = ThreadPoolExecutor(2, "prepare")
        self.threads.submit(compiler, tokenizer)  # reads the vocabulary before anybody waits for it
        self.preparing = 0
        self.draining = False
        self.metrics = Metrics(scheduler)
        self.mailbox: Mailbox | None = None

    # -- names

    def adapter(self, name: str | None) -> str | None:
        """The adapter that a model name stands for; None: the model alone."""
        if name is None:
            return None
        if name not in self.registry:
            message = "The model does not exist here; GET /v1/models lists those that do"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.registry[name]

    def models(self) -> list[dict[str, Any]]:
        """The rows of /v1/models: every spelling of the context length that clients look for."""
        sizes = {name: self.context for name in ("max_model_len", "context_length", "context_window")}
        meta = {"n_ctx": self.context, "n_ctx_train": self.trained, "n_vocab": self.vocab}
        rest = {"object": "model", "created": self.created, "owned_by": "lazulite", **sizes, "meta": meta}
        rows = [{"id": name, **rest, "root": self.names[0], "parent": None} for name in self.names]
        return rows + [{"id": name, **rest, "root": name, "parent": self.names[0]} for name in self.adapters]

    # -- from a job to a generation

    async def start(self, ask: Callable[[], Job]) -> Generation:
        """The job that a body asks for, in the engine's queue. Raises ApiError."""
        self.check_alive()
        choices, requests, prompt_tokens = await self.work(self.prepare, ask)
        self.check_alive()
        generation = Generation(self.post(), self.scheduler, choices, prompt_tokens)
        generation.submit(requests)
        return generation

    def post(self) -> Mailbox:
        """The running event loop's mailbox."""
        if self.mailbox is None or self.mailbox.loop is not asyncio.get_running_loop():
            self.mailbox = Mailbox()
            self.pinging = asyncio.create_task(self.mailbox.ping())
        return self.mailbox

    def check_alive(self) -> None:
        if self.draining:
            raise ApiError(503, "The server is shutting down", code="shutting_down", retry_after=10)
        if not self.scheduler.alive:
            raise ApiError(503, "The engine does not answer", code="engine_stuck", retry_after=10)

    async def work(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs what takes time on a thread: the event loop never renders, tokenizes or compiles."""
        if self.preparing >= self.max_queued:
            raise ApiError(429, "The server is busy: too many requests are being read", retry_after=1)
        self.preparing += 1
        try:
            future = asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)
            return await asyncio.wait_for(future, PATIENCE)
        except TimeoutError:
            raise ApiError(400, f"Reading the request took over {PATIENCE:g} s", code="too_complex") from None
        except UserError as error:
            raise refused(error) from None
        finally:
            self.preparing -= 1

    def prepare(self, ask: Callable[[], Job]) -> tuple[list[Choice], list[dict[str, Any]], int]:
        """Choices and the scheduler's requests: for each prompt, n of them."""
        job = ask()
        adapter = self.adapter(job.model)
        self.check_tokens(job.sampling.get("logit_bias", ()), "logit_bias")
        prompts, param = self.prompts(job), "prompt" if job.messages is None else "messages"
        if not all(prompt.ids for prompt in prompts):
            raise ApiError(400, f"{param} makes no token", param=param)
        most = self.context - max(len(prompt.ids) for prompt in prompts)
        wanted = job.max_tokens or 0
        if most < 1 or (wanted > most and not job.fit):
            raise too_long(self.context - most, wanted, self.context, param if most < 1 else job.limit)
        settings = {**self.defaults, **job.sampling, "max_tokens": min(wanted or most, most)}
        choices, requests = [], []
        for number in range(len(prompts) * job.n):
            prompt = prompts[number // job.n]
            if (seed := job.sampling.get("seed")) is not None:
                settings["seed"] = seed + number % job.n
            sampling = Sampling(**settings)
            constraint: Any = self.constraint(job, prompt)
            choices.append(self.choice(number, job, prompt, sampling, constraint is not None))
            if job.budget:
                constraint = budgeted(self.tokenizer, prompt.text, job.budget, constraint)
            requests.append({"prompt": prompt.ids, "sampling": sampling, "eos": self.tokenizer.eos_token_ids,
                             "adapter": adapter, "constraint": constraint, "timeout": self.timeout,
                             "prompt_logprobs": job.prompt_logprobs})  # fmt: skip
        return choices, requests, sum(len(prompt.ids) for prompt in prompts)

    def prompts(self, job: Job) -> list[Prompt]:
        if job.messages is not None:
            text = self.render(job.messages, job.tools if job.choice != "none" else None, job.variables)
            return [Prompt(text, self.encode(text, False))]
        for prompt in job.prompts:
            self.check_tokens(prompt if isinstance(prompt, list) else (), "prompt")
        return [Prompt("", self.encode(p, param="prompt") if isinstance(p, str) else p) for p in job.prompts]

    def render(self, messages: list[dict[str, Any]], tools: Any, variables: dict[str, Any]) -> str:
        with blamed("messages"):
            return render(self.tokenizer, messages, tools, **variables)

    def encode(self, text: str, special: bool = True, param: str = "messages") -> list[int]:
        """Token ids; text that cannot fit, at the longest token's length, is refused before it costs anything."""
        least = len(text) // self.longest
        if least > self.context:
            raise too_long(least, 0, self.context, param)
        return self.tokenizer.encode(text, special)

    def constraint(self, job: Job, prompt: Prompt) -> Any:
        if job.messages is None or not (job.format or job.tools):
            return None
        with blamed("response_format" if job.format else "tools"):
            return constrain(
                self.tokenizer, prompt=prompt.text, format=job.format, tools=job.tools, choice=job.choice,
                parallel=job.parallel,
            )  # fmt: skip

    def choice(self, number: int, job: Job, prompt: Prompt, sampling: Sampling, constrained: bool) -> Choice:
        eos = self.tokenizer.eos_token_ids
        if job.messages is None:
            return Choice(number, prompt.ids, eos, self.tokenizer.detokenizer(), sampling.stop, None)
        tools = job.tools if job.choice != "none" else None
        parser = calls.parser(self.tokenizer, prompt.text, tools, parallel=job.parallel, constrained=constrained)
        detokenizer = self.tokenizer.detokenizer(shown=calls.markers(self.tokenizer))
        return Choice(number, prompt.ids, eos, detokenizer, sampling.stop, parser)

    def check_tokens(self, ids: Any, param: str) -> None:
        if (worst := max(ids, default=0)) >= self.vocab:
            raise ApiError(400, f"{param}: token {worst} is not in the vocabulary of {self.vocab}", param=param)


def advised(generation_config: dict[str, Any]) -> dict[str, Any]:
    """Sampling as the model's makers advise."""
    names = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repetition_penalty"}
    known = generation_config if generation_config.get("do_sample") else {}
    return {ours: known[theirs] for theirs, ours in names.items() if known.get(theirs)}


@contextmanager
def blamed(param: str) -> Iterator[None]:
    """What is refused inside is the fault of this field."""
    try:
        yield
    except UserError as error:
        raise refused(error, param) from None

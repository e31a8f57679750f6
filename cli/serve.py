"""`llm serve`: the model over HTTP, for editors, agents and apps."""

import sys
from pathlib import Path
from typing import Any

import click

from ..engine.errors import UserError
from . import options

PAIR = "NAME=DIR"


class Adapter(click.ParamType):
    """A public name and the folder it stands for."""

    name = PAIR

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        name, _, folder = value.partition("=")
        if not (name and folder):
            self.fail(f"{value!r} is not {PAIR}", param, ctx)
        return name, folder


@click.command(name="serve", context_settings={"show_default": True})
@options.model
@click.option("--name", "names", multiple=True, metavar="NAME", show_default="its own",
              help="The model's name for clients; may be repeated.")
@click.option("--adapter", "adapters", type=Adapter(), multiple=True,
              help="Also serve the model with this adapter, as NAME; may be repeated.")
@click.option("--host", default="127.0.0.1", help="Address to listen on. Other machines only reach it if this is "
              "changed, and that needs a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, help="Port to listen on; 0: any free one.")
@click.option("--api-key", "keys", multiple=True, metavar="KEY", envvar="LAZULITE_API_KEY", show_default="none",
              help="Asked of every request but /health, as Bearer or x-api-key; may be repeated. The environment's "
              "LAZULITE_API_KEY keeps it out of the list of processes.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", show_default="this machine's own names",
              help="A name in the Host header that is also served; may be repeated.")
@click.option("--allow-origin", "origins", multiple=True, metavar="ORIGIN", show_default="none",
              help="A web page's origin that may use the server (CORS), as http://localhost:3000; may be repeated.")
@click.option("--context", type=click.IntRange(64), show_default="what the model was made for",
              help="Most tokens of prompt and answer together.")
@click.option("--max-running", type=click.IntRange(1, 256), default=16, help="Requests that run at once.")
@click.option("--max-queued", type=click.IntRange(1), default=64,
              help="Requests that may wait; more are refused with status 429.")
@click.option("--cache-mb", type=click.IntRange(1), show_default="enough for every running request",
              help="Memory for keys and values, shared by all requests.")
@click.option("--speculate/--no-speculate", default=True, help="Guess tokens from the text so far, where it pays.")
@click.option("--timeout", type=click.FloatRange(1), default=600.0,
              help="Seconds that a request may take, waiting included.")
@click.option("--drain-seconds", type=click.FloatRange(0), default=30.0,
              help="Seconds that running requests have to end after SIGTERM or Ctrl-C.")
@click.option("--stuck-seconds", type=click.FloatRange(1), default=60.0,
              help="A step of the engine that takes longer ends the server with exit code 1.")
@click.option("--max-body-mb", type=click.IntRange(1, 1024), default=32, help="Most of a request's body.")
@click.option("-v", "--verbose", is_flag=True, help="A line on stderr for each request: its path, never its text.")
def command(
    name: str | None, names: tuple[str, ...], adapters: tuple[tuple[str, str], ...], host: str, port: int,
    keys: tuple[str, ...], hosts: tuple[str, ...], origins: tuple[str, ...], max_body_mb: int, drain_seconds: float,
    verbose: bool, **limits: Any,
) -> None:  # fmt: skip
    """Serves a model over HTTP: OpenAI's chat completions, completions and responses, and Anthropic's messages.

    Only this machine can reach it unless --host says otherwise. Nothing is fetched for a request, no prompt is
    logged, and clients can name only the model and the adapters given here.
    """
    check_exposure(host, keys)
    if len(dict(adapters)) < len(adapters):
        raise click.UsageError("two adapters have one name")
    from ..server.run import listen, serve
    from ..server.safety import Guard

    listener = listen(host, port)
    service = load(name, names, dict(adapters), **limits)
    guard = Guard(host, keys, hosts, origins, max_body_mb * 2**20)
    bound = listener.getsockname()[1]
    url = f"http://{f'[{host}]' if ':' in host else host}:{bound}"
    click.echo(f"serving {', '.join(service.registry)} at {url}/v1, {service.context} tokens of context", err=True)
    sys.exit(serve(service, guard, listener, drain_seconds=drain_seconds, verbose=verbose))


def check_exposure(host: str, keys: tuple[str, ...]) -> None:
    """A server that other machines reach has a key, and keys are not empty."""
    from ..server.safety import is_loopback

    if any(not key.strip() for key in keys):
        raise click.UsageError("an API key is empty")
    if not (is_loopback(host) or keys):
        what = f"--host {host} lets other machines in: it needs --api-key KEY, or LAZULITE_API_KEY in the environment"
        raise click.UsageError(what)


def load(
    name: str | None, names: tuple[str, ...], adapters: dict[str, str], *, context: int | None, max_running: int,
    max_queued: int, cache_mb: int | None, speculate: bool, timeout: float, stuck_seconds: float,
) -> Any:  # fmt: skip
    """The model with its adapters behind a scheduler, under their public names."""
    from ..engine.generate.scheduler import Scheduler
    from ..server.service import Service

    model, tokenizer, generation_config, _ = options.load(name)
    public = list(names) or [public_name(name)]
    if taken := set(adapters) & set(public):
        raise UserError(f"--adapter {min(taken)}: the model itself has this name", "give the adapter another one")
    if adapters:
        from ..lora import serving

        serving.attach(model, adapters)
    scheduler = Scheduler(
        model, max_running=max_running, max_queued=max_queued, max_context=context, speculate=speculate,
        cache_bytes=cache_mb and cache_mb * 2**20, stuck_seconds=stuck_seconds,
    )  # fmt: skip
    return Service(
        model, tokenizer, scheduler, public, adapters=tuple(adapters), generation_config=generation_config,
        timeout=timeout, max_queued=max_queued,
    )  # fmt: skip


def public_name(name: str | None) -> str:
    """A repo id is its own name; a folder or a file gives its last part, never its path."""
    if name is None:
        return "SmolLM2-135M-Instruct"
    path = Path(name)
    return path.resolve().name.removesuffix(".gguf") if path.exists() else name

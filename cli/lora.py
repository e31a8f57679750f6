"""`llm lora`: fine-tuning, from rows of data to an adapter."""

import signal
import sys
import time
from contextlib import contextmanager
from typing import Any

import click

from ..engine.errors import UserError
from . import INTERRUPTED, options

SHORT = {"model": ("-m", "--model"), "checkpoint": ("--checkpoint",)}


class Flags(click.Command):
    """A command whose flags are the fields of lora.settings.Settings, made when they are asked for."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not any(param.name == "rank" for param in self.params):
            self.params += fields()
        return super().get_params(ctx)


def fields() -> list[click.Parameter]:
    """A flag for each field. What is not given is None, so that a file's value holds."""
    import dataclasses

    from ..lora.settings import KINDS, Settings

    found: list[click.Parameter] = []
    for f in dataclasses.fields(Settings):
        kind, names = KINDS[f.name], SHORT.get(f.name, (f"--{f.name.replace('_', '-')}",))
        several = kind is bool or kind not in (str, int, float)
        extra: dict[str, Any] = {"is_flag": True} if kind is bool else {"multiple": True} if several else {"type": kind}
        if choices := f.metadata.get("choices"):
            extra = {"type": click.Choice(choices)}
        default = f"  [default: {f.default}]" if not several and f.default not in ("", 0) else ""
        found.append(click.Option([f.name, *names], default=None, help=f.metadata["help"] + default, **extra))
    return found


@click.command(name="lora", cls=Flags)
@click.option("--config", metavar="FILE", help="A YAML file of these options.")
def command(config: str | None, **flags: Any) -> None:
    """Fine-tunes a model on your rows: LoRA on any weights, quantized too, or with --full the weights themselves.

    Ctrl-C saves; --resume goes on from there, and from where a crash left it.
    """
    from ..lora import memory

    before = memory.resident()
    chosen = merged(config, {name: value for name, value in flags.items() if value not in (None, (), False)})
    weights = options.load(chosen.model or None)
    if chosen.show:
        return show(chosen, weights.tokenizer)
    from ..lora.session import Session

    with stoppable() as stop, Screen() as screen:
        session = Session(chosen, weights.model, weights.tokenizer, screen.listen, before)
        introduce(session)
        session.run(lambda: bool(stop))
    if stop:
        click.echo(f"stopped and saved at step {session.progress.step}: "
                   f"llm lora --resume --adapter {chosen.adapter} goes on", err=True)
        sys.exit(INTERRUPTED)
    click.echo(chosen.adapter)


def merged(config: str | None, flags: dict[str, Any]) -> Any:
    """Settings of the file, then of the flags; of a resumed run the saved ones, which only a few may change."""
    from pathlib import Path

    from ..lora import settings, state

    given = settings.from_yaml(config) if config else {}
    given |= settings.of({name: pairs(name, value) for name, value in flags.items()}, "llm lora")
    if not given.get("resume"):
        return settings.Settings(**given).check()
    folder = Path(given.get("adapter", settings.Settings.adapter))
    saved = state.read(folder).settings
    for name, value in given.items():
        if name not in (*settings.LATER, "resume", "adapter") and saved.get(name) != value:
            raise UserError(f"[lora] {name} is {value!r}, the saved run has {saved.get(name)!r}",
                            f"a resumed run can change: {', '.join(settings.LATER)}")
    return settings.Settings(**{**saved, **given}).check()


def pairs(name: str, value: Any) -> Any:
    """NAME=VALUE flags as a mapping, their values as YAML reads them."""
    from ..lora.settings import KINDS

    if not isinstance(value, tuple):
        return value
    if KINDS[name] == list[str]:
        return list(value)
    import yaml

    parts = [text.partition("=") for text in value]
    if bad := next((text for text, part in zip(value, parts, strict=True) if not part[1]), None):
        raise click.UsageError(f"--{name.replace('_', '-')} {bad!r}: NAME=VALUE wanted")
    return {key: yaml.safe_load(text) for key, _, text in parts}


def introduce(session: Any) -> None:
    """What is going to happen: layers, rows, memory."""
    for split, tally in session.tallies.items():
        click.echo(f"{split}: {tally}", err=True)
    trained = sum(leaf.size for leaf in session.trainer.leaves.values())
    leaves = sorted({path.rpartition(".")[2] for path in session.paths if path})
    click.echo(f"{trained:,} weights learn, in {len(session.paths)} layers: {', '.join(leaves)}", err=True)
    chosen = session.settings
    rows = "the rows that fit best" if chosen.batch_tokens else f"{chosen.batch_size} rows"
    click.echo(f"a step: {chosen.accumulate} × {rows}, {session.progress.sizes[-1]} tokens at most at once; "
               f"checkpoint {session.model.checkpointed}; memory {session.estimate}", err=True)


@contextmanager
def stoppable() -> Any:
    """A list that is filled by the first Ctrl-C: the step is finished and saved. The second one ends the program."""
    asked: list[int] = []

    def ask(*_: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(1)
        click.echo("stopping after this step; Ctrl-C again stops at once", err=True)

    old = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, old)


class Screen:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self.task = self.bar.add_task("", total=None)
        self.said, self.rate, self.ran = 0.0, 0.0, False

    def __enter__(self) -> "Screen":
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def listen(self, what: str, n: dict[str, Any]) -> None:
        getattr(self, f"_{what}", lambda n: None)(n)

    def _plan(self, n: dict[str, Any]) -> None:
        self.bar.update(self.task, total=n["total"], completed=n["step"])

    def _step(self, n: dict[str, Any]) -> None:
        rate = n["step_tokens"] / n["step_seconds"]
        self.rate = 0.9 * self.rate + 0.1 * rate if self.ran else rate
        self.ran = True
        text = f"loss {n['loss']:.3f} · {self.rate:.0f} tok/s · {n['memory'] / 1e9:.2f} GB"
        self.bar.update(self.task, completed=n["step"], description=text)
        if self.bar.disable and (time.monotonic() - self.said > 10 or n["step"] == n["total"]):
            self.said = time.monotonic()
            self.line(f"step {n['step']} of {n['total']}: {text}")

    def _valid(self, n: dict[str, Any]) -> None:
        self.line(f"step {n['step']}: validation loss {n['loss']:.4f}{', the best' if n['best'] else ''}")

    def _skipped(self, n: dict[str, Any]) -> None:
        self.line(f"step {n['step']} skipped: its gradient is not finite (loss {n['loss']}); rows: "
                  f"{', '.join(n['places'][:8])}")

    def _done(self, n: dict[str, Any]) -> None:
        parts = [f"best validation loss {n['best']:.4f} at step {n['best_step']}"] if n["best"] is not None else []
        parts += [f"test loss {n['test']:.4f}"] if n["test"] is not None else []
        self.line("; ".join([*parts, f"{n['folder']}/report.html shows the run"]))

    def line(self, text: str) -> None:
        if self.bar.disable:
            click.echo(text, err=True)
        else:
            self.bar.console.print(text, highlight=False, markup=False)


def show(chosen: Any, tokenizer: Any) -> None:
    """Prints rows: what is learnt in green, the rest dim."""
    from rich.console import Console
    from rich.text import Text

    from ..lora import data

    encoder = data.Encoder(tokenizer, chosen.max_seq_length, chosen.supervise == "all")
    samples = data.read(chosen.data).get("train", [])[:chosen.show]
    console = Console()
    for row in encoder.rows(samples):
        console.print(f"── {row.place}: {len(row.tokens) + 1} tokens, {row.supervised} learnt", markup=False)
        text = Text()
        for ids, learnt in data.runs(row):
            text.append(tokenizer.decode(ids, skip_special_tokens=False), "bold green" if learnt else "dim")
        console.print(text)
    console.print(str(encoder.tally), markup=False)

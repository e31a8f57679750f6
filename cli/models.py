"""`llm models`: what is on this machine: the default model and the Hugging Face cache."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from ..engine.errors import UserError


@click.group(name="models")
def command() -> None:
    """Lists, shows, fetches and removes models."""


@command.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def list_models(as_json: bool) -> None:
    """Lists the models on this machine."""
    rows = [row for name, path, nbytes in found() for row in [about(name, path, nbytes)]]
    if as_json:
        click.echo(json.dumps(rows))
        return
    columns = "MODEL", "FAMILY", "PARAMETERS", "BITS", "CONTEXT", "SIZE"
    table(columns, [(r["name"], r["family"], count(r["parameters"]), r["bits"], r["context"], size(r["bytes"]))
                    for r in rows])  # fmt: skip


@command.command()
@click.argument("name", metavar="[MODEL]", required=False)
@click.option("--context", type=click.IntRange(1), help="Tokens of context that memory is foreseen for.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(name: str | None, context: int | None, as_json: bool) -> None:
    """Shows a model's place, size, shape and need of memory; without MODEL, the default's."""
    from ..models import read
    from ..models.card import SHOWN, card

    if name and not Path(name).exists():
        repo(name.partition("@")[0].partition(":")[0])
    shown = card(read(name))
    tokens = context or min(shown.context or 4096, 4096)
    needed = shown.memory(tokens)
    config = {field: shown.config[field] for field in SHOWN if shown.config.get(field) is not None}
    if as_json:
        click.echo(json.dumps({**shown.as_object(), "memory": {"tokens": tokens, "bytes": needed}, "config": config}))
        return
    if shown.context and tokens > shown.context:
        click.echo(f"the model was made for {shown.context} tokens of context", err=True)
    rows = {
        "path": shown.path,
        "size": size(shown.nbytes),
        "family": shown.family if shown.model else f"{shown.family} (not supported)",
        "parameters": count(shown.parameters),
        "bits a weight": shown.bits and f"{shown.bits:.2f}",
        "context": shown.context,
        f"memory at {tokens} tokens": needed and size(needed),
        **{key: wording(value) if key == "quantization" else value for key, value in config.items()},
    }
    table(("", ""), [(key, value) for key, value in rows.items() if value is not None])


@command.command()
@click.argument("name", metavar="MODEL")
def pull(name: str) -> None:
    """Fetches a model from the Hugging Face Hub, or what is missing of it.

    MODEL is owner/name, owner/name@revision, or in a repo of GGUF files owner/name:Q4_K_M.
    """
    from ..models.hub import download

    click.echo(download(name))


@command.command()
@click.argument("name", metavar="REPO")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def rm(name: str, yes: bool) -> None:
    """Removes a fetched model from the Hugging Face cache."""
    from huggingface_hub import scan_cache_dir

    found = repo(name)
    if not yes and not click.confirm(f"remove {name}, {size(found.size_on_disk)}?", err=True):
        return
    scan_cache_dir().delete_revisions(*(revision.commit_hash for revision in found.revisions)).execute()


def found() -> Iterator[tuple[str, Path, int]]:
    """Name, place and bytes of the default model, if it is installed, and of what is in the cache, by name."""
    from ..models.hub import default, models_of, shards

    with suppress(UserError):
        path = default()
        yield f"{path.stem} (default)", path, path.stat().st_size
    for entry in cached():
        newest = max(entry.revisions, key=lambda revision: revision.last_modified, default=None)
        folder = newest.snapshot_path if newest else entry.repo_path
        ggufs = models_of(str(path.relative_to(folder)) for path in folder.rglob("*.gguf"))
        if not ggufs or any(folder.glob("*.safetensors")):
            yield entry.repo_id, folder, entry.size_on_disk
            continue
        for name in ggufs:
            yield f"{entry.repo_id}:{name}", folder / name, sum(f.stat().st_size for f in folder.glob(shards(name)))


def about(name: str, path: Path, nbytes: int) -> dict[str, Any]:
    """A row of the list; what cannot be read, as with a model that was fetched in part, has gaps."""
    from ..models import read
    from ..models.card import card

    row = {"name": name, "path": str(path), "bytes": nbytes}
    try:
        return {**card(read(path)).as_object(), **row}
    except (UserError, OSError):
        return {**dict.fromkeys(("family", "parameters", "bits", "context")), **row}


def cached() -> list[Any]:
    """The models in the Hugging Face cache, by name."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return sorted((r for r in scan_cache_dir().repos if r.repo_type == "model"), key=lambda r: r.repo_id)
    except CacheNotFound:
        return []


def repo(name: str) -> Any:
    """The cache's entry for a repo id."""
    for entry in cached():
        if entry.repo_id == name:
            return entry
    raise UserError(f"{name}: not on this machine", "`llm models list` shows what is, `llm models pull` fetches more")


def wording(quantization: dict[str, Any]) -> str:
    others = sum(isinstance(value, dict) for value in quantization.values())
    mode, more = quantization.get("mode", "affine"), f"; {others} weights differ" if others else ""
    return f"{quantization.get('bits')} bits in groups of {quantization.get('group_size')}, {mode}{more}"


def size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def count(parameters: int | None) -> str | None:
    if parameters is None:
        return None
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on a terminal; elsewhere lines with tabs between, without the head."""
    texts = [["-" if value is None else str(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        for row in texts:
            click.echo("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(*columns, box=box.SIMPLE_HEAD if any(columns) else None, show_header=any(columns))
    for row in texts:
        shown.add_row(*row)
    Console().print(shown)

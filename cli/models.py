"""`llm models`: what is on this machine: the default model and the Hugging Face cache."""

import json
from pathlib import Path
from typing import Any

import click

from ..engine.errors import UserError

SHOWN = (  # fields of config.json
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "quantization",
)  # fmt: skip


@click.group(name="models")
def command() -> None:
    """Lists, shows, fetches and removes models."""


@command.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def list_models(as_json: bool) -> None:
    """Lists the models on this machine."""
    found = [{"name": r.repo_id, "bytes": r.size_on_disk, "path": str(r.repo_path)} for r in cached()]
    rows = default_model() + found
    if as_json:
        click.echo(json.dumps(rows))
    for row in [] if as_json else rows:
        click.echo(f"{row['name']:<50} {row['bytes'] / 1e9:8.2f} GB  {row['path']}")


@command.command()
@click.argument("name", metavar="[MODEL]", required=False)
def show(name: str | None) -> None:
    """Shows a model's place, size and shape; without MODEL, the default's."""
    from ..models import read

    if name and not Path(name).exists():
        repo(name)
    weights = read(name)
    config = {field: weights.config[field] for field in SHOWN if weights.config.get(field) is not None}
    for field, value in {"path": weights.path, "bytes": f"{weights.nbytes:,}", **config}.items():
        click.echo(f"{field:<24} {value}")


@command.command()
@click.argument("name", metavar="REPO")
def pull(name: str) -> None:
    """Fetches a model (owner/name) from the Hugging Face Hub, or what is missing of it."""
    from ..models.hub import download

    click.echo(download(name))


@command.command()
@click.argument("name", metavar="REPO")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def rm(name: str, yes: bool) -> None:
    """Removes a fetched model from the Hugging Face cache."""
    from huggingface_hub import scan_cache_dir

    found = repo(name)
    if not yes and not click.confirm(f"remove {name}, {found.size_on_disk / 1e9:.2f} GB?", err=True):
        return
    scan_cache_dir().delete_revisions(*(revision.commit_hash for revision in found.revisions)).execute()


def default_model() -> list[dict[str, Any]]:
    """The row of the default model, if it is installed."""
    from ..models.hub import default

    try:
        path = default()
    except UserError:
        return []
    return [{"name": "(default)", "bytes": path.stat().st_size, "path": str(path)}]


def cached() -> list[Any]:
    """The models in the Hugging Face cache, by name."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return sorted((r for r in scan_cache_dir().repos if r.repo_type == "model"), key=lambda r: r.repo_id)
    except CacheNotFound:
        return []


def repo(name: str) -> Any:
    """The cache's entry for a repo id."""
    for found in cached():
        if found.repo_id == name:
            return found
    raise UserError(f"{name}: not on this machine", "`llm models list` shows what is, `llm models pull` fetches more")

"""`llm convert`: any model that loads, written as a folder that MLX, mlx-lm and Hugging Face read, or as a GGUF."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from . import INTERRUPTED, say

TYPES = ("F16", "Q8_0", "Q4_0", "Q4_1", "BF16", "F32")
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")


@click.command(name="convert")
@click.argument("source")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("-q", "--quantize", is_flag=True, help="Quantize linear layers and embeddings.")
@click.option("--bits", type=int, help="Bits of a code: 2, 3, 4, 5, 6 or 8. Default: the mode's; affine 4.")
@click.option("--group-size", type=int, help="Weights that share a scale. Default: the mode's; affine 64.")
@click.option("--mode", default="affine", show_default=True, help="affine, mxfp4, nvfp4 or mxfp8.")
@click.option("--recipe", type=click.Choice(RECIPES), help="Few bits for most weights, more for delicate ones.")
@click.option("--dequantize", is_flag=True, help="Expand codes to floats.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), help="Of what is not quantized.")
@click.option("--to", type=click.Choice(["mlx", "gguf"]), default="mlx", show_default=True,
              help="mlx: a folder, which Hugging Face reads too where nothing is quantized. gguf: one file.")
@click.option("--type", "kind", type=click.Choice(TYPES, case_sensitive=False),
              help="Of a GGUF's matrices. Default: codes stay as they are where GGUF has them, others become F16.")
@click.option("--upload", metavar="REPO", help="Then upload DEST to this repo of the Hub; it is made if need be.")
def command(source: str, dest: Path, to: str, kind: str | None, upload: str | None, **how: Any) -> None:
    """Converts and quantizes models.

    Writes SOURCE (a repo id, a folder or a .gguf file) as DEST, a new folder, or with --to gguf a new file.

    Without -q, codes that are quantized already stay as they are. DEST appears when it is complete; run the same
    command again and a conversion that was stopped goes on.
    """
    check(to, kind, how)
    try:
        with bar("weights") as progress:
            if to == "gguf":
                from ..models.gguf_writer import convert_gguf

                convert_gguf(source, dest, kind and kind.upper(), progress)
            else:
                from ..models.convert import convert

                quantizer = quantizer_of(source, how) if how["quantize"] else None
                convert(source, dest, quantizer, how["dtype"], progress, how["dequantize"])
    except KeyboardInterrupt:
        say(f"stopped; {dest}.partial has what is done", "run the same command again: it goes on from there")
        sys.exit(INTERRUPTED)
    if upload:
        from ..models.hub import upload as send

        send(dest, upload)
    click.echo(dest)


def check(to: str, kind: str | None, how: dict[str, Any]) -> None:
    """Refuses options that say nothing together."""
    if kind and to != "gguf":
        raise click.UsageError("--type is for --to gguf")
    given = [name for name in ("quantize", "bits", "group_size", "recipe", "dequantize", "dtype") if how[name]]
    if to == "gguf" and given:
        raise click.UsageError(f"--{given[0].replace('_', '-')} is not for --to gguf: --type names what it holds")
    if how["dequantize"] and how["quantize"]:
        raise click.UsageError("--dequantize and -q exclude each other")
    if not how["quantize"] and (how["bits"] or how["group_size"] or how["recipe"] or how["mode"] != "affine"):
        raise click.UsageError("--bits, --group-size, --mode and --recipe need -q")
    if how["recipe"] and (how["bits"] or how["mode"] != "affine"):
        raise click.UsageError("--recipe chooses the bits, in the mode affine")


def quantizer_of(source: str, how: dict[str, Any]) -> Any:
    from ..quant import RECIPES, Format, Quantizer, recipe

    if not how["recipe"]:
        return Quantizer(Format(how["group_size"], how["bits"], how["mode"]))
    from ..models import read

    layers = read(source).config.get("num_hidden_layers", 0)
    group = how["group_size"]
    return Quantizer(Format(group, RECIPES[how["recipe"]][0]), recipe(how["recipe"], layers, group))


@contextmanager
def bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal's stderr; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = unit, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as shown:
        task = shown.add_task("", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)

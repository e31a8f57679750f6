"""`llm convert`: any model that loads, written as a folder that MLX, mlx-lm and Hugging Face read."""

import sys

import click


@click.command(name="convert")
@click.argument("source")
@click.argument("dest")
@click.option("-q", "--quantize", is_flag=True, help="Quantize linear layers and embeddings.")
@click.option("--bits", type=int, default=4, show_default=True, help="Bits of a code: 2, 3, 4, 5, 6 or 8.")
@click.option("--group-size", type=int, default=64, show_default=True, help="Weights with one scale: 16 to 128.")
@click.option("--mode", default="affine", show_default=True, help="The format's kind.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), help="Of what is not quantized.")
def command(
    source: str, dest: str, quantize: bool, bits: int, group_size: int, mode: str, dtype: str | None
) -> None:  # fmt: skip
    """Converts and quantizes models.

    Writes SOURCE (a repo id, a folder or a .gguf file) as the new folder DEST.

    Without -q, codes that are quantized already stay as they are. DEST appears when it is complete, or not at all.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from ..models.convert import convert
    from ..quant import Format, Quantizer

    quantizer = Quantizer(Format(group_size, bits, mode)) if quantize else None
    columns = "weights", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)
        convert(source, dest, quantizer, dtype, lambda done, total: bar.update(task, completed=done, total=total))
    click.echo(dest)

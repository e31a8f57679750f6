"""`llm fuse`: a model with an adapter becomes a model."""

from pathlib import Path
from typing import Any

import click

from ..engine.errors import UserError
from . import options

SURVIVED = 0.9                         # of an adapter, below which quantizing it is said to be a mistake


@click.command(name="fuse")
@options.model
@click.argument("dest")
@click.option("--adapter", required=True, metavar="DIR", help="The adapter's folder.")
@click.option("--bits", type=int, help="Quantize the result: 2 to 8. Default: float16.")
@click.option("--group-size", type=int, default=64, show_default=True, help="Weights with one scale.")
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True,
              help="Of what is not quantized.")
@click.option("--data", metavar="FILE|DIR|ID", help="With --bits: what perplexity is measured on. Default: what the "
              "adapter was trained on.")
@click.option("--any-base", is_flag=True, help="Fuse into other weights than those the adapter was trained on.")
def command(
    name: str | None, dest: str, adapter: str, bits: int | None, group_size: int, dtype: str, data: str | None,
    any_base: bool,
) -> None:  # fmt: skip
    """Writes MODEL with its adapter in the weights as the new folder DEST.

    In float16 all of the adapter stays. In 4 bits a small one is rounded away: how much is left is printed, and the
    perplexity before and after.
    """
    from ..engine import array as mx
    from ..lora import adapter as adapters
    from ..lora import formats, fusion
    from ..models import read
    from ..models.convert import convert
    from ..quant import Format, Quantizer

    found = formats.read(adapter)
    model, tokenizer, *_ = options.load(name)
    adapters.check(model, found, adapter)
    if not any_base and (difference := adapters.foreign(model, found)):
        raise UserError(f"{adapter}: {difference}", "name the model that it was trained on, or add --any-base")
    fused = fusion.Fused(found, Quantizer(Format(group_size, bits)) if bits else None, getattr(mx, dtype))
    weights = read(name)
    if weights.path.is_dir():                              # a GGUF's names are the model's
        fused.expect({tensor for part in weights.parts for tensor in part()})
    with options.announced(f"writing {dest}"):
        convert(name, dest, fused, "float32", dequantize=True)
    if bits:
        compare(fused, model, tokenizer, adapter, dest, data)
    click.echo(dest)


def compare(fused: Any, model: Any, tokenizer: Any, adapter: str, dest: str, data: str | None) -> None:
    """Says how much of the adapter the quantized weights have, and what they predict."""
    from ..lora import evaluation, load_adapter

    left = f"{fused.kept:.0%} of the adapter survived, with other changes {fused.noise:.1f} times as large"
    click.echo(left, err=True)
    if rows := some_rows(adapter, tokenizer, data):
        load_adapter(model, adapter)
        before, after = (evaluation.score(m, rows).perplexity for m in (model, options.load(dest).model))
        click.echo(f"perplexity {before:.4f} before, {after:.4f} after, over {len(rows)} rows", err=True)
    else:
        click.echo("perplexity is not measured: the adapter does not say on what; --data FILE does", err=True)
    if fused.kept < SURVIVED or fused.noise > 1:
        click.echo("keep the adapter beside the model (llm generate --adapter), or fuse to float16", err=True)


def some_rows(adapter: str, tokenizer: Any, data: str | None, most: int = 100) -> list[Any]:
    """The first rows of the validation split of the given data, or of what the adapter was trained on."""
    from ..lora import data as files
    from ..lora import state

    if not data:
        if not (Path(adapter) / state.FILE).exists():
            return []
        data = state.read(Path(adapter)).settings["data"]
    splits = files.read(data)
    chosen = next(splits[name] for name in ("valid", "test", "train") if name in splits)
    return files.Encoder(tokenizer, 2048).rows(chosen[:most])

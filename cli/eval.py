"""`llm eval`: how well a model predicts a text or a data set."""

import json
from time import perf_counter

import click

from . import options


@click.command(name="eval")
@options.model
@click.option("--data", required=True, metavar="FILE|DIR|ID",
              help="A .txt file, or rows as for llm lora; of several splits, test, else valid.")
@click.option("--split", type=click.Choice(["train", "valid", "test"]), help="Of data that has several.")
@click.option("--adapter", metavar="DIR", help="Put this adapter on the model.")
@click.option("--against", metavar="MODEL", help="Also measure the KL divergence from this model.")
@click.option("--max-seq-length", "limit", type=click.IntRange(2), help="Most tokens of a row. Default: 2048, or the "
              "model's limit.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
def command(
    name: str | None, data: str, split: str | None, adapter: str | None, against: str | None, limit: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Measures perplexity: exp of the mean loss of the tokens that a row's reader is to predict.

    Of conversations these are the answers; of texts, all tokens but the first.
    """
    from ..lora import evaluation, load_adapter

    model, tokenizer, *_ = options.load(name)
    if adapter:
        load_adapter(model, adapter)
    found, tally = rows(data, split, tokenizer, limit or min(2048, model.config.max_position_embeddings))
    begin = perf_counter()
    score = evaluation.score(model, found)
    seconds = perf_counter() - begin
    result = {"perplexity": score.perplexity, "loss": score.loss, "tokens": score.tokens, "rows": score.rows,
              "seconds": seconds, "tokens_per_second": score.tokens / seconds}
    if against:
        result |= evaluation.distance(model, options.load(against).model, found)._asdict()
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(str(tally), err=True)
    click.echo("perplexity {perplexity:.4f}, loss {loss:.4f} over {tokens:,} tokens, {tokens_per_second:.0f} tok/s"
               .format(**result))
    if against:
        click.echo("KL divergence {kl:.3g} nats a token, the same most likely token {same:.1%}".format(**result))


def rows(source, split, tokenizer, limit):  # type: ignore[no-untyped-def]
    """The rows of a split, and what became of its samples."""
    from ..engine.errors import UserError
    from ..lora import data

    splits = data.read(source)
    chosen = split or next(name for name in ("test", "valid", "train") if name in splits)
    if chosen not in splits:
        raise UserError(f"{source}: has no {chosen}, only {', '.join(splits)}")
    encoder = data.Encoder(tokenizer, limit)
    return encoder.rows(splits[chosen]), encoder.tally

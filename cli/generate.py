"""`llm generate`: one prompt, one answer."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..engine.errors import UserError
from . import INTERRUPTED, options


@click.command(name="generate")
@options.model
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt; `-`, or a pipe and no prompt, reads stdin.")
@click.argument("stdin", type=click.Choice(["-"]), required=False, metavar="[-]")
@click.option("--system", metavar="TEXT", help="The system message.")
@options.adapter
@options.sampling(max_tokens=512, temp=0.0)
@click.option("--json-schema", "schema", metavar="FILE", help="Answer with JSON that the schema in this file allows.")
@click.option("--regex", metavar="REGEX", help="Answer with text that this regular expression matches.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when done, and nothing else.")
def command(
    name: str | None, prompt: str | None, stdin: str | None, system: str | None, adapter: str | None,
    schema: str | None, regex: str | None, raw: bool, as_json: bool, **sampling: Any,
) -> None:  # fmt: skip
    """Generates text from a prompt.

    The same prompt gives the same text: the most likely tokens are taken unless --temp is above 0.
    """
    if raw and system:
        raise click.UsageError("--system needs the chat template, which --raw leaves out")
    if schema and regex:
        raise click.UsageError("--json-schema and --regex exclude each other")
    text, format = read_prompt(prompt or stdin), wanted(schema, regex)
    model, tokenizer, _, load_seconds = options.load(name, adapter)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": text}]
    prompt = text if raw else tokenizer.apply_chat_template(messages)
    responses: list[Any] = []
    stopped = False
    try:
        for response in respond(model, tokenizer, prompt, raw, format, options.given(sampling)):
            responses.append(response)
            if not as_json:
                click.echo(response.text, nl=False)
    except KeyboardInterrupt:
        stopped = True
    if as_json:
        click.echo(json.dumps(as_object(responses, load_seconds), ensure_ascii=False))
    else:
        click.echo()
        click.echo(options.statistics(responses[-1]) if responses else "stopped before the first token", err=True)
    sys.exit(INTERRUPTED if stopped else 0)


def read_prompt(prompt: str | None) -> str:
    """The prompt given, or stdin; bytes that are no character are replaced."""
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
    if not prompt:
        raise click.UsageError("the prompt is empty: give -p TEXT, or pipe text in")
    return prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def wanted(schema: str | None, regex: str | None) -> dict[str, Any] | None:
    """What --json-schema and --regex ask for, as a response_format."""
    if not schema:
        return {"type": "regex", "regex": regex} if regex else None
    try:
        return {"type": "json_schema", "schema": json.loads(Path(schema).read_bytes())}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{schema}: not JSON: {str(error)[:100]}", "The file has to hold one JSON schema.") from None


def respond(
    model: Any, tokenizer: Any, prompt: str, raw: bool, format: dict[str, Any] | None, sampling: dict[str, Any]
) -> Iterator[Any]:
    """The Responses; with a format, what the model thinks before its answer is not part of their texts."""
    from ..engine.generate import stream_generate

    ids = tokenizer.encode(prompt, add_special_tokens=raw)  # a template writes its own
    if not format:
        yield from stream_generate(model, tokenizer, ids, **sampling)
        return
    from ..server import grammars, tools

    constraint = grammars.constrain(tokenizer, prompt=prompt, format=format)
    parser, detokenizer = tools.parser(tokenizer, prompt), tokenizer.detokenizer(shown=tools.markers(tokenizer))
    for response in stream_generate(model, tokenizer, ids, constraint=constraint, detokenizer=detokenizer, **sampling):
        pieces = parser.add(response.text) + (parser.finish() if response.finish_reason else [])
        yield response._replace(text="".join(piece.text for piece in pieces if piece.kind == "text"))


def as_object(responses: list[Any], load_seconds: float) -> dict[str, Any]:
    """What --json prints; finish_reason null: stopped by Ctrl-C."""
    last = responses[-1] if responses else None
    names = ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes")
    return {
        "text": "".join(response.text for response in responses),
        "tokens": [response.token for response in responses],
        "prompt_tokens": last.prompt_tokens if last else 0,
        "generated_tokens": len(responses),
        "finish_reason": last.finish_reason if last else None,
        "load_seconds": load_seconds,
        **{name: getattr(last, name) if last else 0 for name in names},
    }

"""`llm chat`: a conversation in the terminal."""

import json
import sys
from typing import Any

import click

from ..engine.errors import UserError
from . import options, report

HELP = '''Type a message. End a line with \\ to go on in the next one, or put \"\"\" before and after several lines.
/reset      forget the conversation (the system message stays)
/save FILE  write the conversation as JSON
/help       this text
/exit       leave, as Ctrl-D does; Ctrl-C stops an answer'''
FROM_MODEL = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repetition_penalty"}


@click.command(name="chat", epilog="In the chat, /help lists its commands.")
@options.model
@click.option("--system", metavar="TEXT", help="The system message.")
@options.adapter
@options.sampling()
def command(name: str | None, system: str | None, adapter: str | None, **sampling: Any) -> None:
    """Holds a conversation in the terminal.

    Samples as the model's generation_config says, else at temperature 0.7 with top-p 0.95. What the model thinks before
    its answer is dim; when the output is no terminal it goes to stderr.
    """
    from ..engine.generate import Engine

    model, tokenizer, generation_config, _ = options.load(name, adapter)
    chat = Chat(model, tokenizer, system, {**defaults(generation_config), **options.given(sampling)}, Engine(model))
    if sys.stdin.isatty():
        import readline  # noqa: F401  gives input() line editing and history

        click.echo("/help lists the commands", err=True)
    while chat.turn():
        pass


def defaults(generation_config: dict[str, Any]) -> dict[str, Any]:
    """Sampling as the model's makers advise, else a common one."""
    if generation_config.get("do_sample"):
        return {ours: generation_config[theirs] for theirs, ours in FROM_MODEL.items() if generation_config.get(theirs)}
    return {"temp": 0.7, "top_p": 0.95}


def read_message() -> str:
    """A line, or several: joined by a backslash at the end, or between triple quotes."""
    prompt, more = (">>> ", "... ") if sys.stdin.isatty() else ("", "")
    text = input(prompt)
    if text.startswith('"""'):
        while len(text) < 6 or not text.rstrip().endswith('"""'):
            text += "\n" + input(more)
        return text.rstrip()[3:-3].strip("\n")
    while text.endswith("\\"):
        text = text[:-1] + "\n" + input(more)
    return text


class Chat:
    """The messages so far, and an engine whose cache remembers them."""

    def __init__(self, model: Any, tokenizer: Any, system: str | None, sampling: dict[str, Any], engine: Any):
        self.model, self.tokenizer, self.sampling, self.engine = model, tokenizer, sampling, engine
        self.system = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.system)

    def turn(self) -> bool:
        """Reads a message and answers it, or obeys a command. False: the user leaves."""
        try:
            text = read_message()
        except EOFError:
            click.echo()
            return False
        except KeyboardInterrupt:  # at the prompt: drop the line
            click.echo()
            return True
        if text.startswith("/"):
            return self.obey(*text.split(maxsplit=1))
        if text.strip():
            try:
                self.answer(text)
            except (UserError, ValueError) as error:
                report(error)
        return True

    def obey(self, order: str, argument: str = "") -> bool:
        if order == "/reset":
            self.messages = list(self.system)
        elif order == "/save" and argument:
            self.save(argument)
        elif order != "/exit":
            click.echo(HELP, err=True)
        return order != "/exit"

    def save(self, path: str) -> None:
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(self.messages, file, ensure_ascii=False, indent=1)
        except OSError as error:
            report(error)

    def answer(self, text: str) -> None:
        """Streams the answer; one that is stopped stays in the conversation as far as it came."""
        from ..engine.generate import stream_generate
        from ..server import tools

        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.tokenizer.apply_chat_template(messages)
        ids = self.tokenizer.encode(prompt, add_special_tokens=False)  # the template writes its own
        parser = tools.parser(self.tokenizer, prompt)
        detokenizer = self.tokenizer.detokenizer(shown=tools.markers(self.tokenizer))
        said, last = {"text": "", "reasoning": ""}, None
        try:
            for last in stream_generate(
                self.model, self.tokenizer, ids, engine=self.engine, detokenizer=detokenizer, **self.sampling
            ):
                show(parser.add(last.text), said)
        except KeyboardInterrupt:
            pass
        show(parser.finish(), said)
        click.echo()
        if last:
            click.echo(options.statistics(last), err=True)
            thought = {"reasoning_content": said["reasoning"]} if said["reasoning"] else {}
            self.messages = [*messages, {"role": "assistant", "content": said["text"], **thought}]


def show(pieces: list[Any], said: dict[str, str]) -> None:
    """Prints pieces of an answer and adds them to what was said: thinking dim, or on stderr if nobody watches."""
    for piece in pieces:
        thinks = piece.kind == "reasoning"
        gap = "\n\n" if not thinks and said["reasoning"] and not said["text"] else ""
        said[piece.kind] += piece.text  # first: Ctrl-C may come while it is printed
        click.secho(gap + piece.text, dim=thinks or None, nl=False, err=thinks and not sys.stdout.isatty())

"""The command `llm`. Each command is a module; what is heavy to import waits inside the function that needs it."""

import os
import sys
from importlib import import_module

import click

from ..engine.errors import UserError

COMMANDS = ("generate", "chat", "serve", "lora", "fuse", "eval", "bench", "convert", "models", "selftest")
INTERRUPTED = 130  # 128 + SIGINT, as shells count it


class Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return import_module(f".{name}", __name__).command if name in COMMANDS else None


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lazulite", prog_name="llm")
def llm() -> None:
    """Runs open-weight language models on this machine.

    Text goes to stdout; progress, statistics and errors go to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage,
    130 stopped by Ctrl-C. LAZULITE_THREADS sets the number of threads, LAZULITE_DEBUG=1 shows tracebacks.
    """


def main() -> None:
    """The entry point of `llm`: runs a command and turns what is raised into an exit code and at most two lines."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        sys.exit(llm.main(prog_name="llm", standalone_mode=False))
    except click.ClickException as error:
        message, context = error.format_message(), getattr(error, "ctx", None)
        if message.startswith("Usage:"):  # `llm` alone: the help itself
            click.echo(message, err=True)
        else:
            say(message, f"`{context.command_path if context else 'llm'} --help` says what is wanted")
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if os.environ.get("LAZULITE_DEBUG"):
            raise
        report(error)
        sys.exit(1)


def say(what: str, hint: str) -> None:
    """Two lines on stderr: what is wrong, and what to do next."""
    click.echo(f"llm: {what}\n     {hint}", err=True)


def report(error: Exception) -> None:
    say(*explain(error))


def explain(error: Exception) -> tuple[str, str]:
    """Errors of ours begin with the part they come from, `[load] …`; a second line says what to do next."""
    what, _, hint = str(error).partition("\n")
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or what}", "check the path, its permissions and the disk"
    if isinstance(error, UserError) or what.startswith("["):
        return what, hint or "`llm --help` and `llm COMMAND --help` say what is wanted"
    if isinstance(error, MemoryError):
        return f"out of memory: {what}", "use a smaller model, fewer bits or a shorter context"
    return f"unexpected {type(error).__name__}: {what}", "this is a bug: LAZULITE_DEBUG=1 shows where"

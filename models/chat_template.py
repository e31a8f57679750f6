"""Chat templates: Jinja programs from model folders, run in one sandbox with the functions that they expect.

Source: https://huggingface.co/docs/transformers/chat_templating_writing
"""

import json
from datetime import datetime
from functools import cache
from typing import Any

from ..engine.errors import UserError


def raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is: Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@cache
def environment() -> Any:
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %} marks the assistant's part for training; it renders its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return env


@cache
def compile(template: str) -> Any:
    return environment().from_string(template)


def render(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """The prompt that `template` makes of `messages`. UserError with the template's line where it fails or refuses."""
    import jinja2

    try:
        return str(compile(template).render(messages=messages, **variables))
    except jinja2.TemplateSyntaxError as error:
        found = f"line {error.lineno}: {error.message}"
    except jinja2.TemplateError as error:
        found = error.message or str(error)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"
    raise UserError(f"[chat template] {found}", "Use --raw to give the model the prompt without its template.")

"""Chat templates: Jinja programs from model folders, run in one sandbox with the functions that they expect.

Source: https://huggingface.co/docs/transformers/chat_templating_writing
"""

import json
import math
import re
from contextvars import ContextVar
from datetime import datetime
from functools import cache, wraps
from time import perf_counter
from typing import Any, NoReturn

from ..engine.errors import UserError


def fail(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is: Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


SECONDS, ROOM = 5.0, 1 << 26  # of a rendering; characters of what it makes
spent: ContextVar[list[float]] = ContextVar("spent")  # by the rendering under way: when it must end, characters so far


def spend(characters: int = 0) -> None:
    """Counts a turn of a loop, a call of a macro, or output."""
    budget = spent.get()
    budget[1] += characters
    if perf_counter() > budget[0]:
        fail(f"it does not end: stopped after {SECONDS:g} seconds")
    if budget[1] > ROOM:
        fail(f"it does not end: stopped after {ROOM:,} characters")


def bounded(*operands: Any) -> None:
    """Refuses an operation whose result, at worst as long as its operands' lengths and numbers multiplied, is huge."""
    sizes = [abs(x) if isinstance(x, int) else len(x) for x in operands if isinstance(x, int | SIZED)]
    formats = [x for x in operands if isinstance(x, str) and len(x) < 100 and ("%" in x or "{" in x)]
    if math.prod(size or 1 for size in sizes) > ROOM or any(re.search(r"\d{7}", x) for x in formats):
        fail(f"a result of more than {ROOM:,} characters")


SIZED = str | list | tuple | dict | range


def joined(*parts: Any) -> str:
    """What `~` does."""
    texts = [str(part) for part in parts]
    spend(sum(map(len, texts)))
    return "".join(texts)


def limited(function: Any) -> Any:
    @wraps(function)  # which keeps what Jinja notes at its filters
    def inner(*args: Any, **options: Any) -> Any:
        bounded(*args, *options.values())
        return function(*args, **options)

    return inner


@cache
def environment() -> Any:
    """The sandbox. Loops, macros, output, and what multiplies texts are counted: a template is a stranger's program."""
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(ext.Extension):
        """{% generation %} marks the assistant's part for training; it renders its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Counted(NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            step = nodes.Call(nodes.EnvironmentAttribute("spend"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
            return self.generic_visit(node)

        visit_Macro = visit_CallBlock = visit_For

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None).set_lineno(node.lineno)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "%", "+"))
        spend, joined = staticmethod(spend), staticmethod(joined)

        def _parse(self, *source: Any) -> Any:
            return Counted().visit(super()._parse(*source))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+":
                spend(len(left) if isinstance(left, SIZED) else 0)
            else:
                bounded(left, right**2 if operator == "**" and abs(right) < 1e6 else right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, *args: Any, **options: Any) -> Any:
            owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
            if isinstance(owner, str):
                bounded(owner, *args, *options.values())
            return super().call(context, function, *args, **options)

    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols], finalize=counted)
    env.filters = {name: limited(function) for name, function in (env.filters | {"tojson": tojson}).items()}
    env.globals["raise_exception"] = fail
    env.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return env


def counted(value: Any) -> Any:
    """What an expression puts out: also into a variable, by {% set %} … {% endset %}."""
    if isinstance(value, str) and spent.get([]):
        spend(len(value))
    return value


@cache
def compile(template: str) -> Any:
    return environment().from_string(template)


def render(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """The prompt that `template` makes of `messages`. UserError with the template's line where it fails or refuses."""
    import jinja2

    token = spent.set([perf_counter() + SECONDS, 0])
    try:
        return str(compile(template).render(messages=messages, **variables))
    except jinja2.TemplateSyntaxError as error:
        found = f"line {error.lineno}: {error.message}"
    except jinja2.TemplateError as error:
        found = error.message or str(error)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        found = f"{type(error).__name__}: {error}"
    finally:
        spent.reset(token)
    raise UserError(f"[chat template] {found}", "Use --raw to give the model the prompt without its template.")

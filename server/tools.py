"""Tool calls: how each family of models writes them, and the parser of an answer."""

from functools import cache
from typing import Any, NamedTuple

from . import reasoning as thinking
from .parser import ENDS, Parser


class Format(NamedTuple):
    """sign: the model has this format when it is a token of its vocabulary or in its chat template. begin, end: marks
    around calls, for the parser. trigger (a regex): only a call can follow it.

    A grammar writes a call as `open` + JSON of the arguments + `close`, several with `between` them, and all of them
    inside `before` and `after`; {} is the function's name."""

    name: str
    sign: str
    style: str  # a method of Parser
    begin: str
    end: str
    trigger: str
    before: str
    open: str
    close: str
    between: str
    after: str


CALL, TAG = '{"name": "{}", "arguments": ', "<tool_call>"
TO = r"(?:^|<\|channel\|>\w+|<\|start\|>assistant) ?to=functions\."
FORMATS = (  # the first whose sign is found
    Format("harmony", "<|channel|>", "harmony", "to=functions.", "", TO, "",
           "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>", "", "", ""),
    Format("mistral", "[ARGS]", "named", "[TOOL_CALLS]", "", r"\[TOOL_CALLS\]", "",
           "[TOOL_CALLS]{}[ARGS]", "", "", ""),
    Format("mistral-list", "[TOOL_CALLS]", "named", "[TOOL_CALLS]", "", r"\[TOOL_CALLS\]",
           "[TOOL_CALLS][", CALL, "}", ", ", "]"),
    Format("llama", "<|python_tag|>", "bare", "<|python_tag|>", "", "",
           "", '{"name": "{}", "parameters": ', "}", "; ", ""),
    Format("qwen-coder", "<function=", "tagged", TAG, "</tool_call>", "",
           "", TAG + "\n<function={}>\n", "</function>\n</tool_call>", "\n", ""),
    Format("hermes", TAG, "listed", TAG, "</tool_call>", TAG,
           "", TAG + "\n" + CALL, "}\n</tool_call>", "\n", ""),
    Format("smollm", "", "listed", TAG, "</tool_call>", TAG,
           TAG + "[", CALL, "}", ", ", "]</tool_call>"),
)  # fmt: skip


@cache
def detect(tokenizer: Any) -> Format:
    """The format of a model, by its vocabulary and chat template. One whose template knows no tools gets the last."""
    texts = {token.content for token in tokenizer.added.values()}
    template = str(tokenizer.template)
    if "tools" not in template:
        return FORMATS[-1]
    return next(row for row in FORMATS if row.sign in texts or row.sign in template)


@cache
def markers(tokenizer: Any) -> frozenset[str]:
    """The special tokens that a parser reads: the detokenizer has to spell them."""
    format, tags = detect(tokenizer), thinking.tags(tokenizer) or ()
    used = [*format, *tags, "[CALL_ID]", *ENDS * (format.style == "harmony")]
    return frozenset(t.content for t in tokenizer.added.values() if any(t.content in text for text in used))


def parser(
    tokenizer: Any, prompt: str, tools: list[dict[str, Any]] | None = None, *,
    parallel: bool = True, reasoning: bool = True, constrained: bool = False,
) -> Parser:  # fmt: skip
    """The parser of an answer to `prompt`. tools: as the template got them; None: calls stay text.

    constrained: grammars.constrain gave a grammar, so arguments may be passed on before they are complete.
    """
    format, tags = detect(tokenizer), thinking.tags(tokenizer)
    known = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools or ()}
    return Parser(
        format.style, format.begin, format.end, known, tags=tags, opened=bool(tags and thinking.is_open(prompt, tags)),
        reasoning=reasoning, parallel=parallel, constrained=constrained,
    )  # fmt: skip

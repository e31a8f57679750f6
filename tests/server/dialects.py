"""Tokenizers of the families whose answers are parsed: bytes, the family's marks, and a template in its manner."""

import itertools
from functools import cache
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lazulite.models import tokenizer as ours
from lazulite.server.parser import Parser, Piece

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Family(NamedTuple):
    special: tuple[str, ...]  # the last one ends a text
    plain: tuple[str, ...]  # tokens that are not special
    template: str


FAMILIES = {
    "hermes": Family(("<|im_start|>", "<|im_end|>"), ("<tool_call>", "</tool_call>", "<think>", "</think>"),
                     "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}" + CHATML),
    "opens": Family(("<|im_start|>", "<|im_end|>"), ("<tool_call>", "</tool_call>", "<think>", "</think>"),
                    "{% if tools %}{{ tools | tojson }}{% endif %}"
                    + CHATML.replace("assistant\n' ", "assistant\n<think>\n' ")),
    "smollm": Family(("<|im_start|>", "<|im_end|>"), (), CHATML.split("{% if m.r")[0]
                     + "{{ m.content + '<|im_end|>\n' }}"
                     "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"),
    "qwen-coder": Family(("<|im_start|>", "<|im_end|>"), ("<tool_call>", "</tool_call>"),
                         "{% if tools %}{{ tools | tojson }}<tool_call><function=...>{% endif %}" + CHATML),
    "llama": Family(("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|eom_id|>", "<|eot_id|>"), (),
                    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
                    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call only') }}{% endif %}"
                    "{% if m.tool_calls and m.tool_calls[0].function.name == 'never' %}"
                    "{{ raise_exception('not this one') }}{% endif %}"
                    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
                    "{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments | tojson }}{% endfor %}"
                    "<|eot_id|>"
                    "{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "mistral": Family(("[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "</s>"), (),
                      "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
                      "{% if m.role == 'user' %}{% if loop.previtem is defined and loop.previtem.role == 'user' %}"
                      "{{ raise_exception('roles must alternate') }}{% endif %}[INST]{{ m.content }}[/INST]"
                      "{% elif m.role == 'system' and loop.index0 %}{{ raise_exception('system comes first') }}"
                      "{% else %}{{ m.content }}{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
                      "{{ raise_exception('ids have nine characters') }}{% endif %}[TOOL_CALLS]{{ c.function.name }}"
                      "{{ c.id }}{% endfor %}{% endif %}{% endfor %}"),
    "mistral-list": Family(("[INST]", "[/INST]", "[TOOL_CALLS]", "</s>"), (),
                           "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[INST]{{ m.content }}"
                           "[/INST]{% endfor %}"),
    "harmony": Family(("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>"),
                      (), "{% if tools %}{{ '<|start|>developer<|message|>' + tools | tojson + '<|end|>' }}{% endif %}"
                      "{% for m in messages %}<|start|>{{ m.role }}<|channel|>{{ m.thinking }}<|message|>"
                      "{{ m.content }}<|end|>{% endfor %}"
                      "{% if add_generation_prompt %}<|start|>assistant{% endif %}"),
}  # fmt: skip


@cache
def tokenizer(family: str) -> ours.Tokenizer:
    row = FAMILIES[family]
    backend = Tokenizer(models.BPE({c: i for c, i in ours.byte_alphabet().items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in row.plain])
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in row.special])
    return ours.Tokenizer(backend, {"eos_token": row.special[-1]}, row.template, [])


def parse(parser: Parser, texts: list[str]) -> list[tuple[Any, ...]]:
    """The pieces of an answer that comes in these texts, neighbours joined."""
    pieces = [piece for text in texts for piece in parser.add(text)] + parser.finish()
    assert all(isinstance(piece, Piece) and piece.text for piece in pieces)
    runs = itertools.groupby(pieces, lambda piece: (piece.kind, piece.index))
    return [(kind, "".join(piece.text for piece in run), index) for (kind, index), run in runs]


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places})
    return [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])]

"""Thinking: the tags that a model writes around it, and whether a prompt leaves them open."""

from typing import Any, NamedTuple


class Tags(NamedTuple):
    begin: str
    end: str


TAGS = (  # of families whose chat template or vocabulary has them
    Tags("<think>", "</think>"),  # DeepSeek R1, Qwen 3, SmolLM 3
    Tags("[THINK]", "[/THINK]"),  # Magistral
    Tags("<seed:think>", "</seed:think>"),  # Seed OSS
)


def tags(tokenizer: Any) -> Tags | None:
    """The model's own; None: it was not made to think. (Harmony's analysis channel is no tag: see parser.py.)"""
    texts = {token.content for token in tokenizer.added.values()}
    template = str(tokenizer.template)
    return next((row for row in TAGS if row.end in texts or row.end in template), None)


def is_open(prompt: str, tags: Tags) -> bool:
    """Whether the template has opened the thinking that the model goes on with."""
    return prompt.rstrip().endswith(tags.begin)

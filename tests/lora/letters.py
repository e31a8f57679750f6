"""A tokenizer of bytes for tests: nothing heavy is imported, so that child processes start quickly."""
from types import SimpleNamespace


class Letters:
    """A tokenizer of bytes: 1 begins a text, 2 ends it; conversations as <role>content<end>."""

    eos_token_ids, special_tokens = {2}, {"bos_token": "\x01", "eos_token": "\x02"}
    template = "yes"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + list(text.encode())

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i > 2 or not skip_special_tokens).decode("utf-8", "replace")

    def detokenizer(self, skip_special_tokens: bool = True):
        return SimpleNamespace(add=lambda id: self.decode([id], skip_special_tokens), finish=lambda: "")

    def apply_chat_template(self, messages, add_generation_prompt=True, tools=None) -> str:
        text = "\x01" + (f"[{tools}]" if tools else "")
        text += "".join(f"<{m['role'][0]}>{m['content']}\x02\n" for m in messages)
        return text + "<a>" * add_generation_prompt

"""Text to token ids and back, on the `tokenizers` library: from tokenizer.json, or from what a GGUF holds."""

import codecs
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from ..engine.errors import UserError
from . import chat_template

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where it prints, or else the next of those from 256 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in prints]
    return {chr(b): b for b in prints} | {chr(256 + i): b for i, b in enumerate(rest)}


class Tokenizer:
    """A vocabulary with its special tokens and chat template.

    `config` is tokenizer_config.json; `template` a string, or several by name; `eos` the ids that end a text, besides
    the end-of-turn tokens of the vocabulary.
    """

    def __init__(self, backend: Backend, config: dict[str, Any], template: Any, eos: list[Any]) -> None:
        self.backend, self.config, self.template = backend, config, template
        decoder = backend.decoder.__getstate__().decode() if backend.decoder else ""
        self.byte_level = "ByteLevel" in decoder
        strips = '"Strip"' in decoder or ('"Metaspace"' in decoder and '"never"' not in decoder)
        self.strip_first_space = strips and not self.byte_level
        self.added = backend.get_added_tokens_decoder()
        self.special_tokens = {key: content(config.get(key)) for key in NAMED if config.get(key)}
        ends = [*END_OF_TURN, self.special_tokens.get("eos_token", "")]
        self.eos_token_ids = {i for end in ends if (i := backend.token_to_id(end)) is not None}
        self.eos_token_ids |= {i for i in eos if isinstance(i, int)}
        self.vocab_size = backend.get_vocab_size()
        self.piece = cache(self.spell)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Text that is not Unicode (lone surrogates) has them replaced."""
        clean = text.encode("utf-8", "replace").decode()
        return list(self.backend.encode(clean, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        detokenizer = self.detokenizer(skip_special_tokens)
        return "".join(map(detokenizer.add, ids)) + detokenizer.finish()

    def detokenizer(self, skip_special_tokens: bool = True) -> "Detokenizer":
        return Detokenizer(self, skip_special_tokens)

    def spell(self, id: int) -> bytes:
        """The bytes of one token; none if the vocabulary does not have it."""
        token = self.backend.id_to_token(id) or ""
        if self.byte_level:
            alphabet = byte_alphabet()
            raw = id in self.added or not all(c in alphabet for c in token)
            return token.encode() if raw else bytes(alphabet[c] for c in token)
        if match := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(match[1])
        return token.replace("▁", " ").encode()

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation of {"role", "content"} messages; `variables` are the template's own."""
        template = self.template
        if isinstance(template, dict):
            template = template.get("tool_use" if tools else "default") or template.get("default")
        if not template or not isinstance(template, str):
            raise UserError("[chat template] this model has none", "Use --raw to give it the prompt as it is.")
        known = {**self.special_tokens, "tools": tools, "documents": None, **variables}
        return chat_template.render(template, messages, add_generation_prompt=add_generation_prompt, **known)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
        self.backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(self.config, indent=2, ensure_ascii=False), "utf-8")
        if isinstance(self.template, str):
            (folder / "chat_template.jinja").write_text(self.template, "utf-8")


class Detokenizer:
    """Ids to text as they come. The texts add up to `decode` of all ids, and no character is cut in two."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.strip = tokenizer.strip_first_space

    def add(self, id: int) -> str:
        """The text that is certain with this token: what ends inside a character waits for the rest of it."""
        added = self.tokenizer.added.get(id)
        piece = b"" if self.skip and added and added.special else self.tokenizer.piece(id)
        if self.strip and piece:
            piece, self.strip = piece.removeprefix(b" "), False
        return self.decoder.decode(piece)

    def finish(self) -> str:
        return self.decoder.decode(b"", final=True)


def content(token: Any) -> str:
    """A special token of tokenizer_config.json is its text, or an object that has it."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder; {} where there is none. transformers writes infinities as {"__float__": …}."""
    if not path.exists():
        return {}

    def infinite(found: dict[str, Any]) -> Any:
        return float(found["__float__"]) if found.keys() == {"__float__"} else found

    try:
        found = json.loads(path.read_bytes(), object_hook=infinite)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {str(error)[:100]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found a {type(found).__name__}, wanted a JSON object")
    return found


def from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; what ends a text is also in its model's configs."""
    path, config = folder / "tokenizer.json", read_json(folder / "tokenizer_config.json")
    ends = [read_json(folder / f"{name}.json").get("eos_token_id") for name in ("generation_config", "config")]
    eos = [i for end in ends for i in (end if isinstance(end, list) else [end])]
    if not path.is_file():
        raise UserError(f"{folder}: no tokenizer.json", "transformers' AutoTokenizer can make it with save_pretrained.")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: not a tokenizer: {str(error)[:200]}") from None
    backend.no_truncation()
    backend.no_padding()
    template, file = config.get("chat_template"), folder / "chat_template.jinja"
    if isinstance(template, list):
        template = {str(row.get("name")): str(row.get("template")) for row in template if isinstance(row, dict)}
    return Tokenizer(backend, config, file.read_text("utf-8") if file.is_file() else template, eos)


# -- GGUF ------------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """How a byte-level vocabulary cuts text before merging: each pattern splits the pieces of the one before it."""

    patterns: tuple[str, ...]
    add_bos: bool = False  # where the file does not say
    ignore_merges: bool = False  # a piece that is a token is not merged from characters


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS, LLAMA3 = Split((r"\p{N}", GPT2)), Split((QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"),), True, True)
PRE_TOKENIZERS = {  # tokenizer.ggml.pre
    "default": Split((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Split((GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Split((QWEN2,))),
    "tekken": Split((TEKKEN,), True, True),
}
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def from_gguf(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that a GGUF's metadata describes: byte-level BPE ("gpt2") or SentencePiece BPE ("llama")."""
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, tokens = values.get("model"), values.get("tokens")
    if kind not in BUILDERS:
        raise UserError(f"{path}: tokenizer.ggml.model {kind!r} is not supported; supported: {', '.join(BUILDERS)}")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{path}: tokenizer.ggml.tokens: found {type(tokens).__name__}, wanted a list of strings")
    try:
        backend, add_bos = BUILDERS[kind](values, tokens)
        types = list(zip(tokens, values.get("token_type", ()), strict=False))
        backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in types if k == CONTROL])
        backend.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in types if k == USER_DEFINED])
    except UserError as error:
        raise UserError(f"{path}: {error.what}", error.hint) from None
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: tokenizer: {str(error)[:200]}", "The vocabulary contradicts itself.") from None
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {key: values.get(f"{name}_token_id") for key, name in named.items()}
    config: dict[str, Any] = {key: tokens[i] for key, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if values.get("add_bos_token", add_bos) and "bos_token" in config:
        bos = config["bos_token"]
        backend.post_processor = processors.TemplateProcessing([bos, "$A"], special_tokens=[(bos, ids["bos_token"])])
    ends = [ids["eos_token"], values.get("eot_token_id")]
    return Tokenizer(backend, config, values.get("tokenizer.chat_template"), ends)


def byte_level(values: dict[str, Any], tokens: list[str]) -> tuple[Backend, bool]:
    name = values.get("pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UserError(f"tokenizer.ggml.pre {name!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}")
    split, merges = PRE_TOKENIZERS[name], [tuple(merge.split(" ", 1)) for merge in values.get("merges", ())]
    backend = Backend(models.BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=split.ignore_merges))
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_])
    backend.decoder = decoders.ByteLevel()
    return backend, split.add_bos


def sentence_piece(values: dict[str, Any], tokens: list[str]) -> tuple[Backend, bool]:
    """Merges are not in the file: every split of a token into two tokens is one, ranked by the token's score."""
    scores, vocab = values["scores"].tolist(), {token: i for i, token in enumerate(tokens)}
    pairs = [(scores[i], token[:n], token[n:]) for token, i in vocab.items() for n in range(1, len(token))]
    merges = [row for row in pairs if row[1] in vocab and row[2] in vocab]
    merges.sort(key=lambda row: (-row[0], len(row[1]), len(row[2])))
    unknown = tokens[values.get("unknown_token_id", 0)]
    bpe = models.BPE(vocab, [row[1:] for row in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend, prefix = Backend(bpe), bool(values.get("add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return backend, True


BUILDERS = {"gpt2": byte_level, "llama": sentence_piece}

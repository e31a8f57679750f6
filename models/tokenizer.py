"""Text to token ids and back: from a folder's tokenizer.json or tokenizer.model, or from what a GGUF holds."""

import codecs
import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from ..engine.errors import UserError
from . import chat_template, sentencepiece, vocabulary

END_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "<|return|>", "<|call|>",
)  # fmt: skip
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
        ends = {*END_OF_TURN, self.special_tokens.get("eos_token", "")}
        if backend.token_to_id("<|return|>") is not None:  # Harmony's: there <|end|> ends one message of several
            ends.discard("<|end|>")
        self.eos_token_ids = {i for end in ends if (i := backend.token_to_id(end)) is not None}
        self.eos_token_ids |= {i for i in eos if type(i) is int}
        self.vocab_size = backend.get_vocab_size()
        self.piece = cache(self.spell)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Text that is not Unicode (lone surrogates) has them replaced."""
        clean = text.encode("utf-8", "replace").decode()
        try:
            # a batch of one: unlike encode, it lets other threads run meanwhile
            return list(self.backend.encode_batch([clean], add_special_tokens=add_special_tokens)[0].ids)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"[tokenizer] {str(error)[:200]}", "The vocabulary contradicts itself.") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        detokenizer = self.detokenizer(skip_special_tokens)
        return "".join(map(detokenizer.add, ids)) + detokenizer.finish()

    def detokenizer(self, skip_special_tokens: bool = True, shown: Collection[str] = ()) -> "Detokenizer":
        """shown: special tokens that are never skipped."""
        return Detokenizer(self, skip_special_tokens, shown)

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
        named = self.template if isinstance(self.template, dict) else {"default": self.template}
        for name, text in named.items():
            path = folder / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
            if isinstance(text, str) and re.fullmatch(r"[\w-]+", name):
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, "utf-8")


class Detokenizer:
    """Ids to text as they come. The texts add up to `decode` of all ids, and no character is cut in two."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, shown: Collection[str] = ()) -> None:
        self.tokenizer, self.skip, self.shown = tokenizer, skip_special_tokens, shown
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.strip = tokenizer.strip_first_space

    def add(self, id: int) -> str:
        """The text that is certain with this token: what ends inside a character waits for the rest of it."""
        added = self.tokenizer.added.get(id)
        skipped = self.skip and added and added.special and added.content not in self.shown
        piece = b"" if skipped else self.tokenizer.piece(id)
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
    config = read_json(folder / "tokenizer_config.json")
    backend = from_json(folder / "tokenizer.json") or from_pieces(folder, config)
    if backend is None:
        raise UserError(f"{folder}: no tokenizer.json and no tokenizer.model", "Fetch the whole repo of the model.")
    return Tokenizer(backend, config, folder_templates(folder, config), end_ids(folder))


def from_json(path: Path) -> Backend | None:
    if not path.is_file():
        return None
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: not a tokenizer: {str(error)[:200]}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def from_pieces(folder: Path, config: dict[str, Any]) -> Backend | None:
    """A SentencePiece model with the tokens that were added to it later; `config` learns its special tokens."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        return None
    pieces, special = sentencepiece.read(path)
    for name, token in special.items():
        config.setdefault(name, token)
    with contradictions(path):
        backend = pieces.backend()
        vocabulary.mark(backend, pieces.spelled(), pieces.kinds)
        for id, added in added_tokens(folder, config):
            backend.add_tokens([added])
            if (found := backend.token_to_id(added.content)) != id:
                what = f"added token {added.content[:99]!r} is number {found}, wanted {id}, as the config says"
                raise UserError(what, "Fetch the model again.")
        surround(backend, config, bool(config.get("add_bos_token", True)), bool(config.get("add_eos_token", False)))
    return backend


@contextmanager
def contradictions(path: Path) -> Iterator[None]:
    """What goes wrong while a vocabulary is put together is said of its file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error.what}", error.hint) from None
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: tokenizer: {str(error)[:200]}", "The vocabulary contradicts itself.") from None


def added_tokens(folder: Path, config: dict[str, Any]) -> list[tuple[int, AddedToken]]:
    """Tokens beyond the vocabulary's own: tokenizer_config's added_tokens_decoder, or older, added_tokens.json."""
    rows = config.get("added_tokens_decoder") or {
        id: {"content": token, "special": True} for token, id in read_json(folder / "added_tokens.json").items()
    }
    try:
        named = [(int(id), AddedToken(content(row), normalized=False, special=bool(row.get("special"))))
                 for id, row in rows.items()]  # fmt: skip
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: added tokens: {str(error)[:100]}, wanted objects with a content by id") from None
    return sorted(named, key=lambda row: row[0])


def surround(backend: Backend, config: dict[str, Any], bos: bool, eos: bool) -> None:
    """Texts begin with the bos token and end with the eos token, where that is wanted and the token exists."""

    def known(name: str, wanted: bool) -> list[str]:
        text = content(config.get(name, ""))
        return [text] if wanted and backend.token_to_id(text) is not None else []

    first, last = known("bos_token", bos), known("eos_token", eos)
    if first or last:
        ids = [(token, backend.token_to_id(token)) for token in {*first, *last}]
        backend.post_processor = processors.TemplateProcessing([*first, "$A", *last], special_tokens=ids)


def end_ids(folder: Path) -> list[Any]:
    """What ends a text, as the model's configs say; a multi-modal config keeps it with its text part."""
    configs = [read_json(folder / f"{name}.json") for name in ("generation_config", "config")]
    nested = [config.get("text_config") for config in configs]
    found = [config.get("eos_token_id") for config in [*configs, *nested] if isinstance(config, dict)]
    return [i for ids in found for i in (ids if isinstance(ids, list) else [ids])]


def folder_templates(folder: Path, config: dict[str, Any]) -> Any:
    """The chat template, or several by name: files before what tokenizer_config.json holds."""
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {str(row.get("name")): str(row.get("template")) for row in found if isinstance(row, dict)}
    files = {file.stem: file for file in folder.glob("additional_chat_templates/*.jinja")}
    if (default := folder / "chat_template.jinja").is_file():
        files["default"] = default
    texts = {name: read_text(file) for name, file in files.items()}
    named = {**(found if isinstance(found, dict) else {"default": found} if found else {}), **texts}
    return named.get("default") if named.keys() <= {"default"} else named


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


# -- GGUF ------------------------------------------------------------------------------------------------------------


def from_gguf(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that a GGUF's metadata describes: byte-level BPE ("gpt2") or SentencePiece BPE ("llama")."""
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, tokens = values.get("model"), values.get("tokens")
    if not isinstance(kind, str) or kind not in BUILDERS:
        raise UserError(f"{path}: tokenizer.ggml.model {kind!r} is not supported; supported: {', '.join(BUILDERS)}")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{path}: tokenizer.ggml.tokens: found {type(tokens).__name__}, wanted a list of strings")
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {key: values.get(f"{name}_token_id") for key, name in named.items()}
    config: dict[str, Any] = {key: tokens[i] for key, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    with contradictions(path):
        backend, add_bos = BUILDERS[kind](values, tokens)
        vocabulary.mark(backend, tokens, values.get("token_type", ()))
        surround(backend, config, bool(values.get("add_bos_token", add_bos)), bool(values.get("add_eos_token", False)))
    ends = [values.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    return Tokenizer(backend, config, templates(values), ends)


def templates(values: dict[str, Any]) -> Any:
    """A GGUF's chat template, or several by name."""
    default, start = values.get("tokenizer.chat_template"), "tokenizer.chat_template."
    named = {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}
    for name, template in {"default": default, **named}.items():
        if not isinstance(template, str | None):
            raise UserError(f"{start}{name} is {type(template).__name__}, wanted text")
    return {"default": default, **named} if named else default


def byte_level(values: dict[str, Any], tokens: list[str]) -> tuple[Backend, bool]:
    name, known = values.get("pre", "default"), vocabulary.PRE_TOKENIZERS
    if name not in known:
        raise UserError(f"tokenizer.ggml.pre {name!r} is not supported; supported: {', '.join(known)}")
    return vocabulary.byte_level(tokens, values.get("merges", ()), known[name]), known[name].add_bos


def sentence_piece(values: dict[str, Any], tokens: list[str]) -> tuple[Backend, bool]:
    scores, kinds = values["scores"].tolist(), values["token_type"].tolist()
    prefix = bool(values.get("add_space_prefix", True))
    return vocabulary.Pieces(tokens, scores, kinds, values.get("unknown_token_id", 0), prefix=prefix).backend(), True


BUILDERS = {"gpt2": byte_level, "llama": sentence_piece}

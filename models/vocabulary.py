"""A vocabulary to a backend of the `tokenizers` library: byte-level BPE, and SentencePiece's BPE and Unigram.

Splits by name: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..engine.errors import UserError


class Split(NamedTuple):
    """How a byte-level vocabulary cuts text before merging: each pattern splits the pieces of the one before it."""

    patterns: tuple[str, ...]
    add_bos: bool = False  # where the file does not say
    ignore_merges: bool = False  # a piece that is a token is not merged from characters


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN2 = rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
WORD = rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+END|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*END"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN, GPT4O = WORD.replace("END", "") + r"|\p{N}" + REST, WORD.replace("END", f"{SHORT}?") + r"|\p{N}{1,3}" + REST
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
SPLITS = {  # how to split, and the names of tokenizer.ggml.pre that do so
    Split((PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): "default",
    Split((GPT2,)): "gpt-2 phi-2 mpt olmo jais exaone4 trillion gigachat a.x-4.0 mellum granite-docling",
    Split((r"\p{N}", GPT2)): "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    Split((LLAMA3,), True, True): "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    Split((LLAMA3,)): "smaug-bpe dbrx glm4 chatglm-bpe",
    Split((QWEN2,)): "qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez kormo f2llmv2 solar-open",
    Split((QWEN35,)): "qwen35",
    Split((TEKKEN,), True, True): "tekken",
    Split((GPT4O,)): "gpt-4o llama4 kanana2 talkie minimax-m2",
    Split((r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O)): "tiny_aya cohere2moe",
    Split((PUNCTUATION.replace("|]", "|`]"), GPT2, "[0-9][0-9][0-9]")): "falcon",
    Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN, r"\p{N}")): "deepseek-coder",
    Split((r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u30ff]+", DEEPSEEK3)): "deepseek-v3 hunyuan-dense joyai-llm",
}
PRE_TOKENIZERS = {name: split for split, names in SPLITS.items() for name in names.split()}


def byte_level(tokens: Sequence[str], merges: Sequence[str], split: Split) -> Tokenizer:
    """BPE over GPT-2's printable characters for bytes; `merges` are pairs with a space between."""
    pairs: Any = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs, ignore_merges=split.ignore_merges))
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    return backend


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's kinds; GGUF's are the same


@dataclass
class Pieces:
    """A SentencePiece vocabulary and how it normalizes text. `▁` stands for a space."""

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    unknown: int = 0
    unigram: bool = False
    charsmap: bytes = b""  # replacements, as SentencePiece compiles them
    prefix: bool = True  # a space goes before the text
    collapse: bool = False  # runs of spaces become one, those at the ends vanish

    def __post_init__(self) -> None:
        counts = len(self.pieces), len(self.scores), len(self.kinds)
        if len(set(counts)) > 1:
            raise UserError("found {} pieces, {} scores and {} types, wanted as many of each".format(*counts))
        if not 0 <= self.unknown < len(self.pieces):
            raise UserError(f"the unknown piece is {self.unknown}, wanted one of {len(self.pieces)} pieces")

    def backend(self) -> Tokenizer:
        model = self.unigram_model() if self.unigram else self.bpe_model()
        backend, steps = Tokenizer(model), [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.normalizer = normalizers.Sequence(list(self.normalizers()))
        backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * self.prefix)
        return backend

    def normalizers(self) -> Any:
        if self.charsmap:
            yield normalizers.Precompiled(self.charsmap)
        if self.collapse:
            yield from (normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " "))
        if self.prefix:
            yield normalizers.Prepend("▁")
        yield normalizers.Replace(" ", "▁")

    def spelled(self) -> list[str]:
        """User-defined pieces match the text as it is written, so their spaces are spaces."""
        kinds = zip(self.pieces, self.kinds, strict=True)
        return [piece.replace("▁", " ") if kind == USER_DEFINED else piece for piece, kind in kinds]

    def bpe_model(self) -> models.BPE:
        """Merges are not in the file: every split of a piece into two pieces is one, ranked by the piece's score."""
        vocab = {piece: i for i, piece in enumerate(self.spelled())}
        rows = zip(self.pieces, self.scores, self.kinds, strict=True)
        rank = {piece: score for piece, score, kind in rows if kind in (NORMAL, UNUSED)}
        merges = [(-score, n, len(piece) - n, piece[:n], piece[n:]) for piece, score in rank.items()
                  for n in range(1, len(piece)) if piece[:n] in rank and piece[n:] in rank]  # fmt: skip
        merges.sort(key=lambda row: row[:3])
        unknown, fallback = self.pieces[self.unknown], BYTE in self.kinds
        pairs = [row[3:] for row in merges]
        return models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)

    def unigram_model(self) -> models.Unigram:
        """Pieces that are no text, as <0x41>, get a score so low that text of that spelling is not taken for them."""
        rows = zip(self.spelled(), self.scores, self.kinds, strict=True)
        vocab = [(piece, score if kind in (NORMAL, UNUSED, USER_DEFINED) else NEVER) for piece, score, kind in rows]
        return models.Unigram(vocab, self.unknown, BYTE in self.kinds)


NEVER = -1e5


def mark(backend: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Tokens that text is searched for before anything else: control ones are special, user-defined ones are text."""
    rows = list(zip(tokens, kinds, strict=False))
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in rows if k == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in rows if k == USER_DEFINED])

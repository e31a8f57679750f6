"""Ids and text against transformers, sentencepiece and the tokenizers library, on text that breaks tokenizers."""

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lazulite.engine.errors import UserError
from lazulite.models import gguf, hub, tokenizer, vocabulary

CORPUS = [
    "",
    " ",
    "Hello, world!",
    "  two leading, two trailing  ",
    "tabs\tand\r\nnew\n\n\nlines   \n  x",
    "I'm, you're, IT'S, they'll've; O'Neil's",
    "Numbers 1 22 333 4444 55555, 3.14159, 1,000,000",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # comment\n\tif (a&&b||c) {x[i]+=1;}",
    "Ünïcödé straße naïve façade Ελληνικά русский עברית العربية हिन्दी ภาษาไทย 한국어",
    "日本語のテキストと中文文本，以及标点。「引用」",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 👍🏽 e\u0301 \u200b\u00a0\u3000\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_start|",
    "▁underline▁ <0x41> <s> </s> \x00\x01\x7f",
    "a" * 300,
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň! Đặng Thị Hồng; ığdır İSTANBUL",
    "ქართული ენა, Հայերեն, አማርኛ, தமிழ், తెలుగు, ಕನ್ನಡ, മലയാളം, বাংলা, မြန်မာ, ខ្មែរ, ລາວ, ᠮᠣᠩᠭᠣᠯ, ༄༅། །བོད་",
    "ﬁne ½ ² Ⅷ ㎏ ＦＵＬＬ　ｗｉｄｔｈ １２３ ﷺ ∑∫√∞≠≤ αβγ 𝒜𝓑𝔸 ẛ̣ Å Å A\u030a",
    "\n\n\n\t\t  \r\n \u2003x\u2028y\u0085z ",
    "SELECT * FROM `t` WHERE a<>'b\\'s' -- 100%\n<p class='x'>&nbsp;</p>\n#include <stdio.h>\nint main(){return 0x1F;}",
    "https://example.org/a?b=c&d=%20#e user@example.org $1,234.56 12:30:45 2024-02-29T00:00Z +49-170/1234",
    "🤷🏿‍♀️🧑‍🚀🕵️‍♂️❤️‍🔥👨‍👩‍👧‍👦🏴󠁧󠁢󠁥󠁮󠁧󠁿🇺🇳#️⃣ ☕︎ \U0001fae8\U000e0041",
]
TEXT = st.text("aé ßя日本👩\u200d🇫🇷\n", max_size=40)


@pytest.fixture(scope="module")
def path() -> Path:
    return hub.resolve()


@pytest.fixture(scope="module")
def real(path: Path) -> tokenizer.Tokenizer:
    return tokenizer.from_gguf(gguf.File(path).metadata, path)


# From SmolLM's tokenizer.json; transformers does not know the name for GGUF files. Digits before spaces: "x   12".
SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


@pytest.fixture(scope="module")
def reference(path: Path) -> object:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    made.backend_tokenizer.pre_tokenizer = SMOLLM
    return made


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_default_model_equals_transformers(real: tokenizer.Tokenizer, reference: object, text: str) -> None:
    ids = real.encode(text)
    assert ids == reference.encode(text)
    assert real.decode(ids, skip_special_tokens=False) == text
    assert real.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_digits_are_cut_off_as_in_the_original(real: tokenizer.Tokenizer) -> None:
    for text in (*CORPUS, "x   12 \n\n 3", "and ½ ² Ⅷ ٣٤٥"):
        assert real.backend.pre_tokenizer.pre_tokenize_str(text) == SMOLLM.pre_tokenize_str(text)


def test_folder_written_from_gguf_is_the_same_tokenizer(tmp_path: Path, real: tokenizer.Tokenizer) -> None:
    from transformers import AutoTokenizer

    real.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    again, theirs = tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.template == real.template and again.special_tokens == real.special_tokens
    assert again.eos_token_ids == real.eos_token_ids == {0, 2}
    for text in CORPUS:
        assert again.encode(text) == real.encode(text) == theirs.encode(text)
    messages = [{"role": "user", "content": "Hi"}]
    want = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert again.apply_chat_template(messages) == want


def pieces(tokens: tokenizer.Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = tokens.detokenizer()
    return [*map(detokenizer.add, ids), detokenizer.finish()]


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=30))
def test_stream_of_any_ids_adds_up(real: tokenizer.Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(real, ids)) == real.decode(ids) == real.backend.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_stream_never_cuts_a_character(real: tokenizer.Tokenizer, text: str) -> None:
    assert "".join(pieces(real, real.encode(text))) == text


def test_what_is_not_unicode_is_replaced(real: tokenizer.Tokenizer) -> None:
    assert real.decode(real.encode("a\udcffb")) == "a?b"
    assert real.decode([10**9]) == ""


SAMPLE = [*CORPUS, "The quick brown fox jumps over the lazy dog. " * 3, "tokenization tokenizers token to ken"]


def spm_metadata(path: Path) -> dict:
    """What llama.cpp's converter makes of a tokenizer.model, read by SentencePiece's own classes."""
    import numpy as np
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [p.piece.replace("▁", " ") if p.type == 4 else p.piece for p in proto.pieces],
        "tokenizer.ggml.scores": np.array([p.score for p in proto.pieces], np.float32),
        "tokenizer.ggml.token_type": np.array([p.type for p in proto.pieces], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
    }


MODELS = {  # of sentencepiece's trainer; `identity` leaves the text as it is
    "llama": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    "gemma": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
              "add_dummy_prefix": False, "user_defined_symbols": ["<b>", "</b>", "[@@]"]},
    "unknown": {"model_type": "bpe", "normalization_rule_name": "identity", "control_symbols": ["<pad>", "<mask>"]},
    "unigram": {"model_type": "unigram", "normalization_rule_name": "identity"},
    "bytes": {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity"},
    "t5": {"model_type": "unigram", "remove_extra_whitespaces": True},  # nmt_nfkc, the default
    "nfkc": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nfkc"},
}  # fmt: skip
@pytest.fixture(scope="module", params=MODELS)
def spm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A folder with a tokenizer.model that sentencepiece trained."""
    folder = tmp_path_factory.mktemp("spm")
    options = {"vocab_size": 800, "remove_extra_whitespaces": False, "character_coverage": 0.98, "minloglevel": 2}
    options |= {"hard_vocab_limit": False, **MODELS[request.param]}
    prefix = str(folder / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SAMPLE[2:]), model_prefix=prefix, **options)
    return request.param, folder


def comparable(name: str) -> list[str]:
    """Left out: text that spells special tokens; what NFKC changes, which `tokenizers` does by whole graphemes; and
    300 equal letters, whose best split is a tie that SentencePiece breaks in float32."""
    texts = [text for text in SAMPLE if not any(mark in text for mark in ("<s>", "▁", "\x00"))]
    if "normalization_rule_name" not in MODELS[name] or name == "nfkc":
        texts = [text for text in texts if text.isascii()]
    if MODELS[name]["model_type"] == "unigram":
        texts.remove("a" * 300)
    return [*texts, "a <b>bold</b> [@@] word", "x [@@[@@]]"] if name == "gemma" else texts


def test_tokenizer_model_equals_sentencepiece(spm: tuple[str, Path]) -> None:
    name, folder = spm
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    found = [tokenizer.from_folder(folder)]
    if MODELS[name]["model_type"] == "bpe" and name != "nfkc":  # a GGUF has no table of replacements
        found.append(tokenizer.from_gguf(spm_metadata(folder / "tokenizer.model"), Path("m.gguf")))
    pieces_of_it = [theirs.id_to_piece(i) for i in range(theirs.vocab_size())]
    for ours in found:
        assert (ours.special_tokens["bos_token"], ours.eos_token_ids) == ("<s>", {2})
        assert [ours.backend.id_to_token(i) for i in range(ours.vocab_size)] == pieces_of_it
        for text in comparable(name):
            ids = theirs.encode(text)
            assert ours.encode(text, add_special_tokens=False) == ids, text
            assert ours.encode(text) == [1, *ids]
            if 0 not in ids:  # an unknown piece has no text of its own
                assert "".join(pieces(ours, ids)) == ours.decode([1, *ids, 2]) == theirs.decode(ids)
                assert ours.decode(ids) == ours.backend.decode(ids)


@pytest.mark.parametrize("spm", ["llama", "gemma"], indirect=True)
def test_tokenizer_model_equals_transformers(spm: tuple[str, Path], tmp_path: Path) -> None:
    """Left out: text that begins with a space, before which transformers puts no prefix and SentencePiece does."""
    from shutil import copyfile

    from transformers import AutoTokenizer

    copyfile(spm[1] / "tokenizer.model", tmp_path / "tokenizer.model")
    config = {"tokenizer_class": f"{spm[0].title()}Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>", "add_bos_token": True}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": spm[0]}))
    ours, theirs = tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in comparable(spm[0]):
        if not text.startswith(" ") or spm[0] == "gemma":
            assert ours.encode(text) == theirs.encode(text)


def test_text_that_spells_a_byte_stays_text(spm: tuple[str, Path]) -> None:
    name, folder = spm
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = tokenizer.from_folder(folder).encode("is <0x41> A?", add_special_tokens=False)
    assert ids == theirs.encode("is <0x41> A?")


def test_tokens_added_to_a_sentencepiece_model(spm: tuple[str, Path], tmp_path: Path) -> None:
    from shutil import copyfile

    copyfile(spm[1] / "tokenizer.model", tmp_path / "tokenizer.model")
    size = tokenizer.from_folder(tmp_path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": size, "<x>": size + 1}))
    tokens = tokenizer.from_folder(tmp_path)
    assert tokens.encode("a<x><|end|>")[-2:] == [size + 1, size] and size in tokens.eos_token_ids
    rows = {size: {"content": "<think>", "special": False}, 1: {"content": "<s>", "special": True}}
    config = {"added_tokens_decoder": rows, "add_bos_token": False, "add_eos_token": True, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = tokenizer.from_folder(tmp_path)
    assert tokens.encode("<think>") == [size, 2] and tokens.decode([size]) == "<think>"
    rows = {size + 7: {"content": "zz!"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": rows}))
    with pytest.raises(UserError, match=rf"tokenizer.model: added token 'zz!' is number {size}, wanted {size + 7}"):
        tokenizer.from_folder(tmp_path)


def bpe_metadata(pre: str) -> dict:
    """A byte-level vocabulary trained on the sample with the split under test."""
    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(p), "isolated") for p in vocabulary.PRE_TOKENIZERS[pre].patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    backend.train_from_iterator(SAMPLE, trainers.BpeTrainer(vocab_size=600, **options))
    state = json.loads(backend.to_str())["model"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*state["vocab"], "<end>", "<think>"],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in state["merges"]],
        "tokenizer.ggml.token_type": [1] * len(state["vocab"]) + [3, 4],
        "tokenizer.ggml.bos_token_id": len(state["vocab"]),
        "tokenizer.ggml.eos_token_id": len(state["vocab"]),
    }


@pytest.mark.parametrize("pre", vocabulary.PRE_TOKENIZERS)
def test_every_split_is_lossless_and_transformers(pre: str) -> None:
    """Where transformers has the same split under the same name, the pieces are equal; text always survives."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokens = tokenizer.from_gguf(bpe_metadata(pre), Path("m.gguf"))
    size = tokens.vocab_size
    assert tokens.encode("x<think>y<end>", add_special_tokens=False)[1::2] == [size - 1, size - 2]
    assert (tokens.encode("x")[0] == size - 2) is vocabulary.PRE_TOKENIZERS[pre].add_bos
    theirs = GGUF_PRE_TOKENIZER_SPLITS.get(pre)
    split = pre_tokenizers.Split(Regex(theirs), "isolated") if theirs else None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in CORPUS:
        assert tokens.decode(tokens.encode(text)) == text
        if split:
            want = pre_tokenizers.Sequence([split, byte_level]).pre_tokenize_str(text)
            assert tokens.backend.pre_tokenizer.pre_tokenize_str(text) == want


BAD = [
    ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert' is not supported; supported: gpt2, llama"),
    ({"tokenizer.ggml.pre": "klingon"}, "tokenizer.ggml.pre 'klingon' is not supported; supported: default"),
    ({"tokenizer.ggml.tokens": 3}, "tokenizer.ggml.tokens: found int, wanted a list of strings"),
    ({"tokenizer.ggml.merges": ["a zzz"]}, "m.gguf: tokenizer:"),
    ({"tokenizer.ggml.merges": 7}, "m.gguf: tokenizer:"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_vocabularies(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokenizer.from_gguf(bpe_metadata("gpt-2") | changes, Path("m.gguf"))


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer.json and no tokenizer.model"):
        tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's, as Llama 3 has it
    with pytest.raises(UserError, match="tokenizer.model: not a SentencePiece model"):
        tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer"):
        tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="tokenizer_config.json: found a list, wanted a JSON object"):
        tokenizer.from_folder(tmp_path)


def test_end_ids_and_named_templates(tmp_path: Path) -> None:
    tokenizer.from_gguf(bpe_metadata("gpt-2"), Path("m.gguf")).save(tmp_path)
    templates = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    config = {"eos_token": {"content": "<end>"}, "chat_template": templates}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    tokens = tokenizer.from_folder(tmp_path)
    assert tokens.eos_token_ids == {0, 5, 6, tokens.encode("<end>")[0]}
    assert tokens.apply_chat_template([]) == "d" and tokens.apply_chat_template([], tools=[{}]) == "t"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}")
    assert tokenizer.from_folder(tmp_path).apply_chat_template([]) == "file <end>"
    assert tokenizer.from_folder(tmp_path).apply_chat_template([], tools=[{}]) == "t"  # the file is one of several
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("file for tools")
    (tmp_path / "again").mkdir()
    tokenizer.from_folder(tmp_path).save(tmp_path / "again")
    again = tokenizer.from_folder(tmp_path / "again")
    assert again.apply_chat_template([], tools=[{}]) == "file for tools"
    assert again.apply_chat_template([]) == "file <end>"


def test_end_ids_of_a_text_part_and_of_harmony(tmp_path: Path) -> None:
    """A multi-modal config keeps the ids with its text part; gpt-oss ends messages with <|end|> and turns otherwise."""
    metadata = bpe_metadata("gpt-2")
    for harmony in (False, True):
        words = ["<|end|>", "<|call|>", "<|return|>"] if harmony else ["<|end|>"]
        more = {"tokenizer.ggml.tokens": metadata["tokenizer.ggml.tokens"] + words}
        more["tokenizer.ggml.token_type"] = metadata["tokenizer.ggml.token_type"] + [3] * len(words)
        tokens = tokenizer.from_gguf(metadata | more, Path("m.gguf"))
        ends = [tokens.encode(word)[-1] in tokens.eos_token_ids for word in words]
        assert ends == ([False, True, True] if harmony else [True])
    tokens.save(tmp_path)
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": [7, 8]}, "eos_token_id": 9}')
    assert {7, 8, 9} <= tokenizer.from_folder(tmp_path).eos_token_ids

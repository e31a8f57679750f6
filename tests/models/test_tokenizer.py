"""Ids and text against transformers, sentencepiece and the tokenizers library, on text that breaks tokenizers."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lazulite.engine.errors import UserError
from lazulite.models import gguf, hub, tokenizer

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
]
TEXT = st.text("aé ßя日本👩\u200d🇫🇷\n", max_size=40)


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return hub.resolve()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def real(path: Path) -> tokenizer.Tokenizer:
    return tokenizer.from_gguf(gguf.File(path).metadata, path)


@pytest.fixture(scope="module")
def reference(path: Path) -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_default_model_equals_transformers(real: tokenizer.Tokenizer, reference: object, text: str) -> None:
    ids = real.encode(text)
    assert ids == reference.encode(text)
    assert real.decode(ids, skip_special_tokens=False) == text
    assert real.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_digits_are_cut_off_as_in_the_original(real: tokenizer.Tokenizer) -> None:
    """SmolLM's tokenizer.json splits digits first, so spaces before one stay together; transformers does not here."""
    original = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for text in (*CORPUS, "x   12 \n\n 3", "and ½ ² Ⅷ ٣٤٥"):
        assert real.backend.pre_tokenizer.pre_tokenize_str(text) == original.pre_tokenize_str(text)


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


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A SentencePiece BPE model with byte fallback, as Llama 2 and Mistral have."""
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = str(tmp_path_factory.mktemp("spm") / "m")
    options = {"vocab_size": 420, "model_type": "bpe", "byte_fallback": True, "character_coverage": 0.98}
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SAMPLE[2:]), model_prefix=prefix, **options)
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def spm_metadata(model: object) -> dict:
    import numpy as np

    size = range(model.vocab_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in size]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in size],
        "tokenizer.ggml.scores": np.array([model.get_score(i) for i in size], np.float32),
        "tokenizer.ggml.token_type": np.array(kinds),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.mark.parametrize("text", [t for t in SAMPLE[1:] if "<s>" not in t and "▁" not in t and "\x00" not in t])
def test_sentencepiece_equals_sentencepiece(piece_model: object, text: str) -> None:
    tokens = tokenizer.from_gguf(spm_metadata(piece_model), Path("m.gguf"))
    ids = piece_model.encode(text)
    assert tokens.encode(text) == [1, *ids]
    assert tokens.encode(text, add_special_tokens=False) == ids
    assert "".join(pieces(tokens, ids)) == tokens.decode([1, *ids, 2]) == text == tokens.backend.decode(ids)


def bpe_metadata(pre: str) -> dict:
    """A byte-level vocabulary trained on the sample with the split under test."""
    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(p), "isolated") for p in tokenizer.PRE_TOKENIZERS[pre].patterns]
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


@pytest.mark.parametrize("pre", tokenizer.PRE_TOKENIZERS)
def test_every_split_is_lossless_and_transformers(pre: str) -> None:
    """Where transformers has the same split under the same name, the pieces are equal; text always survives."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokens = tokenizer.from_gguf(bpe_metadata(pre), Path("m.gguf"))
    size = tokens.vocab_size
    assert tokens.encode("x<think>y<end>", add_special_tokens=False)[1::2] == [size - 1, size - 2]
    assert (tokens.encode("x")[0] == size - 2) is tokenizer.PRE_TOKENIZERS[pre].add_bos
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
    with pytest.raises(UserError, match="no tokenizer.json"):
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

"""GGUF files that we write, read by the `gguf` package and by ourselves: the reference's blocks, equal logits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf as reference
import holes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lazulite.engine import array as mx
from lazulite.engine.array import ggml_writer
from lazulite.engine.errors import UserError
from lazulite.models import load, vocabulary
from lazulite.models.convert import convert
from lazulite.models.gguf_writer import convert_gguf
from lazulite.quant import Format, Quantizer

TEXT = ["Hello, world! It's 12 o'clock in naïve Zürich.", "def f(x):\n    return x + 1\n", "日本語 👩‍👧 русский"]
SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": YARN}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"rope_parameters": LINEAR}),
}


def byte_level(pre: str) -> Tokenizer:
    split = vocabulary.PRE_TOKENIZERS[pre]
    made = vocabulary.byte_level((), (), split)
    options: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, **options))
    made.model.ignore_merges = split.ignore_merges
    made.add_special_tokens(["<s>", "<|im_end|>"])
    made.add_tokens(["<think>"])
    return made


def metaspace() -> Tokenizer:
    """As Llama 2's and Mistral's tokenizer.json: BPE over ▁ with byte tokens."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])  # fmt: skip
    words = ["<unk>", "<s>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    options: dict[str, Any] = {"vocab_size": 310, "special_tokens": words, "show_progress": False}
    made.train_from_iterator([TEXT[0]] * 3, trainers.BpeTrainer(**options))
    state = json.loads(made.to_str())
    state["added_tokens"] = [row for row in state["added_tokens"] if row["id"] < 3]
    made = Tokenizer.from_str(json.dumps(state))
    made.post_processor = processors.TemplateProcessing(["<s>", "$A"], special_tokens=[("<s>", 1)])
    return made


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, as transformers saves it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param) / "model"
    model, config, more = MODELS[request.param]
    made = model(config(**SIZE, **more))
    for weight in made.parameters():
        weight.data = (weight.data * 3 if weight.ndim > 1 else 1 + 0.1 * torch.randn_like(weight)).half().float()
    made.save_pretrained(path)
    tokens = metaspace() if request.param == "llama3" else byte_level("qwen2")
    tokens.save(str(path / "tokenizer.json"))
    unknown = "<unk>" if request.param == "llama3" else None
    config = {"eos_token": "<|im_end|>", "bos_token": "<s>", "unk_token": unknown}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    return path


def logits(path: Path, text: str = TEXT[0]) -> np.ndarray:
    model, tokens = load(path)
    return np.asarray(model(mx.array(tokens.encode(text))))


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_logits_vocabulary_and_template_survive(folder: Path, tmp_path: Path, kind: str) -> None:
    """Weights are exact in float16, so that both types give the same numbers back."""
    file = convert_gguf(str(folder), tmp_path / "m.gguf", kind)
    want = logits(folder)
    np.testing.assert_allclose(logits(file), want, atol=2e-5 * np.abs(want).max())
    (_, ours), (_, theirs) = load(file), load(folder)
    for text in [*TEXT, "<s>x<|im_end|> <think> y", "  a  b "]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert ours.eos_token_ids == theirs.eos_token_ids and ours.special_tokens == theirs.special_tokens
    assert ours.apply_chat_template([{"content": "hi"}]) == theirs.apply_chat_template([{"content": "hi"}]) == "<s>hi"
    back = convert(str(file), tmp_path / "back")
    np.testing.assert_allclose(logits(back), want, atol=2e-5 * np.abs(want).max())


SAME = {
    "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
    "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16", "F32"])
def test_the_package_reads_it(folder: Path, tmp_path: Path, kind: str) -> None:
    """Types are as llama.cpp chooses them, and blocks are the reference quantizer's, byte for byte."""
    from safetensors.torch import load_file

    read = reference.GGUFReader(convert_gguf(str(folder), tmp_path / "m.gguf", kind))
    source, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    assert read.get_field("general.architecture").contents() == config["model_type"]
    assert len(read.get_field("tokenizer.ggml.tokens").contents()) == config["vocab_size"]
    tensors = {tensor.name: tensor for tensor in read.tensors}
    head = "token_embd.weight" if config.get("tie_word_embeddings") else "output.weight"
    for name, theirs in SAME.items():
        type_ = "F32" if "norm" in name else "Q8_0" if name == head and kind.startswith("Q4") else kind
        assert tensors[name].tensor_type.name == type_
        want = reference.quants.quantize(source[theirs].numpy(), Q[type_])
        assert np.array_equal(tensors[name].data.view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("kind", ggml_writer.LAYOUTS)
def test_blocks_are_the_reference_quantizers(kind: str) -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((257, 64)) * np.exp(rng.uniform(-12, 8, (257, 1)))).astype(np.float32)
    values[0], values[1], values[2, ::2] = 0, 1, -1
    assert np.array_equal(ggml_writer.encode(kind, values).reshape(257, -1), reference.quants.quantize(values, Q[kind]))


@pytest.mark.parametrize(("bits", "group", "kind"), [(4, 32, "Q4_1"), (4, 64, "Q4_1"), (8, 32, "F16"), (3, 32, "F16")])
def test_codes_stay_where_gguf_has_the_layout(folder: Path, tmp_path: Path, bits: int, group: int, kind: str) -> None:
    """MLX's codes of 4 bits are Q4_1's; its 8 bits have minima, which Q8_0 has not."""
    quantized = convert(str(folder), tmp_path / "q", Quantizer(Format(group, bits)), "float16")
    file = convert_gguf(str(quantized), tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reference.GGUFReader(file).tensors}
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == kind
    model, _ = load(quantized)
    up = model.model.layers[0].mlp.up_proj
    want = mx.dequantize(up.weight, up.scales.astype(mx.float32), up.biases.astype(mx.float32), group, bits)
    found = reference.quants.dequantize(tensors["blk.0.ffn_up.weight"].data, Q[kind])
    np.testing.assert_allclose(found, np.asarray(want), atol=0 if kind == "Q4_1" else 2e-3)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_to_folder_to_gguf_is_the_same_file(folder: Path, tmp_path: Path, kind: str) -> None:
    first = convert_gguf(str(folder), tmp_path / "first.gguf", kind)
    again = convert_gguf(str(convert(str(first), tmp_path / "mlx")), tmp_path / "again.gguf")
    one, two = ({t.name: t for t in reference.GGUFReader(path).tensors} for path in (first, again))
    assert one.keys() == two.keys()
    assert all(one[n].tensor_type == two[n].tensor_type and np.array_equal(one[n].data, two[n].data) for n in one)


SLOW = """
import sys, time
from lazulite.models.gguf_writer import convert_gguf
def progress(done, total):
    print(done, flush=True)
    if done == 9:
        time.sleep(60)
convert_gguf(sys.argv[1], sys.argv[2], "Q8_0", progress)
"""


def test_kill_is_resumed(folder: Path, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SLOW, folder, tmp_path / "m.gguf"], stdout=subprocess.PIPE) as process:
        assert process.stdout and any(line == b"9\n" for line in process.stdout)
        process.kill()
    begun: list[int] = []
    file = convert_gguf(str(folder), tmp_path / "m.gguf", "Q8_0", lambda done, total: begun.append(done))
    assert begun[0] == 9 and file.read_bytes() == convert_gguf(str(folder), tmp_path / "n.gguf", "Q8_0").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "n.gguf"]


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    """112 MB in matrices of 8 MB, to a GGUF and back: memory grows by less than 6 of them."""
    wide = {"hidden_size": 2048, "intermediate_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16}
    config = SIZE | wide | {"head_dim": 128, "model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    names = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    shapes = {f"model.layers.{i}.{name}.weight": [2048, 2048] for i in range(2) for name in names}
    shapes |= {"model.embed_tokens.weight": [SIZE["vocab_size"], 2048], "model.norm.weight": [2048]}
    (tmp_path / "in").mkdir()
    holes.sparse(tmp_path / "in/model.safetensors", shapes, "F16")
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    byte_level("gpt-2").save(str(tmp_path / "in/tokenizer.json"))
    for source, dest in (("in", "m.gguf"), ("m.gguf", "out")):
        assert holes.growth(tmp_path / source, tmp_path / dest) < 6 * (8 << 20)


@pytest.mark.parametrize("pre", [names.split()[0] for names in vocabulary.SPLITS.values()])
def test_every_split_keeps_its_name(pre: str) -> None:
    from lazulite.models import gguf_writer, tokenizer

    tokens = tokenizer.Tokenizer(byte_level(pre), {}, None, [])
    assert gguf_writer.byte_level(tokens, json.loads(tokens.backend.to_str())["model"])["pre"] == pre


def test_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="type 'Q9_9' is not supported; supported: F32, F16"):
        convert_gguf(str(folder), tmp_path / "m.gguf", "Q9_9")
    (tmp_path / "there.gguf").touch()
    with pytest.raises(UserError, match="there.gguf: exists already"):
        convert_gguf(str(folder), tmp_path / "there.gguf")
    copy = convert(str(folder), tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    with pytest.raises(UserError, match="model_type 'gemma2' is not written as GGUF") as error:
        convert_gguf(str(copy), tmp_path / "m.gguf")
    assert "written: llama, mistral" in error.value.hint
    (copy / "config.json").write_text(json.dumps(config))
    odd = Tokenizer.from_file(str(copy / "tokenizer.json"))
    steps = [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(use_regex=False)]
    odd.pre_tokenizer = pre_tokenizers.Sequence(steps)
    odd.save(str(copy / "tokenizer.json"))
    with pytest.raises(UserError, match="splits text in a way that has no name in GGUF|BPE"):
        convert_gguf(str(copy), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists() and not list(tmp_path.glob("*.partial"))

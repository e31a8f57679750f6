"""Folders that we write, read by mlx-lm and safetensors; codes and scales against mlx's own quantizer."""

import errno
import json
import os
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
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

from lazulite.engine import array as mx
from lazulite.engine.errors import UserError
from lazulite.models import build, weights, writer
from lazulite.models.convert import convert
from lazulite.quant import Format, Quantizer

mlx = pytest.importorskip("mlx.core")
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": 16}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face folder with random bfloat16 weights, in shards."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("convert") / "hf"
    LlamaForCausalLM(LlamaConfig(**SIZE)).to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model*.safetensors"))) > 1
    vocabulary = {f"t{i}": i for i in range(96)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "t2", "tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "pytorch_model.bin").write_bytes(b"not copied")
    config = json.loads((folder / "config.json").read_text())
    config["odd"] = {"__float__": "-Infinity"}  # as transformers writes what JSON lacks
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("model*.safetensors") for name, value in load_torch(file).items()}


def test_unquantized_folder_is_the_same_model(tmp_path: Path, source: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = convert(str(source), tmp_path / "new/out", progress=lambda *counts: seen.append(counts))
    want, found = tensors(source), tensors(out)
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
    names = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
    names += ["model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert seen[0] == (0, len(want)) and seen[-1] == (len(want), len(want))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    count = sum(tensor.numel() for tensor in want.values())
    assert index["metadata"] == {"total_size": 2 * count, "total_parameters": count}
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())
    assert weights.read(out).config["odd"] == float("-inf")


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32), (4, 32)])
def test_quantized_folder_equals_mlx(tmp_path: Path, source: Path, bits: int, group: int) -> None:
    """Codes, scales and biases are bit for bit mlx's, and mlx-lm loads the folder and computes with it."""
    from mlx_lm.utils import load_model

    out = convert(str(source), tmp_path / "out", Quantizer(Format(group, bits)))
    found = mlx.load(str(out / "model.safetensors"))
    original = {name: x for file in source.glob("model*.safetensors") for name, x in mlx.load(str(file)).items()}
    for name, value in original.items():
        path = name.removesuffix(".weight")
        if value.ndim < 2:
            assert mlx.array_equal(found[name], value)
            continue
        for key, part in zip(("weight", "scales", "biases"), mlx.quantize(value, group, bits), strict=True):
            assert mlx.array_equal(found[f"{path}.{key}"], part) and found[f"{path}.{key}"].dtype == part.dtype
    config, want = json.loads((out / "config.json").read_text()), {"group_size": group, "bits": bits, "mode": "affine"}
    assert config["quantization"] == config["quantization_config"] == want
    model, _ = load_model(out)
    assert np.isfinite(np.array(model(mlx.array([[1, 2, 3]])).astype(mlx.float32))).all()


def test_dtype(tmp_path: Path, source: Path) -> None:
    out = convert(str(source), tmp_path / "out", dtype="float16")
    want, found = tensors(source), tensors(out)
    assert all(torch.equal(found[name], want[name].half()) for name in want)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A GGUF with 4- and 8-bit tensors; returns the values behind it under Hugging Face's names."""
    writer, rng = reference.GGUFWriter(path, "llama"), np.random.default_rng(0)
    sizes = {"block_count": 1, "embedding_length": 64, "feed_forward_length": 128, "context_length": 64}
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "gpt-2")
    writer.add_array("tokenizer.ggml.tokens", ["t", "0", *(f"t{i}" for i in range(94))])
    writer.add_array("tokenizer.ggml.merges", ["t 0"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_string("tokenizer.chat_template", "{{ messages[0].content }}")
    out = {}
    rows = {"token_embd": (96, 64, Q.Q8_0, "model.embed_tokens"), "output_norm": (64, 0, Q.F32, "model.norm")}
    layer = "model.layers.0."
    for name, path_, height, width in [
        ("attn_q", "self_attn.q_proj", 64, 64),
        ("attn_k", "self_attn.k_proj", 64, 64),
        ("attn_v", "self_attn.v_proj", 64, 64),
        ("attn_output", "self_attn.o_proj", 64, 64),
        ("ffn_gate", "mlp.gate_proj", 128, 64),
        ("ffn_up", "mlp.up_proj", 128, 64),
        ("ffn_down", "mlp.down_proj", 64, 128),
    ]:
        rows[f"blk.0.{name}"] = (height, width, Q.Q4_1 if name == "attn_q" else Q.Q4_0, layer + path_)
    rows |= {f"blk.0.{x}_norm": (64, 0, Q.F32, layer + y) for x, y in NORMS.items()}
    for name, (height, width, kind, hf) in rows.items():
        values = rng.standard_normal((height, width) if width else height, np.float32)
        raw = reference.quants.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=kind)
        value = reference.quants.dequantize(raw, kind)
        if name.endswith(("attn_q", "attn_k")):
            value = value.reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(64, 64)
        out[f"{hf}.weight"] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


NORMS = {"attn": "input_layernorm", "ffn": "post_attention_layernorm"}


def test_gguf_keeps_its_codes_and_loads_in_mlx_lm(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    want = write_gguf(tmp_path / "m.gguf")
    out = convert(str(tmp_path / "m.gguf"), tmp_path / "out")
    settings = json.loads((out / "config.json").read_text())["quantization"]
    assert settings["bits"] == 4 and settings["model.embed_tokens"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    found = mlx.load(str(out / "model.safetensors"))
    for name, value in want.items():
        path = name.removesuffix(".weight")
        if value.ndim == 2:
            parts = [found[f"{path}.{x}"].astype(mlx.float32) for x in ("scales", "biases")]
            bits = settings.get(path, settings)["bits"]
            np.testing.assert_array_equal(np.array(mlx.dequantize(found[name], *parts, 32, bits)), value)
        else:
            np.testing.assert_array_equal(np.array(found[name]), value)
    model, _ = load_model(out)
    assert np.isfinite(np.array(model(mlx.array([[1, 2, 3]])).astype(mlx.float32))).all()
    assert weights.read(out).tokenizer().apply_chat_template([{"content": "hi"}]) == "hi"
    again = convert(str(out), tmp_path / "again")  # an MLX folder stays as it is, byte for byte
    first, second = load_file(out / "model.safetensors"), load_file(again / "model.safetensors")
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_gguf_is_quantized_anew_when_asked(tmp_path: Path) -> None:
    want = write_gguf(tmp_path / "m.gguf")
    out = convert(str(tmp_path / "m.gguf"), tmp_path / "out", Quantizer(Format(64, 4)), dtype="float32")
    found = mlx.load(str(out / "model.safetensors"))
    name = "model.embed_tokens.weight"
    codes = mlx.quantize(mlx.array(want[name]), 64, 4)[0]
    assert mlx.array_equal(found[name], codes)


def test_tied_head_is_dropped(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "tied"
    folder.mkdir()
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    from safetensors.numpy import save_file

    save_file({"lm_head.weight": np.ones((4, 4)), "x.weight": np.ones(2)}, folder / "model.safetensors")
    assert list(tensors(convert(str(folder), tmp_path / "out"))) == ["x.weight"]


def full_after(count: int, monkeypatch: Any) -> None:
    """The disk is full at the `count`-th weight."""
    add, left = writer.Writer.add, iter(range(count))

    def full(self: writer.Writer, name: str, array: object) -> object:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return add(self, name, array)  # type: ignore[arg-type]

    monkeypatch.setattr(writer.Writer, "add", full)


def same_folder(out: Path, want: Path) -> bool:
    names = sorted(path.name for path in want.iterdir())
    return names == sorted(path.name for path in out.iterdir()) and all(
        (out / name).read_bytes() == (want / name).read_bytes() for name in names)  # fmt: skip


def test_full_disk_leaves_nothing_if_nothing_was_done(tmp_path: Path, source: Path, monkeypatch: Any) -> None:
    full_after(0, monkeypatch)
    with pytest.raises(UserError, match="out: could not be written: No space left on device"):
        convert(str(source), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def mixed() -> Quantizer:
    return Quantizer(Format(32, 4), lambda path: Format(32, 8) if "v_proj" in path or "1.mlp" in path else True)


def test_full_disk_and_interrupt_are_resumed(tmp_path: Path, source: Path, monkeypatch: Any) -> None:
    """The folder that three runs made together is byte for byte that of one run, and so is what config.json states."""
    want = convert(str(source), tmp_path / "want", mixed(), "float16")
    with monkeypatch.context() as patch:
        full_after(5, patch)
        with pytest.raises(UserError, match="out: could not be written: No space left on device") as error:
            convert(str(source), tmp_path / "out", mixed(), "float16")
    assert "the same command goes on after what" in error.value.hint
    begun: list[int] = []

    def stop(done: int, total: int) -> None:
        begun.append(done)
        if done == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(str(source), tmp_path / "out", mixed(), "float16", progress=stop)
    assert 0 < begun[0] <= 5 and not (tmp_path / "out").exists()
    out = convert(str(source), tmp_path / "out", mixed(), "float16", progress=lambda done, total: begun.append(done))
    assert begun[-1] > 14 and begun.count(14) == 2
    assert same_folder(out, want) and sorted(path.name for path in tmp_path.iterdir()) == ["out", "want"]


def test_other_settings_start_anew(tmp_path: Path, source: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(str(source), tmp_path / "out", mixed(), progress=stop)
    begun: list[int] = []
    out = convert(str(source), tmp_path / "out", dtype="float32", progress=lambda done, total: begun.append(done))
    assert begun[0] == 0 and same_folder(out, convert(str(source), tmp_path / "want", dtype="float32"))


SLOW = """
import sys, time
from lazulite.models.convert import convert
from lazulite.quant import Format, Quantizer
def progress(done, total):
    print(done, flush=True)
    if done == 12:
        time.sleep(60)
convert(sys.argv[1], sys.argv[2], Quantizer(Format(32, 4)), progress=progress)
"""


def test_kill_is_resumed_and_two_at_once_are_refused(tmp_path: Path, source: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SLOW, source, tmp_path / "out"], stdout=subprocess.PIPE) as process:
        assert process.stdout and any(line == b"12\n" for line in process.stdout)
        with pytest.raises(UserError, match="another llm convert is writing it"):
            convert(str(source), tmp_path / "out", Quantizer(Format(32, 4)))
        process.kill()
    with (tmp_path / "out.partial/journal.jsonl").open("ab") as journal:
        journal.write(b'{"tensors": {"cut off')  # as if it had been killed while it wrote a row
    begun: list[int] = []
    out = convert(str(source), tmp_path / "out", Quantizer(Format(32, 4)), progress=lambda done, _: begun.append(done))
    assert begun[0] == 12 and same_folder(out, convert(str(source), tmp_path / "want", Quantizer(Format(32, 4))))


def test_less_than_the_journal_says_is_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        convert(str(source), tmp_path / "out", progress=lambda done, total: 1 // (9 - done))
    os.truncate(tmp_path / "out.partial/1.part", 9)
    with pytest.raises(UserError, match="1.part: less is in it than the journal says"):
        convert(str(source), tmp_path / "out")


@pytest.mark.parametrize("quantized", [True, False])
def test_memory_is_that_of_the_largest_tensor(tmp_path: Path, quantized: bool) -> None:
    """32 matrices of 8 MB, 268 MB in all: while they are converted, memory grows by less than 5 of them."""
    (folder := tmp_path / "in").mkdir()
    holes.sparse(folder / "model.safetensors", {f"w{i}.weight": [2048, 2048] for i in range(32)}, "BF16")
    (folder / "config.json").write_text("{}")
    assert holes.growth(folder, tmp_path / "out", quantized) < 5 * (8 << 20)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss", "mixtral", "qwen3_moe"])
def test_families_whose_checkpoints_lie_otherwise(tmp_path: Path, kind: str) -> None:
    """GPT-2's matrices are turned, gpt-oss's fused: all are quantized, and the logits are near; routers keep 8 bits."""
    from families import ROWS, TINY, reference

    more = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
    reference(tmp_path / "hf", kind, **(ROWS["gpt2"][1] if kind == "gpt2" else more))
    folders = [tmp_path / "hf", convert(str(tmp_path / "hf"), tmp_path / "q", Quantizer(Format(32, 6)))]
    ids = mx.array(np.random.default_rng(0).integers(0, TINY["vocab_size"], 24).astype(np.int32))
    models = [build(weights.read(folder)) for folder in folders]
    want, found = (np.asarray(model(ids)) for model in models)
    assert np.abs(found - want).mean() < 0.1 * want.std()
    wide = [path for path, module in models[1].named_modules() if getattr(module, "bits", 0) == 8]
    assert len(wide) == (0 if kind == "gpt2" else models[1].config.num_hidden_layers)
    sizes = [sum(array.nbytes for _, array in model.named_parameters()) for model in models]
    assert sizes[1] < 0.35 * sizes[0]


def test_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: exists already"):
        convert(str(source), tmp_path / "there")
    with pytest.raises(UserError, match="dtype 'int3' is not supported; supported: float16, bfloat16, float32"):
        convert(str(source), tmp_path / "out", dtype="int3")
    with pytest.raises(UserError, match="there: no config.json"):
        convert(str(tmp_path / "there"), tmp_path / "out")
    (tmp_path / "there/config.json").write_text('{"a": ')
    with pytest.raises(UserError, match="config.json: not JSON"):
        convert(str(tmp_path / "there"), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        convert(str(source), tmp_path / "file/out")

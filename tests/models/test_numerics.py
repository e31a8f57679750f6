"""Logits held against transformers in float32: the same tiny random weights in both, prefill, then greedy decoding."""
import json
from pathlib import Path

import families
import gguf
import mlx.core as mlx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import torch
from families import ROWS, errors, reference
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5 as mlx_qwen3_5
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from lazulite.engine import array as mx
from lazulite.engine import nn
from lazulite.engine.generate import Engine, Sampling, Sequence
from lazulite.models import build, read
from lazulite.models.load import ALIASES, FAMILIES


@pytest.mark.parametrize("row", ROWS)
def test_family(row: str, tmp_path: Path) -> None:
    """Prefill in one step and in several, decoding, ragged steps; in bfloat16 and after 4-bit quantization."""
    found = families.measure(row, tmp_path)
    for column, (name, tolerance) in families.COLUMNS.items():
        assert found.get(name, 0.0) <= tolerance, (column, found)
    assert found["chunked"] <= 2e-4 and found["greedy"] and found.get("4-bit greedy", True), found


def test_table_is_current() -> None:
    """docs/families.md has the rows and the columns of families.py; its digits are those of the last run."""
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text("utf-8")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [row[:2] for row in table[1:]] == [[row, ROWS[row][0]] for row in ROWS], "run tests/models/families.py"
    assert table[0] == ["row", "model_type", *families.heads(), "formats tried"] and text.startswith(families.HEAD)


def test_every_family_has_a_row() -> None:
    assert {ALIASES.get(model_type, model_type) for model_type, _ in ROWS.values()} == set(FAMILIES)


def compare(model, theirs, exact: float = 2e-4, fast: float = 2e-4, cache: mx.Dtype = mx.float32) -> None:
    """The prompt in steps of 4 tokens, and in one step, where kernels may round activations to 8 bits or bfloat16."""
    for chunk, tolerance in (4, exact), (families.PROMPT, fast):
        prompt, decoded, same = errors(model, theirs, chunk, cache)
        assert max(prompt, decoded) <= tolerance and (same or tolerance > 2e-4), (chunk, prompt, decoded)


@pytest.mark.parametrize("row", ["mistral window", "gemma2", "qwen3_moe", "qwen3_5", "gpt_oss"])
def test_engine_steps_are_solo(row: str, tmp_path: Path) -> None:
    """Prompts in chunks beside sequences that decode, as the engine packs them: each gets its solo tokens, logprobs."""
    reference(tmp_path, ROWS[row][0], **ROWS[row][1])
    model, random = build(read(tmp_path)), np.random.default_rng(2)
    prompts = [random.integers(0, 256, n).tolist() for n in (50, 3, 21, 33)]

    def run(prompts: list[list[int]], **options) -> list[tuple[list[int], list[float]]]:
        engine = Engine(model, max_context=128, cache_dtype=mx.float32, **options)
        waiting = [Sequence(p, Sampling(temp=0.0, max_tokens=6)) for p in prompts]
        sequences, running, logprobs = list(waiting), [], {}
        while waiting or running:
            if waiting:                                    # one more joins in every step
                engine.start(waiting[0])
                running.append(waiting.pop(0))
            for s in engine.step(running):
                logprobs.setdefault(id(s), []).append(s.logprob)
            for s in [s for s in running if s.finish_reason]:
                running.remove(s)
                engine.release(s)
        return [(s.tokens, logprobs[id(s)]) for s in sequences]

    together = run(prompts, max_sequences=4, max_step=24)
    for prompt, (tokens, logprobs) in zip(prompts, together, strict=True):
        [(wanted, wanted_logprobs)] = run([prompt])
        assert tokens == wanted
        np.testing.assert_allclose(logprobs, wanted_logprobs, atol=2e-5)


def test_hybrids_find_prefixes_again(tmp_path: Path) -> None:
    """A prompt that begins as others did goes on from states that were kept at the end of a page, and no others."""
    reference(tmp_path, ROWS["qwen3_5"][0], **ROWS["qwen3_5"][1])
    model, random = build(read(tmp_path)), np.random.default_rng(3)
    head = random.integers(0, 256, 70).tolist()
    prompts = [head, head, head + [1, 2, 3] * 15, head[:40], [5] + head, head + [1, 2, 3] * 20]
    reused = [0, 64, 64, 32, 0, 96]                        # of head[:40] a page of 32, kept as a step of 32 ended there

    def run(engine: Engine, prompt: list[int]) -> tuple[int, list[int], float]:
        sequence = Sequence(prompt, Sampling(temp=0.0, max_tokens=5))
        engine.start(sequence)
        found = sequence.reused
        while not sequence.finish_reason:
            engine.step([sequence])
        engine.release(sequence)
        return found, sequence.tokens, sequence.logprob

    options = dict(max_context=256, max_step=32, cache_dtype=mx.float32)
    engine = Engine(model, **options)
    for prompt, wanted in zip(prompts, reused, strict=True):
        found, tokens, logprob = run(engine, prompt)
        _, alone, alone_logprob = run(Engine(model, **options), prompt)
        assert found == wanted and tokens == alone and abs(logprob - alone_logprob) <= 1e-5


MULTIMODAL = {
    "gemma3": dict(vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                      image_size=28, patch_size=14), mm_tokens_per_image=4),
    "mistral3": dict(vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                        num_attention_heads=2, image_size=28, patch_size=14, model_type="pixtral")),
    "qwen3_5": dict(vision_config=dict(hidden_size=32, intermediate_size=32, depth=1, num_heads=2, out_hidden_size=64,
                                       num_position_embeddings=16)),
}
TEXT = {"gemma3": "gemma3_text", "mistral3": "mistral window", "qwen3_5": "qwen3_5"}


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_text_part_of_a_multimodal_checkpoint(model_type: str, tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    text_type, text = ROWS[TEXT[model_type]]
    config = AutoConfig.for_model(model_type, **MULTIMODAL[model_type],
                                  text_config={**families.TINY, **text, "model_type": text_type})
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = build(read(tmp_path))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "text" in said
    compare(model, theirs)


def test_fused_experts(tmp_path: Path) -> None:
    """Qwen 3.5 MoE as its publisher stores it: one tensor for all experts' gates and ups, one for their downs."""
    theirs = reference(tmp_path, ROWS["qwen3_5_moe"][0], **ROWS["qwen3_5_moe"][1])
    tensors, experts = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in tensors if ".experts." in name]:
        path, _, rest = name.partition(".experts.")
        experts.setdefault(path, {})[rest] = tensors.pop(name)
    for path, parts in experts.items():
        single = [[parts[f"{e}.{kind}_proj.weight"] for kind in ("gate", "up", "down")] for e in range(6)]
        tensors[f"{path}.experts.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in single])
        tensors[f"{path}.experts.down_proj"] = torch.stack([down for *_, down in single])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    compare(build(read(tmp_path)), theirs)


def test_mlx_layout_of_a_hybrid(tmp_path: Path) -> None:
    """mlx-lm keeps 1 + the norms' weights and the convolution's axes the other way; its quantized folders load here."""
    theirs = reference(tmp_path / "hf", ROWS["qwen3_5"][0], **ROWS["qwen3_5"][1])
    config = {**json.loads((tmp_path / "hf" / "config.json").read_text()), "model_type": "qwen3_5"}
    config["full_attention_interval"] = 4
    model = mlx_qwen3_5.Model(mlx_qwen3_5.ModelArgs.from_dict(config))
    weights = model.sanitize(dict(mlx.load(str(tmp_path / "hf" / "model.safetensors"))))
    model.load_weights(list(weights.items()), strict=False)
    mlx_nn.quantize(model, 32, 8)
    (tmp_path / "mlx").mkdir()
    config["quantization"] = {"group_size": 32, "bits": 8}
    (tmp_path / "mlx" / "config.json").write_text(json.dumps(config))
    tensors = dict(tree_flatten(model.parameters()))
    mlx.save_safetensors(str(tmp_path / "mlx" / "model.safetensors"), tensors, {"format": "mlx"})
    ours, ids = build(read(tmp_path / "mlx")), list(range(9))
    wanted = np.array(model(mlx.array([ids]))[0])
    with mx.fast.precise():
        context = nn.Context.single(9, nn.caches(ours.cache_spec(), 1, 1, mx.float32))
        found = np.asarray(ours(mx.array(ids, mx.int32), context))
    assert np.abs(found - wanted).max() <= 2e-4 * np.abs(wanted).max()
    with torch.inference_mode():
        close = theirs(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(found - close).max() <= 0.1 * np.abs(close).max()


@pytest.mark.parametrize(("cache", "error"), [(mx.float16, 2e-3), (mx.bfloat16, 2e-2), (mx.int8, 3e-2)], ids=str)
def test_cache_dtype(cache: mx.Dtype, error: float, tmp_path: Path) -> None:
    """What rounding keys and values costs."""
    theirs = reference(tmp_path)
    compare(build(read(tmp_path)), theirs, exact=error, fast=error + 1e-2, cache=cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = reference(tmp_path, dtype=dtype, attention_bias=True, mlp_bias=True)
    model = build(read(tmp_path))
    assert str(model.lm_head.weight.dtype).split(".")[-1] == str(dtype).split(".")[-1]
    compare(model, theirs)


def test_shards(tmp_path: Path) -> None:
    theirs = reference(tmp_path, shard="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    compare(build(read(tmp_path)), theirs)


def quantize_folder(folder: Path, formats: dict[str, tuple[int, int]], default: tuple[int, int]) -> dict:
    """Rewrites a folder as mlx-lm would, with mlx's own quantizer. Returns the weights that the codes stand for."""
    config = json.loads((folder / "config.json").read_text())
    entry = {"bits": default[0], "group_size": default[1], "mode": "affine"}
    entry |= {path: {"bits": bits, "group_size": group} for path, (bits, group) in formats.items()}
    tensors, dense = {}, {}
    for name, weight in mlx.load(str(folder / "model.safetensors")).items():
        path = name.removesuffix(".weight")
        bits, group = formats.get(path, default)
        if weight.ndim == 2:
            codes, scales, biases = mlx.quantize(weight, group, bits)
            tensors |= {name: codes, f"{path}.scales": scales, f"{path}.biases": biases}
            weight = mlx.dequantize(codes, scales.astype(mlx.float32), biases.astype(mlx.float32), group, bits)
        else:
            tensors[name] = weight
        dense[name] = torch.tensor(np.array(weight.astype(mlx.float32)))
    mlx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization": entry, "quantization_config": entry}))
    return dense


MIXED = {"lm_head": (8, 64), "model.embed_tokens": (8, 32), "model.layers.1.mlp.down_proj": (8, 32)}
QUANTIZED = {  # (bits, group size), exceptions by path
    "4 bits": ((4, 64), {}),
    "4 bits, groups of 32": ((4, 32), {}),
    "8 bits": ((8, 64), {}),
    "mixed": ((4, 32), MIXED),
}


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("row", QUANTIZED)
def test_quantized(row: str, tied: bool, tmp_path: Path) -> None:
    default, formats = QUANTIZED[row]
    theirs = reference(tmp_path, tie_word_embeddings=tied, intermediate_size=128, dtype=torch.bfloat16)
    theirs.load_state_dict(quantize_folder(tmp_path, formats, default), strict=not tied)
    model = build(read(tmp_path))
    assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding)
    compare(model, theirs, exact=1e-3, fast=4e-2)          # activations of 14 bits and of 8


NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
         "o_proj": "attn_output", **{f"{x}_proj": f"attn_{x}" for x in "qkv"},
         **{f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}}


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_gguf_architectures(arch: str, tmp_path: Path) -> None:
    """A file as llama.cpp's converter writes it, by the package `gguf`."""
    theirs = reference(tmp_path / "hf", arch, head_dim=16)
    writer, c = gguf.GGUFWriter(tmp_path / "model.gguf", arch), theirs.config
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    for name, weight in theirs.state_dict().items():
        words = name.split(".")
        layer = f"blk.{words[2]}." if "layers" in words else ""
        writer.add_tensor(f"{layer}{NAMES[words[-2]]}.{words[-1]}", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    compare(build(read(tmp_path / "model.gguf")), theirs)

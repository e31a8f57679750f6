"""GGUF files of every architecture, written with the package `gguf` from tiny models of transformers: names are the
package's, what is done to values is what llama.cpp's convert_hf_to_gguf.py does. Logits against transformers."""
import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from lazulite.engine import array as mx
from lazulite.engine import nn
from lazulite.engine.errors import UserError
from lazulite.models import build, read

TINY = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=False,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32, truncate=False)
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=128, partial_rotary_factor=0.5,
                short_factor=[1.0 + i / 8 for i in range(4)], long_factor=[2.0 + i for i in range(4)])
LINEAR = {"full_attention": dict(rope_type="linear", rope_theta=1e6, factor=8.0),
          "sliding_attention": dict(rope_type="default", rope_theta=1e4)}
GEMMA = dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=8, tie_word_embeddings=True)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
ROWS = {  # architecture, model_type, what differs from TINY
    "llama": ("llama", "llama", dict(attention_bias=True)),
    "mixtral": ("llama", "mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen3", dict(head_dim=32)),
    "qwen2moe": ("qwen2moe", "qwen2_moe", {**MOE, "shared_expert_intermediate_size": 48}),
    "qwen3moe": ("qwen3moe", "qwen3_moe", {**MOE, "head_dim": 32, "norm_topk_prob": True}),
    "gemma": ("gemma", "gemma", dict(head_dim=32, tie_word_embeddings=True)),
    "gemma2": ("gemma2", "gemma2", dict(**GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=3.0)),
    "gemma3": ("gemma3", "gemma3_text", dict(**GEMMA, num_hidden_layers=6, rope_parameters=LINEAR)),
    "phi3": ("phi3", "phi3", dict(pad_token_id=0, original_max_position_embeddings=128, rope_parameters=LONGROPE)),
    "smollm3": ("smollm3", "smollm3", dict(pad_token_id=0, no_rope_layer_interval=4, tie_word_embeddings=True)),
    "olmo2": ("olmo2", "olmo2", {}),
    "granite": ("granite", "granite", dict(embedding_multiplier=3.0, attention_multiplier=0.2, logits_scaling=4.0,
                                           residual_multiplier=0.5)),
    "cohere2": ("cohere2", "cohere2", dict(sliding_window=8, sliding_window_pattern=4, logit_scale=0.5,
                                           tie_word_embeddings=True)),
    "gpt-oss": ("gpt-oss", "gpt_oss", dict(num_local_experts=4, num_experts_per_tok=2, head_dim=32, sliding_window=8,
                                           rope_parameters=YARN)),
    "gpt2": ("gpt2", "gpt2", dict(n_embd=64, n_layer=4, n_head=4, n_positions=256, num_key_value_heads=4,
                                  intermediate_size=256, tie_word_embeddings=True)),
}
KEYS = {  # of `architecture.`, from the config's fields
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.sliding_window": "sliding_window",
    "expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
}


def metadata(arch: str, config) -> dict[str, int | float | str]:
    found = {key: getattr(config, name, None) for key, name in KEYS.items()}
    rope = config.rope_parameters if arch != "gpt2" else {}
    full = rope.get("full_attention", rope)
    found["rope.freq_base"] = full.get("rope_theta")
    found["attention.key_length"] = getattr(config, "head_dim", None) if arch != "phi3" else None
    found["expert_count"] = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    found["logit_scale"] = getattr(config, "logit_scale", None) or getattr(config, "logits_scaling", None)
    if arch in ("cohere2", "gpt2"):
        found["attention.layer_norm_epsilon"] = getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon
    if arch == "phi3":
        found["rope.dimension_count"] = int(full["partial_rotary_factor"] * 16)
    if full.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": full["rope_type"], "rope.scaling.factor": full["factor"]}
    found["rope.scaling.original_context_length"] = full.get("original_max_position_embeddings")
    return {"general.architecture": arch, **{f"{arch}.{key}": v for key, v in found.items() if v is not None}}


def interleaved(w: torch.Tensor, heads: int) -> torch.Tensor:
    return w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def converted(arch: str, config, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values that llama.cpp writes, under Hugging Face's names, experts as stacks."""
    made: dict[str, torch.Tensor] = {}
    for name, w in tensors.items():
        if arch in ("llama", "granite", "smollm3") and (found := re.search(r"\b(q|k)_proj\.", name)):
            w = interleaved(w, config.num_attention_heads if found[1] == "q" else config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            w = w + 1
        if arch == "gpt2" and re.search(r"c_(attn|proj|fc)\.weight", name):
            w = w.T
        if "sinks" in name:
            name += ".weight"
        if found := re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj(_bias)?", name):  # gpt-oss
            w = w if found[3] else w.transpose(1, 2)
            leaf = "bias" if found[3] else "weight"
            parts = {"down_proj": w} if found[2] == "down" else {"gate_proj": w[:, ::2], "up_proj": w[:, 1::2]}
            made |= {f"{found[1]}.{kind}.{leaf}": part for kind, part in parts.items()}
        elif found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            stack = f"{found[1]}.{found[3]}.weight".replace("model.layers", "layers").replace(
                "block_sparse_moe", "feed_forward") if arch == "llama" else f"{found[1]}.{found[3]}.weight"
            made[stack] = torch.cat([made[stack], w[None]]) if stack in made else w[None]
        else:
            made[name] = w
    return made


def write(path: Path, arch: str, config, tensors: dict[str, torch.Tensor], kinds: dict[str, Q] | None = None,
          split: int = 0) -> None:
    """`kinds`: types by a part of the name, F32 for the rest. split: tensors in each of several files."""
    code = next(code for code, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(code, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, None, split_max_tensors=split)
    for key, value in metadata(arch, config).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    values = converted(arch, config, tensors)
    if arch == "phi3":
        for kind in ("long", "short"):
            factors = np.array(config.rope_parameters[f"{kind}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", factors)
    for name, w in values.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known, name
        matrix = known.endswith("weight") and w.ndim > 1
        kind = next((q for part, q in (kinds or {}).items() if matrix and part in known), Q.F32)
        writer.add_tensor(known, gguf.quants.quantize(w.contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reference(folder: Path, model_type: str, changes: dict):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TINY, **changes})).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def worst(ours, theirs, tokens: int = 20) -> float:
    """The largest difference of logits, of the largest logit, in steps of 4 tokens; the cache is float16."""
    ids, rows = list(range(3, 3 + tokens)), []
    layers = [spec.empty(1, 1, mx.float16) for spec in ours.cache_spec()]
    for start in range(0, tokens, 4):
        context = nn.Context.single(4, layers, start=start)
        logits = ours(mx.array(ids[start : start + 4]), context)
        mx.eval(logits, *(array for layer in context.layers for array in layer if array is not None))
        layers = context.layers
        rows.append(np.asarray(logits))
    with torch.inference_mode():
        wanted = theirs(torch.tensor([ids])).logits[0].numpy()
    return float(np.abs(np.concatenate(rows) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("row", ROWS)
def test_logits(row: str, tmp_path: Path) -> None:
    arch, model_type, changes = ROWS[row]
    model, tensors = reference(tmp_path / "hf", model_type, changes)
    write(tmp_path / "m.gguf", arch, model.config, tensors)
    files = read(tmp_path / "m.gguf")
    assert files.config["model_type"] == model_type
    assert files.config["architectures"] == json.loads((tmp_path / "hf/config.json").read_text())["architectures"]
    assert worst(build(files), model) < 2e-3


def test_gpt_oss_experts_of_mxfp4_stay_mxfp4(tmp_path: Path) -> None:
    arch, model_type, changes = ROWS["gpt-oss"]
    model, tensors = reference(tmp_path / "hf", model_type, changes)
    write(tmp_path / "m.gguf", arch, model.config, tensors, {"_exps": Q.MXFP4, "attn_": Q.Q8_0})
    ours = build(read(tmp_path / "m.gguf"))
    gate = ours.model.layers[0].mlp.experts.gate_proj
    w = converted(arch, model.config, tensors)["model.layers.0.mlp.experts.gate_proj.weight"].contiguous().numpy()
    wanted = gguf.quants.dequantize(gguf.quants.quantize(w, Q.MXFP4), Q.MXFP4)
    found = mx.dequantize(*gate.matrix(), mode=gate.mode, dtype=mx.float32)
    assert (gate.mode, gate.bits, gate.scales.dtype) == ("mxfp4", 4, mx.uint8)
    assert np.array_equal(np.asarray(found), wanted)
    assert ours.model.layers[0].self_attn.q_proj.bits == 8


def test_split_files(tmp_path: Path) -> None:
    model, tensors = reference(tmp_path / "hf", "llama", {})
    write(tmp_path / "m.gguf", "llama", model.config, tensors, split=20)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 1 and files[0].name == f"m-00001-of-{len(files):05d}.gguf"
    for file in files:  # any of them names the model
        assert worst(build(read(file)), model, 4) < 2e-3
    assert read(files[0]).nbytes == sum(file.stat().st_size for file in files)
    files[-1].unlink()
    with pytest.raises(UserError, match=rf"1 of {len(files)} files are missing, the first is '{files[-1].name}'"):
        read(files[0])

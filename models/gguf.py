"""What a GGUF file's metadata and names mean: the Hugging Face config and weights that they amount to.

The format itself is read in engine/array/gguf.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..engine import array as mx
from ..engine.array.gguf import File, Tensor
from ..engine.errors import UserError

__all__ = ["File", "config", "hf_name", "open_all", "parts"]
MODULES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
SIZES = {
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size", "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads", "context_length": "max_position_embeddings",
}  # fmt: skip
FIELDS = {  # what a file may say beyond that, and its type
    "attention.sliding_window": ("sliding_window", int), "attn_logit_softcapping": ("attn_logit_softcapping", float),
    "final_logit_softcapping": ("final_logit_softcapping", float), "logit_scale": ("logit_scale", float),
    "expert_count": ("num_local_experts", int), "expert_used_count": ("num_experts_per_tok", int),
    "expert_feed_forward_length": ("moe_intermediate_size", int),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size", int),
    "attention.scale": ("attention_multiplier", float), "embedding_scale": ("embedding_multiplier", float),
    "residual_scale": ("residual_multiplier", float),
}  # fmt: skip
AROUND = {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
          "post_ffw_norm": "post_feedforward_layernorm"}


def experts(place: str, router: str) -> dict[str, str]:
    stacks = {f"ffn_{kind}_exps": f"{place}.{kind}_proj" for kind in ("gate", "up", "down")}
    return {**stacks, "ffn_gate_inp": router}


class Architecture(NamedTuple):
    """What `general.architecture` means: Hugging Face's class and model_type, modules whose names differ from MODULES,
    and what the config says that the file does not."""

    hf_class: str
    model_type: str
    names: dict[str, str] = {}
    constants: dict[str, Any] = {}


GEMMA = {"hidden_act": "gelu_pytorch_tanh"}
MIXTRAL = "llama with experts"
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "llama"),
    MIXTRAL: Architecture("MixtralForCausalLM", "mixtral",
                          experts("block_sparse_moe.switch_mlp", "block_sparse_moe.gate")),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3"),
    "qwen2moe": Architecture("Qwen2MoeForCausalLM", "qwen2_moe", experts("mlp.switch_mlp", "mlp.gate") | {
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        **{f"ffn_{kind}_shexp": f"mlp.shared_expert.{kind}_proj" for kind in ("gate", "up", "down")}}),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", "qwen3_moe", experts("mlp.switch_mlp", "mlp.gate"),
                             {"norm_topk_prob": True}),
    "gemma": Architecture("GemmaForCausalLM", "gemma", {}, GEMMA),
    "gemma2": Architecture("Gemma2ForCausalLM", "gemma2", AROUND, GEMMA),
    "gemma3": Architecture("Gemma3ForCausalLM", "gemma3_text", AROUND, GEMMA),
    "phi3": Architecture("Phi3ForCausalLM", "phi3", {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
    "smollm3": Architecture("SmolLM3ForCausalLM", "smollm3"),
    "olmo2": Architecture("Olmo2ForCausalLM", "olmo2", AROUND),
    "granite": Architecture("GraniteForCausalLM", "granite"),
    "cohere2": Architecture("Cohere2ForCausalLM", "cohere2"),
    "gpt-oss": Architecture("GptOssForCausalLM", "gpt_oss", experts("mlp.experts", "mlp.router") | {
        "post_attention_norm": "post_attention_layernorm", "attn_sinks": "self_attn.sinks"}),
    "gpt2": Architecture("GPT2LMHeadModel", "gpt2", {
        "token_embd": "model.wte", "position_embd": "model.wpe", "output_norm": "model.ln_f", "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj"}, {"hidden_act": "gelu_new", "attention_bias": True}),
}
INTERLEAVED = ("llama", "granite", "smollm3")  # llama.cpp puts the rows of these heads in another order
OFFSET = ("gemma", "gemma2", "gemma3")  # norms are kept as they are multiplied, Hugging Face's less 1
COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # not weights: in the config
WHOLE_WINDOWS = {"gemma2": 46, "gemma3": 62}  # layers of the 27B, whose scores are scaled by hidden size over heads


def open_all(path: Path) -> File:
    """The file, with the tensors of all files of a model that was split: name-00001-of-00003.gguf, …"""
    found = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not found:
        return File(path)
    count = int(found[3])
    paths = [path.with_name(f"{found[1]}-{i:05d}-of-{found[3]}.gguf") for i in range(1, count + 1)]
    if missing := [other for other in paths if not other.is_file()]:
        what = f"{path}: {len(missing)} of {count} files are missing, the first is {missing[0].name!r}"
        raise UserError(what, "put all files of the model into one folder")
    first, *rest = map(File, paths)
    for other in rest:
        if twice := first.tensors.keys() & other.tensors.keys():
            other.fail("tensor name", f"{min(twice)!r}, which is in another file too", "it once")
        first.tensors |= other.tensors
        first.size += other.size
    if (wanted := first.metadata.get("split.tensors.count", len(first.tensors))) != len(first.tensors):
        first.fail("split.tensors.count", wanted, f"{len(first.tensors)}, the tensors of the {count} files")
    return first


def architecture(file: File) -> Architecture:
    name = file.get("general.architecture", str)
    name = MIXTRAL if name == "llama" and file.get("llama.expert_count", int, 0) else name
    if name not in ARCHITECTURES:
        raise UserError(f"{file.path}: architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def hf_name(file: File, name: str) -> str:
    match, arch = re.fullmatch(r"(blk\.\d+\.)?(\w+)\.(weight|bias)", name), architecture(file)
    module = match and (arch.names.get(match[2]) or MODULES.get(match[2]))
    if not match or not module:
        raise UserError(f"{file.path}: tensor {name} is not part of the architecture that the file names")
    layers = "model.h." if arch.model_type == "gpt2" else "model.layers."
    path = (match[1] or "").replace("blk.", layers) + module
    return path if module.endswith(".sinks") else f"{path}.{match[3]}"


def parts(file: File) -> list[Callable[[], dict[str, mx.Array]]]:
    """One function for each tensor, the largest first, that returns it (or its codes, scales and biases) by name."""
    arch = file.get("general.architecture", str)
    heads = file.get(f"{arch}.attention.head_count", int)
    rotated = {"attn_q": heads, "attn_k": file.get(f"{arch}.attention.head_count_kv", int, heads)}
    rotated = rotated if arch in INTERLEAVED else {}

    def read(tensor: Tensor) -> dict[str, mx.Array]:
        name, heads = hf_name(file, tensor.name), rotated.get(tensor.name.split(".")[-2], 0)
        part = file.read(tensor, name, halves(file, tensor, heads) if heads else None)
        if arch in OFFSET and name.endswith("norm.weight"):
            return {name: part[name] - 1}
        if name.endswith("shared_expert_gate.weight") and len(tensor.shape) == 1:
            return {name: part[name][None]}
        return part

    tensors = sorted(file.tensors.values(), key=lambda tensor: -tensor.nbytes)
    return [partial(read, tensor) for tensor in tensors if tensor.name not in COMPUTED]


def halves(file: File, tensor: Tensor, heads: int) -> np.ndarray:
    """The order that puts the rows of each head, which llama.cpp interleaves, in two halves."""
    if tensor.shape[0] % (2 * heads):
        file.fail(f"tensor {tensor.name}, rows", tensor.shape[0], f"a multiple of {2 * heads}, twice the heads")
    return np.arange(tensor.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def config(file: File) -> dict[str, Any]:
    """The config.json that Hugging Face has for this model, with MLX's "quantization"."""
    arch, known = file.get("general.architecture", str), architecture(file)
    sizes = {name: file.get(f"{arch}.{key}", int) for key, name in SIZES.items()}
    embed, heads = file.tensors.get("token_embd.weight"), sizes["num_attention_heads"]
    if min(sizes.values()) < 1 or embed is None:
        file.fail("model", f"{sizes}, token_embd.weight {embed}", "sizes from 1 on, and the embedding")
    each = sizes["hidden_size"] // heads
    turned = file.get(f"{arch}.rope.dimension_count", int, 0)
    head_dim = file.get(f"{arch}.attention.key_length", int, each if arch == "phi3" else turned or each)
    eps = "layer_norm_epsilon" if f"{arch}.attention.layer_norm_epsilon" in file.metadata else "layer_norm_rms_epsilon"
    epsilon = float(str(np.float32(file.get(f"{arch}.attention.{eps}", float))))
    ids = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    result = {
        "model_type": known.model_type,
        "architectures": [known.hf_class],
        **sizes,
        "num_key_value_heads": file.get(f"{arch}.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "vocab_size": embed.shape[0],
        ("rms_norm_eps" if eps == "layer_norm_rms_epsilon" else "layer_norm_eps"): epsilon,
        "rope_theta": file.get(f"{arch}.rope.freq_base", float, 10000.0),
        "rope_scaling": rope_scaling(file, arch),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        **{f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in ids},
        **{name: file.get(f"{arch}.{key}", kind) for key, (name, kind) in FIELDS.items()
           if f"{arch}.{key}" in file.metadata},
        **known.constants,
        **quantization(file),
    }
    return differences(file, arch, result, turned or head_dim)


def differences(file: File, arch: str, config: dict[str, Any], rotary: int) -> dict[str, Any]:
    """What single architectures mean by their keys."""
    head_dim, hidden = config["head_dim"], config["hidden_size"]
    if rotary != head_dim:
        config["partial_rotary_factor"] = rotary / head_dim
    if arch in WHOLE_WINDOWS:
        whole = config["num_hidden_layers"] == WHOLE_WINDOWS[arch]
        config["query_pre_attn_scalar"] = hidden // config["num_attention_heads"] if whole else head_dim
    if arch == "gemma3":
        config["rope_local_base_freq"] = file.get("gemma3.rope.freq_base_swa", float, 10000.0)
    if arch == "granite":
        config["logits_scaling"] = config.pop("logit_scale", 1.0)
    if arch == "gpt-oss" and config["rope_scaling"]:
        config["rope_scaling"]["truncate"] = False
    if arch == "gpt2":
        config["layer_norm_epsilon"] = config.pop("layer_norm_eps")
    if "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]
    return config


def quantization(file: File) -> dict[str, Any]:
    """MLX's settings: the commonest format for all, and the path of each module that differs."""
    formats = {hf_name(file, t.name).removesuffix(".weight"): (t.type.codes.group, t.type.codes.bits, t.type.codes.mode)
               for t in file.tensors.values() if t.type.codes}
    if not formats:
        return {}
    common = Counter(formats.values()).most_common(1)[0][0]
    named = {path: dict(zip(("group_size", "bits", "mode"), format, strict=True)) for path, format in formats.items()}
    settings: dict[str, Any] = dict(zip(("group_size", "bits", "mode"), common, strict=True))
    settings |= {path: entry for path, entry in named.items() if formats[path] != common}
    return {"quantization": settings, "quantization_config": settings}


def floats(file: File, name: str) -> np.ndarray:
    """A table of float32 that is no weight."""
    tensor = file.tensors[name]
    if tensor.type.name != "F32":
        file.fail(f"tensor {name}, type", tensor.type.name, "F32")
    return np.frombuffer(tensor.data, "<f4", math.prod(tensor.shape), tensor.offset).astype(np.float64)


def rope_scaling(file: File, arch: str) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        return llama3_scaling(file, file.get(f"{arch}.rope.freq_base", float, 1e4))
    original = f"{arch}.rope.scaling.original_context_length"
    if "rope_factors_long.weight" in file.tensors:
        factors = {f"{kind}_factor": floats(file, f"rope_factors_{kind}.weight").tolist() for kind in ("long", "short")}
        return {"rope_type": "longrope", "original_max_position_embeddings": file.get(original, int), **factors}
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"{file.path}: {arch}.rope.scaling.type {kind!r} is not supported; supported: linear, yarn")
    scaling = {"rope_type": kind, "factor": file.get(f"{arch}.rope.scaling.factor", float)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = file.get(original, int)
        for key in ("beta_fast", "beta_slow"):
            if (name := f"{arch}.rope.scaling.yarn_{key}") in file.metadata:
                scaling[key] = file.get(name, float)
    return scaling


def llama3_scaling(file: File, theta: float) -> dict[str, Any]:
    """Llama 3's parameters behind the table of frequency divisors that llama.cpp computes from them."""
    found = floats(file, "rope_freqs.weight")
    factor, low, high, original = round(float(found.max()), 3), 1.0, 4.0, 8192  # the last three: every Llama 3.x
    turns = original / (2 * np.pi) * theta ** (-np.arange(len(found)) / len(found))  # of the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if found.min() <= 0 or not np.allclose(1 / found, (1 - smooth) / factor + smooth, rtol=1e-3):
        file.fail("tensor rope_freqs.weight", found[[0, -1]], "the divisors of Llama 3's scaling")
    names = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return dict(zip(names, ("llama3", factor, low, high, original), strict=True))

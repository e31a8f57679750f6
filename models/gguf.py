"""What a GGUF file's metadata and names mean: the Hugging Face config and weights that they amount to.

The format itself is read in engine/array/gguf.py.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..engine import array as mx
from ..engine.array.gguf import File, Tensor
from ..engine.errors import UserError

__all__ = ["File", "config", "hf_name", "parts"]
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
ARCHITECTURES = {  # general.architecture, which is Hugging Face's model_type, and the class
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
INTERLEAVED = ("llama",)  # llama.cpp puts the rows of these heads in another order
COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # not weights: in the config


def hf_name(file: File, name: str) -> str:
    match = re.fullmatch(r"(blk\.\d+\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in MODULES:
        raise UserError(f"{file.path}: tensor {name} is not part of the architecture that the file names")
    return f"{(match[1] or '').replace('blk.', 'model.layers.')}{MODULES[match[2]]}.{match[3]}"


def parts(file: File) -> list[Callable[[], dict[str, mx.Array]]]:
    """One function for each tensor, the largest first, that returns it (or its codes, scales and biases) by name."""
    arch = file.get("general.architecture", str)
    heads = file.get(f"{arch}.attention.head_count", int)
    rotated = {"attn_q": heads, "attn_k": file.get(f"{arch}.attention.head_count_kv", int, heads)}
    rotated = rotated if arch in INTERLEAVED else {}

    def read(tensor: Tensor) -> dict[str, mx.Array]:
        name, heads = hf_name(file, tensor.name), rotated.get(tensor.name.split(".")[-2], 0)
        return file.read(tensor, name, halves(file, tensor, heads) if heads else None)

    tensors = sorted(file.tensors.values(), key=lambda tensor: -tensor.nbytes)
    return [partial(read, tensor) for tensor in tensors if tensor.name not in COMPUTED]


def halves(file: File, tensor: Tensor, heads: int) -> np.ndarray:
    """The order that puts the rows of each head, which llama.cpp interleaves, in two halves."""
    if tensor.shape[0] % (2 * heads):
        file.fail(f"tensor {tensor.name}, rows", tensor.shape[0], f"a multiple of {2 * heads}, twice the heads")
    return np.arange(tensor.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def config(file: File) -> dict[str, Any]:
    """The config.json that Hugging Face has for this model, with MLX's "quantization"."""
    arch = file.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise UserError(f"{file.path}: architecture {arch!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    sizes = {name: file.get(f"{arch}.{key}", int) for key, name in SIZES.items()}
    embed, heads = file.tensors.get("token_embd.weight"), sizes["num_attention_heads"]
    if min(sizes.values()) < 1 or embed is None:
        file.fail("model", f"{sizes}, token_embd.weight {embed}", "sizes from 1 on, and the embedding")
    rotary = file.get(f"{arch}.rope.dimension_count", int, sizes["hidden_size"] // heads)
    ids = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    return {
        "model_type": arch,
        "architectures": [ARCHITECTURES[arch]],
        **sizes,
        "num_key_value_heads": file.get(f"{arch}.attention.head_count_kv", int, heads),
        "head_dim": file.get(f"{arch}.attention.key_length", int, rotary),
        "vocab_size": embed.shape[0],
        "rms_norm_eps": float(str(np.float32(file.get(f"{arch}.attention.layer_norm_rms_epsilon", float)))),
        "rope_theta": file.get(f"{arch}.rope.freq_base", float, 10000.0),
        "rope_scaling": rope_scaling(file, arch),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        **{f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in ids},
        **quantization(file),
    }


def quantization(file: File) -> dict[str, Any]:
    """MLX's settings: the commonest format for all, and the path of each module that differs."""
    formats = {hf_name(file, t.name).removesuffix(".weight"): (t.type.codes.bits, t.type.codes.group)
               for t in file.tensors.values() if t.type.codes}
    if not formats:
        return {}
    common = Counter(formats.values()).most_common(1)[0][0]
    entries = {path: {"group_size": group, "bits": bits, "mode": "affine"} for path, (bits, group) in formats.items()}
    settings = {"group_size": common[1], "bits": common[0], "mode": "affine"}
    settings |= {path: entry for path, entry in entries.items() if formats[path] != common}  # type: ignore[arg-type]
    return {"quantization": settings, "quantization_config": settings}


def rope_scaling(file: File, arch: str) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        return llama3_scaling(file, file.tensors["rope_freqs.weight"], file.get(f"{arch}.rope.freq_base", float, 1e4))
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"{file.path}: {arch}.rope.scaling.type {kind!r} is not supported; supported: linear, yarn")
    scaling = {"rope_type": kind, "factor": file.get(f"{arch}.rope.scaling.factor", float)}
    if kind == "yarn":
        original = file.get(f"{arch}.rope.scaling.original_context_length", int)
        scaling["original_max_position_embeddings"] = original
    return scaling


def llama3_scaling(file: File, tensor: Tensor, theta: float) -> dict[str, Any]:
    """Llama 3's parameters behind the table of frequency divisors that llama.cpp computes from them."""
    if tensor.type.name != "F32":
        file.fail("tensor rope_freqs.weight, type", tensor.type.name, "F32")
    found = np.frombuffer(file.data, "<f4", math.prod(tensor.shape), tensor.offset).astype(np.float64)
    factor, low, high, original = round(float(found.max()), 3), 1.0, 4.0, 8192  # the last three: every Llama 3.x
    turns = original / (2 * np.pi) * theta ** (-np.arange(len(found)) / len(found))  # of the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(1 / found, (1 - smooth) / factor + smooth, rtol=1e-3):
        file.fail("tensor rope_freqs.weight", found[[0, -1]], "the divisors of Llama 3's scaling")
    names = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return dict(zip(names, ("llama3", factor, low, high, original), strict=True))

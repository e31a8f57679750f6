"""The default model in transformers: the file dequantized by the gguf package, names and row order as there."""
import re

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoConfig, AutoModelForCausalLM

from lazulite.models.hub import default

NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
CONFIG = dict(
    model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
)


def in_torch():
    """SmolLM2-135M-Instruct in float32."""
    weights = {}
    for tensor in GGUFReader(default()).tensors:
        block, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()
        weight = dequantize(tensor.data, tensor.tensor_type)
        if heads := {"attn_q": 9, "attn_k": 3}.get(part):  # llama.cpp's rotary pairs neighbours, transformers' halves
            weight = weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        weights[f"model.{f'layers.{block}.' if block else ''}{NAMES[part]}.weight"] = torch.from_numpy(weight.copy())
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG), dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    return model.eval()

"""GPT-2: learned positions, centred norms with biases, an MLP without a gate; checkpoints hold transposed matrices."""
import re
from dataclasses import dataclass
from typing import Any

from ..engine import array as mx
from ..engine import nn
from .blocks import ACTIVATIONS, Decoder
from .config import Config
from .rope import NONE

NAMES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
         "n_positions": "max_position_embeddings", "activation_function": "hidden_act",
         "layer_norm_epsilon": "rms_norm_eps", "n_inner": "intermediate_size"}
PATHS = {"wte": "embed_tokens", "ln_f": "norm", "h": "layers", "ln_1": "input_layernorm", "attn": "self_attn",
         "c_attn": "qkv", "ln_2": "post_attention_layernorm", "c_fc": "up_proj"}


@dataclass
class GPT2Config(Config):
    tie_word_embeddings: bool = True
    attention_bias: bool = True

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Config:
        found = {NAMES.get(name, name): value for name, value in raw.items()}
        found["intermediate_size"] = found.get("intermediate_size") or 4 * found.get("hidden_size", 0)
        return super().from_dict(found)


class MLP(nn.Module):
    def __init__(self, config: Config):
        self.act = ACTIVATIONS[config.hidden_act]
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.Array) -> mx.Array:
        return self.down_proj(self.act(self.up_proj(x)))


class Model(Decoder):
    config_class = GPT2Config
    norm = nn.LayerNorm

    def __init__(self, config: Config):
        super().__init__(config)
        self.model.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def rope(self, layer_type: str) -> nn.Rope:
        return NONE

    def mlp(self, layer: int) -> nn.Module:
        return MLP(self.config)

    def embed(self, tokens: mx.Array, context: nn.Context) -> mx.Array:
        return super().embed(tokens, context) + self.model.wpe(context.positions).astype(mx.float32)

    @classmethod
    def as_mlx(cls, weights: dict[str, mx.Array]) -> dict[str, mx.Array]:
        turned, masks = re.compile(r"(?!model\.).*\.(c_attn|c_proj|c_fc)\.weight"), (".attn.bias", ".masked_bias")
        return {re.sub(r"^(transformer\.|model\.)?", "model.", name): w.T if turned.fullmatch(name) else w
                for name, w in weights.items() if not name.endswith(masks)}

    def sanitize(self, weights: dict[str, mx.Array]) -> dict[str, mx.Array]:
        result = {}
        for name, weight in weights.items():
            words = [PATHS.get(word, word) for word in re.sub(r"^(transformer|model)\.", "", name).split(".")]
            if words[-1] in ("masked_bias",) or words[-2:] == ["self_attn", "bias"] or words[0] == "lm_head":
                continue
            if words[-2] == "c_proj":
                words[-2] = "o_proj" if words[-3] == "self_attn" else "down_proj"
            if weight.ndim == 2 and words[0] == "layers" and not name.startswith("model."):  # MLX keeps matrices turned
                weight = weight.T
            parts = {"qkv": mx.split(weight, 3)} if words[-2] == "qkv" else {}
            for kind, part in zip("qkv", parts.get("qkv", []), strict=False):
                result[".".join(["model", *words[:-2], f"{kind}_proj", words[-1]])] = part
            if not parts:
                result[".".join(["model", *words])] = weight
        return result

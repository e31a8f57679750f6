"""Phi 3, 3.5 and 4: Llama whose checkpoints hold q, k, v as one matrix, and gate and up as another."""
from ..engine import array as mx
from .blocks import Decoder


class Model(Decoder):
    def window(self, layer: int) -> int:
        return self.config.sliding_window

    def sanitize(self, weights: dict[str, mx.Array]) -> dict[str, mx.Array]:
        c = self.config
        heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        fused = {"qkv_proj": (("q_proj", "k_proj", "v_proj"), (heads, heads + kv)),
                 "gate_up_proj": (("gate_proj", "up_proj"), (c.intermediate_size,))}
        result: dict[str, mx.Array] = {}
        for name, weight in super().sanitize(weights).items():
            path, leaf = name.rpartition(".")[::2]
            parent, layer = path.rpartition(".")[::2]
            if layer in fused:
                names, borders = fused[layer]
                parts = mx.split(weight, borders)
                result |= {f"{parent}.{n}.{leaf}": part for n, part in zip(names, parts, strict=True)}
            else:
                result[name] = weight
        return result

"""gpt-oss: sinks, a window in every second layer, experts with biases and a clamped gate."""
from dataclasses import dataclass
from typing import Any

from ..engine import array as mx
from ..engine import nn
from .blocks import Attention, Decoder
from .config import Config
from .moe import Experts, best


@dataclass
class GptOssConfig(Config):
    attention_bias: bool = True
    sliding_window: int = 128
    sliding_window_pattern: int = 2
    num_experts_per_tok: int = 4
    num_local_experts: int = 128


class SinkAttention(Attention):
    """Each head has one more score to spread over, without a value."""

    def __init__(self, config: Config, *arguments: Any, **options: Any):
        super().__init__(config, *arguments, **options)
        self.sinks = mx.zeros((config.num_attention_heads,))

    def attend(self, *arguments: Any, **options: Any) -> mx.Array:
        return super().attend(*arguments, sinks=self.sinks.astype(mx.float32), **options)


class MoE(nn.Module):
    """The router's best scores become shares among themselves."""

    def __init__(self, config: GptOssConfig):
        self.top_k = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_local_experts)
        self.experts = Experts(config.num_local_experts, config.hidden_size, config.intermediate_size, "clamped_swish",
                               bias=True)

    def __call__(self, x: mx.Array) -> mx.Array:
        scores = self.router(x)
        chosen = best(scores, self.top_k)
        return self.experts(x, chosen, mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1))


class Model(Decoder):
    config_class = GptOssConfig
    config: GptOssConfig

    def attention(self, layer: int, **options: Any) -> nn.Module:
        rope = self._ropes[self.kind(layer)]
        return SinkAttention(self.config, layer, rope, window=self.window(layer), **options)

    def mlp(self, layer: int) -> nn.Module:
        return MoE(self.config)

    def sanitize(self, weights: dict[str, mx.Array]) -> dict[str, mx.Array]:
        return self.as_mlx(super().sanitize(weights))

    @classmethod
    def as_mlx(cls, weights: dict[str, mx.Array]) -> dict[str, mx.Array]:
        """Fused (E, in, 2·out) matrices, columns of gate and up in turn, to those of `Experts`."""
        result = {}
        for name, weight in weights.items():
            path, _, leaf = name.rpartition(".")
            bias = leaf.endswith("_bias")
            layer, kind = leaf.removesuffix("_bias"), "bias" if bias else "weight"
            if layer not in ("gate_up_proj", "down_proj"):
                result[name] = weight
                continue
            rows = weight if bias else mx.swapaxes(weight, 1, 2)
            if layer == "down_proj":
                result[f"{path}.down_proj.{kind}"] = rows
            else:
                result |= {f"{path}.gate_proj.{kind}": rows[:, ::2], f"{path}.up_proj.{kind}": rows[:, 1::2]}
        return result

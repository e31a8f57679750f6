"""Qwen 1.5 and 2 MoE: Qwen 2 with a mixture of experts beside an expert that all tokens share."""
from dataclasses import dataclass, field, replace
from typing import Any

from ..engine import array as mx
from ..engine import nn
from . import qwen2
from .blocks import MLP
from .config import Config
from .moe import MoE, stacked


@dataclass
class MoeConfig(qwen2.QwenConfig):
    num_experts: int = 60
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 1408
    shared_expert_intermediate_size: int = 5632
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] = field(default_factory=list)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Config:
        """Newer configs call the number of experts num_local_experts."""
        return super().from_dict({"num_experts": raw.get("num_local_experts"), **raw})

    def sparse(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def moe(self) -> tuple[Config, int, int, int, bool]:
        return self, self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size, self.norm_topk_prob


@dataclass
class Qwen2MoeConfig(MoeConfig):
    attention_bias: bool = True


class SharedMoE(MoE):
    def __init__(self, config: MoeConfig):
        super().__init__(*config.moe())
        self.shared_expert = MLP(replace(config, intermediate_size=config.shared_expert_intermediate_size))
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def __call__(self, x: mx.Array) -> mx.Array:
        return super().__call__(x) + mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


class Model(qwen2.Model):
    config_class: type[Config] = Qwen2MoeConfig
    config: MoeConfig

    def mlp(self, layer: int) -> nn.Module:
        return SharedMoE(self.config) if self.config.sparse(layer) else MLP(self.config)

    def sanitize(self, weights: dict[str, mx.Array]) -> dict[str, mx.Array]:
        pattern = r"(.*\.mlp)\.experts\.(?P<e>\d+)\.(\w+)\.(\w+)"
        return stacked(super().sanitize(weights), pattern, r"\1.switch_mlp.\3.\4")

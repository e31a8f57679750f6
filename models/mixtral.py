"""Mixtral: Mistral with a mixture of experts for an MLP."""
from dataclasses import dataclass

from ..engine import array as mx
from ..engine import nn
from . import mistral
from .blocks import BEFORE
from .config import Config
from .moe import MoE, stacked


@dataclass
class MixtralConfig(Config):
    num_experts_per_tok: int = 2
    num_local_experts: int = 8


class Model(mistral.Model):
    config_class = MixtralConfig
    config: MixtralConfig
    norms = BEFORE

    def mlp(self, layer: int) -> nn.Module:
        c = self.config
        return MoE(c, c.num_local_experts, c.num_experts_per_tok, c.intermediate_size)

    def sanitize(self, weights: dict[str, mx.Array]) -> dict[str, mx.Array]:
        weights = {name.replace("block_sparse_moe", "mlp"): w for name, w in super().sanitize(weights).items()}
        for theirs, ours in ("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"):
            pattern = rf"(.*\.mlp)\.experts\.(?P<e>\d+)\.{theirs}\.(\w+)"
            weights = stacked(weights, pattern, rf"\1.switch_mlp.{ours}.\3")
        return weights

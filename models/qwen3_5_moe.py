"""Qwen 3.5 MoE: Qwen 3.5 with a mixture of experts beside an expert that all tokens share."""
from dataclasses import dataclass
from typing import Any

from ..engine import array as mx
from . import qwen2_moe, qwen3_5
from .config import Config


@dataclass
class Qwen3_5MoeConfig(qwen3_5.Qwen3_5Config, qwen2_moe.MoeConfig):
    norm_topk_prob: bool = True

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Config:
        return super().from_dict({"intermediate_size": raw.get("moe_intermediate_size"), **raw})


class Model(qwen3_5.Model, qwen2_moe.Model):
    config_class = Qwen3_5MoeConfig
    config: Qwen3_5MoeConfig

    def sanitize(self, weights: dict[str, mx.Array]) -> dict[str, mx.Array]:
        """Experts may be single, or fused: (E, 2·out, in), gate first, and (E, out, in)."""
        result = {}
        for name, weight in super().sanitize(weights).items():
            path, fused, leaf = name.partition(".experts.")
            if leaf == "gate_up_proj":
                for part, matrix in zip(("gate_proj", "up_proj"), mx.split(weight, 2, axis=1), strict=True):
                    result[f"{path}.switch_mlp.{part}.weight"] = matrix
            else:
                result[f"{path}.switch_mlp.{leaf}.weight" if fused else name] = weight
        return result

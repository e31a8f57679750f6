"""Gemma 3 (text): Gemma 2 without caps, q and k normed, five layers of six with a window and a base of their own."""
from dataclasses import dataclass, field
from typing import Any

from . import gemma2
from .config import Config


@dataclass
class Gemma3Config(gemma2.Gemma2Config):
    sliding_window_pattern: int = 6
    rope_parameters: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Config:
        """Older configs have rope_theta for full and rope_local_base_freq for sliding layers."""
        if "full_attention" not in (raw.get("rope_parameters") or {}):
            full = {"rope_type": "default", "rope_theta": raw.get("rope_theta", 1e6), **(raw.get("rope_scaling") or {})}
            local = {"rope_type": "default", "rope_theta": raw.get("rope_local_base_freq", 1e4)}
            raw = {**raw, "rope_parameters": {"full_attention": full, "sliding_attention": local}}
        return super().from_dict(raw)


class Model(gemma2.Model):
    config_class = Gemma3Config
    qk_norm = True

"""What a model is: `config.json`, spelled as Hugging Face spells it."""
from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ..engine.errors import UserError

TYPES: dict[str, Any] = {"int": int, "float": int | float, "bool": bool, "str": str, "list": list, "dict": dict}


@dataclass
class Config:
    """The fields that several families read; a family adds its own in a subclass. Unknown keys are left alone."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0            # 0: as many as attention heads
    head_dim: int = 0                       # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int = 0                 # 0: none
    sliding_window_pattern: int = 0         # every so many layers, one sees everything
    original_max_position_embeddings: int = 0
    partial_rotary_factor: float = 1.0
    layer_types: list[str] = field(default_factory=list)
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    eos_token_id: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for field_ in fields(self):
            name = str(getattr(field_.type, "__name__", field_.type))
            kind = TYPES.get(name.partition("[")[0], object)
            self._need(field_.name, isinstance(getattr(self, field_.name), kind), f"a value of type {name}")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            self._need(name, self._count(name) > 0, "a whole number above 0")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        for name in ("head_dim", "max_position_embeddings", "sliding_window"):
            self._need(name, self._count(name) >= (name == "head_dim"), "a whole number")
        shared = self._count("num_key_value_heads") > 0 and self.num_attention_heads % self.num_key_value_heads == 0
        self._need("num_key_value_heads", shared, f"a divisor of num_attention_heads = {self.num_attention_heads}")
        if self.sliding_window_pattern and not self.layer_types:
            full = [(i + 1) % self.sliding_window_pattern == 0 for i in range(self.num_hidden_layers)]
            self.layer_types = ["full_attention" if f else "sliding_attention" for f in full]
        names = all(isinstance(kind, str) for kind in self.layer_types)
        fits = len(self.layer_types) in (0, self.num_hidden_layers)
        self._need("layer_types", names and fits, f"{self.num_hidden_layers} names")

    def _count(self, name: str) -> int:
        value = getattr(self, name)
        return value if isinstance(value, int) and not isinstance(value, bool) else -1

    def _need(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise UserError(f"[config] {name} is {repr(getattr(self, name))[:100]}, wanted {wanted}")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Config:
        """Reads a parsed config.json, old and new spellings; null means the default."""
        known = {f.name for f in fields(cls)}
        given = {name: value for name, value in raw.items() if name in known and value is not None}
        scaling = raw.get("rope_scaling") or {}
        old = {"rope_theta": raw.get("rope_theta", 10000.0), "rope_type": scaling.get("type", "default"), **scaling}
        given["rope_parameters"] = {**old, **(raw.get("rope_parameters") or {})}
        eos = raw.get("eos_token_id")
        given["eos_token_id"] = [] if eos is None else eos if isinstance(eos, list) else [eos]
        missing = [f.name for f in fields(cls)[:6] if f.name not in given]
        if missing:
            what = f"[config] config.json lacks {', '.join(missing)}"
            raise UserError(what, "a model folder of transformers or MLX has them")
        return cls(**given)

"""What can be said of a model from its config and the headers of its files, before any weight is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine import nn
from ..engine.errors import UserError
from .blocks import Decoder
from .load import family
from .weights import Weights

SHOWN = (  # fields of config.json
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "sliding_window", "num_local_experts", "num_experts", "num_experts_per_tok", "rope_scaling",
    "tie_word_embeddings", "quantization",
)  # fmt: skip


@dataclass
class Card:
    """`parameters` and `bits` (a weight, on average) are None for a family that is not known."""

    path: Path
    nbytes: int
    family: str
    config: dict[str, Any]
    context: int | None
    model: Decoder | None  # without weights

    @property
    def parameters(self) -> int | None:
        return sum(array.size for _, array in self.model.named_parameters()) if self.model else None

    @property
    def bits(self) -> float | None:
        return 8 * self.nbytes / self.parameters if self.parameters else None

    def memory(self, tokens: int) -> int | None:
        """Bytes of the weights and of a float16 cache of so many tokens, of which a window keeps its own only."""
        if self.model is None:
            return None
        spans = [(spec, getattr(spec, "window", 0) or tokens) for spec in self.model.cache_spec()]
        return self.nbytes + sum(spec.nbytes(min(tokens, span)) for spec, span in spans)

    def as_object(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "path": str(self.path),
            "bytes": self.nbytes,
            "family": self.family,
            "parameters": self.parameters,
            "bits": self.bits and round(self.bits, 2),
            "context": self.context,
        }


def card(weights: Weights) -> Card:
    name = str(weights.config.get("model_type"))
    try:
        model_class = family(name)
        with nn.loading():
            model = model_class(model_class.config_class.from_dict(weights.config))
    except UserError:
        return Card(weights.path, weights.nbytes, name, weights.config, None, None)
    context = model.config.max_position_embeddings
    return Card(weights.path, weights.nbytes, name, weights.config, context, model)

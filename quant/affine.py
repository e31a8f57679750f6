"""Affine quantization, MLX's: a group of a row is codes q of `bits` bits, a scale and a bias, w = scale·q + bias."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..engine import array as mx
from ..engine import nn
from ..engine.errors import UserError


@dataclass(frozen=True)
class Format:
    """How a matrix is stored. bits/weight = bits + 32/group_size for 16-bit scales and biases."""

    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    BITS = (2, 3, 4, 5, 6, 8)
    GROUPS = (16, 32, 64, 128)

    def __post_init__(self) -> None:
        for name, known in (("mode", ("affine",)), ("bits", self.BITS), ("group_size", self.GROUPS)):
            if getattr(self, name) not in known:
                wanted = ", ".join(map(str, known))
                raise UserError(f"[quantize] {name} is {getattr(self, name)!r}, wanted one of {wanted}")


Predicate = Callable[[str], bool | Format]  # of a module's path: quantize it, leave it, or store it in another format


class Quantizer:
    """Decides what is quantized and how, and keeps what config.json must say of it.

    Called on the tensors of a checkpoint one by one it returns the three that replace a weight, or None:
    `quantizer("model.layers.0.mlp.up_proj.weight", array)`.
    """

    def __init__(self, format: Format, predicate: Predicate | None = None):
        self.format, self.predicate = format, predicate or (lambda path: True)
        self.config: dict[str, Any] = asdict(format)  # grows an entry for each path that differs

    def choose(self, path: str, shape: tuple[int, ...]) -> Format | None:
        """The format of the weight at a module's path: matrices whose rows are whole groups, as in mlx-lm."""
        choice = self.predicate(path)
        format = choice if isinstance(choice, Format) else self.format
        if not choice or len(shape) < 2 or shape[-1] % format.group_size:
            return None
        if format != self.format:
            self.config[path] = asdict(format)
        return format

    def __call__(self, name: str, array: mx.Array) -> dict[str, mx.Array] | None:
        path, _, leaf = name.rpartition(".")
        format = self.choose(path, array.shape) if leaf == "weight" else None
        if format is None:
            return None
        codes, scales, biases = mx.quantize(array, format.group_size, format.bits)
        return {name: codes, f"{path}.scales": scales, f"{path}.biases": biases}


def quantize(
    model: nn.Module, bits: int = 4, group_size: int = 64, predicate: Predicate | None = None
) -> dict[str, Any]:
    """Replaces linears and embeddings by quantized ones, in place. Returns the `quantization` entry of config.json."""
    quantizer = Quantizer(Format(group_size, bits), predicate)

    def edit(path: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.Linear | nn.Embedding):
            return None
        format = quantizer.choose(path, module.weight.shape)
        return None if format is None else module.to_quantized(format.group_size, format.bits)

    nn.swap(model, edit)
    return quantizer.config

"""Which weights are quantized, and how. The modes and their arithmetic are MLX's: engine/array/quantized.py."""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..engine import array as mx
from ..engine import nn
from ..engine.array import quantized
from ..engine.errors import UserError

MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
RECIPES = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}  # few bits, many


@dataclass(frozen=True)
class Format:
    """How a matrix is stored; 0 or None is the mode's own number. bits/weight = bits + 32/group_size for affine with
    16-bit scales and biases, bits + 8/group_size for the others."""

    group_size: int | None = None
    bits: int | None = None
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"[quantize] mode is {self.mode!r}, wanted one of {', '.join(MODES)}")
        for name, known in zip(("group_size", "bits"), quantized.MODES[self.mode], strict=True):
            value = getattr(self, name) or known[0]
            if value not in known:
                wanted = ", ".join(map(str, sorted(known)))
                raise UserError(f"[quantize] {name} is {value!r}, wanted one of {wanted} for the mode {self.mode}")
            object.__setattr__(self, name, value)


ROUTER = re.compile(r"\.(mlp|block_sparse_moe)\.(gate|router)$")
Predicate = Callable[[str], bool | Format]  # of a module's path: quantize it, leave it, or store it in another format


def recipe(name: str, layers: int, group_size: int | None = None) -> Predicate:
    """One of RECIPES for a model of so many layers: most weights get few bits. Many get the head and, in the first and
    the last eighth of the layers and in every third between, v_proj and down_proj. Source: mlx-lm, after llama.cpp."""
    if name not in RECIPES:
        raise UserError(f"[quantize] recipe is {name!r}, wanted one of {', '.join(RECIPES)}")
    few, many = (Format(group_size, bits) for bits in RECIPES[name])
    edge = layers // 8

    def choose(path: str) -> Format:
        found = re.search(r"\d+", path)
        layer = int(found[0]) if found else 0
        careful = layer < edge or layer >= 7 * layers // 8 or (layer - edge) % 3 == 2
        better = "lm_head" in path or careful and re.search(r"v_(a_|b_)?proj|down_proj", path)
        return many if better else few

    return choose


class Quantizer:
    """Decides what is quantized and how, and keeps what config.json must say of it.

    Called on the tensors of a checkpoint one by one it returns the two or three that replace a weight, or None:
    `quantizer("model.layers.0.mlp.up_proj.weight", array)`.
    """

    def __init__(self, format: Format, predicate: Predicate | None = None):
        self.format, self.predicate = format, predicate or (lambda path: True)
        self.config: dict[str, Any] = asdict(format)  # grows an entry for each path that differs

    def choose(self, path: str, shape: tuple[int, ...]) -> Format | None:
        """The format of the weight at a module's path: matrices whose rows are whole groups, as in mlx-lm. What routes
        tokens to experts is small and decides much: where all have one format, it has 8 bits."""
        choice = self.predicate(path)
        if choice is True and ROUTER.search(path):
            choice = Format(64, 8)
        format = choice if isinstance(choice, Format) else self.format
        if not choice or len(shape) < 2 or shape[-1] % format.group_size:  # type: ignore[operator]
            return None
        if format != self.format:
            self.config[path] = asdict(format)
        return format

    def __call__(self, name: str, array: mx.Array) -> dict[str, mx.Array] | None:
        path, _, leaf = name.rpartition(".")
        format = self.choose(path, array.shape) if leaf == "weight" else None
        if format is None:
            return None
        parts = mx.quantize(array, format.group_size, format.bits, format.mode)
        return dict(zip((name, f"{path}.scales", f"{path}.biases"), parts, strict=False))


def quantize(
    model: nn.Module, bits: int | None = None, group_size: int | None = None, predicate: Predicate | None = None,
    mode: str = "affine",
) -> dict[str, Any]:
    """Replaces linears and embeddings by quantized ones, in place. Returns the `quantization` entry of config.json."""
    quantizer = Quantizer(Format(group_size, bits, mode), predicate)

    def edit(path: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.Linear | nn.Embedding):
            return None
        format = quantizer.choose(path, module.weight.shape)
        return None if format is None else module.to_quantized(format.group_size, format.bits, format.mode)

    nn.swap(model, edit)
    return quantizer.config

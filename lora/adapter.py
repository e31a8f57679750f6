"""What an adapter is, whatever its file format, and how a model gets and loses one."""
from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..engine import array as mx
from ..engine import nn
from ..engine.errors import UserError
from .layers import LoRALinear, adapted, dense, is_linear, sizes

HEAD = "lm_head"


class Pair(NamedTuple):
    """The product that one layer adds: scale · x A B, a (in, r), b (r, out)."""

    a: mx.Array
    b: mx.Array
    scale: float


@dataclass
class Adapter:
    """`pairs` by the path of their layer; `weights`: whole tensors by name, of full fine-tuning. `base`: what it was
    trained on (`stamp`), if its files say so."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    weights: dict[str, mx.Array] = field(default_factory=dict)
    dropout: float = 0.0
    base: dict[str, str] = field(default_factory=dict)
    name: str = ""                     # of the base model


@dataclass(frozen=True)
class Method:
    """Which layers learn, and by how much. Patterns match the end of a path: `q_proj`, `mlp.*_proj`, or a regex."""

    full: bool = False
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False               # scale alpha/√rank, Kalajdzievski 2023, https://arxiv.org/abs/2312.03732
    dropout: float = 0.0
    target: tuple[str, ...] = ()       # none: all linear layers but the output head
    layers: str = "all"                # or the last N, or `0-3,7`
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def size(self, path: str) -> tuple[int, float]:
        """Rank and scale of a layer's product."""
        rank, alpha = _chosen(self.rank_pattern, path, self.rank), _chosen(self.alpha_pattern, path, self.alpha)
        if rank < 1:
            raise UserError(f"[lora] rank of {path} is {rank}, wanted at least 1")
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def _chosen(patterns: dict[str, Any], path: str, otherwise: Any) -> Any:
    return next((value for pattern, value in patterns.items() if matches(path, pattern)), otherwise)


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern, with `*` for any part of a word, or a regex, is the end of a path."""
    simple = re.fullmatch(r"[\w.*-]+", pattern)
    ending = re.escape(pattern).replace(r"\*", "[^.]*") if simple else pattern
    try:
        return bool(re.fullmatch(rf"(?:.*\.)?(?:{ending})", path))
    except re.error as error:
        raise UserError(f"[lora] pattern {pattern!r}: {error}", "wanted: a layer's name, `*`, or a regex") from None


def layer_of(path: str) -> int | None:
    """The number of the block that a path leads into."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", path)
    return int(found[1]) if found else None


def chosen_layers(text: str, count: int) -> set[int]:
    """`all`, the last N (`4`), or numbers and ranges (`0-3,7,`; one number needs the comma)."""
    text = str(text).strip()
    if text in ("all", "-1"):
        return set(range(count))
    if text.isdecimal():
        return set(range(max(0, count - int(text)), count))
    found: set[int] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not bounds or int(bounds[2] or bounds[1]) >= count:
            raise UserError(f"[lora] layers {part!r}: wanted all, a number of last layers, or numbers below {count}",
                            "for example: --layers 8, or --layers 0-3,7")
        found |= set(range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1))
    return found


def targets(model: nn.Module, method: Method) -> list[str]:
    """Paths of the linear layers that the method adapts. UserError if a pattern matches none."""
    paths = [path for path, module in model.named_modules() if is_linear(module)]
    depth = 1 + max((n for path in paths if (n := layer_of(path)) is not None), default=-1)
    layers = chosen_layers(method.layers, depth)
    inside = [path for path in paths if (n := layer_of(path)) is None or n in layers]
    patterns = method.target or [path for path in inside if path.rpartition(".")[2] != HEAD]
    for pattern in (*method.target, *method.rank_pattern, *method.alpha_pattern):
        if not any(matches(path, pattern) for path in inside):
            leaves = sorted({re.sub(r".*layers\.\d+\.", "", path) for path in paths})
            raise UserError(f"[lora] {pattern!r} matches no linear layer", f"there are: {', '.join(leaves)}")
    if not method.target:
        return list(patterns)
    return [path for path in inside if any(matches(path, pattern) for pattern in patterns)]


def prepare(model: nn.Module, method: Method) -> list[str]:
    """Freezes the model and makes what the method names learn. Returns the paths of the layers that do.

    Full fine-tuning learns every weight of the chosen layers (and all else when all are chosen), in float32; quantized
    matrices become dense for it.
    """
    model.freeze()
    if not method.full:
        paths = targets(model, method)
        chosen = {path: method.size(path) for path in paths}
        nn.swap(model, lambda path, m: LoRALinear(m, *chosen[path], method.dropout) if path in chosen else None)
        return paths
    paths = _widen(model, method)
    if not paths:
        raise UserError("[lora] full fine-tuning has no layer to train", "check --layers")
    return paths


def _widen(model: nn.Module, method: Method) -> list[str]:
    every = str(method.layers) in ("all", "-1")
    names = [path for path, _ in model.named_modules() if layer_of(f"{path}.") is not None]
    layers = chosen_layers(method.layers, 1 + max((layer_of(f"{p}.") or 0 for p in names), default=-1))
    nn.swap(model, lambda path, module: to_dense(module) if hasattr(module, "scales") and (
        every or layer_of(path) in layers) else None)
    paths = []
    for path, module in model.named_modules():
        if every or layer_of(f"{path}.") in layers:
            module.unfreeze(recurse=False)
            paths.append(path)
    model.update(nn.tree_map(lambda w: w.astype(mx.float32), model.trainable_parameters()))
    mx.eval(model.parameters())
    return paths


def to_dense(module: nn.Module) -> nn.Module:
    """A quantized layer or embedding as a float32 one. UserError for a stack of experts."""
    if not hasattr(module, "_sizes"):
        raise UserError(f"[lora] a {type(module).__name__} cannot be made dense",
                        "full fine-tuning of it needs the unquantized model")
    rows, columns = sizes(module)
    with nn.loading():
        new = nn.Linear(columns, rows, bias=False) if is_linear(module) else nn.Embedding(rows, columns)
    new.weight = dense(module)
    if is_linear(module):
        new.bias = module.bias
    return new


# a model that has an adapter

def of(model: nn.Module, *, dropout: float = 0.0, base: dict[str, str] | None = None, name: str = "") -> Adapter:
    """The adapter that a prepared model holds."""
    pairs = {path: Pair(m.lora_a, m.lora_b, m.scale) for path, m in adapted(model)}
    weights = {} if pairs else dict(nn.tree_flatten(model.trainable_parameters()))
    return Adapter(pairs, weights, dropout, base or {}, name)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Puts an adapter of mlx-lm's or PEFT's format into a model, in place.

    Raises UserError if the folder holds none, or if a tensor is missing, unknown or of another shape. Warns if the
    adapter was trained on another base.
    """
    from . import formats

    put(model, formats.read(folder), os.fspath(folder))


def put(model: nn.Module, adapter: Adapter, name: str) -> None:
    check(model, adapter, name)
    if difference := foreign(model, adapter):
        warnings.warn(f"{name}: {difference}", stacklevel=3)
    pairs = adapter.pairs

    def edit(path: str, module: nn.Module) -> nn.Module | None:
        if f"{path}.weight" in adapter.weights and hasattr(module, "scales"):
            return to_dense(module)
        if path not in pairs:
            return None
        new = LoRALinear(module, pairs[path].a.shape[1], pairs[path].scale)
        new.lora_a, new.lora_b = (x.astype(mx.float32) for x in pairs[path][:2])
        return new

    nn.swap(model, edit)
    model.load_weights(adapter.weights.items(), strict=False)


def check(model: nn.Module, adapter: Adapter, name: str) -> None:
    """Raises UserError where an adapter does not fit a model."""
    layers, own = {path: m for path, m in model.named_modules() if is_linear(m)}, dict(model.named_parameters())
    if any(True for _ in adapted(model)):
        raise UserError(f"{name}: the model has an adapter already", "load the model anew, or fuse the first adapter")
    _refuse(name, "names layers that the model does not have", adapter.pairs.keys() - layers.keys())
    for path, pair in adapter.pairs.items():
        rows, columns = sizes(layers[path])
        if (pair.a.shape[0], pair.b.shape[1]) != (columns, rows) or pair.a.shape[1] != pair.b.shape[0]:
            raise UserError(f"{name}: {path} has A {tuple(pair.a.shape)} and B {tuple(pair.b.shape)}, wanted "
                            f"({columns}, r) and (r, {rows})", "the adapter belongs to another model")
    known = own.keys() | {f"{path}.{leaf}" for path in layers for leaf in ("weight", "bias")}
    _refuse(name, "names weights that the model does not have", adapter.weights.keys() - known)


def _refuse(name: str, what: str, paths: Iterable[str]) -> None:
    if paths := sorted(paths):
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        raise UserError(f"{name}: {what}: {paths[0]}{more}", "the adapter belongs to another model")


def stamp(model: nn.Module) -> dict[str, str]:
    """What identifies a base: a hash of its weights' names, types, shapes and first bytes, and how it is quantized."""
    digest, kinds = hashlib.blake2b(digest_size=16), set()
    for path, module in sorted(model.named_modules()):
        path = path.removesuffix(".linear")
        for key, leaf in sorted(module.items()):
            if isinstance(leaf, mx.Array) and not key.startswith(("_", "lora_")):
                digest.update(f"{path}.{key} {leaf.dtype} {tuple(leaf.shape)}".encode())
                digest.update(np.asarray(leaf.reshape(-1)[:1024]).tobytes())
        if hasattr(module, "bits") and "scales" in module:
            kinds.add(f"{module.bits} bits, groups of {module.group_size}")
    return {"hash": digest.hexdigest(), "quantization": "; ".join(sorted(kinds)) or "none"}


def foreign(model: nn.Module, adapter: Adapter) -> str:
    """What tells the model from the base that the adapter was trained on; empty if nothing does."""
    if not adapter.base:
        return ""
    mine = stamp(model)
    if mine.get("hash") == adapter.base.get("hash"):
        return ""
    theirs = adapter.base.get("quantization", "unknown")
    return f"trained on other weights (quantization {theirs}; this model's: {mine['quantization']})"

"""Several adapters on one model: each token has its own, or none, in one step."""
from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..engine import array as mx
from ..engine import nn
from ..engine.errors import UserError
from . import formats
from .adapter import HEAD, Adapter, Pair, check, foreign


class Adapters:
    """`names` in order; `rows` (T) int32 says of each token whose adapter it gets: 0 none, i + 1 names[i]. None: no
    token has one."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.rows: mx.Array | None = None


class AdaptedLinear(nn.Module):
    """y[t] = linear(x[t]) + x[t] A[rows[t]] B[rows[t]].

    lora_a (in, R) and lora_b (R, out) hold the products of all adapters side by side, scales inside B; `_owners` (R)
    says whose each column is. A token's other columns are set to 0 between the two, which is two dense products
    whatever the mixture, and adds exact zeros.
    """

    def __init__(self, linear: nn.Module, adapters: Adapters, pairs: list[Pair | None]):
        mine = [(i, pair) for i, pair in enumerate(pairs, 1) if pair]
        self.linear, self.adapters = linear, adapters
        self._owners = mx.array([i for i, pair in mine for _ in range(pair.a.shape[1])], mx.int32)
        self.lora_a = mx.concatenate([pair.a.astype(mx.float32) for _, pair in mine], axis=1)
        self.lora_b = mx.concatenate([pair.scale * pair.b.astype(mx.float32) for _, pair in mine], axis=0)

    def __call__(self, x: mx.Array) -> mx.Array:
        y, rows = self.linear(x), self.adapters.rows
        if rows is None:
            return y
        own = mx.expand_dims(rows, 1) == self._owners
        return y + mx.where(own, x @ self.lora_a, 0.0) @ self.lora_b


def attach(model: Any, folders: Mapping[str, str | os.PathLike[str]]) -> Adapters:
    """Reads the adapters in these folders and makes `model.adapters` choose among them by name.

    Raises UserError if a folder does not fit the model, was trained on another base, or is of full fine-tuning.
    """
    found: dict[str, Adapter] = {name: formats.read(folder) for name, folder in folders.items()}
    for name, adapter in found.items():
        check(model, adapter, os.fspath(folders[name]))
        if adapter.weights:
            raise UserError(f"{folders[name]}: full fine-tuning is no adapter beside others",
                            "llm fuse it, and serve the folder")
        if any(path.rpartition(".")[2] == HEAD for path in adapter.pairs):
            raise UserError(f"{folders[name]}: adapts {HEAD}, which sees sampled tokens only",
                            "llm fuse it, and serve that")
        if difference := foreign(model, adapter):
            raise UserError(f"{folders[name]}: {difference}", "serve it on the model that it was trained on")
    model.adapters = adapters = Adapters(tuple(found))
    paths = {path for adapter in found.values() for path in adapter.pairs}
    nn.swap(model, lambda path, module: AdaptedLinear(
        module, adapters, [adapter.pairs.get(path) for adapter in found.values()]) if path in paths else None)
    mx.eval(model.parameters())
    return adapters

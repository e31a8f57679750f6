"""An adapter becomes part of the weights, tensor by tensor as a checkpoint is copied."""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from ..engine import array as mx
from ..engine.errors import UserError
from .adapter import Adapter

Part = dict[str, mx.Array]
Quantizer = Callable[[str, mx.Array], Part | None]


class Fused:
    """What `models.convert` calls on each tensor in float32: W + scale · (A B)ᵀ, in `dtype`, or quantized by `then`.

    bfloat16 would round away half of a small adapter, so it is not offered. `config`, `dtype` and `job` are what the
    conversion asks for. After it, `kept` says how much of the adapter quantization has left: 1 is all.
    """

    def __init__(self, adapter: Adapter, then: Any = None, dtype: mx.Dtype = mx.float16):
        self.adapter, self.then, self.dtype = adapter, then, dtype
        self.config: dict[str, Any] = then.config if then else {}
        self.job = {"adapter": identity(adapter)}
        self.along = self.squares = self.errors = 0.0

    def __call__(self, name: str, array: mx.Array) -> Part:
        path = name.removesuffix(".weight")
        fused = self._fused(path, name, array)
        rounded = fused.astype(self.dtype) if fused.dtype.inexact else fused
        parts = self.then(name, rounded) if self.then else None
        if parts and path in self.adapter.pairs:
            self._measure(parts, array, fused - array)
        return parts or {name: rounded}

    def _fused(self, path: str, name: str, array: mx.Array) -> mx.Array:
        if name in self.adapter.weights:
            return self.adapter.weights[name].astype(mx.float32)
        if path not in self.adapter.pairs:
            return array
        pair = self.adapter.pairs[path]
        if (delta := pair.scale * (pair.a @ pair.b).T).shape != array.shape:
            raise UserError(f"[fuse] {path} has shape {tuple(array.shape)}, the adapter adds {tuple(delta.shape)}",
                            "the checkpoint stores this layer in another way: serve the adapter beside the model")
        return array + delta

    def _measure(self, parts: Part, base: mx.Array, delta: mx.Array) -> None:
        """Compares what quantized weights add to the base with what the adapter adds."""
        codes, scales, biases = (parts[next(n for n in parts if n.endswith(leaf))]
                                 for leaf in (".weight", ".scales", ".biases"))
        columns = base.shape[-1]
        bits, group = codes.shape[-1] * 32 // columns, columns // scales.shape[-1]
        sides = scales.astype(mx.float32), biases.astype(mx.float32)
        added = mx.dequantize(codes, *sides, group, bits) - base
        self.along += mx.sum(added * delta).item()
        self.squares += mx.sum(delta * delta).item()
        self.errors += mx.sum(mx.square(added - delta)).item()

    @property
    def kept(self) -> float:
        """The part of the adapter's change that the new weights make, in its own direction."""
        return self.along / self.squares if self.squares else 1.0

    @property
    def noise(self) -> float:
        """The length of all other change, as a multiple of the adapter's."""
        return (self.errors / self.squares) ** 0.5 if self.squares else 0.0

    def expect(self, names: set[str]) -> None:
        """Raises UserError if a layer of the adapter is not among the checkpoint's tensors."""
        here = names | {name.removesuffix(".weight") for name in names}
        if missing := (self.adapter.pairs.keys() | self.adapter.weights.keys()) - here:
            raise UserError(f"[fuse] the checkpoint has no {min(missing)}: it stores {len(missing)} of the adapter's "
                            "layers in another way", "serve the adapter beside the model instead")


def identity(adapter: Adapter) -> str:
    """Tells adapters apart by all their numbers."""
    digest = hashlib.blake2b(digest_size=16)
    tensors = {f"{path} {i}": side for path, pair in adapter.pairs.items() for i, side in enumerate(pair[:2])}
    for name, tensor in sorted((tensors | adapter.weights).items()):
        digest.update(name.encode() + mx.contiguous(tensor).astype(mx.float32).numpy().tobytes())
    digest.update(str(sorted((path, pair.scale) for path, pair in adapter.pairs.items())).encode())
    return digest.hexdigest()

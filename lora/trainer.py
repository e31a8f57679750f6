"""One step of training as one compiled function that keeps its state.

Rows lie one after another without padding; attention sees its own row only. The loss is the sum over the supervised
tokens in float32, divided by their number in the whole optimizer step, so that a step is the same however its rows are
divided into batches.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..engine import array as mx
from ..engine import nn, optimizers
from ..engine.array.trees import tree_flatten, tree_unflatten
from ..engine.errors import UserError
from .data import Batch
from .evaluation import arrays, summed

CHECKED = 3                            # steps after which every leaf must have had a gradient: A has none while B is 0


class Leaves(dict[int, mx.Array]):
    """The trainable arrays of a model, in their places: a tree for `mx.compile` that holds nothing of its own."""

    def __init__(self, model: nn.Module):
        self.places = [(module, key, f"{path}.{key}") for path, module in model.named_modules()
                       for key, array in module.items()
                       if isinstance(array, mx.Array) and module.trainable_parameter_filter(module, key, array)]
        self.paths = [path for _, _, path in self.places]

    def values(self) -> list[mx.Array]:  # type: ignore[override]
        return [module[key] for module, key, _ in self.places]

    def items(self) -> list[tuple[int, mx.Array]]:  # type: ignore[override]
        return list(enumerate(self.values()))

    def __getitem__(self, place: int) -> mx.Array:
        module, key, _ = self.places[place]
        return module[key]

    def __setitem__(self, place: int, array: mx.Array) -> None:
        module, key, _ = self.places[place]
        module[key] = array

    def named(self) -> dict[str, mx.Array]:
        return dict(zip(self.paths, self.values(), strict=True))


class Step(NamedTuple):
    """What an optimizer step found. `finite` False: nothing was changed."""

    loss: float                        # mean over the supervised tokens
    norm: float                        # of the gradient, before clipping
    rate: float
    finite: bool
    supervised: int


class Trainer:
    """A prepared model and its optimizer. clip: the largest norm of the gradient, 0 for any. precise: products of
    quantized matrices in float32."""

    def __init__(self, model: Any, optimizer: optimizers.Optimizer, *, clip: float = 1.0, accumulate: bool = False,
                 precise: bool = False):
        self.model, self.optimizer, self.clip, self.precise = model, optimizer, clip, precise
        self.leaves = Leaves(model)
        if not self.leaves.paths:
            raise UserError("[lora] nothing in the model is trainable", "prepare(model, method) comes first")
        optimizer.init(model.trainable_parameters())
        self.sums = {path: mx.zeros_like(leaf) for path, leaf in self.leaves.named().items()} if accumulate else {}
        self.state: list[Any] = [self.leaves, optimizer.state, self.sums, mx.random.state]
        mx.eval(self.leaves.values(), optimizer.state, self.sums, mx.random.state)
        self.compile()
        self._loss = mx.compile(partial(summed, model), inputs=[self.leaves])
        self._reached = np.zeros(len(self.leaves.paths), bool)
        self._steps = 0

    def compile(self) -> None:
        """Forgets the plans that were made."""
        self._run = mx.compile(self._batch, inputs=self.state, outputs=self.state)

    def step(self, batches: list[Batch]) -> Step:
        """One optimizer step. UserError if after three of them an array has never had a gradient."""
        count = sum(batch.supervised for batch in batches)
        if len(batches) > 1 and not self.sums:
            raise ValueError("[Trainer] several batches in a step: accumulate=True wanted")
        total, divisor = 0.0, mx.array(max(1, count), mx.float32)
        with self._products():
            for i, batch in enumerate(batches, 1):
                loss, squares, finite = self._run(*arrays(batch), divisor, i == len(batches), self._blocks)
                total += float(loss.item())
        found, ok = np.asarray(squares), bool(finite.item())
        self._check(found, ok)
        rate = float(self.optimizer.learning_rate.item())
        return Step(total, math.sqrt(float(found.sum())) if ok else math.nan, rate, ok, count)

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """The sum of the losses of the supervised tokens, and their number. Nothing else is moved."""
        total, count = 0.0, 0
        self.model.eval()
        try:
            with self._products():
                for batch in batches:
                    total += float(self._loss(*arrays(batch)).item())
                    count += batch.supervised
        finally:
            self.model.train()
        return total, count

    def gradients(self, batch: Batch) -> tuple[mx.Array, dict[str, mx.Array]]:
        """The mean loss of one batch and the gradient of every trainable array, without a step."""
        tokens, targets, lengths = arrays(batch)
        with self._products():
            loss, tree = self._graded(tokens, targets, lengths, mx.array(float(max(1, batch.supervised))))
            mx.eval(loss, tree)
        return loss, dict(tree_flatten(tree))

    def plan(self, batch: Batch) -> mx.Plan:
        """What a step with one batch of this size runs: made, not run."""
        with self._products():
            return self._run.plan(*arrays(batch), mx.array(1.0), True, self._blocks)  # type: ignore[attr-defined]

    @property
    def _blocks(self) -> int:
        """Checkpointed blocks: an argument of the step, since another number is another plan."""
        return int(self.model.checkpointed)

    def _products(self) -> Any:
        return mx.fast.precise() if self.precise else nullcontext()

    # what is compiled

    def _graded(self, tokens: mx.Array, targets: mx.Array, lengths: mx.Array, count: mx.Array) -> tuple[mx.Array, Any]:
        mean = nn.value_and_grad(self.model, lambda *batch: summed(self.model, *batch) / count)
        return mean(tokens, targets, lengths)

    def _batch(self, tokens: mx.Array, targets: mx.Array, lengths: mx.Array, count: mx.Array,
               last: bool, blocks: int) -> tuple[mx.Array, mx.Array, mx.Array]:
        """Adds a batch's part to the gradient; the last one of a step moves the weights. Returns the batch's part of
        the loss, the squared norm of each gradient, and whether all is finite."""
        loss, tree = self._graded(tokens, targets, lengths, count)
        gradients = dict(tree_flatten(tree))
        for path in self.sums:
            gradients[path] = self.sums[path] + gradients[path]
        squares = mx.stack([mx.sum(mx.square(g.astype(mx.float32))) for g in gradients.values()])
        total = mx.sum(squares)
        finite = mx.isfinite(total + loss)
        for path in self.sums:
            self.sums[path] = mx.zeros_like(gradients[path]) if last else gradients[path]
        if last:
            self._move(gradients, mx.sqrt(total), finite)
        return loss, squares, finite

    def _move(self, gradients: dict[str, mx.Array], norm: mx.Array, finite: mx.Array) -> None:
        """The optimizer's step on clipped gradients; where something is not finite, everything stays as it is."""
        if self.clip:
            scale = mx.minimum(self.clip / (norm + 1e-6), 1.0)
            gradients = {path: g * scale.astype(g.dtype) for path, g in gradients.items()}
        before = [*self.leaves.values(), *(tree[key] for tree, key in slots(self.optimizer.state))]
        self.optimizer.update(self.model, tree_unflatten(gradients))
        places = [*((self.leaves, i) for i in range(len(self.leaves.paths))), *slots(self.optimizer.state)]
        for (tree, key), old in zip(places, before, strict=True):
            tree[key] = mx.where(finite, tree[key], old)

    def _check(self, squares: np.ndarray, finite: bool) -> None:
        """A leaf that gets no gradient is silently untrained in other programs."""
        if finite and self._steps < CHECKED:
            self._reached |= squares > 0
            self._steps += 1
            if self._steps == CHECKED and not self._reached.all():
                never = [path for path, reached in zip(self.leaves.paths, self._reached, strict=True) if not reached]
                what = f"[lora] {len(never)} of {len(self._reached)} arrays had no gradient in {CHECKED} steps"
                raise UserError(f"{what}, the first is {never[0]}", "leave these layers out with --target or --layers")


def slots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """The places of a tree's arrays: container and key."""
    for key, item in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        if isinstance(item, mx.Array):
            yield tree, key
        elif isinstance(item, dict | list):
            yield from slots(item)

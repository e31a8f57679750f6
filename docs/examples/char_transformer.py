"""A character-level transformer on Shakespeare: nanoGPT's settings for a CPU, training compiled into one plan.

    python docs/examples/char_transformer.py --steps 2000
"""
from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lazulite.engine import array as mx
from lazulite.engine import nn, optimizers

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "tinyshakespeare.txt"


class Shape(NamedTuple):
    layers: int = 4
    heads: int = 4
    channels: int = 128
    block: int = 64                                        # characters that a prediction can look back at


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, c = shape.heads, shape.channels
        self.q, self.k, self.v, self.out = (nn.Linear(c, c, bias=False) for _ in range(4))

    def __call__(self, x: mx.array) -> mx.array:
        b, t, c = x.shape
        q, k, v = (p(x).reshape(b, t, self.heads, -1).transpose(0, 2, 1, 3) for p in (self.q, self.k, self.v))
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")
        return self.out(y.transpose(0, 2, 1, 3).reshape(b, t, c))


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        c = shape.channels
        self.norm1, self.norm2 = nn.LayerNorm(c, bias=False), nn.LayerNorm(c, bias=False)
        self.attention = Attention(shape)
        self.up, self.down = nn.Linear(c, 4 * c, bias=False), nn.Linear(4 * c, c, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.gelu(self.up(self.norm2(x))))


def spread(weight: mx.array, branches: int = 1) -> mx.array:
    """Normal numbers that give outputs the inputs' variance, divided by the number of branches that are added up."""
    return nn.init.normal(0.0, (weight.shape[1] * branches) ** -0.5)(weight)


class Transformer(nn.Module):
    """Characters (B, T) to logits (B, T, V)."""

    def __init__(self, vocabulary: int, shape: Shape):
        super().__init__()
        self.characters, self.places = (nn.Embedding(n, shape.channels) for n in (vocabulary, shape.block))
        self.layers = [Block(shape) for _ in range(shape.layers)]
        self.norm = nn.LayerNorm(shape.channels, bias=False)
        for table in (self.characters, self.places):
            table.weight = nn.init.normal(0.0, 0.02)(table.weight)
        for layer in self.layers:                          # what a branch ends in starts smaller, as in GPT-2
            for linear in (layer.attention.q, layer.attention.k, layer.attention.v, layer.up):
                linear.weight = spread(linear.weight)
            for linear in (layer.attention.out, layer.down):
                linear.weight = spread(linear.weight, 2 * shape.layers)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.characters(x) + self.places.weight[:x.shape[1]]
        for layer in self.layers:
            h = layer(h)
        return self.characters.as_linear(self.norm(h))


def loss_of(model: Transformer, x: mx.array, y: mx.array) -> mx.array:
    return mx.mean(mx.fast.cross_entropy(model(x), y))


def optimizer_for(steps: int, warmup: int) -> optimizers.Optimizer:
    """AdamW that decays matrices only."""
    def adam(weight_decay: float) -> optimizers.Optimizer:
        rise, fall = optimizers.linear_schedule(0.0, 1e-3, warmup), optimizers.cosine_decay(1e-3, steps - warmup, 1e-4)
        rate = optimizers.join_schedules([rise, fall], [warmup])
        return optimizers.AdamW(rate, betas=[0.9, 0.99], weight_decay=weight_decay, bias_correction=True)

    return optimizers.MultiOptimizer([adam(0.1), adam(0.0)], [lambda path, g: g.ndim == 2])


class Text(NamedTuple):
    """The corpus as numbers: nine tenths to learn from, one to judge by."""

    vocabulary: str
    train: np.ndarray
    valid: np.ndarray

    @classmethod
    def of(cls, path: Path) -> Text:
        text = path.read_text()
        vocabulary = "".join(sorted(set(text)))
        ids = np.array([vocabulary.index(c) for c in text], np.int32)
        cut = len(ids) * 9 // 10
        return cls(vocabulary, ids[:cut], ids[cut:])

    def batch(self, rng: np.random.Generator, size: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        starts = rng.integers(0, len(self.train) - block, size)[:, None] + np.arange(block)
        return self.train[starts], self.train[starts + 1]

    def judge(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """All of the validation text, cut into blocks."""
        rows = (len(self.valid) - 1) // block
        return self.valid[:rows * block].reshape(rows, block), self.valid[1:rows * block + 1].reshape(rows, block)


class Trainer:
    """The model, its optimizer, and one step of both as a compiled function that keeps its state."""

    def __init__(self, model: Transformer, optimizer: optimizers.Optimizer):
        self.model, self.optimizer = model, optimizer
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]
        mx.eval(state)
        self.step = mx.compile(self._step, inputs=state, outputs=state)
        self.loss = mx.compile(lambda x, y: loss_of(model, x, y), inputs=[model.state])

    def _step(self, x: mx.array, y: mx.array) -> mx.array:
        loss, grads = nn.value_and_grad(self.model, lambda x, y: loss_of(self.model, x, y))(x, y)
        grads, _ = optimizers.clip_grad_norm(grads, 1.0)
        self.optimizer.update(self.model, grads)
        return loss

    def validation(self, text: Text, block: int, rows: int = 256) -> float:
        """Mean loss over whole blocks of the validation text, in nats a character."""
        xs, ys = text.judge(block)
        losses = [(float(self.loss(mx.array(xs[i:i + rows]), mx.array(ys[i:i + rows]))), len(xs[i:i + rows]))
                  for i in range(0, len(xs), rows)]
        return sum(loss * n for loss, n in losses) / len(xs)


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="a text file")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    text, shape, rng = Text.of(args.data), Shape(), np.random.default_rng(args.seed)
    mx.random.seed(args.seed)
    trainer = Trainer(Transformer(len(text.vocabulary), shape), optimizer_for(args.steps, max(1, args.steps // 20)))
    start = time.perf_counter()
    for i in range(args.steps):
        x, y = text.batch(rng, args.batch, shape.block)
        loss = trainer.step(mx.array(x), mx.array(y))
        if i % 200 == 199 or i == args.steps - 1:
            print(f"step {i + 1:5d}  loss {float(loss):.3f}  {time.perf_counter() - start:.1f} s")
    valid = trainer.validation(text, shape.block)
    print(f"validation loss {valid:.3f}")
    return valid


if __name__ == "__main__":
    main()

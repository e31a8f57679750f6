"""Gradients of single examples by vmap of grad: they clip each example's influence while training (as differentially
private training does), and afterwards find the labels that are wrong.

    python docs/examples/per_example.py --wrong 60
"""
from __future__ import annotations

import argparse

import numpy as np
from digits_mlp import MLP, digits, loss_of

from lazulite.engine import array as mx
from lazulite.engine import nn, optimizers


def per_example_grads(model: MLP, x: mx.array, y: mx.array) -> tuple[dict, mx.array]:
    """The gradient of each example's loss, weights with the batch axis in front, and its norm (B)."""
    def loss(weights: dict, x: mx.array, y: mx.array) -> mx.array:
        model.update(weights)
        return loss_of(model, x, y)

    weights = model.trainable_parameters()
    grads = mx.vmap(mx.grad(loss), in_axes=(None, 0, 0))(weights, x, y)
    model.update(weights)
    squares = [mx.sum(mx.square(g), axis=list(range(1, g.ndim))) for _, g in nn.tree_flatten(grads)]
    return grads, mx.sqrt(sum(squares))


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--wrong", type=int, default=60, help="labels that are replaced by wrong ones")
    parser.add_argument("--clip", type=float, default=1.0, help="the most that one example's gradient may measure")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    mx.random.seed(args.seed)
    images, labels = digits(rng)
    wrong = rng.choice(len(labels), args.wrong, replace=False)
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, args.wrong)) % 10
    model, optimizer = MLP(64), optimizers.Adam(2e-3)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def step(x: mx.array, y: mx.array) -> mx.array:
        grads, norms = per_example_grads(model, x, y)
        scale = mx.minimum(1.0, args.clip / (norms + 1e-6))
        mean = nn.tree_map(lambda g: mx.mean(g * scale.reshape(-1, *(1,) * (g.ndim - 1)), axis=0), grads)
        optimizer.update(model, mean)
        return norms

    step = mx.compile(step, inputs=state, outputs=state)
    for epoch in range(args.epochs):
        order = rng.permutation(len(images))
        for i in range(0, len(order) - args.batch + 1, args.batch):
            rows = order[i:i + args.batch]
            norms = step(mx.array(images[rows]), mx.array(labels[rows]))
        if epoch % 5 == 4 or epoch == args.epochs - 1:
            print(f"epoch {epoch + 1:3d}  gradient norms of the last batch: median {np.median(np.array(norms)):.3f}, "
                  f"largest {np.max(np.array(norms)):.3f}")
    _, norms = per_example_grads(model, mx.array(images), mx.array(labels))
    suspects = np.argsort(-np.array(norms))[:args.wrong]
    found = len(np.intersect1d(suspects, wrong)) / args.wrong
    print(f"{found:.0%} of the {args.wrong} wrong labels are among the {args.wrong} largest gradients")
    return found


if __name__ == "__main__":
    main()

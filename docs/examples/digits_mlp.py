"""A multilayer perceptron learns handwritten digits: 1,797 images of 8 x 8 (UCI, by way of scikit-learn).

    python docs/examples/digits_mlp.py --epochs 40
"""
from __future__ import annotations

import argparse

import numpy as np

from lazulite.engine import array as mx
from lazulite.engine import nn, optimizers

TEST = 360


def digits(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 64) between 0 and 1 and their digits (N), in random order."""
    from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    return (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)


class MLP(nn.Module):
    """x (…, 64) to logits (…, 10)."""

    def __init__(self, hidden: int):
        super().__init__()
        self.layers = [nn.Linear(64, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 10)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x))
        return self.layers[-1](x)


def loss_of(model: MLP, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x), y, reduction="mean")


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    mx.random.seed(args.seed)
    images, labels = digits(rng)
    x_test, y_test, images, labels = mx.array(images[:TEST]), labels[:TEST], images[TEST:], labels[TEST:]
    model, optimizer = MLP(args.hidden), optimizers.Adam(1e-3)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def step(x: mx.array, y: mx.array) -> mx.array:
        loss, grads = nn.value_and_grad(model, lambda x, y: loss_of(model, x, y))(x, y)
        optimizer.update(model, grads)
        return loss

    step = mx.compile(step, inputs=state, outputs=state)
    accuracy = 0.0
    for epoch in range(args.epochs):
        order = rng.permutation(len(images))
        batches = [order[i:i + args.batch] for i in range(0, len(order) - args.batch + 1, args.batch)]
        losses = [float(step(mx.array(images[rows]), mx.array(labels[rows]))) for rows in batches]
        accuracy = float(np.mean(np.array(mx.argmax(model(x_test), axis=-1)) == y_test))
        if epoch % 10 == 9 or epoch == args.epochs - 1:
            print(f"epoch {epoch + 1:3d}  loss {np.mean(losses):.4f}  accuracy on {TEST} others {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()

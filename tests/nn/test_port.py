"""A program written for MLX, with both libraries behind its imports: the same seed gives the same losses."""
from functools import cache, partial

import mlx.core
import mlx.nn
import mlx.optimizers
import numpy as np
import pytest

import lazulite.engine.array
import lazulite.engine.nn
import lazulite.engine.optimizers

MLX = mlx.core, mlx.nn, mlx.optimizers
OURS = lazulite.engine.array, lazulite.engine.nn, lazulite.engine.optimizers


def sequences(mx, nn):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.place = nn.SinusoidalPositionalEncoding(8)
            self.attend = nn.TransformerEncoder(1, 8, 2, dropout=0.2)
            self.rnn = nn.GRU(8, 6)
            self.norm = nn.LayerNorm(6)
            self.drop = nn.Dropout(0.3)
            self.head = nn.Linear(6, 10)

        def __call__(self, ids):
            x = self.embed(ids) + self.place(mx.arange(ids.shape[1]))
            mask = nn.MultiHeadAttention.create_additive_causal_mask(ids.shape[1])
            return self.head(self.drop(self.norm(self.rnn(self.attend(x, mask)))))

    ids = mx.random.randint(0, 10, (4, 7))
    return Tagger(), ids[:, :-1], ids[:, 1:]


def images(mx, nn):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.2),
        nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.GELU(approx="fast"), nn.AvgPool2d(3),
        lambda x: x.reshape(x.shape[0], -1), nn.Linear(6, 3))
    return net, mx.random.normal((6, 10, 10, 1)), mx.random.randint(0, 3, (6,))


def train(libraries, build, optimizer: str, compiled: bool) -> list[float]:
    mx, nn, optim = libraries
    mx.random.seed(7)
    model, x, y = build(mx, nn)
    mx.eval(model.parameters())
    opt = OPTIMIZERS[optimizer](optim)
    state = [model.state, opt.state, mx.random.state]

    def loss_fn(model, x, y):
        return nn.losses.cross_entropy(model(x), y, reduction="mean")

    def step(x, y):
        loss, grads = nn.value_and_grad(model, loss_fn)(model, x, y)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        opt.update(model, grads)
        return loss

    if compiled:
        step = partial(mx.compile, inputs=state, outputs=state)(step)
    losses = []
    for _ in range(6):
        losses.append(step(x, y).item())
        mx.eval(state)
    model.eval()
    return [*losses, loss_fn(model, x, y).item()]


OPTIMIZERS = {
    "adamw": lambda o: o.AdamW(o.join_schedules([o.linear_schedule(0, 0.02, 3), o.cosine_decay(0.02, 9)], [3])),
    "sgd": lambda o: o.SGD(0.1, momentum=0.9, nesterov=True),
}


@cache
def reference(build, optimizer: str) -> list[float]:
    return train(MLX, build, optimizer, False)              # compiling, MLX runs a C++ compiler for minutes


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("build", [sequences, images])
def test_program(build, optimizer: str, compiled: bool) -> None:
    np.testing.assert_allclose(train(OURS, build, optimizer, compiled), reference(build, optimizer), rtol=2e-4)

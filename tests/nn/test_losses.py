"""Losses against torch, and against mlx.nn where torch has no twin: value, and gradient of every float argument."""
import mlx.core as mlx
import mlx.nn as theirs
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lazulite.engine import array as mx
from lazulite.engine import nn

rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def log_probabilities(*shape: int) -> np.ndarray:
    return torch.log_softmax(torch.tensor(normal(*shape)), -1).numpy()


classes, signs = rng.integers(0, 5, 4), np.sign(normal(4, 5))
unit = rng.uniform(0.05, 0.95, (4, 5)).astype(np.float32)
CASES = [  # loss, arguments, options, the same in torch without a reduction
    ("cross_entropy", [normal(4, 5), classes], {}, F.cross_entropy),
    ("cross_entropy", [normal(4, 5), classes], {"label_smoothing": 0.2},
     lambda x, t: F.cross_entropy(x, t, label_smoothing=0.2, reduction="none")),
    ("cross_entropy", [normal(4, 5), unit], {}, None),  # torch's gradient of the targets has another constant
    ("cross_entropy", [normal(4, 5), unit], {"label_smoothing": 0.1, "axis": 0}, None),
    ("cross_entropy", [normal(3, 5, 4), classes[None].repeat(3, 0)], {"axis": 1}, F.cross_entropy),
    ("cross_entropy", [1e4 * normal(4, 5), classes, normal(4)], {},
     lambda x, t, w: w * F.cross_entropy(x, t, reduction="none")),
    ("binary_cross_entropy", [normal(4, 5), unit], {}, F.binary_cross_entropy_with_logits),
    ("binary_cross_entropy", [normal(4, 5), unit, normal(4, 5)], {},
     lambda x, t, w: w * F.binary_cross_entropy_with_logits(x, t, reduction="none")),
    ("binary_cross_entropy", [unit, unit[::-1].copy()], {"with_logits": False}, F.binary_cross_entropy),
    ("l1_loss", [normal(4, 5), normal(4, 5)], {}, F.l1_loss),
    ("mse_loss", [normal(4, 5), normal(4, 5)], {}, F.mse_loss),
    ("nll_loss", [log_probabilities(4, 5), classes], {}, F.nll_loss),
    ("gaussian_nll_loss", [normal(4, 5), normal(4, 5), unit], {}, F.gaussian_nll_loss),
    ("gaussian_nll_loss", [normal(4, 5), normal(4, 5), unit], {"full": True},
     lambda x, t, v: F.gaussian_nll_loss(x, t, v, full=True, reduction="none")),
    ("kl_div_loss", [log_probabilities(4, 5), log_probabilities(4, 5)], {},
     lambda x, t: F.kl_div(x, t, log_target=True, reduction="none").sum(-1)),
    ("smooth_l1_loss", [normal(4, 5), normal(4, 5)], {"beta": 0.7},
     lambda x, t: F.smooth_l1_loss(x, t, beta=0.7, reduction="none")),
    ("triplet_loss", [normal(4, 5), normal(4, 5), normal(4, 5)], {"margin": 2.0}, None),
    ("triplet_loss", [normal(4, 5), normal(4, 5), normal(4, 5)], {"p": 3, "axis": 0, "eps": 1e-3}, None),
    ("hinge_loss", [normal(4, 5), signs], {}, None),
    ("huber_loss", [normal(4, 5), normal(4, 5)], {"delta": 0.5},
     lambda x, t: F.huber_loss(x, t, delta=0.5, reduction="none")),
    ("log_cosh_loss", [normal(4, 5), normal(4, 5)], {}, None),
    ("cosine_similarity_loss", [normal(4, 5), normal(4, 5)], {}, F.cosine_similarity),
    ("margin_ranking_loss", [normal(4), normal(4), signs[:, 0]], {"margin": 0.3},
     lambda a, b, t: F.margin_ranking_loss(a, b, t, margin=0.3, reduction="none")),
]


def wanted(name: str, arrays: list[np.ndarray], options: dict, twin, reduction: str) -> list[np.ndarray]:
    floats = [i for i, a in enumerate(arrays) if a.dtype == np.float32]
    if twin is None:
        fn = lambda *xs: getattr(theirs.losses, name)(*xs, reduction=reduction, **options)  # noqa: E731
        xs = [mlx.array(a) for a in arrays]
        gradients = mlx.grad(lambda *xs: fn(*xs).sum(), floats)(*xs)
        return [np.array(y) for y in (fn(*xs), *gradients)]  # floats are always two or more here
    xs = [torch.tensor(a, requires_grad=i in floats) for i, a in enumerate(arrays)]
    named = hasattr(twin, "__module__") and twin.__module__ == "torch.nn.functional"
    loss = twin(*xs, reduction="none") if named else twin(*xs)
    loss = {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]
    loss.sum().backward()
    return [y.detach().numpy() for y in (loss, *(xs[i].grad for i in floats))]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("name", "arrays", "options", "twin"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_loss(name: str, arrays: list[np.ndarray], options: dict, twin, reduction: str) -> None:
    def loss(*xs: mx.Array) -> mx.Array:
        return getattr(nn.losses, name)(*xs, reduction=reduction, **options)

    xs = [mx.array(a) for a in arrays]
    floats = [i for i, a in enumerate(arrays) if a.dtype == np.float32]
    gradients = mx.grad(lambda *xs: loss(*xs).sum(), floats)(*xs)
    gradients = gradients if len(floats) > 1 else [gradients]
    for found, want in zip([loss(*xs), *gradients], wanted(name, arrays, options, twin, reduction), strict=True):
        np.testing.assert_allclose(np.asarray(found), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "arrays", "options", "message"), [
    ("mse_loss", [normal(4, 5), normal(4)], {}, r"\[mse_loss\] predictions \(4, 5\), targets \(4,\): one shape wanted"),
    ("mse_loss", [normal(4), normal(4)], {"reduction": "max"}, "reduction is 'max', wanted one of none, mean, sum"),
    ("cross_entropy", [normal(4, 5), normal(5)], {}, r"logits \(4, 5\), targets \(5,\): \(4, 5\) or \(4,\) wanted"),
    ("cross_entropy", [normal(4, 5), classes], {"label_smoothing": 1.0}, "at least 0 and below 1 wanted"),
    ("cross_entropy", [normal(4, 5), classes, normal(5)], {}, r"loss \(4,\), weights \(5,\): one shape wanted"),
])
def test_errors(name: str, arrays: list[np.ndarray], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(nn.losses, name)(*map(mx.array, arrays), **options)

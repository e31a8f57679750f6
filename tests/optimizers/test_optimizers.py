"""Optimizers for 20 steps against mlx.optimizers, and against torch.optim where it has a twin."""
import mlx.core as mlx
import mlx.optimizers as theirs
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from lazulite.engine import array as mx
from lazulite.engine import nn, optimizers

STEPS = 20
SHAPES = {"w": (4, 6), "tall": (6, 3), "layers": [{"b": (6,)}, {"kernel": (2, 3, 4)}]}
T = torch.optim
ROWS = [  # name, options, the same in torch: class and options
    ("SGD", {}, T.SGD, {}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}, T.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True}, T.SGD, {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5}, None, {}),  # torch does not dampen the first step
    ("RMSprop", {}, T.RMSprop, {}),
    ("RMSprop", {"alpha": 0.9, "eps": 1e-3}, T.RMSprop, {"alpha": 0.9, "eps": 1e-3}),
    ("Adagrad", {}, T.Adagrad, {"eps": 1e-8}),
    ("AdaDelta", {"rho": 0.8, "eps": 1e-4}, T.Adadelta, {"rho": 0.8, "eps": 1e-4}),
    ("Adam", {}, None, {}),
    ("Adam", {"bias_correction": True, "betas": [0.8, 0.99]}, T.Adam, {"betas": (0.8, 0.99)}),
    ("AdamW", {"weight_decay": 0.1}, None, {}),
    ("AdamW", {"weight_decay": 0.1, "bias_correction": True}, T.AdamW, {"weight_decay": 0.1}),
    ("Adamax", {"eps": 1e-4}, None, {}),
    ("Lion", {"weight_decay": 0.1}, None, {}),
    ("Adafactor", {}, None, {}),
    ("Adafactor", {"relative_step": False, "scale_parameter": False, "beta_1": 0.9, "weight_decay": 0.1}, None, {}),
    ("Adafactor", {"warmup_init": True, "clip_threshold": 0.5, "decay_rate": -0.6}, None, {}),
    ("Muon", {}, None, {}),
    ("Muon", {"nesterov": False, "weight_decay": 0.0, "momentum": 0.8, "ns_steps": 3}, None, {}),
]


def draw(xp, seed: int):
    rng = np.random.default_rng(seed)
    return nn.tree_map(lambda s: xp.array(rng.standard_normal(s).astype(np.float32)), SHAPES,
                       is_leaf=lambda s: isinstance(s, tuple))


def train(xp, optimizer, steps: int = STEPS, parameters=None, first: int = 0):
    parameters = draw(xp, 99) if parameters is None else parameters
    for step in range(first, first + steps):
        parameters = optimizer.apply_gradients(draw(xp, step), parameters)
        xp.eval(parameters, optimizer.state)
    return parameters


def compare(found, wanted, **tolerance) -> None:
    wanted = dict(tree_flatten(wanted))
    assert dict(nn.tree_flatten(found)).keys() == wanted.keys()
    for path, x in nn.tree_flatten(found):
        assert str(x.dtype) == str(wanted[path].dtype).split(".")[-1]
        np.testing.assert_allclose(np.asarray(x), np.array(wanted[path]), err_msg=path, **tolerance)


@pytest.mark.parametrize(
    ("name", "options", "twin", "twin_options"), ROWS, ids=[f"{row[0]}-{i}" for i, row in enumerate(ROWS)])
def test_optimizer(name: str, options: dict, twin, twin_options: dict) -> None:
    ours, other = (getattr(library, name)(learning_rate=0.02, **options) for library in (optimizers, theirs))
    found = train(mx, ours)
    compare(found, train(mlx, other), rtol=1e-4, atol=2e-5)
    compare(ours.state, other.state, rtol=1e-4, atol=2e-5)
    if twin is None:
        return
    leaves = [torch.tensor(np.asarray(x)) for _, x in nn.tree_flatten(draw(mx, 99))]
    reference = twin(leaves, lr=0.02, **twin_options)
    for step in range(STEPS):
        for leaf, (_, g) in zip(leaves, nn.tree_flatten(draw(mx, step)), strict=True):
            leaf.grad = torch.tensor(np.asarray(g))
        reference.step()
    for leaf, (path, x) in zip(leaves, nn.tree_flatten(found), strict=True):
        np.testing.assert_allclose(np.asarray(x), leaf.numpy(), rtol=1e-4, atol=2e-5, err_msg=path)


def multi(library):
    return library.MultiOptimizer(
        [library.Muon(0.02), library.SGD(0.1, momentum=0.5), library.Lion(0.01)],
        [lambda path, g: g.ndim == 2, lambda path, g: path.startswith("layers.0")])


def test_multi_optimizer() -> None:
    ours, other = multi(optimizers), multi(theirs)
    compare(train(mx, ours), train(mlx, other), rtol=1e-4, atol=2e-5)
    compare(ours.state, other.state, rtol=1e-4, atol=2e-5)
    ours.learning_rate = 0.5
    assert [o.learning_rate.item() for o in ours.optimizers] == [0.5] * 3 == [ours.learning_rate.item()] * 3
    with pytest.raises(ValueError, match="3 optimizers, 0 filters"):
        optimizers.MultiOptimizer(ours.optimizers)


SCHEDULES = {
    "exponential": lambda o: o.exponential_decay(0.1, 0.9),
    "step": lambda o: o.step_decay(0.1, 0.5, 3),
    "cosine": lambda o: o.cosine_decay(0.1, 8, 0.01),
    "linear": lambda o: o.linear_schedule(0.0, 0.1, 5),
    "joined": lambda o: o.join_schedules([o.linear_schedule(0.0, 0.1, 4), o.cosine_decay(0.1, 6)], [4]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name: str) -> None:
    ours, other = (SCHEDULES[name](library) for library in (optimizers, theirs))
    for step in range(12):
        np.testing.assert_allclose(ours(mx.array(step, mx.uint64)).item(), other(mlx.array(step, mlx.uint64)).item(),
                                   rtol=1e-5, atol=1e-9)
    sgd, reference = (library.SGD(SCHEDULES[name](library)) for library in (optimizers, theirs))
    compare(train(mx, sgd), train(mlx, reference), rtol=1e-5, atol=1e-6)
    compare(sgd.state, reference.state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_parameters_stay_half(dtype: str) -> None:
    for name in ("SGD", "AdamW", "Lion"):
        states = []
        for xp, library in ((mx, optimizers), (mlx, theirs)):
            half = getattr(xp, dtype)
            optimizer = getattr(library, name)(0.1)
            out = optimizer.apply_gradients({"w": xp.ones((3,), dtype=half)}, {"w": xp.ones((3,), dtype=half)})
            states.append((optimizer, out))
        (ours, found), (other, wanted) = states
        assert {str(x.dtype) for _, x in nn.tree_flatten(found)} == {dtype}
        assert [str(x.dtype) for _, x in nn.tree_flatten(ours.state["w"])] == [
            str(x.dtype).split(".")[-1] for _, x in tree_flatten(other.state["w"])]
        np.testing.assert_allclose(np.asarray(found["w"].astype(mx.float32)),
                                   np.array(wanted["w"].astype(mlx.float32)), rtol=1e-2)


def test_state_is_taken_up_again() -> None:
    """Saved after 10 steps and loaded into another optimizer, 10 more are the same as 20."""
    first = optimizers.AdamW(optimizers.linear_schedule(0.1, 0.01, 15), bias_correction=True)
    half = train(mx, first, 10)
    leaves = [(path, mx.array(np.asarray(x))) for path, x in nn.tree_flatten(first.state)]
    second = optimizers.AdamW(optimizers.linear_schedule(0.1, 0.01, 15), bias_correction=True)
    second.state = nn.tree_unflatten(leaves)
    found = train(mx, second, 10, half, first=10)
    whole = train(mx, optimizers.AdamW(optimizers.linear_schedule(0.1, 0.01, 15), bias_correction=True))
    for (path, x), (_, y) in zip(nn.tree_flatten(found), nn.tree_flatten(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=path)


def test_state_grows_with_the_tree() -> None:
    ours, other = optimizers.Adam(0.1), theirs.Adam(0.1)
    for xp, o in ((mx, ours), (mlx, other)):
        o.init({"layers": [{"w": xp.ones((2,))}]})
        o.init({"layers": [{"w": xp.ones((2,)), "b": xp.ones((3,))}, {"w": xp.ones((4,))}], "head": xp.ones((5,))})
    compare(ours.state, other.state)


def test_update_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.layers[0].freeze()
    before = dict(model.named_parameters())
    sgd = optimizers.SGD(0.1)
    _, gradients = nn.value_and_grad(model, lambda x: model(x).sum())(mx.ones((5, 3)))
    sgd.update(model, gradients)
    assert {path for path, w in model.named_parameters() if w is not before[path]} == {
        "layers.1.weight", "layers.1.bias"}
    assert sgd.step.item() == 1
    np.testing.assert_allclose(np.asarray(model.layers[1].bias), np.asarray(before["layers.1.bias"]) - 0.5, rtol=1e-6)
    sgd.learning_rate = 0.5
    assert sgd.learning_rate.item() == 0.5


def test_a_compiled_step_carries_its_state() -> None:
    rng = np.random.default_rng(0)
    x, y = (mx.array(rng.standard_normal((8, n)).astype(np.float32)) for n in (3, 2))
    weights = [("weight", mx.array(rng.standard_normal((2, 3)).astype(np.float32))), ("bias", mx.zeros((2,)))]
    ends = []
    for transform in (lambda fn, state: fn, lambda fn, state: mx.compile(fn, inputs=state, outputs=state)):
        model = nn.Linear(3, 2).load_weights(weights)
        adam = optimizers.Adam(optimizers.cosine_decay(0.1, 10), bias_correction=True)
        grad = nn.value_and_grad(model, lambda model=model: nn.losses.mse_loss(model(x), y))

        def step(model=model, adam=adam, grad=grad):
            loss, gradients = grad()
            adam.update(model, gradients)
            return loss

        step = transform(step, [model.state, adam.state])
        losses = []
        for _ in range(6):
            losses.append(step().item())
            mx.eval(model.state, adam.state)
        ends.append((losses, np.asarray(model.weight), adam.step.item(), adam.learning_rate.item()))
    assert ends[0][0][-1] < ends[0][0][0] and ends[0][2] == ends[1][2] == 6
    for found, wanted in zip(ends[1], ends[0], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("most", [0.5, 100.0])
def test_clip_grad_norm(most: float) -> None:
    gradients = draw(mx, 3)
    leaves = [torch.tensor(np.asarray(g)) for _, g in nn.tree_flatten(gradients)]
    for leaf in leaves:
        leaf.grad = leaf.clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, most)
    clipped, found = optimizers.clip_grad_norm(gradients, most)
    np.testing.assert_allclose(found.item(), norm.item(), rtol=1e-5)
    for leaf, (path, g) in zip(leaves, nn.tree_flatten(clipped), strict=True):
        np.testing.assert_allclose(np.asarray(g), leaf.grad.numpy(), rtol=1e-5, err_msg=path)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: optimizers.SGD(0.1, nesterov=True), r"\[SGD\] nesterov is True: a momentum without dampening wanted"),
    (lambda: optimizers.Adam(0.1, betas=[0.9, 1.0]), r"\[Adam\] betas is \[0.9, 1.0\]: at least 0 and below 1 wanted"),
    (lambda: optimizers.Adagrad(0.1, eps=0.0), r"\[Adagrad\] eps is 0.0: more than 0 wanted"),
    (lambda: optimizers.clip_grad_norm({}, -1.0), "max_norm is -1.0"),
    (lambda: optimizers.step_decay(0.1, 0.5, 0), "step_size is 0: at least 1 wanted"),
    (lambda: optimizers.join_schedules([], []), "0 schedules, 0 boundaries"),
])
def test_errors(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

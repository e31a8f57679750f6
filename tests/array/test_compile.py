"""compile: programs that do in MLX what they do here, state in its own memory, transformations, bounded caches."""
import collections
import gc
import sys

import mlx.core
import numpy as np
import pytest

from lazulite.engine import array as mx
from lazulite.engine.array import evaluate

compiled = sys.modules["lazulite.engine.array.compiled"]
rng = np.random.default_rng(3)
CONSTANT = mx.array(rng.normal(size=(4, 4)))


@pytest.fixture(autouse=True)
def plans(monkeypatch):
    """A cache of plans of the test's own; `lowered` counts the graphs that became plans."""
    lowered = []
    for module in (evaluate, compiled):
        original = module.lower_values
        monkeypatch.setattr(module, "lower_values", lambda *a, f=original: (lowered.append(1), f(*a))[1])
    monkeypatch.setattr(evaluate, "PLANS", evaluate.Cache())
    return lowered


# programs: what they return is the same in MLX

def counter(m):
    state = {"n": m.array(0.0), "seen": [m.array([1.0, 2.0])]}

    def step(x):
        state["n"] = state["n"] + 1
        state["seen"][0] = state["seen"][0] * 0.5 + x
        return state["n"] * 10

    step = m.compile(step, inputs=state, outputs=state)
    results = [step(m.array([1.0, k])).item() for k in range(4)]
    return [*results, *state["seen"][0].tolist(), state["n"].item()]


def captured_is_constant(m):
    y = [m.array(2.0)]
    f = m.compile(lambda x: x * y[0])
    first = f(m.array(3.0)).item()
    y[0] = m.array(5.0)
    return [first, f(m.array(3.0)).item(), m.compile(lambda x: x * y[0], inputs=y)(m.array(3.0)).item()]


def state_read_and_not_written(m):
    y = [m.array(2.0)]
    f = m.compile(lambda x: x * y[0], inputs=y)
    results = [f(m.array(3.0)).item()]
    y[0] = m.array(4.0)
    return [*results, f(m.array(3.0)).item(), y[0].item()]


def keywords_and_constants(m):
    f = m.compile(lambda x, scale=1.0, *, shift=None: x * scale + (0.0 if shift is None else shift))
    x = m.array([1.0, 2.0])
    rows = [f(x), f(x, 2.0), f(x, scale=3.0, shift=m.array(1.0)), f(x, 2), f(x, 1.0, shift=m.array([1.0, -1.0]))]
    return sum((r.tolist() for r in rows), [])


def nested_results(m):
    f = m.compile(lambda t: {"a": [t["x"] + 1, (t["y"][0], t["y"][1] * 2)], "n": 3})
    r = f({"x": m.array(1.0), "y": (m.array(2.0), m.array(3.0))})
    return [r["a"][0].item(), r["a"][1][0].item(), r["a"][1][1].item()]


def transformed(m):
    def f(x):
        return m.sum(m.exp(x) * x)

    x = m.array([0.5, -1.0, 2.0])
    rows = [m.grad(m.compile(f))(x), m.compile(m.grad(f))(x), m.compile(m.grad(m.compile(f)))(x),
            m.vmap(m.compile(m.sin))(x), m.compile(m.vmap(m.grad(lambda v: v**3)))(x),
            m.grad(lambda v: m.compile(f)(v * 2))(x), m.compile(m.compile(m.cos))(x),
            m.compile(lambda v: m.vjp(f, [v], [m.array(1.0)])[1][0])(x),
            m.compile(lambda v: m.jvp(f, [v], [v])[1][0])(x)]
    return sum((r.tolist() if r.ndim else [r.item()] for r in rows), [])


def trained(m):
    """Gradient descent on y = x w with momentum; the gradient of the captured parameters."""
    state = [m.array([1.0, -1.0]), m.zeros((2,))]
    x, y = m.array([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0]]), m.array([1.0, 2.0, 3.0])
    gradient = m.value_and_grad(lambda w: m.mean(m.square(x @ w - y)))

    def step():
        loss, g = gradient(state[0])
        state[1] = 0.9 * state[1] + g
        state[0] = state[0] - 0.01 * state[1]
        return loss

    step = m.compile(step, inputs=state, outputs=state)
    return [step().item() for _ in range(5)] + state[0].tolist()


@pytest.mark.parametrize("program", [counter, captured_is_constant, state_read_and_not_written, keywords_and_constants,
                                     nested_results, transformed, trained], ids=lambda p: p.__name__)
def test_programs_as_in_mlx(program):
    expected = program(mlx.core)
    np.testing.assert_allclose(program(mx), expected, rtol=2e-6)
    mx.disable_compile()
    try:
        eager = program(mx)
    finally:
        mx.enable_compile()
    if program is not captured_is_constant:                # the one that shows what compile changes
        np.testing.assert_allclose(eager, expected, rtol=2e-6)


# state

def pointer(a):
    return a._value.buffer.pointer


def test_state_stays_in_its_memory():
    state = {"w": mx.array(rng.normal(size=(40, 30))), "m": [mx.zeros((40, 30))]}

    def step(g):
        state["m"][0] = state["m"][0] * 0.9 + g
        state["w"] = state["w"] - 0.1 * state["m"][0]

    f, g = mx.compile(step, inputs=state, outputs=state), mx.array(rng.normal(size=(40, 30)))
    w, m, x = np.array(state["w"]), np.zeros((40, 30), np.float32), np.array(g)
    f(g)
    places = {pointer(state["w"]), pointer(state["m"][0])}
    for _ in range(3):
        f(g)
        assert {pointer(state["w"]), pointer(state["m"][0])} == places
    for _ in range(4):
        m = m * np.float32(0.9) + x
        w = w - np.float32(0.1) * m
    np.testing.assert_allclose(state["w"], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hold", ["array", "copy", "numpy", "slice", "graph", "twice"])
def test_memory_that_somebody_holds_is_not_overwritten(hold):
    state = [mx.array([1.0, 2.0, 3.0]), mx.array([0.0])]
    f = mx.compile(lambda: state.__setitem__(0, state[0] * 2), inputs=state, outputs=state)
    f(), f()
    ways = {"array": lambda: state[0], "copy": lambda: mx.array(state[0]), "numpy": lambda: np.asarray(state[0]),
            "slice": lambda: state[0][:3], "graph": lambda: state[0] + 0, "twice": lambda: state.append(state[0])}
    held = ways[hold]()
    f(), f()
    assert state[0].tolist() == [16.0, 32.0, 48.0]
    assert np.array(state.pop() if hold == "twice" else held).tolist() == [4.0, 8.0, 12.0]


def test_eval_overwrites_what_dies():
    x = mx.array([1.0, 2.0]) * 1
    mx.eval(x)
    place, other = pointer(x), x
    x = x + 1
    mx.eval(x)
    assert pointer(x) != place and other.tolist() == [1.0, 2.0]
    del other
    place = pointer(x)
    for _ in range(3):
        x = mx.exp(x * 0) + x
        mx.eval(x)
    assert pointer(x) == place and x.tolist() == [5.0, 6.0]


def test_a_result_that_is_the_state_itself_is_kept():
    state = [mx.array([1.0]), mx.array([5.0])]

    def swap():
        state[0], state[1] = state[1], state[0] + 1
        return state[0]

    f = mx.compile(swap, inputs=state, outputs=state)
    assert [f().item() for _ in range(5)] == [5.0, 2.0, 6.0, 3.0, 7.0]


def test_a_failure_leaves_the_state_as_it_was():
    state = {"w": mx.array([1.0]), "inner": [mx.array([2.0])]}

    def step(fail):
        state["w"], state["inner"][0] = state["w"] + 1, state["inner"][0] * 2
        if fail:
            raise KeyError("no")

    f = mx.compile(step, inputs=state, outputs=state)
    with pytest.raises(KeyError):
        f(True)
    assert (state["w"].item(), state["inner"][0].item()) == (1.0, 2.0)
    f(False)
    assert (state["w"].item(), state["inner"][0].item()) == (2.0, 4.0)


def test_state_may_grow_while_it_is_traced():
    state = {}

    def step(x):
        state["sum"] = state.get("sum", mx.zeros(x.shape)) + x

    f = mx.compile(step, inputs=state, outputs=state)
    for _ in range(3):
        f(mx.array([1.0, 2.0]))
    assert state["sum"].tolist() == [3.0, 6.0]


def test_random_state():
    draws = {}
    for name, state in (("captured", mx.random.state), ("constant", None)):
        f = mx.compile(lambda: mx.random.uniform(shape=(3,)), inputs=state, outputs=state)
        mx.random.seed(7)
        draws[name] = [f().tolist() for _ in range(3)]
    mx.random.seed(7)
    assert draws["captured"] == [mx.random.uniform(shape=(3,)).tolist() for _ in range(3)]
    assert draws["constant"][0] == draws["constant"][1] == draws["constant"][2]


# traces and plans

def test_one_trace_for_each_structure(plans):
    Point = collections.namedtuple("Point", "x y")
    traces = []

    def f(p, k):
        traces.append(k)
        return Point(p.x + k, p.y)

    g = mx.compile(f)
    zero, one = mx.zeros((2,)), mx.ones((2,))
    results = g(Point(zero, one), 1), g(Point(one, one), 1), g(Point(zero, one), 1.0)
    assert [r.x.tolist()[0] for r in results] == [1, 2, 1]
    assert type(g(Point(zero, one), 1)) is Point and traces == [1, 1.0]
    g(Point(mx.zeros((2, 2)), one), 1), g(Point(zero.astype(mx.float16), one), 1), g(Point(zero, one), True)
    assert len(traces) == 5
    divide = mx.compile(lambda x, zero: x / (x * zero))
    assert [divide(mx.array(1.0), z).item() for z in (0.0, -0.0, 0.0)] == [np.inf, -np.inf, np.inf]


def test_shapeless_functions_see_their_shapes():
    f = mx.compile(lambda x: mx.sum(x.reshape(-1, x.shape[-1] // 2), 0) / x.shape[0], shapeless=True)
    for shape in ((2, 4), (3, 4), (5, 6)):
        x = rng.normal(size=shape).astype(np.float32)
        np.testing.assert_allclose(f(mx.array(x)), x.reshape(-1, shape[1] // 2).sum(0) / shape[0], rtol=1e-5)


def test_caches_are_bounded():
    f = mx.compile(lambda x: x + 1)
    for n in range(compiled.TRACES + 10):
        f(mx.zeros((n + 1,)))
    cache = next(c.cell_contents for c in f.__closure__ if isinstance(c.cell_contents, evaluate.Cache))
    assert len(cache.entries) == compiled.TRACES
    for n in range(evaluate.CACHED + 10):
        mx.eval(mx.zeros((n + 1,)) + 1)
    assert len(evaluate.PLANS.entries) == evaluate.CACHED


def test_a_compiled_function_dies_with_its_plans():
    big = mx.array(rng.normal(size=(100, 100)))
    f = mx.compile(lambda x: x @ big + big)
    f(big)
    before = sys.getrefcount(big._value)
    del f
    gc.collect()
    assert sys.getrefcount(big._value) < before


def test_scalars_that_change_do_not_make_new_plans(plans):
    x = mx.array([1.0, 2.0])
    for k in (3.0, 0.5, -0.0, 0.0, float("nan"), 4.0, 1e-3):
        np.testing.assert_array_equal(x * k + 1.0, np.float32([1, 2]) * np.float32(k) + 1)
    assert len(plans) == 2                                 # one with the first number, one that takes any
    np.testing.assert_array_equal(x * 3.0 + 2.0, [5.0, 8.0])
    assert len(plans) == 3
    assert [str(mx.full((), zero).item()) for zero in (0.0, -0.0, 0.0)] == ["0.0", "-0.0", "0.0"]
    np.testing.assert_array_equal(1.0 / (x * mx.array([0.0]) * mx.where(x > 0, -0.0, 0.0) + -0.0), [-np.inf, -np.inf])


@pytest.mark.parametrize("fn, steps", [
    (lambda x: mx.exp(x) + mx.exp(x), 1),
    (lambda x: mx.sum(mx.sin(x) * 2) + mx.sum(mx.sin(x) * 2), 3),
    (lambda x: x @ (CONSTANT + CONSTANT.T).sum(0), 1),
    (lambda x: (mx.exp(x), mx.log(x))[0], 1),
])
def test_work_is_done_once_and_only_where_it_is_asked_for(fn, steps):
    x = mx.placeholder((3, 4), mx.float32)
    plan = mx.lower([fn(x)], [x])
    assert len(plan.steps) == steps, str(plan)


def test_what_cannot_be_an_argument():
    class Model(dict):
        def parameters(self):
            return dict(self)

    f = mx.compile(lambda x: x)
    with pytest.raises(TypeError, match=r"\[compile\] a Model argument"):
        f(Model(w=mx.zeros((1,))))
    with pytest.raises(TypeError, match=r"\[compile\] a set argument"):
        f({1, 2})
    with pytest.raises(ValueError, match=r"\[eval\] an array float32\(3,\) has no value while"):
        mx.compile(lambda x: x if x.sum() > 0 else -x)(mx.ones((3,)))
    assert f.__name__ == "<lambda>"


# whole models

@pytest.mark.parametrize("make", [lambda o: o.SGD(0.05, momentum=0.9), lambda o: o.AdamW(0.01)], ids=["SGD", "AdamW"])
def test_a_training_step_is_one_plan_in_flat_memory(make):
    from lazulite.engine import cpu, nn
    from lazulite.engine import optimizers as optim

    def run(compile):
        mx.random.seed(0)
        model, optimizer = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)), make(optim)
        mx.eval(model.parameters())
        loss_and_grad = nn.value_and_grad(model, lambda m, x, y: mx.mean(mx.square(m(x) - y)))
        state = [model.state, optimizer.state]

        def step(x, y):
            loss, gradients = loss_and_grad(model, x, y)
            optimizer.update(model, gradients)
            return loss

        if compile:
            step = mx.compile(step, inputs=state, outputs=state)
        x, y = (mx.array(np.random.default_rng(k).normal(size=(16, n)), mx.float32) for k, n in ((1, 8), (2, 3)))
        losses, memory = [], []
        for _ in range(12):
            loss = step(x, y)
            mx.eval(loss, state)
            losses.append(loss.item())
            memory.append(cpu.runtime().memory()["active"])
        assert losses[-1] < losses[0] and len(set(memory[-6:])) == 1
        return losses

    np.testing.assert_allclose(run(True), run(False), rtol=1e-4)


def test_the_plan_of_a_call_is_made_and_not_run():
    state = {"w": mx.ones((3,))}
    f = mx.compile(lambda x: state.update(w=state["w"] + x), inputs=state, outputs=state)
    plan = f.plan(mx.ones((3,)))
    assert len(plan.steps) == 1 and state["w"].tolist() == [1, 1, 1]
    f(mx.ones((3,)))
    assert state["w"].tolist() == [2, 2, 2]

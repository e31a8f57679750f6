"""Threads: graphs that share unevaluated nodes, compiled functions, gradients and errors, all at once."""
import os
import sys
import threading

import numpy as np
import pytest

from lazulite.engine import array as mx

THREADS, ROUNDS = 6, 40


@pytest.fixture(autouse=True)
def hurry():
    """Threads take turns every few bytecodes, as on a machine with many cores."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def hammer(work, threads=THREADS):
    """work(thread number) on all threads, from the same instant; what one raises is raised here."""
    start, errors = threading.Barrier(threads), []

    def run(k):
        try:
            start.wait()
            work(k)
        except BaseException as error:
            errors.append(error)

    team = [threading.Thread(target=run, args=(k,)) for k in range(threads)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_graphs_that_share_nodes():
    for round in range(ROUNDS):
        x = np.random.default_rng(round).normal(size=(5, 7)).astype(np.float32)
        a = mx.array(x)
        shared = mx.exp(a * 0.5 + round)                   # nobody has asked for it yet
        last = mx.sum(shared * shared)
        want = np.exp(x * np.float32(0.5) + round)

        def work(k, shared=shared, last=last, want=want):
            np.testing.assert_allclose(shared * k + 1, want * k + 1, rtol=1e-5)
            assert last.item() == pytest.approx(float((want * want).sum()), rel=1e-4)

        hammer(work)


def test_temporaries_die_in_their_own_thread():
    def work(k):
        x = mx.array(np.full(500, float(k), np.float32))
        total = np.full(500, float(k), np.float32)
        for i in range(ROUNDS):
            x = mx.maximum(x + i, 0) * 1.0                 # each round may overwrite the last one's memory
            mx.eval(x)
            total = total + i
            np.testing.assert_array_equal(x, total)

    hammer(work)


def test_one_compiled_function_for_all():
    f = mx.compile(lambda x, k: mx.sum(x * x, 0) + k)

    def work(k):
        for i in range(ROUNDS):
            x = np.full((3 + i % 3, 4), float(k), np.float32)
            np.testing.assert_allclose(f(mx.array(x), float(i % 2)), (x * x).sum(0) + i % 2)

    hammer(work)


def test_compiled_state_is_counted_once_for_each_call():
    state = {"n": mx.array(0), "w": mx.zeros((64,))}

    def step():
        state["n"] = state["n"] + 1
        state["w"] = state["w"] + 2

    f = mx.compile(step, inputs=state, outputs=state)
    hammer(lambda k: [f() for _ in range(ROUNDS)])
    assert state["n"].item() == THREADS * ROUNDS and set(state["w"].tolist()) == {2.0 * THREADS * ROUNDS}


def test_gradients():
    w = mx.array(np.linspace(-1, 1, 12).reshape(3, 4)) * 1.0          # unevaluated, and seen by every trace
    compiled = mx.compile(mx.grad(lambda x: mx.sum(mx.tanh(x @ w))))

    def work(k):
        for i in range(ROUNDS // 4):
            x = np.random.default_rng(100 * k + i).normal(size=(2, 3))
            m = np.linspace(-1, 1, 12).reshape(3, 4)
            want = (1 - np.tanh(x @ m) ** 2) @ m.T
            a = mx.array(x, mx.float32)
            for fn in (compiled, mx.grad(lambda x: mx.sum(mx.tanh(x @ w)))):
                np.testing.assert_allclose(fn(a), want, rtol=1e-4, atol=1e-5)
            rows = mx.vmap(mx.grad(lambda row: mx.sum(mx.tanh(row @ w))))(a)
            np.testing.assert_allclose(rows, want, rtol=1e-4, atol=1e-5)

    hammer(work, 4)


def test_an_error_is_of_the_thread_that_made_it():
    table = mx.array(np.arange(5.0))

    def work(k):
        for i in range(ROUNDS):
            if k % 2:
                with pytest.raises(RuntimeError, match="index"):
                    mx.eval(mx.take(table, mx.array([100 + i])))
            else:
                assert mx.take(table, mx.array([i % 5])).item() == i % 5

    hammer(work)


def test_python_goes_on_while_native_code_runs():
    """The native part gives the GIL back: another thread counts during one long run."""
    x = mx.array(np.random.default_rng(0).normal(size=(700, 700)), mx.float32)
    mx.eval(x @ x)
    y, counts, done = x @ x @ x @ x @ x @ x @ x, [0], threading.Event()

    def count():
        while not done.is_set():
            counts[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    sys.setswitchinterval(1)                               # no turn is taken but where the GIL is given back
    seen = counts[0]
    mx.eval(y)
    seen = counts[0] - seen
    done.set()
    counter.join()
    assert seen > 100


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_can_evaluate_while_its_parent_does():
    stop, x = threading.Event(), mx.array(np.ones(1000, np.float32))

    def busy():
        while not stop.is_set():
            mx.eval(mx.sin(x) + 1)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(5):
            if (child := os.fork()) == 0:
                os._exit(0 if (x[:3] + 1).tolist() == [2.0, 2.0, 2.0] else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()

"""Functions in files: what comes back computes the same, under transformations too, and a damaged file is an error."""
import contextlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lazulite.engine import array as mx
from lazulite.engine.array import safetensors
from lazulite.engine.errors import UserError

rng = np.random.default_rng(5)


def normal(*shape, dtype=mx.float32):
    return mx.array(rng.normal(size=shape), dtype)


W, B, INDEX = normal(8, 5), normal(5), mx.array([2, 0, 1])


@mx.custom_function
def double(x):
    return x * 2


FUNCTIONS = {                        # name: function, examples by position, by name
    "constants": (lambda x: mx.tanh(x @ W + B), [normal(3, 8)], {}),
    "nested": (lambda x, y: {"a": [x + y, (x * y, x)], "b": y}, [normal(4), normal(4)], {}),
    "names": (lambda x, scale, shift: x * scale - shift, [normal(2, 3)], {"scale": normal(3), "shift": normal(2, 1)}),
    "none": (lambda: mx.exp(W), [], {}),
    "integers": (lambda x: (x << 2) | 1, [mx.array([1, 2, 3], mx.uint8)], {}),
    "infinite": (lambda x: mx.where(x > 0, x, -float("inf")) + float("nan") * 0 * x, [normal(6)], {}),
    "moved": (lambda x: mx.concatenate([x[1:, ::2].T, mx.broadcast_to(x[0, 0], (4, 2))], 1), [normal(3, 8)], {}),
    "gathered": (lambda x: mx.take(x, INDEX, 0) + mx.take_along_axis(x, mx.argmax(x, 1, keepdims=True), 1),
                 [normal(3, 8)], {}),
    "fused": (lambda x: mx.fast.rms_norm(x, mx.ones((8,)), 1e-5) + mx.softmax(x, -1), [normal(3, 8)], {}),
    "half": (lambda x: (x.astype(mx.bfloat16) * 3).astype(mx.float32), [normal(7)], {}),
    "gradient": (mx.value_and_grad(lambda x: mx.sum(mx.sin(x) @ W)), [normal(2, 8)], {}),
    "compiled": (mx.compile(lambda x: mx.exp(-x) * 2), [normal(3)], {}),
    "custom": (lambda x: double(x) + mx.checkpoint(mx.sin)(x), [normal(3)], {}),
    "random": (lambda key: mx.random.uniform(shape=(4,), key=key), [mx.random.key(3)], {}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_comes_back(name, tmp_path):
    fn, args, kwargs = FUNCTIONS[name]
    mx.export_function(tmp_path / "f.fn", fn, *args, **kwargs, metadata="made by a test")
    loaded, text = mx.import_function(tmp_path / "f.fn", return_metadata=True)
    want = mx.evaluate.arrays_of(fn(*args, **kwargs))
    for got in (loaded(*args, **kwargs), loaded(tuple(args), kwargs), loaded(list(args), kwargs)):
        assert isinstance(got, tuple) and text == "made by a test"
        for g, w in zip(got, want, strict=True):
            assert (g.dtype, g.shape) == (w.dtype, w.shape)
            np.testing.assert_allclose(np.array(g), np.array(w), rtol=1e-6)


def test_it_composes(tmp_path):
    mx.export_function(tmp_path / "f", lambda x: mx.sum(mx.square(mx.tanh(x @ W))), normal(8))
    loaded = mx.import_function(tmp_path / "f")
    x = rng.normal(size=(3, 8))
    t = np.tanh(x @ np.array(W, np.float64))
    want = (2 * t * (1 - t * t)) @ np.array(W, np.float64).T
    grad = mx.grad(lambda v: loaded(v)[0])
    np.testing.assert_allclose(mx.vmap(grad)(mx.array(x, mx.float32)), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mx.compile(grad)(mx.array(x[0], mx.float32)), want[0], rtol=1e-4, atol=1e-5)
    mx.export_function(tmp_path / "g", grad, normal(8))    # a function that was read is written again
    np.testing.assert_allclose(mx.import_function(tmp_path / "g")(mx.array(x[1], mx.float32))[0], want[1], rtol=1e-4,
                               atol=1e-5)


OPEN = {                             # name: function, examples, other shapes that it takes, shapes that it does not
    "rows": (lambda x: mx.tanh(x @ W), [(3, 8)], [[(1, 8)], [(7, 8)]], [[(3, 9)], [(3,)]]),
    "flattened": (lambda x: mx.reshape(x, (-1, 8)) @ W, [(2, 3, 8)], [[(5, 4, 8)], [(1, 1, 8)]], [[(2, 24)]]),
    "sums": (lambda x: mx.sum(x, 0) * x.shape[0] + x.shape[1] // 2, [(3, 4)], [[(5, 4)], [(2, 10)]], []),
    "tied": (lambda x, y: x + y, [(3, 4), (3, 4)], [[(6, 2), (6, 2)]], [[(3, 4), (5, 4)]]),
    "heads": (lambda x: mx.transpose(mx.reshape(x, (x.shape[0], x.shape[1], 2, -1)), (0, 2, 1, 3)) @ mx.ones((3, 2)),
              [(2, 5, 6)], [[(4, 1, 6)]], []),
    "softmax": (lambda x: mx.softmax(x, -1), [(3, 5)], [[(2, 9)]], []),
    "mean": (lambda x: x - mx.mean(x, 0), [(3, 5)], [[(2, 9)], [(1, 1)]], []),
    "multiples": (lambda x: mx.reshape(x, (-1, 8)) @ W, [(6, 8)], [[(3, 8)]], [[(3, 16)]]),
}


@pytest.mark.parametrize("name", OPEN)
def test_shapeless(name, tmp_path):
    fn, shapes, fits, others = OPEN[name]
    mx.export_function(tmp_path / "f", fn, *(normal(*s) for s in shapes), shapeless=True)
    loaded = mx.import_function(tmp_path / "f")
    for found in (shapes, *fits):
        args = [normal(*s) for s in found]
        np.testing.assert_allclose(loaded(*args)[0], fn(*args), rtol=1e-5, atol=1e-6)
    for found in others:
        with pytest.raises(ValueError, match=r"\[import_function\] .* (has no trace for \(|with {)"):
            loaded(*(normal(*s) for s in found))


def test_a_size_that_cannot_be_open(tmp_path):
    with pytest.raises(ValueError, match="no size can be open"):
        mx.export_function(tmp_path / "f", lambda x: x * float(np.sqrt(x.shape[0])), normal(6), shapeless=True)
    assert not list(tmp_path.iterdir())


def test_several_traces(tmp_path):
    with mx.exporter(tmp_path / "f", lambda *xs: sum(xs) + B) as add:
        for n in (1, 2, 3):
            add(*[normal(5)] * n)
    loaded = mx.import_function(tmp_path / "f")
    for n in (1, 2, 3):
        np.testing.assert_allclose(loaded(*[mx.ones((5,))] * n)[0], np.array(B) + n, rtol=1e-6)
    with safe_open(tmp_path / "f", "np") as file:          # others can read the constants, each there once
        assert [file.get_tensor(k).shape for k in list(file.keys())] == [(5,)]
    with pytest.raises(ValueError, match=r"for \(float32\(5,\), x=float32\(5,\)\); there are: \(float32\(5,\)\)"):
        loaded(mx.ones((5,)), x=mx.ones((5,)))
    with pytest.raises(TypeError, match="a float argument"):
        loaded(1.0)


def test_a_failure_keeps_the_old_file(tmp_path):
    mx.export_function(tmp_path / "f", mx.exp, normal(3))
    before = (tmp_path / "f").read_bytes()
    with pytest.raises(ZeroDivisionError), mx.exporter(tmp_path / "f", mx.sin) as add:
        add(normal(3))
        1 / 0  # noqa: B018
    assert (tmp_path / "f").read_bytes() == before


# damaged files

def written(tmp_path, change=None):
    """A file whose traces went through `change`."""
    mx.export_function(tmp_path / "f", lambda x: mx.sum(mx.tanh(x[1:] @ W).reshape(-1)[::2] * 2.0), normal(3, 8))
    arrays, metadata = safetensors.parse((tmp_path / "f").read_bytes(), "f")
    traces = json.loads(metadata["traces"])
    if change:
        change(traces[0])
        safetensors.save_safetensors(tmp_path / "g.safetensors", arrays, metadata | {"traces": json.dumps(traces)})
    return tmp_path / ("g.safetensors" if change else "f"), traces[0]


def node(trace, name):
    return next(n for n in trace["nodes"] if n[0] == name)


DAMAGE = {
    "unknown op": lambda t: node(t, "tanh").__setitem__(0, "system"),
    "missing op": lambda t: t["nodes"].pop(),
    "missing parameter": lambda t: node(t, "slice")[1].pop("start"),
    "unknown parameter": lambda t: node(t, "tanh")[1].update(x=1),
    "input that is not there": lambda t: node(t, "tanh").__setitem__(2, [99]),
    "inputs too many": lambda t: node(t, "tanh").__setitem__(2, [0, 0, 0]),
    "slice beyond the end": lambda t: node(t, "slice")[1].update(start=[900000, 0]),
    "slice before the start": lambda t: node(t, "slice")[1].update(start=[-5, 0]),
    "steps too long": lambda t: node(t, "slice")[1].update(step=[1 << 40, 1]),
    "reshape to more": lambda t: node(t, "reshape")[1].update(shape=[1 << 30]),
    "negative shape": lambda t: node(t, "reshape")[1].update(shape=[-3]),
    "no dtype": lambda t: t["inputs"].__setitem__(0, ["float33", [3, 8]]),
    "text for a shape": lambda t: t["inputs"].__setitem__(0, ["float32", "38"]),
    "other input shape": lambda t: t["inputs"].__setitem__(0, ["float32", [2, 4]]),
    "no constant": lambda t: t["constants"].__setitem__(0, "7"),
    "unknown value": lambda t: node(t, "reshape")[1].update(shape={"pickle": "os.system"}),
    "unknown size": lambda t: node(t, "reshape")[1].update(shape=[{"size": "n9"}]),
    "deep size": lambda t: node(t, "reshape")[1].update(shape=[{"size": ["//", 1, 0]}]),
    "no outputs": lambda t: t.pop("outputs"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_wrong_graph_is_refused(name, tmp_path):
    file, _ = written(tmp_path, DAMAGE[name])
    with pytest.raises(UserError, match=r"g.safetensors: traces: found \w+: .*wanted graphs of this version's op"):
        mx.import_function(file)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_change_of_a_byte_crashes(tmp_path, data):
    """Any bytes: an error of one sentence, or a function that stays in its memory."""
    content = bytearray(written(tmp_path)[0].read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))):]
    (tmp_path / "h").write_bytes(content)
    with contextlib.suppress(UserError, ValueError):
        mx.eval(mx.import_function(tmp_path / "h")(normal(3, 8)))


def test_another_file(tmp_path):
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"w": W})
    with pytest.raises(UserError, match="a.safetensors: format: found None, wanted lazulite.function.1"):
        mx.import_function(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        mx.import_function(tmp_path / "nothing")

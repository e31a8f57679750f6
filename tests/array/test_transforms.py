"""Transformations: known derivatives, MLX's conventions, compositions, containers, control flow, errors, own rules."""
import functools
import gc
import weakref

import mlx.core as mlx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazulite.engine import array as mx
from lazulite.engine.array.node import TRACING, Primitive, apply
from lazulite.engine.array.primitives import TABLE

rng = np.random.default_rng(0)


def close(got, wanted, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=tolerance, atol=tolerance)


def wide(*shape):
    return mx.array(rng.standard_normal(shape), mx.float64)


# derivatives

@pytest.mark.parametrize("fn, x, wanted", [
    (lambda x: x**3, 2.0, 12.0), (lambda x: mx.sin(x) * x, 0.5, np.sin(0.5) + 0.5 * np.cos(0.5)),
    (mx.grad(lambda x: x**3), 2.0, 12.0), (mx.grad(mx.grad(mx.sin)), 0.3, -np.cos(0.3)),
    (mx.grad(mx.grad(mx.grad(mx.exp))), 0.3, np.exp(0.3)), (lambda x: mx.stop_gradient(x) * x, 3.0, 3.0),
    (lambda x: x * mx.grad(lambda y: x * y * y)(x), 2.0, 24.0)])             # 2x³
def test_known_derivatives(fn, x, wanted):
    close(mx.grad(fn)(mx.array(x)), wanted)
    close(mx.jvp(fn, [mx.array(x)], [mx.array(1.0)])[1][0], wanted)
    close(mx.vmap(mx.grad(fn))(mx.array([x, x])), [wanted, wanted])
    close(mx.grad(mx.compile(fn))(mx.array(x)), wanted)
    close(mx.compile(mx.grad(fn))(mx.array(x)), wanted)
    close(mx.grad(mx.checkpoint(fn))(mx.array(x)), wanted)


CONVENTIONS = {
    "max": (lambda m, x: m.max(x), [1.0, 3, 3]), "min": (lambda m, x: m.min(x), [1.0, 1, 3]),
    "abs": (lambda m, x: m.abs(x).sum(), [0.0, -1, 1]), "maximum": (lambda m, x: m.maximum(x, 0.0).sum(), [0.0, 1, -1]),
    "maximum right": (lambda m, x: m.maximum(0.0, x).sum(), [0.0, 1, -1]),
    "minimum": (lambda m, x: m.minimum(x, 0.0).sum(), [0.0, 1, -1]),
    "minimum right": (lambda m, x: m.minimum(0.0, x).sum(), [0.0, 1, -1]),
    "relu": (lambda m, x: m.maximum(x, 0).sum(), [0.0, -0.0]),
    "clip": (lambda m, x: m.clip(x, 0.0, 1.0).sum(), [0.0, 1, 0.5, 2]),
    "prod": (lambda m, x: m.prod(x), [0.0, 2, 3]), "prod of zeros": (lambda m, x: m.prod(x), [0.0, 0, 3]),
    "power at 0": (lambda m, x: (x**2).sum(), [0.0, 1]), "sqrt at 0": (lambda m, x: m.sqrt(x).sum(), [0.0, 4]),
    "remainder": (lambda m, x: (5.3 % x).sum(), [2.0, 3]), "floor": (lambda m, x: m.floor(x).sum(), [1.5, 2]),
    "sign": (lambda m, x: m.sign(x).sum(), [1.5, 0]), "logaddexp": (lambda m, x: m.logaddexp(x, 0.0).sum(), [1.0, 0]),
    "a repeated index": (lambda m, x: x[m.array([0, 2, 2, -1])].sum(), [1.0, 2, 3])}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_ties_and_edges_are_mlx(name):
    fn, x = CONVENTIONS[name]
    ours = mx.grad(functools.partial(fn, mx))(mx.array(x))
    theirs = mlx.grad(functools.partial(fn, mlx))(mlx.array(x))
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_complex_gradients_are_mlx():
    z = np.array([3 + 4j, 1 - 2j], np.complex64)
    for fn in (lambda m, z: m.real(z * z).sum(), lambda m, z: m.abs(z).sum(), lambda m, z: m.imag(m.exp(z)).sum()):
        close(mx.grad(functools.partial(fn, mx))(mx.array(z)), mlx.grad(functools.partial(fn, mlx))(mlx.array(z)))


# arguments and results

def product(a, b, c=2.0):
    return a * b * c


@pytest.mark.parametrize("argnums, argnames, wanted", [
    (None, (), 15.0), (1, (), 10.0), ([1], (), 10.0), ((1, 0), (), (10.0, 15.0)), (None, "c", (None, {"c": 6.0})),
    (0, ["c"], (15.0, {"c": 6.0})), ((0, 1), ["c"], ((15.0, 10.0), {"c": 6.0}))])
def test_argnums_and_argnames(argnums, argnames, wanted):
    arrays = mx.array(2.0), mx.array(3.0)
    value, found = mx.value_and_grad(product, argnums, argnames)(*arrays, c=mx.array(5.0))
    assert value.item() == 30.0 and numbers(found) == wanted


def numbers(tree):
    if isinstance(tree, dict):
        return {k: numbers(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(numbers, tree))
    return tree.item() if isinstance(tree, mx.array) else tree


def test_containers():
    params = {"layers": [{"w": mx.array([1.0, 2.0])}, (mx.array(3.0), mx.array(7))], "empty": []}

    def loss(p, scale):
        return (p["layers"][0]["w"] * scale * p["layers"][1][0]).sum(), {"aux": p["layers"][0]["w"] * 2}, "text"

    (value, aux, text), grads = mx.value_and_grad(loss)(params, 10.0)
    assert value.item() == 90.0 and aux["aux"].tolist() == [2.0, 4.0] and text == "text"
    assert grads["layers"][0]["w"].tolist() == [30.0, 30.0] and grads["empty"] == []
    assert grads["layers"][1][0].item() == 30.0 and grads["layers"][1][1].dtype is mx.int32


def test_unused_arguments_have_zero_gradients():
    a, b = mx.grad(lambda a, b: a.sum(), (0, 1))(mx.ones(2), mx.ones((2, 3), mx.float16))
    assert a.tolist() == [1, 1] and b.shape == (2, 3) and b.dtype is mx.float16 and not b.any().item()


def test_vjp_and_jvp_take_lists():
    x, y = mx.array(2.0), mx.array([3.0, 4.0])
    outputs, gradients = mx.vjp(lambda a, b: (a * b, a + b), [x, y], [mx.array([1.0, 0.0]), mx.array([0.0, 1.0])])
    assert [v.tolist() for v in outputs + gradients] == [[6, 8], [5, 6], 4, [2, 1]]
    outputs, tangents = mx.jvp(lambda a, b: (a * b, a + b), [x, y], [mx.array(1.0), mx.array([0.0, 1.0])])
    assert [v.tolist() for v in tangents] == [[3, 6], [1, 2]]


ERRORS = [
    (lambda: mx.grad(lambda x: x)(mx.ones((2, 3))),
     r"\[grad\] the function returned float32\(2, 3\): a scalar float wanted"),
    (lambda: mx.grad(lambda x: x.astype(mx.int32).sum())(mx.ones(2)), r"\[grad\] .* int32\(\): a scalar float wanted"),
    (lambda: mx.grad(lambda x: 2.0)(mx.ones(2)), r"\[grad\] the function returned a float"),
    (lambda: mx.value_and_grad(lambda x: [x])(mx.ones(())), r"\[value_and_grad\] the function returned a list"),
    (lambda: mx.grad(lambda x: x)(), r"\[grad\] argument 0: 0 positional arguments were given"),
    (lambda: mx.grad(lambda x: x, argnames="y")(mx.ones(2)), r"\[grad\] argument 'y' was not given by name"),
    (lambda: mx.grad(lambda x: x, argnums=-1), r"\[grad\] argnums -1"),
    (lambda: mx.grad(lambda x: x, argnums=(0, 0)), r"\[grad\] argnums \(0, 0\)"),
    (lambda: mx.grad(lambda x: x)(mx.array([1, 2])), r"\[grad\] argument 0 is int32\(2,\): floats wanted"),
    (lambda: mx.grad(lambda x: x)({"a": {"b": "text"}}), r"\[grad\] argument 0.a.b is a str: arrays wanted"),
    (lambda: mx.grad(lambda x: mx.view(x, mx.float16).sum())(mx.ones(2)), r"\[grad\] view has no derivative"),
    (lambda: mx.vjp(lambda x: x, [mx.ones(2)], [mx.ones(3)]), r"\[vjp\] result 0 \(2,\), cotangent \(3,\)"),
    (lambda: mx.vjp(lambda x: x, [mx.ones(2)], []), r"\[vjp\] 1 results, 0 cotangents"),
    (lambda: mx.jvp(lambda x: x, [mx.ones(2)], [mx.ones(3)]), r"\[jvp\] primal 0 \(2,\), tangent \(3,\)"),
    (lambda: mx.vmap(lambda a, b: a)(mx.ones(2), mx.ones(3)),
     r"\[vmap\] mapped axes have sizes 2 of \(2,\), 3 of \(3,\)"),
    (lambda: mx.vmap(lambda a: a, in_axes=None)(mx.ones(2)), r"\[vmap\] in_axes maps no array"),
    (lambda: mx.vmap(lambda a: a, in_axes=1)(mx.ones(2)), r"\[vmap\] axis 1"),
    (lambda: mx.vmap(lambda a, b: a, in_axes=(0,))(mx.ones(2), mx.ones(2)),
     r"\[vmap\] \(0,\) does not have the structure"),
    (lambda: mx.vmap(lambda a: a, out_axes=None)(mx.ones(2)), r"\[vmap\] out axis None"),
    (lambda: mx.vmap(lambda a: a if a > 0 else -a)(mx.ones(2)), r"\[eval\] .*float32\(\) has no value"),
    (lambda: mx.jacobian(lambda x: x, mode="sideways"), r"\[jacobian\] mode 'sideways'")]


@pytest.mark.parametrize("call, message", ERRORS, ids=[m for _, m in ERRORS])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert TRACING.depth == 0


def test_integers_stop_gradients():
    x = mx.array([3.0, 1.0, 2.0])
    found = mx.grad(lambda x: (x[mx.argmax(x)] * mx.floor(x).astype(mx.int32).astype(mx.float32)).sum())(x)
    assert found.tolist() == [6.0, 0.0, 0.0]
    assert mx.jvp(lambda x: mx.argmax(x), [x], [x])[1][0].item() == 0


# values while tracing

def loops(x):
    while x.sum() < 100:                                   # evaluates, and the trace goes on
        x = x * x if x[0] > 2 else x * 3
    return x.sum()


def test_control_flow_by_values():
    x = np.array([1.5, 2.0])
    wanted = [(loops(x + d) - loops(x - d)) / 2e-4 for d in np.eye(2) * 1e-4]
    close(mx.grad(loops)(mx.array(x)), wanted, 1e-4)
    close(mx.grad(lambda x: x[0] * float(mx.sin(x)[1]))(mx.array([1.0, 2.0])), [np.sin(2.0), 0.0])


def test_a_value_read_while_tracing_is_a_constant_and_its_array_is_not():
    def fn(x):
        y = mx.sin(x)
        mx.eval(y)
        return y * y.item() + mx.transpose(mx.reshape(y, (1, 1))).sum()

    close(mx.grad(fn)(mx.array(0.5)), np.cos(0.5) * (np.sin(0.5) + 1))
    close(mx.grad(mx.grad(fn))(mx.array(0.5)), -np.sin(0.5) * (np.sin(0.5) + 1))


def test_updates_in_place_are_new_values():
    def fn(x):
        x[1:] = x[1:] * 3
        x += 1
        return (x * x).sum()

    x = mx.array([1.0, 2.0])
    assert mx.grad(fn)(x).tolist() == [4, 42] and x.tolist() == [1, 2]


def test_nothing_of_a_trace_remains():
    kept = []

    def fn(x):
        y = x * 2
        mx.eval(y)
        kept.extend([x, y])
        return (y * y).sum()

    x = mx.array([1.0, 2.0])
    ref = weakref.ref(x._value)
    assert mx.grad(fn)(x).tolist() == [8, 16]
    assert kept[0]._value is x._value and kept[1]._value.trace is None and kept[1]._value.node is None
    del x
    kept.clear()
    gc.collect()
    assert ref() is None


def test_a_deep_graph_needs_no_recursion():
    def fn(x):
        for _ in range(1500):
            x = x + 0.001 * x
        return x

    x = mx.array(1.0, mx.float64)
    gradient, tangent, batch = mx.grad(fn), mx.jvp(fn, [x], [x])[1][0], mx.vmap(fn)(mx.ones(2, mx.float64))
    assert all(a.dtype is mx.float64 for a in (gradient(x), tangent, batch))


def test_slices_of_one_array_add_in_place():
    x = mx.array(rng.standard_normal((64, 8)), mx.float32)
    placeholder = mx.placeholder((64, 8), mx.float32)
    gradient = mx.grad(lambda x: sum((row * i).sum() for i, row in enumerate(x)))(placeholder)
    plan = mx.lower([gradient], [placeholder])
    assert max(step.outputs[0].storage.nbytes for step in plan.steps if step.outputs) == x.nbytes
    full = [s for s in plan.steps if s.outputs[0].shape in ((64, 8), (512,))]
    assert len(full) <= 2                                  # zeros, and not one array for each row


# batches

def test_axes():
    x, y = wide(2, 3, 4), wide(4, 5, 2)
    found = mx.vmap(lambda a, b: (a @ b, b.sum()), in_axes=(0, -1), out_axes=(1, 0))(x, y)
    close(found[0], np.stack([np.asarray(x)[i] @ np.asarray(y)[..., i] for i in range(2)], 1))
    close(found[1], np.asarray(y).sum((0, 1)))


def test_axes_of_trees():
    tree = {"a": mx.array([[1.0, 2.0], [3.0, 4.0]]), "b": [mx.array([10.0, 20.0]), mx.array(5.0)]}
    fn = lambda t, s: {"sum": t["a"] + t["b"][0] * s, "same": t["b"][1]}  # noqa: E731
    axes = ({"a": 1, "b": [0, None]}, None)
    found = mx.vmap(fn, axes, {"sum": 1, "same": None})(tree, mx.array(2.0))
    assert found["sum"].tolist() == [[21.0, 42.0], [23.0, 44.0]] and found["same"].item() == 5.0
    assert mx.vmap(lambda t: t["a"] * t["b"][1], {"a": 0, "b": None})(tree).tolist() == [[5, 10], [15, 20]]
    assert mx.vmap(lambda x: mx.array(3.0))(mx.ones(2)).tolist() == [3, 3]


def test_nested_batches():
    x, y = wide(3, 4), wide(5, 4)
    outer = mx.vmap(lambda a: mx.vmap(lambda b: (a * b).sum())(y))(x)
    close(outer, np.asarray(x) @ np.asarray(y).T)
    pairs = mx.vmap(mx.vmap(mx.subtract, (None, 0)), (0, None))(x[:, 0], y[:, 0])
    close(pairs, np.subtract.outer(np.asarray(x[:, 0]), np.asarray(y[:, 0])))


def test_an_op_without_a_rule_is_done_one_by_one():
    one = Primitive("same", lambda x: [(x.shape, x.dtype)], definition=None, lower=TABLE["stop_gradient"].lower)
    found = mx.vmap(lambda x: mx.Array.of(apply(one, x._value)[0]) * 2, 1)(mx.array([[1.0, 2.0], [3.0, 4.0]]))
    assert found.tolist() == [[2, 6], [4, 8]]


# compositions

def mlp(params, x):
    for w, b in params:
        x = mx.tanh(x @ w + b)
    return x.sum()


def test_per_example_gradients():
    params = [(wide(3, 5), wide(5)), (wide(5, 2), wide(2))]
    xs = wide(4, 3)
    batched = mx.vmap(mx.grad(mlp), (None, 0))(params, xs)
    for i in range(4):
        for (w, b), (gw, gb) in zip(batched, mx.grad(mlp)(params, xs[i]), strict=True):
            close(w[i], gw)
            close(b[i], gb)
    whole = mx.grad(lambda p: mx.vmap(mlp, (None, 0))(p, xs).sum())(params)
    for (w, b), (gw, gb) in zip(batched, whole, strict=True):
        close(w.sum(0), gw)
        close(b.sum(0), gb)


def test_hessian_vector_products():
    a, v, x = wide(4, 4), wide(4), wide(4)
    fn = lambda x: mx.exp(mx.sin(x) @ (a @ x))  # noqa: E731
    full = mx.hessian(fn)(x)
    forward = mx.jvp(mx.grad(fn), [x], [v])[1][0]
    backward = mx.grad(lambda x: (mx.grad(fn)(x) * v).sum())(x)
    close(forward, np.asarray(full) @ np.asarray(v))
    close(backward, forward)
    close(full, np.asarray(full).T)
    close(mx.vmap(mx.hessian(fn))(mx.stack([x, 2 * x]))[0], full)


def test_products_with_zeros_have_second_derivatives():
    close(mx.hessian(mx.prod)(mx.array([0.0, 2.0, 3.0])), [[0, 3, 2], [3, 0, 0], [2, 0, 0]])
    close(mx.hessian(mx.prod)(mx.array([0.0, 0.0, 3.0])), [[0, 3, 0], [3, 0, 0], [0, 0, 0]])


def test_hessian_of_a_quadratic():
    a = wide(3, 3)
    close(mx.hessian(lambda x: x @ (a @ x))(wide(3)), np.asarray(a) + np.asarray(a).T)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_jacobian(mode):
    a, x = wide(2, 3, 4), wide(4)
    close(mx.jacobian(lambda s, x: s * (a @ mx.sin(x)), 1, mode)(2.0, x), 2 * np.asarray(a) * np.cos(np.asarray(x)))


def test_state_that_a_function_changes():
    """A model's arrays hold the arguments while a gradient is traced, as nn.value_and_grad does it."""
    model = {"w": mx.array(3.0), "count": mx.array(0)}

    def loss(w, x):
        model["w"] = w
        model["count"] = model["count"] + 1
        return w * w * x

    for step in (1, 2):
        assert mx.grad(loss)(model["w"], mx.array(5.0)).item() == 30.0
        assert model["w"].item() == 3.0 and model["count"].item() == step


def test_gradients_of_lazy_arguments():
    x = mx.array([1.0, 2.0]) * 3
    assert mx.grad(lambda x: (x * x).sum())(x).tolist() == [6, 12] and x.tolist() == [3, 6]
    x = mx.array([1.0, 2.0]) * 3
    assert mx.grad(lambda x: (x * x if x.sum() > 0 else x).sum())(x).tolist() == [6, 12]
    assert mx.grad(lambda x: mx.grad(lambda y: (x * y if y.sum() > 0 else y).sum())(x * 1).sum())(x).tolist() == [1, 1]


# own rules

def test_custom_function():
    @mx.custom_function
    def fn(x, y):
        """The same."""
        return mx.sin(x) * y, {"sum": x + y}

    seen = []

    @fn.vjp
    def fn_vjp(primals, cotangents, outputs):
        seen.append("vjp")
        x, y = primals
        assert outputs[1]["sum"].shape == x.shape
        return cotangents[0] * 10, cotangents[1]["sum"] * y

    @fn.jvp
    def fn_jvp(primals, tangents):
        seen.append("jvp")
        assert tangents[1] is None
        return tangents[0] * 7, {"sum": tangents[0]}

    @fn.vmap
    def fn_vmap(inputs, axes):
        seen.append("vmap")
        assert axes == (0, None)
        return (inputs[0] * 100, {"sum": inputs[1]}), (0, {"sum": None})

    x, y = mx.array(0.5), mx.array(2.0)
    close(fn(x, y)[0], 2 * np.sin(0.5))
    assert seen == [] and fn.__doc__ == "The same."
    assert [g.item() for g in mx.grad(lambda x, y: fn(x, y)[0] + fn(x, y)[1]["sum"], (0, 1))(x, y)] == [10.0, 2.0]
    assert [t.item() for t in mx.jvp(lambda x: fn(x, y), [x], [mx.array(1.0)])[1]] == [7.0, 1.0]
    assert mx.vmap(lambda x: fn(x, y))(mx.array([1.0, 2.0]))[0].tolist() == [100, 200]
    assert seen == ["vjp", "vjp", "jvp", "vmap"]
    close(mx.compile(mx.grad(lambda x: fn(x, y)[0]))(x), 10.0)


def test_custom_function_with_one_rule():
    captured = mx.array(4.0)

    @mx.custom_function
    def half(x):
        return x * captured

    @half.vjp
    def half_vjp(x, cotangent, output):
        return cotangent * x * x

    x = mx.array(3.0)
    assert mx.grad(half)(x).item() == 9.0
    assert mx.grad(mx.grad(half))(x).item() == 6.0                           # of the rule
    assert mx.jvp(half, [x], [mx.array(2.0)])[1][0].item() == 18.0           # by the rule, transposed
    assert mx.vmap(half)(mx.array([1.0, 2.0])).tolist() == [4, 8]            # by the definition
    assert mx.vmap(mx.grad(half))(mx.array([1.0, 2.0])).tolist() == [1, 4]
    assert mx.grad(lambda x: mx.vmap(half)(x).sum())(mx.array([1.0, 2.0])).tolist() == [4, 4]
    assert half(x).item() == 12.0


def test_custom_function_with_a_cotangent_of_another_shape():
    fn = mx.custom_function(lambda x: x.sum())
    fn.vjp(lambda x, cotangent, output: cotangent)
    with pytest.raises(ValueError, match=r"cotangent 0 of the vjp has shape \(\), its argument \(2,\)"):
        mx.grad(fn)(mx.ones(2))


def test_custom_function_without_rules_is_its_definition():
    fn = mx.custom_function(lambda x: mx.sin(x) * 2)
    close(mx.grad(fn)(mx.array(0.3)), 2 * np.cos(0.3))
    close(mx.jvp(fn, [mx.array(0.3)], [mx.array(1.0)])[1][0], 2 * np.cos(0.3))
    close(mx.vmap(mx.grad(mx.grad(fn)))(mx.array([0.3])), [-2 * np.sin(0.3)])


def test_checkpoint_computes_again_and_keeps_less():
    def block(x, w):
        return mx.tanh(mx.sin(mx.tanh(x @ w)) @ w)

    def gradients(fn, x, *weights):
        for w in weights:
            x = fn(x, w)
        return x.sum()

    def plan(fn):
        x, *weights = inputs = [mx.placeholder(s, mx.float32) for s in [(512, 16)] + 8 * [(16, 16)]]
        plan = mx.lower(mx.grad(functools.partial(gradients, fn), range(1, 9))(x, *weights), inputs)
        return sum(step.kernel in ("matmul", "linear") for step in plan.steps), plan.arena

    plain, again = plan(block), plan(mx.checkpoint(block))
    assert plain[0] == 8 * 6 - 1 and again[0] >= plain[0] + 8 and again[1] < 0.5 * plain[1]


def test_checkpoint_of_what_a_function_captures():
    w, x = wide(3, 3), wide(3)

    def fn(w, wrap=mx.checkpoint, vmap=lambda fn: fn):
        return vmap(wrap(lambda x: mx.sin(w @ x)))(x).sum()

    plain = functools.partial(fn, wrap=lambda fn: fn)
    close(mx.grad(fn)(w), mx.grad(plain)(w))
    close(mx.jacobian(mx.grad(fn))(w), mx.jacobian(mx.grad(plain))(w))
    close(mx.grad(fn)(w, vmap=lambda fn: lambda x: mx.vmap(fn)(mx.stack([x, x]))), 2 * mx.grad(plain)(w))


# random compositions on random graphs: vectors to vectors

W, INDEX = np.random.default_rng(1).standard_normal((3, 3)) / 2, [2, 0, 0]
STEPS = {
    "sin": lambda m, a, b: m.sin(a), "tanh": lambda m, a, b: m.tanh(a + b), "product": lambda m, a, b: a * b,
    "square": lambda m, a, b: m.square(m.cos(b)),
    "quotient": lambda m, a, b: a / (1 + b * b), "difference": lambda m, a, b: a - 0.5 * b,
    "matmul": lambda m, a, b: constant(m, W) @ m.sin(a), "roll": lambda m, a, b: m.concatenate([a[1:], b[:1]]),
    "flip": lambda m, a, b: a[::-1] * b, "take": lambda m, a, b: m.take(a, constant(m, INDEX), 0) + b,
    "sum": lambda m, a, b: m.tanh(m.sum(a)) * b, "outer": lambda m, a, b: m.sum(m.sin(a[:, None] * b[None]), 1),
    "where": lambda m, a, b: m.where(a > b, m.sin(a), b), "maximum": lambda m, a, b: m.maximum(m.sin(a), 0.3 * b),
    "max": lambda m, a, b: a * m.tanh(m.max(b)), "logsumexp": lambda m, a, b: m.log(m.sum(m.exp(m.sin(a)))) - b}


def constant(m, x):
    return m.array(x, mx.float64 if isinstance(x, np.ndarray) else mx.int32) if m is mx else np.array(x)


def program(steps, m):
    """Each step reads two of the values so far."""
    def fn(x):
        values = [x]
        for name, i, j in steps:
            values.append(STEPS[name](m, values[-1 - i % len(values)], values[-1 - j % len(values)]))
        return values[-1]

    return fn


V = np.array([0.7, -0.4, 0.2])


def slope(fn, x, v, h=1e-6):
    return (np.asarray(fn(mx.array(x + h * v, mx.float64))) - np.asarray(fn(mx.array(x - h * v, mx.float64)))) / (2 * h)


# name: (the transformed function, what it is by definition at x: a loop, finite differences)
TRANSFORMS = {
    "compile": (mx.compile, lambda fn, x: fn(mx.array(x, mx.float64))),
    "checkpoint": (mx.checkpoint, lambda fn, x: fn(mx.array(x, mx.float64))),
    "grad": (lambda fn: mx.grad(lambda x: fn(x) @ mx.array(V, mx.float64)),
             lambda fn, x: [slope(fn, x, e) @ V for e in np.eye(3)]),
    "jvp": (lambda fn: lambda x: mx.jvp(fn, [x], [mx.array(V, mx.float64)])[1][0], lambda fn, x: slope(fn, x, V)),
    "vmap": (lambda fn: lambda x: mx.vmap(fn, 1, 1)(mx.stack([x, 2 * x], 1))[:, 1] - fn(x),
             lambda fn, x: np.asarray(fn(mx.array(2 * x, mx.float64))) - np.asarray(fn(mx.array(x, mx.float64))))}
places = st.integers(0, 3)
programs = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), places, places), min_size=1, max_size=5)
compositions = st.lists(st.sampled_from(sorted(TRANSFORMS)), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(programs, compositions, st.integers(0, 1000))
def test_compositions_agree_with_their_definitions(steps, names, seed):
    """Each transformation of the composition is held against its definition on what is inside it."""
    x = np.random.default_rng(seed).standard_normal(3)
    fn = program(steps, mx)
    close(fn(mx.array(x, mx.float64)), program(steps, np)(x), 1e-9)
    for name in names:
        transform, definition = TRANSFORMS[name]
        inner, fn = fn, transform(fn)
        wanted = np.asarray(definition(inner, x))
        if np.all(np.abs(wanted) < 1e4):
            close(fn(mx.array(x, mx.float64)), wanted, 2e-5)

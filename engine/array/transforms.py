"""Function transformations with MLX's names. Each one traces a function and interprets the graph between its arguments
and its results with the rules of the primitives' rows; what it makes is a graph again, so that all of them compose."""
from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from . import ops
from .array import Array
from .containers import arrays_of, items_of, rebuild, structure_of
from .dtypes import bool_
from .node import TRACING, Aval, Node, Primitive, Value, apply, postorder, show
from .operands import array_of, axis_of
from .primitives import TABLE, make, row, total
from .trees import tree_flatten

__all__ = ["checkpoint", "custom_function", "depends", "grad", "hessian", "jacobian", "jvp", "stop_gradient",
           "value_and_grad", "vjp", "vmap"]
Function = Callable[..., Any]
Maybe = list[Array | None]


# tracing

class Graph:
    """What a function made of `tracers`: its results and, in order, the nodes on the way with the inputs they had when
    traced (a node's own `inputs` are the arguments again once tracing is over)."""

    def __init__(self, tracers: list[Value], outputs: list[Value]):
        self.tracers, self.outputs = tracers, outputs
        live = set(tracers)
        self.steps: list[tuple[Node, tuple[Value, ...]]] = []
        evaluated = postorder(outputs, lambda v: None if v in live else v.node or v.trace)  # while tracing, too
        for node in evaluated:
            if not live.isdisjoint(node.inputs):
                self.steps.append((node, node.inputs))
                live.update(v for ref in node.results if (v := ref()) is not None)
        self.live = live


def _argument(value: Value) -> Value:
    """The value once more, so that a transformation can tell its arguments from all else; a leaf stays a leaf."""
    node = Node(TABLE["argument"], (value,), {})
    tracer = Value(value.shape, value.dtype, node)
    node.results = [weakref.ref(tracer)]
    if value.buffer is not None:
        tracer.fill(value.buffer, value.offset, value.strides)
    return tracer


def trace(fn: Function, arguments: Sequence[Array]) -> tuple[Graph, Any]:
    """The graph and the result of fn(*arguments). What it computes on the way can be evaluated (for `if` and `while`).
    In the end the arguments take the tracers' place again."""
    with TRACING:
        tracers = [_argument(a._value) for a in arguments]
        handles = [Array.of(t) for t in tracers]
        result = fn(*handles)
        graph = Graph(tracers, [a._value for a in arrays_of(result)])
    given = dict(zip(tracers, (a._value for a in arguments), strict=True))
    for node, _ in graph.steps:
        node.inputs = tuple(given.get(v, v) for v in node.inputs)
    for handle in (*handles, *arrays_of(result)):
        handle._value = given.get(handle._value, handle._value)
    return graph, result


# gradients: backwards through the graph

def pull(graph: Graph, cotangents: Maybe) -> Maybe:
    """Cotangents of the tracers from those of the outputs; None is zero."""
    found: dict[Value, Array] = {}

    def add(value: Value, ct: Any) -> None:
        if ct is not None and value in graph.live and value.dtype.inexact:
            before = found.get(value)
            new = ct(before) if callable(ct) else total([before, ct])
            if new is not None:
                found[value] = new if new.dtype is value.dtype else ops.astype(new, value.dtype)

    for value, ct in zip(graph.outputs, cotangents, strict=True):
        add(value, ct)
    for node, inputs in reversed(graph.steps):
        results = node.values()
        cts = [found.pop(v, None) for v in results]
        if any(ct is not None for ct in cts):
            for value, ct in zip(inputs, _pull_node(node, cts, results), strict=True):
                add(value, ct)
    return [found.get(t) for t in graph.tracers]


def _pull_node(node: Node, cts: Maybe, results: list[Value]) -> Maybe:
    primitive, xs = node.primitive, [Array.of(v) for v in node.inputs]
    if primitive.vjp:
        filled = [ops.zeros(v.shape, v.dtype) if ct is None else ct for ct, v in zip(cts, results, strict=True)]
        return primitive.vjp(filled, xs, [Array.of(v) for v in results], **node.params)
    if primitive.definition:
        return pull_through(_definition(node), xs, cts)
    if any(x.dtype.inexact for x in xs):
        raise ValueError(f"[grad] {primitive.name} has no derivative")
    return [None] * len(xs)


def pull_through(fn: Function, xs: list[Array], cts: Maybe) -> Maybe:
    return pull(trace(fn, xs)[0], cts)


def _definition(node: Node) -> Function:
    assert node.primitive.definition is not None
    return functools.partial(node.primitive.definition, **node.params)


# tangents: forwards through the graph

def push(graph: Graph, tangents: Maybe) -> Maybe:
    """Tangents of the outputs from those of the tracers; None is zero."""
    found = {v: t for v, t in zip(graph.tracers, tangents, strict=True) if t is not None}
    for node, inputs in graph.steps:
        ts = [found.get(v) for v in inputs]
        results = node.values()
        if any(t is not None for t in ts) and any(v.dtype.inexact for v in results):
            for value, t in zip(results, _push_node(node, ts, results), strict=True):
                if t is not None and value.dtype.inexact:
                    found[value] = ops.astype(t, value.dtype)
    return [found.get(v) for v in graph.outputs]


def _push_node(node: Node, ts: Maybe, results: list[Value]) -> Maybe:
    primitive, xs = node.primitive, [Array.of(v) for v in node.inputs]
    ys = [Array.of(v) for v in results]
    if primitive.jvp:
        return primitive.jvp(ts, xs, ys, **node.params)
    if primitive.vjp:
        return push_by_pull(functools.partial(primitive.vjp, **node.params), ts, xs, ys)
    if primitive.definition:
        return push(trace(_definition(node), xs)[0], ts)
    raise ValueError(f"[jvp] {primitive.name} has no derivative")


def push_by_pull(rule: Function, ts: Maybe, xs: list[Array], ys: list[Array]) -> Maybe:
    """A vjp rule is linear in the cotangents, so that its own vjp is the jvp."""
    def back(*cts: Array) -> list[Array]:
        gradients = [g(None) if callable(g) and t is not None else g
                     for g, t in zip(rule(list(cts), xs, ys), ts, strict=True)]
        return [_or_zeros(g, x) for g, x, t in zip(gradients, xs, ts, strict=True) if t is not None]

    return pull(trace(back, [ops.zeros_like(y) for y in ys])[0], [t for t in ts if t is not None])


def _or_zeros(a: Array | None, like: Array) -> Array:
    return ops.zeros_like(like) if a is None else a


# batches

def batch(graph: Graph, inputs: list[Array]) -> list[tuple[Array, bool]]:
    """The outputs when the tracers are batches, their axis in front; False: no batch, the same for all."""
    found = dict(zip(graph.tracers, inputs, strict=True))
    for node, values in graph.steps:
        xs = [found[v] if v in found else Array.of(v) for v in values]
        for value, y in zip(node.values(), _batch_node(node, xs, [v in found for v in values]), strict=True):
            found[value] = y
    return [(found[v] if v in found else Array.of(v), v in found) for v in graph.outputs]


def _batch_node(node: Node, xs: list[Array], batched: list[bool]) -> list[Array]:
    primitive = node.primitive
    if primitive.vmap:
        return primitive.vmap(xs, batched, **node.params)
    if primitive.definition:
        return _batched(_definition(node), xs, batched)
    rows = [apply(primitive, *((x[i] if b else x)._value for x, b in zip(xs, batched, strict=True)), **node.params)
            for i in range(_size(xs, batched))]            # no rule: one by one
    return [ops.stack([Array.of(v) for v in column]) for column in zip(*rows, strict=True)]


def _batched(fn: Function, xs: list[Array], batched: list[bool]) -> list[Array]:
    """The arrays of fn's result with the batch in front."""
    return [y if many else _repeated(y, _size(xs, batched)) for y, many in trace_batch(fn, xs, batched)[0]]


def _size(xs: list[Array], batched: list[bool]) -> int:
    return next(x.shape[0] for x, b in zip(xs, batched, strict=True) if b)


def _repeated(x: Array, size: int) -> Array:
    return ops.broadcast_to(x, (size, *x.shape))


def trace_batch(fn: Function, xs: list[Array], batched: list[bool]) -> tuple[list[tuple[Array, bool]], Any]:
    """What `batch` makes of fn, and fn's result for one element, whose values are not known."""
    with TRACING:
        handles = [Array.of(Value(x.shape[1:], x.dtype)) if b else x for x, b in zip(xs, batched, strict=True)]
        tracers = [h._value for h, b in zip(handles, batched, strict=True) if b]
        result = fn(*handles)
        graph = Graph(tracers, [a._value for a in arrays_of(result)])
    return batch(graph, [x for x, b in zip(xs, batched, strict=True) if b]), result


# trees

def _aligned(name: str, prefix: Any, tree: Any) -> list[Any]:
    """For each array in the tree what `prefix` has in its place; what is no container there holds for all below."""
    if isinstance(tree, Array):
        return [prefix]
    if not isinstance(prefix, dict | list | tuple):
        return [prefix for _ in arrays_of(tree)]
    if not isinstance(tree, dict | list | tuple) or len(prefix) != len(tree):
        raise ValueError(f"[{name}] {prefix!r} does not have the structure of what it is for")
    return [leaf for key, branch in items_of(tree) for leaf in _aligned(name, prefix[key], branch)]


# the public functions

def _loss(name: str, result: Any) -> Array:
    loss = result[0] if isinstance(result, tuple) and result else result
    if not isinstance(loss, Array):
        raise ValueError(f"[{name}] the function returned a {type(loss).__name__}: a scalar array, or a tuple that "
                         "begins with one, wanted")
    if loss.shape or not loss.dtype.inexact:
        raise ValueError(f"[{name}] the function returned {loss.dtype}{show(loss.shape)}: a scalar float wanted")
    return loss


def _checked(name: str, where: str, tree: Any) -> Iterator[Array]:
    for path, leaf in tree_flatten(tree):
        at = f"{where}{'.' if path else ''}{path}"
        if not isinstance(leaf, Array):
            raise ValueError(f"[{name}] {at} is a {type(leaf).__name__}: arrays wanted")
        if leaf is tree and not leaf.dtype.inexact:
            raise ValueError(f"[{name}] {at} is {leaf.dtype}{show(leaf.shape)}: floats wanted")
        yield leaf


def _positions(name: str, argnums: int | Sequence[int] | None, names: list[str]) -> list[int]:
    positions = [] if argnums is None and names else [0] if argnums is None else _listed(argnums)
    if any(i < 0 for i in positions) or len(set(positions)) < len(positions):
        raise ValueError(f"[{name}] argnums {argnums}: different numbers of at least 0 wanted")
    return positions


def _listed(one_or_more: Any) -> list[Any]:
    return [one_or_more] if isinstance(one_or_more, int | str | Array) else list(one_or_more)


def value_and_grad(fun: Function, argnums: int | Sequence[int] | None = None,
                   argnames: str | Sequence[str] = ()) -> Function:
    """A function that returns fun's result and the gradients of the scalar that is the result, or its first element,
    with respect to the given arguments (the first one by default): trees of arrays of the arguments' structure. Several
    argnums give a tuple; with argnames there is a pair: that, and a dict."""
    return _value_and_grad("value_and_grad", fun, argnums, argnames)


def _value_and_grad(name: str, fun: Function, argnums: int | Sequence[int] | None,
                    argnames: str | Sequence[str]) -> Function:
    names = _listed(argnames)
    positions = _positions(name, argnums, names)

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if positions and max(positions) >= len(args):
            raise ValueError(f"[{name}] argument {max(positions)}: {len(args)} positional arguments were given")
        if missing := [n for n in names if n not in kwargs]:
            raise ValueError(f"[{name}] argument {missing[0]!r} was not given by name")
        chosen: dict[Any, Any] = {i: args[i] for i in positions} | {n: kwargs[n] for n in names}
        arrays = [a for key, tree in chosen.items() for a in _checked(name, f"argument {key}", tree)]

        def flat(*leaves: Array) -> Any:
            new = rebuild(chosen, iter(leaves))
            return fun(*(new.get(i, a) for i, a in enumerate(args)), **{k: new.get(k, v) for k, v in kwargs.items()})

        graph, result = trace(flat, arrays)
        cts = [ops.ones_like(_loss(name, result)), *[None] * (len(graph.outputs) - 1)]
        found = (_or_zeros(ct, a) for ct, a in zip(pull(graph, cts), arrays, strict=True))
        grads = rebuild(chosen, iter(found))
        by_position = tuple(grads[i] for i in positions)
        first = by_position if len(positions) > 1 else by_position[0] if positions else None
        return result, (first, {n: grads[n] for n in names}) if names else first

    return wrapped


def grad(fun: Function, argnums: int | Sequence[int] | None = None, argnames: str | Sequence[str] = ()) -> Function:
    """The second result of `value_and_grad`."""
    both = _value_and_grad("grad", fun, argnums, argnames)
    return functools.wraps(fun)(lambda *args, **kwargs: both(*args, **kwargs)[1])


def vjp(fun: Function, primals: Sequence[Array], cotangents: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """fun's arrays, and the cotangents of the primals for those of the results: one for each, of its shape."""
    graph, result = trace(fun, list(_checked("vjp", "primals", list(primals))))
    outputs = list(arrays_of(result))
    _same_shapes("vjp", "result", "cotangent", outputs, cotangents)
    return outputs, [_or_zeros(g, x) for g, x in zip(pull(graph, list(cotangents)), primals, strict=True)]


def jvp(fun: Function, primals: Sequence[Array], tangents: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """fun's arrays, and the derivatives of the results along the tangents: one for each primal, of its shape."""
    _same_shapes("jvp", "primal", "tangent", primals, tangents)
    graph, result = trace(fun, list(_checked("jvp", "primals", list(primals))))
    outputs = list(arrays_of(result))
    return outputs, [_or_zeros(t, y) for t, y in zip(push(graph, list(tangents)), outputs, strict=True)]


def _same_shapes(name: str, one: str, other: str, xs: Sequence[Array], ys: Sequence[Array]) -> None:
    if len(xs) != len(ys):
        raise ValueError(f"[{name}] {len(xs)} {one}s, {len(ys)} {other}s: as many wanted")
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if x.shape != y.shape:
            raise ValueError(f"[{name}] {one} {i} {show(x.shape)}, {other} {show(y.shape)}: the same shape wanted")


def vmap(fun: Function, in_axes: Any = 0, out_axes: Any = 0) -> Function:
    """fun over a new axis of its arguments: in_axes says where it is, None where there is none; out_axes where it goes
    in the results. Each is one axis for all or a tree whose entries hold for whatever is below."""
    @functools.wraps(fun)
    def wrapped(*args: Any) -> Any:
        arrays = list(arrays_of(args))
        xs, batched = _in_front(arrays, _aligned("vmap", _per_argument(in_axes, args), args))
        outputs, result = trace_batch(lambda *leaves: fun(*rebuild(args, iter(leaves))), xs, batched)
        axes, size = _aligned("vmap", out_axes, result), _size(xs, batched)
        return rebuild(result, iter([_placed(*o, axis, size) for o, axis in zip(outputs, axes, strict=True)]))

    return wrapped


def _per_argument(in_axes: Any, args: tuple[Any, ...]) -> Any:
    """As in MLX, one argument may have its axes without a tuple around them."""
    whole = isinstance(in_axes, dict) or isinstance(in_axes, list | tuple) and len(in_axes) != len(args)
    return (in_axes,) if whole and len(args) == 1 else in_axes


def _in_front(arrays: list[Array], axes: list[int | None]) -> tuple[list[Array], list[bool]]:
    sizes = {}
    for a, axis in zip(arrays, axes, strict=True):
        if axis is not None:
            sizes[int(a.shape[axis_of("vmap", axis, a.ndim)])] = a
    if len(sizes) != 1:
        listed = ", ".join(f"{n} of {show(a.shape)}" for n, a in sizes.items())
        raise ValueError(f"[vmap] mapped axes have sizes {listed}: one size wanted" if sizes else
                         "[vmap] in_axes maps no array: at least one wanted")
    xs = [a if axis is None else ops.moveaxis(a, axis, 0) for a, axis in zip(arrays, axes, strict=True)]
    return xs, [axis is not None for axis in axes]


def _placed(y: Array, many: bool, axis: int | None, size: int) -> Array:
    if axis is not None:
        return ops.moveaxis(y if many else _repeated(y, size), 0, axis)
    if many:
        raise ValueError(f"[vmap] out axis None for a result {show(y.shape[1:])} that differs between elements")
    return y


def jacobian(fun: Function, argnum: int = 0, mode: str = "reverse") -> Function:
    """The derivatives of fun's array with respect to one argument: result's axes, then argument's. mode "reverse" makes
    a pass for each element of the result, "forward" for each of the argument, all at once by `vmap`."""
    if mode not in ("reverse", "forward"):
        raise ValueError(f"[jacobian] mode {mode!r}: 'reverse' or 'forward' wanted")

    @functools.wraps(fun)
    def wrapped(*args: Any) -> Array:
        x = next(_checked("jacobian", f"argument {argnum}", args[argnum]))
        graph, y = trace(lambda a: fun(*args[:argnum], a, *args[argnum + 1:]), [x])
        if not isinstance(y, Array):
            raise ValueError(f"[jacobian] the function returned a {type(y).__name__}: an array wanted")
        shape = (*y.shape, *x.shape)
        if mode == "reverse":
            rows = vmap(lambda ct: _or_zeros(pull(graph, [ct])[0], x))(_basis(y))
            return ops.reshape(rows, shape)
        columns = vmap(lambda t: _or_zeros(push(graph, [t])[0], y))(_basis(x))
        return ops.reshape(ops.moveaxis(columns, 0, -1), shape)

    return wrapped


def _basis(a: Array) -> Array:
    """The unit arrays of a's shape."""
    return ops.reshape(ops.eye(a.size, dtype=a.dtype), (a.size, *a.shape))


def hessian(fun: Function, argnum: int = 0) -> Function:
    """The second derivatives of a scalar function with respect to one array: its axes twice."""
    return jacobian(grad(fun, argnum), argnum, "forward")


def stop_gradient(a: Array) -> Array:
    """The array itself, as a constant to gradients."""
    return make("stop_gradient", array_of(a)) if TRACING.depth else Array.of(a._value)


def depends(inputs: Any, dependencies: Any) -> Any:
    """The inputs (an array or a sequence of them), not used before the dependencies are computed."""
    after = _listed(dependencies)
    made = [make("depends", a, *after) for a in _listed(inputs)]
    return made[0] if isinstance(inputs, Array) else made


# functions that appear in the graph as one node

@dataclass(frozen=True)
class Program:
    """A traced graph without its values, which it would keep in memory: for each step the primitive, its parameters,
    where among inputs and earlier results its inputs are, and how many results it has."""

    steps: tuple[tuple[Primitive, tuple[tuple[str, Any], ...], tuple[int, ...], int], ...]
    outputs: tuple[int, ...]
    avals: tuple[Aval, ...]

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        values = [a._value for a in inputs]
        for primitive, params, places, _ in self.steps:
            values += apply(primitive, *(values[i] for i in places), **dict(params))
        return tuple(Array.of(values[i]) for i in self.outputs)


def _program(graph: Graph) -> tuple[Program, list[Value]]:
    """The program of a graph, and the values besides the tracers that it reads."""
    read = dict.fromkeys(v for _, inputs in graph.steps for v in inputs) | dict.fromkeys(graph.outputs)
    captured = [v for v in read if v not in graph.live]
    place = {v: i for i, v in enumerate([*graph.tracers, *captured])}
    steps, size = [], len(place)
    for node, inputs in graph.steps:
        results = node.values()
        steps.append((node.primitive, tuple(node.params.items()), tuple(place[v] for v in inputs), len(results)))
        place |= {v: size + i for i, v in enumerate(results)}
        size += len(results)
    avals = tuple((v.shape, v.dtype) for v in graph.outputs)
    return Program(tuple(steps), tuple(place[v] for v in graph.outputs), avals), captured


@dataclass(frozen=True)
class Tree:
    """Where the arrays of a tree are, without them."""

    template: Any = field(compare=False)
    key: Any

    @classmethod
    def of(cls, tree: Any) -> Tree:
        return cls(rebuild(tree, repeat(HOLE)), structure_of(tree))

    def filled(self, arrays: Iterable[Any]) -> Any:
        return rebuild(self.template, iter(arrays))


HOLE = Array.of(Value((), bool_))


def _call(name: str, fun: Function, args: tuple[Any, ...], kwargs: dict[str, Any],
          params: Function = lambda result: {}) -> Any:
    """fun's result by one node, if a transformation may ask for its rules. What fun captured is an input as well."""
    if not TRACING.depth:
        return fun(*args, **kwargs)
    arrays = list(arrays_of(args))
    graph, result = trace(lambda *leaves: fun(*rebuild(args, iter(leaves)), **kwargs), arrays)
    program, captured = _program(graph)
    values = apply(TABLE[name], *(a._value for a in arrays), *captured, program=program,
                   **params(result))
    return rebuild(result, map(Array.of, values))


def checkpoint(fun: Function) -> Function:
    """fun, of which a gradient keeps the arguments only and computes the rest a second time."""
    return functools.wraps(fun)(lambda *args, **kwargs: _call("checkpoint", fun, args, kwargs))


def _checkpoint_vjp(cts: list[Array], xs: list[Array], ys: list[Array], program: Program) -> Maybe:
    made = [x for x in xs if x._value.node is not None and x._value.node.primitive.name != "constant"] or xs
    after = dict(zip(made, depends(made, cts), strict=True))           # weights need not wait
    return pull_through(program, [after.get(x, x) for x in xs], list(cts))


def _checkpoint_vmap(xs: list[Array], batched: list[bool], program: Program) -> list[Array]:
    return list(checkpoint(lambda *a: tuple(_batched(program, list(a), batched)))(*xs))


class custom_function:  # noqa: N801
    """A function with derivatives and batches of its own, given by the decorators vjp, jvp and vmap:

    vjp(primals, cotangents, outputs) -> cotangents of the primals
    jvp(primals, tangents) -> tangents of the outputs; a primal that does not vary has tangent None
    vmap(inputs, axes) -> outputs, their axes; axes are 0 or None

    Several arguments come as a tuple, results as fun returns them. Without a rule fun's own operations are used."""

    def __init__(self, fun: Function):
        functools.update_wrapper(self, fun)
        self.fun = fun
        self.rules: dict[str, Function] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _call("custom_function", self.fun, args, kwargs,
                     lambda result: {"call": Call(self, Tree.of(args), Tree.of(result))})

    def vjp(self, rule: Function) -> Function:
        self.rules["vjp"] = rule
        return rule

    def jvp(self, rule: Function) -> Function:
        self.rules["jvp"] = rule
        return rule

    def vmap(self, rule: Function) -> Function:
        self.rules["vmap"] = rule
        return rule


@dataclass(frozen=True)
class Call:
    """One call of a custom function: the structure of its arguments and of its results."""

    function: custom_function
    arguments: Tree
    results: Tree

    def primals(self, leaves: Iterable[Any]) -> Any:
        """Leaves in the structure in which rules see the arguments."""
        args = self.arguments.filled(leaves)
        return args[0] if len(args) == 1 else args

    def cotangents(self, given: Any, xs: list[Array]) -> Maybe:
        """What a vjp rule returned, for each input of the node; captured arrays have none."""
        args = self.arguments.template
        found = _aligned("custom_function", (given,) if len(args) == 1 else given, args)
        for i, (g, x) in enumerate(zip(found, xs, strict=False)):
            if g is not None and g.shape != x.shape:
                raise ValueError(f"[custom_function] cotangent {i} of the vjp has shape {show(g.shape)}, its argument "
                                 f"{show(x.shape)}")
        return found + [None] * (len(xs) - len(found))


def _custom_vjp(cts: list[Array], xs: list[Array], ys: list[Array], program: Program, call: Call) -> Maybe:
    if rule := call.function.rules.get("vjp"):
        return call.cotangents(rule(call.primals(xs), call.results.filled(cts), call.results.filled(ys)), xs)
    return pull_through(program, xs, list(cts))


def _custom_jvp(ts: Maybe, xs: list[Array], ys: list[Array], program: Program, call: Call) -> Maybe:
    if rule := call.function.rules.get("jvp"):
        return list(arrays_of(rule(call.primals(xs), call.primals(ts))))
    if "vjp" in call.function.rules:
        return push_by_pull(functools.partial(_custom_vjp, program=program, call=call), ts, xs, ys)
    return push(trace(program, xs)[0], ts)


def _custom_vmap(xs: list[Array], batched: list[bool], program: Program, call: Call) -> list[Array]:
    rule, count = call.function.rules.get("vmap"), len(list(arrays_of(call.arguments.template)))
    if rule is None or any(batched[count:]):               # a rule knows nothing of batches that fun captured
        return _batched(program, xs, batched)
    outputs, axes = rule(call.primals(xs), call.primals(0 if b else None for b in batched))
    return [_repeated(y, _size(xs, batched)) if axis is None else ops.moveaxis(y, axis, 0)
            for y, axis in zip(arrays_of(outputs), _aligned("custom_function", axes, outputs), strict=True)]


def _run(*inputs: Array, program: Program, **_: Any) -> tuple[Array, ...]:
    return program(*inputs)


def _avals(*inputs: Value, program: Program, **_: Any) -> list[Aval]:
    return list(program.avals)


row("checkpoint", _avals, None, definition=_run, vjp=_checkpoint_vjp, vmap=_checkpoint_vmap,
    jvp=lambda ts, xs, ys, program: push(trace(program, xs)[0], ts))
row("custom_function", _avals, None, definition=_run, vjp=_custom_vjp, jvp=_custom_jvp, vmap=_custom_vmap)

"""THE table of primitives, one row each. Row builders supply what is common; the rows of fused ops are in fast.py.

Derivatives are written with ops. Ties, points without a derivative and complex gradients (the conjugate) are MLX's. A
vjp rule may return functions in the place of cotangents: of the sum of those that came before, or None, to the new sum;
they are called for inputs that need a gradient only."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .dtypes import Dtype, bool_, complex64, float32, int32, int64, uint32, uint64
from .node import Aval, Dim, Node, Primitive, Shape, Value, apply, show

if TYPE_CHECKING:
    from .array import Array
    from .lowering import Lowering
    from .plan import View

TABLE: dict[str, Primitive] = {}
Params = dict[str, Any]
RESULT: dict[str, str] = {}          # of elementwise rows


def row(name: str, rule: Callable[..., list[Aval]], lower: Callable[..., Any] | None, **columns: Any) -> Primitive:
    TABLE[name] = Primitive(name, rule, lower, **columns)
    return TABLE[name]


def make(name: str, *xs: Array, **params: Any) -> Array:
    """The one result of a row of the table."""
    return ops.Array.of(apply(TABLE[name], *(x._value for x in xs), **params)[0])


# rules of ops that are linear in all their inputs, or in each of two

Tangents = list[Any]                                       # Arrays, None for zero


def linear(name: str, transpose: Callable[..., Array]) -> dict[str, Callable[..., Any]]:
    """vjp and jvp of an op of one input; transpose: (cotangent, x, **params) -> the input's cotangent."""
    return {"vjp": lambda cts, xs, ys, **params: [transpose(cts[0], xs[0], **params)],
            "jvp": lambda ts, xs, ys, **params: [make(name, ts[0], **params)]}


def multilinear(name: str) -> Callable[..., Tangents]:
    """jvp of an op that is linear in all its inputs together: zeros where there is no tangent."""
    def jvp(ts: Tangents, xs: list[Array], ys: list[Array], **params: Any) -> Tangents:
        return [make(name, *(ops.zeros_like(x) if t is None else t for t, x in zip(ts, xs, strict=True)), **params)]

    return jvp


def batch_all(xs: list[Array], batched: list[bool]) -> list[Array]:
    """All inputs with a batch axis in front: those without one are repeated."""
    size = next(x.shape[0] for x, b in zip(xs, batched, strict=True) if b)
    return [x if b else ops.broadcast_to(x, (size, *x.shape)) for x, b in zip(xs, batched, strict=True)]


# elementwise: operands arrive with one shape and, but for `where`, one dtype

def elementwise(name: str, opcode: str, result: str = "same") -> Primitive:
    """result: same (as the operands), inexact (operands are floats), bool, or real (operands are complex). Floats
    differentiate by PARTIALS."""
    def rule(*xs: Value) -> list[Aval]:
        return [(xs[-1].shape, bool_ if result == "bool" else float32 if result == "real" else xs[-1].dtype)]

    def lower(lo: Lowering, node: Node) -> str:
        return lo.fuse(node, elementwise_class(node.inputs[-1].dtype))

    def vjp(cts: list[Array], xs: list[Array], ys: list[Array]) -> Tangents:
        return [lambda before, d=d: total([before, _times(cts[0], _conjugate(_partial(d, *xs, *ys)))])
                for d in PARTIALS[name]]

    def jvp(ts: Tangents, xs: list[Array], ys: list[Array]) -> Tangents:
        pairs = zip(ts, PARTIALS[name], strict=True)
        return [total([_times(t, _partial(d, *xs, *ys)) for t, d in pairs if t is not None])]

    RESULT[name] = result
    rules = {"vjp": vjp, "jvp": jvp} if name in PARTIALS else {}
    return row(name, rule, lower, kernel=opcode, **rules,
               vmap=lambda xs, batched: [make(name, *batch_all(xs, batched))])


def _partial(d: Any, *operands: Array) -> Any:
    return d(*operands) if callable(d) else d


def _times(t: Array, d: Any) -> Array | None:
    """t * d, where d may be None (zero), 1 or -1."""
    return None if d is None else t * d if not isinstance(d, int) else t if d == 1 else -t


def _conjugate(d: Any) -> Any:
    return ops.conjugate(d) if isinstance(d, ops.Array) and d.dtype.kind == "c" else d


def total(terms: Sequence[Any]) -> Any:
    """The sum of the terms that are not None; None of none."""
    found = [t for t in terms if t is not None]
    return None if not found else found[0] if len(found) == 1 else found[0] + total(found[1:])


def _power_base(a: Array, b: Array, y: Array) -> Array:
    """b a^(b-1), and 0 where b is 0, also at a = 0."""
    return ops.where(b == 0, 0, b * a ** ops.where(b == 0, 1, b - 1))


def _power_exponent(a: Array, b: Array, y: Array) -> Array:
    """y log a, continued by 0 at a = 0."""
    return ops.where(a == 0, 0, y * ops.log(ops.where(a == 0, 1, a)))


def _gelu_tanh_slope(x: Array, y: Array) -> Array:
    c = math.sqrt(2 / math.pi)
    t = ops.tanh(c * (x + 0.044715 * x * x * x))
    return 0.5 * (1 + t) + 0.5 * c * x * (1 - t * t) * (1 + 0.134145 * x * x)


def _silu_slope(x: Array, y: Array) -> Array:
    s = ops.sigmoid(x)
    return s + y * (1 - s)


def _sign_or_phase(x: Array, y: Array) -> Array:
    return ops.sign(x) if x.dtype.kind != "c" else x / ops.where(y == 0, 1, y)


# partial derivatives of the result y with respect to each operand: a function of (operands…, y), a constant, None for 0
PARTIALS: dict[str, tuple[Any, ...]] = {
    "negative": (-1,), "abs": (_sign_or_phase,), "sign": (None,), "floor": (None,), "ceil": (None,), "round": (None,),
    "square": (lambda x, y: 2 * x,), "relu": (lambda x, y: ops.astype(x > 0, x.dtype),),
    "add": (1, 1), "subtract": (1, -1), "multiply": (lambda a, b, y: b, lambda a, b, y: a),
    "floor_divide": (None, None), "remainder": (1, lambda a, b, y: -ops.floor_divide(a, b)),
    "power": (_power_base, _power_exponent),
    "maximum": (lambda a, b, y: ops.astype(a > b, a.dtype), lambda a, b, y: ops.astype(a <= b, a.dtype)),
    "minimum": (lambda a, b, y: ops.astype(a < b, a.dtype), lambda a, b, y: ops.astype(a >= b, a.dtype)),
    "divide": (lambda a, b, y: 1 / b, lambda a, b, y: -y / b),
    "sqrt": (lambda x, y: 0.5 / y,), "rsqrt": (lambda x, y: -0.5 * y / x,), "reciprocal": (lambda x, y: -y * y,),
    "exp": (lambda x, y: y,), "expm1": (lambda x, y: y + 1,), "log": (lambda x, y: 1 / x,),
    "log2": (lambda x, y: 1 / (x * math.log(2)),), "log10": (lambda x, y: 1 / (x * math.log(10)),),
    "log1p": (lambda x, y: 1 / (1 + x),), "sin": (lambda x, y: ops.cos(x),), "cos": (lambda x, y: -ops.sin(x),),
    "tan": (lambda x, y: 1 + y * y,), "sinh": (lambda x, y: ops.cosh(x),), "cosh": (lambda x, y: ops.sinh(x),),
    "tanh": (lambda x, y: 1 - y * y,), "arcsin": (lambda x, y: ops.rsqrt(1 - x * x),),
    "arccos": (lambda x, y: -ops.rsqrt(1 - x * x),), "arctan": (lambda x, y: 1 / (1 + x * x),),
    "arcsinh": (lambda x, y: ops.rsqrt(x * x + 1),), "arccosh": (lambda x, y: ops.rsqrt(x * x - 1),),
    "arctanh": (lambda x, y: 1 / (1 - x * x),),
    "arctan2": (lambda a, b, y: b / (a * a + b * b), lambda a, b, y: -a / (a * a + b * b)),
    "erf": (lambda x, y: 2 / math.sqrt(math.pi) * ops.exp(-x * x),),
    "erfinv": (lambda x, y: math.sqrt(math.pi) / 2 * ops.exp(y * y),), "sigmoid": (lambda x, y: y * (1 - y),),
    "silu": (_silu_slope,), "gelu_tanh": (_gelu_tanh_slope,),
    "gelu": (lambda x, y: (1 + ops.erf(x * math.sqrt(0.5))) / 2 + x * ops.exp(x * x / -2) / math.sqrt(2 * math.pi),),
    "logaddexp": (lambda a, b, y: ops.sigmoid(a - b), lambda a, b, y: ops.sigmoid(b - a))}


def elementwise_class(dtype: Dtype) -> int:
    """The type of the elementwise kernel's registers: 0 float32, 1 float64, 2 int64, 3 uint64, 4 complex64."""
    return int(dtype.size == 8) if dtype.kind == "f" else 4 if dtype.kind == "c" else 3 if dtype is uint64 else 2


def _lower_astype(lo: Lowering, node: Node) -> str:
    """A cast is a conversion on load or store: registers have the float's type, or the wider one's."""
    source, target = node.inputs[0].dtype, node.params["dtype"]
    wider = source if source.kind == "f" and (target.kind != "f" or source.size > target.size) else target
    if "c" in (source.kind, target.kind):
        wider = complex64
    elif source.kind in "iu" and target.kind in "iub" and target is not uint64:
        wider = source
    return lo.fuse(node, elementwise_class(wider))


ELEMENTWISE = {                      # by result: the names of the ops, and of the kernel's opcode where it is another
    "same": "negative:neg abs sign floor ceil round square relu bitwise_invert:bit_not add subtract:sub multiply:mul "
            "floor_divide:floor_div remainder power:pow maximum minimum bitwise_and:bit_and bitwise_or:bit_or "
            "bitwise_xor:bit_xor left_shift:shl right_shift:shr where",
    "inexact": "divide:div sqrt rsqrt reciprocal exp expm1 log log2 log10 log1p sin cos tan sinh cosh tanh arcsin:asin "
               "arccos:acos arctan:atan arcsinh:asinh arccosh:acosh arctanh:atanh arctan2:atan2 erf erfinv sigmoid "
               "silu gelu gelu_tanh logaddexp",
    "bool": "equal:eq not_equal:ne less:lt less_equal:le greater:gt greater_equal:ge logical_and logical_or "
            "logical_not isnan isinf",
    "real": "magnitude:abs imag"}
for _result, _names in ELEMENTWISE.items():
    for _op in _names.split():
        elementwise(_op.split(":")[0], _op.split(":")[-1], _result)
elementwise("conjugate", "conj")
for _op, _vjp, _jvp in (
        ("conjugate", lambda ct, x: ops.conjugate(ct), lambda t, x: ops.conjugate(t)),
        ("imag", lambda ct, x: ct * 1j, lambda t, x: ops.imag(t)),
        ("magnitude", lambda ct, x: ct * ops.sign(x), lambda t, x: ops.real(t * ops.conjugate(ops.sign(x))))):
    TABLE[_op] = dataclasses.replace(TABLE[_op], vjp=lambda cts, xs, ys, _vjp=_vjp: [_vjp(cts[0], xs[0])],
                                     jvp=lambda ts, xs, ys, _jvp=_jvp: [_jvp(ts[0], xs[0])])
TABLE["where"] = dataclasses.replace(
    TABLE["where"],
    vjp=lambda cts, xs, ys: [None, ops.where(xs[0], cts[0], 0), ops.where(xs[0], 0, cts[0])],
    jvp=lambda ts, xs, ys: [ops.where(xs[0], *(0 if t is None else t for t in ts[1:]))])


def _cast_back(ct: Array, x: Array, dtype: Dtype) -> Array:
    return ops.astype(ct if x.dtype.kind == "c" or ct.dtype.kind != "c" else ops.real(ct), x.dtype)


row("astype", lambda x, dtype: [(x.shape, dtype)], _lower_astype, **linear("astype", _cast_back),
    vmap=lambda xs, batched, dtype: [ops.astype(xs[0], dtype)])


def _lower_constant(lo: Lowering, node: Node) -> None:
    lo.scalars[node.values()[0]] = node.params["value"]


row("constant", lambda value, dtype: [((), dtype)], _lower_constant)


# movements: the same memory seen through other strides

def movement(name: str, rule: Callable[..., list[Aval]], view: Callable[..., tuple[int, Shape] | None],
             **columns: Any) -> Primitive:
    def lower(lo: Lowering, node: Node) -> None:
        [value], [source] = node.values(), node.inputs
        if source in lo.scalars and name != "view":
            lo.scalars[value] = lo.scalars[source]
            return
        window = lo.view(source)
        moved = view(window.shape, window.strides, value.shape, node.params)
        if moved is None:
            window = lo.packed(window)
            moved = view(window.shape, window.strides, value.shape, node.params)
        assert moved is not None
        lo.place(value, window.moved(value.shape, moved[1], moved[0], value.dtype))

    return row(name, rule, lower, view=view, **columns)


def reshaped_strides(shape: Shape, strides: Shape, out: Shape, _: Params) -> tuple[int, Shape] | None:
    """Strides that show the elements in row-major order under the shape `out`, if there are any."""
    old = [(s, t) for s, t in zip(shape, strides, strict=True) if s != 1]
    result: list[int] = []
    position, block = 0, [1, 0]                            # block: elements left in a run of one stride, that stride
    if 0 in shape:
        return 0, (1,) * len(out)
    for size in out:
        if size == 1:
            result.append(0)
            continue
        if block[0] == 1:
            block, position = _run(old, position)
        if block[0] % size:
            return None
        block[0] //= size
        result.append(block[1] * block[0])
    return 0, tuple(result)


def _run(old: list[tuple[int, int]], position: int) -> tuple[list[int], int]:
    """The longest run of axes from `position` that is one axis of uniform stride: [elements, stride], next position."""
    size, stride = old[position]
    position += 1
    while position < len(old) and not isinstance(size, Dim) and stride == old[position][0] * old[position][1]:
        size, stride = size * old[position][0], old[position][1]
        position += 1
    return [int(size), stride], position


def _slice_view(strides: Shape, start: Shape, step: Shape) -> tuple[int, Shape]:
    return (sum(a * t for a, t in zip(start, strides, strict=True)),
            tuple(a * t for a, t in zip(step, strides, strict=True)))


def slice_shape(start: Shape, stop: Shape, step: Shape) -> Shape:
    return tuple(len(range(a, b, c)) for a, b, c in zip(start, stop, step, strict=True))


def _broadcast_view(shape: Shape, strides: Shape, out: Shape, _: Params) -> tuple[int, Shape]:
    pad = len(out) - len(shape)
    return 0, (0,) * pad + tuple(t if s == o else 0 for s, t, o in zip(shape, strides, out[pad:], strict=True))


def _bitcast_rule(x: Value, dtype: Dtype) -> list[Aval]:
    if x.dtype.size == dtype.size:
        return [(x.shape, dtype)]
    if not x.shape or isinstance(x.shape[-1], Dim) or x.shape[-1] * x.dtype.size % dtype.size:
        raise ValueError(f"[view] {x.dtype}{show(x.shape)} as {dtype}: the last axis does not divide")
    return [((*x.shape[:-1], x.shape[-1] * x.dtype.size // dtype.size), dtype)]


def _bitcast_view(shape: Shape, strides: Shape, out: Shape, _: Params) -> tuple[int, Shape] | None:
    if shape == out or 0 in shape:
        return 0, strides
    if strides[-1] != 1:
        return None
    scaled = [t * out[-1] / shape[-1] for t in strides[:-1]]
    return (0, (*map(int, scaled), 1)) if all(t.is_integer() for t in scaled) else None


def _batch_broadcast(xs: list[Array], batched: list[bool], shape: Shape) -> list[Array]:
    size, *rest = xs[0].shape
    return [ops.broadcast_to(ops.reshape(xs[0], (size, *(1,) * (len(shape) - len(rest)), *rest)), (size, *shape))]


def unbroadcast(ct: Array, shape: Shape) -> Array:
    """The cotangent of what was broadcast from `shape`: the sum over the repetitions."""
    if ct.shape == shape:
        return ct
    pad = ct.ndim - len(shape)
    axes = [*range(pad), *(i for i in range(pad, ct.ndim) if shape[i - pad] == 1 and ct.shape[i] != 1)]
    return ops.reshape(ops.sum(ct, axes) if axes else ct, shape)


def _slice_vjp(cts: list[Array], xs: list[Array], ys: list[Array], **params: Any) -> Tangents:
    """Adds to its part of the sum, which is written in place."""
    def back(before: Array | None) -> Array:
        whole, part = (ops.zeros_like(xs[0]), cts[0]) if before is None else (
            before, make("slice", before, **params) + cts[0])
        return ops.slice_update(whole, part, params["start"], params["step"])

    return [back]


def _batch_view(xs: list[Array], batched: list[bool], dtype: Dtype) -> list[Array]:
    """A scalar has no last axis whose size could change."""
    x = xs[0]
    return [make("view", x, dtype=dtype) if x.ndim > 1 else ops.reshape(make("view", x[:, None], dtype=dtype), x.shape)]


movement("reshape", lambda x, shape: [(shape, x.dtype)], reshaped_strides,
         **linear("reshape", lambda ct, x, shape: ops.reshape(ct, x.shape)),
         vmap=lambda xs, batched, shape: [ops.reshape(xs[0], (xs[0].shape[0], *shape))])
movement("transpose", lambda x, axes: [(tuple(x.shape[a] for a in axes), x.dtype)],
         lambda shape, strides, out, params: (0, tuple(strides[a] for a in params["axes"])),
         **linear("transpose", lambda ct, x, axes: ops.transpose(ct, [axes.index(i) for i in range(len(axes))])),
         vmap=lambda xs, batched, axes: [ops.transpose(xs[0], [0, *(a + 1 for a in axes)])])
movement("broadcast_to", lambda x, shape: [(shape, x.dtype)], _broadcast_view,
         **linear("broadcast_to", lambda ct, x, shape: unbroadcast(ct, x.shape)), vmap=_batch_broadcast)
movement("view", _bitcast_rule, _bitcast_view, vmap=_batch_view)
movement("slice", lambda x, shape, start, step: [(shape, x.dtype)],
         lambda shape, strides, out, params: _slice_view(strides, params["start"], params["step"]),
         vjp=_slice_vjp, jvp=lambda ts, xs, ys, **params: [make("slice", ts[0], **params)],
         vmap=lambda xs, batched, shape, start, step: [
             make("slice", xs[0], shape=(xs[0].shape[0], *shape), start=(0, *start), step=(1, *step))])


def _lower_contiguous(lo: Lowering, node: Node) -> None:
    lo.place(node.values()[0], lo.contiguous(node.inputs[0]))


row("contiguous", lambda x: [(x.shape, x.dtype)], _lower_contiguous, **linear("contiguous", lambda ct, x: ct),
    vmap=lambda xs, batched: [ops.contiguous(xs[0])])


# the same value, marked for transforms.py: an argument, a barrier to gradients, an order of evaluation

def same(name: str, **columns: Any) -> Primitive:
    def lower(lo: Lowering, node: Node) -> None:
        lo.place(node.values()[0], lo.view(node.inputs[0]))

    return row(name, lambda x, *_: [(x.shape, x.dtype)], lower, **columns)


def _no_gradient(given: list[Any], xs: list[Array], ys: list[Array]) -> Tangents:
    return [None] * len(given)


same("argument", vmap=lambda xs, batched: [xs[0]], **linear("argument", lambda ct, x: ct))
same("stop_gradient", vmap=lambda xs, batched: [make("stop_gradient", xs[0])], vjp=_no_gradient, jvp=_no_gradient)
same("depends", vmap=lambda xs, batched: [make("depends", *batch_all(xs, batched))],
     vjp=lambda cts, xs, ys: [cts[0]] + [None] * (len(xs) - 1), jvp=lambda ts, xs, ys: [ts[0]])


# writing into a part

def _window(view: View, start: Shape, step: Shape, shape: Shape) -> View:
    first, strides = _slice_view(view.strides, start, step)
    return view.moved(shape, strides, first)


def _lower_slice_update(lo: Lowering, node: Node) -> None:
    """x with `update` written at start::step, in x's own memory when it dies here."""
    x, update = node.inputs
    if x in lo.scalars:
        lo.fill(x, target := lo.new(x.shape, x.dtype))
    else:
        target = lo.update(x)
    lo.write(update, _window(target, node.params["start"], node.params["step"], update.shape))
    lo.place(node.values()[0], target)


def _lower_concatenate(lo: Lowering, node: Node) -> None:
    [value], axis, position = node.values(), node.params["axis"], 0
    target = lo.new(value.shape, value.dtype)
    for v in node.inputs:
        start = tuple(position if i == axis else 0 for i in range(len(value.shape)))
        lo.write(v, _window(target, start, (1,) * len(start), v.shape))
        position += v.shape[axis]
    lo.place(value, target)


def _concatenate_rule(*xs: Value, axis: int) -> list[Aval]:
    shape = list(xs[0].shape)
    shape[axis] = sum(x.shape[axis] for x in xs)
    return [(tuple(shape), xs[0].dtype)]


def _slice_update_vjp(cts: list[Array], xs: list[Array], ys: list[Array], start: Shape, step: Shape) -> Tangents:
    window = make("slice", cts[0], shape=xs[1].shape, start=start, step=step)
    return [ops.slice_update(cts[0], ops.zeros_like(xs[1]), start, step), window]


def _concatenate_vjp(cts: list[Array], xs: list[Array], ys: list[Array], axis: int) -> Tangents:
    ends = [sum(x.shape[axis] for x in xs[:i + 1]) for i in range(len(xs) - 1)]
    return ops.split(cts[0], ends, axis)


row("slice_update", lambda x, update, start, step: [(x.shape, x.dtype)], _lower_slice_update, vjp=_slice_update_vjp,
    jvp=multilinear("slice_update"), vmap=lambda xs, batched, start, step: [
        ops.slice_update(*batch_all(xs, batched), start=(0, *start), step=(1, *step))])
row("concatenate", _concatenate_rule, _lower_concatenate, vjp=_concatenate_vjp, jvp=multilinear("concatenate"),
    vmap=lambda xs, batched, axis: [ops.concatenate(batch_all(xs, batched), axis + 1)])


# reductions: axes are dropped; ops puts kept axes of size 1 back by a reshape

REDUCE = {"sum": 0, "prod": 1, "max": 2, "min": 3, "any": 4, "all": 5, "argmax": 6, "argmin": 7}


def reduced_dtype(name: str, dtype: Dtype) -> Dtype:
    if name in ("any", "all"):
        return bool_
    if name in ("argmax", "argmin"):
        return uint32
    if name in ("sum", "prod") and dtype.kind in "bui" and dtype.size < 4:
        return uint32 if dtype.kind == "u" else int32
    return dtype


def reduction(name: str) -> Primitive:
    def rule(x: Value, axes: tuple[int, ...]) -> list[Aval]:
        return [(tuple(s for i, s in enumerate(x.shape) if i not in axes), reduced_dtype(name, x.dtype))]

    def lower(lo: Lowering, node: Node) -> None:
        [x], [value], axes = node.inputs, node.values(), node.params["axes"]
        view = lo.view(x)
        order = [i for i in range(len(x.shape)) if i not in axes] + list(axes)
        source = view.moved(tuple(view.shape[i] for i in order), tuple(view.strides[i] for i in order))
        lo.step("reduce", [lo.result(value)], [source], [REDUCE[name], len(axes)])

    return row(name, rule, lower, kernel="reduce", **(_by_slope(SLOPES[name]) if name in SLOPES else {}),
               vmap=lambda xs, batched, axes: [make(name, xs[0], axes=tuple(a + 1 for a in axes))])


def _by_slope(slope: Callable[..., Any]) -> dict[str, Callable[..., Tangents]]:
    def vjp(cts: list[Array], xs: list[Array], ys: list[Array], axes: tuple[int, ...]) -> Tangents:
        d = slope(xs[0], _kept(ys[0], xs[0], axes), axes)
        return [_times(ops.broadcast_to(_kept(cts[0], xs[0], axes), xs[0].shape), _conjugate(d))]

    def jvp(ts: Tangents, xs: list[Array], ys: list[Array], axes: tuple[int, ...]) -> Tangents:
        return [ops.sum(_times(ts[0], slope(xs[0], _kept(ys[0], xs[0], axes), axes)), axes)]

    return {"vjp": vjp, "jvp": jvp}


def _kept(reduced: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """The reduced array with axes of size 1 where x had others."""
    return ops.reshape(reduced, tuple(1 if i in axes else s for i, s in enumerate(x.shape)))


def _prod_slope(x: Array, y: Array, axes: tuple[int, ...]) -> Array:
    order = [i for i in range(x.ndim) if i not in axes] + list(axes)
    last = ops.transpose(x, order)
    others = _others(ops.flatten(last, x.ndim - len(axes)))
    return ops.transpose(ops.reshape(others, last.shape), [order.index(i) for i in range(x.ndim)])


def _others(x: Array) -> Array:
    """For each element of the last axis the product of all others, by halves: a division would not do beside a zero."""
    size = x.shape[-1]
    if size < 2:
        return ops.ones_like(x)
    even = ops.concatenate([x, ops.ones_like(x[..., :1])], -1) if size % 2 else x
    pairs = ops.unflatten(even, -1, (-1, 2))
    rest = _others(pairs[..., 0] * pairs[..., 1])
    return ops.flatten(rest[..., None] * pairs[..., ::-1], -2)[..., :size]


def _extreme_slope(x: Array, y: Array, axes: tuple[int, ...]) -> Array:
    """Equal elements share."""
    hit = ops.astype(x == y, x.dtype)
    return hit / ops.sum(hit, axes, keepdims=True)


# the derivative with respect to x of a reduction y (its axes kept)
SLOPES: dict[str, Callable[..., Any]] = {
    "sum": lambda x, y, axes: 1, "prod": _prod_slope, "max": _extreme_slope, "min": _extreme_slope}
for _name in REDUCE:
    reduction(_name)


# gather and products

def _lower_take(lo: Lowering, node: Node) -> None:
    """x (A,N,C), indices (I) -> (A,I,C); where N or I is symbolic and so must lead, (N,C), (I) -> (I,C)."""
    (x, indices), [value], axis = node.inputs, node.values(), node.params["axis"]
    lead, n, c, i = x.shape[:axis], x.shape[axis], size_of(x.shape[axis + 1:]), flat(indices.shape)
    a = () if isinstance(n, Dim) or isinstance(i, Dim) else (flat(lead),)
    out, table, index = lo.result(value), lo.contiguous(x), lo.contiguous(indices)
    lo.step("take", [out.reshaped(*a, i, c)], [table.reshaped(*a, n, c), index.reshaped(i)])


def size_of(shape: Shape) -> int:
    size = 1
    for s in shape:
        size *= s
    return size


def flat(shape: Shape) -> int:
    """The number of elements, which stays symbolic where the symbolic axis is the only one."""
    sizes = [s for s in shape if s != 1] or [1]
    if len(sizes) > 1 and isinstance(sizes[0], Dim):
        raise ValueError(f"[reshape] {show(shape)} cannot be flattened: {sizes[0]} is symbolic")
    return sizes[0] if len(sizes) == 1 else size_of(tuple(sizes))


def _lower_matmul(lo: Lowering, node: Node) -> None:
    a, b = (_unit_stride(lo, lo.view(v)) for v in node.inputs)
    out = lo.result(node.values()[0])
    batch = out.shape[:-2]
    lo.step("matmul", [out], [a.broadcast((*batch, *a.shape[-2:])), b.broadcast((*batch, *b.shape[-2:]))])


def _lower_add_product(lo: Lowering, node: Node) -> None:
    c, *factors = node.inputs
    a, b = (_unit_stride(lo, lo.view(v)) for v in factors)
    lo.step("add_product", [out := lo.update(c)], [a, b])
    lo.place(node.values()[0], out)


def _unit_stride(lo: Lowering, view: View) -> View:
    """matmul reads any strides of the last two axes, as long as one of them is 1."""
    last = tuple(1 if s == 1 else t for s, t in zip(view.shape[-2:], view.strides[-2:], strict=True))
    return view.moved(view.shape, view.strides[:-2] + last) if 1 in last else lo.packed(view)


def _matmul_rule(a: Value, b: Value) -> list[Aval]:
    batch = a.shape[:-2] if len(a.shape) >= len(b.shape) else b.shape[:-2]
    pairs = zip(reversed(a.shape[:-2]), reversed(b.shape[:-2]), strict=False)
    merged = tuple(q if p == 1 else p for p, q in pairs)[::-1]
    return [((*batch[:len(batch) - len(merged)], *merged, a.shape[-2], b.shape[-1]), a.dtype)]


def _take_vjp(cts: list[Array], xs: list[Array], ys: list[Array], axis: int) -> Tangents:
    x, indices = xs
    return [lambda before: scatter.scatter_rows(ops.zeros_like(x) if before is None else before, indices, cts[0], axis),
            None]


def _batch_take(xs: list[Array], batched: list[bool], axis: int) -> list[Array]:
    (x, indices), many = xs, batched
    if not many[1]:
        return [ops.take(x, indices, axis + 1)]
    if not many[0]:
        return [ops.moveaxis(ops.take(x, indices, axis), axis, 0)]
    rows = ops.moveaxis(x, axis + 1, 1)                    # (B, N, …): one table of B * N rows
    size, n, *rest = rows.shape
    start = ops.reshape(ops.arange(size, dtype=int64) * n, (size, *(1,) * (indices.ndim - 1)))
    index = ops.where(indices < 0, indices + n, indices) + start
    out = ops.take(ops.reshape(rows, (size * n, *rest)), index, 0)
    inner = list(range(1, indices.ndim)), list(range(indices.ndim, out.ndim))
    return [ops.transpose(out, [0, *inner[1][:axis], *inner[0], *inner[1][axis:]])]


def _matmul_vjp(cts: list[Array], xs: list[Array], ys: list[Array]) -> Tangents:
    a, b = map(_conjugate, xs)

    def left(before: Array | None) -> Array:
        return total([before, unbroadcast(ops.matmul(cts[0], ops.swapaxes(b, -1, -2)), a.shape)])

    def right(before: Array | None) -> Array:
        """The rows of all batches make one product where b is a matrix that they share."""
        shared = b.ndim == 2 and a.ndim > 2
        x, ct = (ops.reshape(v, (-1, v.shape[-1])) if shared else v for v in (a, cts[0]))
        return total([before, unbroadcast(ops.matmul(ops.swapaxes(x, -1, -2), ct), b.shape)])

    return [left, right]


def _batch_matmul(xs: list[Array], batched: list[bool]) -> list[Array]:
    """Batch axes align from the right: those that are missing after the new one are put in."""
    ndim = max(x.ndim - b for x, b in zip(xs, batched, strict=True))
    wide = [ops.reshape(x, (x.shape[0], *(1,) * (ndim + 1 - x.ndim), *x.shape[1:])) if b else x
            for x, b in zip(xs, batched, strict=True)]
    return [ops.matmul(*wide)]


row("take", lambda x, indices, axis: [(x.shape[:axis] + indices.shape + x.shape[axis + 1:], x.dtype)], _lower_take,
    kernel="take", vjp=_take_vjp, vmap=_batch_take,
    jvp=lambda ts, xs, ys, axis: [make("take", ts[0], xs[1], axis=axis)])
row("matmul", _matmul_rule, _lower_matmul, kernel="matmul", vjp=_matmul_vjp, vmap=_batch_matmul,
    jvp=lambda ts, xs, ys: [total([t if t is None else ops.matmul(t, xs[1]) for t in ts[:1]] +
                                  [t if t is None else ops.matmul(xs[0], t) for t in ts[1:]])])


# linear: made by the rewrites, never by an op. Inputs in the kernel's order; bits 0 is a dense weight.

EPILOGUES = ("none", "add", "silu", "gelu", "gelu_tanh")


def _linear_rule(x: Value, *rest: Value, sizes: tuple[int, ...], epilogue: str, **_: Any) -> list[Aval]:
    outs = sizes[:1] if EPILOGUES.index(epilogue) >= 2 else sizes
    return [((x.shape[0], n), float32) for n in outs]


def _lower_linear(lo: Lowering, node: Node) -> None:
    p = node.params
    inputs = [lo.rows(node.inputs[0], 1), *(lo.contiguous(v) for v in node.inputs[1:])]
    outputs = [lo.result(v) for v in node.values()]
    epilogue = EPILOGUES.index(p["epilogue"])
    ints = [len(p["sizes"]), p["bits"], p["group"], int(p["norm"]), epilogue, int(p["bias"]), 0]
    lo.step("linear", outputs, inputs, ints, [p["eps"]])


row("linear", _linear_rule, _lower_linear, kernel="linear")
row("add_product", lambda c, a, b: [(c.shape, c.dtype)], _lower_add_product, kernel="add_product")  # c + a b


from . import ops as operations  # noqa: E402  (ops needs the table above, its rules need ops)
from . import scatter  # noqa: E402

ops: Any = operations                                      # a type checker cannot infer types around a circle

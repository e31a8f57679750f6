"""THE table of primitives, one row each. Row builders supply what is common; the rows of fused ops are in fast.py."""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .dtypes import Dtype, bool_, float32, int32, uint32, uint64
from .node import Aval, Dim, Node, Primitive, Shape, Value, show

if TYPE_CHECKING:
    from .lowering import Lowering
    from .plan import View

TABLE: dict[str, Primitive] = {}
Params = dict[str, Any]
RESULT: dict[str, str] = {}          # of elementwise rows


def row(name: str, rule: Callable[..., list[Aval]], lower: Callable[..., Any], **columns: Any) -> Primitive:
    TABLE[name] = Primitive(name, rule, lower, **columns)
    return TABLE[name]


# elementwise: operands arrive with one shape and, but for `where`, one dtype

def elementwise(name: str, opcode: str, result: str = "same") -> Primitive:
    """result: same (as the operands), inexact (operands are floats) or bool."""
    def rule(*xs: Value) -> list[Aval]:
        return [(xs[-1].shape, bool_ if result == "bool" else xs[-1].dtype)]

    def lower(lo: Lowering, node: Node) -> str:
        return lo.fuse(node, elementwise_class(node.inputs[-1].dtype))

    RESULT[name] = result
    return row(name, rule, lower, kernel=opcode)


def elementwise_class(dtype: Dtype) -> int:
    """The type of the elementwise kernel's registers: 0 float32, 1 float64, 2 int64, 3 uint64."""
    if dtype.kind == "c":
        raise ValueError(f"[eval] {dtype} has no kernels")
    return int(dtype.size == 8) if dtype.kind == "f" else 3 if dtype is uint64 else 2


def _lower_astype(lo: Lowering, node: Node) -> str:
    """A cast is a conversion on load or store: registers have the float's type, or the wider one's."""
    source, target = node.inputs[0].dtype, node.params["dtype"]
    wider = source if source.kind == "f" and (target.kind != "f" or source.size > target.size) else target
    if source.kind in "iu" and target.kind in "iub" and target is not uint64:
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
            "logical_not isnan isinf"}
for _result, _names in ELEMENTWISE.items():
    for _op in _names.split():
        elementwise(_op.split(":")[0], _op.split(":")[-1], _result)
row("astype", lambda x, dtype: [(x.shape, dtype)], _lower_astype)


def _lower_constant(lo: Lowering, node: Node) -> None:
    lo.scalars[node.values()[0]] = node.params["value"]


row("constant", lambda value, dtype: [((), dtype)], _lower_constant)


# movements: the same memory seen through other strides

def movement(name: str, rule: Callable[..., list[Aval]], view: Callable[..., tuple[int, Shape] | None]) -> Primitive:
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

    return row(name, rule, lower, view=view)


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
    if shape == out:
        return 0, strides
    if strides[-1] != 1:
        return None
    scaled = [t * out[-1] / shape[-1] for t in strides[:-1]]
    return (0, (*map(int, scaled), 1)) if all(t.is_integer() for t in scaled) else None


movement("reshape", lambda x, shape: [(shape, x.dtype)], reshaped_strides)
movement("transpose", lambda x, axes: [(tuple(x.shape[a] for a in axes), x.dtype)],
         lambda shape, strides, out, params: (0, tuple(strides[a] for a in params["axes"])))
movement("broadcast_to", lambda x, shape: [(shape, x.dtype)], _broadcast_view)
movement("view", _bitcast_rule, _bitcast_view)
movement("slice", lambda x, shape, start, step: [(shape, x.dtype)],
         lambda shape, strides, out, params: _slice_view(strides, params["start"], params["step"]))


def _lower_contiguous(lo: Lowering, node: Node) -> None:
    lo.place(node.values()[0], lo.contiguous(node.inputs[0]))


row("contiguous", lambda x: [(x.shape, x.dtype)], _lower_contiguous)


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


row("slice_update", lambda x, update, start, step: [(x.shape, x.dtype)], _lower_slice_update)
row("concatenate", _concatenate_rule, _lower_concatenate)


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

    return row(name, rule, lower, kernel="reduce")


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


def _unit_stride(lo: Lowering, view: View) -> View:
    """matmul reads any strides of the last two axes, as long as one of them is 1."""
    last = tuple(1 if s == 1 else t for s, t in zip(view.shape[-2:], view.strides[-2:], strict=True))
    return view.moved(view.shape, view.strides[:-2] + last) if 1 in last else lo.packed(view)


def _matmul_rule(a: Value, b: Value) -> list[Aval]:
    batch = a.shape[:-2] if len(a.shape) >= len(b.shape) else b.shape[:-2]
    pairs = zip(reversed(a.shape[:-2]), reversed(b.shape[:-2]), strict=False)
    merged = tuple(q if p == 1 else p for p, q in pairs)[::-1]
    return [((*batch[:len(batch) - len(merged)], *merged, a.shape[-2], b.shape[-1]), a.dtype)]


row("take", lambda x, indices, axis: [(x.shape[:axis] + indices.shape + x.shape[axis + 1:], x.dtype)], _lower_take,
    kernel="take")
row("matmul", _matmul_rule, _lower_matmul, kernel="matmul")


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

"""Convolutions, channels last: input (N, …, C), weight (O, …, C / groups), one to three spatial axes. One primitive,
whose gradients are convolutions again."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import ops
from .array import Array
from .dtypes import float32, promote
from .node import Aval, Node, Shape, Value, apply, show
from .operands import array_of
from .primitives import TABLE, row

if TYPE_CHECKING:
    from .lowering import Lowering
    from .plan import View

__all__ = ["conv1d", "conv2d", "conv3d", "conv_general", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
           "convolve"]
Sizes = int | Sequence[int]


# padding is (before, after), each a size for every spatial axis; what is negative is cut off

def _rule(x: Value, w: Value, stride: Shape, padding: tuple[Shape, Shape], kernel_dilation: Shape,
          input_dilation: Shape, groups: int, flip: bool) -> list[Aval]:
    sizes = zip(x.shape[1:-1], w.shape[1:-1], stride, *padding, kernel_dilation, input_dilation, strict=True)
    out = [(spread(n, apart) + a + b - spread(k, dilation)) // s + 1 for n, k, s, a, b, dilation, apart in sizes]
    if any(n < 1 for n in out):
        raise ValueError(f"[conv] input {show(x.shape)}, weight {show(w.shape)}: the kernel exceeds the padded input")
    return [((x.shape[0], *out, w.shape[0]), x.dtype)]


def spread(size: int, dilation: int) -> int:
    """The extent of `size` items that are `dilation` apart."""
    return (size - 1) * dilation + 1 if size else 0


def _lower(lo: Lowering, node: Node) -> None:
    p, (x, w), [value] = node.params, node.inputs, node.values()
    axes = len(p["stride"])

    def five_axes(view: View) -> View:
        return view.moved((view.shape[0], *(1,) * (3 - axes), *view.shape[1:]),
                          (view.strides[0], *(0,) * (3 - axes), *view.strides[1:]))

    def three(sizes: Shape, none: int) -> list[int]:
        return [none] * (3 - axes) + list(sizes)

    ints = [*three(p["stride"], 1), *three(p["padding"][0], 0), *three(p["kernel_dilation"], 1),
            *three(p["input_dilation"], 1), p["groups"], int(p["flip"])]
    inputs = [five_axes(lo.rows(x, 1)), five_axes(lo.contiguous(w))]
    lo.step("conv", [five_axes(lo.result(value))], inputs, ints)


def _conv(x: Array, w: Array, **params: Any) -> Array:
    return Array.of(apply(TABLE["conv"], x._value, w._value, **params)[0])


def _split_last(a: Array, groups: int) -> Array:
    return ops.unflatten(a, -1, (groups, a.shape[-1] // groups))


def _input_gradient(ct: Array, x: Array, w: Array, stride: Shape, padding: tuple[Shape, Shape], kernel_dilation: Shape,
                    input_dilation: Shape, groups: int, flip: bool) -> Array:
    """The weight slides over ct, spread out by the stride, the other way round."""
    kernel = [spread(k, d) for k, d in zip(w.shape[1:-1], kernel_dilation, strict=True)]
    before = tuple(k - 1 - a for k, a in zip(kernel, padding[0], strict=True))
    after = tuple(spread(n, d) - spread(m, s) + a for n, d, m, s, a in zip(
        x.shape[1:-1], input_dilation, ct.shape[1:-1], stride, padding[0], strict=True))
    split = ops.unflatten(w, 0, (groups, w.shape[0] // groups))            # (g, O/g, …, C/g) -> (g, C/g, …, O/g)
    turned = ops.flatten(ops.swapaxes(split, 1, -1), 0, 1)
    return _conv(ct, turned, stride=input_dilation, padding=(before, after), kernel_dilation=kernel_dilation,
                 input_dilation=stride, groups=groups, flip=not flip)


def _weight_gradient(ct: Array, x: Array, w: Array, stride: Shape, padding: tuple[Shape, Shape], kernel_dilation: Shape,
                     input_dilation: Shape, groups: int, flip: bool) -> Array:
    """ct slides over x, with the batch for channels."""
    after = tuple(spread(k, d) - 1 + spread(m, s) - spread(n, e) - a for k, d, m, s, n, e, a in zip(
        w.shape[1:-1], kernel_dilation, ct.shape[1:-1], stride, x.shape[1:-1], input_dilation, padding[0], strict=True))
    split = ops.moveaxis(_split_last(x, groups), -1, 0)                    # (N, …, g, C/g) -> (C/g, N, …, g)
    images = ops.flatten(ops.moveaxis(split, 1, -1), -2, -1)               # (C/g, …, g N)
    back = _conv(images, ops.swapaxes(ct, 0, -1), stride=kernel_dilation, padding=(padding[0], after),
                 kernel_dilation=stride, input_dilation=input_dilation, groups=groups, flip=False)
    spatial = tuple(range(1, back.ndim - 1))
    return ops.swapaxes(ops.flip(back, spatial) if flip else back, 0, -1)


def _vjp(cts: list[Array], xs: list[Array], ys: list[Array], **params: Any) -> list[Array | None]:
    x, w = xs
    return [_input_gradient(cts[0], x, w, **params), _weight_gradient(cts[0], x, w, **params)]


def _jvp(ts: list[Array | None], xs: list[Array], ys: list[Array], **params: Any) -> list[Array | None]:
    parts = [_conv(ts[0], xs[1], **params)] if ts[0] is not None else []
    parts += [_conv(xs[0], ts[1], **params)] if ts[1] is not None else []
    return [parts[0] + parts[1] if len(parts) == 2 else parts[0] if parts else None]


def _vmap(xs: list[Array], batched: list[bool], groups: int, **params: Any) -> list[Array]:
    """A batch of inputs is a larger N, a batch of weights a larger O; of both, every pair is a group of its own."""
    x, w = xs
    if not batched[1]:
        y = _conv(ops.flatten(x, 0, 1), w, groups=groups, **params)
        return [ops.unflatten(y, 0, x.shape[:2])]
    size, out = w.shape[0], w.shape[1] // groups
    split = ops.unflatten(w, 1, (groups, out))                             # (B, g, O/g, …)
    if batched[0]:
        x, w = ops.flatten(ops.moveaxis(x, 0, -2), -2, -1), ops.flatten(split, 0, 2)
        y = _conv(x, w, groups=groups * size, **params)                    # (N, …, B O)
        return [ops.moveaxis(_split_last(y, size), -2, 0)]
    y = _conv(x, ops.flatten(ops.swapaxes(split, 0, 1), 0, 2), groups=groups, **params)
    y = ops.unflatten(y, -1, (groups, size, out))                          # (N, …, g, B, O/g)
    return [ops.flatten(ops.moveaxis(y, -2, 0), -2, -1)]


row("conv", _rule, _lower, kernel="conv", vjp=_vjp, jvp=_jvp, vmap=_vmap)


def conv_general(input: Any, weight: Any, stride: Sizes = 1, padding: Any = 0, kernel_dilation: Sizes = 1,
                 input_dilation: Sizes = 1, groups: int = 1, flip: bool = False) -> Array:
    """input (N, …, C) with weight (O, …, C / groups) slid over it -> (N, …, O). Sizes are one number or one for each
    spatial axis; padding may be a pair (before, after) of these. flip: the kernel is turned around."""
    return _general("conv_general", input, weight, stride, padding, kernel_dilation, input_dilation, groups, flip)


def _general(name: str, input: Any, weight: Any, stride: Sizes, padding: Any, kernel_dilation: Sizes,
             input_dilation: Sizes, groups: int, flip: bool, axes: int | None = None) -> Array:
    x, w = array_of(input), array_of(weight)
    letters = "D H W"[-2 * (x.ndim - 2) + 1:].split() if 3 <= x.ndim <= 5 else []
    wanted = ", ".join(letters or ["…"])
    shapes = f"[{name}] input (N, {wanted}, C) {show(x.shape)}, weight (O, {wanted}, C) {show(w.shape)}"
    if not letters or x.ndim != w.ndim or axes not in (None, len(letters)):
        raise ValueError(f"{shapes}: {axes or 'one to three'} spatial axes in both wanted")
    if groups < 1 or x.shape[-1] % groups or w.shape[0] % groups:
        raise ValueError(f"{shapes}: {groups} groups do not divide {x.shape[-1]} and {w.shape[0]} channels")
    if x.shape[-1] != w.shape[-1] * groups:
        times = f" * {groups} groups" if groups > 1 else ""
        raise ValueError(f"{shapes}: channels {x.shape[-1]} and {w.shape[-1]}{times} differ")
    dtype = promote(x.dtype, w.dtype)
    if dtype.kind != "f":
        raise ValueError(f"{shapes}: {x.dtype} and {w.dtype}, floats wanted")
    pair = isinstance(padding, tuple | list) and any(not isinstance(p, int) for p in padding)
    before, after = (_sizes(name, p, len(letters)) for p in (padding if pair else (padding, padding)))
    return _conv(ops.astype(x, dtype), ops.astype(w, dtype), stride=_sizes(name, stride, len(letters)),
                 padding=(before, after), kernel_dilation=_sizes(name, kernel_dilation, len(letters)),
                 input_dilation=_sizes(name, input_dilation, len(letters)), groups=groups, flip=flip)


def _sizes(name: str, sizes: Sizes, axes: int) -> Shape:
    sizes = (sizes,) * axes if isinstance(sizes, int) else tuple(sizes)
    sizes = sizes * axes if len(sizes) == 1 else sizes
    if len(sizes) != axes:
        raise ValueError(f"[{name}] sizes {show(sizes)}: one or {axes} wanted")
    return sizes


def conv1d(input: Any, weight: Any, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1) -> Array:
    """input (N, W, C), weight (O, W, C / groups) -> (N, W, O)"""
    return _general("conv1d", input, weight, stride, padding, dilation, 1, groups, False, 1)


def conv2d(input: Any, weight: Any, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1,
           groups: int = 1) -> Array:
    """input (N, H, W, C), weight (O, H, W, C / groups) -> (N, H, W, O)"""
    return _general("conv2d", input, weight, stride, padding, dilation, 1, groups, False, 2)


def conv3d(input: Any, weight: Any, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1,
           groups: int = 1) -> Array:
    """input (N, D, H, W, C), weight (O, D, H, W, C / groups) -> (N, D, H, W, O)"""
    return _general("conv3d", input, weight, stride, padding, dilation, 1, groups, False, 3)


def _transposed(name: str, input: Any, weight: Any, stride: Sizes, padding: Sizes, dilation: Sizes,
                output_padding: Sizes, groups: int, axes: int) -> Array:
    """The input is spread out by the stride; padding is cut off the result, output_padding added at its end."""
    w = array_of(weight)
    dilation, padding, extra = (_sizes(name, s, axes) for s in (dilation, padding, output_padding))
    before = tuple(spread(k, d) - 1 - p for k, d, p in zip(w.shape[1:-1], dilation, padding, strict=False))
    after = tuple(b + e for b, e in zip(before, extra, strict=False))
    return _general(name, input, w, 1, (before, after), dilation, stride, groups, True, axes)


def conv_transpose1d(input: Any, weight: Any, stride: int = 1, padding: int = 0, dilation: int = 1,
                     output_padding: int = 0, groups: int = 1) -> Array:
    """input (N, W, C), weight (O, W, C / groups) -> (N, W, O), about `stride` times as wide"""
    return _transposed("conv_transpose1d", input, weight, stride, padding, dilation, output_padding, groups, 1)


def conv_transpose2d(input: Any, weight: Any, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1,
                     output_padding: Sizes = 0, groups: int = 1) -> Array:
    """input (N, H, W, C), weight (O, H, W, C / groups) -> (N, H, W, O), about `stride` times as large"""
    return _transposed("conv_transpose2d", input, weight, stride, padding, dilation, output_padding, groups, 2)


def conv_transpose3d(input: Any, weight: Any, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1,
                     output_padding: Sizes = 0, groups: int = 1) -> Array:
    """input (N, D, H, W, C), weight (O, D, H, W, C / groups) -> (N, D, H, W, O), about `stride` times as large"""
    return _transposed("conv_transpose3d", input, weight, stride, padding, dilation, output_padding, groups, 3)


def convolve(a: Any, v: Any, mode: str = "full") -> Array:
    """Convolution of two sequences, as numpy.convolve: mode full, same or valid."""
    a, v = array_of(a), array_of(v)
    if a.ndim != 1 or v.ndim != 1 or not a.size or not v.size:
        raise ValueError(f"[convolve] {show(a.shape)} and {show(v.shape)}: one axis with elements wanted")
    if mode not in ("full", "same", "valid"):
        raise ValueError(f"[convolve] mode {mode!r}: full, same or valid wanted")
    a, v = (a, v) if a.size >= v.size else (v, a)
    a, v = (x if x.dtype.inexact else ops.astype(x, float32) for x in (a, v))
    size = v.size
    padding = {"full": (size - 1, size - 1), "same": (size // 2, (size - 1) // 2), "valid": (0, 0)}[mode]
    return ops.reshape(conv_general(ops.reshape(a, (1, -1, 1)), ops.reshape(v, (1, -1, 1)), flip=True,
                                    padding=([padding[0]], [padding[1]])), (-1,))

"""quantized_matmul and gather_mm: products with one matrix, or with matrices chosen by index."""
from __future__ import annotations

from dataclasses import replace

from .linear import FEW, Matrix, check_matrices, linear, named, parts_of, product, shape_of
from .steps import FAULT, Dispatch, Step, Unsupported, View, ceil, struct


def quantized_matmul(step: Step) -> list[Dispatch]:
    format, group, transposed, _fast = step.ints
    if transposed:
        return linear(Step("linear", step.outputs, step.inputs, (1, format, group, 0, 0, 0, 0), (0.0,)))
    x, *matrix = step.inputs
    return _gather(x, matrix, step.outputs[0], (1, *x.shape), (format, group), across=True)


def gather_mm(step: Step) -> list[Dispatch]:
    format, group = step.ints
    a, *matrix = step.inputs[:1 + parts_of(format)]
    b, indices = matrix[0], step.inputs[-2:]
    across = not format and b.contiguous
    if not format and not across:
        matrix = [_turned(b)]
    if not all(v.contiguous and v.dtype == "int32" for v in indices) or not a.contiguous:
        raise Unsupported("strided matrices, or indices that are not int32")
    shape = (indices[0].shape[0], *a.shape[1:])
    return _gather(a, matrix, step.outputs[0], shape, (format, group), across, indices, a.shape[0])


def _turned(b: View) -> View:
    """(B, K, N) as (B, N, K), of which they are the transposes."""
    def turn(axes: tuple[int, ...]) -> tuple[int, ...]:
        return axes[0], axes[2], axes[1]

    return replace(b, shape=turn(b.shape), strides=turn(b.strides))


def _gather(x: View, matrix: Matrix, y: View, shape: tuple[int, ...], stored: tuple[int, int], across: bool,
            indices: tuple[View, ...] = (), sources: int = 1) -> list[Dispatch]:
    """shape: products, tokens of each, inner size."""
    products, T, K = shape
    N = y.shape[-1]
    if not y.size:
        return []
    check_matrices([matrix])
    if not y.contiguous or K > 1 and x.strides[-1] != 1:
        raise Unsupported("strided activations")
    tokens, rows = shape_of(max(T, FEW + 1) if across else T)
    arguments = {"x": x, "y": y, "p": struct(T, x.strides[-2], 0.0), **named("w scales biases", matrix),
                 **named("lhs rhs", indices), "fault": FAULT}
    return [product("gather", arguments, (ceil(N, rows), ceil(T, tokens), products), (K, N), stored, matrix,
                    tokens=tokens, x=x.type, ACROSS=across, GATHERED=bool(indices), SOURCES=sources,
                    MATRICES=matrix[0].shape[0])]

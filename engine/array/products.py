"""Products of arrays as matrix products: matmul, tensordot, einsum and their relatives."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import ops
from .array import Array
from .dtypes import complex64, promote
from .node import Shape, apply, show
from .operands import array_of, axis_of, broadcast_shapes, cast
from .primitives import TABLE

__all__ = ["addmm", "einsum", "einsum_path", "inner", "kron", "matmul", "outer", "tensordot", "trace", "vecdot"]


def matmul(a: Any, b: Any) -> Array:
    """a (…, M, K) @ b (…, K, N); a 1-D operand is a row on the left and a column on the right, as in NumPy."""
    a, b = array_of(a), array_of(b)
    dtype = promote(a.dtype, b.dtype)
    if not a.ndim or not b.ndim or not dtype.inexact:
        raise ValueError(f"[matmul] {a.dtype}{show(a.shape)} @ {b.dtype}{show(b.shape)}: floats with axes wanted")
    k, n = a.shape[-1], b.shape[-2 if b.ndim > 1 else 0]
    if k != n:
        raise ValueError(f"[matmul] a {show(a.shape)} @ b {show(b.shape)}: inner sizes {k} and {n} differ")
    x = a if a.ndim > 1 else ops.expand_dims(a, 0)
    y = b if b.ndim > 1 else ops.expand_dims(b, 1)
    broadcast_shapes(x.shape[:-2], y.shape[:-2], name="matmul")
    x, y = (Array.of(cast(v._value, dtype)) for v in (x, y))
    out = _complex_matmul(x, y) if dtype is complex64 else _matmul(x, y)
    drop = [-1] * (b.ndim == 1) + [-2] * (a.ndim == 1)
    return ops.squeeze(out, drop) if drop else out


def _matmul(x: Array, y: Array) -> Array:
    return Array.of(apply(TABLE["matmul"], x._value, y._value)[0])


def _complex_matmul(x: Array, y: Array) -> Array:
    """As four real products."""
    (a, b), (c, d) = ((ops.real(v), ops.imag(v)) for v in (x, y))
    return _matmul(a, c) - _matmul(b, d) + 1j * (_matmul(a, d) + _matmul(b, c))


def addmm(c: Any, a: Any, b: Any, alpha: float = 1.0, beta: float = 1.0) -> Array:
    """alpha a @ b + beta c"""
    product = matmul(a, b)
    return (product if alpha == 1.0 else alpha * product) + (c if beta == 1.0 else beta * c)


def tensordot(a: Any, b: Any, axes: int | Sequence[Sequence[int]] = 2) -> Array:
    """The sum of products over pairs of axes: the last of a with the first of b, or those named for each."""
    a, b = array_of(a), array_of(b)
    named = (range(-axes, 0), range(axes)) if isinstance(axes, int) else axes
    if isinstance(axes, int) and axes > min(a.ndim, b.ndim):
        raise ValueError(f"[tensordot] a {show(a.shape)}, b {show(b.shape)}: they have no {axes} axes")
    left, right = ([axis_of("tensordot", i, x.ndim) for i in ([n] if isinstance(n, int) else n)]
                   for x, n in zip((a, b), named, strict=True))
    if [a.shape[i] for i in left] != [b.shape[i] for i in right]:
        raise ValueError(f"[tensordot] axes {show(left)} of a {show(a.shape)} and {show(right)} of b {show(b.shape)}: "
                         "equal sizes wanted")
    free_a, free_b = ([i for i in range(x.ndim) if i not in n] for x, n in ((a, left), (b, right)))
    k = math.prod(a.shape[i] for i in left)
    x = ops.reshape(ops.transpose(a, [*free_a, *left]), (math.prod(a.shape[i] for i in free_a), k))
    y = ops.reshape(ops.transpose(b, [*right, *free_b]), (k, math.prod(b.shape[i] for i in free_b)))
    return ops.reshape(matmul(x, y), (*(a.shape[i] for i in free_a), *(b.shape[i] for i in free_b)))


def inner(a: Any, b: Any) -> Array:
    """Sums of products over the last axes."""
    a, b = array_of(a), array_of(b)
    return tensordot(a, b, [[-1], [-1]]) if a.ndim and b.ndim else a * b


def outer(a: Any, b: Any) -> Array:
    """The products of all pairs: (M, N) of two arrays taken flat."""
    return ops.expand_dims(ops.flatten(array_of(a)), 1) * ops.flatten(array_of(b))


def vecdot(a: Any, b: Any, axis: int = -1) -> Array:
    """The sum over an axis of conj(a) * b."""
    return ops.sum(ops.conjugate(array_of(a)) * b, axis)


def kron(a: Any, b: Any) -> Array:
    """Kronecker's product: blocks a[i, j, …] * b."""
    a, b = array_of(a), array_of(b)
    ndim = max(a.ndim, b.ndim)
    shapes = [(1,) * (ndim - x.ndim) + x.shape for x in (a, b)]
    rows, columns = (ops.reshape(x, tuple(n for s in shape for n in ((1, s) if second else (s, 1))))
                     for x, shape, second in zip((a, b), shapes, (False, True), strict=True))
    return ops.reshape(rows * columns, tuple(m * n for m, n in zip(*shapes, strict=True)))


def trace(a: Any, offset: int = 0, axis1: int = 0, axis2: int = 1, dtype: Any = None) -> Array:
    """The sum of a diagonal."""
    a = array_of(a)
    return ops.sum(ops.diagonal(a if dtype is None else ops.astype(a, dtype), offset, axis1, axis2), -1)


# einsum: two operands at a time, in the order that costs least

def _einsum_terms(subscripts: str, shapes: list[Shape]) -> tuple[list[str], str]:
    """The letters of each operand's axes and of the result's; an ellipsis becomes letters that are not used."""
    text = subscripts.replace(" ", "")
    inputs, arrow, output = text.partition("->")
    terms = inputs.split(",")
    if len(terms) != len(shapes):
        raise ValueError(f"[einsum] {subscripts!r}: {len(terms)} terms for {len(shapes)} arrays")
    spare = [chr(c) for c in range(ord("A"), ord("z") + 1) if chr(c).isalpha() and chr(c) not in text]
    dots = [len(s) - len(t.replace("...", "")) if "..." in t else 0 for t, s in zip(terms, shapes, strict=True)]
    batch = "".join(spare[:max(dots)])
    terms = [t.replace("...", batch[len(batch) - n:]) for t, n in zip(terms, dots, strict=True)]
    if not arrow:
        letters = sorted(set("".join(terms)) - set(batch))
        output = "..." + "".join(c for c in letters if "".join(terms).count(c) == 1)
    output = output.replace("...", batch)
    for term, shape in zip(terms, shapes, strict=True):
        if len(term) != len(shape):
            raise ValueError(f"[einsum] {subscripts!r}: {len(term)} letters for an array of shape {show(shape)}")
    if len(set(output)) != len(output) or not set(output) <= set("".join(terms)):
        raise ValueError(f"[einsum] {subscripts!r}: each letter of the result once, and in some term, wanted")
    return terms, output


def _sizes(subscripts: str, terms: list[str], shapes: list[Shape]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, size in zip(term, shape, strict=True):
            if size != 1 and sizes.get(letter, 1) not in (1, size):
                raise ValueError(f"[einsum] {subscripts!r}: '{letter}' has sizes {sizes[letter]} and {size}")
            sizes[letter] = size if sizes.get(letter, 1) == 1 else sizes[letter]
    return sizes


def _simple(a: Array, term: str, sizes: dict[str, int]) -> tuple[Array, str]:
    """Without letters that are repeated (their diagonal) and without axes of size 1 that stand for more."""
    while (twice := next((c for c in term if term.count(c) > 1), "")):
        i, j = term.index(twice), term.rindex(twice)
        a = ops.diagonal(a, 0, i, j)
        term = term[:i] + term[i + 1:j] + term[j + 1:] + twice
    drop = [i for i, c in enumerate(term) if a.shape[i] == 1 and sizes[c] != 1]
    return ops.squeeze(a, drop) if drop else a, "".join(c for i, c in enumerate(term) if i not in drop)


def _contract(x: tuple[Array, str], y: tuple[Array, str], needed: str) -> tuple[Array, str]:
    """The product of two operands, summed over the letters that nobody needs any more."""
    (a, left), (b, right) = (_summed(*pair, needed + other) for pair, other in ((x, y[1]), (y, x[1])))
    shared = [c for c in left if c in right]
    batch, over = [c for c in shared if c in needed], [c for c in shared if c not in needed]
    rows, columns = [c for c in left if c not in shared], [c for c in right if c not in shared]
    size = dict(zip(left, a.shape, strict=True)) | dict(zip(right, b.shape, strict=True))
    a, b = _ordered(a, left, [*batch, *rows, *over]), _ordered(b, right, [*batch, *over, *columns])
    lead, m, k, n = [size[c] for c in batch], *(math.prod(size[c] for c in part) for part in (rows, over, columns))
    a, b = ops.reshape(a, (*lead, m, k)), ops.reshape(b, (*lead, k, n))
    out = matmul(a, b) if over else a * b
    letters = [*batch, *rows, *columns]
    return ops.reshape(out, tuple(size[c] for c in letters)), "".join(letters)


def _summed(a: Array, term: str, needed: str) -> tuple[Array, str]:
    drop = [i for i, c in enumerate(term) if c not in needed]
    return ops.sum(a, drop) if drop else a, "".join(c for c in term if c in needed)


def _ordered(a: Array, term: str, letters: Sequence[str]) -> Array:
    return ops.transpose(a, [term.index(c) for c in letters])


def _path(subscripts: str, shapes: list[Shape]) -> tuple[list[Any], str]:
    stand_ins = [np.broadcast_to(np.float32(0), shape) for shape in shapes]
    path, description = np.einsum_path(subscripts, *stand_ins, optimize="greedy")
    return path[1:], description


def einsum_path(subscripts: str, *operands: Array) -> tuple[list[tuple[int, ...]], str]:
    """Which operands einsum multiplies at each step, and a table of what that costs."""
    return _path(subscripts, [array_of(a).shape for a in operands])


def einsum(subscripts: str, *operands: Any) -> Array:
    """Einstein's summation: letters name axes, and those that the result lacks are summed over."""
    arrays = [array_of(a) for a in operands]
    shapes = [a.shape for a in arrays]
    terms, output = _einsum_terms(subscripts, shapes)
    sizes = _sizes(subscripts, terms, shapes)
    parts = [_simple(a, t, sizes) for a, t in zip(arrays, terms, strict=True)]
    steps = _path(f"{','.join(terms)}->{output}", shapes)[0] if len(parts) > 2 else [range(len(parts))]
    for step in steps:
        taken = [parts.pop(i) for i in sorted(step, reverse=True)][::-1]
        needed = output + "".join(t for _, t in parts)
        for i in range(1, len(taken)):
            later = "".join(t for _, t in taken[i + 1:])
            taken[i] = _contract(taken[i - 1], taken[i], needed + later)
        parts.append(_summed(*taken[-1], needed))
    result, term = parts[0]
    return _ordered(result, term, output)

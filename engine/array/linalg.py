"""mx.linalg: matrices are the last two axes, those before them a batch. LAPACK comes with NumPy; what it solves is a
host step, everything else a composition. Derivatives: Giles, "Collected matrix derivative results" (2008); Townsend,
"Differentiating the singular value decomposition" (2016); Walter and Lehmann, "Algorithmic differentiation of linear
algebra functions" (2010) for QR. They hold where factors are unique: full rank, distinct (singular) values."""
from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from . import ops
from .array import Array
from .dtypes import Dtype, complex64, float32, float64, promote, uint32
from .host import host
from .node import Aval, Shape, Value, apply, show
from .operands import array_of, axes_of, axis_of, broadcast_shapes
from .primitives import batch_all

__all__ = ["cholesky", "cholesky_inv", "cross", "det", "eig", "eigh", "eigvals", "eigvalsh", "inv", "lu", "lu_factor",
           "norm", "pinv", "qr", "slogdet", "solve", "solve_triangular", "svd", "tri_inv"]


# rows

def _solver(name: str, rule: Callable[..., list[Aval]], fn: Callable[..., Any],
            vjp: Callable[..., list[Array | None]] | None = None) -> Callable[..., list[Array]]:
    """A host row for batches of matrices, as a function of Arrays of one batch shape."""
    def solved(*arrays: np.ndarray, **params: Any) -> Any:
        try:
            return fn(*arrays, **params)
        except np.linalg.LinAlgError as error:
            shapes = ", ".join(f"{a.dtype}{a.shape}" for a in arrays)
            raise ValueError(f"[{name}] {shapes}: {str(error).lower()}") from None

    def op(*xs: Array, **params: Any) -> list[Array]:
        return [Array.of(v) for v in apply(primitive, *(x._value for x in xs), **params)]

    primitive = host(name, rule, solved, vjp=vjp,
                     vmap=lambda xs, batched, **params: op(*batch_all(xs, batched), **params))
    return op


def _matrices(name: str, a: Any, square: bool = False) -> Array:
    a = array_of(a)
    if a.dtype not in (float32, float64, complex64):
        raise ValueError(f"[{name}] {a.dtype}{show(a.shape)}: float32, float64 or complex64 wanted")
    if a.ndim < 2 or (square and a.shape[-1] != a.shape[-2]):
        wanted = "square matrices (…, N, N)" if square else "matrices (…, M, N)"
        raise ValueError(f"[{name}] {show(a.shape)}: {wanted} wanted")
    return a


def _real(dtype: Dtype) -> Dtype:
    return float32 if dtype is complex64 else dtype


def _adjoint(a: Array) -> Array:
    """The conjugate transpose."""
    return ops.conjugate(ops.swapaxes(a, -1, -2)) if a.dtype is complex64 else ops.swapaxes(a, -1, -2)


def _diagonal(values: Array) -> Array:
    """The matrices with these diagonals."""
    mask = Array(np.eye(values.shape[-1], dtype=bool))
    return ops.where(mask, ops.expand_dims(values, -1), ops.zeros((), values.dtype))


def _same(x: Value, *_: Value, **params: Any) -> list[Aval]:
    return [(x.shape, x.dtype)]


def _scipy() -> Any:
    try:
        return importlib.import_module("scipy.linalg")
    except ImportError:
        raise ImportError("[linalg] LU factors need SciPy: pip install scipy") from None


def _inv_vjp(cts: list[Array], xs: list[Array], ys: list[Array]) -> list[Array | None]:
    return [-_adjoint(ys[0]) @ cts[0] @ _adjoint(ys[0])]


def _solve_vjp(cts: list[Array], xs: list[Array], ys: list[Array]) -> list[Array | None]:
    gradient = _solve(_adjoint(xs[0]), cts[0])[0]
    return [-gradient @ _adjoint(ys[0]), gradient]


def _slogdet_vjp(cts: list[Array], xs: list[Array], ys: list[Array]) -> list[Array | None]:
    return [cts[1][..., None, None] * _adjoint(_inv(xs[0])[0])]


def _symmetric(a: Array) -> Array:
    return 0.5 * (a + _adjoint(a))


def _half_lower(a: Array) -> Array:
    """The lower triangle, the diagonal halved."""
    return 0.5 * (ops.tril(a) + ops.tril(a, -1))


def _cholesky_vjp(cts: list[Array], xs: list[Array], ys: list[Array]) -> list[Array | None]:
    factor = _inv(ys[0])[0]
    return [_symmetric(_adjoint(factor) @ _half_lower(_adjoint(ys[0]) @ cts[0]) @ factor)]


def _reciprocal_gaps(values: Array) -> Array:
    """1 / (v_j - v_i), and 0 on the diagonal and for equal values."""
    gaps = values[..., None, :] - values[..., :, None]
    return ops.where(gaps == 0, 0, 1 / ops.where(gaps == 0, 1, gaps))


def _eigh_vjp(cts: list[Array], xs: list[Array], ys: list[Array], lower: bool) -> list[Array | None]:
    (g_w, g_v), (w, v) = cts, ys
    inner = _diagonal(ops.astype(g_w, v.dtype)) + _adjoint(v) @ g_v * _reciprocal_gaps(w)
    return [_symmetric(v @ inner @ _adjoint(v))]


def _eigvalsh_vjp(cts: list[Array], xs: list[Array], ys: list[Array], lower: bool) -> list[Array | None]:
    v = _eigh(xs[0], lower=lower)[1]
    return [(v * cts[0][..., None, :]) @ _adjoint(v)]


def _svd_vjp(cts: list[Array], xs: list[Array], ys: list[Array]) -> list[Array | None]:
    """Of the reduced factors: what belongs to no singular value gets no gradient."""
    k = ys[1].shape[-1]
    u, s, v = ys[0][..., :k], ys[1], _adjoint(ys[2])[..., :k]
    g_u, g_v = cts[0][..., :k], _adjoint(cts[2])[..., :k]
    gaps, wide = _reciprocal_gaps(ops.square(s)), s[..., None, :]
    a, b = _adjoint(u) @ g_u, _adjoint(v) @ g_v
    inner = (a - _adjoint(a)) * gaps * wide + s[..., :, None] * ((b - _adjoint(b)) * gaps)
    inner = inner + _diagonal(ops.astype(cts[1], u.dtype))
    rest_u, rest_v = (g_u - u @ a) / wide, (g_v - v @ b) / wide
    return [(u @ inner + rest_u) @ _adjoint(v) + u @ _adjoint(rest_v)]


def _svdvals_vjp(cts: list[Array], xs: list[Array], ys: list[Array]) -> list[Array | None]:
    k = ys[0].shape[-1]
    u, _, vt = _svd(xs[0])
    return [(u[..., :k] * cts[0][..., None, :]) @ vt[..., :k, :]]


def _qr_vjp(cts: list[Array], xs: list[Array], ys: list[Array]) -> list[Array | None]:
    """Where there are more columns than rows, the first ones give Q, and the others are Q R'."""
    (g_q, g_r), (q, r), k = cts, ys, ys[0].shape[-1]
    rest = g_r[..., k:]
    g_q = g_q + xs[0][..., k:] @ _adjoint(rest)
    m = r[..., :k] @ _adjoint(g_r[..., :k]) - _adjoint(g_q) @ q
    mirrored = ops.tril(m) + _adjoint(ops.tril(m, -1))
    first = _adjoint(_solve(r[..., :k], _adjoint(g_q + q @ mirrored))[0])
    return [ops.concatenate([first, q @ rest], -1)]


def _pinv_vjp(cts: list[Array], xs: list[Array], ys: list[Array]) -> list[Array | None]:
    """Golub and Pereyra (1973), for constant rank."""
    a, p, g, g_h = xs[0], ys[0], cts[0], _adjoint(cts[0])
    p_h = _adjoint(p)
    left, right = g_h - a @ (p @ g_h), g_h - (g_h @ p) @ a
    return [-p_h @ g @ p_h + left @ p @ p_h + p_h @ p @ right]


def _svd_rule(x: Value) -> list[Aval]:
    *batch, m, n = x.shape
    return [((*batch, m, m), x.dtype), ((*batch, min(m, n)), _real(x.dtype)), ((*batch, n, n), x.dtype)]


def _qr_rule(x: Value) -> list[Aval]:
    *batch, m, n = x.shape
    return [((*batch, m, min(m, n)), x.dtype), ((*batch, min(m, n), n), x.dtype)]


def _lu_rule(x: Value) -> list[Aval]:
    *batch, m, n = x.shape
    return [((*batch, m), uint32), ((*batch, m, min(m, n)), x.dtype), ((*batch, min(m, n), n), x.dtype)]


def _lu_factor_rule(x: Value) -> list[Aval]:
    return [(x.shape, x.dtype), ((*x.shape[:-2], min(x.shape[-2:])), uint32)]


def _lu_parts(x: np.ndarray) -> tuple[np.ndarray, ...]:
    *batch, m, n = x.shape
    if not x.size:                                         # SciPy mistakes the shapes
        return np.broadcast_to(np.arange(m), (*batch, m)), np.eye(m, min(m, n)), np.zeros((min(m, n), n))
    return _scipy().lu(x, p_indices=True)


def _lu_factors(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SciPy factors one matrix at a time."""
    pairs = [_scipy().lu_factor(m) for m in x.reshape(-1, *x.shape[-2:])]
    pivots = (*x.shape[:-2], min(x.shape[-2:]))
    return np.reshape([f for f, _ in pairs], x.shape), np.reshape([p for _, p in pairs], pivots)


def _values_rule(dtype: Callable[[Dtype], Dtype]) -> Callable[..., list[Aval]]:
    return lambda x, **_: [(x.shape[:-1], dtype(x.dtype))]


def _uplo(lower: bool) -> Literal["L", "U"]:
    return "L" if lower else "U"


def _rank_cutoff(x: np.ndarray) -> float:
    return max(x.shape[-2:]) * float(np.finfo(x.dtype).eps)


_inv = _solver("inv", _same, np.linalg.inv, _inv_vjp)
_solve = _solver("solve", lambda a, b: [(b.shape, b.dtype)], np.linalg.solve, _solve_vjp)
_slogdet = _solver("slogdet", lambda x: [(x.shape[:-2], x.dtype), (x.shape[:-2], _real(x.dtype))],
                   lambda x: tuple(np.linalg.slogdet(x)), _slogdet_vjp)
_cholesky = _solver("cholesky", _same, np.linalg.cholesky, _cholesky_vjp)
_eigh = _solver("eigh", lambda x, lower: [(x.shape[:-1], _real(x.dtype)), (x.shape, x.dtype)],
                lambda x, lower: tuple(np.linalg.eigh(x, _uplo(lower))), _eigh_vjp)
_eigvalsh = _solver("eigvalsh", _values_rule(_real), lambda x, lower: np.linalg.eigvalsh(x, _uplo(lower)),
                    _eigvalsh_vjp)
_eig = _solver("eig", lambda x: [(x.shape[:-1], complex64), (x.shape, complex64)], lambda x: tuple(np.linalg.eig(x)))
_eigvals = _solver("eigvals", _values_rule(lambda _: complex64), np.linalg.eigvals)
_svd = _solver("svd", _svd_rule, lambda x: tuple(np.linalg.svd(x)), _svd_vjp)
_svdvals = _solver("svdvals", lambda x: [((*x.shape[:-2], min(x.shape[-2:])), _real(x.dtype))],
                   lambda x: np.linalg.svd(x, compute_uv=False), _svdvals_vjp)
_qr = _solver("qr", _qr_rule, lambda x: tuple(np.linalg.qr(x)), _qr_vjp)
_pinv = _solver("pinv", lambda x: [((*x.shape[:-2], x.shape[-1], x.shape[-2]), x.dtype)],
                lambda x: np.linalg.pinv(x, _rank_cutoff(x)), _pinv_vjp)
_lu = _solver("lu", _lu_rule, _lu_parts)
_lu_factor = _solver("lu_factor", _lu_factor_rule, _lu_factors)


# functions

def inv(a: Any) -> Array:
    """The inverses of square matrices. Raises at evaluation where one is singular."""
    return _inv(_matrices("inv", a, square=True))[0]


def pinv(a: Any) -> Array:
    """Moore and Penrose's pseudo-inverses (…, N, M) of (…, M, N)."""
    return _pinv(_matrices("pinv", a))[0]


def solve(a: Any, b: Any) -> Array:
    """x such that a (…, N, N) @ x = b: (N) or (…, N, K)."""
    a, b = _matrices("solve", a, square=True), array_of(b)
    n, columns = a.shape[-1], ops.expand_dims(b, 1) if b.ndim == 1 else b
    if not b.ndim or columns.shape[-2] != n:
        raise ValueError(f"[solve] a {show(a.shape)}, b {show(b.shape)}: b (N) or (…, N, K) with N = {n} wanted")
    batch = broadcast_shapes(a.shape[:-2], columns.shape[:-2], name="solve")
    columns = ops.broadcast_to(columns, (*batch, *columns.shape[-2:]))
    dtype = promote(a.dtype, columns.dtype)
    x = _solve(ops.astype(ops.broadcast_to(a, (*batch, n, n)), dtype), ops.astype(columns, dtype))[0]
    return ops.squeeze(x, -1) if b.ndim == 1 else x


def solve_triangular(a: Any, b: Any, *, upper: bool = False) -> Array:
    """solve with one triangle of a; the other is not read."""
    a = _matrices("solve_triangular", a, square=True)
    return solve(ops.triu(a) if upper else ops.tril(a), b)


def tri_inv(a: Any, upper: bool = False) -> Array:
    """The inverses of triangular matrices; the other triangle is not read."""
    a = _matrices("tri_inv", a, square=True)
    return inv(ops.triu(a) if upper else ops.tril(a))


def cholesky(a: Any, upper: bool = False) -> Array:
    """L with L Lᴴ = a (upper: U with Uᴴ U = a) of Hermitian positive definite matrices; the lower triangle is read."""
    factor = _cholesky(_matrices("cholesky", a, square=True))[0]
    return _adjoint(factor) if upper else factor


def cholesky_inv(a: Any, upper: bool = False) -> Array:
    """The inverses of matrices whose Cholesky factors are given."""
    factor = tri_inv(_adjoint(_matrices("cholesky_inv", a, square=True)) if upper else a)
    return _adjoint(factor) @ factor


def det(a: Any) -> Array:
    a = array_of(a)
    sign, logarithm = slogdet(a)
    return sign * ops.exp(logarithm)


def slogdet(a: Any) -> tuple[Array, Array]:
    """Sign and logarithm of the magnitude of the determinants: 0 and -inf of singular matrices."""
    a = array_of(a)
    a = a if a.dtype in (float64, complex64) else ops.astype(a, float32)
    sign, logarithm = _slogdet(_matrices("slogdet", a, square=True))
    return sign, logarithm


def eigh(a: Any, UPLO: str = "L") -> tuple[Array, Array]:
    """Eigenvalues, ascending, and eigenvectors (columns) of Hermitian matrices, of which one triangle is read."""
    w, v = _eigh(_matrices("eigh", a, square=True), lower=_is_lower("eigh", UPLO))
    return w, v


def eigvalsh(a: Any, UPLO: str = "L") -> Array:
    """Eigenvalues, ascending, of Hermitian matrices, of which one triangle is read."""
    return _eigvalsh(_matrices("eigvalsh", a, square=True), lower=_is_lower("eigvalsh", UPLO))[0]


def _is_lower(name: str, uplo: str) -> bool:
    if uplo not in ("L", "U"):
        raise ValueError(f'[{name}] UPLO {uplo!r}: "L" or "U" wanted')
    return uplo == "L"


def eig(a: Any) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors (columns, of norm 1), complex64, in no order."""
    w, v = _eig(_matrices("eig", a, square=True))
    return w, v


def eigvals(a: Any) -> Array:
    """Eigenvalues, complex64, in no order."""
    return _eigvals(_matrices("eigvals", a, square=True))[0]


def svd(a: Any, compute_uv: bool = True) -> Any:
    """U (…, M, M), S descending (…, min(M, N)), Vᴴ (…, N, N), or S alone."""
    a = _matrices("svd", a)
    return tuple(_svd(a)) if compute_uv else _svdvals(a)[0]


def qr(a: Any) -> tuple[Array, Array]:
    """Q (…, M, K) with orthonormal columns and R (…, K, N) upper triangular, K = min(M, N): Q R = a."""
    q, r = _qr(_matrices("qr", a))
    return q, r


def lu(a: Any) -> tuple[Array, Array, Array]:
    """P (row numbers, uint32), L and U such that a = L[P, :] @ U."""
    p, lower, upper = _lu(_matrices("lu", a))
    return p, lower, upper


def lu_factor(a: Any) -> tuple[Array, Array]:
    """L below the diagonal and U in one matrix, and LAPACK's pivots from 0 on: row i was swapped with row pivots[i]."""
    factors, pivots = _lu_factor(_matrices("lu_factor", a))
    return factors, pivots


def cross(a: Any, b: Any, axis: int = -1) -> Array:
    """The cross product along an axis of size 3, or 2 where the third component is zero."""
    a, b = array_of(a), array_of(b)
    if not {x.shape[axis_of("cross", axis, x.ndim)] for x in (a, b)} <= {2, 3}:
        raise ValueError(f"[cross] a {show(a.shape)}, b {show(b.shape)}: sizes 2 or 3 along axis {axis} wanted")
    (a1, a2, a3), (b1, b2, b3) = (_components(x, axis) for x in (a, b))
    parts = ops.broadcast_arrays(a2 * b3 - a3 * b2, a3 * b1 - a1 * b3, a1 * b2 - a2 * b1)
    return ops.stack(parts, axis_of("cross", axis, parts[0].ndim + 1))


def _components(a: Array, axis: int) -> list[Any]:
    parts = [ops.take(a, i, axis) for i in range(a.shape[axis])]
    return parts if len(parts) == 3 else [*parts, ops.zeros_like(parts[0])]


def norm(a: Any, /, ord: float | str | None = None, axis: int | list[int] | tuple[int, ...] | None = None,
         keepdims: bool = False) -> Array:
    """Vector norms along one axis, matrix norms along two; ord as in numpy.linalg.norm."""
    a = array_of(a)
    a = a if a.dtype.inexact else ops.astype(a, float32)
    if ord is None or axis is None:
        axes = axes_of("norm", axis, a.ndim)
    else:
        axes = tuple(axis_of("norm", i, a.ndim) for i in ([axis] if isinstance(axis, int) else axis))
    if ord is not None and any(a.shape[i] == 0 for i in axes):
        return ops.sum(ops.abs(a), axes, keepdims)         # nothing to compare: 0, as in NumPy
    if ord is None:
        return ops.sqrt(ops.sum(_squared(a), axes, keepdims))
    if len(axes) not in (1, 2):
        raise ValueError(f"[norm] ord {ord!r} along axes {show(axes)}: one axis (vectors) or two (matrices) wanted")
    return _vector_norm(a, ord, axes[0], keepdims) if len(axes) == 1 else _matrix_norm(a, ord, axes, keepdims)


def _squared(a: Array) -> Array:
    """|a|², real."""
    return ops.square(ops.real(a)) + ops.square(ops.imag(a)) if a.dtype is complex64 else ops.square(a)


def _vector_norm(a: Array, order: float | str, axis: int, keepdims: bool) -> Array:
    if isinstance(order, str):
        raise ValueError(f"[norm] ord {order!r} of vectors: a number wanted")
    if math.isinf(order):
        return (ops.max if order > 0 else ops.min)(ops.abs(a), axis, keepdims)
    if order == 0:
        return ops.sum(ops.astype(a != 0, _real(a.dtype)), axis, keepdims)
    if order == 1:
        return ops.sum(ops.abs(a), axis, keepdims)
    if order == 2:
        return ops.sqrt(ops.sum(_squared(a), axis, keepdims))
    return ops.sum(ops.abs(a) ** order, axis, keepdims) ** (1 / order)


def _matrix_norm(a: Array, order: float | str, axes: Shape, keepdims: bool) -> Array:
    if order in ("fro", "f"):
        return ops.sqrt(ops.sum(_squared(a), axes, keepdims))
    if order in (1, -1, math.inf, -math.inf):
        inner, outer = axes if order in (1, -1) else axes[::-1]
        best = ops.max if order > 0 else ops.min  # type: ignore[operator]
        out = best(ops.sum(ops.abs(a), inner, keepdims=True), outer, keepdims=True)
    elif order in ("nuc", 2, -2):
        rest = [i for i in range(a.ndim) if i not in axes]
        values = svd(ops.transpose(a, [*rest, *axes]), compute_uv=False)
        out = ops.sum(values, -1) if order == "nuc" else ops.max(values, -1) if order == 2 else ops.min(values, -1)
        out = ops.expand_dims(out, axes)
    else:
        raise ValueError(f"[norm] ord {order!r} of matrices: 'fro', 'nuc', inf, -inf, 1, -1, 2 or -2 wanted")
    return out if keepdims else ops.squeeze(out, axes)

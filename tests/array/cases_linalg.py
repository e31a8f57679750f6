"""Linear algebra. What is unique up to signs is squared."""
from __future__ import annotations

import numpy as np
import scipy.linalg
from cases import Case

from lazulite.engine import array as mx

A, S = (2, 3, 3), (3, 3)
E = np.eye(3) * 4
la, np_la = mx.linalg, np.linalg


def symmetric(x):
    return x + x.swapaxes(-1, -2)


def positive(x):
    return x @ x.swapaxes(-1, -2) + (mx.array(E, x.dtype) if isinstance(x, mx.array) else E)


def regular(x):
    """Far from singular."""
    return x + (mx.array(E, x.dtype) if isinstance(x, mx.array) else E)


def row(name, fn, reference, shape=A, **options) -> Case:
    return Case(f"linalg {name}", fn, reference, shape if isinstance(shape[0], tuple) else (shape,),
                **{"half": False, "tolerance": 3e-5} | options)


def norms(order, axis=None, shape=(3, 4)):
    return row(f"norm {order} {axis} {shape}", lambda x: la.norm(x, order, axis),
               lambda x: np_la.norm(x, order, axis), shape, grad=order != 0)


def squares(parts):
    """Eigenvalues, and eigenvectors without their signs."""
    w, v = parts
    return w, v * v


def svd_parts(parts):
    """The unique part: singular values and the squares of their vectors."""
    u, s, vt = parts
    k = s.shape[-1]
    return u[..., :k] ** 2, s, vt[..., :k, :] ** 2


def lu_reference(x):
    if not x.size:
        raise ValueError("SciPy mistakes the shapes of empty matrices")
    return tuple(scipy.linalg.lu(x, p_indices=True))


CASES = [
    row("inv", lambda x: la.inv(regular(x)), lambda x: np_la.inv(regular(x))),
    row("tri_inv", lambda x: la.tri_inv(regular(x)), lambda x: np_la.inv(np.tril(regular(x)))),
    row("tri_inv upper", lambda x: la.tri_inv(regular(x), upper=True), lambda x: np_la.inv(np.triu(regular(x)))),
    *(row(f"pinv {m} {n}", la.pinv, np_la.pinv, (2, m, n), tolerance=2e-4) for m, n in ((4, 2), (2, 4))),
    row("solve", lambda a, b: la.solve(regular(a), b), lambda a, b: np_la.solve(regular(a), b), (A, (3, 2))),
    row("solve one", lambda a, b: la.solve(regular(a), b), lambda a, b: np_la.solve(regular(a), b[:, None])[..., 0],
        (S, (3,)), vmap=False),
    row("solve_triangular", lambda a, b: la.solve_triangular(regular(a), b),
        lambda a, b: np_la.solve(np.tril(regular(a)), b), (A, (3, 2))),
    row("solve_triangular upper", lambda a, b: la.solve_triangular(regular(a), b, upper=True),
        lambda a, b: np_la.solve(np.triu(regular(a)), b), (A, (3, 2))),
    row("cholesky", lambda x: la.cholesky(positive(x)), lambda x: np_la.cholesky(positive(x))),
    row("cholesky upper", lambda x: la.cholesky(positive(x), upper=True),
        lambda x: np_la.cholesky(positive(x)).swapaxes(-1, -2)),
    row("cholesky_inv", lambda x: la.cholesky_inv(la.cholesky(positive(x))), lambda x: np_la.inv(positive(x))),
    row("cholesky_inv upper", lambda x: la.cholesky_inv(la.cholesky(positive(x), upper=True), upper=True),
        lambda x: np_la.inv(positive(x))),
    row("det", la.det, np_la.det), row("slogdet", la.slogdet, lambda x: tuple(np_la.slogdet(x))),
    row("eigh", lambda x: squares(la.eigh(symmetric(x))), lambda x: squares(np_la.eigh(symmetric(x)))),
    row("eigvalsh", lambda x: la.eigvalsh(symmetric(x)), lambda x: np_la.eigvalsh(symmetric(x))),
    row("eigvalsh upper", lambda x: la.eigvalsh(x, "U"), lambda x: np_la.eigvalsh(x, "U"), grad=False),
    row("eig", lambda x: mx.sort(mx.real(la.eig(symmetric(x))[0])), lambda x: np_la.eigvalsh(symmetric(x)), grad=False),
    row("eig is a decomposition", lambda x: (lambda w, v: mx.real((v * w[..., None, :]) @ la.inv(v)))(*la.eig(x)),
        lambda x: x, grad=False, tolerance=1e-3),
    row("eigvals", lambda x: mx.sort(mx.real(la.eigvals(x))), lambda x: np.sort(np_la.eigvals(x).real), grad=False),
    *(row(f"svd {m} {n}", lambda x: svd_parts(la.svd(x)), lambda x: svd_parts(np_la.svd(x)), (2, m, n), tolerance=2e-4)
      for m, n in ((3, 3), (4, 2), (2, 4))),
    row("svd values", lambda x: la.svd(x, compute_uv=False), lambda x: np_la.svd(x, compute_uv=False), (2, 4, 3)),
    *(row(f"qr {m} {n}", la.qr, lambda x: tuple(np_la.qr(x)), (2, m, n), tolerance=2e-4)
      for m, n in ((3, 3), (4, 2), (2, 4))),
    *(row(f"lu {m} {n}", la.lu, lu_reference, (2, m, n), grad=False) for m, n in ((3, 3), (4, 2), (2, 4))),
    row("lu_factor", la.lu_factor, lambda x: scipy.linalg.lu_factor(x), S, grad=False),
    row("cross", la.cross, np.cross, (A, (3,))),
    row("cross of planes", la.cross, 
        lambda a, b: np.cross(*(np.pad(x, ((0, 0), (0, 1))) for x in (a, b))), ((4, 2), (4, 2))),
    row("cross axis", lambda a, b: la.cross(a, b, axis=1), lambda a, b: np.cross(a, b, axis=1), ((2, 3, 2), (2, 3, 2))),
    norms(None), norms(None, 1), norms(None, (0, 2), A), norms("fro"), norms("nuc"), norms(2), norms(-2, (2, 0), A),
    *(norms(order, axis) for order in (1, -1, np.inf, -np.inf) for axis in (None, 0)),
    *(norms(order, 1) for order in (0, 2, 3, 0.5)), norms(1, (2, 1), A),
]

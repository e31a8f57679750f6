"""Compositions: products, diagonals, windows and the other names of mlx.core that are made of ops."""
from __future__ import annotations

import mlx.core as mlx
import numpy as np
from cases import Case, Input

from lazulite.engine import array as mx

A, B = (3, 4), (2, 3, 4)
BOOLS, INTS = Input(A, "bool"), Input(A, "int", -3, 4)
SPECIAL = np.array([np.nan, np.inf, -np.inf, 1.5, -0.0])


def same(name: str, *args, given=(B,), **options) -> Case:
    """A function that NumPy has under the same name."""
    fn, reference = getattr(mx, name), getattr(np, name)
    extra = [k for k in ("grad", "half", "vmap", "tolerance") if k in options]
    columns = {k: options.pop(k) for k in extra}
    shapes = [i if isinstance(i, tuple) else i.kind for i in given] if given != (B,) else []
    label = " ".join(str(v) for v in (name, *args, *options.values(), *shapes))
    return Case(label, lambda *xs: fn(*xs, *args, **options), lambda *xs: reference(*xs, *args, **options), given,
                **columns)


def einsum(text: str, *shapes) -> Case:
    return Case(f"einsum {text}", lambda *xs: mx.einsum(text, *xs), lambda *xs: np.einsum(text, *xs), shapes)


def specials(name: str, fn, reference, **options) -> Case:
    return Case(name, lambda x: fn(x * mx.array(SPECIAL, x.dtype)), lambda x: reference(x * SPECIAL),
                (Input((5,), "positive"),), grad=False, **options)


def fp8_reference(x):
    grid = np.array([0, *(m * 2.0**-9 for m in range(1, 8)), *((8 + m) * 2.0 ** (e - 10) for e in range(1, 16)
                                                              for m in range(8) if (e, m) != (15, 7))])
    return np.copysign(grid[np.argmin(np.abs(np.abs(x)[..., None] - grid), -1)], x)


CASES = [
    # elementwise
    *(Case(name, getattr(mx, name), getattr(np, f"arc{name[1:]}"), (Input(A, "unit"),))
      for name in ("acos", "asin", "atan", "asinh", "atanh")),
    Case("acosh", lambda x: mx.acosh(x + 1), lambda x: np.arccosh(x + 1), (Input(A, "positive"),)),
    Case("pow", mx.pow, np.power, (Input(A, "positive"), A)), Case("atan2", mx.atan2, np.arctan2, (A, A)),
    Case("bitwise shifts", lambda a, b: (mx.bitwise_left_shift(a, b), mx.bitwise_right_shift(a, b)),
         lambda a, b: (a << b, a >> b), (Input(A, "int"), Input(A, "int"))),
    same("degrees", given=(A,)), same("radians", given=(A,)), same("trunc", given=(A,)), same("positive", given=(A,)),
    same("logical_xor", given=(BOOLS, BOOLS)),
    same("real", given=(A,)), same("conj", given=(A,)), same("imag", given=(INTS,)),
    same("count_nonzero", given=(INTS,)), same("count_nonzero", axis=1, given=(INTS,)),
    specials("isposinf", mx.isposinf, np.isposinf), specials("isneginf", mx.isneginf, np.isneginf),
    specials("nan_to_num", lambda x: mx.nan_to_num(x, 2, 3, -4),
             lambda x: np.nan_to_num(x, nan=2, posinf=3, neginf=-4)),
    specials("nan_to_num limits", lambda x: mx.nan_to_num(x) / 2**100, lambda x: np.nan_to_num(
        x.astype(np.float32)).astype(float) / 2**100, half=False),
    Case("clip above", lambda x: mx.clip(x, None, 0.3), lambda x: np.clip(x, None, 0.3), (A,)),
    Case("fp8", lambda x: mx.from_fp8(mx.to_fp8(x * 20), mx.float32), lambda x: fp8_reference(x * 20), (A,), grad=False,
         half=False),

    Case("random", lambda key: mx.random.uniform(shape=(5,), key=key),
         lambda key: np.array(mlx.random.uniform(shape=(5,), key=mlx.array(key.astype(np.uint32)))),
         (Input((2,), "int", 0, 1 << 31, "uint32"),)),

    # places
    same("roll", 3), same("roll", (1, -2), (0, 2)), same("roll", -7, 1), same("roll", (1, 2)),
    same("diagonal"), same("diagonal", 1, 1, 2), same("diagonal", -1, 2, 0), same("diagonal", 9, 0, 1),
    same("trace", given=((4, 3),)), same("trace", -1, 2, 1), same("diag", given=((3,),)), same("diag", 1, given=(A,)),
    same("diag", -2, given=((3,),)), same("atleast_1d", given=((),)), same("atleast_2d", given=((3,),)),
    same("atleast_3d", given=((3,),)), Case("atleast_3d of matrices", mx.atleast_3d, np.atleast_3d, (A,)),
    Case("atleast_2d of two", lambda *xs: tuple(mx.atleast_2d(*xs)), lambda *xs: tuple(np.atleast_2d(*xs)), ((3,), ())),
    *(Case(f"pad {mode}", lambda x, m=mode: mx.pad(x, ((1, 3), (5, 2)), m),
           lambda x, m=mode: np.pad(x, ((1, 3), (5, 2)), m), (A,)) for mode in ("edge", "reflect", "symmetric")),
    Case("pad by one number", lambda x: mx.pad(x, 2), lambda x: np.pad(x, 2), (A,)),
    Case("as_strided", lambda x: mx.as_strided(x, (3, 2, 4), (3, 5, 1), 2),
         lambda x: x[np.array([2, 5, 8])[:, None, None] + np.array([0, 5])[:, None] + np.arange(4)], ((20,),)),
    Case("as_strided backwards", lambda x: mx.as_strided(x, (4,), (-2,), 7), 
         lambda x: x.reshape(-1)[np.arange(7, 0, -2)], (A,)),
    Case("unstack", lambda x: mx.unstack(x, axis=1), lambda x: tuple(np.moveaxis(x, 1, 0)), (B,)),
    Case("meshgrid", lambda *xs: tuple(mx.meshgrid(*xs)), lambda *xs: tuple(np.meshgrid(*xs)), ((2,), (3,), (4,))),
    Case("meshgrid ij sparse", lambda *xs: tuple(mx.meshgrid(*xs, sparse=True, indexing="ij")),
         lambda *xs: tuple(np.meshgrid(*xs, sparse=True, indexing="ij")), ((2,), (3,))),
    Case("matrix_transpose", mx.matrix_transpose, lambda x: x.swapaxes(-1, -2), (B,)),
    Case("concat", lambda *xs: mx.concat(xs, None), lambda *xs: np.concatenate(xs, None), (A, (2,))),

    # reductions
    same("diff"), same("diff", 2, 1), same("diff", given=(BOOLS,)),

    # products
    same("inner", given=(B, (5, 4))), same("inner", given=((), A)), same("kron", given=(A, (2, 2))),
    same("kron", given=((3,), (2, 2))), same("tensordot", given=(B, (3, 4, 5))),
    same("tensordot", 1, given=(A, (4, 2))), same("tensordot", ((0, 2), (1, 0)), given=(B, (4, 2, 3))),
    same("tensordot", 0, given=((2,), (3,))),
    Case("kron with itself", lambda x: mx.kron(x, x), lambda x: np.kron(x, x), ((2, 3),)),
    Case("vecdot", lambda a, b: mx.vecdot(a, b, axis=1), lambda a, b: np.sum(a * b, 1), (B, B)),
    Case("complex vecdot", mx.vecdot, lambda a, b: np.sum(a.conj() * b, -1), (Input(A, "complex"),) * 2),
    einsum("ij,jk->ik", A, (4, 5)), einsum("bij,bjk->bki", B, (2, 4, 5)), einsum("ij->ji", A),
    einsum("ii->i", (3, 3)), einsum("ii", (3, 3)), einsum("ij,ij->", A, A),
    einsum("i,j->ij", (3,), (4,)), einsum("...ij,...jk", B, (4, 5)),
    einsum("b...i,ki->b...k", B, (5, 4)), einsum("ij,jk,kl->il", A, (4, 5), (5, 2)),
    einsum("ijk,jil->kl", B, (3, 2, 5)),
    einsum("ij,kj,lj->ikl", A, (2, 4), (5, 4)), einsum("ij,j->ij", A, (4,)), einsum("a,b,c->", (2,), (3,), (4,)),
    einsum("...,...->...", B, (4,)), einsum("iij,jk->ik", (3, 3, 4), (4, 2)), einsum("ba,b", (2, 3), (2,)),
    einsum("abc->b", B),
]

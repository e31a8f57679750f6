"""Every row of cases.py and of the cases_*.py beside it: value, gradient, tangent, batch, dtype, layout, compile."""
import importlib
import zlib
from pathlib import Path

import numpy as np
import pytest
from cases import Case, Input

from lazulite.engine import array as mx
from lazulite.engine.array.node import toposort
from lazulite.engine.array.primitives import TABLE
from lazulite.engine.array.transforms import trace

FILES = sorted(path.stem for path in Path(__file__).parent.glob("cases*.py"))
CASES: list[Case] = [case for name in FILES for case in importlib.import_module(name).CASES]
NOT_FROM_OPS = {"argument", "linear", "add_product"}  # a mark of transformations, gone afterwards; made by rewrites
ONLY_KERNELS = {"sample"}                 # ops whose definition is a kernel


def rows_where(holds):
    return pytest.mark.parametrize("case", list(filter(holds, CASES)), ids=lambda case: case.name)


rows = rows_where(lambda case: True)


def draw(case: Case, wide: bool = False) -> list[np.ndarray]:
    """The inputs that the case asks for, float64 or float32."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    return [_draw(rng, i if isinstance(i, Input) else Input(i), wide) for i in case.inputs]


def _draw(rng, given: Input, wide: bool) -> np.ndarray:
    shape, size = given.shape, int(np.prod(given.shape))
    if given.kind == "int":
        return rng.integers(given.low, given.high, shape).astype(given.dtype or "int32")
    if given.kind == "bool":
        return rng.random(shape) < 0.5
    if given.kind == "complex":
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype("complex64")
    x = {"normal": rng.standard_normal, "positive": lambda s: rng.random(s) * 2 + 0.3,
         "unit": lambda s: rng.random(s) * 1.8 - 0.9,
         "distinct": lambda s: (rng.permutation(size) + 0.5).reshape(s) * 4 / max(1, size) - 2}[given.kind](shape)
    return x.astype(given.dtype or ("float64" if wide else "float32"))


def array(x: np.ndarray) -> mx.array:
    return mx.array(x, mx.dtypes.FROM_NUMPY[x.dtype])


def results(value) -> list:
    return list(value) if isinstance(value, tuple | list) else [value]


def references(case: Case, xs) -> list[np.ndarray]:
    wide = {"f": np.float64, "c": np.complex128, "i": np.int64, "u": np.int64, "b": bool}
    with np.errstate(all="ignore"):
        return [np.asarray(r) for r in results(case.reference(*(x.astype(wide[x.dtype.kind]) for x in xs)))]


def close(got, wanted, tolerance: float) -> None:
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    scale = np.max(np.abs(wanted), initial=1.0, where=np.isfinite(wanted)) if wanted.dtype.kind in "fc" else 1.0
    np.testing.assert_allclose(got.astype(wanted.dtype), wanted, rtol=tolerance, atol=tolerance * scale)


@rows
def test_value(case, runtime):
    xs = draw(case)
    if case.name in ONLY_KERNELS and not runtime.kernels & ONLY_KERNELS:
        with pytest.raises(NotImplementedError, match="has no kernel of that name"):
            mx.eval(case.fn(*map(array, xs)))
        return
    mx.eval(got := results(case.fn(*map(array, xs))))
    for g, w in zip(got, references(case, xs), strict=True):
        close(g, w, case.tolerance)


@rows
def test_layouts(case):
    """Strided inputs give what row-major ones give; sizes of 0 give the reference's shapes, where it takes them."""
    xs = draw(case)
    wanted = results(case.fn(*map(array, xs)))
    for g, w in zip(results(case.fn(*map(strided, xs))), wanted, strict=True):
        close(g, w, 1e-6)
    for size in {s for x in xs for s in x.shape if case.empty}:
        empty = [x[tuple(slice(0) if s == size else slice(None) for s in x.shape)] for x in xs]
        try:
            shapes = [r.shape for r in references(case, empty)]
        except (ValueError, IndexError, ZeroDivisionError):
            continue
        got = results(case.fn(*map(array, empty)))
        mx.eval(got)
        assert [g.shape for g in got] == shapes


def strided(x: np.ndarray) -> mx.array:
    """The elements backwards in memory, with gaps."""
    gaps = np.zeros(tuple(2 * s for s in x.shape), x.dtype)
    every = tuple(slice(None, None, -2) for _ in x.shape)
    gaps[every] = x
    return array(gaps)[every]


@rows_where(lambda case: case.half)
def test_dtypes(case):
    """16-bit floats stay what they are where float32 did."""
    xs = [array(x) for x in draw(case)]
    wanted = [r.dtype for r in results(case.fn(*xs))]
    for half in (mx.float16, mx.bfloat16):
        got = results(case.fn(*(x.astype(half) if x.dtype is mx.float32 else x for x in xs)))
        mx.eval(got)
        floats = any(x.dtype is mx.float32 for x in xs)
        assert [g.dtype for g in got] == [half if d is mx.float32 and floats else d for d in wanted]


@rows
def test_compiled(case):
    xs = [array(x) for x in draw(case)]
    for g, w in zip(results(mx.compile(case.fn)(*xs)), results(case.fn(*xs)), strict=True):
        close(g, w, 1e-6)


def dot(a, b) -> float:
    """The real inner product, as gradients of complex arrays mean it."""
    return float(np.sum(np.real(np.conj(np.asarray(a, complex)) * np.asarray(b, complex))))


def normal(rng, like: np.ndarray) -> np.ndarray:
    return rng.standard_normal(like.shape) + (1j * rng.standard_normal(like.shape) if like.dtype.kind == "c" else 0)


@rows_where(lambda case: case.grad and any(x.dtype.kind in "fc" for x in draw(case)))
def test_derivatives(case):
    """vjp against central differences of the reference, jvp against vjp."""
    xs = draw(case, wide=True)
    floats = [i for i, x in enumerate(xs) if x.dtype.kind in "fc"]

    def fn(*changed):
        inputs = [array(x) for x in xs]
        for i, a in zip(floats, changed, strict=True):
            inputs[i] = a
        return results(case.fn(*inputs))

    rng = np.random.default_rng(1)
    shaped = [normal(rng, y) * (y.dtype.kind in "fc") for y in references(case, xs)]
    primals = [array(xs[i]) for i in floats]
    outputs = fn(*primals)
    cts = [mx.array(c, y.dtype) for c, y in zip(shaped, outputs, strict=True)]
    gradients = mx.vjp(fn, primals, cts)[1]
    narrow = any(a.dtype is not mx.float64 for a in (*primals, *outputs) if a.dtype.inexact)
    tolerance, h = max(case.tolerance, 2e-3 if narrow else 1e-5), 1e-6
    for _ in range(2):
        steps = [normal(rng, xs[i]) for i in floats]
        sides = []
        for sign in (1, -1):
            moved = [x.astype(np.complex128 if x.dtype.kind == "c" else np.float64) if i in floats else x
                     for i, x in enumerate(xs)]
            for i, step in zip(floats, steps, strict=True):
                moved[i] = moved[i] + sign * h * step
            sides.append(references(case, moved))
        wanted = sum(dot(c, (a - b) / (2 * h)) for c, a, b in zip(shaped, *sides, strict=True) if a.dtype.kind in "fc")
        norms = [np.linalg.norm(np.asarray(g)) * np.linalg.norm(s) for g, s in zip(gradients, steps, strict=True)]
        scale = 1 + sum(norms)
        found = sum(dot(g, s) for g, s in zip(gradients, steps, strict=True))
        assert abs(found - wanted) <= tolerance * scale, "vjp"
        tangents = mx.jvp(fn, primals, [mx.array(s, p.dtype) for s, p in zip(steps, primals, strict=True)])[1]
        along = sum(dot(c, t) for c, t, y in zip(shaped, tangents, outputs, strict=True) if y.dtype.inexact)
        assert abs(along - found) <= tolerance * scale, "jvp"


@rows_where(lambda case: case.vmap)
def test_batches(case):
    """vmap over axis 0 of all inputs, of each one alone and to another out axis, against a loop."""
    xs = draw(case)
    many = [np.stack([x, np.flip(x), x]) for x in xs]
    whole = range(len(xs))
    for chosen, out in [(set(whole), 0), *(({i}, -1) for i in whole if len(xs) > 1)]:
        axes = [0 if i in chosen else None for i in whole]
        args = [array(many[i] if i in chosen else xs[i]) for i in whole]
        found = mx.vmap(lambda *a: tuple(results(case.fn(*a))), axes, out)(*args)
        loop = [results(case.fn(*(array(many[i][k] if i in chosen else xs[i]) for i in whole))) for k in range(3)]
        for g, w in zip(found, zip(*loop, strict=True), strict=True):
            close(g, np.stack([np.asarray(v) for v in w], out), case.tolerance)


def test_every_primitive_has_a_case():
    seen = set()

    def record(*xs, fn):
        made = results(fn(*xs))
        seen.update(node.primitive.name for node in toposort(a._value for a in made))
        return made

    for case in CASES:
        trace(lambda *xs, fn=case.fn: record(*xs, fn=fn), [array(x) for x in draw(case)])
    assert sorted(set(TABLE) - seen - NOT_FROM_OPS) == []


def test_names_are_different():
    names = [case.name for case in CASES]
    assert sorted(n for n in set(names) if names.count(n) > 1) == []

"""Host steps: lazy ops that NumPy or SciPy computes when the plan's run calls back."""
import importlib
import threading

import numpy as np
import pytest

from lazulite.engine import array as mx

SQUARE = "square matrices (…, N, N) wanted"


def test_a_step_in_the_plan(runtime):
    a = mx.array(np.eye(3) * 2)
    assert "host:inv" in str(mx.lower([mx.linalg.inv(a) @ a], [a]))
    assert np.allclose(mx.linalg.inv(a)[None] + 1, np.eye(3) / 2 + 1)


@pytest.mark.parametrize("call, sentence", [
    (lambda: mx.linalg.inv(mx.zeros((2, 2))), "[inv] float32(2, 2): singular matrix"),
    (lambda: mx.linalg.solve(mx.zeros((2, 2)), mx.ones((2,))), "[solve] float32(2, 2), float32(2, 1): singular matrix"),
    (lambda: mx.linalg.cholesky(-mx.eye(3)), "[cholesky] float32(3, 3): matrix is not positive definite")])
def test_errors_of_values(call, sentence, runtime):
    with pytest.raises((RuntimeError, ValueError)) as error:
        mx.eval(call())
    assert str(error.value) == sentence
    assert mx.linalg.inv(mx.eye(2)).tolist() == [[1, 0], [0, 1]]              # and the next run is as good as any


@pytest.mark.parametrize("call, sentence", [
    (lambda: mx.linalg.inv(mx.zeros((2, 3))), f"[inv] (2, 3): {SQUARE}"),
    (lambda: mx.linalg.eigh(mx.zeros((2, 2)), "X"), "[eigh] UPLO 'X': \"L\" or \"U\" wanted"),
    (lambda: mx.linalg.svd(mx.zeros((2, 2), mx.int32)), "[svd] int32(2, 2): float32, float64 or complex64 wanted"),
    (lambda: mx.linalg.solve(mx.eye(3), mx.zeros((2,))),
     "[solve] a (3, 3), b (2,): b (N) or (…, N, K) with N = 3 wanted"),
    (lambda: mx.linalg.cross(mx.zeros((4,)), mx.zeros((3,))),
     "[cross] a (4,), b (3,): sizes 2 or 3 along axis -1 wanted"),
    (lambda: mx.linalg.norm(mx.zeros((2, 2)), "bad"),
     "[norm] ord 'bad' of matrices: 'fro', 'nuc', inf, -inf, 1, -1, 2 or -2 wanted"),
    (lambda: mx.fft.fft(mx.zeros((2,)), norm="x"), '[fft] norm \'x\': "backward", "ortho" or "forward" wanted'),
    (lambda: mx.fft.rfft(mx.zeros((2,), mx.complex64)), "[rfft] complex64(2,): real numbers wanted"),
    (lambda: mx.fft.fft(mx.zeros((2,)), 0), "[fft] sizes (0,) for axes (0,): one size of at least 1 for each wanted"),
    (lambda: mx.einsum("ij,jk", mx.zeros((2, 3)), mx.zeros((4, 2))), "[einsum] 'ij,jk': 'j' has sizes 3 and 4"),
    (lambda: mx.einsum("ij->k", mx.zeros((2, 3))),
     "[einsum] 'ij->k': each letter of the result once, and in some term, wanted"),
    (lambda: mx.pad(mx.zeros((2,)), 1, "wrap"), "[pad] mode 'wrap': one of constant, edge, reflect, symmetric wanted"),
    (lambda: mx.as_strided(mx.zeros((4,)), (3,), (2,)), "[as_strided] elements 0 to 4 of (4,): 0 to 3 wanted"),
    (lambda: mx.max(mx.zeros((2,), mx.complex64)), "[max] complex64(2,): real numbers wanted"),
    (lambda: mx.clip(mx.zeros((2,))), "[clip] a_min and a_max are None: at least one wanted")])
def test_errors_of_shapes_and_types(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == sentence


def test_missing_scipy_is_named(monkeypatch):
    real = importlib.import_module

    def without(name, *args):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises((RuntimeError, ImportError), match="LU factors need SciPy: pip install scipy"):
        mx.eval(mx.linalg.lu(mx.eye(7)))


def test_threads():
    """Runs from several threads take turns, and the callback gets the interpreter's lock in each."""
    rng, found = np.random.default_rng(0), {}
    matrices = [rng.standard_normal((20, 20)).astype(np.float32) for _ in range(8)]

    def work(i):
        found[i] = np.array(mx.linalg.inv(mx.array(matrices[i]) + 0) @ mx.array(matrices[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(np.allclose(found[i], np.eye(20), atol=1e-3) for i in range(8))

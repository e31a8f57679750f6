"""mx.random: the numbers of mlx.core.random, their distributions, and the same numbers on every machine."""
import math
import os
import subprocess
import sys

import mlx.core as mlx
import numpy as np
import pytest
import scipy.stats

from lazulite.engine import array as mx
from lazulite.engine import cpu

SHAPES = [(), (1,), (2,), (3,), (5, 7), (1023,), (2, 2049)]


def numpy(x):
    """The elements; bfloat16 as float32."""
    return np.array(x.astype(mlx.float32) if getattr(x, "dtype", None) == mlx.bfloat16 else x)


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**64 - 1])
def test_keys_are_mlx(seed, runtime):
    key, theirs = mx.random.key(seed), mlx.random.key(seed)
    assert np.array_equal(key, theirs)
    for count in (1, 2, 3, 5, 1000):
        assert np.array_equal(mx.random.split(key, count), mlx.random.split(theirs, count))


def exact(name, *args, tolerance=0.0, **options):
    return pytest.param(name, args, options, tolerance, id=f"{name} {args} {options}")


@pytest.mark.parametrize("name, args, options, tolerance", [
    exact("uniform"), exact("uniform", -1, 3), exact("uniform", dtype="float16"), exact("uniform", dtype="bfloat16"),
    exact("normal", tolerance=1e-6), exact("normal", dtype="float16", tolerance=2e-3),
    exact("normal", dtype="bfloat16", tolerance=2e-2), exact("normal", loc=2.0, scale=3.0, tolerance=1e-6),
    exact("normal", dtype="complex64", tolerance=1e-6), exact("randint", -10, 100),
    exact("randint", 0, 7, dtype="uint8"), exact("bernoulli", 0.3),
    exact("truncated_normal", -1.0, 2.0, tolerance=2e-6), exact("gumbel", tolerance=1e-6),
    exact("laplace", tolerance=1e-6), exact("laplace", loc=1.0, scale=0.5, tolerance=1e-6)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_are_mlx(name, args, options, tolerance, shape, runtime):
    """Bit by bit, but for the last places of erfinv and log."""
    ours = {k: getattr(mx, v) if k == "dtype" else v for k, v in options.items()}
    theirs = {k: getattr(mlx, v) if k == "dtype" else v for k, v in options.items()}
    found = numpy(getattr(mx.random, name)(*args, shape=shape, key=mx.random.key(7), **ours))
    wanted = numpy(getattr(mlx.random, name)(*args, shape=shape, key=mlx.random.key(7), **theirs))
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"axis": 0}, {"num_samples": 9}, {"axis": 0, "num_samples": 3},
                                     {"shape": (3, 4)}], ids=str)
def test_categories_are_mlx(options):
    logits = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    found = mx.random.categorical(mx.array(logits), key=mx.random.key(1), **options)
    wanted = mlx.random.categorical(mlx.array(logits), key=mlx.random.key(1), **options)
    assert found.dtype is mx.uint32 and np.array_equal(found, wanted)


def test_permutations_are_mlx():
    key, theirs = mx.random.key(3), mlx.random.key(3)
    assert np.array_equal(mx.random.permutation(1000, key=key), mlx.random.permutation(1000, key=theirs))
    x = np.arange(12).reshape(3, 4)
    wanted = mlx.random.permutation(mlx.array(x), 1, key=theirs)
    assert np.array_equal(mx.random.permutation(mx.array(x), 1, key=key), wanted)


def test_the_state_is_mlx():
    mx.random.seed(5), mlx.random.seed(5)
    for _ in range(3):
        assert np.array_equal(mx.random.uniform(shape=(4,)), mlx.random.uniform(shape=(4,)))


@pytest.mark.parametrize("draw, law", [
    (lambda n: mx.random.uniform(-1, 3, (n,)), scipy.stats.uniform(-1, 4)),
    (lambda n: mx.random.normal((n,), loc=1.0, scale=2.0), scipy.stats.norm(1, 2)),
    (lambda n: mx.random.truncated_normal(-0.5, 2.0, (n,)), scipy.stats.truncnorm(-0.5, 2)),
    (lambda n: mx.random.gumbel((n,)), scipy.stats.gumbel_r()),
    (lambda n: mx.random.laplace((n,), loc=1.0, scale=2.0), scipy.stats.laplace(1, 2)),
    (lambda n: mx.real(mx.random.normal((n,), mx.complex64)), scipy.stats.norm(0, math.sqrt(0.5))),
], ids=["uniform", "normal", "truncated_normal", "gumbel", "laplace", "complex normal"])
def test_distributions(draw, law):
    """Kolmogorov and Smirnov's test."""
    mx.random.seed(11)
    assert scipy.stats.kstest(np.array(draw(20000)), law.cdf).pvalue > 1e-3


def test_counts():
    """Pearson's test of integers, booleans and categories."""
    mx.random.seed(12)
    p = np.array([0.1, 0.2, 0.3, 0.4])
    drawn = {"randint": (mx.random.randint(0, 4, (20000,)), np.full(4, 0.25)),
             "bernoulli": (mx.random.bernoulli(0.3, (20000,)), np.array([0.7, 0.3])),
             "categorical": (mx.random.categorical(mx.array(np.log(p)), num_samples=20000), p)}
    for name, (samples, wanted) in drawn.items():
        counts = np.bincount(np.array(samples).astype(int), minlength=len(wanted))
        assert scipy.stats.chisquare(counts, wanted * 20000).pvalue > 1e-3, name


def test_multivariate_normal():
    mean, root = np.array([1.0, -2.0]), np.array([[1.0, 0.0], [0.7, 0.5]])
    drawn = np.array(mx.random.multivariate_normal(mx.array(mean), mx.array(root @ root.T), (20000,),
                                                   key=mx.random.key(0)))
    assert drawn.shape == (20000, 2)
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(np.cov(drawn.T), root @ root.T, atol=0.03)
    assert mx.random.multivariate_normal(mx.zeros((3, 1, 2)), mx.array(np.stack([np.eye(2)] * 4))).shape == (3, 4, 2)


def test_every_instruction_set_and_team_gives_the_same_numbers():
    native = cpu.runtime()
    before, threads = native.isa, native.threads
    key, seen = np.array([[1, 2], [3, 4]], np.uint32), []
    try:
        for isa in native.isas():
            for count in (1, threads):
                native.set_threads(count)
                out = np.zeros((2, 100_003), np.uint16)
                cpu.call("random", [out], [key], isa=isa)
                seen.append(out)
    finally:
        native.set_threads(threads)
        native.set_isa(before)
    assert all(np.array_equal(out, seen[0]) for out in seen)


DRAW = """
import numpy as np
from lazulite.engine import array as mx
key = mx.random.key(5)
parts = [mx.random.uniform(-2, 3, (9999,), key=key), mx.random.randint(0, 99, (9999,), key=key).astype(mx.float32),
         mx.random.laplace((9999,), key=key), mx.random.normal((9999,), key=key)]
"""


def test_the_plainest_instruction_set_draws_the_same():
    """Uniform numbers and integers bit by bit; erfinv and log have other last places without fused multiply-add."""
    script = DRAW + "import sys; sys.stdout.buffer.write(np.stack([np.array(p) for p in parts]).tobytes())"
    environment = os.environ | {"LAZULITE_ISA": "portable", "LAZULITE_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    plain = np.frombuffer(done.stdout, np.float32).reshape(4, -1)
    names: dict = {}
    exec(DRAW, names)
    ours = np.stack([np.array(p) for p in names["parts"]])
    assert np.array_equal(plain[:2], ours[:2])
    np.testing.assert_allclose(plain[2:], ours[2:], rtol=2e-6, atol=2e-6)


def test_transformations():
    """Gradients flow through loc and scale; keys can be mapped over; a compiled function advances the state."""
    key = mx.random.key(0)
    z = np.array(mx.random.normal((3,), key=key))
    loc, scale = mx.grad(lambda m, s: mx.random.normal((3,), loc=m, scale=s, key=key).sum(), (0, 1))(
        mx.array(1.0), mx.array(2.0))
    assert loc.item() == 3 and scale.item() == pytest.approx(z.sum(), rel=1e-6)
    keys = mx.random.split(key, 4)
    many = mx.vmap(lambda k: mx.random.normal((3,), key=k))(keys)
    assert np.array_equal(many, np.stack([np.array(mx.random.normal((3,), key=k)) for k in keys]))
    drawn = mx.compile(lambda: mx.random.uniform(shape=(3,)), inputs=mx.random.state, outputs=mx.random.state)
    mx.random.seed(0)
    first, second = np.array(drawn()), np.array(drawn())
    mx.random.seed(0)
    assert np.array_equal(first, mx.random.uniform(shape=(3,)))
    assert np.array_equal(second, mx.random.uniform(shape=(3,)))


@pytest.mark.parametrize("call, sentence", [
    (lambda: mx.random.uniform(dtype=mx.int32), r"\[uniform\] dtype int32: a real floating type wanted"),
    (lambda: mx.random.uniform(mx.zeros((3,)), 1, (2,)), r"\[uniform\] .*\(3,\).*\(2,\)"),
    (lambda: mx.random.randint(0, 2, (2,), mx.float32), r"\[randint\] dtype float32: an integer type wanted"),
    (lambda: mx.random.normal((2,), key=mx.zeros((2,))), r"\[random\] key float32\(2,\): uint32\(2,\) wanted"),
    (lambda: mx.random.categorical(mx.zeros((2, 3)), shape=(5,), num_samples=2), "shape and num_samples"),
    (lambda: mx.random.multivariate_normal(mx.zeros((2,)), mx.zeros((3, 3))), r"mean \(2,\), cov \(3, 3\)")])
def test_errors(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()

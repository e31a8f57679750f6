"""The same seeds draw the same tokens on the CPU and on the GPU, whatever the filters are."""
import numpy as np

from lazulite.engine import cpu
from lazulite.engine.metal import emulated
from lazulite.engine.metal.sample import sample

ROWS, VOCABULARY = 300, 3001


def test_draws_are_the_cpus():
    rng = np.random.default_rng(8)
    logits = (rng.standard_normal((ROWS, VOCABULARY)) * rng.uniform(0.5, 5, (ROWS, 1))).astype(np.float32)
    params, ints = np.zeros((ROWS, 6), np.float32), np.zeros((ROWS, 11), np.int32)
    params[:, 0] = rng.choice([0.3, 0.8, 1.0, 2.0], ROWS)                                 # temperature
    params[:, 1] = rng.choice([1.0, 0.95, 0.9, 0.5], ROWS)                                # top_p
    params[:, 2] = rng.choice([0.0, 0.05], ROWS)                                          # min_p
    params[:, 3:] = np.where(rng.random((ROWS, 1)) < 0.5, [1.0, 0.0, 0.0], [1.3, 0.5, 0.2])         # penalties
    ints[:, 0] = rng.choice([0, 1, 40, 500], ROWS)                                        # top_k
    ints[:, 1:4] = rng.integers(-2**31, 2**31, (ROWS, 3))                                 # seed, counter
    ints[:, 4], ints[:, 5], ints[:, 8] = 50, 20, rng.random(ROWS) < 0.3                   # history, prompt, masked
    history = rng.integers(0, VOCABULARY, (1, 50)).astype(np.int32)
    masks = rng.integers(0, 2**32, (ROWS, -(-VOCABULARY // 32)), dtype=np.uint64).astype(np.uint32)
    inputs = [logits, params, ints, history, np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32), masks]
    tokens, logprobs = np.zeros((2, ROWS), np.int32), np.zeros((2, ROWS), np.float32)
    tops = np.zeros((ROWS, 20), np.int32), np.zeros((ROWS, 20), np.float32)
    cpu.call("sample", [tokens[0], logprobs[0], *tops], inputs)
    emulated.call(sample, "sample", [tokens[1], logprobs[1], *tops], inputs)
    differ = tokens[0] != tokens[1]
    assert differ.sum() <= 1, f"{differ.sum()} of {ROWS} rows"                            # a tie of rounding
    np.testing.assert_allclose(logprobs[1][~differ], logprobs[0][~differ], atol=1e-5)
    assert len(set(tokens[0])) > ROWS / 3

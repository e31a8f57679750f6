"""experts against NumPy in float64, over all instruction sets."""
import numpy as np
import pytest

from lazulite.engine import cpu


def silu(x):
    return x / (1 + np.exp(-x))


def clamped(g, u):
    g = np.minimum(g, 7)
    return g / (1 + np.exp(-1.702 * g)) * (np.clip(u, -7, 7) + 1)


GATES = {2: lambda g, u: silu(g) * u, 5: clamped}


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    stream = codes.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little").view(np.uint32)


def weight(rng, experts: int, n: int, k: int, bits: int, group: int):
    """The kernel's operands, and the weights (E, N, K) in float64."""
    if not bits:
        w = (rng.standard_normal((experts, n, k)) / np.sqrt(k)).astype(np.float32)
        return [w], w.astype(np.float64)
    codes = rng.integers(0, 1 << bits, (experts, n, k))
    scale = (rng.uniform(0.5, 1, (experts, n, k // group)) / (1 << bits) / np.sqrt(k) * 4).astype(np.float32)
    bias = -scale * np.float32((1 << bits) / 2)
    wide = codes * np.repeat(scale, group, -1).astype(np.float64) + np.repeat(bias, group, -1)
    return [pack(codes, bits), scale, bias], wide


@pytest.mark.parametrize(("bits", "group"), [(0, 0), (4, 32), (8, 64), (3, 32)])
@pytest.mark.parametrize("epilogue", GATES)
def test_experts(isa, bits, group, epilogue):
    rng = np.random.default_rng(bits + epilogue)
    for t, k, experts, c, hidden, bias in [(1, 2, 4, 64, 192, 0), (1, 8, 16, 128, 192, 1), (7, 2, 3, 64, 192, 1),
                                           (0, 2, 4, 64, 192, 0), (90, 2, 4, 64, 128, 0), (200, 4, 6, 64, 64, 1)]:
        x = rng.standard_normal((t, c)).astype(np.float32)
        chosen = np.stack([rng.permutation(experts)[:k] for _ in range(t)] or [np.zeros(k)])[:t].astype(np.int32)
        share = rng.random((t, k)).astype(np.float32)
        operands, (gate, up, down) = [], (weight(rng, experts, n, m, bits, group)
                                          for n, m in ((hidden, c), (hidden, c), (c, hidden)))
        matrices = [gate[1], up[1], down[1]]
        operands = [*gate[0], *up[0], *down[0]]
        biases = [rng.standard_normal((experts, m.shape[1])).astype(np.float32) if bias else np.zeros((experts, 1))
                  for m in matrices]
        y = np.empty((t, c), np.float32)
        cpu.call("experts", [y], [x, chosen, share, *operands, *(biases if bias else [])],
                 [bits, group, epilogue, bias], isa=isa)
        wanted = np.zeros((t, c))
        for i in range(t):
            for e, s in zip(chosen[i], share[i], strict=True):
                h = GATES[epilogue](matrices[0][e] @ x[i] + biases[0][e], matrices[1][e] @ x[i] + biases[1][e])
                wanted[i] += s * (matrices[2][e] @ h + biases[2][e])
        tolerance = 1e-5 if not bits else 4e-4 if t == 1 else 3e-2
        assert np.abs(y - wanted).max(initial=0) <= tolerance * np.abs(wanted).max(initial=1)


def test_an_expert_that_is_not_there():
    rng = np.random.default_rng(0)
    operands = [a for n, m in ((32, 64), (32, 64), (64, 32)) for a in weight(rng, 2, n, m, 0, 0)[0]]
    x, share = np.ones((1, 64), np.float32), np.ones((1, 1), np.float32)
    with pytest.raises(RuntimeError, match="token 0 chose expert 2 of 2"):
        cpu.call("experts", [x.copy()], [x, np.array([[2]], np.int32), share, *operands], [0, 0, 2, 0])

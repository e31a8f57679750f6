"""matmul, quantize and dequantize: the result first, then time, GFLOPS or MB/s, and NumPy's beside it.

python bench/kernels/matmul.py
"""

from time import perf_counter

import numpy as np

from lazulite.engine import cpu


def best(run, repeats: int = 9) -> float:
    times = []
    for _ in range(repeats):
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return min(times)


def matmul(m: int, n: int, k: int, columns: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k) if columns else (k, n), np.float32)
    b, o = b.T if columns else b, np.empty((m, n), np.float32)
    cpu.call("matmul", [o], [a, b])
    error = np.abs(o - a @ b).max() / np.abs(a @ b).max()
    ours, numpy = best(lambda: cpu.call("matmul", [o], [a, b])) - CALL, best(lambda: np.matmul(a, b, out=o))
    print(f"matmul {m:4} x {n:4} x {k:4} {'b by columns' if columns else '':12} error {error:.0e}", end="")
    print(f"  {ours * 1e6:8.1f} us  {2e-9 * m * n * k / ours:6.1f} GFLOPS, {numpy / ours:4.2f} x NumPy's speed")


def quantize(bits: int, group: int) -> None:
    n, k = 4096, 2048
    x = np.random.default_rng(0).standard_normal((n, k), np.float32)
    w, y = np.empty((n, k * bits // 32), np.uint32), np.empty_like(x)
    s, b = (np.empty((n, k // group), np.float32) for _ in range(2))
    to = best(lambda: cpu.call("quantize", [w, s, b], [x], [bits, group]), 3)
    back = best(lambda: cpu.call("dequantize", [y], [w, s, b], [bits, group]), 3)
    print(f"quantize {bits}-bit group {group:3}  error {np.abs(y - x).max():.3f}", end="")
    print(f"  {x.nbytes / to / 1e6:6.0f} MB/s, back {x.nbytes / back / 1e6:6.0f} MB/s")


if __name__ == "__main__":
    print(f"isa {cpu.runtime().isa}, {cpu.runtime().threads} threads")
    one = np.zeros((1, 1), np.float32)
    CALL = best(lambda: cpu.call("matmul", [one.copy()], [one, one]), 99)  # loading a plan of one step
    shapes = [(8, 8, 8), (1, 2048, 2048), (2048, 1, 2048), (4, 2048, 512), (64, 64, 64), (512, 576, 1536)]
    for m, n, k in shapes:
        for columns in (False, True):
            matmul(m, n, k, columns)
    for bits in (4, 8):
        for group in (32, 64):
            quantize(bits, group)

"""paged_attention against the limits of this machine: reading the same pages (decode), multiply-adds (prefill).

Each row checks its result against float64, then times a stack of layers in one native call, interleaved with the limit;
medians, and percent of the limit by medians and by the best of each (on a busy machine, believe those).
Run: python bench/kernels/attention.py [--isa avx2] [--shape 9 3 64] [--layers 30]; LAZULITE_THREADS=1 if others work.
"""

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np

from lazulite.engine import cpu

PAGE = 32
LIMITS = r"""
#include <stddef.h>
#include <stdint.h>
#include <immintrin.h>
typedef uint64_t V __attribute__((vector_size(64), may_alias));
typedef float F __attribute__((vector_size(64)));
extern "C" uint64_t read_all(const V* p, size_t bytes) {
  V a = {}, b = {}, c = {}, d = {};
  for (size_t i = 0; i + 4 <= bytes / 64; i += 4) a += p[i], b += p[i + 1], c += p[i + 2], d += p[i + 3];
  a += b + c + d;
  return a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
}
extern "C" float multiply_add(size_t n) {  // 12 accumulators of 16 lanes: 384 operations a turn
  F acc[12], x = F{} + 0.5f, y = F{} + 1.0f;
  for (int i = 0; i < 12; i++) acc[i] = F{} + (float)i;  // unlike, or the compiler keeps one
  for (; n; n--) {
    for (int i = 0; i < 12; i++) acc[i] = acc[i] * x + y;
    asm volatile("" : "+v"(x));
  }
  for (int i = 1; i < 12; i++) acc[0] += acc[i];
  return acc[0][0];
}
"""


def limits() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp())
    (folder / "limits.cpp").write_text(LIMITS)
    flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, str(folder / "limits.cpp"), "-o", str(folder / "limits.so")], check=True)
    library = ctypes.CDLL(str(folder / "limits.so"))
    library.read_all.argtypes, library.multiply_add.argtypes = [ctypes.c_void_p, ctypes.c_size_t], [ctypes.c_size_t]
    return library


class Stack:
    """B sequences with T new tokens each after `depth` cached ones; layers whose shuffled pages follow one another."""

    def __init__(self, shape: list[int], layers: int, B: int, T: int, depth: int, isa: str) -> None:
        (H, K, D), rng = shape, np.random.default_rng(0)
        P = -(-(depth + T) // PAGE)
        N, self.shape, self.T, self.B, self.depth = B * P, (H, K, D), T, B, depth
        runtime = cpu.runtime()
        self.memory = runtime.alloc(layers * 2 * N * K * PAGE * D * 2)
        self.bytes = self.memory.nbytes
        flat = np.ctypeslib.as_array((ctypes.c_uint16 * (self.bytes // 2)).from_address(self.memory.pointer))
        self.pages = flat.view(np.float16).reshape(layers, 2, -1)
        self.pages[:] = rng.standard_normal(self.pages.shape[2]).astype(np.float16)
        q = rng.standard_normal((B * T, H, D)).astype(np.float32)
        table = rng.permutation(N).astype(np.int32).reshape(B, P)
        rows = [np.arange(B) * T, np.full(B, T), np.full(B, depth + T)]
        self.arrays = [np.empty_like(q), q, table, *(x.astype(np.int32) for x in rows)]
        views = [SimpleNamespace(**self._view(i + 1, a.dtype.name, a.shape)) for i, a in enumerate(self.arrays)]
        steps = []
        for layer in range(layers):
            at = layer * 4 * N * K * PAGE * D
            k = SimpleNamespace(**self._view(7, "float16", (N, K, D, PAGE), at))
            v = SimpleNamespace(**self._view(7, "float16", (N, K, PAGE, D), at + 2 * N * K * PAGE * D))
            inputs = [views[1], k, v, *views[2:]]
            floats = [D**-0.5, 0.0]
            kernel = "paged_attention"
            steps.append(
                SimpleNamespace(kernel=kernel, outputs=views[:1], inputs=inputs, ints=[0, 1, 0, 0], floats=floats)
            )
        before = runtime.isa
        runtime.set_isa(isa)
        self.plan = runtime.load(steps, 8, [], 0)
        runtime.set_isa(before)
        self.pointers = [0, *(a.ctypes.data for a in self.arrays), self.memory.pointer]

    @staticmethod
    def _view(buffer: int, dtype: str, shape: tuple[int, ...], offset: int = 0) -> dict:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
        return {
            "buffer": buffer,
            "dtype": cpu.DTYPES.index(dtype),
            "offset": offset,
            "shape": shape,
            "strides": strides,
        }

    def run(self) -> None:
        cpu.runtime().run(self.plan, self.pointers, [])

    def check(self) -> float:
        """Largest error of a token in the middle of the last sequence, all layers having the same pages."""
        (H, K, D), (out, q, table, *_) = self.shape, self.arrays
        row, seen = -1 - self.T // 2, self.depth + self.T - self.T // 2
        self.run()
        k = self.pages[0, 0].reshape(-1, K, D, PAGE)[table[-1]].transpose(1, 0, 3, 2).reshape(K, -1, D).astype(float)
        v = self.pages[0, 1].reshape(-1, K, PAGE, D)[table[-1]].transpose(1, 0, 2, 3).reshape(K, -1, D).astype(float)
        k, v = k[:, :seen], v[:, :seen]
        s = np.einsum("hd,hpd->hp", q[row].astype(float), k.repeat(H // K, 0)) * D**-0.5
        p = np.exp(s - s.max(1, keepdims=True))
        return float(np.abs(np.einsum("hp,hpd->hd", p / p.sum(1, keepdims=True), v.repeat(H // K, 0)) - out[row]).max())


def seconds(f: Callable[[], object], alone: bool) -> float:
    """Of one call; alone on one thread, of its processor's time, which a busy machine disturbs less."""
    clock = time.thread_time if alone else time.perf_counter
    start = clock()
    f()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=cpu.runtime().isa)
    parser.add_argument("--shape", type=int, nargs=3, default=[9, 3, 64], metavar=("H", "K", "D"))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    limit, threads = limits(), cpu.runtime().threads
    pool = ThreadPoolExecutor(threads)
    print(f"{args.isa}, {threads} threads, {args.layers} layers of H K D = {args.shape}, float16 pages")
    for B, T, depth in [(1, 1, 512), (1, 1, 4096), (8, 1, 1024), (1, 4, 4096), (1, 512, 0), (1, 512, 4096)]:
        stack = Stack(args.shape, args.layers, B, T, depth, args.isa)
        error = stack.check()
        assert error < (1e-2 if args.isa == "amx" and T > 8 else 1e-4), error
        mine, best = [], []
        part = stack.bytes // threads // 64 * 64
        reads = [partial(limit.read_all, stack.memory.pointer + i * part, part) for i in range(threads)]
        sums = [partial(limit.multiply_add, 10**6)] * threads
        for _ in range(args.rounds):
            mine.append(seconds(stack.run, threads == 1))
            jobs = reads if T < 32 else sums
            on_all = jobs[0] if threads == 1 else lambda jobs=jobs: list(pool.map(lambda job: job(), jobs))
            best.append(seconds(on_all, threads == 1))
        H, _, D = args.shape
        amount = stack.bytes if T < 32 else args.layers * B * 4 * H * D * sum(depth + j + 1 for j in range(T))
        work, unit, name = (stack.bytes, 1e9, "GB/s read") if T < 32 else (threads * 384e6, 1e12, "TFLOPS f32")
        rate, top = amount / median(mine), work / median(best)
        print(
            f"B {B} T {T:3} depth {depth:4}: error {error:.0e}, {median(mine) * 1e3:8.3f} ms,",
            f"{rate / unit:6.2f} of {top / unit:6.2f} {name}: {rate / top:4.0%},",
            f"best {min(mine) * 1e3:8.3f} ms: {amount / min(mine) * min(best) / work:4.0%}",
        )


if __name__ == "__main__":
    main()

"""Where the time goes: microseconds and bytes of every kernel that runs inside `with mx.profile() as p`."""
from __future__ import annotations

import functools
import math
import time
from ctypes import c_double
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import plan as plans
from .dtypes import float32
from .node import Dim
from .plan import View

__all__ = ["Profile", "profile"]
SPARSE = ("take", "quantized_take", "take_along")        # kernels that read of a table no more than they write
SAMPLE, REPEATS = 1 << 24, 9         # elements of each array of the memory measurement, and its runs


@dataclass
class Row:
    """One kernel: how often it ran, its time, and the bytes of the arrays that it read and wrote."""

    kernel: str
    calls: int = 0
    microseconds: float = 0.0
    nbytes: int = 0
    share: float = 0.0               # of the time of all kernels

    @property
    def rate(self) -> float:
        """GB/s"""
        return self.nbytes / self.microseconds / 1e3 if self.microseconds else 0.0


class Profile:
    """`with mx.profile() as p: …`, then print(p): per kernel the calls, µs, GB/s, percent of the rate of main memory
    (measured once) and share of the time, whatever evaluates: eval, a compiled function, an Executable, any thread.
    `rows` has them as data, the longest first."""

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}
        self.seconds = 0.0           # between enter and exit

    def __enter__(self) -> Profile:
        self._runtime = plans.runtime()
        self._run, self._own = self._runtime.run, "run" in vars(self._runtime)
        self._runtime.run = self._runtime.start = self._record
        self.seconds -= time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds += time.perf_counter()
        if self._own:
            self._runtime.run = self._runtime.start = self._run
        else:
            del self._runtime.run, self._runtime.start

    def _record(self, handle: Any, pointers: Any, dims: Any, times: Any = None) -> int:
        steps = handle.plan.steps
        times = times or (c_double * len(steps))()
        self._run(handle, pointers, dims, times)
        sizes = {d.name: int(dims[i]) for i, d in enumerate(handle.plan.dims)}
        for step, microseconds in zip(steps, times, strict=True):
            row = self._rows.setdefault(step.kernel, Row(step.kernel))
            row.calls += 1
            row.microseconds += microseconds
            row.nbytes += moved(step.kernel, [nbytes(v, sizes) for v in step.inputs],
                                sum(nbytes(v, sizes) for v in step.outputs))
        return 0                                           # there is nothing to wait for

    @property
    def rows(self) -> list[Row]:
        total = sum(row.microseconds for row in self._rows.values())
        for row in self._rows.values():
            row.share = row.microseconds / total if total else 0.0
        return sorted(self._rows.values(), key=lambda row: -row.microseconds)

    def __str__(self) -> str:
        rows, limit = self.rows, memory_rate()
        width = max([6, *(len(row.kernel) for row in rows)])
        head = f"{'calls':>7s} {'µs':>11s} {'µs/call':>9s} {'GB/s':>7s} {'% limit':>8s} {'share':>7s}"
        lines = [f"{'kernel':{width}s} {head}"]
        lines += [f"{row.kernel:{width}s} {row.calls:7d} {row.microseconds:11.1f} {row.microseconds / row.calls:9.1f} "
                  f"{row.rate:7.1f} {100 * row.rate / limit:8.0f} {100 * row.share:6.1f}%" for row in rows]
        spent = f"kernels {sum(row.microseconds for row in rows) / 1e3:.1f} ms of {self.seconds * 1e3:.1f} ms"
        return "\n".join([*lines, f"{spent}; memory limit {limit:.1f} GB/s"])


profile = Profile


def nbytes(view: View, dims: dict[str, int]) -> int:
    """Of the elements that a view shows, each once however often it is repeated."""
    sizes = [dims[s.name] if isinstance(s, Dim) else s
             for s, stride in zip(view.shape, view.strides, strict=True) if stride]
    return 0 if 0 in view.shape else math.prod(sizes) * view.dtype.size


def moved(kernel: str, read: list[int], written: int) -> int:
    return sum(min(n, written) if kernel in SPARSE else n for n in read) + written


@functools.cache
def memory_rate() -> float:
    """GB/s of reading one array and writing another, each larger than a cache: the best of several runs."""
    from .array import placeholder
    from .evaluate import lower
    x = placeholder((SAMPLE,), float32)
    executable = lower([x + 1], [x]).load()
    executable.set_input(0, np.ones(SAMPLE, np.float32))
    best = math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        executable.run()
        best = min(best, time.perf_counter() - start)
    return 2 * 4 * SAMPLE / best / 1e9

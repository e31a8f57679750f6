"""The kernels on this machine's device: vectors against what they must give, then speed against the chip's limits."""
from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from time import perf_counter
from typing import Any

import numpy as np

from . import predict
from .encoders import encode
from .plan import for_host
from .rope import PAGE
from .steps import Step, Unsupported, View, ceil
from .vectors import Operand, Vector, bind, compare, results

WARM, TURNS = 2, 5
STREAMED = 256 << 20                 # bytes that the copies of a step's inputs fill, so that no cache holds them
MOST, FEWEST = 32, 4                 # copies of a step in a run


@dataclass(frozen=True)
class Checked:
    """A vector that ran: what is wrong, or None; why the CPU had to run it, or None."""

    id: str
    wrong: str | None
    elsewhere: str | None = None


def about(runtime: Any) -> dict[str, Any]:
    """What a report says of the device."""
    device = runtime.device
    return {"device": device.name, "architecture": device.architecture, "emulated": runtime.emulated,
            "system": platform.platform(), "version": version("lazulite"), "working_set_bytes": device.working_set}


def check(runtime: Any, vectors: Iterable[Vector]) -> Iterator[Checked]:
    """Runs each vector on the device."""
    for vector in vectors:
        step, memory = bind(vector)
        elsewhere = None
        try:
            encode(step)
        except Unsupported as why:
            elsewhere = f"{step.kernel}: {why}"
        try:
            yield Checked(vector.id, compare(vector, results(step, run(runtime, [step], memory))), elsewhere)
        except RuntimeError as failure:
            yield Checked(vector.id, f"{vector.id}: {failure}", elsewhere)


def run(runtime: Any, steps: Sequence[Step], memory: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the buffers hold after these steps, on buffers of the device."""
    job = Job(runtime, steps, memory)
    job()
    return [array.copy() for array in job.arrays]


class Job:
    """Steps over device buffers that begin with these bytes, ready to run. A view's buffer n is memory[n]."""

    def __init__(self, runtime: Any, steps: Sequence[Step], memory: Sequence[np.ndarray]) -> None:
        self.runtime = runtime
        self.blocks = [runtime.alloc(max(1, array.nbytes)) for array in memory]
        self.arrays = [np.ctypeslib.as_array((ctypes.c_uint8 * array.nbytes).from_address(block.pointer))
                       for block, array in zip(self.blocks, memory, strict=True)]
        for to, array in zip(self.arrays, memory, strict=True):
            to[:] = array
        self.plan = load(runtime, steps, len(memory))
        self.pointers = [0, *(block.pointer for block in self.blocks)]

    def __call__(self) -> None:
        self.runtime.run(self.plan, self.pointers, [])


def load(runtime: Any, steps: Sequence[Step], buffers: int) -> Any:
    """The runtime's plan of these steps. Its buffer 0 is the arena, so all others come one later."""
    def moved(views: tuple[View, ...]) -> tuple[View, ...]:
        return tuple(replace(view, buffer=view.buffer + 1) for view in views)

    steps = [replace(step, outputs=moved(step.outputs), inputs=moved(step.inputs)) for step in steps]
    return runtime.load([for_host(step, 0) for step in steps], buffers + 1, [], 0)


def speeds(runtime: Any) -> Iterator[dict[str, Any]]:
    """A row of the report for each case. Percentages are of the first row's bytes a second, and of the full chip's
    bandwidth and arithmetic, None where these are not known."""
    copy = 0.0
    for case in cases(runtime.opcodes):
        row = speed(case, measure(runtime, case), runtime.device.name)
        copy = copy or row["GB/s"]
        yield row | {"% of x + x": 100 * row["GB/s"] / copy}


def speed(case: Case, seconds: float, device: str) -> dict[str, Any]:
    chip = next((chip for chip in predict.CHIPS if chip.name == device.removeprefix("Apple ")), None)
    gigabytes, teraflops = case.bytes / seconds / 1e9, case.operations / seconds / 1e12
    return {"kernel": case.vector.id, "µs": 1e6 * seconds, "GB/s": gigabytes, "TFLOP/s": teraflops,
            "% of peak GB/s": 100 * gigabytes / chip.bandwidth if chip else None,
            "% of peak TFLOP/s": 100 * teraflops / chip.tflops if chip and chip.tflops else None}


def measure(runtime: Any, case: Case) -> float:
    """Seconds of a call, the best of a few runs of many. Each has inputs of its own and waits for the one before."""
    step, memory = bind(case.vector)
    copies = min(MOST, max(FEWEST, ceil(STREAMED, case.bytes)))
    outputs = {view.buffer for view in step.outputs}
    steps, pool = [step], list(memory)
    for _ in range(copies - 1):
        number = {i: i if i in outputs else len(pool) + i for i in range(len(memory))}
        pool += [array if i not in outputs else array[:0] for i, array in enumerate(memory)]
        steps.append(replace(step, outputs=_renumbered(step.outputs, number), inputs=_renumbered(step.inputs, number)))
    job, times = Job(runtime, steps, pool), []
    for _ in range(WARM + TURNS):
        begin = perf_counter()
        job()
        times.append(perf_counter() - begin)
    return min(times[WARM:]) / copies


def _renumbered(views: tuple[View, ...], number: dict[int, int]) -> tuple[View, ...]:
    return tuple(replace(view, buffer=number[view.buffer]) for view in views)


@dataclass(frozen=True)
class Case:
    """A step of a real size: operations it does, tokens in the cache that it reads."""

    vector: Vector
    operations: int = 0
    depth: int = 0

    @property
    def bytes(self) -> int:
        return predict.moved(bind(self.vector)[0], self.depth)


def cases(opcodes: dict[str, int]) -> Iterator[Case]:
    """What is measured: the steps of an 8 B model's decode and prompt, and what an array program does."""
    def case(name: str, kernel: str, outputs: Sequence[Operand], inputs: Sequence[Operand], ints: Sequence[int] = (),
             floats: Sequence[float] = (), operations: int = 0, depth: int = 0) -> Case:
        return Case(Vector(name, kernel, outputs, inputs, ints, floats, [None] * len(outputs), 0), operations, depth)

    c, ffn = 4096, 14336
    yield case("elementwise, x + x of 64 MB", "elementwise", [floats(1 << 24)], [floats(1 << 24)],
               [0, 1, 0, 1, opcodes["add"], 1, 0, 0, 0])
    for tokens in (1, 4, 512):
        yield case(f"linear 4-bit 4096x4096, {tokens} tokens", "linear", [floats(tokens, c)],
                   [floats(tokens, c), *codes(c, c)], [1, 4, 64, 0, 0, 0, 0], [0.0], 2 * tokens * c * c)
    yield case("linear 4-bit norm, gate and up, 1 token", "linear", [floats(1, ffn)],
               [floats(1, c), floats(c), *codes(ffn, c), *codes(ffn, c)], [2, 4, 64, 1, 2, 0, 0], [1e-5],
               4 * c * ffn)
    for count, length in ((1, 1024), (1, 8192), (512, 512)):
        yield case(f"paged_attention 32 heads of 128, {count} of {length} tokens", "paged_attention",
                   [floats(count, 32, 128)], attended(count, length), [0, 1, 0, 0], [128**-0.5, 0.0],
                   4 * 32 * 128 * count * (length - count // 2), length)
    for kernel, weights, numbers in (("rms_norm", [floats(c)], [1e-5]), ("softmax", [], [])):
        yield case(f"{kernel} 4096x4096", kernel, [floats(c, c)], [floats(c, c), *weights], [], numbers)
    yield case("reduce, sum of 4096 rows", "reduce", [floats(c)], [floats(c, c)], [0, 1])
    yield case("matmul float32 2048x2048x2048", "matmul", [floats(2048, 2048)],
               [floats(2048, 2048), floats(2048, 2048)], operations=2 * 2048**3)
    yield case("quantized_take 4096 of 32000 rows", "quantized_take", [floats(c, c)],
               [*codes(32000, c), (np.arange(c) * 31).astype(np.int32)], [4, 64])


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def codes(rows: int, columns: int) -> list[Operand]:
    """A 4-bit matrix in groups of 64: codes, scales and biases."""
    group = (np.full((rows, columns // 64), 0x3C00, np.uint16), "bfloat16")
    return [np.full((rows, columns // 8), 0x76543210, np.uint32), group, group]


def attended(count: int, length: int) -> list[Operand]:
    """q of `count` tokens and 8 heads of a cache with `length` tokens of one sequence, in pages of 32."""
    pages = ceil(length, PAGE)
    table = np.arange(pages, dtype=np.int32)[None]
    numbers = [np.array([n], np.int32) for n in (0, count, length)]
    return [floats(count, 32, 128), np.ones((pages, 8, 128, 32), np.float16), np.ones((pages, 8, 32, 128), np.float16),
            table, *numbers]

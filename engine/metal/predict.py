"""Decode speed on chips that we do not have: the plan's bytes over their bandwidth, and a price for each dispatch.

    seconds a token = bytes / (0.85 · bandwidth) + dispatches · 2.4 µs + 20 µs

85 % of the bandwidth is what streaming kernels reach; 2.4 µs is what a dispatch that waits for the one before costs on
M3 Ultra (ml-explore/mlx#4521: 3,200 in 7.7 ms; a smaller chip showed 5.2); 20 µs lie between two command buffers. With
19 dispatches a layer in 13 levels this gives MLX's published speeds within a few percent. It is a prediction.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from .encoders import encode
from .rope import PAGE
from .steps import SIZES, Step, Unsupported, View

REACHED, DISPATCH, BOUNDARY = 0.85, 2.4e-6, 20e-6


@dataclass(frozen=True)
class Chip:
    """bandwidth: GB/s of the full chip, as Apple's technical specifications have it (support.apple.com/specs). tflops:
    float32, as huggingface.js's packages/tasks/src/hardware.ts has them; 0 where it is not known."""

    name: str
    bandwidth: float
    tflops: float


CHIPS = [
    Chip("M1", 68.25, 2.6), Chip("M1 Pro", 200, 5.2), Chip("M1 Max", 400, 10.4), Chip("M1 Ultra", 800, 21),
    Chip("M2", 100, 3.6), Chip("M2 Pro", 200, 6.8), Chip("M2 Max", 400, 13.49), Chip("M2 Ultra", 800, 27.2),
    Chip("M3", 100, 4.1), Chip("M3 Pro", 150, 7.4), Chip("M3 Max", 400, 14.2), Chip("M3 Ultra", 819, 0),
    Chip("M4", 120, 4.6), Chip("M4 Pro", 273, 9.2), Chip("M4 Max", 546, 18.4),
    Chip("M5", 153, 0), Chip("M5 Pro", 307, 0), Chip("M5 Max", 614, 0),
]

# Tokens a second that others measured: (chip, model) -> (rate, engine, where). 4-bit weights, groups of 64.
PUBLISHED = {
    ("M4 Max", "Qwen3-0.6B"): (432, "mlx-lm 0.31.3, 1,024 tokens", "github.com/john-rocky/apple-silicon-llm-bench"),
    ("M4 Max", "Qwen3-4B"): (145.8, "mlx-lm 0.31.3, 1,024 tokens", "github.com/john-rocky/apple-silicon-llm-bench"),
    ("M4 Max", "Qwen3-8B"): (90.0, "mlx-lm 0.31.3, 1,024 tokens", "github.com/john-rocky/apple-silicon-llm-bench"),
    ("M1", "Qwen3-0.6B"): (115, "MLX, 7 GPU cores", "mac-llm-bench"),
    ("M1", "Qwen3-8B"): (12.5, "MLX, 7 GPU cores", "mac-llm-bench"),
    ("M2 Max", "Qwen3-8B"): (48.1, "MLX, 30 GPU cores", "mac-llm-bench"),
    ("M3 Pro", "Qwen3-4B"): (44.6, "mlx 0.32.0", "ml-explore/mlx-lm#1569"),
    ("M3 Ultra", "Qwen3-0.6B"): (365, "vllm-mlx", "vllm-mlx scorecard"),
    ("M3 Ultra", "Llama-3.1-8B"): (119, "rapid-mlx 0.31.2", "Rapid-MLX#586"),
    ("M5", "Qwen3-0.6B"): (259, "MLX", "mac-llm-bench"),
}


@dataclass(frozen=True)
class Work:
    """What steps ask of the GPU: dispatches, bytes that cross the memory bus, and the kernels that the CPU must run."""

    dispatches: int = 0
    bytes: int = 0
    elsewhere: frozenset[str] = frozenset()

    def __add__(self, other: Work) -> Work:
        return Work(self.dispatches + other.dispatches, self.bytes + other.bytes, self.elsewhere | other.elsewhere)

    def times(self, n: int) -> Work:
        return Work(self.dispatches * n, self.bytes * n, self.elsewhere)

    def less(self, other: Work) -> Work:
        return Work(self.dispatches - other.dispatches, self.bytes - other.bytes, self.elsewhere)


def work(steps: Iterable[Step], depth: int) -> Work:
    """The dispatches that the encoders make of these steps, and their bytes, `depth` tokens being in the cache."""
    return sum((_work(step, depth) for step in steps), Work())


def _work(step: Step, depth: int) -> Work:
    try:
        dispatches = sum(prod(dispatch.groups) > 0 for dispatch in encode(step))
    except Unsupported:
        return Work(0, moved(step, depth), frozenset([step.kernel]))
    return Work(dispatches, moved(step, depth))


def moved(step: Step, depth: int = 0) -> int:
    """The bytes that a step has to read and write, each once; of tables only rows, of a cache only `depth` tokens."""
    views = [*step.outputs, *step.inputs]
    pages: Sequence[View] = ()
    if step.kernel in ("take", "quantized_take"):
        rows = step.inputs[-1].size
        return sum(map(size, step.outputs)) + sum(rows * size(v) // max(1, v.shape[0]) for v in step.inputs[:-1])
    if step.kernel == "rope_append":                       # only the new tokens' places are written
        depth, pages = step.outputs[0].shape[0], step.outputs[1:]
        views = [v for v in views if v not in pages]
    if step.kernel == "paged_attention":
        pages = [*step.inputs[1:3], *(step.inputs[-2:] if step.ints[3] else ())]
        views = [v for v in views if v not in pages]
    return sum(map(size, views)) + sum(depth * size(v) // (v.shape[0] * PAGE) for v in pages)


def size(view: View) -> int:
    """Bytes of the elements that a view has of its own: repeated ones count once."""
    return prod(n for n, stride in zip(view.shape, view.strides, strict=True) if stride) * SIZES[view.dtype]


def seconds(work: Work, bandwidth: float) -> float:
    """Of one token, at a bandwidth in GB/s."""
    return work.bytes / (REACHED * bandwidth * 1e9) + work.dispatches * DISPATCH + BOUNDARY

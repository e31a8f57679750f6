"""The one table: which encoder makes the dispatches of a plan's kernel."""
from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from .steps import Dispatch, Step, Unsupported

FILES = {
    "elementwise": "elementwise", "linear": "linear", "experts": "experts",
    "quantized_matmul": "quantized_matmul gather_mm", "attention": "paged_attention attention_lse ragged_attention_lse",
    "rope": "rope rope_append", "sample": "sample", "delta": "short_conv gated_delta", "reduce": "reduce",
    "norm": "softmax rms_norm layer_norm", "gather": "take quantized_take take_along", "scatter": "scatter",
    "matmul": "matmul", "quantize": "quantize dequantize", "random": "random",
}
ENCODERS: dict[str, Callable[[Step], list[Dispatch]]] = {
    kernel: getattr(import_module(f".{file}", __package__), kernel)
    for file, kernels in FILES.items() for kernel in kernels.split()}


def encode(step: Step) -> list[Dispatch]:
    """The dispatches that do a step. Unsupported where no kernel does."""
    if step.kernel not in ENCODERS:
        raise Unsupported("there is no Metal kernel of this name")
    return ENCODERS[step.kernel](step)

"""Host steps: ops that a well-kept library computes (NumPy's LAPACK and pocketfft, SciPy where NumPy lacks them). They
are lazy, compile and appear in plans as any step; the runtime calls back into Python, on one thread."""
from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import plan
from .node import Aval, Node, Primitive
from .primitives import row

if TYPE_CHECKING:
    from .lowering import Lowering

Call = tuple[str, tuple[Any, ...]]
NUMBERS: dict[Call, int] = {}                              # of a function with its parameters, in plans
CALLS: list[Callable[..., Any]] = []
LOCK = threading.Lock()


def host(name: str, rule: Callable[..., list[Aval]], fn: Callable[..., Any], **columns: Any) -> Primitive:
    """A row whose step is kernel host:NAME. fn: (*ndarrays, **params) -> ndarray or a tuple of them; it raises with a
    sentence where it cannot."""
    def lower(lo: Lowering, node: Node) -> None:
        plan.runtime().set_host(compute)
        number = _number(name, fn, node.params)
        lo.step(f"host:{name}", [lo.result(v) for v in node.values()], [lo.view(v) for v in node.inputs], [number])

    return row(name, rule, lower, **columns)


def _number(name: str, fn: Callable[..., Any], params: dict[str, Any]) -> int:
    key = name, tuple(params.items())
    with LOCK:
        if key not in NUMBERS:
            CALLS.append(functools.partial(fn, **params))
            NUMBERS[key] = len(CALLS) - 1
        return NUMBERS[key]


def compute(number: int, outputs: list[np.ndarray], inputs: list[np.ndarray]) -> None:
    """What the runtime calls for a step."""
    results = CALLS[number](*inputs)
    for out, result in zip(outputs, results if isinstance(results, tuple) else (results,), strict=True):
        out[...] = result

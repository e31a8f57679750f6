"""How an array is printed: as MLX prints it, a few elements from both ends of long axes."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

__all__ = ["PrintOptions", "get_printoptions", "printoptions", "set_printoptions"]
EDGE = 3                             # elements that are shown at each end of an axis of more than twice as many


@dataclass
class PrintOptions:
    """precision: digits after the point; -1 for six significant ones."""

    precision: int = -1


_options = PrintOptions()


def set_printoptions(precision: int = -1) -> None:
    _options.precision = precision


def get_printoptions() -> PrintOptions:
    return replace(_options)


@contextmanager
def printoptions(precision: int = -1) -> Iterator[None]:
    """`with mx.printoptions(precision=3): print(a)`"""
    before = _options.precision
    _options.precision = precision
    try:
        yield
    finally:
        _options.precision = before


def _number(x: Any) -> str:
    if isinstance(x, complex):
        imaginary = _number(x.imag)
        return f"{_number(x.real)}{'' if imaginary[0] == '-' else '+'}{imaginary}j"
    if isinstance(x, float):
        return f"{x:g}" if _options.precision < 0 else f"{x:.{_options.precision}f}"
    return str(x)


def elements(array: np.ndarray, indent: int) -> str:
    """Nested brackets, each axis but the last over several lines."""
    if array.ndim == 0:
        return _number(array.item())
    long = len(array) > 2 * EDGE
    shown = [*array[:EDGE], *array[-EDGE:]] if long else array
    rows = [elements(np.asarray(row), indent + 1) for row in shown]
    if long:
        rows.insert(EDGE, "...")
    return f"[{(', ' if array.ndim == 1 else ',' + chr(10) + ' ' * (indent + 1)).join(rows)}]"

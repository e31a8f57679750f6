"""Rotary kinds: each turns a config's `rope_parameters` into inverse frequencies and an attention factor."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..engine import array as mx
from ..engine.errors import UserError
from ..engine.nn import Rope
from .config import Config


def linear(inv_freq: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    """Positions shrink by `factor`."""
    return inv_freq / p["factor"]


def llama3(inv_freq: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    """Llama 3.1: long wavelengths shrink by `factor`, short ones stay, those between blend."""
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    turns = p["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # within the original context
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inv_freq * (blend + (1 - blend) / p["factor"])


KINDS: dict[str, Callable[[np.ndarray, dict[str, Any]], np.ndarray]] = {
    "default": lambda inv_freq, p: inv_freq,
    "linear": linear,
    "llama3": llama3,
}


def rope(config: Config) -> Rope:
    """The rotary table of a config: `rope_type` names the kind, `rope_theta` the base."""
    p = {"original_max_position_embeddings": config.max_position_embeddings, **config.rope_parameters}
    kind = p.get("rope_type", "default")
    if kind not in KINDS:
        raise UserError(f"[rope] rope_type {kind!r} is not known; known are {', '.join(KINDS)}")
    dims = int(config.head_dim * p.get("partial_rotary_factor", 1.0))
    inv_freq = p["rope_theta"] ** -(np.arange(0, dims, 2) / dims)
    try:
        return Rope(mx.array(KINDS[kind](inv_freq, p).astype(np.float32)))
    except KeyError as missing:
        raise UserError(f"[rope] rope_type {kind!r} needs {missing} in rope_parameters") from None

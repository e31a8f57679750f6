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

Parameters = dict[str, Any]
NONE = Rope(mx.zeros((1,)))  # no positions: every angle is 0


def linear(inv_freq: np.ndarray, p: Parameters) -> np.ndarray:
    """Positions shrink by `factor`."""
    return inv_freq / p["factor"]


def llama3(inv_freq: np.ndarray, p: Parameters) -> np.ndarray:
    """Llama 3.1: long wavelengths shrink by `factor`, short ones stay, those between blend."""
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    turns = p["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # within the original context
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inv_freq * (blend + (1 - blend) / p["factor"])


def yarn(inv_freq: np.ndarray, p: Parameters) -> np.ndarray:
    """YaRN (arXiv:2309.00071): channels that turn less than beta_slow times in the original context shrink by `factor`,
    those beyond beta_fast stay, a ramp over the channels between."""
    pairs, original, theta = len(inv_freq), p["original_max_position_embeddings"], p["rope_theta"]
    turns = p.get("beta_fast") or 32, p.get("beta_slow") or 1
    low, high = (pairs * math.log(original / (n * 2 * math.pi)) / math.log(theta) for n in turns)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = np.clip((np.arange(pairs) - low) / (high - low or 0.001), 0, 1)
    return inv_freq * (1 - ramp + ramp / p["factor"])


def yarn_scale(p: Parameters) -> float:
    def grow(m: float) -> float:
        return 0.1 * m * math.log(p["factor"]) + 1.0 if p["factor"] > 1 else 1.0

    m, m_all = p.get("mscale"), p.get("mscale_all_dim")
    return grow(m) / grow(m_all) if m and m_all else grow(1.0)


def longrope_scale(p: Parameters) -> float:
    original = p["original_max_position_embeddings"]
    factor = p.get("factor") or p["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


# kind: how frequencies change. Dynamic NTK changes nothing within max_position_embeddings, and none goes beyond.
KINDS: dict[str, Callable[[np.ndarray, Parameters], np.ndarray]] = {
    "default": lambda inv_freq, p: inv_freq,
    "dynamic": lambda inv_freq, p: inv_freq,
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": lambda inv_freq, p: inv_freq / np.array(p["short_factor"]),
}
SCALES: dict[str, Callable[[Parameters], float]] = {"yarn": yarn_scale, "longrope": longrope_scale}
OLD_NAMES = {"su": "longrope"}


def rope(config: Config, layer_type: str = "", interleaved: bool = False) -> Rope:
    """The rotary table of a config: `rope_type` names the kind, `rope_theta` the base. Where parameters are given for
    each kind of layer, those of `layer_type`."""
    given = config.rope_parameters.get(layer_type, config.rope_parameters)
    p = {"original_max_position_embeddings": config.original_max_position_embeddings or config.max_position_embeddings,
         "max_position_embeddings": config.max_position_embeddings, "rope_theta": 10000.0, **given}
    kind = OLD_NAMES.get(p.get("rope_type", "default"), p.get("rope_type", "default"))
    if kind not in KINDS:
        raise UserError(f"[rope] rope_type {kind!r} is not known; known are {', '.join(KINDS)}")
    dims = int(config.head_dim * p.get("partial_rotary_factor", config.partial_rotary_factor))
    if not (math.isfinite(p["rope_theta"]) and p["rope_theta"] > 0 and 1 < dims <= config.head_dim):
        found = f"rope_theta is {p['rope_theta']!r} and {dims} of {config.head_dim} channels turn"
        raise UserError(f"[rope] {found}, wanted a number above 0 and at least 2 channels")
    inv_freq = p["rope_theta"] ** -(np.arange(0, dims, 2) / dims)
    try:
        scale = p.get("attention_factor") or (SCALES[kind](p) if kind in SCALES else 1.0)
        with np.errstate(all="ignore"):
            turned = KINDS[kind](inv_freq, p).astype(np.float32)
        if turned.shape != inv_freq.shape or not (np.isfinite(turned).all() and math.isfinite(scale)):
            raise UserError(f"[rope] rope_parameters {p} give no frequency for each pair of {dims} channels")
        table = Rope(mx.array(turned), scale, interleaved)
        if kind != "longrope":
            return table
        far = mx.array((inv_freq / np.array(p["long_factor"])).astype(np.float32))
        return table._replace(far=far, near=p["original_max_position_embeddings"])
    except KeyError as missing:
        raise UserError(f"[rope] rope_type {kind!r} needs {missing} in rope_parameters") from None

"""rope and rope_append: the formula in float64, but for the angle, which is a float32 product as in transformers."""
from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np

from ..rope import PAGE, PAGES
from . import Vector, rounded

EPS = 1e-6


def _frequencies(size: int) -> np.ndarray:
    return (1 / 10000.0 ** (np.arange(0, size, 2) / max(size, 1))).astype(np.float32)


def _turned(x: np.ndarray, positions: np.ndarray, freq: np.ndarray, interleaved: bool, scale: float) -> np.ndarray:
    """x (T,H,D) in float64."""
    size = 2 * len(freq)
    angle = (positions.astype(np.float32)[:, None] * freq).astype(float)[:, None]
    a, b = (x[..., 0:size:2], x[..., 1:size:2]) if interleaved else (x[..., :size // 2], x[..., size // 2:size])
    pair = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    y = x.astype(float)
    turned = np.stack(pair, -1).reshape(*x.shape[:2], size) if interleaved else np.concatenate(pair, -1)
    y[..., :size] = scale * turned
    return y


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _rope(tokens: int, heads: int, size: int, turned: int, interleaved: bool) -> Vector:
    rng = np.random.default_rng(tokens + size)
    x, freq = _normal(rng, tokens, heads + 1, size)[:, 1:], _frequencies(turned)          # part of wider rows
    positions = rng.integers(0, 2**20, tokens).astype(np.int32)
    # the circle's polynomials and the sum of two products are good to 3e-7
    return Vector(f"rope-T{tokens}-H{heads}-D{size}-{turned}{'-interleaved' * interleaved}", "rope",
                  [np.empty((tokens, heads, size), np.float32)], [x, positions, freq], [int(interleaved)], [1.25],
                  [_turned(x, positions, freq, interleaved, 1.25)], 2e-6)


def _stored(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes of x (T,K,D), before rounding, and their scales."""
    scale = np.abs(x).max(-1) / 127
    return x / np.where(scale > 0, scale, 1)[..., None], scale


def _append(tokens: int, heads: int, kv_heads: int, size: int, turned: int, dtype: str, norm: bool, interleaved: bool,
            seed: int) -> Vector | None:
    """None if an int8 code is too near to a tie."""
    rng = np.random.default_rng(seed)
    pages, freq, quantized = tokens // PAGE + 2, _frequencies(turned), dtype == "int8"
    wide = _normal(rng, tokens, heads + 2 * kv_heads, size)                               # q, k and v of one product
    q, k, v = wide[:, :heads], wide[:, heads:-kv_heads], wide[:, -kv_heads:]
    v[:1] = 0                                                                             # its scale is 0
    positions = rng.integers(0, 4096, tokens).astype(np.int32)
    slots = rng.permutation(pages * PAGE)[:tokens].astype(np.int32)
    slots[1::7] = -1
    norms = [rng.uniform(0.5, 2, size).astype(np.float32) for _ in range(2 * norm)]
    k_pages, k_wanted = rounded(np.full((pages, kv_heads, size, PAGE), 77.0), dtype)
    v_pages, v_wanted = rounded(np.full((pages, kv_heads, PAGE, size), 77.0), dtype)
    scales = [np.full((pages, kv_heads, PAGE), 5, np.float32) for _ in range(2 * quantized)]
    normed = [x / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + EPS) * (norms[i] if norm else 1)
              if norm else x.astype(float) for i, x in enumerate((q, k))]
    y, k_turned = (_turned(x, positions, freq, interleaved, 1.0) for x in normed)
    (k_codes, k_scale), (v_codes, v_scale) = (_stored(x) if quantized else (x, x[..., 0]) for x in (k_turned, v))
    if quantized and np.abs(np.abs(np.concatenate([k_codes, v_codes]) % 1) - 0.5).min(initial=1) < 2e-4:
        return None
    wanted_scales = [x.astype(float) for x in scales]
    for t, slot in enumerate(slots):
        if slot >= 0:
            page, at = divmod(int(slot), PAGE)
            k_wanted[page, :, :, at] = np.rint(k_codes[t]) if quantized else k_codes[t]
            v_wanted[page, :, at] = np.rint(v_codes[t]) if quantized else v_codes[t]
            for wanted, scale in zip(wanted_scales, (k_scale, v_scale), strict=False):
                wanted[page, :, at] = scale[t]
    name = f"rope_append-T{tokens}-H{heads}-K{kv_heads}-D{size}-{turned}-{dtype}"
    half = {"float32": 1e-5, "float16": 5e-4, "bfloat16": 4e-3, "int8": 1e-6}[dtype]      # of a unit in the last place
    return Vector(name + "-norm" * norm + "-interleaved" * interleaved, "rope_append",
                  [np.empty((tokens, heads, size), np.float32), k_pages, v_pages, *scales],
                  [q, k, v, k_pages, v_pages, positions, slots, freq, *norms, *scales],
                  [int(interleaved), int(norm), int(quantized)], [1.0, EPS],
                  [y, k_wanted, v_wanted, *wanted_scales], [1e-5, half, half, *[1e-5 for _ in scales]])


def vectors() -> Iterator[Vector]:
    for interleaved in (False, True):
        for shape in ((0, 2, 8, 8), (1, 9, 64, 64), (33, 2, 40, 40), (7, 4, 80, 32), (2, 1, 24, 6), (2, 1, 256, 256)):
            yield _rope(*shape, interleaved)
    shapes = [(1, 9, 3, 64, 64, False, False), (2, 4, 2, 128, 128, True, False), (33, 2, 1, 40, 40, False, True),
              (7, 3, 1, 8, 4, True, True), (0, 2, 1, 8, 8, False, False), (1, 4, 1, 256, 64, True, False)]
    for dtype in PAGES:
        for tokens, heads, kv_heads, size, turned, norm, interleaved in shapes:
            tries = (_append(tokens, heads, kv_heads, size, turned, dtype, norm, interleaved, seed) for seed in count())
            yield next(v for v in tries if v)

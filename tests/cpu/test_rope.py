"""rope against transformers and the interleaved formula; rope_append's bytes against NumPy's rounding."""

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lazulite.engine import cpu

PAGE = 32


def inv_freq(R, base=10000.0):
    return (1.0 / base ** (np.arange(0, R, 2, dtype=np.float32) / R)).astype(np.float32)


def call_rope(isa, x, positions, freq, interleaved=False, scale=1.0):
    y = np.full_like(x, np.nan)
    cpu.call("rope", outputs=[y], inputs=[x, positions, freq], ints=[int(interleaved)], floats=[scale], isa=isa)
    return y


def formula(x, positions, freq, interleaved=False, scale=1.0):
    """In float64, but for the angle, which is a float32 product."""
    R = 2 * len(freq)
    angle = (positions.astype(np.float32)[:, None] * freq).astype(float)[:, None]
    a, b = (x[..., 0:R:2], x[..., 1:R:2]) if interleaved else (x[..., : R // 2], x[..., R // 2 : R])
    y = x.astype(float)
    turned = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    y[..., :R] = scale * (np.stack(turned, -1).reshape(*x.shape[:2], R) if interleaved else np.concatenate(turned, -1))
    return y


@pytest.mark.parametrize("D", [8, 64, 128])
def test_equals_transformers(isa, D):
    rng = np.random.default_rng(D)
    x, positions = rng.standard_normal((37, 3, D)).astype(np.float32), rng.integers(0, 8192, 37).astype(np.int32)
    angle = torch.tensor(positions, dtype=torch.float32)[:, None] * torch.tensor(inv_freq(D))
    angle = torch.cat([angle, angle], -1)[None]
    q = torch.tensor(x).permute(1, 0, 2)[None]
    expected = apply_rotary_pos_emb(q, q, angle.cos(), angle.sin())[0][0].permute(1, 0, 2).numpy()
    np.testing.assert_allclose(call_rope(isa, x, positions, inv_freq(D)), expected, atol=2e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("T, H, D, R", [(0, 2, 8, 8), (1, 9, 64, 64), (50, 2, 40, 40), (33, 4, 80, 32), (7, 1, 24, 6)])
def test_is_the_formula(isa, interleaved, T, H, D, R):
    rng = np.random.default_rng(R)
    x, positions = rng.standard_normal((T, H, D)).astype(np.float32), rng.integers(0, 2**20, T).astype(np.int32)
    y = call_rope(isa, x, positions, inv_freq(R), interleaved, 1.25)
    np.testing.assert_allclose(y, formula(x, positions, inv_freq(R), interleaved, 1.25), atol=2e-6)
    np.testing.assert_array_equal(y[..., R:], x[..., R:])


def test_far_positions_keep_accuracy(isa):
    positions = np.array([0, 1, 2**20 - 1, 2**20, 777777], np.int32)
    x = np.zeros((5, 1, 256), np.float32)
    x[..., :128] = 1  # y is then (cos, sin)
    np.testing.assert_allclose(
        call_rope(isa, x, positions, inv_freq(256)), formula(x, positions, inv_freq(256)), atol=1.2e-7
    )


def test_strided_rows(isa):
    qkv = np.random.default_rng(0).standard_normal((6, 5, 64)).astype(np.float32)
    positions = np.arange(6, dtype=np.int32)
    part = call_rope(isa, qkv[:, 1:4], positions, inv_freq(64))
    np.testing.assert_allclose(part, formula(qkv[:, 1:4], positions, inv_freq(64)), atol=2e-6)


def rounded(x, dtype):
    """(values as stored, their scales) for x (T, K, D)."""
    if dtype in ("float16", "float32"):
        return x.astype(dtype), None
    if dtype == "bfloat16":
        u = x.view(np.uint32)
        return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16), None
    top = np.abs(x).max(-1)
    scale = top / np.float32(127)
    return np.rint(x / np.where(scale > 0, scale, 1)[..., None]).astype(np.int8), scale


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("T, H, K, D, norm, interleaved", [
    (1, 9, 3, 64, False, False), (40, 2, 2, 128, True, False), (5, 3, 1, 40, True, True), (70, 1, 1, 8, False, True),
])  # fmt: skip
def test_append(isa, dtype, T, H, K, D, norm, interleaved):
    rng = np.random.default_rng(T)
    N = T // PAGE + 3
    q, k, v = (rng.standard_normal((T, n, D)).astype(np.float32) for n in (H, K, K))
    v[0] = 0  # an all-zero head has scale 0
    positions = rng.integers(0, 4096, T).astype(np.int32)
    slots = rng.permutation(N * PAGE)[:T].astype(np.int32)
    slots[1::7] = -1
    weights = [rng.uniform(0.5, 2, D).astype(np.float32) for _ in range(2)] if norm else []
    eps, freq = 1e-6, inv_freq(D)
    store = {"bfloat16": np.uint16}.get(dtype) or np.dtype(dtype)
    k_pages, v_pages = np.full((N, K, D, PAGE), 77, store), np.full((N, K, PAGE, D), 77, store)
    scales = [np.full((N, K, PAGE), 5, np.float32) for _ in range(2)] if dtype == "int8" else []
    tag = (lambda a: (a, "bfloat16")) if dtype == "bfloat16" else (lambda a: a)
    out = np.full_like(q, np.nan)
    cpu.call(
        "rope_append",
        outputs=[out, tag(k_pages), tag(v_pages), *scales],
        inputs=[q, k, v, tag(k_pages), tag(v_pages), positions, slots, freq, *weights, *scales],
        ints=[int(interleaved), int(norm), len(scales) // 2],
        floats=[1.0, eps],
        isa=isa,
    )
    normed = [x / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + eps) * w for x, w in zip((q, k), weights)]  # noqa: B905
    q2, k2 = (normed[0], normed[1]) if norm else (q, k)
    np.testing.assert_allclose(out, formula(q2, positions, freq, interleaved), atol=1e-5, err_msg=isa)
    # the bytes: what the kernel's own rope gives for k, rounded by NumPy (the norm's last bit is its own)
    if not norm:
        stored, k_scale = rounded(call_rope(isa, k, positions, freq, interleaved), dtype)
        got_k = np.stack([k_pages[s // PAGE, :, :, s % PAGE] for s in slots if s >= 0])
        np.testing.assert_array_equal(got_k, stored[slots >= 0])
    stored, v_scale = rounded(v, dtype)
    got_v = np.stack([v_pages[s // PAGE, :, s % PAGE] for s in slots if s >= 0])
    np.testing.assert_array_equal(got_v, stored[slots >= 0])
    if scales:
        got = np.stack([scales[1][s // PAGE, :, s % PAGE] for s in slots if s >= 0])
        np.testing.assert_allclose(got, v_scale[slots >= 0], rtol=1e-7)
    untouched = np.setdiff1d(np.arange(N * PAGE), slots)
    assert (v_pages[untouched // PAGE, :, untouched % PAGE] == 77).all()
    assert (k_pages[untouched // PAGE, :, :, untouched % PAGE] == 77).all()

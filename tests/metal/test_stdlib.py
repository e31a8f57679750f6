"""The emulated device's metal_stdlib against the Metal Shading Language specification, by NumPy."""
import numpy as np
import pytest

from lazulite.engine.errors import UserError
from lazulite.engine.metal import emulated

N = 64                                         # threads: two simdgroups
T = np.arange(N)
X = np.random.default_rng(0).permutation(N).astype(np.float64)             # whole numbers: sums are exact
S, Q = X.reshape(2, 32), X.reshape(16, 4)      # by simdgroup, by quadgroup
BITS = (T * 2654435761 & 0xFFFFFFFF).astype(np.uint32)


def each(values, n):
    """A value of a group, in all its threads."""
    return np.repeat(np.asarray(values, np.float64), n)


def bits(function):
    return np.array([function(f"{b:032b}") for b in BITS], np.float64)


# Expression of float x = X[i], uint u = BITS[i], thread i: what each thread gets.
ROWS = {
    "simd_sum(x)": each(S.sum(1), 32), "simd_max(x)": each(S.max(1), 32), "simd_min(int(x))": each(S.min(1), 32),
    "simd_product(i % 32 < 3 ? x : 1.0f)": each(S[:, :3].prod(1), 32),
    "simd_or(1u << i % 8)": each([255, 255], 32), "simd_and(int(i) | 7)": each([7, 39], 32),
    "simd_xor(i)": each([0, 0], 32), "simd_any(i == 40)": each([0, 1], 32), "simd_all(i >= 32)": each([0, 1], 32),
    "simd_shuffle(x, ushort(31 - i % 32))": S[:, ::-1].ravel(), "simd_broadcast(x, 5)": each(S[:, 5], 32),
    "simd_broadcast_first(x)": each(S[:, 0], 32), "simd_shuffle_xor(x, 9)": X[T ^ 9],
    "simd_shuffle_rotate_down(x, 3)": np.roll(S, -3, 1).ravel(),
    "simd_prefix_inclusive_sum(x)": S.cumsum(1).ravel(), "simd_prefix_exclusive_sum(x)": (S.cumsum(1) - S).ravel(),
    "simd_sum(float2(x, 1.0f)).y": each([32, 32], 32), "simd_is_first()": T % 32 == 0,
    "popcount(uint(ulong(simd_ballot(x > 31.0f))))": each((S > 31).sum(1), 32),
    "quad_sum(x)": each(Q.sum(1), 4), "quad_max(x)": each(Q.max(1), 4), "quad_broadcast(x, 2)": each(Q[:, 2], 4),
    "quad_shuffle_xor(x, 1)": X[T ^ 1], "quad_shuffle(x, ushort(3 - i % 4))": Q[:, ::-1].ravel(),
    "popcount(u)": bits(lambda b: b.count("1")), "clz(u)": bits(lambda b: len(b) - len(b.lstrip("0"))),
    "ctz(u)": bits(lambda b: len(b) - len(b.rstrip("0"))), "reverse_bits(u) >> 8": bits(lambda b: int(b[::-1], 2) >> 8),
    "mulhi(u, u) >> 8": (BITS.astype(object)**2 >> 40).astype(np.float64),
    "rotate(u, 12u) & 0xfffu": BITS >> 20, "extract_bits(u, 3u, 7u)": BITS >> 3 & 127,
    "as_type<uint>(x) >> 20": X.astype(np.float32).view(np.uint32) >> 20,
    "half(x * 0.1f)": (X.astype(np.float32) * np.float32(0.1)).astype(np.float16),
    "bfloat(1.0f + x * 0.00390625f)": 1 + np.round(X / 2) / 128,                # ties to even, as np.round
    "clamp(x, 10.0f, 20.0f)": X.clip(10, 20), "select(x, 2.0f, i > 3)": np.where(T > 3, 2, X),
    "max(x, NAN)": X, "min(NAN, x)": X, "mix(x, 3.0f, 0.25f)": X + (3 - X) * 0.25, "step(5.0f, x)": X >= 5,
    "sign(x - 7.0f)": np.sign(X - 7), "fract(x * 0.25f)": X / 4 % 1, "saturate(x - 3.0f)": (X - 3).clip(0, 1),
    "rint(x * 0.5f)": np.round(X / 2), "round(x * 0.5f)": np.floor(X / 2 + 0.5), "trunc(x * -0.5f)": np.trunc(-X / 2),
    "(uint4(u) >> uint4(0u, 8u, 16u, 24u)).w": BITS >> 24, "float4(int4(int(x))).xyz.z": X,
    "any(float2(x, 1.0f) < float2(0.5f))": X < 0.5, "all(float2(x, 1.0f) < float2(2.0f))": X < 2,
    "float(uchar4(uchar(i), 1, 2, 3).lo.x)": T, "numeric_limits<short>::max()": each([32767] * 2, 32),
    "sizeof(float3)": each([16] * 2, 32),
    "alignof(packed_float3) * 100 + sizeof(packed_half3)": each([406] * 2, 32),
    "fma(x, 2.0f, 1.0f)": 2 * X + 1, "ldexp(x, 3)": X * 8, "abs(int(i) - 9)": abs(T - 9), "copysign(x, -1.0f)": -X,
}
SOURCE = """
kernel void rows(device float* y [[buffer(0)]], device const float* xs [[buffer(1)]],
                 device const uint* us [[buffer(2)]], uint i [[thread_index_in_threadgroup]]) {
  const float x = xs[i];
  const uint u = us[i];
  (void)x; (void)u;
  %s
}
"""


def run(source, rows):
    y = emulated.Guarded(rows * N * 4)
    emulated.library(source).run("rows", {0: y.bytes, 1: X.astype(np.float32), 2: BITS}, (1,), (N,))
    return y.bytes.view(np.float32).reshape(rows, N)


def test_functions():
    found = run(SOURCE % "\n".join(f"y[{k * N} + i] = float({text});" for k, text in enumerate(ROWS)), len(ROWS))
    wrong = {text: (y[y != wanted][:4], wanted[y != wanted][:4])
             for y, (text, wanted) in zip(found, ROWS.items(), strict=True) if not np.array_equal(y, wanted)}
    assert not wrong


def test_atomics():
    """Each thread adds to one number; what it got back is the sum of those before it."""
    source = SOURCE.replace("device float* y", "device atomic_int* y") % (
        "const int before = atomic_fetch_add_explicit(y, int(x), memory_order_relaxed);"
        "atomic_fetch_max_explicit(y + 1, before, memory_order_relaxed);"
        "atomic_fetch_or_explicit(y + 2, 1 << i % 8, memory_order_relaxed);"
        "int wanted = 0; while (!atomic_compare_exchange_weak_explicit(y + 3, &wanted, wanted + 2,"
        " memory_order_relaxed, memory_order_relaxed)) {} atomic_store_explicit(y + 4, 7, memory_order_relaxed);")
    y = np.zeros(5, np.int32)
    emulated.library(source).run("rows", {0: y, 1: X.astype(np.float32), 2: BITS}, (1,), (N,), schedule=2)
    assert y[0] == X.sum() and X.sum() - N <= y[1] < X.sum() and y[2:].tolist() == [255, 2 * N, 7]


@pytest.mark.parametrize("line", [
    "y[i] = max(x, 1);", "y[i] = exp(1);", "y[i] = float(simd_sum(bfloat(x)));", "y[i] = erf(x);",
    "y[i] = simd_sum(double(x));", "simdgroup_half8x8 a; simdgroup_load(a, xs);", "y[i] = as_type<float>(half(x));",
    "float4 v = float3(x); y[i] = v.x;", "y[i] = float4(x).q;", "int a[i]; y[i] = float(a[0]);"])
def test_metal_would_refuse_it_too(line):
    with pytest.raises(UserError, match="error"):
        emulated.library(SOURCE % line)

"""Fused ops against MLX or a plain NumPy loop: kernels where the runtime has them, else definitions."""
import mlx.core as mlx
import numpy as np
import pytest

from lazulite.engine import array as mx

rng = np.random.default_rng(1)


def normal(*shape, dtype=np.float32):
    return rng.normal(size=shape).astype(dtype)


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_norms_and_softmax_are_mlx(dtype, runtime):
    x, w, b = normal(5, 3, 48), normal(48), normal(48)
    a, m = mx.array(x, getattr(mx, dtype)), mlx.array(x).astype(getattr(mlx, dtype))
    tolerance = 2e-5 if dtype == "float32" else 2e-2
    pairs = [(mx.fast.rms_norm(a, mx.array(w), 1e-5), mlx.fast.rms_norm(m, mlx.array(w), 1e-5)),
             (mx.fast.rms_norm(a, None, 1e-5), mlx.fast.rms_norm(m, None, 1e-5)),
             (mx.fast.layer_norm(a, mx.array(w), mx.array(b), 1e-5),
              mlx.fast.layer_norm(m, mlx.array(w), mlx.array(b), 1e-5)),
             (mx.fast.layer_norm(a, None, None, 1e-5), mlx.fast.layer_norm(m, None, None, 1e-5)),
             *((mx.softmax(a, axis), mlx.softmax(m, axis)) for axis in (-1, 0, (0, 2), None))]
    for ours, theirs in pairs:
        assert ours.dtype is a.dtype
        close(ours, np.array(theirs.astype(mlx.float32)), tolerance)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_mlx(interleaved, runtime):
    t, heads, d, rotary = 7, 3, 16, 12
    x = normal(t, heads, d)
    inv_freq = 1 / 10000 ** (np.arange(0, rotary, 2) / rotary)
    theirs = mlx.fast.rope(mlx.array(x.transpose(1, 0, 2))[None], rotary, traditional=interleaved, base=10000.0,
                           scale=1.0, offset=5)
    ours = mx.fast.rotate(mx.array(x), mx.arange(5, 5 + t), mx.array(inv_freq), interleaved=interleaved)
    close(ours, np.array(theirs[0]).transpose(1, 0, 2))
    scaled = mx.fast.rotate(mx.array(x), mx.arange(5, 5 + t), mx.array(inv_freq), interleaved=interleaved, scale=2.0)
    close(scaled[..., :rotary], np.asarray(ours)[..., :rotary] * 2)


@pytest.mark.parametrize("options", [
    {"traditional": False, "base": 100.0, "offset": 3}, {"traditional": True, "base": 100.0, "offset": 0},
    {"traditional": False, "base": 100.0, "offset": [1, 5]}, {"traditional": True, "base": None, "offset": 2}], ids=str)
def test_rope_of_batches_is_mlx(options, runtime):
    x = normal(2, 3, 5, 16)
    freqs = None if options["base"] else np.array([1.0, 3.0, 10.0, 30.0, 100.0, 200.0], np.float32)
    results = []
    for module in (mx, mlx):
        offset = options["offset"] if isinstance(options["offset"], int) else module.array(options["offset"])
        given = options | {"offset": offset, "freqs": None if freqs is None else module.array(freqs)}
        results.append(np.array(module.fast.rope(module.array(x), 12, scale=0.5, **given)))
    close(*results)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mask", [None, "causal", "seen", "added"])
def test_attention_is_mlx(mask, dtype, runtime):
    q, k, v, sinks = normal(2, 4, 7, 16), normal(2, 2, 9, 16), normal(2, 2, 9, 16), normal(4)
    masks = {"seen": np.tril(np.ones((7, 9), bool), 1), "added": normal(4, 7, 9)}
    results = []
    for module in (mx, mlx):
        arrays = [module.array(x).astype(getattr(module, dtype)) for x in (q, k, v)]
        given = module.array(masks[mask]) if mask in masks else mask
        if mask == "added":
            given = given.astype(getattr(module, dtype))
        for s in (None, module.array(sinks).astype(getattr(module, dtype))):
            out = module.fast.scaled_dot_product_attention(*arrays, scale=0.25, mask=given, sinks=s)
            results.append(np.array(out.astype(module.float32)))
    close(results[0], results[2], {"float32": 2e-5, "float16": 4e-3, "bfloat16": 4e-2}[dtype])
    close(results[1], results[3], {"float32": 2e-5, "float16": 4e-3, "bfloat16": 4e-2}[dtype])


def test_gated_delta_rule_is_mlx(runtime):
    b, t, heads, values, d, e = 2, 4, 2, 4, 8, 6
    inputs = [normal(b, t, heads, d), normal(b, t, heads, d), normal(b, t, values, e),
              rng.random((b, t, values), np.float32), rng.random((b, t, values), np.float32)]
    for state in (None, normal(b, values, e, d)):
        for mask in (None, rng.random((b, t)) < 0.7):
            results = []
            for module in (mx, mlx):
                rest = [None if x is None else module.array(x) for x in (state, mask)]
                results.append([np.array(y) for y in module.fast.gated_delta_update(*map(module.array, inputs), *rest)])
            for ours, theirs in zip(*results, strict=True):
                close(ours, theirs, 1e-4)


def test_gradients_are_torchs(runtime):
    """Kernels over many blocks, with tails: their value and gradients against PyTorch's autograd in float64."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    nn = torch.nn.functional
    rows = {"softmax": ([(67, 131)], lambda x: mx.softmax(x, -1), lambda x: torch.softmax(x, -1)),
            "layer_norm": ([(67, 131), (131,), (131,)], lambda x, w, b: mx.fast.layer_norm(x, w, b, 1e-5),
                           lambda x, w, b: nn.layer_norm(x, (131,), w, b)),
            "rms_norm": ([(67, 131), (131,)], lambda x, w: mx.fast.rms_norm(x, w, 1e-5),
                         lambda x, w: nn.rms_norm(x, (131,), w, 1e-5)),
            "cross_entropy": ([(67, 2100)], lambda x: mx.fast.cross_entropy(x, mx.arange(67)),
                              lambda x: nn.cross_entropy(x, torch.arange(67), reduction="none")),
            "attention": ([(2, 4, 150, 24), (2, 2, 150, 24), (2, 2, 150, 40)],
                          lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask="causal"),
                          lambda q, k, v: nn.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2,
                                                                          enable_gqa=True))}
    for name, (shapes, ours, theirs) in rows.items():
        inputs = [normal(*shape) for shape in shapes]
        wide = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
        out = theirs(*wide)
        ct = normal(*out.shape)
        out.backward(torch.tensor(ct, dtype=torch.float64))
        values, gradients = mx.vjp(lambda *xs, f=ours: f(*xs), [mx.array(x) for x in inputs], [mx.array(ct)])
        close(values[0], out.detach().numpy(), 1e-5)
        for got, want in zip(gradients, wide, strict=True):
            np.testing.assert_allclose(np.asarray(got), want.grad.numpy(), rtol=2e-4, atol=2e-4, err_msg=name)


PAGE, PAGES, KV, D = 32, 5, 2, 16


def cache(kind):
    """Empty pages of a dtype; int8 has scales."""
    pages = {"k_pages": mx.zeros((PAGES, KV, D, PAGE), getattr(mx, kind)),
             "v_pages": mx.zeros((PAGES, KV, PAGE, D), getattr(mx, kind))}
    scales = {n: mx.zeros((PAGES, KV, PAGE)) for n in ("k_scales", "v_scales")} if kind == "int8" else {}
    mx.eval(pages, scales)
    return pages, scales


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 2.0}, {"sinks": True}, {"causal": False}], ids=str)
def test_cache_and_attention_are_a_plain_loop(kind, options, runtime):
    """Two sequences of 40 and 3 tokens, 1 row of padding, pages in any order, in two steps."""
    heads, scale, tolerance = 4, 0.25, {"float16": 1e-2, "bfloat16": 2e-2, "int8": 4e-2}[kind]
    pages, scales = cache(kind)
    table = np.array([[3, 1], [4, 0]], np.int32)
    sinks = mx.array(normal(heads)) if options.get("sinks") else None
    inv_freq, q_norm, k_norm = mx.array([1.0, 0.1, 0.01]), mx.array(normal(D)), mx.array(normal(D))
    keys, values = [[], []], [[], []]
    for counts in ((38, 2), (2, 1)):
        lengths = [len(k) + n for k, n in zip(keys, counts, strict=True)]
        starts = [0, counts[0]]
        spans = [np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)]
        position = np.concatenate([*spans, [0]]).astype(np.int32)
        owner = np.repeat([0, 1], counts)
        slots = np.append(table[owner, position[:-1] // PAGE] * PAGE + position[:-1] % PAGE, -1).astype(np.int32)
        q, k, v = normal(len(slots), heads, D), normal(len(slots), KV, D), normal(len(slots), KV, D)
        results = mx.fast.rope_append(mx.array(q), mx.array(k), mx.array(v), *pages.values(), mx.array(position),
                                      mx.array(slots), inv_freq, q_norm=q_norm, k_norm=k_norm, **scales)
        turned, pages = results[0], dict(zip(pages, results[1:3], strict=True))
        scales = dict(zip(scales, results[3:], strict=True))
        out = mx.fast.paged_attention(turned, *pages.values(), mx.array(table), *map(ints, (starts, counts, lengths)),
                                      scale=scale, **(options | {"sinks": sinks}), **scales)
        normed = mx.fast.definition("rms_norm")(mx.array(k), k_norm, 1e-6)
        turned_k = np.asarray(mx.fast.definition("rotate")(normed, mx.array(position), inv_freq))
        for row, b in enumerate(owner):
            keys[b].append(turned_k[row])
            values[b].append(v[row])
        close(out, attention_loop(np.asarray(turned), keys, values, owner, position, scale, sinks, options), tolerance)


def ints(values):
    return mx.array(np.array(values, np.int32))


def attention_loop(q, keys, values, owner, position, scale, sinks, options):
    out = np.zeros(q.shape)
    for row, b in enumerate(owner):
        k, v = np.array(keys[b], np.float64), np.array(values[b], np.float64)
        at, own = np.arange(len(k)), position[row]
        seen = (at <= own if options.get("causal", True) else at >= 0) & (at > own - options.get("window", 1 << 30))
        for h in range(q.shape[1]):
            scores = k[:, h // 2] @ q[row, h] * scale
            if "softcap" in options:
                scores = np.tanh(scores / options["softcap"]) * options["softcap"]
            e = np.exp(scores) * seen
            out[row, h] = e @ v[:, h // 2] / (e.sum() + (np.exp(np.asarray(sinks)[h]) if sinks is not None else 0))
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantization_is_mlx(bits, runtime):
    for group, name in ((32, "float32"), (64, "float16"), (128, "bfloat16")):
        w = normal(6, 256)
        w[0, :group] = 0.5
        ours, theirs = mx.array(w, getattr(mx, name)), mlx.array(w).astype(getattr(mlx, name))
        for got, want in zip(mx.quantize(ours, group, bits), mlx.quantize(theirs, group, bits), strict=True):
            want = np.array(want if want.dtype == mlx.uint32 else want.astype(mlx.float32))
            np.testing.assert_array_equal(np.asarray(got), want)
        packed = mx.quantize(ours, group, bits)
        matrix = mx.dequantize(*packed, group, bits)
        close(matrix, np.array(mlx.dequantize(*mlx.quantize(theirs, group, bits), group, bits).astype(mlx.float32)),
              {"float32": 1e-6, "float16": 4e-3, "bfloat16": 4e-2}[name])
        exact = np.asarray(mx.dequantize(packed[0], *(s.astype(mx.float32) for s in packed[1:]), group, bits))
        close(mx.quantized_take(*packed, mx.array([[3, 0], [-1, 2]]), group, bits), exact[[[3, 0], [-1, 2]]], 1e-6)
        x, y = normal(3, 256), normal(2, 3, 6)
        close(mx.quantized_matmul(mx.array(x), *packed, True, group, bits), x @ exact.T, 6e-2)
        close(mx.quantized_matmul(mx.array(y), *packed, False, group, bits), y @ exact.astype(np.float64), 1e-4)


LINEARS = {
    "plain": lambda x, w: x @ w[0].T,
    "bias": lambda x, w: x @ w[0].T + w[0][:, 0],
    "half": lambda x, w: x @ w[3].T,
    "shared": lambda x, w: (x @ w[0].T) * (x @ w[1].T),
    "residual": lambda x, w: x + x @ w[0].T,
    "norm": lambda x, w: mx.fast.rms_norm(x, w[0][0], 1e-5) @ w[0].T + x,
    "swiglu": lambda x, w: mx.silu(x @ w[0].T) * (x @ w[1].T),
    "swiglu swapped": lambda x, w: (x @ w[1].T) * mx.silu(x @ w[0].T),
    "sigmoid": lambda x, w: (x @ w[1].T) * mx.sigmoid(x @ w[0].T),
    "geglu": lambda x, w: mx.gelu(x @ w[0].T) * (x @ w[1].T),
    "geglu tanh": lambda x, w: mx.gelu_tanh(x @ w[0].T) * (x @ w[1].T),
    "batched": lambda x, w: x.reshape(2, 3, 64) @ w[0].T,
    "vector": lambda x, w: x[0] @ w[0].T,
    "chain": lambda x, w: (x @ w[0].T) @ w[1].T + x,
    "both read": lambda x, w: x @ w[0].T + mx.fast.rms_norm(x, w[0][0], 1e-5) @ w[1].T,
    "untransposed": lambda x, w: x @ w[2],
    "twice": lambda x, w: (lambda y: y + mx.silu(y))(x @ w[0].T),
    "biases": lambda x, w: (x @ w[0].T + w[1][0]) * (x @ w[1].T + w[0][0]),
    "gate and bias": lambda x, w: mx.silu(x @ w[1].T + w[1][0]) * (x @ w[0].T + w[0][0]),
}


@pytest.mark.parametrize("name", LINEARS)
def test_rewrites_to_linear_change_nothing(name, runtime, monkeypatch):
    """The same function with and without the linear kernel."""
    x = mx.array(normal(6, 64))
    w = [mx.array(normal(64, 64) / 8) for _ in range(3)] + [mx.array(normal(64, 64) / 8, mx.float16)]
    a = mx.placeholder((6, 64), mx.float32)
    results = []
    for kernels in (runtime.kernels, runtime.kernels - {"linear"}):
        plan = mx.lower([LINEARS[name](a, w)], [a], kernels=kernels)
        assert any(s.kernel == "linear" for s in plan.steps) == (kernels is runtime.kernels and name != "untransposed")
        executable = plan.load()
        executable.set_input(0, x)
        executable.run()
        results.append(np.asarray(executable.output(0)))
    close(results[0], results[1], 2e-3)


def test_a_thin_product_is_added_where_it_is_made():
    """c + a b of few columns of a: the same sum as float64's, in c's memory if it is free, else beside it."""
    c, a, b = (mx.array(normal(*shape)) for shape in ((130, 48), (130, 8), (8, 48)))
    wanted = np.asarray(c, np.float64) + np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    before = np.array(c)
    plan = mx.lower([c + a @ b, 2 * c + a @ (b * 1)], [])
    assert [s.kernel for s in plan.steps].count("add_product") == 2
    executable = plan.load()
    executable.run()
    for i, more in enumerate((0, before)):
        np.testing.assert_allclose(np.asarray(executable.output(i)), wanted + more, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(c), before)


@pytest.mark.parametrize("turned", [(), (0,), (1,), (0, 1)], ids=str)
def test_large_float_products(turned, runtime):
    """As exact as float32 sums can be, with tails and every layout; infinity and NaN stay where NumPy has them."""
    a, b = normal(135, 231), normal(231, 165)
    x, y = (mx.array(m.T).T if i in turned else mx.array(m) for i, m in enumerate((a, b)))
    wanted = a.astype(np.float64) @ b
    assert np.max(np.abs(np.asarray(x @ y) - wanted)) <= 2 * np.max(np.abs(a @ b - wanted))
    a[3, 5], a[100, 7] = np.inf, np.nan
    np.testing.assert_array_equal(np.isfinite(np.asarray(mx.array(a) @ y)), np.isfinite(a @ b))

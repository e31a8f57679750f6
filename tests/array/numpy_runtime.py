"""A runtime that runs plans with NumPy: the base kernels only, so that fused ops run their definitions."""
from __future__ import annotations

import math
import statistics
from types import SimpleNamespace

import numpy as np

from lazulite.engine.metal.vectors.random import threefry

CODES = ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "u2", "f4", "f8", "c8"]
BFLOAT16 = 10
erf = np.vectorize(math.erf, otypes=[np.float64])
erfinv = np.vectorize(lambda x: statistics.NormalDist().inv_cdf((x + 1) / 2) / math.sqrt(2), otypes=[np.float64])


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _wrap(x, code):
    return x.astype(CODES[code]).astype(x.dtype)


def _floor_div(a, b):
    if a.dtype.kind in "iu":
        return np.where(b == 0, 0, np.floor_divide(a, np.where(b == 0, 1, b)))
    return np.floor(a / b)


OPS = {
    "neg": np.negative, "abs": np.abs, "sign": np.sign, "floor": np.floor, "ceil": np.ceil, "round": np.rint,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a), "square": np.square, "reciprocal": lambda a: 1 / a, "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log, "log2": np.log2, "log10": np.log10, "log1p": np.log1p, "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan,
    "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh, "erf": erf, "erfinv": erfinv, "sigmoid": _sigmoid,
    "silu": lambda a: a * _sigmoid(a), "gelu": lambda a: a * (1 + erf(a / math.sqrt(2))) / 2,
    "gelu_tanh": lambda a: a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) / 2,
    "relu": lambda a: np.maximum(a, 0), "logical_not": np.logical_not, "bit_not": np.invert, "isnan": np.isnan,
    "conj": np.conj, "imag": np.imag,
    "isinf": np.isinf, "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "floor_div": _floor_div,
    "remainder": np.remainder, "pow": np.power, "maximum": np.maximum, "minimum": np.minimum, "atan2": np.arctan2,
    "logaddexp": np.logaddexp, "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "logical_and": np.logical_and, "logical_or": np.logical_or, "bit_and": np.bitwise_and,
    "bit_or": np.bitwise_or, "bit_xor": np.bitwise_xor, "shl": np.left_shift, "shr": np.right_shift,
    "where": lambda c, a, b: np.where(c != 0, a, b), "wrap": _wrap}
UNARY = list(OPS).index("add")


def load(x, bfloat16=False):
    return (x.astype(np.uint32) << 16).view(np.float32) if bfloat16 else x


def store(out, value):
    if out[1]:
        bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    out[0][...] = value != 0 if out[0].dtype == bool else value


def elementwise(outs, ins, ints, floats):
    dtype = (np.float32, np.float64, np.int64, np.uint64, np.complex64)[ints[0]]
    count, rest = ints[1], list(ints[3:])
    registers = [load(*i).astype(dtype) for i in ins] + [np.asarray(f, dtype) for f in floats]
    registers += [None] * (64 - len(registers))
    names = list(OPS)
    for k in range(len(outs), len(outs) + 5 * count, 5):
        op, dst, *args = rest[k:k + 5]
        name = names[op]
        arity = 1 if op < UNARY else 3 if name == "where" else 2
        values = [registers[args[0]], args[1]] if name == "wrap" else [registers[a] for a in args[:arity]]
        registers[dst] = np.asarray(OPS[name](*values), dtype)
    for out, r in zip(outs, rest, strict=False):
        store(out, registers[r])


def reduce(outs, ins, ints, floats):
    op, n = ints
    x = load(*ins[0])
    axes = tuple(range(x.ndim - n, x.ndim))
    fn = (np.sum, np.prod, np.max, np.min, np.any, np.all, np.argmax, np.argmin)[op]
    wide = x.astype(np.float64 if x.dtype.kind == "f" else x.dtype)
    store(outs[0], np.reshape(fn(wide, axis=axes if op < 6 else -1), outs[0][0].shape))


def take(outs, ins, ints, floats):
    x, index = ins[0][0], ins[1][0]
    if len(index) and (index.max(initial=0) >= x.shape[x.ndim - 2] or index.min(initial=0) < -x.shape[x.ndim - 2]):
        raise RuntimeError("[take] index out of range")
    outs[0][0][...] = np.take(x, index.astype(np.int64), axis=x.ndim - 2)


def matmul(outs, ins, ints, floats):
    a, b = (load(*i).astype(np.float64) for i in ins)
    store(outs[0], a @ b)


def random(outs, ins, ints, floats):
    for row, key in zip(outs[0][0], ins[0][0], strict=True):
        row[...] = threefry(key, len(row), row.dtype)


def dequantized(w, scales, biases, bits, group):
    stream = np.unpackbits(np.ascontiguousarray(w).view(np.uint8), axis=-1, bitorder="little")
    codes = stream.reshape(*w.shape[:-1], -1, bits) @ (1 << np.arange(bits))
    s, b = (np.repeat(load(*v).astype(np.float64), group, -1) for v in (scales, biases))
    return codes * s + b


def linear(outs, ins, ints, floats):
    n, bits, group, norm, epilogue, has_bias, _ = ints
    ins = list(ins)
    x = load(*ins.pop(0)).astype(np.float64)
    if norm:
        x = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + floats[0]) * load(*ins.pop(0))
    weights = []
    for _ in range(n):
        w = ins.pop(0)
        weights.append(dequantized(w[0], ins.pop(0), ins.pop(0), bits, group) if bits else load(*w).astype(np.float64))
    ys = [x @ w.T for w in weights]
    if has_bias:
        ys = [y + load(*ins.pop(0)) for y in ys]
    if epilogue == 1:
        ys = [ys[0] + load(*ins.pop(0))]
    elif epilogue:
        ys = [OPS[("silu", "gelu", "gelu_tanh")[epilogue - 2]](ys[0]) * ys[1]]
    for out, y in zip(outs, ys, strict=True):
        store(out, y)


def along(shape, index):
    """Indices of one axis, the last but one, as an index of all axes."""
    at = list(np.indices(shape))
    at[-2] = index.astype(np.int64)
    return tuple(at)


def scatter(outs, ins, ints, floats):
    x, at = load(*outs[0]), along(ins[0][0].shape, ins[0][0])
    if ints[0]:
        (np.add, np.multiply, np.maximum, np.minimum)[ints[0] - 1].at(x, at, load(*ins[1]))
    else:
        x[at] = load(*ins[1])
    store(outs[0], x)


def take_along(outs, ins, ints, floats):
    outs[0][0][...] = ins[0][0][along(ins[1][0].shape, ins[1][0])]


def sort(outs, ins, ints, floats):
    store(outs[0], np.sort(load(*ins[0]), -1))


def argsort(outs, ins, ints, floats):
    store(outs[0], np.argsort(load(*ins[0]), -1, kind="stable"))


def scan(outs, ins, ints, floats):
    op, reverse, exclusive = ints
    x = np.flip(load(*ins[0]), -2) if reverse else load(*ins[0])
    y = (np.add, np.multiply, np.maximum, np.minimum, np.logaddexp)[op].accumulate(x, -2, dtype=outs[0][0].dtype)
    if exclusive:
        y = np.concatenate([np.full_like(y[..., :1, :], op), y[..., :-1, :]], -2)
    store(outs[0], np.flip(y, -2) if reverse else y)


def conv(outs, ins, ints, floats):
    stride, before, dilation, spread, (groups, flip) = ints[:3], ints[3:6], ints[6:9], ints[9:12], ints[12:]
    x, w, out = load(*ins[0]), load(*ins[1]), np.zeros(outs[0][0].shape)
    places = np.indices(out.shape[1:4])
    for tap in np.ndindex(*w.shape[1:4]):
        turned = [k - 1 - t if flip else t for t, k in zip(tap, w.shape[1:4], strict=True)]
        q = [p * s - b + t * d for p, s, b, t, d in zip(places, stride, before, turned, dilation, strict=True)]
        inside = np.all([(i >= 0) & (i % a == 0) & (i // a < n) for i, a, n in zip(q, spread, x.shape[1:4],
                                                                                  strict=True)], 0)
        at = tuple(np.clip(i // a, 0, n - 1) for i, a, n in zip(q, spread, x.shape[1:4], strict=True))
        patch = (x[(slice(None), *at)] * inside[..., None]).reshape(*out.shape[:4], groups, -1)
        weight = w[(slice(None), *tap)].reshape(groups, -1, w.shape[-1])
        out += np.einsum("npqrgc,goc->npqrgo", patch, weight).reshape(out.shape)
    store(outs[0], out)


KERNELS = {f.__name__: f for f in (elementwise, reduce, take, matmul, linear, random, scatter, take_along, sort,
                                   argsort, scan, conv)}


class NumpyRuntime:
    kernels = frozenset(KERNELS)
    opcodes = {name: i for i, name in enumerate(OPS)}
    adopt = None

    def start(self, plan, pointers, dims):
        self.run(plan, pointers, dims)

    def wait(self, started=None):
        pass

    def set_host(self, compute):
        self.compute = compute

    def alloc(self, nbytes):
        memory = np.full(nbytes, 0xAB, np.uint8)
        return SimpleNamespace(pointer=memory.ctypes.data, nbytes=nbytes, memory=memory, donatable=True)

    def load(self, steps, n_buffers, max_dims, arena_bytes):
        return SimpleNamespace(steps=list(steps), arena=np.full(arena_bytes + 1, 0xCD, np.uint8))

    def run(self, plan, pointers, dims, times=None):
        def array(view):
            shape = tuple(dims[-1 - s] if s < 0 else s for s in view.shape)
            dtype = np.dtype(CODES[getattr(view.dtype, "code", view.dtype)])
            if 0 in shape:
                return np.empty(shape, dtype), view.dtype == BFLOAT16
            base = plan.arena.ctypes.data if view.buffer == 0 else pointers[view.buffer]
            window = SimpleNamespace(__array_interface__={
                "version": 3, "typestr": dtype.str, "shape": shape,
                "strides": tuple(s * dtype.itemsize for s in view.strides),
                "data": (base + view.offset, False)})
            return np.asarray(window), view.dtype == BFLOAT16

        with np.errstate(all="ignore"):
            for step in plan.steps:
                if step.kernel.startswith("host:"):
                    self.compute(step.ints[0], [array(v)[0] for v in step.outputs], [array(v)[0] for v in step.inputs])
                    continue
                KERNELS[step.kernel]([array(v) for v in step.outputs], [array(v) for v in step.inputs], step.ints,
                                     step.floats)

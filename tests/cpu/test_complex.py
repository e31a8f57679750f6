"""complex64 in the elementwise kernel: each operation against NumPy's complex128, on each instruction set."""
import numpy as np
import pytest

from lazulite.engine import cpu

UNARY = {"neg": np.negative, "abs": np.abs, "sign": lambda z: z / np.abs(z), "sqrt": np.sqrt, "square": np.square,
         "rsqrt": lambda z: 1 / np.sqrt(z), "reciprocal": np.reciprocal, "exp": np.exp, "expm1": np.expm1,
         "log": np.log, "log2": np.log2, "log10": np.log10, "log1p": np.log1p,
         "sin": np.sin, "cos": np.cos, "tan": np.tan,
         "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan,
         "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh, "conj": np.conj, "imag": np.imag,
         "logical_not": np.logical_not, "isnan": np.isnan, "isinf": np.isinf}
BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "pow": np.power, "eq": np.equal,
          "ne": np.not_equal, "logical_and": np.logical_and, "logical_or": np.logical_or}


def run(op: str, out: np.ndarray, inputs: list[np.ndarray], isa: str) -> np.ndarray:
    operands = [*range(len(inputs)), 0, 0][:3]
    code = [4, 1, 0, len(inputs), cpu.runtime().opcodes[op], len(inputs), *operands]
    cpu.call("elementwise", [out], inputs, code, isa=isa)
    return out


@pytest.mark.parametrize("op", [*UNARY, *BINARY])
@pytest.mark.parametrize("size", [1, 15, 1030])
def test_operations(op, size, isa):
    rng = np.random.default_rng(size)
    parts = rng.standard_normal((1 + (op in BINARY), 2 * size, 2))
    inputs = [(p @ [1, 1j]).astype(np.complex64)[::2] for p in parts]
    wanted = (BINARY if op in BINARY else UNARY)[op](*(z.astype(np.complex128) for z in inputs))
    found = run(op, np.empty(size, np.complex64), inputs, isa)
    np.testing.assert_allclose(found, wanted, rtol=3e-6, atol=3e-6)


def test_stores_and_loads_take_the_real_part(isa):
    z = np.array([1.5 + 2j, -3 + 1j, 0, 2j], np.complex64)
    for dtype in ("float32", "float64", "float16", "int32", "int8"):
        assert np.array_equal(run("neg", np.empty(4, dtype), [z], isa), (-z.real).astype(dtype))
    assert np.array_equal(run("add", np.empty(4, bool), [z, np.zeros(4, np.float32)], isa), [True, True, False, True])
    by = np.arange(4, dtype=np.int32)
    assert np.array_equal(run("mul", np.empty(4, np.complex64), [z, by], isa), z * by)


def test_quotients_and_magnitudes_do_not_overflow(isa):
    big = np.array([3e30 + 4e30j], np.complex64)
    assert run("abs", np.empty(1, np.float32), [big], isa)[0] == pytest.approx(5e30)
    assert run("div", np.empty(1, np.complex64), [big, big], isa)[0] == 1

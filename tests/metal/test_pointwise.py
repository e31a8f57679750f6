"""What vectors do not say of elementwise, reduce, take, scatter: few texts, 64-bit offsets, limits, wrong indices."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lazulite.engine.cpu import runtime
from lazulite.engine.metal import emulated
from lazulite.engine.metal.elementwise import elementwise
from lazulite.engine.metal.gather import take, take_along
from lazulite.engine.metal.matmul import matmul
from lazulite.engine.metal.reduce import reduce
from lazulite.engine.metal.scatter import scatter
from lazulite.engine.metal.steps import Step, Unsupported, View

ADD, MUL, EXP = (runtime().opcodes[name] for name in ("add", "mul", "exp"))


def view(*shape: int, dtype: str = "float32", strides: tuple[int, ...] = (), buffer: int = 0) -> View:
    rows = tuple(int(np.prod(shape[i + 1:])) for i in range(len(shape)))
    return View(buffer, dtype, 0, shape, strides or rows)


def text(out: View, inputs: list[View], code: list[int], floats: tuple[float, ...] = ()) -> str:
    ints = 0, len(code) // 5, len(floats), code[-4], *code
    return elementwise(Step("elementwise", (out,), tuple(inputs), ints, floats))[0].source


def test_a_text_depends_on_the_program_alone() -> None:
    """Not on shapes, strides, dtypes, constants, or which registers are used again."""
    code = [ADD, 3, 0, 1, 0, MUL, 3, 3, 2, 0]
    first = text(view(7), [view(7), view(7)], code, (0.5,))
    other = view(5, 4, 3, dtype="float16", strides=(12, 1, 4))
    assert text(view(5, 4, 3), [other, view(5, 4, 3, strides=(0, 0, 0))], code, (-2.0,)) == first
    assert text(view(7), [view(7), view(7)], [ADD, 9, 0, 1, 0, MUL, 4, 9, 2, 0], (0.5,)) == first
    assert text(view(7), [view(7), view(7)], [ADD, 3, 0, 1, 0, MUL, 3, 3, 1, 0], (0.5,)) != first
    assert text(view(7), [view(7)], [EXP, 1, 0, 0, 0]) == text(view(9), [view(9)], [EXP, 1, 0, 7, 7])


def wide(encode):
    """The encoder's dispatches with offsets of 64 bits."""
    return lambda step: [replace(d, constants={**d.constants, "WIDE": True}) for d in encode(step)]


def test_wide_offsets_are_the_narrow_ones() -> None:
    x = np.arange(6 * 5 * 8, dtype=np.float32).reshape(6, 5, 8)
    a, b = x.transpose(2, 0, 1)[::-1], x.transpose(2, 0, 1)
    out = np.zeros(a.shape, np.float32)
    emulated.call(wide(elementwise), "elementwise", [out], [a, b], [0, 1, 0, 2, ADD, 2, 0, 1, 0])
    np.testing.assert_array_equal(out, a + b)
    total = np.zeros((8, 6), np.float32)
    emulated.call(wide(reduce), "reduce", [total], [a], [0, 1])
    np.testing.assert_array_equal(total, a.sum(2))
    product = np.zeros((8, 6, 6), np.float32)
    emulated.call(wide(matmul), "matmul", [product], [a, b.swapaxes(1, 2)])
    np.testing.assert_array_equal(product, a @ b.swapaxes(1, 2))


def test_offsets_beyond_31_bits_are_wide() -> None:
    far = view(2**17, 2**14, dtype="uint8", strides=(2**14 + 1, 1))
    near = view(2**16, 2**14, dtype="uint8", strides=(2**14 + 1, 1))
    for v, expected in ((far, True), (near, False)):
        [dispatch] = elementwise(Step("elementwise", (v,), (v,), (2, 0, 0, 0)))
        assert dispatch.constants["WIDE"] is expected and dispatch.constants["AXES"] == 2


LIMITS = {
    "float64": (elementwise, Step("elementwise", (view(3, dtype="float64"),), (), (1, 0, 1, 0), (1.0,)), "float64"),
    "a cast from float64": (elementwise, Step("elementwise", (view(3),), (view(3, dtype="float64"),), (0, 0, 0, 0)),
                            "float64 does not exist"),
    "items": (elementwise, Step("elementwise", (view(2**32),), (), (0, 0, 1, 0), (1.0,)), "4294967296 items"),
    "operands": (elementwise, Step("elementwise", (view(3),) * 31, (), (0, 0, 1, *[0] * 31), (1.0,)), "31 operands"),
    "strides": (elementwise, Step("elementwise", (view(3, strides=(2**31,)),), (), (0, 0, 1, 0), (1.0,)), "strides"),
    "a long column": (scatter, Step("scatter", (view(9, 1),), (view(5000, 1, dtype="int32"), view(5000, 1)), (0,)),
                      "few columns"),
    "rows": (matmul, Step("matmul", (view(2, 2),), (view(2, 3, strides=(2**24, 1)), view(3, 2)), ()), "too far apart"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_left_to_the_cpu(name: str) -> None:
    encode, step, reason = LIMITS[name]
    with pytest.raises(Unsupported, match=reason):
        encode(step)


@pytest.mark.parametrize("index, wrong", [([0, 4, 1], 4), ([-5, 3, 0], -5), ([2, 2**40, 0], 0)])
def test_a_wrong_index_is_reported(index: list[int], wrong: int) -> None:
    """An index is reported as 32 bits, but compared as 64; what it would have moved stays."""
    x, indices = np.ones((4, 2), np.float32), np.array(index)
    each = np.stack([indices, indices], 1)
    for encode, kernel, operands in ((take, "take", [x, indices]), (take_along, "take_along", [x, each])):
        with pytest.raises(IndexError, match=f"index {wrong} is out of bounds for size 4"):
            emulated.call(encode, kernel, [np.zeros((3, 2), np.float32)], operands)
    with pytest.raises(IndexError, match=f"index {wrong} is out of bounds for size 4"):
        emulated.call(scatter, "scatter", [x], [each, np.zeros((3, 2), np.float32)], [1])

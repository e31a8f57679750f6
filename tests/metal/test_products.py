"""What encoders of products promise beside numbers: how many dispatches, what is refused, which indices are wrong."""
import numpy as np
import pytest

from lazulite.engine.metal import emulated
from lazulite.engine.metal.encoders import encode
from lazulite.engine.metal.steps import Unsupported
from lazulite.engine.metal.vectors import Vector, bind, experts, linear


def dispatches(vector: Vector) -> list[str]:
    return [dispatch.function for dispatch in encode(bind(vector)[0])]


@pytest.mark.parametrize(("T", "sizes", "options", "count"), [
    (1, [48, 16, 16], {"norm": True, "bias": True}, 1), (5, [64, 64], {"norm": True, "epilogue": 2}, 1),
    (40, [64], {"epilogue": 1}, 1), (1, [8] * 4, {}, 1), (1, [8] * 5, {}, 2), (0, [8], {}, 0)])
def test_a_linear_is_one_dispatch(T, sizes, options, count):
    """Norm, bias, gate and residual included: what makes a decode layer six."""
    assert dispatches(linear.make("count", T, sizes, 64, 4, 32, "float16", **options)) == ["linear"] * count


@pytest.mark.parametrize(("T", "wanted"), [
    (1, ["experts", "experts_down"]), (8, ["experts_sort", "experts", "experts", "experts_sum"])])
def test_dispatches_of_experts(T, wanted):
    assert dispatches(experts.make(T, 2, 4, 4, 32, "float16", 2, True)) == wanted


@pytest.mark.parametrize("wrong", [np.zeros((9, 128), np.float32)[:, ::2], np.zeros((9, 64), np.float16)])
def test_weights_that_are_refused(wrong):
    """Strided ones, and a type of its own."""
    vector = linear.make("refused", 1, [9, 9], 64)
    vector.inputs[2] = wrong
    with pytest.raises(Unsupported, match="weights of different types, or strided ones"):
        dispatches(vector)


@pytest.mark.parametrize("T", [1, 8])
def test_an_expert_that_is_not_there(T):
    vector = experts.make(T, 2, 4, 0, 0, "float32", 2, False)
    vector.inputs[1][0, 1] = 4
    with pytest.raises(IndexError, match="index 4 is out of bounds for size 4"):
        emulated.run(encode, *bind(vector))


def test_matrices_that_are_not_there():
    one = np.ones((1, 1, 1), np.float32)
    for lhs, rhs in ((0, 1), (-2, 0)):
        indices = [np.array([i], np.int32) for i in (lhs, rhs)]
        with pytest.raises(IndexError, match="is out of bounds for size 1"):
            emulated.call(encode, "gather_mm", [one.copy()], [one, one.copy(), *indices], [0, 0])

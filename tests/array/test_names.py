"""Every public name of mlx.core is here, or in the table of those that are not, with the reason."""
import importlib

import mlx.core as mlx
import pytest

from lazulite.engine import array as mx

METAL = "kernels are sources of this package, not strings of a program"
QQ = "MLX has it on CUDA only, and no model of ours multiplies experts in 4-bit floats on both sides"
WITHOUT = {
    "mlx.core": {
        "distributed": "one machine; networks are no part of the engine",
        "gather_qqmm": QQ, "ArrayLike": "a type for signatures: Any", "ArrayIterator": "a Python iterator",
    },
    "mlx.core.fast": {name: METAL for name in ("metal_kernel", "cuda_kernel", "precompiled_cuda_kernel")},
    "mlx.core.array": {"__div__": "Python 2's", "__rdiv__": "Python 2's", "__setstate__": "__reduce__ restores"},
}


@pytest.mark.parametrize("space", ["mlx.core", "mlx.core.fast", "mlx.core.fft", "mlx.core.linalg", "mlx.core.random",
                                   "mlx.core.array"])
def test_names(space):
    part = space.removeprefix("mlx.core").removeprefix(".")
    theirs = getattr(mlx, part) if part else importlib.import_module(space)
    ours = getattr(mx, part) if part else mx
    names = {n for n in dir(theirs) if part == "array" or not n.startswith("_")}
    excepted = WITHOUT.get(space, {})
    assert sorted(n for n in names if not hasattr(ours, n) and n not in excepted) == []
    assert sorted(n for n in excepted if hasattr(ours, n) or n not in names) == []

"""Arrays beside NumPy, torch, MLX and Python: whose memory is shared, what types become, what is refused."""
import copy
import pickle
import subprocess
import sys
import threading
from typing import Any

import mlx.core as mlx
import numpy as np
import pytest
import torch
from ml_dtypes import bfloat16
from numpy.testing import assert_array_equal

from lazulite.engine import array as mx

TYPES = ["bool_", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16",
         "float32", "float64", "complex64"]
SHAPES = [(), (0,), (3,), (2, 0, 4), (2, 3, 5)]


def values(dtype: str, shape: tuple[int, ...] = (2, 3)) -> np.ndarray:
    kind = bfloat16 if dtype == "bfloat16" else dtype
    return np.asarray(10 * np.random.default_rng(3).standard_normal(shape)).astype(kind)


def address(a: mx.Array) -> int:
    return mx.eval(a) or a._value.buffer.pointer + a._value.offset


# NumPy

def test_views_are_read_only_and_copies_are_not() -> None:
    x = mx.array([[1.0, 2.0], [3.0, 4.0]])
    assert np.asarray(x).ctypes.data == np.array(x, copy=False).ctypes.data == address(x)
    assert not np.asarray(x).flags.writeable
    mine = np.array(x)
    mine[0, 0] = 9
    assert x.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert np.asarray(x.T).strides == (4, 8)
    for kind in (np.float64, np.int32):
        assert np.asarray(x, kind).dtype == kind
        with pytest.raises(ValueError, match="needs a copy"):
            np.array(x, kind, copy=False)
    with pytest.raises(ValueError, match="bfloat16 to float32 needs a copy"):
        np.array(mx.array([1.0], mx.bfloat16), copy=False)


def test_numpy_views_keep_results_from_being_overwritten() -> None:
    x = mx.array([1.0, 2.0]) + 1
    seen = np.asarray(x)
    x += 1
    mx.eval(x)
    assert_array_equal(seen, [2, 3])


@pytest.mark.parametrize("dtype", TYPES)
def test_asarray_shares_and_array_copies(dtype: str) -> None:
    theirs = values(dtype)
    shared, copied = mx.asarray(theirs), mx.array(theirs)
    assert address(shared) == theirs.ctypes.data != address(copied)
    assert shared.dtype is getattr(mx, dtype)
    assert copied.dtype is (mx.float32 if dtype == "float64" else shared.dtype)
    assert mx.asarray(theirs.T).tolist() == theirs.T.tolist()
    assert bytes(shared) == theirs.tobytes()
    assert address(mx.asarray(theirs, copy=True)) != theirs.ctypes.data
    shared += 1                                            # makes another array
    mx.eval(shared)
    assert theirs.tobytes() == values(dtype).tobytes()


def test_asarray_copies_when_it_must() -> None:
    x = np.arange(3)
    assert mx.asarray(x, mx.float16).dtype is mx.float16 and mx.asarray([1, 2.5]).dtype is mx.float32
    for obj, dtype in ((x, mx.int32), ([1, 2], None), (3, None), (mx.array([1]), mx.float32)):
        with pytest.raises(ValueError, match=r"\[asarray\] \w+ to .* needs a copy"):
            mx.asarray(obj, dtype, copy=False)
    y = mx.arange(3)
    assert mx.asarray(y, copy=False).tolist() == [0, 1, 2] and mx.asarray(y) is not y


# DLPack

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_torch_and_back_without_a_copy(dtype: str, shape: tuple[int, ...]) -> None:
    ours = mx.asarray(values(dtype, shape))
    tensor = torch.from_dlpack(ours)
    assert tensor.dtype == getattr(torch, dtype.strip("_")) and tuple(tensor.shape) == shape
    again = mx.from_dlpack(tensor)
    assert again.dtype is ours.dtype and again.shape == shape and bytes(again) == bytes(ours)
    if ours.size:
        assert tensor.data_ptr() == address(ours) == address(again)
    assert bytes(mx.array(tensor, ours.dtype)) == bytes(ours)
    assert bytes(mx.asarray(tensor)) == bytes(ours)


@pytest.mark.parametrize("dtype", [name for name in TYPES if name != "float64"])
def test_mlx_and_back(dtype: str) -> None:
    ours = mx.asarray(values(dtype))
    theirs = mlx.from_dlpack(ours)
    assert str(theirs.dtype).endswith(dtype.strip("_")) and bytes(mx.from_dlpack(theirs)) == bytes(ours)
    assert bytes(mx.asarray(theirs)) == bytes(ours) and mx.array(theirs).dtype is ours.dtype


@pytest.mark.parametrize("dtype", [name for name in TYPES if name != "bfloat16"])
def test_numpy_reads_our_capsules(dtype: str) -> None:
    ours = mx.asarray(values(dtype))
    found = np.from_dlpack(ours)
    assert found.ctypes.data == address(ours) and not found.flags.writeable
    assert_array_equal(found, values(dtype))
    theirs = values(dtype)
    assert address(mx.from_dlpack(theirs)) == theirs.ctypes.data
    theirs.flags.writeable = False
    assert address(mx.from_dlpack(theirs)) == theirs.ctypes.data != address(mx.from_dlpack(theirs, copy=True))


def test_strides_cross() -> None:
    tensor = torch.arange(24).reshape(4, 6)
    assert mx.from_dlpack(tensor[1::2, ::3].T).tolist() == tensor[1::2, ::3].T.tolist()
    x = mx.array(np.arange(24.0, dtype=np.float32).reshape(4, 6))
    assert torch.from_dlpack(x[1:3, ::2].T).tolist() == np.arange(24.0).reshape(4, 6)[1:3, ::2].T.tolist()
    assert torch.from_dlpack(mx.broadcast_to(mx.array([1.0, 2.0]), (2, 2))).tolist() == [[1.0, 2.0]] * 2


def test_the_arguments_of_the_array_api() -> None:
    x = mx.array([1.0, 2.0])
    assert x.__dlpack_device__() == (1, 0)
    assert ("dltensor_versioned" in repr(x.__dlpack__(max_version=(1, 0)))) and "dltensor" in repr(x.__dlpack__())
    assert np.from_dlpack(x, copy=True).flags.writeable and np.from_dlpack(x, device="cpu").tolist() == [1.0, 2.0]
    for options in ({"stream": 1}, {"dl_device": (2, 0)}):
        with pytest.raises((RuntimeError, BufferError, ValueError)):
            x.__dlpack__(**options)


class Elsewhere:
    def __dlpack__(self, **options: object) -> object: raise AssertionError
    def __dlpack_device__(self) -> tuple[int, int]: return 2, 0


def test_memory_of_other_devices_and_types_is_refused() -> None:
    with pytest.raises(ValueError, match=r"memory of device \(2, 0\): only the CPU's, \(1, 0\), can be shared"):
        mx.from_dlpack(Elsewhere())
    with pytest.raises(TypeError, match=r"complex128\(3,\)"):
        mx.from_dlpack(np.zeros(3, np.complex128))


def test_a_tensor_outlives_the_array_and_the_interpreter() -> None:
    code = ("import torch; from lazulite.engine import array as mx\n"
            "t = torch.from_dlpack(mx.ones((1000,), mx.bfloat16) + 1); x = mx.from_dlpack(torch.ones(1000))\n"
            "import gc; gc.collect(); junk = [mx.zeros((1000,), mx.bfloat16) + 3 for _ in range(50)]; mx.eval(junk)\n"
            "assert (t == 2).all() and x.sum().item() == 1000")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_capsules_from_threads() -> None:
    def work() -> None:
        for _ in range(200):
            assert mx.from_dlpack(torch.from_dlpack(mx.array([1.0, 2.0], mx.bfloat16))).sum().item() == 3.0

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# buffers, pickles, copies

def test_buffers() -> None:
    assert mx.array(b"abc").tolist() == mx.array(memoryview(bytearray(b"abc"))).tolist() == [97, 98, 99]
    data = bytearray(np.arange(3, dtype=np.int32).tobytes())
    shared = mx.asarray(memoryview(data).cast("i"))
    assert shared.dtype is mx.int32 and shared.tolist() == [0, 1, 2]
    x = mx.array([[1, 2], [3, 4]], mx.int16)
    assert bytes(x.T) == np.array([[1, 3], [2, 4]], np.int16).tobytes()
    view = memoryview(x if sys.version_info >= (3, 12) else np.asarray(x))
    assert view.readonly and view.format == "h" and view.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_pickles_and_copies(dtype: str, shape: tuple[int, ...]) -> None:
    x = mx.asarray(values(dtype, shape))
    for y in (*(pickle.loads(pickle.dumps(x, p)) for p in range(2, 6)), copy.copy(x), copy.deepcopy({"x": x})["x"]):
        assert y is not x and y.dtype is x.dtype and y.shape == shape and bytes(y) == bytes(x)


def test_a_copy_is_updated_on_its_own() -> None:
    x = mx.array([1, 2, 3])
    y, z = copy.copy(x), copy.deepcopy(x)
    y[0], z[1] = 9, 8
    assert (x.tolist(), y.tolist(), z.tolist()) == ([1, 2, 3], [9, 2, 3], [1, 8, 3])


# the constructor: what MLX makes of the same thing

MADE = [0, True, 2.5, 1 + 2j, 2**40, -(2**31), [], [[], []], [1, 2], (1, True), [True, 2], [1, 2.5], [1, 2**40],
        [1j, 2], np.float64(3), np.int64(3), np.arange(3), np.arange(3.0), np.zeros((2, 3), np.float16, "F"), b"ab",
        memoryview(b"abc")]


@pytest.mark.parametrize("obj", MADE, ids=lambda obj: str(obj)[:20])
def test_the_constructor_gives_mlx_types(obj: object) -> None:
    ours = mx.array(obj)
    theirs = mlx.array(bytearray(obj) if isinstance(obj, bytes) else obj)
    assert (str(theirs.dtype), theirs.shape, theirs.tolist()) == (f"mlx.core.{ours.dtype}", ours.shape, ours.tolist())


def nested(library: Any) -> list:
    half, wide, small = (library.array(1, getattr(library, t)) for t in ("float16", "bfloat16", "int8"))
    pair = library.array([1, 2])
    lists = ([half, half], [half, wide], [small, 2], [small, 2.5], [[1, 2.5], [small, 4]], [pair, pair],
             [[pair], [[3, 4]]])
    arrays = [*map(library.array, lists), library.array([half, 1.0], library.float16)]
    return [(str(a.dtype).split(".")[-1], a.shape, a.tolist()) for a in arrays]


def test_arrays_inside_lists() -> None:
    assert nested(mx) == nested(mlx)


def test_lists_of_arrays_are_lazy() -> None:
    x = mx.placeholder((), mx.float32)
    plan = mx.lower([mx.array([[x, 1.0], [2.0, x]])], [x]).load()
    plan.set_input(0, np.float32(5))
    plan.run()
    assert plan.output(0).tolist() == [[5.0, 1.0], [2.0, 5.0]]


@pytest.mark.parametrize("obj", ["abc", [1, [2]], [mx.ones(2), mx.ones(3)], None, object(), np.array(["a"])])
def test_what_is_no_array(obj: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        mx.array(obj)


# methods and conversions

METHODS = sorted(set(dir(mlx.array)) - set(dir(object)) - {"__div__", "__rdiv__", "__getstate__", "__setstate__"})


@pytest.mark.parametrize("name", METHODS)
def test_has_every_method_of_mlx(name: str) -> None:
    assert hasattr(mx.Array, name)


def test_methods() -> None:
    x = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
    ours, theirs = mx.array(x), mlx.array(x)
    calls = [lambda a: a.mT, lambda a: a.log2(), lambda a: a.log10(), lambda a: a.log1p(), lambda a: a.cumsum(1),
             lambda a: a.cumprod(axis=0, reverse=True), lambda a: a.cummax(1, inclusive=False), lambda a: a.cummin(),
             lambda a: a.logcumsumexp(1), lambda a: a.diag(1), lambda a: a.diagonal(), lambda a: a.conj(),
             lambda a: a.std(axis=0, correction=1), lambda a: a.var(ddof=1), lambda a: +a, lambda a: a.real,
             lambda a: a.imag, lambda a: a.split(indices_or_sections=3, axis=1)[1],
             lambda a: a.swapaxes(axis1=0, axis2=1)]
    for i, call in enumerate(calls):
        np.testing.assert_allclose(np.asarray(call(ours)), np.asarray(call(theirs)), 1e-5, err_msg=f"call {i}")


def test_python_numbers() -> None:
    assert complex(mx.array(1 + 2j)) == 1 + 2j and float(mx.array(2)) == 2.0 and int(mx.array(2.5)) == 2
    assert [1, 2, 3][mx.array(1)] == 2 and f"{mx.array(1.5):.3f}" == "1.500" and len({mx.array(1), mx.array(1)}) == 2
    x = mx.array([1, 2])
    x <<= 2
    x >>= 1
    assert x.tolist() == [2, 4] and [a.item() for a in x] == [2, 4]
    assert (x == "a") is False and (x != None) is True  # noqa: E711
    assert x.__array_namespace__() is mx
    with pytest.raises(ValueError, match="api_version|version"):
        x.__array_namespace__(api_version="2022.12")


# printing

PRINTED = [[1.5, 2, 3], 3, True, [True, False], [], [[], []], list(range(7)), list(range(6)), np.zeros((8, 2)),
           np.zeros((1, 8, 8)), np.arange(24).reshape(2, 3, 4), [1.23456789, 1e-5, 123456789.0, -0.0], [1e5, 1e6, 1e20],
           [float("nan"), float("inf")], [1.5 + 2j / 3, 1 - 2j, -1e-9j], np.arange(3, dtype=np.float16) / 3,
           np.arange(4, dtype=np.uint8), np.zeros((2, 0, 3))]


@pytest.mark.parametrize("precision", [-1, 0, 3])
def test_prints_as_mlx_does(precision: int) -> None:
    with mx.printoptions(precision=precision), mlx.printoptions(precision=precision):
        assert [repr(mx.array(x)) for x in PRINTED] == [repr(mlx.array(x)) for x in PRINTED]
        assert mx.get_printoptions().precision == precision
        half = mx.array([1 / 3], mx.bfloat16), mlx.array([1 / 3], mlx.bfloat16)
        assert str(half[0]) == str(half[1])
    assert mx.get_printoptions().precision == -1


def test_printoptions_stay_until_they_are_set_back() -> None:
    mx.set_printoptions(precision=2)
    assert str(mx.array(1 / 3)) == "array(0.33, dtype=float32)"
    mx.set_printoptions()
    assert str(mx.array(1 / 3)) == "array(0.333333, dtype=float32)"
    assert "traced" in repr(mx.placeholder((2,), mx.float32))

"""Devices, streams and memory counters: MLX's names and answers on a machine that has one device."""
import inspect
import threading

import mlx.core as mlx
import numpy as np
import pytest

from lazulite.engine import array as mx
from lazulite.engine import cpu
from lazulite.engine.array import device


@pytest.fixture(autouse=True)
def fresh():
    yield
    mx.set_default_device(mx.cpu)
    mx.clear_streams()


def test_devices_answer_as_mlx() -> None:
    for a in (mx, mlx):
        assert repr(a.default_device()) == repr(a.Device(a.cpu)) == "Device(cpu, 0)"
        assert a.Device(a.cpu) == a.Device(a.cpu, 0) == a.cpu and a.Device(a.gpu) != a.Device(a.cpu)
        assert a.default_device().type == a.cpu == a.DeviceType.cpu and a.Device(a.gpu, 1).index if a is mx else True
        assert (a.is_available(a.cpu), a.is_available(a.gpu)) == (True, False)
        assert (a.device_count(a.cpu), a.device_count(a.gpu)) == (1, 0)
        assert {"device_name", "architecture"} <= a.device_info().keys() and a.device_info(a.gpu) == {}
    assert len({mx.Device(mx.cpu), mx.Device(mx.cpu, 0), mx.Device(mx.gpu)}) == 2
    info, same = mx.device_info(mx.cpu), mlx.device_info(mlx.cpu)
    assert {key: info[key] for key in same} == same
    assert info["memory_size"] > 1 << 28
    assert (info["isa"], info["threads"]) == (cpu.runtime().isa, cpu.runtime().threads)


KINDS = [None, "bool", "signed integer", "unsigned integer", "integral", "real floating", "complex floating", "numeric",
         ("bool", "real floating")]


def test_the_namespace_describes_itself_as_mlx_does() -> None:
    ours, theirs = mx.array(1).__array_namespace__().__array_namespace_info__(), mlx.__array_namespace_info__()
    names = [{k: str(d).split(".")[-1] for k, d in a.default_dtypes().items()} for a in (ours, theirs)]
    assert names[0] == names[1] and ours.default_device() == mx.cpu and ours.devices() == (mx.Device(mx.cpu),)
    for kind in KINDS:
        assert ours.dtypes(kind=kind).keys() == theirs.dtypes(kind=kind).keys()
    assert ours.capabilities().keys() == theirs.capabilities().keys() and not mx.metal.is_available()


GPU = [lambda: mx.set_default_device(mx.gpu), lambda: mx.new_stream(mx.gpu), lambda: mx.default_stream(mx.gpu),
       lambda: mx.stream(mx.gpu), lambda: mx.add(1, 2, stream=mx.gpu), lambda: mx.ones(2).sum(stream=mx.Device(mx.gpu)),
       lambda: mx.synchronize(mx.gpu), lambda: mx.fast.rms_norm(mx.ones((2, 4)), mx.ones(4), 1e-5, stream=mx.gpu)]


@pytest.mark.parametrize("use", GPU)
def test_a_device_that_is_not_there_is_named_when_it_is_used(use) -> None:
    with pytest.raises(ValueError, match=r"Device\(gpu, 0\) is not on this machine; usable: Device\(cpu, 0\)"):
        use()
    assert mx.default_device() == mx.cpu


def test_the_runtime_of_a_device_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the table's name is all that another device needs; what runs is chosen for each plan."""
    monkeypatch.setitem(device.RUNTIMES, mx.gpu, "lazulite.engine.cpu")
    monkeypatch.setenv("LAZULITE_METAL", "emulated")
    assert mx.is_available(mx.gpu) and mx.device_count(mx.gpu) == 1
    x = mx.array([1.0, 2.0])
    y = mx.exp(x, stream=mx.gpu)
    with mx.stream(mx.gpu):
        assert mx.default_device() == mx.gpu and mx.default_stream(mx.gpu).device == mx.gpu
        assert (x + y).tolist() == (np.exp([1.0, 2.0]).astype(np.float32) + np.float32([1, 2])).tolist()
    mx.set_default_device(mx.gpu)
    assert mx.default_device() == mx.gpu
    with pytest.raises(ValueError, match=r"Device\(gpu, 1\) is not on this machine"):
        mx.set_default_device(mx.Device(mx.gpu, 1))


DEFAULTS = [("cpu", "Device(cpu, 0)"), ("gpu", "Device(gpu, 0)"), ("tpu", "DEVICE is 'tpu', wanted cpu or gpu")]


@pytest.mark.parametrize(("name", "want"), DEFAULTS)
def test_the_environment_names_the_default_device(name: str, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_process", {})
    monkeypatch.setenv("LAZULITE_DEVICE", name)
    if name == "tpu":
        with pytest.raises(ValueError, match=want):
            mx.default_device()
    else:
        monkeypatch.setenv("LAZULITE_METAL", "emulated")
        assert repr(mx.default_device()) == want


def test_streams() -> None:
    first, second = mx.default_stream(mx.cpu), mx.new_stream(mx.cpu)
    assert repr(first) == repr(mlx.default_stream(mlx.cpu)) == "Stream(Device(cpu, 0), 0)"
    assert first == mx.default_stream(mx.cpu) != second and second.device == mx.cpu
    assert mx.new_thread_unsafe_stream(mx.cpu) != second
    with mx.stream(second):
        assert mx.default_stream(mx.cpu) == second
        with mx.stream(mx.cpu):
            assert mx.default_stream(mx.cpu) == second
        with pytest.raises(ZeroDivisionError), mx.stream(first):
            raise ZeroDivisionError
        assert mx.default_stream(mx.cpu) == second
    assert mx.default_stream(mx.cpu) == first
    mx.set_default_stream(second)
    assert mx.default_stream(mx.cpu) == second and mx.default_device() == mx.cpu
    mx.clear_streams()
    assert mx.default_stream(mx.cpu) == first
    for stream in (None, first, second, mx.cpu, mx.Device(mx.cpu)):
        mx.synchronize(stream)
    with pytest.raises(TypeError, match=r"\[stream\] int: a Stream, a Device or a DeviceType wanted"):
        mx.add(1, 2, stream=3)


def test_streams_are_the_threads_own() -> None:
    mine, local, seen = mx.new_stream(mx.cpu), mx.new_thread_local_stream(mx.cpu), []

    def work() -> None:
        seen.append(mx.default_stream(mx.cpu))
        with mx.stream(local):
            seen.append(mx.default_stream(mx.cpu))
            seen.append(mx.add(mx.array([1]), 2, stream=mine).tolist())

    with mx.stream(mine):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    with mx.stream(local):
        here = mx.default_stream(mx.cpu)
        assert here == device.stream_of(local)
    assert seen[0].index == 0 and seen[1] != here and seen[2] == [3] and repr(local).startswith("ThreadLocalStream(")


CALLS = [
    ("mx.add(a, 1, stream=s)", [2.0, 3.0]), ("mx.zeros((2,), stream=s)", [0.0, 0.0]), ("a.sum(stream=s)", 3.0),
    ("a.reshape(2, 1, stream=s)", [[1.0], [2.0]]), ("mx.softmax(a * 0, stream=s)", [0.5, 0.5]),
    ("mx.split(a, 2, stream=s)[1]", [2.0]), ("mx.arange(2, stream=s)", [0, 1]),
    ("a.astype(mx.int32, stream=s)", [1, 2]), ("mx.fast.softmax(a * 0, stream=s)", [0.5, 0.5]),
    ("mx.take_along_axis(a, mx.array([1]), 0, stream=s)", [2.0]),
]


@pytest.mark.parametrize(("call", "want"), CALLS)
def test_operations_take_streams(call: str, want: object) -> None:
    for s in (None, mx.cpu, mx.Device(mx.cpu), mx.new_stream(mx.cpu), mx.new_thread_local_stream(mx.cpu)):
        assert eval(call, {"mx": mx, "a": mx.array([1.0, 2.0]), "s": s}).tolist() == want


NOT_OPS = {"async_eval", "broadcast_shapes", "compile", "eval", "from_dlpack", "asarray"}


def test_every_function_of_mlx_that_takes_a_stream_takes_one_here() -> None:
    names = set(dir(mlx)) & set(dir(mx)) - NOT_OPS - set(device.__all__)
    names = {name for name in names if "stream: " in str(getattr(mlx, name).__doc__)}
    assert len(names) > 100 and [n for n in names if "stream" not in inspect.signature(getattr(mx, n)).parameters] == []


# memory

MIB = 1 << 20


@pytest.fixture
def memory():
    """An empty cache; the limits are put back."""
    limits = mx.set_memory_limit(2**64 - 1), mx.set_cache_limit(256 * MIB)
    mx.clear_cache()
    yield
    mx.set_memory_limit(limits[0])
    mx.set_cache_limit(limits[1])


def test_counters(memory: None) -> None:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert mx.get_cache_memory() == 0 and mx.get_peak_memory() == before
    a = mx.zeros((MIB,)) + 1
    mx.eval(a)
    assert 4 * MIB <= mx.get_active_memory() - before < 5 * MIB
    del a
    assert mx.get_active_memory() == before and 4 * MIB <= mx.get_cache_memory() < 5 * MIB
    assert 4 * MIB <= mx.get_peak_memory() - before < 6 * MIB
    mx.reset_peak_memory()
    assert mx.get_peak_memory() == before
    mx.clear_cache()
    assert mx.get_cache_memory() == 0


def test_the_cache_limit(memory: None) -> None:
    mx.eval(mx.zeros((MIB,)) + 1)
    assert mx.set_cache_limit(MIB) == 256 * MIB and mx.get_cache_memory() == 0
    mx.eval(mx.zeros((MIB,)) + 2)
    assert mx.get_cache_memory() < MIB and mx.set_cache_limit(0) == MIB
    mx.eval(mx.zeros((8,)) + 3)
    assert mx.get_cache_memory() == 0 and mx.set_cache_limit(256 * MIB) == 0


def test_beyond_the_memory_limit_freed_blocks_go_back_first(memory: None) -> None:
    assert mx.get_memory_limit() == 2**64 - 1 == mx.set_memory_limit(mx.get_active_memory() + 8 * MIB)
    for size in (MIB, 2 * MIB):                            # 4 MiB are kept; with 8 more they are beyond the limit
        mx.eval(mx.zeros((size,)) + 4)
    assert 8 * MIB <= mx.get_cache_memory() < 10 * MIB
    assert mx.get_memory_limit() == mx.set_memory_limit(2**64 - 1) < 2**63


def test_the_wired_limit_is_accepted() -> None:
    assert mx.set_wired_limit(1 << 30) == mx.set_wired_limit(0) == 0

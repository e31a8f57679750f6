"""Devices and streams with MLX's names. A device is chosen for an operation, not for an array, whose memory all share.

Evaluation returns when the work is done, so streams order nothing more than the program does: they name a device.
LAZULITE_DEVICE (cpu or gpu) is the default device of a process that chooses none.
"""
from __future__ import annotations

import enum
import functools
import importlib
import itertools
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import CO_VARARGS, CO_VARKEYWORDS, isfunction
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

from ..errors import UserError

__all__ = ["Device", "DeviceType", "Stream", "StreamContext", "ThreadLocalStream", "clear_streams", "cpu", "cuda",
           "default_device", "default_stream", "device_count", "device_info", "gpu", "is_available", "metal",
           "new_stream", "new_thread_local_stream", "new_thread_unsafe_stream", "set_default_device",
           "set_default_stream", "stream", "synchronize"]


class DeviceType(enum.Enum):
    cpu = 0
    gpu = 1


cpu, gpu = DeviceType.cpu, DeviceType.gpu
RUNTIMES = {cpu: "lazulite.engine.cpu", gpu: "lazulite.engine.metal"}      # by name only: none is imported before use


class Device:
    """One processor of a type. It equals its type when it is the first of it."""

    __slots__ = ("type", "index")

    def __init__(self, type: DeviceType, index: int = 0):
        self.type, self.index = type, index

    def __repr__(self) -> str:
        return f"Device({self.type.name}, {self.index})"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, DeviceType):
            other = Device(other)
        return isinstance(other, Device) and (self.type, self.index) == (other.type, other.index)

    def __hash__(self) -> int:
        return hash(self.type)


@dataclass(frozen=True)
class Stream:
    """A sequence of operations on a device. Any thread may use it."""

    device: Device
    index: int

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.device}, {self.index})"


class ThreadLocalStream(Stream):
    """Stands for a stream of its own in each thread."""


StreamOrDevice = Stream | Device | DeviceType | None


class _Thread(threading.local):
    """What `stream` and `set_default_stream` chose in this thread."""

    def __init__(self) -> None:
        self.device: Device | None = None
        self.streams: dict[Device, Stream] = {}
        self.local: dict[Stream, Stream] = {}


_process: dict[str, Device] = {}
_thread = _Thread()
_numbers = itertools.count(1)


def runtime_of(device: Device | DeviceType) -> Any:
    """The runtime of a device. ValueError where there is none."""
    return importlib.import_module(RUNTIMES[_usable(device).type]).runtime()


def is_available(device: Device | DeviceType) -> bool:
    """Whether operations can run there. LAZULITE_METAL=emulated makes a GPU of the CPU."""
    device = device if isinstance(device, Device) else Device(device)
    there = device.type is cpu or os.environ.get("LAZULITE_METAL") == "emulated" or _metal()
    return device.index == 0 and there


@functools.cache
def _metal() -> bool:
    return sys.platform == "darwin" and importlib.import_module(RUNTIMES[gpu]).available()


def _usable(device: Device | DeviceType) -> Device:
    device = device if isinstance(device, Device) else Device(device)
    if not is_available(device):
        usable = ", ".join(str(Device(kind)) for kind in RUNTIMES if is_available(kind))
        raise ValueError(f"[device] {device} is not on this machine; usable: {usable}")
    return device


def _backend(name: str) -> SimpleNamespace:
    """`mx.metal` and `mx.cuda`, which programs ask whether they are there."""
    return SimpleNamespace(is_available=lambda: RUNTIMES[gpu].endswith(name) and is_available(gpu))


metal, cuda = _backend("metal"), _backend("cuda")


def device_count(device_type: DeviceType) -> int:
    return int(is_available(device_type))


def device_info(d: Device | DeviceType | None = None) -> dict[str, str | int]:
    """device_name, architecture, memory_size (bytes), and the runtime's instruction set and threads, or a GPU's limits;
    empty where there is no such device."""
    d = default_device() if d is None else d
    if not is_available(d):
        return {}
    runtime = runtime_of(d)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {"device_name": _processor(), "architecture": platform.machine(), "memory_size": memory}
    return facts | runtime.info()


def _processor() -> str:
    """The processor's name as Linux or the C library has it."""
    if (file := Path("/proc/cpuinfo")).exists():
        lines = (line.partition(":") for line in file.read_text().splitlines())
        return next((value.strip() for key, _, value in lines if key.strip() == "model name"), platform.machine())
    return platform.processor()


def default_device() -> Device:
    return _thread.device or _process.get("device") or _first()


def _first() -> Device:
    """The default device of a process that has chosen none."""
    name = os.environ.get("LAZULITE_DEVICE", "cpu")
    if name not in DeviceType.__members__:
        raise UserError(f"[device] LAZULITE_DEVICE is {name!r}, wanted cpu or gpu", "unset it to compute on the CPU")
    return _process.setdefault("device", _usable(DeviceType[name]))


def set_default_device(device: Device | DeviceType) -> None:
    """The device of operations that name none, in every thread. ValueError where it has no runtime."""
    _process["device"] = _usable(device)


def default_stream(device: Device | DeviceType) -> Stream:
    device = _usable(device)
    return _thread.streams.get(device) or Stream(device, 0)


def set_default_stream(stream: Stream) -> None:
    """The stream of its device in this thread; the default device stays."""
    _thread.streams[stream.device] = stream_of(stream)


def new_stream(device: Device | DeviceType) -> Stream:
    return Stream(_usable(device), next(_numbers))


new_thread_unsafe_stream = new_stream


def new_thread_local_stream(device: Device | DeviceType) -> ThreadLocalStream:
    return ThreadLocalStream(_usable(device), next(_numbers))


def clear_streams() -> None:
    """This thread uses the first stream of each device again."""
    _thread.__init__()  # type: ignore[misc]


def stream_of(s: StreamOrDevice) -> Stream:
    """The stream that an argument `stream` means."""
    if isinstance(s, ThreadLocalStream):
        return _thread.local.setdefault(s, Stream(s.device, next(_numbers)))
    if isinstance(s, Stream):
        return s
    if s is None or isinstance(s, Device | DeviceType):
        return default_stream(default_device() if s is None else s)
    raise TypeError(f"[stream] {type(s).__name__}: a Stream, a Device or a DeviceType wanted")


class StreamContext:
    """Makes a stream, and its device, the default of this thread."""

    def __init__(self, s: StreamOrDevice):
        self.stream = stream_of(s)

    def __enter__(self) -> None:
        device = self.stream.device
        self.before = _thread.device, _thread.streams
        _thread.device, _thread.streams = device, _thread.streams | {device: self.stream}

    def __exit__(self, *exc: object) -> None:
        _thread.device, _thread.streams = self.before


def stream(s: StreamOrDevice) -> StreamContext:
    """`with mx.stream(mx.cpu): …`"""
    return StreamContext(s)


def synchronize(stream: StreamOrDevice = None) -> None:
    """Waits for a stream: at once, since `eval` returns when its work is done."""
    stream_of(stream)


def take_streams(owner: Any, names: Iterable[str]) -> None:
    """Gives functions of a module, or methods of a class, MLX's argument `stream`: a device is named nowhere else."""
    for name in names:
        if isfunction(fn := getattr(owner, name)):
            setattr(owner, name, _with_stream(fn))


def _with_stream(fn: FunctionType) -> Callable[..., Any]:
    """A function of the same parameters and `stream`, made from source: handing on *args would cost 0.15 µs a call, and
    this costs 0.04."""
    code, n = fn.__code__, fn.__code__.co_argcount
    end = n + code.co_kwonlyargcount
    plain, only, rest = (list(code.co_varnames[part]) for part in (slice(n), slice(n, end), slice(end, end + 2)))
    if "stream" in plain + only:
        return fn
    star = [f"*{rest.pop(0)}"] if code.co_flags & CO_VARARGS else []
    last = [f"**{rest[0]}"] if code.co_flags & CO_VARKEYWORDS else []
    first = n - len(fn.__defaults__ or ())
    head = [name if i < first else f"{name}=_fn.__defaults__[{i - first}]" for i, name in enumerate(plain)]
    if code.co_posonlyargcount:
        head.insert(code.co_posonlyargcount, "/")
    head += star or ["*"]
    head += [f"{name}=_fn.__kwdefaults__[{name!r}]" if name in (fn.__kwdefaults__ or {}) else name for name in only]
    call = f"_fn({', '.join([*plain, *star, *(f'{name}={name}' for name in only), *last])})"
    names: dict[str, Any] = {"_fn": fn, "_context": StreamContext}
    exec(f"def op({', '.join([*head, 'stream=None', *last])}):\n if stream is None: return {call}\n"
         f" with _context(stream): return {call}", names)
    op = functools.update_wrapper(names["op"], fn)
    del op.__wrapped__                                     # whose signature would be shown
    return op

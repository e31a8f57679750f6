"""Memory of the runtime: what arrays and plans hold, and the freed blocks that are kept for reuse."""
from __future__ import annotations

from typing import Any

from .containers import arrays_of
from .device import default_device, runtime_of

__all__ = ["clear_cache", "get_active_memory", "get_array_buffer_size", "get_cache_memory", "get_memory_limit",
           "get_peak_memory", "reset_peak_memory", "set_cache_limit", "set_memory_limit", "set_wired_limit"]
NONE = 2**64 - 1                     # bytes: no limit


def _runtime() -> Any:
    return runtime_of(default_device())


def get_active_memory() -> int:
    """Bytes in use: results and arenas. Arrays made of Python or NumPy data are in NumPy's memory until computed on."""
    return _runtime().memory()["active"]


def get_array_buffer_size(*args: Any) -> int:
    """Bytes of the buffers behind the evaluated arrays of the trees, each buffer counted once."""
    buffers = {a._value.buffer for a in arrays_of(args)}
    if None in buffers:
        raise ValueError("[get_array_buffer_size] an array is not evaluated")
    return sum(b.nbytes for b in buffers if b is not None)


def get_peak_memory() -> int:
    """The most bytes in use at once since the start or `reset_peak_memory`."""
    return _runtime().memory()["peak"]


def reset_peak_memory() -> None:
    """The peak counts from what is in use now."""
    _runtime().reset_peak()


def get_cache_memory() -> int:
    """Bytes in freed blocks that wait for a new use."""
    return _runtime().memory()["cached"]


def get_memory_limit() -> int:
    runtime = _runtime()
    limit = runtime.set_memory_limit(NONE)
    runtime.set_memory_limit(limit)
    return limit


def set_memory_limit(limit: int) -> int:
    """A guideline, in bytes: beyond it freed blocks go back to the system before new ones are taken. Returns the last
    one; at first there is none (2**64 - 1)."""
    return _runtime().set_memory_limit(limit)


def set_cache_limit(limit: int) -> int:
    """The most bytes of freed blocks that are kept; 0 keeps none. Returns the last limit, 256 MiB at first."""
    return _runtime().set_cache_limit(limit)


def set_wired_limit(limit: int) -> int:
    """The most bytes that a GPU keeps resident, of memory taken from now on. Returns the last limit; 0 on the CPU,
    whose pages are the system's."""
    return _runtime().set_wired_limit(limit)


def clear_cache() -> None:
    """Gives the freed blocks back to the system."""
    _runtime().clear_cache()

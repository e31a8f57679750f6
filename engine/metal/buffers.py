"""Memory that the GPU and the host share: blocks of the device, and memory of others that it reads where it lies."""
from __future__ import annotations

import mmap
import sys
import threading
import weakref
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from .device import SHARED_UNTRACKED, Device
from .steps import ceil

PAGE = mmap.PAGESIZE
CACHE = 256 << 20                    # bytes of freed blocks that are kept at first, as on the CPU


class Region:
    """Pages that an MTLBuffer covers. Its bytes from `start` to `end` may be bound; `start` is the buffer's first."""

    __slots__ = ("memory", "handle", "start", "end", "wired")

    def __init__(self, memory: Memory, handle: int, start: int, end: int) -> None:
        self.memory, self.handle, self.start, self.end, self.wired = memory, handle, start, end, False
        memory.add(self)

    def __del__(self) -> None:
        self.memory.gone.append((self.start, self.end, self.handle, self.wired))


class Buffer:
    """Bytes of the device's own memory, given back when the object dies. `pointer` is the host's address of them."""

    __slots__ = ("memory", "block", "pointer", "nbytes", "__weakref__")
    donatable = True                 # a plan may overwrite it, once nobody else refers to it

    def __init__(self, memory: Memory, block: Region, nbytes: int) -> None:
        self.memory, self.block, self.pointer, self.nbytes = memory, block, block.start, nbytes

    def __del__(self) -> None:
        self.memory.returned.append(self.block)


class Memory:
    """Blocks handed out and kept for reuse, and regions found again by their addresses.

    A freed block may be handed out while the GPU still uses it: what uses it next comes later in the queue. Only giving
    it back to the system waits. `version` counts what has gone, since an address may come back as other memory. Objects
    die anywhere, also where the lock is held: they only leave word, and `collect` does the rest."""

    def __init__(self, device: Device, wait: Callable[[], None]) -> None:
        self.device, self.wait, self.version = device, wait, 0
        self.active = self.peak = self.cached = self.wired = 0
        self.limit, self.cache_limit, self.wired_limit = device.working_set, CACHE, device.working_set
        self.lock = threading.RLock()
        self.binding = False                               # addresses are looked up and not yet used: nothing may go
        self.returned: deque[Region] = deque()
        self.gone: deque[tuple[int, int, int, bool]] = deque()
        self.regions: list[tuple[int, int, int]] = []      # start, end, handle: sorted
        self.used: set[Region] = set()                     # of living Buffers: none may die in a cycle with one
        self.free: dict[int, list[Region]] = {}
        self.held: list[Region] = []
        self.adopted: weakref.WeakKeyDictionary[Any, Region] = weakref.WeakKeyDictionary()

    def alloc(self, nbytes: int) -> Buffer:
        """nbytes of uninitialised memory. MemoryError when there is none."""
        size = block_size(nbytes)
        with self.lock:
            self.collect()
            if self.free.get(size):
                block = self.free[size].pop()
                self.cached -= size
            else:
                if self.active + self.cached + size > self.limit:
                    self.clear_cache()
                block = self._block(size)
            self.used.add(block)
            self.active += size
            self.peak = max(self.peak, self.active)
        return Buffer(self, block, nbytes)

    def _block(self, size: int) -> Region:
        send = self.device.objc.send
        handle = send(self.device.handle, "newBufferWithLength:options:", size, SHARED_UNTRACKED)
        if not handle:
            raise MemoryError(f"[metal] no buffer of {size} bytes; {self.active} are in use")
        start = send(handle, "contents")
        return Region(self, handle, start, start + size)

    def collect(self) -> None:
        """Keeps the blocks that nobody uses any more, as far as the limits allow; what else has died goes."""
        if self.binding:
            return
        while self.returned:
            block = self.returned.popleft()
            size = block.end - block.start
            self.used.discard(block)
            self.active -= size
            if self.cached + size <= self.cache_limit and self.active + self.cached + size <= self.limit:
                self.cached += size
                self.free.setdefault(size, []).append(block)
            del block
        if self.gone:
            self.wait()
            self.version += 1
        while self.gone:
            start, end, handle, wired = self.gone.popleft()
            self.regions.remove((start, end, handle))
            if wired:
                self.wired -= end - start
                self.device.resident("removeAllocation:", handle)
            self.device.objc.send(handle, "release")

    def clear_cache(self) -> None:
        """Gives the blocks kept for reuse back to the system."""
        with self.lock:
            self.collect()
            self.free, self.cached = {}, 0
            self.collect()

    def adopt(self, buffer: Any) -> None:
        """Makes memory of others ready to be bound, for as long as this object that holds it lives."""
        if isinstance(buffer, Buffer) or buffer in self.adopted:
            return
        with self.lock:
            self.collect()
            owner = getattr(buffer, "owner", None)
            low, high = byte_bounds(owner) if isinstance(owner, np.ndarray) else (
                buffer.pointer, buffer.pointer + buffer.nbytes)
            if not self.place(low, high) and (region := self.wrap(low, high)):
                self.adopted[buffer] = region

    def wrap(self, low: int, high: int) -> Region | None:
        """The pages of these addresses as they lie, or None where Metal does not take them."""
        start = low // PAGE * PAGE
        end = ceil(max(high, low + 1), PAGE) * PAGE
        handle = self.device.objc.send(self.device.handle, "newBufferWithBytesNoCopy:length:options:deallocator:",
                                       start, end - start, SHARED_UNTRACKED, None)
        return Region(self, handle, start, end) if handle else None

    def hold(self, low: int, high: int) -> tuple[int, int] | None:
        """Wraps memory whose owner is not known, until the runs under way are done."""
        region = self.wrap(low, high)
        if region is None:
            return None
        self.held.append(region)
        return region.handle, low - region.start

    def place(self, low: int, high: int) -> tuple[int, int] | None:
        """An MTLBuffer that covers these addresses, and the offset of the first in it."""
        regions = self.regions
        for i in range(bisect_right(regions, (low, sys.maxsize, 0)) - 1, -1, -1):
            start, end, handle = regions[i]
            if high <= end:
                return handle, low - start
        return None

    def add(self, region: Region) -> None:
        """Makes a new region one that is found."""
        insort(self.regions, (region.start, region.end, region.handle))
        size = region.end - region.start
        if self.device.residency and self.wired + size <= self.wired_limit:
            region.wired, self.wired = True, self.wired + size
            self.device.resident("addAllocation:", region.handle)


def block_size(nbytes: int) -> int:
    """Whole pages, and at most an eighth more than asked for, so that blocks of about one size serve one another."""
    step = max(PAGE, 1 << max(0, nbytes.bit_length() - 4))
    return ceil(max(1, nbytes), step) * step


def byte_bounds(array: np.ndarray) -> tuple[int, int]:
    """The first address of a strided array's elements and the one after the last."""
    ways = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True) if n]
    first = array.__array_interface__["data"][0]
    return first + sum(w for w in ways if w < 0), first + sum(w for w in ways if w > 0) + array.itemsize

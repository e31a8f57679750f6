"""The Metal runtime: the CPU's plans, run on Apple's GPU, or on its emulation (LAZULITE_METAL=emulated)."""
from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable, Sequence
from ctypes import c_double, c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

from .. import cpu
from ..errors import UserError
from .buffers import Buffer, Memory
from .device import Device, objc
from .plan import Plan
from .steps import FAULT
from .table import Table

FLYING = 4                                                 # command buffers that may be under way


class Flight(NamedTuple):
    """A command buffer under way, and what must live until it is done."""

    commands: int
    ticket: int                      # of the run that it belongs to
    table: Table
    plan: Plan


class Runtime:
    """The CPU runtime's calls, and `start` and `wait`: a run that goes on while the host does other things.

    Steps that Metal has no kernel for run on the CPU, in the same memory. One per process (`runtime()`)."""

    def __init__(self, emulated: bool) -> None:
        self.asynchronous = True
        self.emulated, self.cpu, self.device = emulated, cpu.runtime(), Device(objc(emulated))
        self.buffers = Memory(self.device, self._settle)
        self.kernels, self.opcodes, self.isa = self.cpu.kernels, self.cpu.opcodes, self.device.architecture
        self.set_host, self.set_threads = self.cpu.set_host, self.cpu.set_threads
        self.alloc, self.adopt = self.buffers.alloc, self.buffers.adopt
        self._lock = self.buffers.lock
        self._flying: list[Flight] = []
        self._started = 0
        self._failure: RuntimeError | None = None
        self._arena, self._scratch, self._fault = self.alloc(1), self.alloc(1), self.alloc(FAULT.nbytes)
        self._flag = (c_int32 * 3).from_address(self._fault.pointer)
        self._flag[0] = 0
        self._replay = ctypes.CDLL(str(cpu.library_path())).lz_replay
        self._replay.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p]
        self._replay.restype = None

    @property
    def threads(self) -> int:
        """Threads of the CPU, for the steps that it runs."""
        return self.cpu.threads

    def memory(self) -> dict[str, int]:
        """Bytes handed out now (active), at most so far (peak), and kept for reuse (cached)."""
        with self._lock:
            self.buffers.collect()
        return {"active": self.buffers.active, "peak": self.buffers.peak, "cached": self.buffers.cached}

    def clear_cache(self) -> None:
        """Give the blocks kept for reuse, and the plans' arena, back to the system."""
        with self._lock:
            self._arena, self._scratch = self.alloc(1), self.alloc(1)
            self.buffers.clear_cache()

    def reset_peak(self) -> None:
        """The peak counts from what is active now."""
        self.buffers.peak = self.memory()["active"]

    def set_memory_limit(self, nbytes: int) -> int:
        """Beyond it freed blocks go back to the system before new ones are taken; at first the working set that the
        device recommends. Returns the last one."""
        before, self.buffers.limit = self.buffers.limit, nbytes
        return before

    def set_cache_limit(self, nbytes: int) -> int:
        """The most bytes of freed blocks that are kept for reuse. Returns the last limit."""
        before, self.buffers.cache_limit = self.buffers.cache_limit, nbytes
        if self.memory()["cached"] > nbytes:
            self.buffers.clear_cache()
        return before

    def set_wired_limit(self, nbytes: int) -> int:
        """The most bytes that stay wired between runs, of buffers made from now on. Returns the last limit."""
        before, self.buffers.wired_limit = self.buffers.wired_limit, nbytes
        return before

    def info(self) -> dict[str, str | int]:
        """What this runtime adds to a device's facts, with MLX's names."""
        return {"device_name": self.device.name, "architecture": self.device.architecture,
                "max_buffer_length": self.device.longest_buffer,
                "max_recommended_working_set_size": self.device.working_set}

    def load(self, steps: Iterable[Any], n_buffers: int, max_dims: Sequence[int], arena_bytes: int) -> Plan:
        """As the CPU runtime's: steps are checked now, and encoded when sizes are known."""
        return Plan(self.device, self.cpu, steps, n_buffers, max_dims, arena_bytes)

    def run(self, plan: Plan, pointers: Any, dims: Any, times: Any = None) -> None:
        """Run a loaded plan to its end. Arguments as the CPU runtime's; times: of each step by itself, on the GPU."""
        with self._lock:
            self._begin(plan, pointers, dims, times)
            self.wait()

    def start(self, plan: Plan, pointers: Any, dims: Any) -> int:
        """Commit a run: the host may touch what it reads and writes after `wait` for the number that this returns."""
        return self._begin(plan, pointers, dims, None)

    def _begin(self, plan: Plan, pointers: Any, dims: Any, times: Any) -> int:
        with self._lock:
            self._started += 1
            self.buffers.collect()
            self.buffers.binding = True
            try:
                self._send(plan, pointers, dims, times)
            finally:
                self.buffers.binding = False
            return self._started

    def _send(self, plan: Plan, pointers: Any, dims: Any, times: Any) -> None:
        pointers = pointers if isinstance(pointers, ctypes.Array) else (c_void_p * len(pointers))(*pointers)
        dims = tuple(dims)[:len(plan.max_dims)]
        plan.bind(pointers, self.buffers)
        self._arena = self._grown(self._arena, plan.arena_bytes)
        whole = [(range(len(plan.steps)), plan.whole)]
        for steps, part in plan.parts(pointers, dims, times is not None) if plan.bindable else whole:
            spent = None if times is None else (c_double * len(steps))()
            if isinstance(part, Table):
                self._commit(plan, part, spent)
            else:
                self._settle()
                self._check()
                self.cpu.run(part, [*pointers, self._arena.pointer], dims, spent)
            if times is not None:
                times[steps.start:steps.stop] = spent

    def _commit(self, plan: Plan, table: Table, times: Any) -> None:
        self._scratch = self._grown(self._scratch, table.scratch_bytes)
        for number, buffer in ((0, self._arena), (plan.n_buffers, self._scratch), (plan.n_buffers + 1, self._fault)):
            plan.handles[number] = buffer.block.handle
        self.device.settle()
        objc, objects = self.device.objc, (c_void_p * 3)(self.device.queue)
        with objc.pool():
            self._replay(objc.address, table.native, len(table), objects, plan.handles, plan.offsets)
        commands: int = objects[1] or 0
        self._flying.append(Flight(commands, self._started, table, plan))
        if times is not None:
            objc.send(commands, "waitUntilCompleted")
            times[0] = 1e6 * (objc.send(commands, "GPUEndTime") - objc.send(commands, "GPUStartTime"))
        if len(self._flying) > FLYING:
            self._finish(self._flying.pop(0))

    def _grown(self, buffer: Buffer, nbytes: int) -> Buffer:
        """The buffer, or a larger one: what is under way keeps to the old one, which comes before in the queue."""
        return buffer if nbytes <= buffer.nbytes else self.alloc(nbytes)

    def wait(self, ticket: int | None = None) -> None:
        """Returns when that run and those before it are done, by default all. RuntimeError where one failed."""
        with self._lock:
            self._settle(ticket)
            if not self._flying:
                self.buffers.held.clear()
            self._check()

    def _settle(self, ticket: int | None = None) -> None:
        """Waits; a failure is kept for `wait`."""
        while self._flying and (ticket is None or self._flying[0].ticket <= ticket):
            self._finish(self._flying.pop(0))

    def _check(self) -> None:
        failure, self._failure = self._failure, None
        if failure:
            raise failure

    def _finish(self, flight: Flight) -> None:
        objc, commands = self.device.objc, flight.commands
        objc.send(commands, "waitUntilCompleted")
        with objc.pool(), objc.own(commands):
            if error := objc.send(commands, "error"):
                why = objc.text(objc.send(error, "localizedDescription"))
                kernels = ", ".join(dict.fromkeys(flight.table.kernels))
                self._failure = self._failure or RuntimeError(f"[metal] {why}; it ran {kernels}")
        fault, index, size = self._flag
        if fault:
            self._flag[0] = 0
            self._failure = self._failure or RuntimeError(f"[take] index {index} is out of range for size {size}")


def available() -> bool:
    """Whether this machine has a GPU that Metal can use."""
    try:
        return bool(runtime())
    except UserError:
        return False


@functools.cache
def runtime() -> Runtime:
    """The process's runtime. UserError where there is no Metal."""
    return Runtime(os.environ.get("LAZULITE_METAL") == "emulated")

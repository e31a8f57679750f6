"""One command buffer as a table of messages, which replay.c sends: dispatches, and barriers where they meet."""
from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from ctypes import c_char_p, c_void_p
from dataclasses import dataclass, field
from math import prod
from typing import Any

from . import msl
from .device import Device, text
from .steps import FAULT, SIZES, Dispatch, Scratch, Step, View, ceil

MESSAGE, BUFFER, DISPATCH = range(3)                       # kinds of records, as in replay.c
RECORD = struct.Struct("<4H7Q")
QUEUE, COMMANDS, ENCODER = range(3)                        # objects that messages go to
CONCURRENT, BUFFERS = 1, 1                                 # MTLDispatchType, MTLBarrierScope
ALIGN = 256                                                # of scratch memory
Range = tuple[int, int, int]                               # a buffer's number, first byte, the one after the last


class Hazards:
    """What the dispatches since the last barrier read and wrote."""

    def __init__(self, serial: bool) -> None:
        self.serial, self.first = serial, True
        self.read: list[Range] = []
        self.written: list[Range] = []

    def meet(self, read: list[Range], written: list[Range]) -> bool:
        """Whether these ranges need a barrier first; from then on they count as what is under way."""
        clash = self.serial or overlap(read, self.written) or overlap(written, self.written + self.read)
        barrier, self.first = clash and not self.first, False
        if barrier:
            self.read, self.written = [], []
        self.read += read
        self.written += written
        return barrier


def overlap(some: list[Range], others: list[Range]) -> bool:
    return any(a == b and low < end and first < high for a, low, high in some for b, first, end in others)


def extent(view: View) -> Range:
    """The bytes of its buffer that a view spans."""
    ways = [(n - 1) * s * SIZES[view.dtype] for n, s in zip(view.shape, view.strides, strict=True)]
    low, high = sum(w for w in ways if w < 0), sum(w for w in ways if w > 0) + SIZES[view.dtype]
    return (view.buffer, view.offset + low, view.offset + high) if view.size else (view.buffer, 0, 0)


@dataclass
class Table:
    """One command buffer as records, and what they point to."""

    device: Device
    n_buffers: int                                         # of the plan; scratch memory and FAULT have the next numbers
    records: bytearray = field(default_factory=bytearray)
    kept: list[Any] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    barriers: list[bool] = field(default_factory=list)     # before each dispatch
    scratch_bytes: int = 0

    def __post_init__(self) -> None:
        self._pipeline, self._bound = 0, dict[int, Any]()
        self._add("commandBufferWithUnretainedReferences", to=QUEUE, into=COMMANDS)
        self._add("retain", to=COMMANDS)
        self._add("computeCommandEncoderWithDispatchType:", CONCURRENT, to=COMMANDS, into=ENCODER)
        self._add("waitForFence:", self.device.fence)

    def _add(self, name: str, *arguments: int, to: int = ENCODER, into: int = 0, kind: int = MESSAGE) -> None:
        numbers = [*arguments, *[0] * (6 - len(arguments))]
        self.records += RECORD.pack(to, into, kind, 0, self.device.objc.selector(name), *numbers)

    def finish(self) -> Table:
        self._add("updateFence:", self.device.fence)
        self._add("endEncoding")
        self._add("commit", to=COMMANDS)
        self.native = (ctypes.c_char * len(self.records)).from_buffer(self.records)
        return self

    def __len__(self) -> int:
        return len(self.records) // RECORD.size

    def step(self, step: Step, dispatches: Sequence[Dispatch], hazards: Hazards) -> None:
        """Adds a step's dispatches; its scratch memory is free for the next step."""
        places: dict[Scratch, Range] = {FAULT: (self.n_buffers + 1, 0, 0)}     # whose first writer wins: no hazard
        end = 0
        for dispatch in dispatches:
            for value in dispatch.arguments.values():
                if isinstance(value, Scratch) and value not in places:
                    places[value] = self.n_buffers, end, end + value.nbytes
                    end = ceil(end + value.nbytes, ALIGN) * ALIGN
        self.scratch_bytes = max(self.scratch_bytes, end)
        for dispatch in dispatches:
            if prod(dispatch.groups):
                self._dispatch(dispatch, places, hazards)
                self.kernels.append(step.kernel)

    def _dispatch(self, dispatch: Dispatch, places: dict[Scratch, Range], hazards: Hazards) -> None:
        pipeline = self.device.pipeline(dispatch)
        arguments = msl.parse(text(dispatch)).kernels[dispatch.function].buffers
        reads: list[Range] = []
        writes: list[Range] = []
        bindings: list[tuple[int, Any]] = []
        for name, value in dispatch.arguments.items():
            argument = arguments[name]
            if isinstance(value, bytes):
                bindings.append((argument.index, value))
                continue
            place = extent(value) if isinstance(value, View) else places[value]
            (writes if argument.written else reads).append(place)
            bindings.append((argument.index, (place[0], value.offset if isinstance(value, View) else place[1])))
        self.barriers.append(hazards.meet(reads, writes))
        if self.barriers[-1]:
            self._add("memoryBarrierWithScope:", BUFFERS)
        if pipeline != self._pipeline:
            self._add("setComputePipelineState:", pipeline)
            self._pipeline = pipeline
        for index, value in bindings:
            self._bind(index, value)
        self._add("dispatchThreadgroups:threadsPerThreadgroup:", *dispatch.groups, *dispatch.threads, kind=DISPATCH)

    def _bind(self, index: int, value: Any) -> None:
        """A parameter block, or (buffer, offset); nothing where the argument has it from the dispatch before."""
        if self._bound.get(index) == value:
            return
        self._bound[index] = value
        if isinstance(value, bytes):
            self.kept.append(value)
            address = ctypes.cast(c_char_p(value), c_void_p).value or 0
            self._add("setBytes:length:atIndex:", address, len(value), index)
        else:
            self._add("setBuffer:offset:atIndex:", *value, index, kind=BUFFER)

"""A loaded plan: for each tuple of sizes, tables of messages for the GPU and stretches that the CPU runs."""
from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import c_int32, c_uint64, c_void_p
from dataclasses import replace
from functools import cache
from itertools import chain, groupby
from types import SimpleNamespace
from typing import Any, TypeVar

from ..cpu import DTYPES
from .attention import PEEK, SHORT
from .buffers import Memory
from .device import Device
from .encoders import encode
from .steps import SIZES, Dispatch, Step, Unsupported, View
from .table import Hazards, Table, extent

T = TypeVar("T")
KEPT = 64                                                  # encoded tuples of sizes of a plan


class Plan:
    """Steps that are ready to run. Buffer 0 is the arena; those after the last are scratch memory and FAULT's."""

    def __init__(self, device: Device, host: Any, steps: Iterable[Any], n_buffers: int, max_dims: Sequence[int],
                 arena_bytes: int) -> None:
        self.device, self.host, self.n_buffers, self.arena_bytes = device, host, n_buffers, arena_bytes
        self.max_dims, self.steps = tuple(max_dims), [read(step) for step in steps]
        self.whole = self._load(range(len(self.steps)))    # checks every step, and runs what cannot be bound
        self.handles, self.offsets = (c_void_p * (n_buffers + 2))(), (c_uint64 * (n_buffers + 2))()
        self.writable = {v.buffer for step in self.steps for v in step.outputs} - {0}
        self.extents, self.alignment = self._used()
        self.lengths = {step.inputs[PEEK[step.kernel]] for step in self.steps if step.kernel in PEEK}
        self.bound: Any = None                             # the pointers that handles and offsets are made of
        self.bindable = True
        self.serial = False                                # whether buffers share memory in this run
        self._encoded: OrderedDict[Any, list[tuple[range, Any]]] = OrderedDict()

    def _load(self, part: range) -> Any:
        """A stretch for the CPU, in the same memory: there the arena is one more buffer, not the CPU's own."""
        steps = [for_host(self.steps[i], self.n_buffers) for i in part]
        return self.host.load(steps, self.n_buffers + 1, self.max_dims, 0)

    def _used(self) -> tuple[dict[int, tuple[int, int]], dict[int, int]]:
        """The bytes that are used of each buffer at the largest sizes, and the alignment that its elements need."""
        extents: dict[int, tuple[int, int]] = {}
        alignment: dict[int, int] = {}
        for step in self.steps:
            for view in (*step.outputs, *step.inputs):
                number, low, high = extent(sized(view, self.max_dims))
                if number and low < high:
                    before = extents.get(number, (low, high))
                    extents[number] = min(low, before[0]), max(high, before[1])
                    alignment[number] = max(alignment.get(number, 1), min(4, SIZES[view.dtype]))
        return extents, alignment

    def bind(self, pointers: Any, memory: Memory) -> None:
        """Finds the buffers of these addresses; `bindable` is False where one cannot be bound as it lies."""
        key = bytes(pointers), memory.version
        if key == self.bound:
            return
        ranges = []
        self.bound, self.bindable = key, True
        for number, (low, high) in self.extents.items():
            start = pointers[number] or 0
            place = memory.place(start + low, start + high) or memory.hold(start + low, start + high)
            if place is None or start % self.alignment[number]:
                self.bindable = False
                return
            self.handles[number], self.offsets[number] = place[0], place[1] - low
            ranges.append((start + low, start + high, number in self.writable))
        self.serial = shared(ranges)

    def parts(self, pointers: Any, dims: tuple[int, ...], each: bool) -> list[tuple[range, Any]]:
        """(steps, Table or the CPU's plan) in order. each: every step by itself, to be timed."""
        key = dims, self._short(pointers, dims), self.serial, each
        if key not in self._encoded:
            self._encoded[key] = list(self._encode(dims, key[1], each))
            if len(self._encoded) > KEPT:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(key)
        return self._encoded[key]

    def _short(self, pointers: Any, dims: tuple[int, ...]) -> bool:
        """Whether the host knows that no sequence has more than SHORT tokens."""
        for view in self.lengths:
            if not view.buffer or view.buffer in self.writable:
                return False
            lengths = (c_int32 * sized(view, dims).size).from_address(pointers[view.buffer] + view.offset)
            if max(lengths, default=0) > SHORT:
                return False
        return bool(self.lengths)

    def _encode(self, dims: tuple[int, ...], short: bool, each: bool) -> Iterator[tuple[range, Any]]:
        steps = [at(step, dims, SHORT if short else None) for step in self.steps]
        made = self._dispatches(steps)
        for (alone, _), group in groupby(range(len(steps)), lambda i: (made[i] is None, i if each else 0)):
            part = list(group)
            numbers = range(part[0], part[-1] + 1)
            if alone:
                yield numbers, self._load(numbers)
                continue
            table, hazards = Table(self.device, self.n_buffers), Hazards(self.serial)
            for i in part:
                table.step(steps[i], made[i] or [], hazards)
            yield numbers, table.finish()

    def _dispatches(self, steps: list[Step]) -> list[list[Dispatch] | None]:
        """What the GPU does for each step; None where the CPU has to."""
        made = [supported(encode, step, step) for step in steps]
        self.device.compile(chain(*(d for d in made if d)))
        return [d and supported(self._fits, step, d) for step, d in zip(steps, made, strict=True)]

    def _fits(self, dispatches: list[Dispatch]) -> list[Dispatch]:
        for dispatch in dispatches:
            self.device.pipeline(dispatch)
        return dispatches


def read(step: Any) -> Step:
    """A step as the array package gives it, in words: dtypes are names. shape[0] = -1 - d is still dims[d]."""
    def view(v: Any) -> View:
        return View(v.buffer, DTYPES[getattr(v.dtype, "code", v.dtype)], v.offset, tuple(v.shape), tuple(v.strides))

    return Step(step.kernel, tuple(map(view, step.outputs)), tuple(map(view, step.inputs)), tuple(step.ints),
                tuple(step.floats))


def sized(view: View, dims: Sequence[int]) -> View:
    shape = view.shape
    return replace(view, shape=(dims[-1 - shape[0]], *shape[1:])) if shape and shape[0] < 0 else view


def at(step: Step, dims: Sequence[int], longest: int | None = None) -> Step:
    """The step with these numbers for sizes."""
    inputs, outputs = (tuple(sized(v, dims) for v in views) for views in (step.inputs, step.outputs))
    return replace(step, inputs=inputs, outputs=outputs, longest=longest)


def for_host(step: Step, arena: int) -> SimpleNamespace:
    """The step for the CPU's runtime, which has the arena's memory as the buffer of that number."""
    def views(views: Sequence[View]) -> list[SimpleNamespace]:
        return [SimpleNamespace(**vars(v) | {"buffer": v.buffer or arena, "dtype": DTYPES.index(v.dtype)})
                for v in views]

    return SimpleNamespace(**vars(step) | {"outputs": views(step.outputs), "inputs": views(step.inputs)})


def supported(make: Callable[[Any], T], step: Step, given: Any) -> T | None:
    """make(given), unless the GPU cannot do the step: this is said once for each kernel and reason."""
    try:
        return make(given)
    except Unsupported as why:
        say(step.kernel, str(why))
        return None


@cache
def say(kernel: str, why: str) -> None:
    print(f"[metal] {kernel} runs on the CPU: {why}", file=sys.stderr)


def shared(ranges: list[tuple[int, int, bool]]) -> bool:
    """Whether addresses that are written are in two of the ranges (first, end, written)."""
    reach = written = 0
    for first, end, writes in sorted(ranges):
        if first < written or (writes and first < reach):
            return True
        reach, written = max(reach, end), max(written, end if writes else 0)
    return False

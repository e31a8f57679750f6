"""An Executable is a loaded plan: pointers and sizes are set once, each run is one native call."""
from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from typing import Any

import numpy as np

from .array import Array
from .dtypes import FROM_NUMPY
from .node import Shape, Value, contiguous_strides, from_numpy, is_contiguous, show
from .plan import Plan, View


class Executable:
    """`set_input` and `set_output` once, then `run` as often as the memory behind them changes."""

    def __init__(self, plan: Plan, native: Any):
        self.plan, self._native = plan, native
        self._adopt = native.adopt                         # where memory must be known before a run reads it
        count = 1 + len(plan.inputs) + len(plan.outputs) + len(plan.constants)
        self.pointers = (c_void_p * count)()
        self.dims = (c_int64 * max(1, len(plan.dims)))(*plan.dims)
        self._names = {d.name: i for i, d in enumerate(plan.dims)}
        self._owners: dict[int, Any] = {}
        for i, value in enumerate(plan.constants):
            self._set(count - len(plan.constants) + i, value)
        self._unset = {i: v for i, v in enumerate(plan.outputs) if v.storage.kind == "output"}
        self._results = [(plan.buffer(v.storage), max(1, v.storage.nbytes) if v.storage.kind == "output" else 0,
                          contiguous_strides(v.shape)) for v in plan.outputs]
        self.handle = native.load(plan.native(native.opcodes), count, [int(d) for d in plan.dims], plan.arena)
        self.handle.plan = plan                            # a profile reads its steps
        self.handle.owners = self._owners                  # memory that a run under way needs

    def _set(self, position: int, value: Value) -> None:
        assert value.buffer is not None
        if self._adopt:
            self._adopt(value.buffer)
        self.pointers[position] = value.buffer.pointer + value.offset
        self._owners[position] = value

    def set_input(self, i: int, array: Any) -> None:
        """Row-major memory, Array or ndarray, of the input's dtype and largest shape: every run reads it, and writes it
        if it is donated."""
        self._set(1 + i, _memory("set_input", i, array, self.plan.inputs[i]))

    def set_output(self, i: int, array: Any) -> None:
        """Memory that every run writes output i to."""
        view = self.plan.outputs[i]
        if view.storage.kind != "output":
            raise ValueError(f"[set_output] output {i} is in the memory of donated input {view.storage.index}")
        self._set(self.plan.buffer(view.storage), _memory("set_output", i, array, view))
        self._unset.pop(i, None)

    def output(self, i: int) -> Array:
        """Output i as an array on the memory that runs write to."""
        self._allocate()
        return Array.of(self._owners[self.plan.buffer(self.plan.outputs[i].storage)])

    def run(self, **dims: int) -> None:
        """Runs every step in one native call. dims: symbolic sizes by name; one not given keeps its last value."""
        self._native.wait(self.start(**dims))

    def start(self, **dims: int) -> int:
        """`run` that may return before the work is done: `wait` for the number that it returns before the memory of
        inputs and outputs is touched."""
        for name, size in dims.items():
            self.dims[self._names[name]] = size
        if self._unset:
            self._allocate()
        return self._native.start(self.handle, self.pointers, self.dims)

    def wait(self, started: int | None = None) -> None:
        """Returns when that run, by default all, is done, and those that any executable started before."""
        self._native.wait(started)

    @property
    def asynchronous(self) -> bool:
        """Whether `start` returns before the work is done."""
        return self._native.asynchronous

    def __call__(self, inputs: Sequence[Value]) -> list[tuple[Any, int, Shape]]:
        """A run on these leaves: buffer, offset and strides of each output, in fresh memory or that of a donated input.
        One at a time."""
        pointers, alloc = self.pointers, self._native.alloc
        for i, value in enumerate(inputs, 1):
            pointers[i] = value.buffer.pointer + value.offset  # type: ignore[union-attr]
        if self._adopt:
            for value in inputs:
                self._adopt(value.buffer)
        made = []
        for position, nbytes, strides in self._results:
            if nbytes:
                block = alloc(nbytes)
                pointers[position] = block.pointer
                made.append((block, 0, strides))
            else:
                made.append((inputs[position - 1].buffer, inputs[position - 1].offset, strides))
        self._native.run(self.handle, pointers, self.dims)
        return made

    def _allocate(self) -> None:
        for view in self._unset.values():
            self._owners[self.plan.buffer(view.storage)] = self._fresh(view)
        self._unset = {}

    def _fresh(self, view: View) -> Value:
        """New memory for an output."""
        block = self._native.alloc(max(1, view.storage.nbytes))
        self.pointers[self.plan.buffer(view.storage)] = block.pointer
        return Value(view.shape, view.dtype).fill(block, 0, contiguous_strides(view.shape))


def _memory(name: str, i: int, array: Any, view: View) -> Value:
    """The array's memory, checked against what the plan will read or write there."""
    value = array._value if isinstance(array, Array) else from_ndarray(name, np.asarray(array), view)
    wanted = tuple(int(s) for s in view.shape)
    fits = value.dtype is view.dtype and tuple(map(int, value.shape)) == wanted
    if value.buffer is None or not fits or not is_contiguous(value.shape, value.strides):
        raise ValueError(f"[{name}] {i}: {value.dtype}{show(value.shape)}, row-major {view.dtype}{show(wanted)} wanted")
    return value


def from_ndarray(name: str, array: np.ndarray, view: View) -> Value:
    """uint16 memory counts as bfloat16 where that is wanted."""
    if view.storage.writable and view.storage.kind != "constant" and not array.flags.writeable:
        raise ValueError(f"[{name}] the memory is read-only, and the plan writes to it")
    if array.dtype not in FROM_NUMPY:
        raise TypeError(f"[{name}] NumPy type {array.dtype} has no dtype here")
    return from_numpy(array, view.dtype if array.dtype == view.dtype.numpy else FROM_NUMPY[array.dtype], False)

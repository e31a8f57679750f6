"""A Plan is data: a list of steps over views of one arena, inputs, outputs and constants. print(plan) is a table."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .device import default_device, runtime_of
from .dtypes import Dtype
from .node import Dim, Shape, Value, contiguous_strides, is_contiguous, show

if TYPE_CHECKING:
    from .executable import Executable


def runtime() -> Any:
    """The default device's runtime, by name only: this package runs no kernel and imports none."""
    return runtime_of(default_device())


@dataclass(slots=True, eq=False)
class Storage:
    """Memory of the plan. `refs` counts the values on it that are still to be read while lowering."""

    kind: str                        # arena, input, output or constant
    nbytes: int
    index: int = 0                   # among the inputs, outputs or constants
    offset: int = 0                  # in the arena
    writable: bool = True
    refs: int = 0

    def __str__(self) -> str:
        return f"arena+{self.offset}" if self.kind == "arena" else f"{self.kind}{self.index}"


@dataclass(frozen=True, slots=True)
class View:
    """A strided window on a storage: start in bytes, strides in elements."""

    storage: Storage
    dtype: Dtype
    start: int
    shape: Shape
    strides: Shape

    @property
    def contiguous(self) -> bool:
        return is_contiguous(self.shape, self.strides)

    @property
    def offset(self) -> int:
        return self.storage.offset + self.start

    @property
    def extent(self) -> tuple[int, int]:
        """The first byte of its storage that it covers, and the one after the last."""
        ways = [(s - 1) * t * self.dtype.size for s, t in zip(self.shape, self.strides, strict=True)]
        return self.start + sum(w for w in ways if w < 0), self.start + sum(w for w in ways if w > 0) + self.dtype.size

    def moved(self, shape: Shape, strides: Shape, first: int = 0, dtype: Dtype | None = None) -> View:
        return View(self.storage, dtype or self.dtype, self.start + first * self.dtype.size, shape, strides)

    def reshaped(self, *shape: int) -> View:
        """A row-major view under another shape."""
        return self.moved(shape, contiguous_strides(shape))

    def broadcast(self, shape: Shape) -> View:
        pad = len(shape) - len(self.shape)
        strides = tuple(st if self.shape[i] == shape[pad + i] else 0 for i, st in enumerate(self.strides))
        return self.moved(shape, (0,) * pad + strides)

    def __str__(self) -> str:
        where = str(self.storage) + (f"[{self.start}]" if self.start else "")
        strides = "" if self.contiguous else f" strides {show(self.strides)}"
        return f"{self.dtype}{show(self.shape)}{strides} {where}"


class NativeView(NamedTuple):
    """As the runtime reads it: shape[0] = -1 - d stands for the run's dims[d]."""

    buffer: int
    dtype: int
    offset: int
    shape: Shape
    strides: Shape


class NativeStep(NamedTuple):
    kernel: str
    outputs: list[NativeView]
    inputs: list[NativeView]
    ints: list[int]
    floats: list[float]


@dataclass(slots=True)
class PlanStep:
    """One call of a kernel. `ints` may name opcodes, which are numbers only to a runtime."""

    kernel: str
    outputs: list[View]
    inputs: list[View]
    ints: list[int | str] = field(default_factory=list)
    floats: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [f"{'' if i else self.kernel:16s} -> {view}" for i, view in enumerate(self.outputs)]
        rows += [f"{'':16s} <- {view}" for view in self.inputs]
        parameters = program(self.ints, self.floats) if self.kernel == "elementwise" else [
            f"{name} {' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)}"
            for name, values in (("ints", self.ints), ("floats", self.floats)) if values]
        return "\n".join(rows + [f"{'':16s}    {line}" for line in parameters])


def program(ints: Sequence[int | str], floats: Sequence[float]) -> list[str]:
    """An elementwise step's instructions as text."""
    cls, n_instructions, n_constants, *rest = ints
    n_out = len(rest) - 5 * int(n_instructions)
    code = [rest[i:i + 5] for i in range(n_out, len(rest), 5)]
    lines = [f"r{dst} = {op} {a} {b} {c}" for op, dst, a, b, c in code]
    lines.append(f"store {' '.join(f'r{r}' for r in rest[:n_out])} of {('f32', 'f64', 'i64', 'u64', 'c64')[int(cls)]}")
    return [f"constants {', '.join(f'{c:g}' for c in floats)}", *lines] if floats else lines


@dataclass(slots=True)
class Plan:
    """Steps and where their memory is. Sizes of symbolic axes are their maxima."""

    steps: list[PlanStep]
    inputs: list[View]
    outputs: list[View]
    constants: list[Value]
    dims: list[Dim]
    arena: int

    def __str__(self) -> str:
        head = [f"plan: {len(self.steps)} steps, arena {self.arena} bytes"]
        head += [f"dim {d.name} <= {d.maximum}" for d in self.dims]
        head += [f"input{i}: {v.dtype}{show(v.shape)}" for i, v in enumerate(self.inputs)]
        head += [f"constant{i}: {v.dtype}{show(v.shape)}" for i, v in enumerate(self.constants)]
        steps = [f"{i:3d} {step}".replace("\n", "\n    ") for i, step in enumerate(self.steps)]
        return "\n".join([*head, *steps, *(f"output{i}: {view}" for i, view in enumerate(self.outputs)), ""])

    def load(self) -> Executable:
        from .executable import Executable
        return Executable(self, runtime())

    def check(self) -> None:
        """Raises ValueError where a step would leave its memory, as one of a graph that no op has checked may."""
        for step in self.steps:
            for view in (*step.outputs, *step.inputs):
                first, last = view.extent
                storage = view.storage
                if 0 not in view.shape and not 0 <= first <= last <= storage.nbytes:
                    raise ValueError(f"[{step.kernel}] bytes {first} to {last} of the {storage.nbytes} of {storage}")

    def buffer(self, storage: Storage) -> int:
        """Position among the run's pointers: arena, inputs, outputs, constants."""
        outputs = 1 + len(self.inputs)
        first = {"arena": 0, "input": 1, "output": outputs, "constant": outputs + len(self.outputs)}
        return first[storage.kind] + storage.index

    def native(self, opcodes: dict[str, int]) -> list[NativeStep]:
        def view(v: View) -> NativeView:
            shape = v.shape
            if shape and isinstance(shape[0], Dim):
                shape = (-1 - self.dims.index(shape[0]), *shape[1:])
            return NativeView(self.buffer(v.storage), v.dtype.code, v.offset, shape, v.strides)

        return [NativeStep(s.kernel, [view(v) for v in s.outputs], [view(v) for v in s.inputs],
                           [opcodes[i] if isinstance(i, str) else i for i in s.ints], s.floats) for s in self.steps]


def nbytes(shape: Shape, dtype: Dtype) -> int:
    return int(np.prod([int(s) for s in shape], dtype=np.int64)) * dtype.size

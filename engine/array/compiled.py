"""compile: a function is traced once for each structure of its arguments, then its plan is replayed."""
from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from .array import Array
from .containers import Skeleton, arrays_of, assign, rebuild, skeleton, structure_of
from .device import default_device
from .evaluate import FIELD, LOCK, Cache, eval, is_traced
from .executable import Executable
from .lowering import lower_values
from .node import TRACING, Value
from .plan import Plan

__all__ = ["compile", "disable_compile", "enable_compile"]
TRACES, DONATIONS = 64, 4            # kept of a function, and plans kept of a trace
ENABLED = [True]


def disable_compile() -> None:
    """From now on compiled functions run as they are written."""
    ENABLED[0] = False


def enable_compile() -> None:
    """From now on compiled functions are compiled, as they are at the start."""
    ENABLED[0] = True


def compile(fun: Callable[..., Any], inputs: Any = None, outputs: Any = None,
            shapeless: bool = False) -> Callable[..., Any]:
    """A function that traces `fun` once for each structure, shapes and dtypes of its arguments, then replays the plan
    in one native call. Inside a transformation or another compiled function it is `fun`.

    inputs, outputs: containers (lists, dicts, modules) whose arrays every call reads, and replaces. An array of both
    that nobody else holds is updated in its own memory. Other arrays that fun captures are constants.
    shapeless: accepted as in MLX; a new shape is traced anew all the same, so that shapes in fun are what they are.
    """
    cache: Cache[Traced] = Cache(TRACES)

    @functools.wraps(fun)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        arguments = arrays_of((args, kwargs))
        if TRACING.depth or not ENABLED[0] or any(is_traced(a) for a in arguments):
            return fun(*args, **kwargs)
        with LOCK:
            state = arrays_of(inputs)
            traced = cache.get(*look(args, kwargs, arguments, state))
            free = _free(state, arrays_of(outputs))
            results = iter(traced.run([a._value for a in (*arguments, *state)], free))
            answer = rebuild(traced.result, results)
            assign(outputs, traced.where, results)
            return answer

    def look(args: Any, kwargs: Any, arguments: list[Array], state: list[Array]) -> tuple[Any, Callable[[], Traced]]:
        eval(arguments, state)
        seats = {id(a): i for i, a in enumerate(state)}        # an array may have two: it is one to fun
        key = structure_of((args, kwargs)), *map(structure_of, state), *(seats[id(a)] for a in state)
        return key, lambda: trace(fun, args, kwargs, inputs, outputs)

    def plan(*args: Any, **kwargs: Any) -> Plan:
        """What a call with these arguments runs, made but not run: its arena is the memory that it takes."""
        with LOCK:
            state = arrays_of(inputs)
            traced = cache.get(*look(args, kwargs, arrays_of((args, kwargs)), state))
            return traced.executable(_free(state, arrays_of(outputs))).plan

    compiled.plan = plan  # type: ignore[attr-defined]
    return compiled


def _free(state: list[Array], written: list[Array]) -> tuple[int, ...]:
    """The positions of arrays that this call will replace, and that only their container and the two lists hold."""
    if not written:
        return ()
    once = Counter(map(id, state)), Counter(map(id, written))
    return tuple(i for i in range(len(state)) if sys.getrefcount(state[i]) == FIELD + 2
                 and sys.getrefcount(state[i]._value) == sys.getrefcount(state[i]._value.buffer) == FIELD
                 and getattr(state[i]._value.buffer, "donatable", False)
                 and all(count[id(state[i])] == 1 for count in once))


class Traced:
    """The graph of a call: `sources` says of each result which input it is, or -1 for a computed one. `result` is what
    the function returned, `where` are the places of the arrays that it wrote."""

    def __init__(self, inputs: list[Value], values: list[Value], n_arguments: int, result: Any, where: Skeleton):
        number = {v: i for i, v in enumerate(inputs)}
        self.inputs, self.n_arguments, self.result, self.where = inputs, n_arguments, result, where
        self.sources = [number.get(v, -1) for v in values]
        self.computed = [v for v in values if v not in number]
        self.executables: Cache[Executable] = Cache(DONATIONS)

    def run(self, inputs: list[Value], free: tuple[int, ...]) -> list[Array]:
        """free: which of the inputs that come after the arguments may be overwritten."""
        results: Iterator[Value] = iter(())
        if self.computed:
            views = zip(self.executable(free)(inputs), self.computed, strict=True)
            results = (Value(v.shape, v.dtype).fill(*made) for made, v in views)
        return [Array.of(next(results) if source < 0 else inputs[source]) for source in self.sources]

    def executable(self, free: tuple[int, ...]) -> Executable:
        return self.executables.get((free, id(default_device().type)), lambda: self._load(free))

    def _load(self, free: tuple[int, ...]) -> Executable:
        positions = {i + self.n_arguments for i in free} - set(self.sources)
        return lower_values(self.computed, self.inputs, [self.inputs[i] for i in positions]).load()


def trace(fun: Callable[..., Any], args: Any, kwargs: Any, inputs: Any = None, outputs: Any = None) -> Traced:
    """The graph of fun on placeholders. Those of the state are in its arrays for as long as fun runs; afterwards all
    containers are as they were."""
    given, state = arrays_of((args, kwargs)), arrays_of(inputs)
    saved = [a._value for a in state]
    placeholders = [a._value.stand_in() for a in (*given, *state)]
    before = [(tree, skeleton(tree), arrays_of(tree)) for tree in (inputs, outputs)]
    try:
        for array, value in zip(state, placeholders[len(given):], strict=True):
            array._value = value
        args, kwargs = rebuild((args, kwargs), map(Array.of, placeholders))
        with TRACING:
            result = fun(*args, **kwargs)
        values = [a._value for a in (*arrays_of(result), *arrays_of(outputs))]
        where = skeleton(outputs)
    finally:
        for array, value in zip(state, saved, strict=True):
            array._value = value
        for tree, places, arrays in before:
            assign(tree, places, iter(arrays))
    return Traced(placeholders, values, len(given), rebuild(result, map(Array.of, values)), where)

"""Scatter: updates at indices, in their order."""
from __future__ import annotations

from .elementwise import code
from .gather import axes, params
from .steps import FAULT, Dispatch, Step, Unsupported, ceil

LONELY = 4096                          # updates that one thread may do where there are few columns


def scatter(step: Step) -> list[Dispatch]:
    """A thread has a column, so that updates come in their order."""
    indices, updates, out = (axes(v) for v in (*step.inputs, *step.outputs))
    lead, count, columns = indices.shape
    if lead * columns < 32 and count > LONELY:
        raise Unsupported("many updates of few columns")
    kind = "float" if "float" in out.dtype else "ulong" if out.dtype == "uint64" else "long"
    constants = {"OP": step.ints[0], "INDEX": code(indices), "DTYPE": code(out)}
    p = params(updates, out.shape[1], out, updates, indices)
    return [Dispatch("scatter", "scatter", {"o": out, "updates": updates, "indices": indices, "fault": FAULT, "p": p},
                     (ceil(columns, 32), lead, 1), (32, 1, 1), {"T": kind}, constants)]

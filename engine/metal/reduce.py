"""Reductions: a fold of the last axes, in one launch or two."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .elementwise import code, is_wide, merged, padded
from .steps import MSL, Dispatch, Scratch, Step, Unsupported, View, ceil, struct

THREADS = 256
FEW_GROUPS, CHUNK = 64, 64             # threadgroups that leave a GPU idle; items of a lane where results are cut


def reduce(step: Step) -> list[Dispatch]:
    op, _ = step.ints
    [out], [x] = step.outputs, step.inputs
    kept, tail = (View(x.buffer, x.dtype, x.offset, x.shape[part], x.strides[part])
                  for part in (slice(len(out.shape)), slice(len(out.shape), None)))
    if max(tail.size, out.size) >= 2**32:
        raise Unsupported(f"{out.size} results of {tail.size} items")
    shape, strides = merged([out, kept])
    reduced, [steps] = merged([tail])
    beside = abs(strides[1][-1]) < abs(steps[-1]) and shape[-1] >= 8
    lanes = 1
    while lanes < (THREADS // 32 if beside else THREADS) and 8 * lanes < tail.size:
        lanes *= 2
    groups = ceil(out.size, THREADS // lanes)
    chunks = ceil(tail.size, CHUNK * lanes) if groups < FEW_GROUPS and tail.size > 4 * CHUNK * lanes else 1
    kind = "float" if "float" in x.dtype else "ulong" if x.dtype == "uint64" else "long"
    constants = {"OP": op, "DTYPE": code(x), "OUT": code(out), "KEPT": len(shape), "REDUCED": len(reduced),
                 "WIDE": is_wide([out, x]), "LANES": lanes, "BESIDE": beside, "FIRST": chunks > 1, "SECOND": False}
    p = struct(out.size, tail.size, ceil(tail.size, chunks), *padded(shape, reduced, *strides, steps))
    if chunks == 1:
        return [_dispatch(kind, constants, {"x": x, "o": out, "p": p}, (groups, 1, 1))]
    values, places = Scratch(8 * chunks * out.size), Scratch(4 * chunks * out.size)
    rows = _strides(shape)                                 # of a chunk's results
    last = struct(out.size, chunks, chunks, *padded(shape, [chunks], strides[0], rows, [out.size]))
    second = constants | {"DTYPE": list(MSL.values()).index(kind), "REDUCED": 1, "FIRST": False, "SECOND": True}
    return [_dispatch(kind, constants, {"x": x, "values": values, "places": places, "p": p}, (groups, chunks, 1)),
            _dispatch(kind, second, {"x": values, "parts": places, "o": out, "p": last}, (groups, 1, 1))]


def _strides(shape: list[int]) -> list[int]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)
    return strides[::-1]


def _dispatch(kind: str, constants: Mapping[str, int], arguments: Mapping[str, Any],
              groups: tuple[int, int, int]) -> Dispatch:
    return Dispatch("reduce", "reduce", arguments, groups, (THREADS, 1, 1), {"T": kind}, constants)

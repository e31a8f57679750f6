"""States of recurrent layers as they were at the end of a page, so that a prefix is found again by hybrids too.

A page's keys and values are worth nothing to them without the states after it. While a prompt runs, the states are
copied whenever a step ends with a page; the least recently used copy makes room for the next.
"""

import ctypes
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

from .. import array as mx
from .pages import Pages

COPIES = 8  # beside the slots of sequences; memory is taken as they are used


class Snapshots:
    """Slots `first` … first + COPIES of the state arrays (slots, …), kept by the chain of pages that led to them."""

    def __init__(self, arrays: Iterable[mx.Array], first: int):
        self.arrays = [_writable(array) for array in arrays]
        self.free = list(range(first, first + COPIES))
        self.kept: OrderedDict[int, int] = OrderedDict()  # chain -> slot

    def keep(self, chain: int, slot: int) -> None:
        """Copies the states in `slot`, which are those after `chain`."""
        if chain not in self.kept:
            self.kept[chain] = self.free.pop() if self.free else self.kept.popitem(last=False)[1]
            self._copy(slot, self.kept[chain])
        self.kept.move_to_end(chain)

    def restore(self, pages: Pages, found: list[int], chain: int, slot: int) -> tuple[list[int], int]:
        """Of pages that were found after `chain`, those up to the last whose states are kept, which are copied to
        `slot`, and the chain that they end; the others are given back."""
        chains = [chain, *(pages.kept[pages.keys[page]][1] for page in found)]
        count = max((i for i in range(1, len(chains)) if chains[i] in self.kept), default=0)
        pages.release(found[count:])
        if count:
            self.kept.move_to_end(chains[count])
            self._copy(self.kept[chains[count]], slot)
        return found[:count], chains[count]

    def _copy(self, source: int, target: int) -> None:
        for array in self.arrays:
            array[target] = array[source]


def _writable(array: mx.Array) -> np.ndarray:
    """The array's own memory, which the plan writes too."""
    view = np.asarray(array)
    address = view.__array_interface__["data"][0]
    memory = (ctypes.c_char * view.nbytes).from_address(address)
    result = np.frombuffer(memoryview(memory), view.dtype).reshape(view.shape)
    assert np.shares_memory(result, view)
    return result

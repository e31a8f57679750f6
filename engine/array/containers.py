"""Arrays in containers: lists, tuples, dicts (a module may be one), and the attributes of objects with `parameters`."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .array import Array

SEQUENCES = (list, tuple)


def items_of(tree: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(tree, dict):
        return tree.items()
    if isinstance(tree, SEQUENCES):
        return enumerate(tree)
    return vars(tree).items() if hasattr(tree, "parameters") else ()


def arrays_of(tree: Any) -> list[Array]:
    """The arrays in the tree, in order."""
    found: list[Array] = []
    _collect((tree,), found)
    return found


def _collect(items: Iterable[Any], found: list[Array]) -> None:
    for item in items:
        if isinstance(item, Array):
            found.append(item)
        elif isinstance(item, SEQUENCES):
            _collect(item, found)
        elif isinstance(item, dict):
            _collect(item.values(), found)
        elif hasattr(item, "parameters"):
            _collect(vars(item).values(), found)


def structure_of(tree: Any, name: str = "compile") -> Any:
    """A hashable picture of the tree: arrays by shape, strides and dtype, everything else by value."""
    if isinstance(tree, Array):
        return tree.dtype, tree.shape, tree._value.strides
    if hasattr(tree, "parameters"):
        raise TypeError(f"[{name}] a {type(tree).__name__} argument: pass its parameters, or name it in `inputs`")
    if isinstance(tree, dict):
        return dict, *((k, structure_of(v, name)) for k, v in tree.items())
    if isinstance(tree, SEQUENCES):
        return type(tree), *(structure_of(v, name) for v in tree)
    if isinstance(tree, float):
        return float, repr(tree)                           # 0.0 and -0.0 are equal, and two functions
    try:
        hash(tree)
    except TypeError as error:
        raise TypeError(f"[{name}] a {type(tree).__name__} argument: arrays, containers, constants wanted") from error
    return type(tree), tree


def rebuild(tree: Any, arrays: Iterator[Array]) -> Any:
    """The tree with its arrays replaced, in order."""
    if isinstance(tree, Array):
        return next(arrays)
    if isinstance(tree, dict):
        return {k: rebuild(v, arrays) for k, v in tree.items()}
    if isinstance(tree, SEQUENCES):
        items = [rebuild(v, arrays) for v in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


Skeleton = list[tuple[Any, "Skeleton | None"]]             # keys, with None where an array is


def skeleton(tree: Any) -> Skeleton:
    """Where the tree's arrays are."""
    return [(key, None if isinstance(item, Array) else below) for key, item in items_of(tree)
            if (below := skeleton(item)) or isinstance(item, Array)]


def assign(tree: Any, where: Skeleton, arrays: Iterator[Array]) -> None:
    """Puts the arrays in their places, in order; a tuple itself cannot change, what is inside it can."""
    for key, below in where:
        if below:
            assign(tree[key] if isinstance(tree, dict | list | tuple) else getattr(tree, key), below, arrays)
        elif isinstance(tree, list) and key == len(tree):
            tree.append(next(arrays))
        elif isinstance(tree, dict | list):
            tree[key] = next(arrays)
        else:
            setattr(tree, key, next(arrays))

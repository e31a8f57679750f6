"""Trees are nested dicts, lists and tuples; whatever else is a leaf. Names and semantics are those of mlx.utils."""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any

__all__ = ["tree_flatten", "tree_map", "tree_map_with_path", "tree_merge", "tree_reduce", "tree_unflatten"]
IsLeaf = Callable[[Any], bool] | None
BRANCH = (dict, list, tuple)


def _items(tree: Any, is_leaf: IsLeaf) -> Iterable[tuple[Any, Any]] | None:
    """The branches with their keys; None of a leaf."""
    if not isinstance(tree, BRANCH) or (is_leaf is not None and is_leaf(tree)):
        return None
    return tree.items() if isinstance(tree, dict) else enumerate(tree)


def _like(tree: Any, branches: dict[Any, Any]) -> Any:
    """The branches in a container of the tree's type."""
    if isinstance(tree, dict):
        return branches
    return type(tree)(*branches.values()) if hasattr(tree, "_fields") else type(tree)(branches.values())


def _leaves(tree: Any, path: str, is_leaf: IsLeaf) -> Iterator[tuple[str, Any]]:
    if (items := _items(tree, is_leaf)) is None:
        yield path[1:], tree
    else:
        for key, branch in items:
            yield from _leaves(branch, f"{path}.{key}", is_leaf)


def tree_flatten(tree: Any, prefix: str = "", is_leaf: IsLeaf = None, destination: Any = None) -> Any:
    """The leaves with their dotted paths: a list of pairs, or added to the list or dict `destination`, which returns.

    The first character of `prefix` is dropped from the paths.
    """
    destination = [] if destination is None else destination
    (destination.update if isinstance(destination, dict) else destination.extend)(_leaves(tree, prefix, is_leaf))
    return destination


def tree_unflatten(tree: Iterable[tuple[str, Any]] | dict[str, Any]) -> Any:
    """The tree that was flattened: dicts, and lists where all keys are integers, with {} in the gaps."""
    items = list(tree.items() if isinstance(tree, dict) else tree)
    if len(items) == 1 and items[0][0] == "":
        return items[0][1]
    branches: dict[str, list[tuple[str, Any]]] = {}
    for path, leaf in items:
        key, _, rest = path.partition(".")
        branches.setdefault(key, []).append((rest, leaf))
    if not all(key.isdecimal() and key == str(int(key)) for key in branches):
        return {key: tree_unflatten(branch) for key, branch in branches.items()}
    size = max(map(int, branches), default=-1) + 1
    return [tree_unflatten(branches[str(i)]) if str(i) in branches else {} for i in range(size)]


def tree_map(fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: IsLeaf = None) -> Any:
    """fn(leaf, the same place of each of `rest`) in the tree's shape; the rest may hold more than the tree."""
    return tree_map_with_path(lambda _, *leaves: fn(*leaves), tree, *rest, is_leaf=is_leaf)


def tree_map_with_path(
    fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: IsLeaf = None, path: str | None = None
) -> Any:
    """tree_map whose fn takes the leaf's dotted path first."""
    if (items := _items(tree, is_leaf)) is None:
        return fn(path, tree, *rest)
    below = f"{path}." if path else ""
    return _like(tree, {
        key: tree_map_with_path(fn, branch, *(r[key] for r in rest), is_leaf=is_leaf, path=f"{below}{key}")
        for key, branch in items
    })


def tree_reduce(fn: Callable[[Any, Any], Any], tree: Any, initializer: Any = None, is_leaf: IsLeaf = None) -> Any:
    """fn(… fn(fn(initializer, leaf), leaf) …); without an initializer it starts with the first leaf."""
    leaves = (leaf for _, leaf in _leaves(tree, "", is_leaf))
    return functools.reduce(fn, leaves, next(leaves, None) if initializer is None else initializer)


def tree_merge(tree_a: Any, tree_b: Any, merge_fn: Callable[[Any, Any], Any] | None = None) -> Any:
    """Both trees in one; merge_fn(a, b) decides where both have a leaf. Empty containers and None give way."""
    absent = [tree is None or _items(tree, None) is not None and len(tree) == 0 for tree in (tree_a, tree_b)]
    if any(absent):
        if all(absent) and type(tree_a) is not type(tree_b) and None not in (tree_a, tree_b):
            raise ValueError(f"[tree_merge] an empty {type(tree_a).__name__} and an empty {type(tree_b).__name__}")
        return tree_b if absent[0] and tree_b is not None else tree_a
    if isinstance(tree_a, dict) and isinstance(tree_b, dict):
        return {k: tree_merge(tree_a.get(k), tree_b.get(k), merge_fn) for k in tree_a | tree_b}
    if isinstance(tree_a, BRANCH[1:]) and isinstance(tree_b, BRANCH[1:]):
        pairs = zip_longest(tree_a, tree_b)
        return _like(tree_a, {i: tree_merge(a, b, merge_fn) for i, (a, b) in enumerate(pairs)})
    if merge_fn is None:
        raise ValueError("[tree_merge] both trees have a leaf in one place: a merge_fn is wanted")
    return merge_fn(tree_a, tree_b)

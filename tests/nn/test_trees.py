"""Tree functions against mlx.utils, on trees from hypothesis."""
from collections import namedtuple

import mlx.utils
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazulite.engine import nn

Point = namedtuple("Point", "x y")
LEAF = st.integers() | st.text(max_size=3)
KEY = st.sampled_from(["a", "b", "weight", "7"])
TREES = st.recursive(LEAF, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEY, inner, max_size=3),
    st.tuples(inner, inner).map(lambda pair: Point(*pair))), max_leaves=8)
WHOLE = st.recursive(LEAF, lambda inner: st.one_of(     # no empty branches, which a flat tree cannot show
    st.lists(inner, min_size=1, max_size=3), st.dictionaries(KEY, inner, min_size=1, max_size=3)), max_leaves=8)


def is_pair(tree) -> bool:
    return isinstance(tree, list) and len(tree) == 2


def outcome(fn):
    try:
        return fn()
    except Exception as error:
        return type(error)


CALLS = {
    "flatten": lambda m, a: m.tree_flatten(a),
    "flatten with a prefix": lambda m, a: m.tree_flatten(a, prefix=".top", destination={}),
    "flatten to a list": lambda m, a: m.tree_flatten(a, is_leaf=is_pair, destination=[("x", 1)]),
    "unflatten": lambda m, a: m.tree_unflatten(m.tree_flatten(a)),
    "unflatten a dict": lambda m, a: m.tree_unflatten(m.tree_flatten(a, destination={})),
    "map": lambda m, a: m.tree_map(lambda x, y: (x, y), a, a),
    "map to leaves": lambda m, a: m.tree_map(repr, a, is_leaf=is_pair),
    "map with path": lambda m, a: m.tree_map_with_path(lambda path, x: (path, x), a),
    "reduce": lambda m, a: m.tree_reduce(lambda total, x: f"{total},{x}", a, "start"),
    "reduce without a start": lambda m, a: m.tree_reduce(lambda total, x: f"{total},{x}", a),
}
MERGES = {
    "with a function": lambda m, a, b: m.tree_merge(a, b, lambda x, y: (x, y)),
    "without one": lambda m, a, b: m.tree_merge({"a": a}, {"b": b}),
    "of empty parts": lambda m, a, b: m.tree_merge({"a": a, "b": {}, "c": []}, {"a": {}, "b": b, "c": []}),
    "of unlike empty parts": lambda m, a, b: m.tree_merge({"a": {}}, {"a": []}),
    "of two leaves": lambda m, a, b: m.tree_merge({"a": a}, {"a": b}),
}


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=40, deadline=None)
@given(tree=TREES)
def test_like_mlx(name: str, tree) -> None:
    assert outcome(lambda: CALLS[name](nn, tree)) == outcome(lambda: CALLS[name](mlx.utils, tree))


@pytest.mark.parametrize("name", MERGES)
@settings(max_examples=40, deadline=None)
@given(a=WHOLE, b=WHOLE)
def test_merge_like_mlx(name: str, a, b) -> None:
    assert outcome(lambda: MERGES[name](nn, a, b)) == outcome(lambda: MERGES[name](mlx.utils, a, b))


@settings(max_examples=40, deadline=None)
@given(tree=WHOLE)
def test_what_is_flattened_comes_back(tree) -> None:
    by_numbers = any("7" in path.split(".") for path, _ in nn.tree_flatten(tree))
    assert by_numbers or nn.tree_unflatten(nn.tree_flatten(tree)) == tree

"""The module tree against mlx.nn's, and what is ours: swap, loading, errors that name what is wrong."""
import copy
import pickle

import mlx.core as mlx
import mlx.nn as theirs
import numpy as np
import pytest

from lazulite.engine import array as mx
from lazulite.engine import nn


def model(xp, library):
    """A tree with modules in attributes, lists and dicts, arrays in lists, private and constant things."""
    class Layer(library.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.heads, self.act = xp.ones((3,)), 2, abs
            self.proj = library.Linear(4, 3)
            self.tables = [xp.zeros((2,)), xp.zeros((5,))]
            self._cache = xp.zeros((7,))
            self.shape = (1, 2)

    class Model(library.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Layer(), Layer()]
            self.heads = {"a": library.Linear(3, 2, bias=False), "b": [library.LayerNorm(2)]}
            self.norm = library.BatchNorm(3)

    return Model()


def pair():
    return model(mx, nn), model(mlx, theirs)


def shape_of(tree):
    """Arrays by their shape, modules by their class: what both libraries can be compared by."""
    if isinstance(tree, nn.Module | theirs.Module):
        return type(tree).__name__
    if isinstance(tree, dict):
        return {k: shape_of(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [shape_of(v) for v in tree]
    return tuple(tree.shape) if hasattr(tree, "shape") else tree


def frozen(module):
    return {(path, key) for path, m in module.named_modules() for key in m._no_grad}


VIEWS = {
    "parameters": lambda m: m.parameters(),
    "trainable": lambda m: m.trainable_parameters(),
    "children": lambda m: m.children(),
    "leaf_modules": lambda m: m.leaf_modules(),
    "named_modules": lambda m: {path: type(module).__name__ for path, module in m.named_modules()},
    "modules": lambda m: sorted(type(module).__name__ for module in m.modules()),
    "items": lambda m: {k: shape_of(v) for k, v in m.layers[0].items()},
    "contains": lambda m: ["scale" in m.layers[0], "heads" in m.layers[0], "_cache" in m.layers[0]],
    "getitem": lambda m: m["layers"][1]["proj"]["weight"],
    "filter_and_map": lambda m: m.filter_and_map(
        lambda module, key, value: isinstance(value, dict | list) or key.startswith("w"),
        lambda v: v * 2 if hasattr(v, "shape") else v),
    "training": lambda m: [module.training for module in m.modules()],
}
EDITS = {
    "nothing": lambda m: m,
    "freeze": lambda m: m.freeze(),
    "freeze one": lambda m: m.layers[0].freeze(),
    "freeze keys": lambda m: m.freeze(keys=["weight", "tables"]),
    "freeze here": lambda m: m.layers[1].freeze(recurse=False),
    "freeze then unfreeze keys": lambda m: (m.freeze(), m.layers[0].unfreeze(keys="weight")),
    "freeze then unfreeze here": lambda m: (m.freeze(), m.layers[1].unfreeze(recurse=False)),
    "eval": lambda m: m.eval(),
    "eval then train": lambda m: (m.eval(), m.train()),
    "update_modules": lambda m: m.update_modules({"heads": {"a": m.norm}, "layers": [{}, {"proj": m.heads["b"][0]}]}),
    "update": lambda m: m.update({"layers": [{"scale": m.norm.weight}]}),
    "update past the tree": lambda m: m.update({"nobody": m.norm.weight, "layers": [{}, {}, {}]}, strict=False),
    "delete": lambda m: (delattr(m.layers[0], "scale"), delattr(m.layers[0], "heads")),
    "replace by a number": lambda m: setattr(m.layers[0], "scale", 3),
    "replace by an array": lambda m: setattr(m.layers[0], "heads", m.norm.weight),
    "apply_to_modules": lambda m: m.apply_to_modules(lambda path, module: setattr(module, "path", [path])),
}


@pytest.mark.parametrize("edit", EDITS)
def test_tree(edit: str) -> None:
    ours, other = pair()
    for module in (ours, other):
        EDITS[edit](module)
    for name, view in VIEWS.items():
        if edit == "delete" and name == "contains":
            continue
        assert shape_of(view(ours)) == shape_of(view(other)), name
    assert repr(ours) == repr(other)


@pytest.mark.parametrize(("edit", "error"), [
    (lambda m: m.update({"nobody": m.norm.weight}), ValueError),
    (lambda m: m.update({"layers": [{}, {}, {}]}), ValueError),
    (lambda m: m.update({"layers": {"0": {}}}), ValueError),
    (lambda m: m.update({"norm": {"weight": 3}}), ValueError),
    (lambda m: m.update_modules({"norm": m.norm.weight}), ValueError),
    (lambda m: m.update_modules({"nobody": m.norm}), ValueError),
    (lambda m: m.freeze(keys="nobody", strict=True), KeyError),
    (lambda m: m.nobody, AttributeError),
    (lambda m: setattr(m, "keys", m.norm), AttributeError),
])
def test_errors_are_theirs(edit, error: type) -> None:
    for module in pair():
        with pytest.raises(error):
            edit(module)


def test_set_dtype_and_apply() -> None:
    ours, _ = pair()
    ours.set_dtype(mx.float16)
    ours.apply(lambda x: x + 1, lambda module, key, value: key != "tables" and module.valid_parameter_filter(
        module, key, value))
    assert ours.layers[0].scale.dtype is mx.float16 and ours.layers[0].scale.tolist() == [2, 2, 2]
    assert ours.layers[0].tables[0].tolist() == [0, 0] and ours.layers[0]._cache.dtype is mx.float32


@pytest.mark.parametrize("name", ["model.npz", "model.safetensors"])
def test_weights_are_exchanged_with_mlx(name: str, tmp_path) -> None:
    ours, other = pair()
    ours.save_weights(tmp_path / name)
    other.load_weights(str(tmp_path / name))
    other.apply(lambda x: x + 1)
    other.save_weights(str(tmp_path / name))
    for (path, w), (_, v) in zip(ours.load_weights(tmp_path / name).named_parameters(),
                                 nn.tree_flatten(other.parameters()), strict=True):
        np.testing.assert_array_equal(np.asarray(w), np.array(v), err_msg=path)
    with pytest.raises(ValueError, match=r"ends in \.npz or \.safetensors"):
        ours.save_weights("model.bin")


@pytest.mark.parametrize(("weights", "message"), [
    ({}, "4 missing: layers.0.bias, layers.0.weight, layers.1.bias, layers.1.weight"),
    ({"layers.2.bias": (2,)}, "1 unexpected: layers.2.bias"),
    ({"layers.1.bias": (3,)}, r"1 of another shape: layers.1.bias \(3,\), wanted \(2,\)"),
])
def test_load_weights_names_what_is_wrong(weights: dict, message: str) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=message):
        net.load_weights([(name, mx.zeros(shape)) for name, shape in weights.items()])
    if "unexpected" in message:
        assert "layers.2.bias" not in dict(net.load_weights(
            [(name, mx.zeros(shape)) for name, shape in weights.items()], strict=False).named_parameters())


def test_load_weights_keeps_dtypes_and_buffers() -> None:
    weight = mx.zeros((2,), dtype=mx.float16)
    assert nn.RMSNorm(2).load_weights([("weight", weight)]).weight is weight


def test_swap_replaces_where_asked() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 2)))
    nn.swap(net, lambda path, module: nn.Linear(3, 5) if path == "layers.1.layers.0" else None)
    assert [w.shape for path, w in net.named_parameters() if "weight" in path] == [(3, 4), (5, 3)]


def test_copies_are_independent() -> None:
    ours, _ = pair()
    ours.freeze()
    twins = [copy.deepcopy(ours), pickle.loads(pickle.dumps(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))]
    assert frozen(twins[0]) == frozen(ours)
    twins[0].norm.unfreeze()
    twins[0].norm.weight = mx.zeros((3,))
    assert ours.norm.weight.tolist() == [1, 1, 1] and "weight" in ours.norm._no_grad
    assert twins[1](mx.ones((1, 2))).shape == (1, 2)


def test_modules_are_compared_by_identity() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert one == one and one != other and len({one, other}) == 2 and one.state is one


def test_loading_draws_nothing() -> None:
    with nn.loading():
        net = nn.Sequential(nn.Linear(4, 3), nn.Embedding(5, 2))
    with pytest.raises(ValueError, match="placeholder float32"):
        mx.eval(net.parameters())
    net.load_weights([(path, mx.ones(w.shape)) for path, w in net.named_parameters()])
    assert net.layers[0](mx.ones((4,))).tolist() == [5, 5, 5] and np.asarray(nn.Linear(4, 3).weight).std() > 0


def test_value_and_grad_leaves_the_model_as_it_was() -> None:
    net = nn.Linear(3, 2)
    net.freeze(keys="bias")
    before = net.weight
    value, gradient = nn.value_and_grad(net, lambda x, scale=1: (scale * net(x)).sum())(mx.ones((4, 3)), scale=2.0)
    assert net.weight is before and gradient.keys() == {"weight"}
    np.testing.assert_allclose(np.asarray(gradient["weight"]), np.full((2, 3), 8.0))
    np.testing.assert_allclose(value.item(), 2 * np.asarray(net(mx.ones((4, 3)))).sum(), rtol=1e-5)


def test_checkpoint_gives_the_same_gradient() -> None:
    net, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), mx.array(np.eye(3, dtype=np.float32))
    plain = nn.value_and_grad(net, lambda x: net(x).square().sum())(x)
    saved = nn.value_and_grad(net, lambda x: nn.checkpoint(net)(x).square().sum())(x)
    for (path, g), (_, h) in zip(nn.tree_flatten(list(plain)), nn.tree_flatten(list(saved)), strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(h), rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("predicate", [
    None, lambda path, m: hasattr(m, "to_quantized") and "0" in path,
    lambda path, m: {"group_size": 32, "bits": 8} if path == "layers.1" else False,
])
def test_quantize_chooses_what_mlx_chooses(predicate) -> None:
    nets = [lib.Sequential(lib.Embedding(4, 64), lib.Linear(64, 32), lib.LayerNorm(32)) for lib in (nn, theirs)]
    for lib, net in zip((nn, theirs), nets, strict=True):
        lib.quantize(net, group_size=64, bits=4, class_predicate=predicate)
    assert repr(nets[0]) == repr(nets[1])
    assert shape_of(nets[0].parameters()) == shape_of(nets[1].parameters())
    assert shape_of(nets[0].trainable_parameters()) == shape_of(nets[1].trainable_parameters())
    with pytest.raises(ValueError, match="LayerNorm has no quantized twin"):
        nn.quantize(nets[0], class_predicate=lambda path, m: path == "layers.2")

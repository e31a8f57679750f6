"""A model is a tree of modules, and an attribute path is a weight's name: `model.layers.0.self_attn.q_proj.weight`."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .. import array as mx


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def tree_flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested dicts, lists and tuples with their dotted paths."""
    if isinstance(tree, dict):
        items: Iterable[tuple[Any, Any]] = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return [(prefix, tree)]
    return [leaf for name, value in items for leaf in tree_flatten(value, join(prefix, str(name)))]


def tree_unflatten(leaves: Iterable[tuple[str, Any]]) -> Any:
    """The nested dicts that `tree_flatten` took apart; levels whose names are 0, 1, 2, … become lists."""
    root: dict[str, Any] = {}
    for path, value in leaves:
        *above, last = path.split(".")
        level = root
        for name in above:
            level = level.setdefault(name, {})
        level[last] = value
    return _lists(root)


def _lists(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    tree = {name: _lists(value) for name, value in tree.items()}
    return list(tree.values()) if tree and list(tree) == [str(i) for i in range(len(tree))] else tree


class Module:
    """Base of all layers. Attributes are the tree: arrays are weights, modules and lists of modules are children.

    A name with a leading underscore is neither: constants that no checkpoint holds.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"[{type(self).__name__}] has no __call__")

    def children(self) -> Iterator[tuple[str, Module]]:
        """Modules one level down with their names; a list `layers` gives `layers.0`, `layers.1`, …"""
        for name, value in vars(self).items():
            items = [(name, value)]
            if isinstance(value, list):
                items = [(f"{name}.{i}", item) for i, item in enumerate(value)]
            yield from ((path, item) for path, item in items if isinstance(item, Module) and not name.startswith("_"))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it with their paths, parents first."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(join(prefix, name))

    def named_parameters(self) -> Iterator[tuple[str, mx.Array]]:
        for path, module, name in self._slots():
            yield path, getattr(module, name)

    def parameters(self) -> Any:
        """The weights as nested dicts and lists, shaped as the tree."""
        return tree_unflatten(self.named_parameters())

    def update(self, parameters: Any) -> Module:
        """Replaces the weights named in a (partial) tree of parameters. Returns itself."""
        return self.load_weights(tree_flatten(parameters), strict=False)

    def load_weights(self, weights: Iterable[tuple[str, mx.Array]], strict: bool = True) -> Module:
        """Takes over named weights without copying them; dtypes stay as they come. Returns itself.

        Raises ValueError naming what is missing (if strict), unexpected, or of another shape than the model's.
        """
        slots = {path: (module, name) for path, module, name in self._slots()}
        given = dict(weights)
        pairs = [(path, given[path].shape, getattr(*slot).shape) for path, slot in slots.items() if path in given]
        unlike = [f"{path} {found}, wanted {wanted}" for path, found, wanted in pairs if found != wanted]
        problems = [
            _named("missing", slots.keys() - given.keys()) if strict else "",
            _named("unexpected", given.keys() - slots.keys()),
            _named("of another shape", unlike),
        ]
        if any(problems):
            raise ValueError(f"[load_weights] {'; '.join(filter(None, problems))}")
        for path, array in given.items():
            setattr(*slots[path], array)
        return self

    def _slots(self) -> Iterator[tuple[str, Module, str]]:
        """Every weight's path, the module that holds it, and its name there."""
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, mx.Array) and not name.startswith("_"):
                    yield join(prefix, name), module, name


def _named(what: str, names: Iterable[str], most: int = 4) -> str:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {what}: {', '.join(names[:most])}{more}" if names else ""


def swap(model: Module, fn: Callable[[str, Module], Module | None], prefix: str = "") -> Module:
    """Edits a tree in place: where `fn(path, module)` returns a module, that one takes the place. Returns the model."""
    for name, child in list(model.children()):
        new = fn(join(prefix, name), child)
        attribute, _, index = name.partition(".")
        if new is None:
            swap(child, fn, join(prefix, name))
        elif index:
            getattr(model, attribute)[int(index)] = new
        else:
            setattr(model, attribute, new)
    return model

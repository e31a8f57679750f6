"""A model is a tree of modules, and an attribute path is a weight's name: `model.layers.0.self_attn.q_proj.weight`."""
from __future__ import annotations

import functools
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

from .. import array as mx
from ..array.trees import tree_flatten, tree_unflatten

Filter = Callable[["Module", str, Any], bool]
BRANCH = (dict, list)                   # containers of the tree: modules are dicts
PARAMETER = (mx.Array, *BRANCH)
HELD = (*PARAMETER, tuple)    # what a module holds as an item


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


class Module(dict[str, Any]):
    """Base of all layers. Attributes are the tree: arrays are parameters, modules are children, in any nesting of
    lists and dicts. As in MLX they are the items of the module too, while numbers, functions, … are attributes only.

    A name with a leading underscore is no parameter: constants that no checkpoint holds.
    """

    _constant: frozenset[str] = frozenset()  # parameters that are always frozen
    _no_grad: set[str]
    _training: bool

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        vars(self).update(_no_grad=set(cls._constant), _training=True)
        return self

    def __init__(self) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"[{type(self).__name__}] has no __call__")

    __eq__, __ne__, __hash__ = object.__eq__, object.__ne__, object.__hash__  # type: ignore[assignment]

    # attributes are items

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"[{type(self).__name__}] has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, HELD):
            if hasattr(type(self), name):
                raise AttributeError(f"[{type(self).__name__}] {name!r} is taken: an attribute of the class")
            vars(self).pop(name, None)
            self[name] = value
        else:
            super().__setattr__(name, value)
            self.pop(name, None)

    def __delattr__(self, name: str) -> None:
        if self.pop(name, None) is None:
            super().__delattr__(name)

    def _extra_repr(self) -> str:
        return ""

    def __repr__(self) -> str:
        children = tree_flatten(self.children(), is_leaf=self.is_module)
        lines = [textwrap.indent(f"({path}): {child!r}", "  ") for path, child in children]
        body = "".join(f"\n{line}" for line in lines)
        return f"{type(self).__name__}({self._extra_repr()}{body}" + ("\n)" if lines else ")")

    # the tree

    @staticmethod
    def is_module(value: Any) -> bool:
        return isinstance(value, Module)

    @staticmethod
    def valid_child_filter(module: Module, key: str, value: Any) -> bool:
        return isinstance(value, BRANCH)

    @staticmethod
    def valid_parameter_filter(module: Module, key: str, value: Any) -> bool:
        return isinstance(value, PARAMETER) and not key.startswith("_")

    @staticmethod
    def trainable_parameter_filter(module: Module, key: str, value: Any) -> bool:
        return Module.valid_parameter_filter(module, key, value) and key not in module._no_grad

    def filter_and_map(
        self, filter_fn: Filter, map_fn: Callable[[Any], Any] | None = None, is_leaf_fn: Filter | None = None
    ) -> dict[str, Any]:
        """What `filter_fn(module, key, value)` keeps, as nested dicts and lists, its leaves through `map_fn`."""
        def walk(module: Module, key: str, value: Any) -> Any:
            if not isinstance(value, BRANCH) if is_leaf_fn is None else is_leaf_fn(module, key, value):
                return value if map_fn is None else map_fn(value)
            if isinstance(value, Module):
                return contents(value)
            items = value.items() if isinstance(value, dict) else enumerate(value)
            paths = {k: (f"{key}.{k}", v) for k, v in items}
            kept = {k: walk(module, *pair) if filter_fn(module, *pair) else {} for k, pair in paths.items()}
            return kept if isinstance(value, dict) else list(kept.values())

        def contents(module: Module) -> dict[str, Any]:
            return {k: walk(module, k, v) for k, v in module.items() if filter_fn(module, k, v)}

        return contents(self)

    def parameters(self) -> dict[str, Any]:
        """All arrays of the tree as nested dicts and lists."""
        return self.filter_and_map(self.valid_parameter_filter)

    def trainable_parameters(self) -> dict[str, Any]:
        """`parameters` without the frozen ones."""
        return self.filter_and_map(self.trainable_parameter_filter)

    def named_parameters(self) -> list[tuple[str, mx.Array]]:
        """`parameters` with their paths."""
        return [(path, leaf) for path, leaf in tree_flatten(self.parameters()) if isinstance(leaf, mx.Array)]

    def children(self) -> dict[str, Any]:
        """The modules one level down, in their lists and dicts."""
        return self.filter_and_map(self.valid_child_filter, is_leaf_fn=lambda _, key, value: self.is_module(value))

    def leaf_modules(self) -> dict[str, Any]:
        """The modules of the tree that hold no others."""
        def is_leaf(_: Module, key: str, value: Any) -> bool:
            return isinstance(value, Module) and not tree_flatten(value.children())

        return self.filter_and_map(self.valid_child_filter, is_leaf_fn=is_leaf)

    def _visit(self, path: str = "") -> Iterator[tuple[str, Module]]:
        yield path, self
        for name, child in tree_flatten(self.children(), is_leaf=self.is_module):
            yield from child._visit(join(path, name))

    def named_modules(self) -> list[tuple[str, Module]]:
        """This module and all below it with their paths, parents first."""
        return list(self._visit())

    def modules(self) -> list[Module]:
        """This module and all below it, parents first."""
        return [module for _, module in self._visit()]

    def apply_to_modules(self, apply_fn: Callable[[str, Module], Any]) -> Module:
        """Calls apply_fn(path, module) on this module and all below it. Returns itself."""
        for path, module in self._visit():
            apply_fn(path, module)
        return self

    @property
    def state(self) -> Module:
        """The module itself as a tree of all it holds, for `mx.compile` and `mx.eval`: what is put in is used."""
        return self

    # changing it

    def update(self, parameters: Any, strict: bool = True) -> Module:  # type: ignore[override]
        """Puts arrays in the places that a (partial) tree of parameters names. Returns itself.

        Raises ValueError if the tree names a place that is not there (if strict) or holds something else there.
        """
        _graft("update", self, parameters, mx.Array, strict)
        return self

    def update_modules(self, modules: Any, strict: bool = True) -> Module:
        """Puts modules in the place of others, as `update` does with arrays."""
        _graft("update_modules", self, modules, Module, strict)
        return self

    def apply(self, map_fn: Callable[[mx.Array], mx.Array], filter_fn: Filter | None = None) -> Module:
        """Replaces every parameter (that the filter keeps) by map_fn of it. Returns itself."""
        return self.update(self.filter_and_map(filter_fn or self.valid_parameter_filter, map_fn))

    def set_dtype(
        self, dtype: mx.Dtype, predicate: Callable[[mx.Dtype], bool] | None = lambda dtype: dtype.kind == "f"
    ) -> None:
        """Casts the parameters whose dtype the predicate accepts (None: all)."""
        self.apply(lambda x: x.astype(dtype) if predicate is None or predicate(x.dtype) else x)

    # weights

    def load_weights(
        self, file_or_weights: str | os.PathLike[str] | Iterable[tuple[str, mx.Array]], strict: bool = True
    ) -> Module:
        """Takes over weights by their paths, without copying them, from pairs or a .npz or .safetensors file; dtypes
        stay as they come. Returns itself.

        If not strict, what the model lacks is passed over and shapes are not compared. Otherwise raises ValueError
        that names what is missing, unexpected, or of another shape than the model's.
        """
        named = isinstance(file_or_weights, str | os.PathLike)
        given: dict[str, mx.Array] = dict(mx.load(file_or_weights) if named else file_or_weights)  # type: ignore
        if strict:
            _compare(given, dict(self.named_parameters()))
        return self.update(tree_unflatten(given), strict=False)

    def save_weights(self, file: str | os.PathLike[str]) -> None:
        """Writes the parameters by their paths to a .npz or .safetensors file."""
        file, weights = os.fspath(file), dict(self.named_parameters())
        if file.endswith(".npz"):
            mx.savez(file, **weights)
        elif file.endswith(".safetensors"):
            mx.save_safetensors(file, weights)
        else:
            raise ValueError(f"[save_weights] {file}: a name that ends in .npz or .safetensors wanted")

    # training

    @property
    def training(self) -> bool:
        """Whether dropout drops and batch norm learns its statistics."""
        return self._training

    def _set_training_mode(self, mode: bool) -> None:
        self._training = mode

    def train(self, mode: bool = True) -> Module:
        return self.apply_to_modules(lambda _, module: module._set_training_mode(mode))

    def eval(self) -> Module:
        return self.train(False)

    def freeze(self, *, recurse: bool = True, keys: str | list[str] | None = None, strict: bool = False) -> Module:
        """Takes parameters (all, or those named `keys`) out of `trainable_parameters`, of all modules below if recurse.

        Raises KeyError, if strict, when no module has such a key.
        """
        for module in self._chosen(recurse, keys, strict):
            own = module.filter_and_map(lambda m, k, v: m.valid_parameter_filter(m, k, v) and not m.is_module(v))
            module._no_grad |= {path for path, _ in tree_flatten(own)} if keys is None else set(_listed(keys))
        return self

    def unfreeze(self, *, recurse: bool = True, keys: str | list[str] | None = None, strict: bool = False) -> Module:
        """Undoes `freeze`."""
        for module in self._chosen(recurse, keys, strict):
            module._no_grad -= set(module._no_grad if keys is None else _listed(keys)) - module._constant
        return self

    def _chosen(self, recurse: bool, keys: str | list[str] | None, strict: bool) -> list[Module]:
        modules = self.modules() if recurse else [self]
        for key in _listed(keys or []) if strict else []:
            if not any(key in module for module in modules):
                raise KeyError(f"[{type(self).__name__}] has no member {key!r}")
        return modules


def _listed(keys: str | list[str]) -> list[str]:
    return [keys] if isinstance(keys, str) else keys


def _graft(name: str, target: Any, tree: Any, kind: type, strict: bool, path: str = "") -> None:
    """Puts the leaves of `tree`, of the given kind, in the place of those of `target`."""
    for key, new in tree.items() if isinstance(tree, dict) else enumerate(tree):
        here = join(path, str(key))
        if not (key in target if isinstance(target, dict) else isinstance(key, int) and key < len(target)):
            if strict:
                raise ValueError(f"[{name}] there is no {here}")
        elif isinstance(target[key], kind) and isinstance(new, kind):
            target[key] = new
        elif isinstance(target[key], BRANCH) and isinstance(new, BRANCH):
            _graft(name, target[key], new, kind, strict, here)
        elif not (isinstance(new, dict) and not new):
            raise ValueError(f"[{name}] {here} is a {type(target[key]).__name__}, given a {type(new).__name__}")


def _compare(given: dict[str, mx.Array], own: dict[str, mx.Array]) -> None:
    pairs = [(path, given[path].shape, own[path].shape) for path in own.keys() & given.keys()]
    problems = [
        _named("missing", own.keys() - given.keys()),
        _named("unexpected", given.keys() - own.keys()),
        _named("of another shape", [f"{path} {found}, wanted {wanted}" for path, found, wanted in pairs
                                    if found != wanted]),
    ]
    if any(problems):
        raise ValueError(f"[load_weights] {'; '.join(filter(None, problems))}")


def _named(what: str, names: Iterable[str], most: int = 4) -> str:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {what}: {', '.join(names[:most])}{more}" if names else ""


def swap(model: Module, fn: Callable[[str, Module], Module | None], prefix: str = "") -> Module:
    """Edits a tree in place: where `fn(path, module)` returns a module, that one takes the place. Returns the model."""
    children = tree_flatten(model.children(), is_leaf=Module.is_module)
    chosen = {name: fn(join(prefix, name), child) for name, child in children}
    for name, child in children:
        if chosen[name] is None:
            swap(child, fn, join(prefix, name))
    return model.update_modules(tree_unflatten({name: new for name, new in chosen.items() if new is not None}))


# functions of a model's parameters

def value_and_grad(model: Module, fn: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """fn's value and its gradient with respect to the trainable parameters of the model: (*args) -> (value, tree)."""
    graded = mx.value_and_grad(_with_parameters(model, fn))
    return functools.wraps(fn)(lambda *args, **kwargs: _kept(model, graded, args, kwargs))


def checkpoint(module: Module, fn: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """fn (or the module) whose intermediate arrays are computed again for the gradient and not kept."""
    fn = module if fn is None else fn
    saved = mx.checkpoint(_with_parameters(module, fn))
    return functools.wraps(fn)(lambda *args, **kwargs: _kept(module, saved, args, kwargs))


def _with_parameters(module: Module, fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        module.update(parameters)
        return fn(*args, **kwargs)

    return call


def _kept(module: Module, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """fn of the trainable parameters; tracers that it leaves in the module are taken out again."""
    parameters = module.trainable_parameters()
    try:
        return fn(parameters, *args, **kwargs)
    finally:
        module.update(parameters)

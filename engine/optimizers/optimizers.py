"""Optimizers. One is two functions of a parameter: `init_single` makes its state, `apply_single` its next value.

A learning rate is a number, or a schedule: a function of the step. State is arrays only, so that `mx.compile` can
take it in and give it back: `mx.compile(step, inputs=[model.state, optimizer.state], outputs=…)`.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import array as mx
from ..array.trees import tree_flatten, tree_map, tree_merge, tree_reduce, tree_unflatten
from .schedules import Schedule

__all__ = [
    "SGD", "AdaDelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Lion", "MultiOptimizer", "Muon",
    "Optimizer", "RMSprop", "clip_grad_norm",
]
State = dict[str, Any]
Rate = float | mx.Array | Schedule


class Optimizer:
    """Base of all. `slots` names the arrays, zeros at first, that it keeps for each parameter.

    `state` has the shape of the parameters, with a dict of slots for each, beside "step" and the scheduled numbers.
    """

    slots: tuple[str, ...] = ()

    def __init__(self, schedulers: dict[str, Schedule] | None = None):
        self._state: State = {"step": mx.array(0, mx.uint64)}
        self._initialized, self._schedulers = False, dict(schedulers or {})

    def init(self, parameters: Any) -> None:
        """Makes the state of the parameters that have none."""
        def grow(tree: Any, state: Any) -> Any:
            if isinstance(tree, dict):
                state.update({key: grow(branch, state.get(key, {})) for key, branch in tree.items()})
            elif isinstance(tree, list | tuple):
                found = [*state, *({} for _ in tree[len(state):])]
                return type(tree)([*map(grow, tree, found), *found[len(tree):]])
            elif not state:
                self.init_single(tree, state)
            return state

        grow(parameters, self._state)
        self._initialized = True

    def init_single(self, parameter: mx.Array, state: State) -> None:
        """Fills the state of one parameter."""
        state.update({name: mx.zeros_like(parameter) for name in self.slots})

    def apply_single(self, gradient: mx.Array, parameter: mx.Array, state: State) -> mx.Array:
        """The next value of one parameter; its state is changed in place."""
        raise NotImplementedError(f"[{type(self).__name__}] has no apply_single")

    def update(self, model: Any, gradients: Any) -> None:
        """Moves the parameters of a model that the tree of gradients names."""
        model.update(self.apply_gradients(gradients, model))

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """The next values of the parameters (or of a part of them, where there are gradients), a tree."""
        if not self._initialized:
            self.init(gradients)
        for name, schedule in self._schedulers.items():
            self._state[name] = schedule(self.step)
        self._state["step"] = self.step + 1
        return tree_map(self.apply_single, gradients, parameters, self._state)

    @property
    def state(self) -> State:
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._initialized, self._state = False, state

    @property
    def step(self) -> mx.Array:
        """How many updates there were."""
        return self.state["step"]

    @property
    def learning_rate(self) -> mx.Array:
        return self.state["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.Array) -> None:
        self.state["learning_rate"] = mx.array(learning_rate)

    def _maybe_schedule(self, name: str, value: Rate) -> None:
        if callable(value):
            self._schedulers[name] = value
        self.state[name] = value(self.step) if callable(value) else mx.array(value)

    def _rate(self, like: mx.Array) -> mx.Array:
        return self.learning_rate.astype(like.dtype)

    def _check(self, **rules: tuple[Any, bool, str]) -> None:
        for name, (value, holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"[{type(self).__name__}] {name} is {value}: {rule} wanted")


def _mix(old: mx.Array, new: mx.Array, kept: float | mx.Array) -> mx.Array:
    """A moving average: kept · old + (1 − kept) · new"""
    return kept * old + (1 - kept) * new


class SGD(Optimizer):
    """v = momentum · v + (1 − dampening) g, w −= lr · v; nesterov: w −= lr · (g + momentum · v)"""

    slots = ("v",)

    def __init__(
        self, learning_rate: Rate, momentum: float = 0.0, weight_decay: float = 0.0, dampening: float = 0.0,
        nesterov: bool = False,
    ):
        super().__init__()
        self._check(nesterov=(nesterov, not nesterov or (momentum > 0 and dampening == 0),
                              "a momentum without dampening"))
        self._maybe_schedule("learning_rate", learning_rate)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.dampening, self.nesterov = dampening, nesterov

    def apply_single(self, gradient: mx.Array, parameter: mx.Array, state: State) -> mx.Array:
        if self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        if self.momentum > 0:
            state["v"] = v = self.momentum * state["v"] + (1 - self.dampening) * gradient
            gradient = gradient + self.momentum * v if self.nesterov else v
        return parameter - self._rate(gradient) * gradient


class RMSprop(Optimizer):
    """v = α v + (1 − α) g², w −= lr · g / (√v + eps), Tieleman and Hinton 2012"""

    slots = ("v",)

    def __init__(self, learning_rate: Rate, alpha: float = 0.99, eps: float = 1e-8):
        super().__init__()
        self._check(alpha=(alpha, alpha >= 0, "at least 0"), eps=(eps, eps > 0, "more than 0"))
        self._maybe_schedule("learning_rate", learning_rate)
        self.alpha, self.eps = alpha, eps

    def apply_single(self, gradient: mx.Array, parameter: mx.Array, state: State) -> mx.Array:
        state["v"] = v = _mix(state["v"], mx.square(gradient), self.alpha)
        return parameter - self._rate(gradient) * gradient / (mx.sqrt(v) + self.eps)


class Adagrad(Optimizer):
    """v += g², w −= lr · g / (√v + eps), Duchi et al. 2011"""

    slots = ("v",)

    def __init__(self, learning_rate: Rate, eps: float = 1e-8):
        super().__init__()
        self._check(eps=(eps, eps > 0, "more than 0"))
        self._maybe_schedule("learning_rate", learning_rate)
        self.eps = eps

    def apply_single(self, gradient: mx.Array, parameter: mx.Array, state: State) -> mx.Array:
        state["v"] = v = state["v"] + mx.square(gradient)
        return parameter - self._rate(gradient) * gradient / (mx.sqrt(v) + self.eps)


class AdaDelta(Optimizer):
    """v = ρ v + (1 − ρ) g², d = √(u + eps) / √(v + eps) · g, u = ρ u + (1 − ρ) d², w −= lr · d, Zeiler 2012"""

    slots = ("v", "u")

    def __init__(self, learning_rate: Rate, rho: float = 0.9, eps: float = 1e-6):
        super().__init__()
        self._check(rho=(rho, rho >= 0, "at least 0"), eps=(eps, eps > 0, "more than 0"))
        self._maybe_schedule("learning_rate", learning_rate)
        self.rho, self.eps = rho, eps

    def apply_single(self, gradient: mx.Array, parameter: mx.Array, state: State) -> mx.Array:
        state["v"] = v = _mix(state["v"], mx.square(gradient), self.rho)
        step = mx.sqrt(state["u"] + self.eps) / mx.sqrt(v + self.eps) * gradient
        state["u"] = _mix(state["u"], mx.square(step), self.rho)
        return parameter - self._rate(gradient) * step


class _Betas(Optimizer):
    """Optimizers with the decay rates of two moving averages."""

    def __init__(self, learning_rate: Rate, betas: Sequence[float]):
        super().__init__()
        self._check(betas=(betas, all(0 <= beta < 1 for beta in betas), "at least 0 and below 1"))
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas = betas


class Adam(_Betas):
    """m = β₁ m + (1 − β₁) g, v = β₂ v + (1 − β₂) g², w −= lr · m / (√v + eps), Kingma and Ba 2015

    bias_correction: m and v are divided by 1 − β^step first.
    """

    slots = ("m", "v")

    def __init__(
        self, learning_rate: Rate, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8,
        bias_correction: bool = False,
    ):
        super().__init__(learning_rate, betas)
        self._check(eps=(eps, eps >= 0, "at least 0"))
        self.eps, self.bias_correction = eps, bias_correction

    def apply_single(self, gradient: mx.Array, parameter: mx.Array, state: State) -> mx.Array:
        (b1, b2), rate = self.betas, self._rate(gradient)
        state["m"] = m = _mix(state["m"], gradient, b1)
        state["v"] = v = _mix(state["v"], mx.square(gradient), b2)
        if not self.bias_correction:
            return parameter - rate * m / (mx.sqrt(v) + self.eps)
        first = (rate / (1 - b1**self.step)).astype(gradient.dtype)
        second = mx.rsqrt(1 - b2**self.step).astype(gradient.dtype)
        return parameter - first * m / (mx.sqrt(v) * second + self.eps)


class AdamW(Adam):
    """Adam after w −= lr · weight_decay · w, Loshchilov and Hutter 2019"""

    def __init__(
        self, learning_rate: Rate, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01, bias_correction: bool = False,
    ):
        super().__init__(learning_rate, betas, eps, bias_correction)
        self.weight_decay = weight_decay

    def apply_single(self, gradient: mx.Array, parameter: mx.Array, state: State) -> mx.Array:
        decayed = parameter * (1 - self._rate(gradient) * self.weight_decay)
        return super().apply_single(gradient, decayed, state)


class Adamax(Adam):
    """Adam with v = max(β₂ v, |g|) and w −= lr · m / (v + eps)"""

    def __init__(self, learning_rate: Rate, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(learning_rate, betas, eps)

    def apply_single(self, gradient: mx.Array, parameter: mx.Array, state: State) -> mx.Array:
        state["m"] = m = _mix(state["m"], gradient, self.betas[0])
        state["v"] = v = mx.maximum(self.betas[1] * state["v"], mx.abs(gradient))
        return parameter - self._rate(gradient) * m / (v + self.eps)


class Lion(_Betas):
    """w −= lr · (sign(β₁ m + (1 − β₁) g) + weight_decay · w), m = β₂ m + (1 − β₂) g, Chen et al. 2023"""

    slots = ("m",)

    def __init__(self, learning_rate: Rate, betas: Sequence[float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(learning_rate, betas)
        self.weight_decay = weight_decay

    def apply_single(self, gradient: mx.Array, parameter: mx.Array, state: State) -> mx.Array:
        (b1, b2), m, rate = self.betas, state["m"], self._rate(gradient)
        state["m"] = _mix(m, gradient, b2)
        if self.weight_decay:
            parameter = (1 - rate * self.weight_decay) * parameter
        return parameter - rate * mx.sign(_mix(m, gradient, b1))


class Adafactor(Optimizer):
    """Adam whose second moments of a matrix are kept as their row and column means, Shazeer and Stern 2018

    Without a learning_rate, relative_step takes 1 / √step, at most 0.01 (warmup_init: at most step · 1e-6).
    scale_parameter: steps are relative to the parameter's rms, eps[1] at least. Updates are clipped to an rms of
    clip_threshold. beta_1: a first moment is kept too.
    """

    def __init__(
        self, learning_rate: Rate | None = None, eps: tuple[float, float] = (1e-30, 1e-3), clip_threshold: float = 1.0,
        decay_rate: float = -0.8, beta_1: float | None = None, weight_decay: float = 0.0, scale_parameter: bool = True,
        relative_step: bool = True, warmup_init: bool = False,
    ):
        super().__init__()
        if learning_rate is not None:
            self._maybe_schedule("learning_rate", learning_rate)
        self.eps, self.clip_threshold, self.decay_rate, self.beta_1 = eps, clip_threshold, decay_rate, beta_1
        self.weight_decay, self.scale_parameter = weight_decay, scale_parameter
        self.relative_step, self.warmup_init = relative_step, warmup_init

    def init_single(self, parameter: mx.Array, state: State) -> None:
        shape = parameter.shape
        shapes = {"exp_avg_sq": shape} if parameter.ndim < 2 else {
            "exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
        if self.beta_1 is not None:
            shapes["exp_avg"] = shape
        state.update({name: mx.zeros(size, parameter.dtype) for name, size in shapes.items()})

    def _step_size(self, parameter: mx.Array) -> mx.Array:
        if self.relative_step:
            size = mx.minimum(1e-6 * self.step if self.warmup_init else 0.01, mx.rsqrt(self.step))
        else:
            size = self.learning_rate
        size = size.astype(parameter.dtype)
        return mx.maximum(self.eps[1], _rms(parameter)) * size if self.scale_parameter else size

    def _scale(self, squares: mx.Array, state: State) -> mx.Array:
        """1 / √(the moving average of the squares)"""
        kept = 1 - (self.step**self.decay_rate).astype(squares.dtype)
        if squares.ndim < 2:
            state["exp_avg_sq"] = average = _mix(state["exp_avg_sq"], squares, kept)
            return mx.rsqrt(average)
        state["exp_avg_sq_row"] = row = _mix(state["exp_avg_sq_row"], mx.mean(squares, -1), kept)
        state["exp_avg_sq_col"] = column = _mix(state["exp_avg_sq_col"], mx.mean(squares, -2), kept)
        row = mx.rsqrt(row / mx.mean(row, -1, keepdims=True))
        return mx.expand_dims(row, -1) * mx.expand_dims(mx.rsqrt(column), -2)

    def apply_single(self, gradient: mx.Array, parameter: mx.Array, state: State) -> mx.Array:
        size = self._step_size(parameter)
        update = self._scale(mx.square(gradient) + self.eps[0], state) * gradient
        update = size * update / mx.maximum(1.0, _rms(update) / self.clip_threshold)
        if self.beta_1 is not None:
            state["exp_avg"] = update = _mix(state["exp_avg"], update, self.beta_1)
        if self.weight_decay:
            parameter = parameter - self.weight_decay * size * parameter
        return parameter - update


def _rms(x: mx.Array) -> mx.Array:
    return mx.sqrt(mx.mean(mx.square(x)))


class Muon(Optimizer):
    """SGD with momentum whose update of a matrix is made nearly orthogonal, kellerjordan.github.io/posts/muon

    ns_steps: of Newton and Schulz's iteration. Use another optimizer for embeddings, heads and vectors.
    """

    slots = ("v",)

    def __init__(
        self, learning_rate: Rate, momentum: float = 0.95, weight_decay: float = 0.01, nesterov: bool = True,
        ns_steps: int = 5,
    ):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.momentum, self.weight_decay, self.nesterov, self.ns_steps = momentum, weight_decay, nesterov, ns_steps

    def _orthogonal(self, x: mx.Array) -> mx.Array:
        """x (M, N) with singular values near 1."""
        a, b, c = 3.4445, -4.7750, 2.0315
        if x.shape[0] > x.shape[1]:
            return self._orthogonal(x.T).T
        x = x / (mx.sqrt(mx.sum(mx.square(x))) + 1e-7)
        for _ in range(self.ns_steps):
            product = x @ x.T
            x = a * x + (b * product + c * (product @ product)) @ x
        return x

    def apply_single(self, gradient: mx.Array, parameter: mx.Array, state: State) -> mx.Array:
        if self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        state["v"] = update = _mix(state["v"], gradient, self.momentum)
        if self.nesterov:
            update = _mix(update, gradient, self.momentum)
        rate = self._rate(gradient)
        if update.ndim >= 2:
            update = self._orthogonal(update.reshape(update.shape[0], -1)).reshape(update.shape)
            rate = rate * max(1, update.shape[-2] / update.shape[-1]) ** 0.5
        return parameter - rate * update


class MultiOptimizer(Optimizer):
    """Several optimizers: a parameter goes to the first whose filter(path, gradient) accepts it, the last has none."""

    def __init__(self, optimizers: list[Optimizer], filters: Sequence[Callable[[str, mx.Array], bool]] = ()):
        if len(filters) != len(optimizers) - 1:
            raise ValueError(f"[MultiOptimizer] {len(optimizers)} optimizers, {len(filters)} filters: one less wanted")
        self.optimizers, self.filters = optimizers, [*filters, lambda path, gradient: True]

    def _split(self, tree: Any) -> list[Any]:
        parts: list[list[tuple[str, Any]]] = [[] for _ in self.optimizers]
        for path, leaf in tree_flatten(tree):
            parts[next(i for i, accepts in enumerate(self.filters) if accepts(path, leaf))].append((path, leaf))
        return [tree_unflatten(part) if part else {} for part in parts]

    def init(self, parameters: Any) -> None:
        for optimizer, part in zip(self.optimizers, self._split(parameters), strict=True):
            optimizer.init(part)

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        tree: Any = {}
        for optimizer, part in zip(self.optimizers, self._split(gradients), strict=True):
            tree = tree_merge(tree, optimizer.apply_gradients(part, parameters))
        return tree

    @property
    def state(self) -> State:
        return {"states": [optimizer.state for optimizer in self.optimizers]}

    @state.setter
    def state(self, state: State) -> None:
        if len(state.get("states", ())) != len(self.optimizers):
            raise ValueError(f"[MultiOptimizer] state {list(state)}: 'states', one for each optimizer, wanted")
        for optimizer, part in zip(self.optimizers, state["states"], strict=True):
            optimizer.state = part

    @property
    def learning_rate(self) -> mx.Array:
        return self.optimizers[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.Array) -> None:
        for optimizer in self.optimizers:
            optimizer.learning_rate = learning_rate


def clip_grad_norm(grads: Any, max_norm: float) -> tuple[Any, mx.Array]:
    """The gradients times min(max_norm / norm, 1), and their norm over the whole tree."""
    if max_norm < 0:
        raise ValueError(f"[clip_grad_norm] max_norm is {max_norm}: at least 0 wanted")

    def squares(total: Any, g: mx.Array) -> Any:
        return total + mx.sum(mx.square(g.astype(mx.float32) if g.dtype == mx.float16 else g))

    norm = mx.sqrt(tree_reduce(squares, grads, 0.0))
    scale = mx.minimum(max_norm / (norm + 1e-6), 1.0)
    return tree_map(lambda g: (g * scale).astype(g.dtype), grads), norm

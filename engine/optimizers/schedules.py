"""Learning rate schedules: functions of the step, an array that counts updates from 0."""
from __future__ import annotations

import math
from collections.abc import Callable

from .. import array as mx

__all__ = ["cosine_decay", "exponential_decay", "join_schedules", "linear_schedule", "step_decay"]
Schedule = Callable[[mx.Array], mx.Array]


def _positive(name: str, **steps: int) -> None:
    for argument, value in steps.items():
        if value < 1:
            raise ValueError(f"[{name}] {argument} is {value}: at least 1 wanted")


def exponential_decay(init: float, decay_rate: float) -> Schedule:
    """init · decay_rate^step"""
    return lambda step: init * decay_rate**step


def step_decay(init: float, decay_rate: float, step_size: int) -> Schedule:
    """init · decay_rate^⌊step / step_size⌋"""
    _positive("step_decay", step_size=step_size)
    return lambda step: init * decay_rate ** (step // step_size)


def cosine_decay(init: float, decay_steps: int, end: float = 0.0) -> Schedule:
    """Half a cosine from init to end in decay_steps, then end."""
    _positive("cosine_decay", decay_steps=decay_steps)
    turn = math.pi / decay_steps
    return lambda step: end + 0.5 * (init - end) * (1 + mx.cos(turn * mx.minimum(step, decay_steps)))


def linear_schedule(init: float, end: float, steps: int) -> Schedule:
    """A line from init to end in `steps`, then end."""
    _positive("linear_schedule", steps=steps)
    return lambda step: mx.minimum(step, steps) * ((end - init) / steps) + init


def join_schedules(schedules: list[Schedule], boundaries: list[int]) -> Schedule:
    """The first schedule up to the first boundary, then the next, which counts from there, …"""
    if len(schedules) != len(boundaries) + 1:
        raise ValueError(f"[join_schedules] {len(schedules)} schedules, {len(boundaries)} boundaries: one less wanted")

    def schedule(step: mx.Array) -> mx.Array:
        value = schedules[0](step)
        for boundary, after in zip(boundaries, schedules[1:], strict=True):
            value = mx.where(step < boundary, value, after(step - boundary))
        return value

    return schedule

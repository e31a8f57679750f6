"""Optimizers, learning rate schedules and gradient clipping, with MLX's names."""
# ruff: noqa: F403
from .optimizers import *
from .schedules import *

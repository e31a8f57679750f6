"""Lazy arrays with MLX's names: `from lazulite.engine import array as mx`."""
# ruff: noqa: F401, F403
from . import fast
from .array import Array, placeholder
from .dtypes import *
from .evaluate import compile, eval, lower
from .executable import Executable
from .fast import dequantize, quantize, quantized_matmul, quantized_take
from .fast import softmax_axes as softmax
from .node import Dim
from .operands import broadcast_shapes
from .ops import *
from .plan import Plan, PlanStep, View

array = Array
newaxis = None
inf, nan, pi, e = float("inf"), float("nan"), 3.141592653589793, 2.718281828459045

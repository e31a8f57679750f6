"""Lazy arrays with MLX's names: `from lazulite.engine import array as mx`."""
# ruff: noqa: F401, F403
import sys

from . import (
    convolution,
    creation,
    device,
    elementwise,
    fast,
    fft,
    grouped,
    linalg,
    movements,
    products,
    random,
    reductions,
    scans,
    scatter,
    sorting,
)
from .array import Array, placeholder
from .compiled import compile, disable_compile, enable_compile
from .convolution import *
from .creation import *
from .device import *
from .dtypes import *
from .elementwise import *
from .evaluate import async_eval, eval, lower
from .executable import Executable
from .export import FunctionExporter, export_function, exporter, import_function
from .fast import dequantize, qqmm, quantize, quantized_matmul, quantized_take
from .fast import softmax_axes as softmax
from .graph import export_to_dot, graph
from .grouped import *
from .interchange import *
from .io import *
from .linalg import norm as matrix_norm
from .memory import *
from .movements import *
from .namespace import __array_namespace_info__
from .node import Dim
from .operands import broadcast_shapes
from .plan import Plan, PlanStep, View
from .printing import *
from .products import *
from .profile import profile
from .reductions import *
from .scans import *
from .scatter import *
from .scatter import ArrayAt
from .sorting import *
from .transforms import *

array = Array
newaxis = None
inf, nan, pi, e = float("inf"), float("nan"), 3.141592653589793, 2.718281828459045
euler_gamma = 0.5772156649015329

for module in (convolution, creation, elementwise, grouped, movements, products, reductions, scans, scatter, sorting):
    # what they call among themselves stays as it is
    device.take_streams(sys.modules[__name__], module.__all__)
for module in (fast, fft, linalg, random):
    device.take_streams(module, module.__all__)
device.take_streams(sys.modules[__name__], ["dequantize", "load", "matrix_norm", "qqmm", "quantize", "quantized_matmul",
                                            "softmax", "stop_gradient"])
del module

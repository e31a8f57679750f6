"""Complex numbers: functions of them, products, sums, and the way to and from real ones."""
from __future__ import annotations

import math

import numpy as np
from cases import Case, Input

from lazulite.engine import array as mx

Z = Input((3, 4), "complex")


def rows(count: int, grad: bool = True, **references) -> list[Case]:
    return [Case(f"complex {name}", getattr(mx, name), reference, (Z,) * count, grad=grad)
            for name, reference in references.items()]


def pair(x):
    """Two real arrays as a complex one."""
    return x[0] + 1j * x[1]


CASES = [
    *rows(1, negative=np.negative, abs=np.abs, square=np.square, sqrt=np.sqrt, exp=np.exp, log=np.log, log2=np.log2,
          log10=np.log10, log1p=np.log1p, expm1=np.expm1, sin=np.sin, cos=np.cos, tan=np.tan, sinh=np.sinh,
          cosh=np.cosh, tanh=np.tanh, arcsin=np.arcsin, arccos=np.arccos, arctan=np.arctan, arcsinh=np.arcsinh,
          arctanh=np.arctanh, reciprocal=np.reciprocal, rsqrt=lambda z: 1 / np.sqrt(z), conjugate=np.conj,
          conj=np.conj, real=np.real,
          imag=np.imag, sum=np.sum, prod=np.prod, mean=np.mean, isnan=np.isnan, isinf=np.isinf, any=np.any, all=np.all,
          logical_not=np.logical_not, nan_to_num=np.nan_to_num),
    *rows(1, grad=False, sign=lambda z: z / np.abs(z), arccosh=np.arccosh),
    *rows(2, add=np.add, subtract=np.subtract, multiply=np.multiply, divide=np.divide, power=np.power, equal=np.equal,
          not_equal=np.not_equal, logical_and=np.logical_and),
    Case("complex where", mx.where, np.where, (Input((3, 4), "bool"), Z, (3, 4))),
    Case("complex of parts", pair, pair, (Input((2, 3, 4)),), half=False),
    Case("complex parts in a chain", lambda z: mx.imag(mx.exp(z) * 2j) + mx.real(z).astype(mx.complex64) * z,
         lambda z: np.imag(np.exp(z) * 2j) + np.real(z) * z, (Z,)),
    Case("complex scalars", lambda z: (2 - z) / 3 * 1j + z**2, lambda z: (2 - z) / 3 * 1j + z**2, (Z,)),
    Case("complex beside real", lambda z, x: z * x + x, lambda z, x: z * x + x, (Z, (4,)), half=False),
    Case("complex astype", lambda z: (z.astype(mx.float32), z.astype(mx.int32)),
         lambda z: (z.real, z.real.astype(int)), (Z,)),
    Case("complex matmul", mx.matmul, np.matmul, (Z, Input((2, 4, 3), "complex"))),
    Case("complex by real matmul", mx.matmul, np.matmul, (Z, (4,)), half=False),
    *(Case(f"complex {name} {axis}", lambda z, n=name, a=axis: getattr(mx, n)(z, a, keepdims=True),
           lambda z, n=name, a=axis: getattr(np, n)(z, axis=a, keepdims=True), (Input((2, 3, 5), "complex"),))
      for name in ("sum", "prod", "mean") for axis in (1, (0, 2))),
    Case("complex movements", lambda z: mx.concatenate([z.T[::-1], mx.zeros((4, 1), mx.complex64)], 1),
         lambda z: np.concatenate([z.T[::-1], np.zeros((4, 1))], 1), (Z,)),
    Case("complex norm", lambda z: mx.linalg.norm(z, axis=1), lambda z: np.linalg.norm(z, axis=1), (Z,)),
    Case("complex inv", lambda z: mx.linalg.inv(z @ z.T + 4 * mx.eye(3)), 
         lambda z: np.linalg.inv(z @ z.T + 4 * np.eye(3)), (Z,), tolerance=1e-4),
    Case("complex eigvalsh", lambda z: mx.linalg.eigvalsh(z @ mx.conj(z).T), 
         lambda z: np.linalg.eigvalsh(z @ z.conj().T), (Z,), tolerance=1e-4),
    Case("a complex phase", lambda x: mx.abs(mx.exp(1j * x) + x), lambda x: np.abs(np.exp(1j * x) + x),
         (Input((5,), "unit"),), half=False),
    Case("a complex angle", lambda z: mx.arctan2(mx.imag(z), mx.real(z)) / math.pi,
         lambda z: np.angle(z) / math.pi, (Z,)),
]

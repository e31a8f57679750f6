"""linear: products of tokens with weights that share them, as they were stored."""
from __future__ import annotations

from collections.abc import Sequence

from .steps import Dispatch, Scratch, Step, Unsupported, View, ceil, struct

FLOATS = 16                          # a format above it has floats for codes, and no biases
WEIGHTS = 4                          # of a dispatch: their arrays fill its buffers
GATED = 2                            # epilogues from here on take two weights
FEW = 16                             # tokens that are multiplied 8 at a time: a tile of 32 would be half empty

Matrix = Sequence[View]              # floats; codes and scales; codes, scales and biases
Arguments = dict[str, View | Scratch | bytes | None]          # by name, None for what there is not


def parts_of(format: int) -> int:
    return 1 if not format else 2 if format > FLOATS else 3


def named(names: str, matrix: Matrix) -> Arguments:
    return dict(zip(names.split(), matrix, strict=False))


def shape_of(tokens: int) -> tuple[int, int]:
    """Tokens and rows of a threadgroup."""
    return (ceil(tokens, ceil(tokens, 8)), 8) if tokens <= FEW else (32, 64)


def check_matrices(matrices: Sequence[Matrix], biases: Sequence[View | None] = ()) -> None:
    for views in (*zip(*matrices, strict=True), [b for b in biases if b]):
        if len({v.dtype for v in views}) > 1 or not all(v.contiguous for v in views):
            raise Unsupported("weights of different types, or strided ones")


def product(function: str, arguments: Arguments, groups: tuple[int, int, int], sizes: Sequence[int],
            stored: tuple[int, int], matrix: Matrix, *, tokens: int, threads: int = 0, x: str = "float",
            gain: View | None = None, bias: View | None = None, epilogue: int = 0, **constants: int | bool) -> Dispatch:
    """A dispatch of linear.metal. sizes: the inner one, and rows of each weight; stored: format and group; tokens: of a
    threadgroup; x: the type of activations."""
    format, group = stored
    defines: dict[str, str | int] = {
        "FORMAT": format, "GROUP": group or 1, "TOKENS": tokens, "X": x,
        "WEIGHT": "ushort" if format else matrix[0].type, "SCALE": matrix[1].type if format else "float",
        "GAIN": gain.type if gain else "float", "BIAS": bias.type if bias else "float"}
    numbers = {**dict(zip(("K", "N0", "N1", "N2", "N3"), (*sizes, 0, 0, 0), strict=False)), "EPILOGUE": epilogue,
               "NORM": gain is not None, "HAS_BIAS": bias is not None, "ACROSS": False, "GATHERED": False,
               "DOWN": False, "CHOICES": 1, "MATRICES": 1, "SOURCES": 1}
    return Dispatch("linear", function, {name: a for name, a in arguments.items() if a is not None}, groups,
                    (threads or (64 if tokens <= 8 else 128), 1, 1), defines, numbers | constants)


def linear(step: Step) -> list[Dispatch]:
    n, format, group, norm, epilogue, has_bias, _precise = step.ints
    inputs = iter(step.inputs)
    x, gain = next(inputs), next(inputs) if norm else None
    matrices = [[next(inputs) for _ in range(parts_of(format))] for _ in range(n)]
    biases = [next(inputs) if has_bias else None for _ in range(n)]
    residual = next(inputs) if epilogue == 1 else None
    if not x.size:
        return []
    check_matrices(matrices, biases)
    T, K = x.shape
    if K > 1 and x.strides[1] != 1 or not all(v.contiguous for v in (gain, residual, *step.outputs) if v):
        raise Unsupported("strided activations")
    tokens, rows = shape_of(T)
    dispatches = []
    for first in range(0, n, WEIGHTS):
        some = range(first, min(first + WEIGHTS, n))
        sizes = [matrices[i][0].shape[0] for i in some]
        tiles = ceil(sizes[0], rows // 2) if epilogue >= GATED else sum(ceil(size, rows) for size in sizes)
        arguments: Arguments = {"x": x, "gain": gain, "residual": residual,
                                "p": struct(T, x.strides[0], float(step.floats[0]))}
        for j, i in enumerate(some):
            arguments |= named(f"w{j} s{j} b{j}", matrices[i]) | {f"c{j}": biases[i]}
        arguments |= {f"y{j}": y for j, y in enumerate(step.outputs[first:first + WEIGHTS])}
        dispatches.append(product("linear", arguments, (tiles, ceil(T, tokens), 1), (K, *sizes), (format, group),
                                  matrices[0], tokens=tokens, gain=gain, bias=biases[0], epilogue=epilogue))
    return dispatches

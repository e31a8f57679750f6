"""Time of one token, 8 and 64 through quantized matrices (4096, 2048) of every mode, beside bfloat16, in one run.

python bench/formats.py: the least of 20 interleaved runs of 4 matrices, in ms, and GB/s of the weights. Products are
checked first against the dequantized matrix.
"""
import time

import numpy as np

from lazulite.engine import array as mx

ROWS, COLUMNS, MATRICES, RUNS = 4096, 2048, 4, 20
FORMATS = {"4 bits": (32, 4, "affine"), "5 bits": (32, 5, "affine"), "8 bits": (32, 8, "affine"),
           "mxfp4": (32, 4, "mxfp4"), "nvfp4": (16, 4, "nvfp4"), "mxfp8": (32, 8, "mxfp8")}


def program(weights: list[mx.Array], format: tuple[int, int, str] | None):
    if format is None:
        return mx.compile(lambda x: [x @ w.T for w in weights]), sum(w.nbytes for w in weights)
    group, bits, mode = format
    packed = [mx.quantize(w, group, bits, mode) for w in weights]
    mx.eval(packed)
    settings = dict(group_size=group, bits=bits, mode=mode)
    x = mx.random.normal((2, COLUMNS))
    wanted = np.asarray(x) @ np.asarray(mx.dequantize(*packed[0], **settings, dtype=mx.float32)).T
    found = np.asarray(mx.quantized_matmul(x, *packed[0], **settings))
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()
    size = sum(part.nbytes for parts in packed for part in parts)
    return mx.compile(lambda x: [mx.quantized_matmul(x, *parts, **settings) for parts in packed]), size


def main() -> None:
    weights = [mx.random.normal((ROWS, COLUMNS)).astype(mx.bfloat16) for _ in range(MATRICES)]
    programs = {name: program(weights, format) for name, format in {"bfloat16": None, **FORMATS}.items()}
    for tokens in (1, 8, 64):
        x, best = mx.random.normal((tokens, COLUMNS)), dict.fromkeys(programs, np.inf)
        for _ in range(RUNS):
            for name, (run, _) in programs.items():
                start = time.perf_counter()
                mx.eval(run(x))
                best[name] = min(best[name], time.perf_counter() - start)
        for name, seconds in best.items():
            rate = programs[name][1] / seconds / 1e9
            print(f"{tokens:3d} tokens  {name:9s} {seconds * 1e3:7.2f} ms {rate:6.1f} GB/s")


if __name__ == "__main__":
    main()

"""The array kernels beside NumPy, PyTorch and MLX on the CPU: the same arrays, the same threads, in turns.

    python bench/arrays.py                       # the table: minutes
    python bench/arrays.py --only sum,matmul     # rows whose name has one of these words
    python bench/arrays.py --log                 # also appends it to LOG.md

Each contestant is a process of its own, so that no thread pool disturbs another. Results are compared with NumPy's
first. A turn is the fastest of some runs; the table has medians of turns. Limits, measured before and after: bytes/s
read from, or copied in, DRAM, and operations/s (roofline.cpp). A large last-level cache may hold these arrays:
then the rate may be above that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from compare import CACHE, commit, cpu_name, once, say

HERE = Path(__file__).resolve().parent
PEERS = {"Lazulite": "lazulite.engine.array", "NumPy": "numpy", "PyTorch": "torch", "MLX": "mlx.core"}
N, SIDE = 10_000_000, 3_200
SOME = np.random.default_rng(0)


class Case(NamedTuple):
    """A row: shapes of the inputs ("index": of integers below the first input's size), what Lazulite and MLX run, what
    NumPy and PyTorch run; bytes or operations, and the limit that they are held against."""

    inputs: tuple[Any, ...]
    mx: Callable[..., Any]
    numpy: Callable[..., Any]
    torch: Callable[..., Any]
    amount: float = 0
    limit: str = "copy"
    dtype: str = "float32"
    compiled: bool = False


def read(*shape: int) -> tuple[tuple[tuple[int, ...]], int, str]:
    return (shape,), 4 * int(np.prod(shape)), "read"


def functional(torch: Any) -> Any:
    return torch.nn.functional


def chain(xp: Any, x: Any) -> Any:
    return 0.5 * x * (1 + xp.tanh(0.7978845608 * (x + 0.044715 * (x * x * x))))


def fifty(xp: Any, x: Any) -> Any:
    for _ in range(25):
        x = xp.abs(x * 0.5)
    return x


def softmax(np: Any, x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(np: Any, x: Any, w: Any, b: Any) -> Any:
    y = x - x.mean(-1, keepdims=True)
    return y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5) * w + b


def over_axis(name: str, axis: int | None) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """A reduction: axis is a keyword everywhere, and PyTorch takes it as such."""
    run = lambda xp, x: getattr(xp, name)(x) if axis is None else getattr(xp, name)(x, axis=axis)  # noqa: E731
    return run, run, run


def product(m: int, k: int, n: int, dtype: str = "float32", batch: tuple[int, ...] = (), ta: bool = False,
            tb: bool = False) -> Case:  # fmt: skip
    def run(xp: Any, a: Any, b: Any) -> Any:
        return (a.swapaxes(-1, -2) if ta else a) @ (b.swapaxes(-1, -2) if tb else b)

    shapes = (*batch, *((k, m) if ta else (m, k))), (*batch, *((n, k) if tb else (k, n)))
    return Case(shapes, run, run, run, 2.0 * m * k * n * int(np.prod(batch)), dtype, dtype)


ROWS, COLUMNS = 10_000, 1_000
MAP = 8 * N
CASES: dict[str, Case] = {
    "add": Case(((N,), (N,)), *[lambda xp, x, y: x + y] * 3, amount=12 * N),
    "exp": Case(((N,),), *[lambda xp, x: xp.exp(x)] * 3, amount=MAP),
    "gelu chain": Case(
        ((N,),), chain, chain, lambda t, x: functional(t).gelu(x, approximate="tanh"), MAP, compiled=True
    ),
    "gelu chain, written out": Case(((N,),), chain, chain, chain, MAP, compiled=True),
    "softmax": Case(((ROWS, COLUMNS),), lambda mx, x: mx.softmax(x, -1), softmax, lambda t, x: t.softmax(x, -1), MAP),
    "softmax, one row": Case(((1, N),), lambda mx, x: mx.softmax(x, -1), softmax, lambda t, x: t.softmax(x, -1), MAP),
    "layer norm": Case(
        ((ROWS, COLUMNS), (COLUMNS,), (COLUMNS,)),
        lambda mx, x, w, b: mx.fast.layer_norm(x, w, b, 1e-5),
        layer_norm,
        lambda t, x, w, b: functional(t).layer_norm(x, (COLUMNS,), w, b),
        MAP,
    ),
    "sum": Case(read(N)[0], *over_axis("sum", None), *read(N)[1:]),
    "sum of rows": Case(read(ROWS, COLUMNS)[0], *over_axis("sum", -1), *read(N)[1:]),
    "sum of columns": Case(read(ROWS, COLUMNS)[0], *over_axis("sum", 0), *read(N)[1:]),
    "sum, middle axis": Case(read(100, 1000, 100)[0], *over_axis("sum", 1), *read(N)[1:]),
    "sum, short rows": Case(read(N // 10, 10)[0], *over_axis("sum", -1), *read(N)[1:]),
    "mean": Case(read(N)[0], *over_axis("mean", None), *read(N)[1:]),
    "max": Case(read(N)[0], *over_axis("max", None), *read(N)[1:]),
    "argmax": Case(read(N)[0], *over_axis("argmax", None), *read(N)[1:]),
    "argmax of rows": Case(read(ROWS, COLUMNS)[0], *over_axis("argmax", -1), *read(N)[1:]),
    "argmax of columns": Case(read(ROWS, COLUMNS)[0], *over_axis("argmax", 0), *read(N)[1:]),
    "cumsum": Case(((N,),), *over_axis("cumsum", 0), MAP),
    "sort": Case(((N,),), lambda mx, x: mx.sort(x), lambda np, x: np.sort(x), lambda t, x: t.sort(x)[0], MAP),
    "gather rows": Case(((ROWS, COLUMNS), ("index", ROWS)), *[lambda xp, x, i: x[i]] * 3, amount=MAP),
    "gather": Case(((N,), ("index", N)), *[lambda xp, x, i: x[i]] * 3, amount=12 * N),
    "transpose": Case(
        ((SIDE, SIDE),),
        lambda mx, x: mx.contiguous(x.T),
        lambda np, x: np.ascontiguousarray(x.T),
        lambda t, x: x.T.contiguous(),
        8 * SIDE * SIDE,
    ),  # fmt: skip
    "every other, twice": Case(((2 * N,),), *[lambda xp, x: x[::2] * 2] * 3, amount=12 * N),
    "matmul 1024": product(1024, 1024, 1024),
    "matmul 1024 NT": product(1024, 1024, 1024, tb=True),
    "matmul 1024 TN": product(1024, 1024, 1024, ta=True),
    "matmul 1024 TT": product(1024, 1024, 1024, ta=True, tb=True),
    "matmul 1024 bfloat16": product(1024, 1024, 1024, "bfloat16"),
    "matmul 1024 bfloat16 NT": product(1024, 1024, 1024, "bfloat16", tb=True),
    "matmul 1024 float64": product(1024, 1024, 1024, "float64"),
    "matmul 768x128x384": product(768, 128, 384),
    "matmul 768x128x384 NT": product(768, 128, 384, tb=True),
    "matmul 128x768x384 TN": product(128, 768, 384, ta=True),
    "matmul 48 of 64x32x64": product(64, 32, 64, batch=(48,)),
    "matmul 48 of 64x32x64 NT": product(64, 32, 64, batch=(48,), tb=True),
    "matmul 48 of 64x64x32": product(64, 64, 32, batch=(48,)),
    "vector times matrix": product(1, 4096, 4096),
    "matrix times vector": product(4096, 4096, 1),
    "small op": Case(((10,), (10,)), *[lambda xp, x, y: x + y] * 3),
    "50 small ops, compiled": Case(((10,),), fifty, fifty, fifty, compiled=True),
}


@cache
def numbers(shape: tuple[Any, ...], below: int, dtype: str) -> Any:
    if shape[0] == "index":
        return np.random.default_rng(1).integers(0, below, shape[1:]).astype(np.int32)
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float64 if dtype == "float64" else np.float32)


class Contestant:
    """One of PEERS, in its own process: the arrays that a case wants, and the case run once."""

    def __init__(self, name: str, threads: int):
        self.name, self.xp, self.ready = name, import_module(PEERS[name]), ("", lambda: None)
        if name == "PyTorch":
            self.xp.set_num_threads(threads)
            self.xp.set_grad_enabled(False)

    def array(self, x: Any, dtype: str) -> Any:
        if self.name == "NumPy":
            return x
        if self.name == "PyTorch":
            made = self.xp.from_numpy(x)
            return made.bfloat16() if dtype == "bfloat16" else made
        return self.xp.array(x, dtype=self.xp.int32 if x.dtype == np.int32 else getattr(self.xp, dtype))

    def prepared(self, name: str) -> Callable[[], Any]:
        if self.ready[0] == name:
            return self.ready[1]
        case, xp = CASES[name], self.xp
        arrays = [self.array(numbers(s, case.inputs[0][0], case.dtype), case.dtype) for s in case.inputs]
        fn = {"NumPy": case.numpy, "PyTorch": case.torch}.get(self.name, case.mx)
        if self.name in ("NumPy", "PyTorch"):
            run = lambda: fn(xp, *arrays)  # noqa: E731
        else:
            xp.eval(*arrays)
            made = xp.compile(lambda *a: fn(xp, *a)) if case.compiled else lambda *a: fn(xp, *a)

            def run() -> Any:
                xp.eval(result := made(*arrays))
                return result

        self.ready = name, run
        return run

    def sample(self, result: Any) -> list[float]:
        """Some numbers of the result, the same for everybody."""
        if self.name == "PyTorch":
            result = result.double().numpy()
        elif self.name != "NumPy":
            result = np.array(result.astype(self.xp.float32) if "bfloat16" in str(result.dtype) else result)
        flat = np.asarray(result, np.float64).ravel()
        return flat[:: max(1, flat.size // 997)].tolist()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        run = self.prepared(request["case"])
        if request.get("sample"):
            return {"sample": self.sample(run())}
        times, end = [], time.perf_counter() + request["seconds"]
        run()
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return {"seconds": min(times)}


def serve(name: str, threads: int) -> None:
    contestant = Contestant(name, threads)
    for line in sys.stdin:
        try:
            answer = contestant.answer(json.loads(line))
        except Exception as error:  # the table goes on without this number
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


class Process:
    def __init__(self, name: str, threads: int):
        command = [sys.executable, __file__, "--serve", name, "--threads", str(threads)]
        variables = {v: str(threads) for v in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LAZULITE_THREADS")}
        pipe, environment = subprocess.PIPE, os.environ | variables
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "its process ended"}


def wrong(samples: dict[str, list[float]], case: Case) -> list[str]:
    """Who differs from NumPy's result."""
    reference = np.array(samples["NumPy"])
    close = (2e-2 if case.dtype == "bfloat16" else 1e-4) * (np.abs(reference).max() + 1)
    return [name for name, s in samples.items() if len(s) != len(reference) or np.abs(reference - s).max() > close]


def measure(names: list[str], processes: dict[str, Process], rounds: int, seconds: float) -> Any:
    """times[case][contestant]: seconds of each turn."""
    times: Any = defaultdict(lambda: defaultdict(list))
    peers = list(processes)
    for case in names:
        answers = {name: process.ask(case=case, sample=True) for name, process in processes.items()}
        for name, answer in answers.items():
            if "error" in answer:
                say(f"{case}: {name}: {answer['error']}")
        samples = {name: answer["sample"] for name, answer in answers.items() if "sample" in answer}
        if bad := wrong(samples, CASES[case]):
            say(f"{case}: {', '.join(bad)} differs from NumPy")
        for turn in range(rounds):
            for name in peers[turn % len(peers) :] + peers[: turn % len(peers)]:
                if name in samples:
                    time.sleep(0.02)  # until the threads of the one before are asleep
                    times[case][name].append(processes[name].ask(case=case, seconds=seconds)["seconds"])
        say(f"{case:26}", *(f"{name} {1e3 * median(t):.3f}  " for name, t in times[case].items()))
    return times


def table(times: Any, limits: dict[str, float]) -> str:
    peers = [name for name in PEERS if name != "Lazulite"]
    head = ["", "ms", "rate", "of limit", *(f"× {name}" for name in peers)]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for case, by in times.items():
        if "Lazulite" not in by:
            continue
        own, c = median(by["Lazulite"]), CASES[case]
        rate, limit = c.amount / own, limits.get(c.limit, 0)
        shown = f"{rate / 1e9:,.{1 if rate < 1e11 else 0}f} {'GB/s' if c.limit in ('read', 'copy') else 'GFLOPS'}"
        cells = [f"{1e3 * own:.3f}", shown if rate else "–", f"{100 * rate / limit:.0f} %" if rate and limit else "–"]
        cells += [f"{median(by[name]) / own:.2f}" if name in by else "–" for name in peers]
        rows.append([case, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words, separated by commas")
    parser.add_argument("--without", default="", help="contestants, separated by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.15, help="of one turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write all times and limits")
    parser.add_argument("--log", action="store_true", help="append the table to LOG.md")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.threads)
    load = os.getloadavg()[0]
    roofline, build = CACHE / "roofline", f"{os.environ.get('CXX', 'c++')} -O3 -march=native -pthread"
    once(roofline, f"{build} {quote(str(HERE / 'roofline.cpp'))} -o {quote(str(roofline))}")
    limits: Callable[[], dict[str, float]] = lambda: json.loads(  # noqa: E731
        subprocess.run([str(roofline), str(args.threads), str(4 * N)], capture_output=True, check=True).stdout
    )
    names = [case for case in CASES if any(word in case for word in args.only.split(","))]
    before = limits()
    processes = {name: Process(name, args.threads) for name in PEERS if name not in args.without.split(",")}
    times = measure(names, processes, args.rounds, args.seconds)
    after = limits()
    best = {key: max(before[key], after[key]) for key in before}
    dram = best | {"read": best["read_1GB"], "copy": best["copy_1GB"]}
    text = (
        f"## {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, {commit()}, arrays\n\n{cpu_name()}, {args.threads} "
        f"threads, load {load:.1f} before, medians of {args.rounds} turns. Limits: DRAM read "
        f"{dram['read'] / 1e9:.1f}, copy {dram['copy'] / 1e9:.1f} GB/s (of 40 MB: {best['read'] / 1e9:.1f}, "
        f"{best['copy'] / 1e9:.1f}); float32 {best['float32'] / 1e12:.2f}, bfloat16 {best['bfloat16'] / 1e12:.2f} "
        f"TFLOPS.\n\n{table(times, dram)}\n"
    )
    print(text)
    if args.json:
        args.json.write_text(json.dumps({"times": times, "limits": best}))
    if args.log:
        with (HERE / "LOG.md").open("a") as log:
            log.write("\n" + text)
    for process in processes.values():
        process.process.terminate()


if __name__ == "__main__":
    main()

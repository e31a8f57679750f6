"""The C ABI through ctypes: plans, symbolic sizes, errors, memory, instruction sets, threads, forks, exits."""

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from lazulite.engine import cpu

ADD, MUL = cpu.runtime().opcodes["add"], cpu.runtime().opcodes["mul"]
F32 = cpu.DTYPES.index("float32")


@dataclass
class View:
    buffer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] = (1,)
    offset: int = 0
    dtype: Any = F32


@dataclass
class Step:
    outputs: list[View]
    inputs: list[View]
    ints: list[int]
    floats: list[float] = field(default_factory=list)
    kernel: str = "elementwise"


def binary(op: int, out: View, a: View, b: View) -> Step:
    return Step([out], [a, b], [0, 1, 0, 2, op, 2, 0, 1, 0])


def doubling(n_steps: int, size: int = 64) -> tuple[cpu.Plan, Any, Any]:
    """x += x, n_steps times, on buffer 1; a plan and its pointers and array."""
    view = View(1, (size,))
    plan = cpu.runtime().load([binary(ADD, view, view, view)] * n_steps, 2, [], 0)
    x = np.ones(size, np.float32)
    return plan, (ctypes.c_void_p * 2)(0, x.ctypes.data), x


def child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from lazulite.engine import cpu\nimport numpy as np, os, sys, threading\n" + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def test_steps_run_in_order_through_the_arena(isa: str) -> None:
    """(a + b) * b with the sum in the arena; the leading axis is symbolic, and sizes from 0 to the maximum work."""
    runtime = cpu.runtime()
    before = runtime.isa
    runtime.set_isa(isa)
    t = (-1, 700)
    arena, a, b, out = (View(i, t, (700, 1), offset=64 * (i == 0)) for i in range(4))
    plan = runtime.load([binary(ADD, arena, a, b), binary(MUL, out, arena, b)], 4, [40], 64 + 40 * 700 * 4)
    runtime.set_isa(before)
    x, y = np.random.default_rng(0).standard_normal((2, 40, 700)).astype(np.float32)
    for rows in (40, 1, 0, 7):
        z = np.zeros_like(x)
        times = (ctypes.c_double * 2)()
        runtime.run(plan, [0, x.ctypes.data, y.ctypes.data, z.ctypes.data], [rows], times)
        np.testing.assert_array_equal(z[:rows], ((x + y) * y)[:rows])
        assert not z[rows:].any() and all(t >= 0 for t in times)
    with pytest.raises(RuntimeError, match="symbolic size 0 is 41, the plan was made for 0 to 40"):
        runtime.run(plan, [0, x.ctypes.data, y.ctypes.data, z.ctypes.data], [41])
    with pytest.raises(RuntimeError, match="buffer 2 of the plan is not set"):
        runtime.run(plan, [0, x.ctypes.data, 0, z.ctypes.data], [40])


GOOD = View(1, (4,))
WRONG = [
    (Step([GOOD], [], [0, 0, 0, 0], kernel="nonesuch"), 'no kernel is named "nonesuch"'),
    (Step([View(2, (4,))], [GOOD], [0, 0, 0, 0]), "a view's buffer is 2, the plan has 2"),
    (Step([View(-1, (4,))], [GOOD], [0, 0, 0, 0]), "a view's buffer is -1"),
    (Step([View(1, (1,) * 9, (1,) * 9)], [GOOD], [0, 0, 0, 0]), "a view has 9 axes, the most is 8"),
    (Step([View(1, (4,), dtype=14)], [GOOD], [0, 0, 0, 0]), "dtype is 14, which is none"),
    (Step([View(1, (-2,))], [GOOD], [0, 0, 0, 0]), "a view's axis 0 is -2, and the plan has 1 symbolic sizes"),
    (Step([View(1, (2, -1), (1, 1))], [GOOD], [0, 0, 0, 0]), "a view's axis 1 is -1"),
    (Step([View(0, (-1,), offset=64)], [GOOD], [0, 0, 0, 0]), "a view covers bytes 64 to 104 of an arena of 100"),
    (Step([View(0, (3,), (-1,))], [GOOD], [0, 0, 0, 0]), "a view covers bytes -8 to 4 of an arena of 100"),
    (Step([View(1, (5,))], [GOOD], [0, 0, 0, 0]), r"\[elementwise\] views differ in shape"),
]


@pytest.mark.parametrize("step, message", WRONG)
def test_a_wrong_plan_is_refused(step: Step, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        cpu.runtime().load([step], 2, [10], 100)


def test_a_failing_kernel_ends_the_run_and_the_next_run_works(threads: Any) -> None:
    threads(2)
    runtime = cpu.runtime()
    i64, big = cpu.DTYPES.index("int64"), 100_000
    x, index, out = np.arange(8, dtype=np.float32), np.zeros(big, np.int64), np.zeros(big, np.float32)
    views = View(3, (1, big, 1), (big, 1, 1)), View(1, (1, 8, 1), (8, 1, 1)), View(2, (big,), dtype=i64)
    take = Step([views[0]], list(views[1:]), [], kernel="take")
    flat = View(3, (big,))
    plan = runtime.load([take, binary(ADD, flat, flat, flat)], 4, [], 0)
    pointers = [0] + [a.ctypes.data for a in (x, index, out)]
    index[:] = 1
    runtime.run(plan, pointers, [])
    assert (out == 2).all()
    index[big - 1] = 9
    with pytest.raises(RuntimeError, match=r"\[take\] index 9 is out of range for size 8"):
        runtime.run(plan, pointers, [])
    assert out[0] == 1  # the step after the failed one did not run
    index[big - 1] = 1
    runtime.run(plan, pointers, [])
    assert (out == 2).all()


def test_memory_is_aligned_counted_and_reused() -> None:
    runtime = cpu.runtime()
    runtime.clear_cache()
    before = runtime.memory()
    blocks = [runtime.alloc(n) for n in (0, 1, 100, 3_000_000)]
    assert all(block.pointer % 64 == 0 for block in blocks)
    during = runtime.memory()
    assert during["active"] >= before["active"] + 3_000_101 and during["peak"] >= during["active"]
    large = blocks[-1].pointer
    del blocks
    assert runtime.memory()["active"] == before["active"] and runtime.memory()["cached"] >= 3_000_101
    assert runtime.alloc(2_900_000).pointer == large  # a size that rounds to the same class
    runtime.clear_cache()
    assert runtime.memory()["cached"] == 0
    with pytest.raises(MemoryError, match="out of memory: 1152921504606846976 bytes"):
        runtime.alloc(2**60)


def test_instruction_sets() -> None:
    runtime = cpu.runtime()
    assert "portable" in runtime.isas() and runtime.isa in runtime.isas()
    with pytest.raises(RuntimeError, match='instruction set "mmx" is not one that this machine has: .*portable'):
        runtime.set_isa("mmx")
    forced = child("print(cpu.runtime().isa)", LAZULITE_ISA="portable")
    assert forced.stdout == "portable\n"
    assert 'instruction set "sse9"' in child("cpu.runtime()", LAZULITE_ISA="sse9").stderr


def test_threads_follow_the_affinity_mask_and_the_environment() -> None:
    first = min(os.sched_getaffinity(0))
    code = f"os.sched_setaffinity(0, [{first}]); print(cpu.runtime().threads)"
    assert child(code).stdout == child(code, LAZULITE_THREADS="3").stdout == "1\n"
    assert child("print(cpu.runtime().threads)", LAZULITE_THREADS="1").stdout == "1\n"
    cpu.runtime().set_threads(10**6)
    assert 1 <= cpu.runtime().threads <= len(os.sched_getaffinity(0))
    assert 'LAZULITE_THREADS is "two", wanted is a number from 1' in child(code, LAZULITE_THREADS="two").stderr
    with pytest.raises(RuntimeError, match="-1 threads were asked for"):
        cpu.runtime().set_threads(-1)


def test_a_missing_library_says_how_to_get_it(tmp_path: Any) -> None:
    assert "cannot open shared object" in child("cpu.runtime()", LAZULITE_LIB=str(tmp_path / "no.so")).stderr
    code = "cpu.__path__ = ['/nowhere']; cpu.runtime()"
    assert "build it with `pip install .`" in child(code, LAZULITE_LIB="").stderr


def test_runs_from_many_python_threads(threads: Any) -> None:
    threads(2)
    results: list[float] = []

    def work() -> None:
        for _ in range(20):
            plan, pointers, x = doubling(10, 20_000)
            cpu.runtime().run(plan, pointers, [])
            results.append(x.min() + x.max())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [2048.0] * 80


LARGE_SUM = """
    cpu.runtime()._library.lz_set_threads(3)
    x = np.ones(300_000, np.float32)
    def add(): cpu.call("elementwise", [x], [x, x], [0, 1, 0, 2, cpu.runtime().opcodes["add"], 2, 0, 1, 0])
    add()
"""


def test_a_forked_child_gets_threads_of_its_own() -> None:
    done = child(LARGE_SUM + """
    pid = os.fork()
    add()
    assert (x == 4).all()
    if pid == 0: os._exit(0)
    print(os.waitpid(pid, 0)[1])
    """)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_exit_waits_for_nobody() -> None:
    begin = time.monotonic()
    done = child(LARGE_SUM + """
    t = threading.Thread(target=lambda: [add() for _ in range(10**9)], daemon=True)
    t.start()
    """)  # fmt: skip
    assert done.returncode == 0 and time.monotonic() - begin < 30, done.stderr


def test_more_threads_than_cores_finish(threads: Any) -> None:
    plan, pointers, x = doubling(100, 20_000)
    threads(7)
    cpu.runtime().run(plan, pointers, [])
    assert (x == 2.0**100).all()

"""The kernels under ThreadSanitizer and UBSan, in a process of their own; planted bugs show that both would speak up.

Every GPU thread is a thread to ThreadSanitizer, ordered by barriers alone; neighbouring threadgroups have no order.
"""
import ctypes
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from lazulite.engine.metal import emulated, msl
from lazulite.engine.metal.emulated import compiler
from lazulite.engine.metal.encoders import encode
from lazulite.engine.metal.steps import Unsupported
from lazulite.engine.metal.vectors import bind, compare, results, vectors

NO_RANDOM_ADDRESSES = 0x0040000                # personality(2): ThreadSanitizer of GCC 12 wants its addresses
# Python and NumPy have no order that it knows of; the same threadgroup memory is reported again and again.
OPTIONS = "exitcode=0 ignore_noninstrumented_modules=1 suppress_equal_addresses=0"
BODY = """
kernel void planted(device float* y [[buffer(0)]], device const uchar* x [[buffer(1)]],
                    uint group [[threadgroup_position_in_grid]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[32];
%s
}
"""
# name: the sanitizer, the lines of the kernel (the first is line 4), what the report says.
PLANTED = {
    "clean": ("thread", "shared[i] = 1.0f;\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n"
                        "y[group * 32 + i] = shared[31 - i];", "^$"),
    "missing barrier": ("thread", "shared[i] = 1.0f;\ny[group * 32 + i] = shared[31 - i];",
                        r"data race(?s:.*)planted\.metal:[45](?s:.*)planted\.metal:[45]"),
    "barrier without a fence": ("thread", "shared[i] = 1.0f;\nsimdgroup_barrier(mem_flags::mem_none);\n"
                                "y[group * 32 + i] = shared[31 - i];", r"data race(?s:.*)planted\.metal:[46]"),
    "overlapping writers": ("thread", "y[group * 31 + i] = 1.0f;", r"data race(?s:.*)planted\.metal:4"),
    "neighbour's result": ("thread", "y[group * 32 + i] = 1.0f;\n"
                                     "if (group > 0) y[group * 32 + i] += y[group * 32 - 1];",
                           r"data race(?s:.*)planted\.metal:[45]"),
    "misaligned load": ("undefined", "y[i] = (*(device const float4*)(x + 4 * i)).x;",
                        r"planted\.metal:4:\d+: runtime error: .*misaligned address"),
    "shift by 32": ("undefined", "y[i] = float(1u << (i + 1));",
                    r"planted\.metal:4:\d+: runtime error: shift exponent 32 is too large"),
    "outside of an array": ("undefined", "float local[4] = {0.0f};\ny[i] = local[i / 2];",
                            r"planted\.metal:5:\d+: runtime error: index 4 out of bounds"),
    "bool that is none": ("undefined", "y[i] = ((device const bool*)x)[i] ? 1.0f : 2.0f;",
                          r"planted\.metal:4:\d+: runtime error: load of value \d+"),
}


@pytest.fixture(scope="module", params=["thread", "undefined"])
def reports(request):
    """The sanitizer, and what it said of each planted bug and of each vector: this file as a program of its own."""
    library = subprocess.run([*compiler.command(), "-print-file-name=libtsan.so"], capture_output=True, text=True)
    preload = {"LD_PRELOAD": library.stdout.strip()} if request.param == "thread" else {}
    done = subprocess.run(
        [sys.executable, __file__, request.param], capture_output=True, text=True, timeout=600,
        env=os.environ | preload | {"LAZULITE_METAL_SANITIZE": request.param, "TSAN_OPTIONS": OPTIONS},
        preexec_fn=lambda: ctypes.CDLL(None).personality(NO_RANDOM_ADDRESSES))
    assert done.returncode == 0, done.stderr[-3000:]
    parts = iter(re.split(r"^== (.*)\n", done.stderr, flags=re.M)[1:-2])            # its summary comes after the end
    return request.param, dict(zip(parts, parts, strict=True))


def test_planted(reports):
    sanitizer, said = reports
    for name, (by, _, report) in PLANTED.items():
        if by == sanitizer:
            assert re.search(report, said[name]), f"{name}: {said[name] or 'nothing'}"


def test_kernels(reports):
    """The smallest vectors that call every function, twice, and a planted kernel that is right."""
    bugs = {name for name, (_, _, report) in PLANTED.items() if report != "^$"}
    wrong = [f"{name}: {said}" for name, said in reports[1].items() if said and name not in bugs]
    assert not wrong, wrong[0][:6000]


def run_all(sanitizer):
    planted = {name: '#line 1 "planted.metal"' + BODY % body for name, (by, body, _) in PLANTED.items()
               if by == sanitizer}
    chosen = smallest()
    texts = {msl.source(d.file, d.defines, d.source) for _, dispatches in chosen.values() for d in dispatches}
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(emulated.compile_kernels, [*planted.values(), *texts]))
    for text in planted.values():              # loaded before the first report: those after it would name no lines
        emulated.library(text)
    for name, text in planted.items():
        begin(name)
        memory = emulated.Guarded(32 * 4 * 4), emulated.Guarded(32 * 4 + 16)
        emulated.library(text).run("planted", {i: m.bytes for i, m in enumerate(memory)}, (4,), (32,))
    for name, (vector, _) in chosen.items():
        begin(name)
        step, buffers = bind(vector)
        emulated.run(encode, step, buffers)
        print(compare(vector, results(step, buffers)) or "", end="", file=sys.stderr)
    begin("end")


def begin(name):
    print(f"== {name}", file=sys.stderr, flush=True)


def smallest():
    """By function of a Metal file: the vector with the least work that calls it, and its dispatches."""
    found = {}
    for vector in vectors():
        try:
            dispatches = encode(bind(vector)[0])
        except Unsupported:
            continue
        work = sum(groups(d) for d in dispatches)
        for d in dispatches:
            if groups(d) > 1 and work < found.get((d.file, d.function), (work + 1,))[0]:
                found[d.file, d.function] = work, vector, dispatches
    return {vector.id: (vector, dispatches) for _, vector, dispatches in found.values()}


def groups(dispatch):
    x, y, z = dispatch.groups
    return x * y * z


if __name__ == "__main__":
    run_all(sys.argv[1])

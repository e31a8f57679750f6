"""The detectors are tested themselves: each planted bug must be caught, and the same kernel without it must pass."""
import ctypes
import re
import subprocess
import sys

import numpy as np
import pytest

from lazulite.engine.errors import UserError
from lazulite.engine.metal import emulated
from lazulite.engine.metal.device import MESSAGES, objc
from lazulite.engine.metal.emulated import compiler

KERNEL = """
#line 1 "planted.metal"
#include <metal_stdlib>
using namespace metal;
constant int K [[function_constant(0)]];
kernel void planted(device float* y [[buffer(0)]], device const float* x [[buffer(1)]], constant int& n [[buffer(2)]],
                    uint group [[threadgroup_position_in_grid]], uint i [[thread_index_in_threadgroup]]) {
  %s
}
"""
N, THREADS = 128, 64                           # elements of x and of y, in two threadgroups
X = np.arange(1, N + 1, dtype=np.float32)
SHARE = "threadgroup float s[64]; s[i] = x[group * 64 + i]; {} y[group * 64 + i] = s[63 - i];"
LOOP = ("threadgroup float s[64]; float t = 0.0f; for (int k = 0; k < 4; k++) {{ s[i] = x[group * 64 + i] * float(k);"
        "threadgroup_barrier(mem_flags::mem_threadgroup); t += s[63 - i]; {} }} y[group * 64 + i] = t;")
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
TURNED = X.reshape(2, 64)[:, ::-1].ravel()

# What comes out wrong under one of the schedules: the bug, the same without it, and what is right.
WRONG = {
    "missing barrier": (SHARE.format(""), SHARE.format(BARRIER), TURNED),
    "missing second barrier": (LOOP.format(""), LOOP.format(BARRIER), TURNED * 6),
    "barrier of a simdgroup for a threadgroup": (
        SHARE.format("simdgroup_barrier(mem_flags::mem_threadgroup);"), SHARE.format(BARRIER), TURNED),
    "overlapping writers": ("y[i] = y[i + 64] = x[group * 64 + i];",
                            "if (group == 0) y[i] = y[i + 64] = x[i];", np.tile(X[:64], 2)),
    "group that needs another one": (
        "y[group * 64 + i] = x[i] + (group > 0 ? y[i] : 0.0f);", "y[group * 64 + i] = x[i] * float(group + 1);",
        np.concatenate([X[:64], 2 * X[:64]])),
    "uninitialised threadgroup memory": (
        "threadgroup float s[64]; if (i > 0) s[i] = x[group * 64 + i]; " + BARRIER + " y[group * 64 + i] = s[63 - i];",
        SHARE.format(BARRIER), TURNED),
    "output that nobody writes": ("if (i > 0) y[group * 64 + i] = x[group * 64 + i];",
                                  "y[group * 64 + i] = x[group * 64 + i];", X),
    "constant that is not given": ("y[group * 64 + i] = x[group * 64 + i] * float(K);",
                                   "y[group * 64 + i] = x[group * 64 + i];", X),
}
# What ends the kernel, and what is said.
CAUGHT = {
    "write past the end": ("y[group * 64 + i + 1] = x[i];",
                           r"bad address 0x\w+ in thread 63 of threadgroup \(1, 0, 0\)"),
    "read past the end": ("y[i] = x[n + 3];", r"bad address 0x\w+ in thread \d+ of threadgroup \(\d, 0, 0\)"),
    "far read": ("y[i] = x[1 << 28];", "bad address"),
    "argument that is not bound": ("y[i] = x[i] + ((device const float*)&n)[0];", None),
    "divergent barrier": ("if (i < 40) threadgroup_barrier(mem_flags::mem_none);",
                          r"divergent: thread \d+ has returned, .*threadgroup_barrier \(line 6\)"),
    "two barriers": (f"if (i < 40) {BARRIER} else\n{BARRIER}",
                     r"divergent threadgroup_barrier: thread \d+ is in line [67], thread \d+ in line [67]"),
    "divergent simd_sum": (
        "float t = x[i]; if (i % 32 < 7) t = simd_sum(t);\nelse t = simd_max(t); y[i] = t;",
        r"divergent simdgroup: thread \d+ is in simd_\w+ \(line [67]\), thread \d+ in simd_\w+ \(line [67]\)"),
    "simd_sum against a barrier": (
        "if (i < 7) y[i] = simd_sum(x[i]);\n" + BARRIER,
        r"stuck: thread 0 waits in simd_sum \(line 6\), thread 7 in threadgroup_barrier \(line 7\)"),
    "half a simdgroup multiplies": (
        "simdgroup_float8x8 a(1.0f), c(0.0f); if (i % 32 < 16) simdgroup_multiply_accumulate(c, a, a, c);",
        "simdgroup_multiply needs all 32 lanes"),
    "half a simdgroup loads": ("simdgroup_float8x8 a; if (i % 32 < 16) simdgroup_load(a, x);",
                               "passed other simdgroup_load or _store calls"),
    "much threadgroup memory": ("threadgroup float s[8193]; s[i] = 0.0f; y[i] = s[i];",
                                "32784 bytes of threadgroup memory; there are 32768"),
    "division by zero": ("y[i] = float(int(i) / (n - 128));", "integer division by zero in thread"),
    "large local array": ("float t[40000]; for (int k = 0; k < 40000; k++) t[k] = x[k % n]; y[i] = t[int(x[i])];",
                          "bad address|the stack of thread"),
}


def run(body, schedule=0, bound=3, **constants):
    """The two threadgroups of a planted kernel; y."""
    memory = emulated.Guarded(N * 4), emulated.Guarded(N * 4, X.tobytes()), emulated.Guarded(4, np.int32(N).tobytes())
    y, pointers = memory[0], {i: m.bytes for i, m in enumerate(memory[:bound])}
    emulated.library(KERNEL % body).run("planted", pointers, (2,), (THREADS,), constants, schedule)
    return y.bytes.view(np.float32)


@pytest.mark.parametrize("name", WRONG)
def test_some_schedule_shows_it(name):
    bug, sound, wanted = WRONG[name]
    assert not all(np.array_equal(run(bug, schedule), wanted) for schedule in range(4))
    assert all(np.array_equal(run(sound, schedule), wanted) for schedule in range(4))


@pytest.mark.parametrize("schedule", range(4))
@pytest.mark.parametrize("name", CAUGHT)
def test_kernel_is_ended(name, schedule):
    body, said = CAUGHT[name]
    if said is None:
        with pytest.raises(RuntimeError, match=r"argument n \(index 2\) is not bound, and thread \d+ of threadgroup"):
            run(body, schedule, bound=2)
    else:
        with pytest.raises(RuntimeError, match=f"planted: .*({said})"):
            run(body, schedule)
    assert np.array_equal(run(WRONG["missing barrier"][1], schedule), TURNED)            # the GPU goes on


# ---------------------------------------------------------------- the driver

class Size(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in "xyz"]


class Commands:
    """A command buffer that doubles numbers in a chain of buffers, a dispatch for each link."""

    LINKS, COUNT, DISPATCH = 4, 256, "dispatchThreadgroups:threadsPerThreadgroup:"
    SOURCE = KERNEL % "y[group * 64 + i] = x[group * 64 + i] * 2.0f + 0.0f * float(n);"

    def __init__(self, untracked=False):
        self.system = objc(True)
        self.device = self.system.system_device()
        self.queue = self.send(self.device, "newCommandQueue")
        options = self.system.new("MTLCompileOptions")
        library = self.system.made(self.device, "newLibraryWithSource:options:error:", self.string(self.SOURCE),
                                   options)
        function = self.system.made(library, "newFunctionWithName:constantValues:error:", self.string("planted"),
                                    self.system.new("MTLFunctionConstantValues"))
        self.pipeline = self.system.made(self.device, "newComputePipelineStateWithFunction:error:", function)
        self.buffers = [self.send(self.device, "newBufferWithLength:options:", 4 * self.COUNT, 256 * untracked)
                        for _ in range(self.LINKS + 1)]
        self.values = [np.ctypeslib.as_array((ctypes.c_float * self.COUNT).from_address(self.send(b, "contents")))
                       for b in self.buffers]
        self.values[0][:] = np.arange(self.COUNT)
        self.open()

    def send(self, receiver, name, *arguments, result=ctypes.c_void_p):
        assert name.count(":") == len(arguments)
        kinds = [type(a) if isinstance(a, Size) else ctypes.c_char_p if isinstance(a, bytes) else ctypes.c_void_p
                 for a in arguments]
        function = ctypes.CFUNCTYPE(result, ctypes.c_void_p, ctypes.c_void_p, *kinds)(self.system.address)
        return function(receiver, self.system.selector(name), *arguments)

    def string(self, text):
        return self.system.string(text)

    def open(self):
        self.commands = self.send(self.queue, "commandBufferWithUnretainedReferences")
        self.encoder = self.send(self.commands, "computeCommandEncoderWithDispatchType:", 1)
        self.send(self.encoder, "setComputePipelineState:", self.pipeline)

    def chain(self, barriers=True, groups=4, threads=64, bind=(0, 1, 2)):
        for link in range(self.LINKS):
            if 0 in bind:
                self.send(self.encoder, "setBuffer:offset:atIndex:", self.buffers[link + 1], 0, 0)
            if 1 in bind:
                self.send(self.encoder, "setBuffer:offset:atIndex:", self.buffers[link], 0, 1)
            if 2 in bind:
                self.send(self.encoder, "setBytes:length:atIndex:", np.int32(self.COUNT).tobytes(), 4, 2)
            self.send(self.encoder, self.DISPATCH, Size(groups, 1, 1), Size(threads, 1, 1))
            if barriers:
                self.send(self.encoder, "memoryBarrierWithScope:", 1)

    def commit(self):
        self.send(self.encoder, "endEncoding")
        self.send(self.commands, "commit")

    def error(self):
        """Waits; what the command buffer failed of."""
        self.send(self.commands, "waitUntilCompleted")
        error = self.send(self.commands, "error")
        return self.system.text(self.send(error, "localizedDescription")) if error else None

    def right(self):
        return np.array_equal(self.values[-1], 2.0**self.LINKS * np.arange(self.COUNT))


@pytest.mark.parametrize("seed", range(6))
def test_barriers_between_kernels_are_enough(seed):
    commands = Commands()
    emulated.load().lz_seed(seed)
    commands.chain()
    commands.commit()
    assert np.isnan(commands.values[-1]).all()             # committing only queues
    assert commands.error() is None and commands.right()


def test_missing_barrier_between_kernels():
    found = []
    for seed in range(1, 7):
        commands = Commands()
        emulated.load().lz_seed(seed)
        commands.chain(barriers=False)
        commands.commit()
        assert commands.error() is None
        found.append(commands.right())
    assert found.count(False) >= 5                         # 1 of 24 orders is right


def test_polling_ends():
    commands = Commands()
    commands.chain()
    commands.commit()
    seen = [commands.send(commands.commands, "status", result=ctypes.c_long) for _ in range(100)]
    assert set(seen) == {2, 4} and commands.right()


def long_bytes(c):
    c.send(c.encoder, "setBytes:length:atIndex:", bytes(4100), 4100, 2)


def far_index(c):
    c.send(c.encoder, "setBuffer:offset:atIndex:", c.buffers[0], 0, 31)


def far_offset(c):
    c.send(c.encoder, "setBuffer:offset:atIndex:", c.buffers[0], 4 * c.COUNT, 0)


def in_flight(c):
    c.chain()
    c.commit()
    c.send(c.buffers[2], "release")


# What is done to a command buffer, and what it fails with.
FAILS = {
    "unbound": (lambda c: c.chain(bind=(0, 1)), r"argument n \(index 2\) is not bound"),
    "past the end": (lambda c: c.chain(groups=20), "bad address"),
    "long bytes": (long_bytes, "setBytes: 4100 bytes; there can be 1 to 4096"),
    "far index": (far_index, "buffer index 31; the highest is 30"),
    "far offset": (far_offset, "offset 1024, and the buffer has 1024 bytes"),
    "freed in flight": (in_flight, "buffer 0 was released while its command buffer was in flight"),
    "no groups": (lambda c: c.chain(groups=0), "0 threadgroups of 64 threads"),
    "many threads": (lambda c: c.chain(threads=2048), "4 threadgroups of 2048 threads"),
}


@pytest.mark.parametrize("name", FAILS)
def test_command_buffer_fails(name):
    act, said = FAILS[name]
    commands = Commands()
    act(commands)
    if name != "freed in flight":
        commands.commit()
    assert re.search(said, commands.error())
    assert commands.send(commands.commands, "status", result=ctypes.c_long) == 5
    again = Commands()                                     # the queue goes on
    again.chain()
    again.commit()
    assert again.error() is None and again.right()


def test_fences_order_untracked_buffers():
    def two(wait):
        c = Commands(untracked=True)
        fence = c.send(c.device, "newFence")
        c.chain()
        c.send(c.encoder, "updateFence:", fence)
        c.commit()
        c.open()
        if wait:
            c.send(c.encoder, "waitForFence:", fence)
        c.chain()
        c.commit()
        return c.error()

    assert two(wait=True) is None
    assert re.search("does not wait for a fence", two(wait=False))


def test_messages_have_an_argument_for_each_colon():
    """The driver says so of its methods when it starts; nobody but the host can say so of the host."""
    assert all(name.count(":") == len(arguments) for name, (_, *arguments) in MESSAGES.items())


def test_errors_of_the_compiler():
    system, device = Commands().system, Commands().device
    made, library = system.made, "newLibraryWithSource:options:error:"
    options = system.new("MTLCompileOptions")
    for body, said in {"y[i] = nothing;": r"planted\.metal:6:10: error: .nothing. was not declared",
                       "int a[n]; y[i] = a[0];": r"planted\.metal:6:\d+: error: .*variable length array",
                       "y[i] = x[i]; }\nkernel int f() {": r"line 7: kernel f returns int"}.items():
        with pytest.raises(RuntimeError, match=said):
            made(device, library, system.string(KERNEL % body), options)
    good = made(device, library, system.string(KERNEL % "y[i] = float(K);"), options)
    with pytest.raises(RuntimeError, match="no function absent"):
        made(good, "newFunctionWithName:constantValues:error:", system.string("absent"), None)
    values = system.new("MTLFunctionConstantValues")
    system.send(values, "setConstantValue:type:withName:", ctypes.byref(ctypes.c_float(1)), 3, system.string("K"))
    with pytest.raises(RuntimeError, match="function constant K has data type 29, its value 3"):
        made(good, "newFunctionWithName:constantValues:error:", system.string("planted"), values)


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler -O1")
    monkeypatch.setattr(compiler, "_compiler", compiler._compiler.__wrapped__)
    with pytest.raises(UserError, match=r"needs a C\+\+17 compiler; /no/such/compiler: .*\nInstall g\+\+"):
        emulated.compile_kernels(KERNEL % "y[i] = 3.0f;")


def test_memory_must_be_whole_pages():
    c, wrap = Commands(), "newBufferWithBytesNoCopy:length:options:deallocator:"
    memory = emulated.Guarded(1 << 16)
    assert c.send(c.device, wrap, memory.bytes.ctypes.data, 1 << 16, 0, None)
    assert not c.send(c.device, wrap, memory.bytes.ctypes.data + 64, 1 << 15, 0, None)
    assert not c.send(c.device, wrap, memory.bytes.ctypes.data, 100, 0, None)


# What would crash on a Mac ends the process with a sentence.
DIES = {
    "over-release": (lambda c: [c.send(c.buffers[0], "release") for _ in range(2)],
                     "release sent to a released MTLBuffer"),
    "released pipeline": (lambda c: (c.send(c.pipeline, "release"), c.send(c.pipeline, "threadExecutionWidth")),
                          "threadExecutionWidth sent to a released MTLComputePipelineState"),
    "unknown message": (lambda c: c.send(c.queue, "makeCoffee"), "MTLCommandQueue does not know makeCoffee"),
    "commit twice": (lambda c: (c.commit(), c.send(c.commands, "commit")), "commit: twice"),
    "open encoder": (lambda c: c.send(c.commands, "commit"), "commit: an encoder is still open"),
    "drained pool": (lambda c: (pooled(c), c.commit()), "endEncoding sent to a released MTLComputeCommandEncoder"),
}


def pooled(c):
    with c.system.pool():
        c.commit()
        c.open()


@pytest.mark.parametrize("name", DIES)
def test_process_ends(name):
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
    assert done.returncode < 0 and f"emulated Metal: {DIES[name][1]}" in done.stderr


if __name__ == "__main__":
    DIES[sys.argv[1]][0](Commands())

"""The Metal runtime on the emulated device: buffers, wrapping, barriers, stretches for the CPU, errors, replay."""
from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lazulite.engine import array as mx
from lazulite.engine import cpu, metal, nn
from lazulite.engine.array.plan import NativeStep, NativeView
from lazulite.engine.array.trees import tree_map
from lazulite.engine.errors import UserError
from lazulite.engine.generate import Engine
from lazulite.engine.metal import buffers, emulated, encoders, plan, table
from lazulite.engine.metal.plan import shared
from lazulite.engine.metal.steps import Dispatch, Scratch, Step, Unsupported, View, struct
from lazulite.models.load import family

N, PAGE = 1000, buffers.PAGE
F32, F64 = cpu.DTYPES.index("float32"), cpu.DTYPES.index("float64")
ADD, MUL = (cpu.runtime().opcodes[name] for name in ("add", "mul"))


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[metal.Runtime]:
    """The emulated device's runtime, nothing cached, limits as they were."""
    monkeypatch.setenv("LAZULITE_METAL", "emulated")
    runtime = metal.runtime()
    gc.collect()
    runtime.clear_cache()
    limits = runtime.set_memory_limit(2**60), runtime.set_cache_limit(1 << 28)
    runtime.set_memory_limit(limits[0])
    yield runtime
    runtime.set_memory_limit(limits[0])
    runtime.set_cache_limit(limits[1])


def view(buffer: int, first: int = 0, n: int = N, dtype: int = F32) -> NativeView:
    return NativeView(buffer, dtype, first * (4 if dtype == F32 else 8), (n,), (1,))


def step(op: int, out: NativeView, a: NativeView, b: NativeView) -> NativeStep:
    """out = a + b or a · b"""
    return NativeStep("elementwise", [out], [a, b], [int(out.dtype == F64), 1, 0, 2, op, 2, 0, 1, 0], [])


def run(runtime: metal.Runtime, steps: list[NativeStep], arrays: list[np.ndarray], arena: int = 0) -> None:
    loaded = runtime.load(steps, 1 + len(arrays), [], arena)
    runtime.run(loaded, [0, *(a.ctypes.data for a in arrays)], [])


def parts(runtime: metal.Runtime, steps: list[NativeStep], arrays: list[np.ndarray], arena: int = 0) -> list:
    loaded = runtime.load(steps, 1 + len(arrays), [], arena)
    pointers = (ctypes.c_void_p * (1 + len(arrays)))(0, *(a.ctypes.data for a in arrays))
    loaded.bind(pointers, runtime.buffers)
    return loaded.parts(pointers, (), False)


# buffers

def test_freed_blocks_serve_again(runtime: metal.Runtime) -> None:
    active = runtime.memory()["active"]
    first = runtime.alloc(100_000)
    size, pointer = runtime.memory()["active"] - active, first.pointer
    assert 100_000 <= size <= 1.13 * 100_000 + PAGE and pointer % PAGE == 0
    del first
    assert runtime.memory()["active"] == active and runtime.memory()["cached"] >= size
    assert runtime.alloc(99_000).pointer == pointer
    runtime.clear_cache()
    assert runtime.memory()["cached"] == 0


def test_a_block_that_dies_in_a_cycle_serves_again(runtime: metal.Runtime) -> None:
    """The collector ends all objects of a cycle at once: the block must not be one of them."""
    cycle: list = [runtime.alloc(1000)]
    pointer = cycle[0].pointer
    cycle.append(cycle)
    del cycle
    gc.collect()
    block, x = runtime.alloc(1000), np.arange(N, dtype=np.float32)
    assert block.pointer == pointer
    plan = runtime.load([step(ADD, view(2, n=250), view(1, n=250), view(1, n=250))], 3, [], 0)
    runtime.run(plan, [0, x.ctypes.data, block.pointer], [])
    assert ((ctypes.c_float * 250).from_address(block.pointer)[249]) == 498


def test_limits(runtime: metal.Runtime) -> None:
    """Beyond them freed blocks go back to the system."""
    assert runtime.set_cache_limit(PAGE) == 1 << 28
    del [blocks := [runtime.alloc(4 * PAGE) for _ in range(3)]][0]
    blocks.clear()
    assert runtime.memory()["cached"] <= PAGE
    runtime.set_cache_limit(1 << 28)
    runtime.alloc(8 * PAGE)
    assert runtime.memory()["cached"] >= 8 * PAGE
    runtime.set_memory_limit(runtime.memory()["active"] + 16 * PAGE)
    big = runtime.alloc(16 * PAGE)
    assert runtime.memory()["cached"] == 0 and big.nbytes == 16 * PAGE
    with pytest.raises(MemoryError, match=r"\[metal\] no buffer of \d+ bytes"):
        runtime.alloc(1 << 60)


def test_a_buffer_may_die_in_any_thread(runtime: metal.Runtime) -> None:
    """Also while another one runs a plan: a collector's pause in a compiler's thread once stood still here."""
    held = [runtime.alloc(100)]
    with runtime._lock:
        thread = threading.Thread(target=held.clear, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()


def test_memory_of_others_is_bound_where_it_lies(runtime: metal.Runtime) -> None:
    """NumPy's, of the CPU's runtime, in the middle of a page, several in a page; and it is let go with its owner."""
    page = np.zeros(4096, np.float32)
    page[:3 * N] = np.arange(3 * N)
    run(runtime, [step(ADD, view(3), view(1), view(2))], [page[:N], page[N:2 * N], page[2 * N:3 * N]])
    assert (page[2 * N:3 * N] == np.arange(N) + np.arange(N, 2 * N)).all()
    other = mx.exp(mx.zeros((N,)))
    mx.eval(other)
    before = len(runtime.buffers.regions)
    with mx.stream(mx.gpu):
        assert mx.sum(mx.array(page[:N]) + other).item() == page[:N].sum() + N
        assert len(runtime.buffers.regions) > before
        assert (np.asarray(other) == 1).all()
        del other
        gc.collect()
    runtime.clear_cache()
    assert len(runtime.buffers.regions) <= before


def test_an_address_that_comes_back_is_other_memory(runtime: metal.Runtime) -> None:
    """Regions are looked up again once one has gone."""
    steps, out = [step(ADD, view(2), view(1), view(1))], np.zeros(N, np.float32)
    loaded = runtime.load(steps, 3, [], 0)
    for number in range(3):
        a = np.full(N, number, np.float32)
        runtime.run(loaded, [0, a.ctypes.data, out.ctypes.data], [])
        assert (out == 2 * number).all() and not runtime.buffers.held
        del a


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_what_is_not_aligned_runs_on_the_cpu(runtime: metal.Runtime, shift: int) -> None:
    x, out = np.zeros(4 * N + 4, np.uint8)[shift:4 * N + shift].view(np.float32), np.zeros(N, np.float32)
    x[:] = np.arange(N)
    assert x.ctypes.data % 4
    run(runtime, [step(MUL, view(2), view(1), view(1))], [x, out])
    assert (out == np.arange(N) ** 2).all()


# barriers

B0, B1, B2, B3 = (view(i) for i in range(4))
BARRIERS = {
    "a chain": ([step(ADD, B2, B1, B1), step(ADD, B3, B2, B2)], [False, True]),
    "two readers": ([step(ADD, B2, B1, B1), step(ADD, B3, B1, B1)], [False, False]),
    "write after read": ([step(ADD, B2, B1, B1), step(ADD, B1, B3, B3)], [False, True]),
    "write after write": ([step(ADD, B2, B1, B1), step(MUL, B2, B3, B3)], [False, True]),
    "other bytes of a buffer": ([step(ADD, view(0, 0), B1, B1), step(ADD, view(0, N), B2, B2)], [False, False]),
    "one byte in common": ([step(ADD, view(0, 0), B1, B1), step(ADD, view(0, N - 1), B2, B2)], [False, True]),
    "one barrier for two": ([step(ADD, view(0, 0), B1, B1), step(ADD, view(0, N), B2, B2),
                             step(ADD, B3, view(0, 0), view(0, N)), step(MUL, B1, B2, B2)],
                            [False, False, True, False]),
    "nothing": ([step(ADD, B2, B1, B1), step(ADD, view(2, 0, 0), B1._replace(shape=(0,)), view(3, 0, 0))], [False]),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_a_barrier_stands_where_ranges_meet_and_nowhere_else(runtime: metal.Runtime, name: str) -> None:
    steps, want = BARRIERS[name]
    [(_, made)] = parts(runtime, steps, [np.zeros(N, np.float32) for _ in range(3)], 8 * N)
    assert made.barriers == want


RANGES = [([(0, 4, True), (4, 8, False)], False), ([(0, 5, True), (4, 8, False)], True), ([], False),
          ([(0, 8, False), (2, 4, False)], False), ([(0, 8, False), (2, 4, True)], True),
          ([(0, 9, False), (1, 2, False), (3, 4, True)], True), ([(5, 6, True), (0, 2, True)], False)]


@pytest.mark.parametrize(("ranges", "want"), RANGES)
def test_shared_memory_is_seen(ranges: list, want: bool) -> None:
    assert shared(ranges) is want


def test_buffers_that_share_memory_are_run_one_step_after_the_other(runtime: metal.Runtime) -> None:
    """As a donated input and another view of it: numbers of buffers do not tell."""
    memory = np.zeros(2 * N, np.float32)
    steps = [step(ADD, B3, B1, B1), step(MUL, view(2, 0, 5), view(0, 0, 5), view(0, 0, 5))]
    for second, want in ((memory[N:], [False, False]), (memory[10:], [False, True])):
        [(_, made)] = parts(runtime, steps, [memory[:N], second, np.zeros(N, np.float32)], 4 * N)
        assert made.barriers == want


def test_donation(runtime: metal.Runtime) -> None:
    """A result in its input's memory, while another result still reads what was there."""
    for _ in range(4):
        with mx.stream(mx.gpu):
            x = mx.array(np.arange(N, dtype=np.float32))
            y = mx.cumsum(x) + x[::-1]
            x = x * 2 + y
            assert np.array_equal(np.asarray(x), np.arange(N) * 2 + np.cumsum(np.arange(N)) + np.arange(N)[::-1])


def test_a_missing_barrier_gives_wrong_numbers(runtime: metal.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds the barriers to be right: the emulated GPU runs dispatches in any order between them."""
    chain = [step(ADD, view(0, i * N), view(0, (i - 1) * N) if i else B1, B1) for i in range(4)]
    chain.append(step(ADD, B2, view(0, 3 * N), B1))
    x, out, wrong = np.zeros(N, np.float32), np.zeros(N, np.float32), 0
    for broken in (False, True):
        with monkeypatch.context() as patch:
            if broken:
                patch.setattr(table.Hazards, "meet", lambda *_: False)
            for _ in range(8):
                x += 1
                run(runtime, chain, [x, out], 16 * N)
                wrong += not (out == 6 * x).all()
        assert (wrong > 0) == broken


# stretches for the CPU

def test_steps_that_metal_cannot_do_run_on_the_cpu(runtime: metal.Runtime, capfd: pytest.CaptureFixture[str]) -> None:
    """In the same memory, in order, said once."""
    plan.say.cache_clear()
    wide = [NativeView(3, F64, 0, (N,), (1,)), NativeView(4, F64, 0, (N,), (1,))]
    steps = [step(ADD, view(0), B1, B1), step(ADD, wide[1], wide[0], wide[0]), step(ADD, B2, view(0), B1)]
    arrays = [np.ones(N, np.float32), np.zeros(N, np.float32), np.ones(N), np.zeros(N)]
    kinds = [type(part).__name__ for _, part in parts(runtime, steps, arrays, 4 * N)]
    assert kinds == ["Table", "Plan", "Table"]
    for _ in range(2):
        run(runtime, steps, arrays, 4 * N)
    assert (arrays[1] == 3).all() and (arrays[3] == 2).all()
    assert capfd.readouterr().err == "[metal] elementwise runs on the CPU: float64 or complex numbers\n"


def test_a_run_is_done_when_it_is_waited_for(runtime: metal.Runtime) -> None:
    """`start` only commits; runs follow one another in order."""
    x = mx.placeholder((N,), mx.float32)
    with mx.stream(mx.gpu):
        executable = mx.lower([x * 2 + 1], [x], donate=[x]).load()
    memory = np.zeros(N, np.float32)
    executable.set_input(0, memory)
    for _ in range(5):
        executable.start()
    executable.wait()
    assert (memory == 31).all()


def test_the_profile_has_a_time_for_every_step(runtime: metal.Runtime) -> None:
    with mx.stream(mx.gpu), mx.profile() as times:
        mx.eval(mx.sum(mx.exp(mx.array(np.ones((64, 64), np.float32))), axis=-1))
    assert sum(row.calls for row in times.rows) >= 2 and all(row.microseconds > 0 for row in times.rows)


# errors

BAD = [("kernel void f(device float* y [[buffer(0)]]) { y[0] = nothing; }", "nothing"),
       ("kernel void g(device float* y [[buffer(0)]]) { y[0] = 1.0f; }", "f")]


@pytest.mark.parametrize(("source", "word"), BAD)
def test_the_compilers_words_are_the_errors(runtime: metal.Runtime, source: str, word: str) -> None:
    bad = Dispatch("planted", "f", {}, (1, 1, 1), (32, 1, 1), source=source)
    with pytest.raises(RuntimeError, match=rf"(?s)\[metal\] planted\.metal.*{word}"):
        runtime.device.pipeline(bad)


def test_too_many_threads_are_for_the_cpu(runtime: metal.Runtime) -> None:
    source = "kernel void f(device float* y [[buffer(0)]]) { y[0] = 1.0f; }"
    with pytest.raises(Unsupported, match="f needs 2048 threads a threadgroup"):
        runtime.device.pipeline(Dispatch("planted", "f", {}, (1, 1, 1), (2048, 1, 1), source=source))


def test_a_command_buffer_that_fails_says_so(runtime: metal.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Metal's words and the kernels; the next run is not touched."""
    source = "kernel void f(device float* y [[buffer(0)]], device float* missing [[buffer(1)]]) { missing[0] = 1.0f; }"

    def encode(given: Step) -> list[Dispatch]:
        return [Dispatch("planted", "f", {"y": given.outputs[0]}, (1, 1, 1), (32, 1, 1), source=source)]

    arrays = [np.ones(N, np.float32), np.zeros(N, np.float32)]
    with monkeypatch.context() as patch:
        patch.setitem(encoders.ENCODERS, "elementwise", encode)
        with pytest.raises(RuntimeError, match=r"(?s)\[metal\] .*missing.*it ran elementwise"):
            run(runtime, [step(ADD, B2, B1, B1)], arrays)
    run(runtime, [step(ADD, B2, B1, B1)], arrays)
    assert (arrays[1] == 2).all()


def test_no_metal_here() -> None:
    with pytest.raises(UserError, match=r"there is no Metal on \w+\nLAZULITE_METAL=emulated"):
        metal.Runtime(emulated=False)


def test_what_the_device_says(runtime: metal.Runtime) -> None:
    info = mx.device_info(mx.gpu)
    assert info["device_name"] and info["architecture"] == runtime.isa and mx.metal.is_available()
    sizes = [info[name] for name in ("memory_size", "max_buffer_length", "max_recommended_working_set_size")]
    assert min(sizes) > 1 << 28
    with mx.stream(mx.gpu):
        before = mx.set_wired_limit(1 << 30)
        assert mx.set_wired_limit(before) == 1 << 30 and before == info["max_recommended_working_set_size"]
        assert mx.get_memory_limit() == runtime.buffers.limit


# scratch memory, objects, replay

def test_scratch_memory_is_hazardous_and_reused(runtime: metal.Runtime) -> None:
    """A step's second dispatch waits for its first; two scratches of a step do not share bytes."""
    source = """kernel void f(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                              uint i [[thread_position_in_grid]]) { y[i] = x[i] + 1.0f; }"""
    x, y = View(1, "float32", 0, (64,), (1,)), View(2, "float32", 0, (64,), (1,))
    one, two = Scratch(256), Scratch(100)

    def dispatch(a: View | Scratch, b: View | Scratch) -> Dispatch:
        return Dispatch("planted", "f", {"x": a, "y": b}, (2, 1, 1), (32, 1, 1), source=source)

    made, hazards = table.Table(runtime.device, 3), table.Hazards(False)
    for _ in range(2):
        made.step(Step("f", (y,), (x,)), [dispatch(x, one), dispatch(x, two), dispatch(one, y)], hazards)
    assert made.barriers == [False, False, True, True, False, True] and made.scratch_bytes == 512


def test_no_object_is_left(runtime: metal.Runtime) -> None:
    """Runs, arrays, failures and plans come and go; what was compiled stays."""
    live = emulated.load().lz_live

    def use() -> int:
        with mx.stream(mx.gpu):
            x = mx.array(np.ones(5 * PAGE, np.float32))
            for _ in range(3):
                mx.eval(mx.sum(x * 2, axis=-1), x + 1)
        with pytest.raises(RuntimeError):
            runtime.device.pipeline(Dispatch("planted", "f", {}, (1, 1, 1), (32, 1, 1), source=BAD[1][0]))
        del x
        gc.collect()
        runtime.clear_cache()
        return live()

    use()
    assert use() == use()


def test_replay_takes_a_tenth_of_a_microsecond_a_kernel(runtime: metal.Runtime) -> None:
    """On messages to nil, which cost what finding a method costs: 300 kernels of five buffers, bytes and a barrier."""
    made = table.Table(runtime.device, 9)
    hazards = table.Hazards(True)
    views = [View(i, "float32", 0, (32,), (1,)) for i in range(1, 6)]
    source = "kernel void f({}) {{ a4[0] = 1.0f; }}".format(", ".join(
        [*(f"device {'' if i == 4 else 'const '}float* a{i} [[buffer({i})]]" for i in range(5)),
         "constant int& p [[buffer(5)]]"]))
    for i in range(300):
        arguments = {f"a{k}": views[(k + i) % 5] for k in range(5)} | {"p": struct(i)}
        dispatch = Dispatch("planted", "f", arguments, (1, 1, 1), (32, 1, 1), {"EVEN": i % 2}, source=source)
        made.step(Step("f", (), ()), [dispatch], hazards)
    made.finish()
    assert len(made) >= 300 * 9
    objects, places, offsets = (ctypes.c_void_p * 3)(), (ctypes.c_void_p * 11)(), (ctypes.c_uint64 * 11)()
    best = 1.0
    for _ in range(20):
        begin = time.perf_counter()
        runtime._replay(runtime.device.objc.address, made.native, len(made), objects, places, offsets)
        best = min(best, time.perf_counter() - begin)
    print(f"{1e6 * best / 300:.3f} µs a kernel of {len(made) / 300:.0f} messages")
    assert best / 300 <= 0.1e-6


# golden tables

GOLDEN = Path(__file__).with_name("golden")
LAYERS = {
    "llama": dict(model_type="llama", hidden_size=2048, num_attention_heads=32, num_key_value_heads=8,
                  intermediate_size=8192),
    "qwen3": dict(model_type="qwen3", hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                  intermediate_size=3072),
}


def zeros(a: mx.Array) -> mx.Array:
    """As a 4-bit folder of MLX has it: codes, and bfloat16 for the rest."""
    dtype = mx.uint32 if a.dtype == mx.uint32 else mx.bfloat16
    return mx.asarray(np.zeros(a.shape, f"u{dtype.size}")).view(dtype)


def decode_steps(config: dict) -> list[Step]:
    """The steps of one token of a model with 4-bit weights."""
    kind = family(config["model_type"])
    with nn.loading():
        model = kind(kind.config_class.from_dict(config | dict(vocab_size=1024, max_position_embeddings=4096)))
        nn.quantize(model, 64, 4)
    model.update(tree_map(zeros, model.parameters()))
    native = Engine(model, max_context=2048).plan
    return [plan.at(plan.read(s), [1] * len(native.dims), 1024) for s in native.native(cpu.runtime().opcodes)]


def text(step: Step, d: Dispatch) -> str:
    return f"{step.kernel:14s} -> {d.file + '.metal ' + d.function:27s} {d.groups} groups of {d.threads} threads"


@pytest.mark.parametrize("name", LAYERS)
def test_a_decode_layer_is_six_dispatches(name: str) -> None:
    """LAZULITE_GOLDEN=update rewrites the table of a layer's dispatches."""
    one, two = (decode_steps(LAYERS[name] | dict(num_hidden_layers=n)) for n in (1, 2))
    made = [[(step, d) for step in steps for d in encoders.encode(step)] for steps in (one, two)]
    assert len(made[1]) - len(made[0]) == 6
    table, file = "\n".join(text(*row) for row in made[0]) + "\n", GOLDEN / f"{name}_decode.txt"
    if os.environ.get("LAZULITE_GOLDEN") == "update":
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(table)
    assert table == file.read_text(), f"{file.name} differs; LAZULITE_GOLDEN=update rewrites it"

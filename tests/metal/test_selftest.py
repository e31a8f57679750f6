"""`llm selftest metal`: what passes, what fails and how it is said; and the prediction, against arithmetic by hand."""
import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from lazulite.cli import llm
from lazulite.cli.selftest import DEPTH, MODELS, decode_steps, predicted, summary, table
from lazulite.engine import cpu, metal
from lazulite.engine.errors import UserError
from lazulite.engine.metal import predict, selftest
from lazulite.engine.metal.encoders import encode
from lazulite.engine.metal.steps import SIZES, Step, View
from lazulite.engine.metal.vectors import Vector, bind, compare, results, rounded


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> metal.Runtime:
    monkeypatch.setenv("LAZULITE_METAL", "emulated")
    return metal.runtime()


def softmax(**changes: object) -> Vector:
    x = np.array([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]], np.float32)
    wanted = np.exp(x, dtype=float) / np.exp(x, dtype=float).sum(-1, keepdims=True)
    vector = Vector("softmax-test", "softmax", [np.zeros((2, 3), np.float32)], [x], [], [], [wanted], 1e-6)
    return replace(vector, **changes)


def test_a_right_vector_passes_and_a_wrong_one_is_told(runtime: metal.Runtime) -> None:
    wrong = softmax(expected=[np.full((2, 3), 0.25)], tolerance=0.1)
    right, told = (checked.wrong for checked in selftest.check(runtime, [softmax(), wrong]))
    assert right is None
    assert told.startswith("softmax-test: output 0[0, 0] is 0.09003") and "0.25 wanted within 0.1; 2 of 6" in told


def test_what_the_cpu_runs_is_told(runtime: metal.Runtime) -> None:
    x = np.arange(6.0).reshape(2, 3)
    [checked] = selftest.check(runtime, [Vector("sort", "sort", [np.zeros((2, 3))], [x], [0], [], [x], 0)])
    assert checked.wrong is None and checked.elsewhere.startswith("sort: ")


@pytest.mark.parametrize(("found", "wanted", "tolerance", "right"), [
    (np.float32([1, np.nan, np.inf]), np.array([1, np.nan, np.inf]), 0, True),
    (np.float32([np.nan]), np.array([1.0]), 1, False),
    (np.float32([-np.inf]), np.array([np.inf]), 1, False),
    (np.float32([100.1]), np.array([100.0]), 2e-3, True),                      # relative above 1
    (np.float32([100.3]), np.array([100.0]), 2e-3, False),
    (np.float32([0.001]), np.array([0.0]), 2e-3, True),                        # absolute below
    (np.uint64([2**63 + 1]), np.uint64([2**63]), 0, False),                    # float64 cannot tell these apart
    (np.float32([1, 2]), np.array([1.0]), 9, False),
])
def test_compare(found: np.ndarray, wanted: np.ndarray, tolerance: float, right: bool) -> None:
    vector = Vector("v", "k", [found], [], [], [], [wanted], tolerance)
    assert (compare(vector, [found]) is None) is right


def test_bind_keeps_shared_memory_shared() -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    bits, exact = rounded(np.array([1.0, 1.00390625, -3.0]), "bfloat16")       # the second is a tie, to even
    assert exact.tolist() == [1.0, 1.0, -3.0]
    step, memory = bind(Vector("v", "k", [base[1:, ::2]], [base.T, bits], [1], [2], [None], 0))
    assert [view.buffer for view in (*step.outputs, *step.inputs)] == [0, 0, 1]
    assert step.outputs[0] == View(0, "float32", 24, (3, 3), (6, 2)) and step.inputs[0].strides == (1, 6)
    assert results(step, memory)[0].tolist() == base[1:, ::2].tolist()
    memory[0][:] = 0
    assert base[1, 0] == 6                                 # the vector itself is not touched


def test_cases_are_steps_that_the_gpu_can_do() -> None:
    for case in selftest.cases(cpu.runtime().opcodes):
        step, memory = bind(case.vector)
        assert encode(step), case.vector.id
        selftest.load(cpu.runtime(), [step], len(memory))  # checks the step


def test_measuring(runtime: metal.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "STREAMED", 300)
    monkeypatch.setattr(selftest, "cases", lambda opcodes: [selftest.Case(softmax(), operations=60)])
    [row] = selftest.speeds(runtime)
    assert row["kernel"] == "softmax-test" and row["% of peak GB/s"] is None and row["% of x + x"] == 100
    assert row["GB/s"] == pytest.approx(48 / row["µs"] / 1e3) and row["TFLOP/s"] == pytest.approx(60 / row["µs"] / 1e6)


def test_percentages_are_of_the_chip() -> None:
    case = selftest.Case(softmax(), operations=26 * 10**9)
    row = selftest.speed(case, 48 / 34.125e9, "Apple M1")
    assert row["% of peak GB/s"] == pytest.approx(50)
    assert selftest.speed(case, 0.1, "Apple M1")["% of peak TFLOP/s"] == pytest.approx(10)
    assert selftest.speed(case, 0.1, "Apple M5")["% of peak TFLOP/s"] is None


def test_summary_of_a_real_device() -> None:
    row = {"kernel": "matmul", "µs": 12.345, "GB/s": 100.4, "% of x + x": 99.6, "% of peak GB/s": 50.2, "TFLOP/s": 0.0,
           "% of peak TFLOP/s": None}
    text = summary({"device": "Apple M1", "architecture": "g13g", "system": "macOS-15", "version": "1", "passed": 3,
                    "failed": [], "elsewhere": ["sort: no kernel"] * 2, "emulated": False, "speeds": [row]})
    assert text.startswith("**Apple M1**, g13g, macOS-15, lazulite 1: 3 checks passed, 0 failed.\n* The CPU runs sort:")
    assert "| matmul | 12.3 |  100 |        100 |             50 |       – |                 – |" in text


def llm_selftest(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(llm, ["selftest", "metal", *arguments])
    return result.exit_code, result.stdout


def test_command_on_the_emulated_device(runtime: metal.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazulite.engine.metal.vectors.FILES", ["norm"])
    code, text = llm_selftest("-k", "softmax")
    assert code == 0 and "emulated" in text and " 0 failed" in text and "nothing is measured" in text
    code, text = llm_selftest("-k", "softmax", "--json")
    report = json.loads(text)
    assert code == 0 and report["emulated"] and report["passed"] > 0 and report["failed"] == report["speeds"] == []


def test_a_failure_is_exit_code_1(runtime: metal.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazulite.engine.metal.vectors.vectors", lambda: [softmax(expected=[np.zeros((2, 3))])])
    code, text = llm_selftest()
    assert code == 1 and "1 failed" in text and "* softmax-test: output 0[0, 0] is 0.09" in text


def test_no_metal_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAZULITE_METAL", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(metal, "runtime", metal.runtime.__wrapped__)           # not the one that other tests have
    result = CliRunner().invoke(llm, ["selftest", "metal"])
    assert result.exit_code == 1 and isinstance(result.exception, UserError) and "no Metal" in str(result.exception)


def view(*shape: int, dtype: str = "float32", buffer: int = 0) -> View:
    strides = tuple(int(np.prod(shape[i + 1:])) for i in range(len(shape)))
    return View(buffer, dtype, 0, shape, strides)


PAGES = view(9, 2, 16, 32, dtype="float16", buffer=1), view(9, 2, 32, 16, dtype="float16", buffer=2)
TOKENS = view(3, dtype="int32", buffer=3)
MOVED = [  # bytes by hand; PAGES have 2 heads of 16: 64 bytes a token each for k and v
    (Step("rms_norm", (view(3, 8),), (view(3, 8), view(8))), 4 * (24 + 24 + 8)),
    (Step("elementwise", (view(3, 8),), (View(0, "float32", 0, (3, 8), (0, 1)),)), 4 * (24 + 8)),
    (Step("take", (view(3, 8),), (view(100, 8), TOKENS)), 4 * (24 + 24)),
    (Step("quantized_take", (view(3, 64),), (view(100, 8, dtype="uint32"), view(100, 1), view(100, 1), TOKENS)),
     4 * (192 + 3 * (8 + 1 + 1))),
    (Step("rope_append", (view(3, 4, 16), *PAGES),
          (view(3, 4, 16), view(3, 2, 16), view(3, 2, 16), *PAGES, TOKENS, TOKENS), (0, 0, 0)),
     4 * (2 * 192 + 2 * 96 + 6) + 3 * 2 * 64),
    (Step("paged_attention", (view(1, 4, 16),),
          (view(1, 4, 16), *PAGES, view(1, 9, dtype="int32"), TOKENS, TOKENS, TOKENS), (0, 1, 0, 0)),
     4 * (2 * 64 + 9 + 9) + 200 * 2 * 64),
]


@pytest.mark.parametrize(("step", "nbytes"), MOVED, ids=[step.kernel for step, _ in MOVED])
def test_bytes_of_a_step(step: Step, nbytes: int) -> None:
    assert predict.moved(step, depth=200) == nbytes


def test_prediction_is_the_model_applied_to_the_plan() -> None:
    """A 4-bit Llama of 1 B: the weights of the layers and of the head, the cache, and six dispatches a layer."""
    report = next(m for m in predicted()["models"] if m["model"] == "Llama-3.2-1B")
    c, kv, ffn, vocabulary, layers = 2048, 512, 8192, 128256, 16
    weights = layers * (2 * c * c + 2 * c * kv + 3 * c * ffn) + vocabulary * c
    cache = layers * DEPTH * 2 * kv * 2
    assert report["bytes"] == pytest.approx(weights * 4.5 / 8 + cache, rel=0.01)
    assert report["dispatches_per_layer"] == 6 and 6 * layers < report["dispatches"] < 6 * layers + 8
    speed = next(row for row in report["chips"] if row["chip"] == "M4 Max")["tokens_per_second"]
    assert 1 / speed == pytest.approx(report["bytes"] / (0.85 * 546e9) + report["dispatches"] * 2.4e-6 + 20e-6)


@pytest.mark.parametrize("name", MODELS)
def test_every_step_of_a_decode_plan_has_numbers_for_sizes(name: str) -> None:
    steps = decode_steps(MODELS[name] | {"num_hidden_layers": 1})
    assert sum(step.kernel == "linear" for step in steps) == 5                 # qkv, o, gate and up, down, head
    assert all(n >= 0 for step in steps for v in (*step.outputs, *step.inputs) for n in v.shape)
    assert all(v.dtype in SIZES for step in steps for v in step.inputs)


def test_prediction_says_what_it_is() -> None:
    code, text = llm_selftest("--predict")
    assert code == 0 and text.startswith("A PREDICTION") and all(chip.name in text for chip in predict.CHIPS)
    assert "6 dispatches a layer" in text and "(145.8)" in text


def test_table() -> None:
    assert table(["a", "µs"], [["kernel", "1.5"], ["k", "–"]]) == (
        "| a      |  µs |\n| ------ | --: |\n| kernel | 1.5 |\n| k      |   – |")

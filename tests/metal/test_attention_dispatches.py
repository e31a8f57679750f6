"""Which dispatches paged_attention becomes, by what the host knows; and that knowing does not change what comes out."""
from dataclasses import replace

import pytest

from lazulite.engine.metal import emulated
from lazulite.engine.metal.attention import SHORT, paged_attention
from lazulite.engine.metal.steps import Step, View
from lazulite.engine.metal.vectors import bind, compare, results, vectors

BATCHES = [  # tokens, sequences, pages of the table, longest sequence if known -> functions
    (1, 1, 32, None, ["decode"]), (1, 1, 33, None, ["decode", "merge"]), (1, 1, 33, SHORT, ["decode"]),
    (8, 1, 4096, SHORT, ["decode"]), (9, 1, 4096, SHORT, ["decode", "prefill"]), (9, 9, 4096, SHORT, ["decode"]),
    (64, 64, 4096, None, ["decode", "merge"]), (512, 512, 4096, None, ["decode"]),
    (512, 1, 4096, SHORT, ["decode", "prefill"]), (512, 1, 4096, None, ["decode", "merge", "prefill"]),
]


def step(tokens: int, sequences: int, width: int, longest: int | None) -> Step:
    def view(dtype: str, *shape: int) -> View:
        strides = [1]
        for n in reversed(shape[1:]):
            strides.insert(0, strides[0] * n)
        return View(0, dtype, 0, shape, tuple(strides))

    q, pages = view("float32", tokens, 16, 128), [view("float16", 99, 8, *page) for page in ((128, 32), (32, 128))]
    numbers = [view("int32", sequences) for _ in range(3)]
    inputs = q, *pages, view("int32", sequences, width), *numbers
    return Step("paged_attention", (q,), inputs, (0, 1, 0, 0), (0.1, 0.0), longest)


@pytest.mark.parametrize("tokens, sequences, width, longest, functions", BATCHES)
def test_functions(tokens: int, sequences: int, width: int, longest: int | None, functions: list[str]) -> None:
    assert [d.function for d in paged_attention(step(tokens, sequences, width, longest))] == functions


def test_every_number_of_tokens_shares_few_pipelines() -> None:
    steps = [step(tokens, tokens, 4096, None) for tokens in range(1, 513)]
    pipelines = {(d.function, *d.constants.values()) for s in steps for d in paged_attention(s)}
    assert len(pipelines) <= 12


def test_short_sequences_of_a_wide_table_need_no_parts() -> None:
    wide = [v for v in vectors("attention") if v.kernel == "paged_attention" and v.inputs[3].shape[1] * 32 > SHORT]
    assert wide
    for vector in wide:
        known, buffers = bind(vector)
        emulated.run(paged_attention, replace(known, longest=SHORT), buffers, 2)   # right, if not fast, of any length
        assert compare(vector, results(known, buffers)) is None

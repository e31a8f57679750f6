"""`llm selftest`: a backend's kernels on this machine's device against what they must give, and against its limits."""

import json
from typing import Any

import click

SHARED = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
QWEN3 = SHARED | {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
                  "rope_theta": 1e6, "tie_word_embeddings": True}
LLAMA3 = SHARED | {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
                   "rope_theta": 5e5}
MODELS: dict[str, dict[str, Any]] = {  # as in their config.json
    "Qwen3-0.6B": QWEN3 | {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
                           "intermediate_size": 3072},
    "Llama-3.2-1B": LLAMA3 | {"hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64, "intermediate_size": 8192,
                              "tie_word_embeddings": True},
    "Qwen3-4B": QWEN3 | {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32,
                         "intermediate_size": 9728},
    "Qwen3-8B": QWEN3 | {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
                         "intermediate_size": 12288, "tie_word_embeddings": False},
    "Llama-3.1-8B": LLAMA3 | {"hidden_size": 4096, "num_hidden_layers": 32, "head_dim": 128,
                              "intermediate_size": 14336, "tie_word_embeddings": False},
}
DEPTH = 1024  # tokens in the cache


@click.command(name="selftest")
@click.argument("backend", type=click.Choice(["metal"]))
@click.option("-k", "words", metavar="TEXT", default="", help="Only the checks whose name contains this.")
@click.option("--predict", "only_predict", is_flag=True, help="Print predicted decode speeds instead; needs no device.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when done, and nothing else.")
def command(backend: str, words: str, only_predict: bool, as_json: bool) -> None:
    """Checks a backend's kernels on this machine's device, then measures them.

    Small inputs are compared with float64; calls of real sizes with the chip's memory bandwidth and arithmetic. The
    report is Markdown, to be pasted into an issue. LAZULITE_METAL=emulated checks without a Mac.
    """
    report = predicted() if only_predict else tested(words, as_json)
    click.echo(json.dumps(report) if as_json else (prediction if only_predict else summary)(report))
    if report.get("failed"):
        raise click.exceptions.Exit(1)


def tested(words: str, quiet: bool) -> dict[str, Any]:
    """What the device is, which checks failed, and how fast the kernels are."""
    from rich.console import Console
    from rich.progress import Progress

    from ..engine import metal
    from ..engine.metal import selftest, vectors

    runtime = metal.runtime()
    chosen = [vector for vector in vectors.vectors() if words in vector.id]
    report = selftest.about(runtime) | {"passed": 0, "failed": [], "elsewhere": [], "speeds": []}
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        for checked in progress.track(selftest.check(runtime, chosen), len(chosen), description="checking"):
            report["failed"] += [checked.wrong] if checked.wrong else []
            report["elsewhere"] += [checked.elsewhere] if checked.elsewhere else []
            report["passed"] += not (checked.wrong or checked.elsewhere)
        if not report["emulated"]:
            report["speeds"] += progress.track(selftest.speeds(runtime), description="measuring")
    return report


def summary(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "**{device}**, {architecture}, {system}, lazulite {version}: {passed} checks passed, ".format(**report)
        + f"{len(report['failed'])} failed.",
        *(f"* {sentence}" for sentence in report["failed"]),
        *(f"* The CPU runs {reason}" for reason in sorted(set(report["elsewhere"]))),
    ]
    if report["emulated"]:
        lines.append("This device is emulated on the CPU: nothing is measured.")
    rows = [[format.format(row[name]) if row[name] else "–" for name, format in COLUMNS.items()]
            for row in report["speeds"]]  # fmt: skip
    if rows:
        lines += ["", table(list(COLUMNS), rows), "", "x + x is the first row; peaks are those of the full chip."]
    return "\n".join(lines)


COLUMNS = {"kernel": "{}", "µs": "{:.1f}", "GB/s": "{:.0f}", "% of x + x": "{:.0f}", "% of peak GB/s": "{:.0f}",
           "TFLOP/s": "{:.2f}", "% of peak TFLOP/s": "{:.0f}"}  # fmt: skip


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column to the left."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    head = [columns, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *rows]
    sides = [str.ljust, *[str.rjust] * (len(columns) - 1)]
    cells = ([side(text, width) for side, text, width in zip(sides, row, widths, strict=True)] for row in head)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def predicted() -> dict[str, Any]:
    """Tokens per second of each model on each chip, after DEPTH tokens, by the model of engine.metal.predict."""
    from ..engine.metal.predict import CHIPS, PUBLISHED, seconds, work

    report: dict[str, Any] = {"prediction": True, "depth": DEPTH, "models": []}
    for name, config in MODELS.items():
        one, two = (work(decode_steps(config | {"num_hidden_layers": n}), DEPTH) for n in (1, 2))
        layer, layers = two.less(one), config["num_hidden_layers"]
        whole = one + layer.times(layers - 1)
        chips: list[dict[str, Any]] = []
        for chip in CHIPS:
            published = zip(("published", "engine", "source"), PUBLISHED.get((chip.name, name), ()), strict=False)
            rate = 1 / seconds(whole, chip.bandwidth)
            chips.append({"chip": chip.name, "tokens_per_second": rate, **dict(published)})
        report["models"].append({
            "model": name, "layers": layers, "dispatches_per_layer": layer.dispatches, "dispatches": whole.dispatches,
            "bytes": whole.bytes, "elsewhere": sorted(whole.elsewhere), "chips": chips,
        })  # fmt: skip
    return report


def prediction(report: dict[str, Any]) -> str:
    """The prediction as Markdown: a row for each chip, published rates of others beside ours."""
    models, lines = report["models"], []
    for m in models:
        line = "{model}: {dispatches_per_layer} dispatches a layer, {dispatches} a token, {bytes:,} bytes".format(**m)
        lines.append(line + "".join(f"; the CPU runs {kernel}" for kernel in m["elsewhere"]))
    cell = lambda row: f"{row['tokens_per_second']:.0f}" + (f" ({row['published']})" if "published" in row else "")  # noqa: E731
    rows = [[chips[0]["chip"], *map(cell, chips)] for chips in zip(*(m["chips"] for m in models), strict=True)]
    sources = sorted({f"{r['source']}: {r['engine']}" for m in models for r in m["chips"] if "published" in r})
    return "\n".join([
        "A PREDICTION, not a measurement: no Apple GPU has run this. Tokens per second of one sequence, 4 bits in",
        f"groups of 64, after {DEPTH} tokens: seconds = bytes / (0.85 · bandwidth) + dispatches · 2.4 µs + 20 µs.",
        "In parentheses: what others measured with MLX, now and then on a chip with fewer cores.",
        "", *lines, "", table(["chip", *(m["model"] for m in models)], rows), "", *sources,
    ])  # fmt: skip


def decode_steps(config: dict[str, Any]) -> list[Any]:
    """The steps that decode one token of a model with this config. No weights are needed: it never runs."""
    import numpy as np

    from ..engine import array as mx
    from ..engine import cpu, nn
    from ..engine.array.trees import tree_map
    from ..engine.generate import Engine
    from ..engine.metal.plan import at, read
    from ..models.load import family

    def zeros(array: mx.Array) -> mx.Array:  # memory that is never touched costs nothing
        dtype = mx.bfloat16 if array.dtype.inexact else array.dtype
        return mx.asarray(np.zeros(array.shape, f"u{dtype.size}")).view(dtype)

    with nn.loading():
        kind = family(config["model_type"])
        model = kind(kind.config_class.from_dict(config))
        nn.quantize(model, 64, 4)
    model.update(tree_map(zeros, model.parameters()))
    plan = Engine(model, max_context=2 * DEPTH).plan
    return [at(read(step), [1] * len(plan.dims), DEPTH) for step in plan.native(cpu.runtime().opcodes)]

"""Flags, the YAML file and a saved run: one table of fields, and errors that name the nearest one."""
import json

import numpy as np
import pytest
from click.testing import CliRunner

from lazulite import lora
from lazulite.cli import llm
from lazulite.cli.lora import merged
from lazulite.engine.errors import UserError
from lazulite.lora import adapter, settings
from lazulite.lora.settings import Settings


def test_a_file_and_flags(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: rows\nlearning_rate: 1e-4\nbatch-size: 8\ntarget: [q_proj, v_proj]\nrank: 4\n"
                    "rank_pattern: {q_proj: 16}\nwarmup: 0.1 epochs\noptimizer_options: {betas: [0.9, 0.95]}\n")
    found = merged(str(file), {"rank": 16, "alpha_pattern": ("v_proj=4",)})
    assert (found.data, found.learning_rate, found.batch_size, found.rank) == ("rows", 1e-4, 8, 16)
    assert found.target == ["q_proj", "v_proj"]
    assert (found.rank_pattern, found.alpha_pattern) == ({"q_proj": 16}, {"v_proj": 4.0})
    assert found.optimizer_options == {"betas": [0.9, 0.95]}


@pytest.mark.parametrize(("text", "said"), [
    ("learning_rte: 1\n", "unknown key 'learning_rte', the nearest known one: 'learning_rate'"),
    ("rank: a lot\n", "rank is 'a lot', wanted a whole number"), ("full: 1\n", "full is 1, wanted true or false"),
    ("rank: true\n", "rank is True"), ("- a\n", "found a list, wanted keys and values"), ("a: [\n", "not YAML"),
    ("data: x\nrank: 0\n", "rank is 0, wanted at least 1"),
    ("data: x\nschedule: cosin\n", "schedule is 'cosin', wanted one of"),
    ("data: x\nwarmup: soon\n", "warmup is 'soon', wanted a number of steps, or epochs"), ("rank: 4\n", "data is ''"),
])
def test_bad_files_say_what_is_wanted(text, said, tmp_path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        merged(str(tmp_path / "run.yaml"), {})


def test_every_field_is_a_flag() -> None:
    command = llm.get_command(None, "lora")
    flags = {param.name for param in command.get_params(command.make_context("lora", ["--data", "x"]))}
    assert flags >= settings.KINDS.keys() | {"config"}
    line = ("-m M --data D --adapter A --iters 5 --batch-size 2 --learning-rate 1e-3 --rank 4 --alpha 8 "
            "--max-seq-length 64 --seed 1 --resume")
    context = command.make_context("lora", line.split())
    assert context.params["iters"] == 5 and context.params["resume"] and context.params["schedule"] is None


def test_show_prints_rows_and_what_is_learnt(tmp_path) -> None:
    rows = [{"prompt": f"question {i}", "completion": "an answer"} for i in range(3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = CliRunner().invoke(llm, ["lora", "--data", str(tmp_path), "--show", "2"], catch_exceptions=False)
    assert "question 1" in found.output and "question 2" not in found.output
    assert "train.jsonl:2" in found.output and "learnt" in found.output and "2 rows" in found.output


@pytest.mark.parametrize(("text", "wanted"), [("all", {0, 1, 2, 3}), ("2", {2, 3}), ("0-1,3", {0, 1, 3}), ("1,", {1})])
def test_layers(text, wanted) -> None:
    assert adapter.chosen_layers(text, 4) == wanted


@pytest.mark.parametrize("text", ["4-9", "x", "0,9"])
def test_layers_that_are_not_there(text) -> None:
    with pytest.raises(UserError, match="wanted all"):
        adapter.chosen_layers(text, 4)


@pytest.mark.parametrize(("pattern", "path", "fits"), [
    ("q_proj", "model.layers.0.self_attn.q_proj", True), ("q_proj", "model.layers.0.self_attn.qq_proj", False),
    ("mlp.*_proj", "model.layers.0.mlp.up_proj", True), ("*_proj", "model.layers.0.mlp.up_proj", True),
    (r"layers\.[02]\..*", "model.layers.2.mlp.up_proj", True),
    (r"layers\.[02]\..*", "model.layers.1.mlp.up_proj", False),
])
def test_patterns(pattern, path, fits) -> None:
    assert adapter.matches(path, pattern) == fits


def test_all_linear_layers_but_the_head(pairs, tiny) -> None:
    found = adapter.targets(pairs.ours(tiny), lora.Method())
    assert len(found) == 7 * 3 and not any("lm_head" in path for path in found)
    assert adapter.targets(pairs.ours(tiny), lora.Method(target=("lm_head",))) == ["lm_head"]
    with pytest.raises(UserError, match=r"'wq' matches no linear layer\nthere are: lm_head, mlp.down_proj"):
        adapter.targets(pairs.ours(tiny), lora.Method(target=("wq",)))


@pytest.mark.parametrize(("method", "wanted"), [
    (dict(rank=4, alpha=8), 2.0), (dict(rank=4, alpha=8, rslora=True), 4.0),
    (dict(rank=8, rank_pattern={"q_proj": 4}, alpha=8), 2.0),
    (dict(rank=8, alpha=1, alpha_pattern={"q_proj": 16}), 2.0)])
def test_scales(method, wanted) -> None:
    assert lora.Method(**method).size("model.layers.0.self_attn.q_proj")[1] == wanted


def test_a_new_adapter_changes_nothing(pairs, tiny) -> None:
    from lazulite.engine import array as mx
    from lazulite.engine import nn

    model, ids = pairs.ours(tiny), mx.array([5, 6, 7])
    before = np.asarray(model(ids, nn.Context.packed([3])))
    lora.prepare(model, lora.Method(dropout=0.5))
    np.testing.assert_allclose(np.asarray(model(ids, nn.Context.packed([3]))), before, atol=1e-6)


def test_sizes_of_memory() -> None:
    assert [settings.size(t) for t in ("2GB", "1.5 GiB", "800MB", "1000")] == [2 * 10**9, 3 * 2**29, 8 * 10**8, 1000]
    with pytest.raises(UserError, match="wanted a size such as 2GB"):
        settings.size("much")
    assert Settings(data="x").check().method == lora.Method()

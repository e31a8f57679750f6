"""Fusing, serving several adapters, evaluation: against sums written out, torch, and each adapter alone."""
import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from lazulite import lora
from lazulite.cli import llm
from lazulite.engine import array as mx
from lazulite.engine import nn
from lazulite.engine.errors import UserError
from lazulite.lora import adapter as adapters
from lazulite.lora import data, evaluation, fusion, serving
from lazulite.lora.layers import adapted
from lazulite.models.convert import convert
from lazulite.quant import Format, Quantizer

IDS = [5, 9, 200, 31, 77, 8, 60]


def logits(model, ids=IDS) -> np.ndarray:
    return np.asarray(model(mx.array(ids), nn.Context.packed([len(ids)])))


def make(pairs, base, folder, seed: int = 0, size: float = 0.1, **method) -> np.ndarray:
    """Writes a random adapter; returns what the model answers with it."""
    model = pairs.ours(base)
    stamp = adapters.stamp(model)
    lora.prepare(model, lora.Method(**{"rank": 4, **method}))
    mx.random.seed(seed)
    for _, layer in adapted(model):
        layer.lora_a, layer.lora_b = (mx.random.normal(x.shape) * size for x in (layer.lora_a, layer.lora_b))
    lora.write(folder, adapters.of(model, base=stamp))
    return logits(model)


def fuse(base, adapter, dest, bits: int = 0) -> fusion.Fused:
    fused = fusion.Fused(lora.read(adapter), Quantizer(Format(32, bits)) if bits else None)
    convert(base, dest, fused, "float32", dequantize=True)
    return fused


def test_fused_in_float16(pairs, tiny, tmp_path) -> None:
    wanted = make(pairs, tiny, tmp_path / "adapter")
    fuse(tiny, tmp_path / "adapter", tmp_path / "fused")
    np.testing.assert_allclose(logits(pairs.ours(tmp_path / "fused")), wanted, atol=0.01)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32)  # transformers reads it too
    with torch.inference_mode():
        np.testing.assert_allclose(theirs(torch.tensor([IDS])).logits[0].numpy(), wanted, atol=0.01)
    assert json.loads((tmp_path / "fused/config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize("size", [0.02, 1.0])
def test_what_quantizing_leaves_of_an_adapter(size, pairs, tiny, tmp_path) -> None:
    """A small change drowns, a large one stays; the numbers are those of the weights before and after."""
    make(pairs, tiny, tmp_path / "adapter", size=size)
    fused = fuse(tiny, tmp_path / "adapter", tmp_path / "fused", bits=4)
    along = squares = errors = 0.0
    before, after = (dict(pairs.ours(f).named_modules()) for f in (tiny, tmp_path / "fused"))
    for path, pair in lora.read(tmp_path / "adapter").pairs.items():
        delta = pair.scale * (np.asarray(pair.a) @ np.asarray(pair.b)).T
        added = np.asarray(after[path].dequantized()) - np.asarray(before[path].weight)
        along, squares = along + (added * delta).sum(), squares + (delta * delta).sum()
        errors += ((added - delta) ** 2).sum()
    assert fused.kept == pytest.approx(along / squares, rel=1e-3)
    assert fused.noise == pytest.approx(math.sqrt(errors / squares), rel=1e-3)
    assert (fused.noise > 1) == (size < 0.1)


def test_a_quantized_base_is_expanded_before_it_is_fused(pairs, tiny, tmp_path) -> None:
    convert(tiny, tmp_path / "base", Quantizer(Format(32, 4)))
    model = pairs.ours(tmp_path / "base")
    make(pairs, tmp_path / "base", tmp_path / "adapter")
    lora.load_adapter(model, tmp_path / "adapter")
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    with mx.fast.precise():
        wanted = logits(model)
    np.testing.assert_allclose(logits(pairs.ours(tmp_path / "fused")), wanted, atol=0.02)
    assert "quantization" not in json.loads((tmp_path / "fused/config.json").read_text())


def test_the_command_refuses_another_base(pairs, tiny, tmp_path) -> None:
    make(pairs, tiny, tmp_path / "adapter")
    other = pairs.save(rms_norm_eps=1e-5, initializer_range=0.2)
    command = ["fuse", "-m", str(other), "--adapter", str(tmp_path / "adapter"), str(tmp_path / "fused")]
    for folder in (tiny, other):
        (folder / "tokenizer.json").write_text(TOKENIZER)
    found = CliRunner().invoke(llm, command)
    assert isinstance(found.exception, UserError) and "trained on other weights" in str(found.exception)
    assert not (tmp_path / "fused").exists()
    assert CliRunner().invoke(llm, [*command, "--any-base"], catch_exceptions=False).exit_code == 0


TOKENIZER = json.dumps({
    "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
    "decoder": None, "truncation": None, "padding": None,
    "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(256)}, "unk_token": "w0"},
})


# several adapters in one step

def test_each_token_has_its_own_adapter(pairs, tiny, tmp_path) -> None:
    wanted = [logits(pairs.ours(tiny)), make(pairs, tiny, tmp_path / "a"),
              make(pairs, tiny, tmp_path / "b", seed=1, rank=2, target=("q_proj", "up_proj"))]
    model = pairs.ours(tiny)
    found = serving.attach(model, {"a": tmp_path / "a", "b": tmp_path / "b"})
    assert found.names == model.adapters.names == ("a", "b")
    np.testing.assert_allclose(logits(model), wanted[0], atol=1e-5)
    owners = [2, 0, 1, 2]
    found.rows = mx.array(np.repeat(owners, len(IDS)), mx.int32)
    together = model(mx.array(IDS * 4), nn.Context.packed([len(IDS)] * 4))
    for part, owner in zip(np.split(np.asarray(together), 4), owners, strict=True):
        np.testing.assert_allclose(part, wanted[owner], atol=1e-4)


def test_what_cannot_be_served(pairs, tiny, tmp_path) -> None:
    make(pairs, tiny, tmp_path / "head", target=("lm_head",))
    with pytest.raises(UserError, match="adapts lm_head"):
        serving.attach(pairs.ours(tiny), {"head": tmp_path / "head"})
    model = pairs.ours(tiny)
    lora.prepare(model, lora.Method(full=True))
    lora.write(tmp_path / "full", adapters.of(model))
    with pytest.raises(UserError, match="full fine-tuning is no adapter"):
        serving.attach(pairs.ours(tiny), {"full": tmp_path / "full"})


# evaluation

def test_perplexity_is_torchs(pairs, tiny, rows) -> None:
    theirs, total, count = pairs.theirs(tiny), 0.0, 0
    with torch.inference_mode():
        for row in rows:
            logits = theirs(torch.from_numpy(row.tokens[None]).long()).logits[0]
            targets = torch.from_numpy(row.targets).long()
            total += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum").item()
            count += row.supervised
    found = evaluation.score(pairs.ours(tiny), rows)
    assert (found.tokens, found.rows) == (count, 12)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    with pytest.raises(UserError, match="no token to predict"):
        evaluation.score(pairs.ours(tiny), [rows[0]._replace(targets=np.full_like(rows[0].targets, data.IGNORED))])


def test_distance_is_torchs(pairs, tiny, rows) -> None:
    other = pairs.save(initializer_range=0.2)
    kl, same, count = 0.0, 0, 0
    with torch.inference_mode():
        for row in rows:
            q, p = (m(torch.from_numpy(row.tokens[None]).long()).logits[0].log_softmax(-1)
                    for m in (pairs.theirs(tiny), pairs.theirs(other)))
            seen = torch.from_numpy(row.targets >= 0)
            kl += (p.exp() * (p - q)).sum(-1)[seen].sum().item()
            same, count = same + (p.argmax(-1) == q.argmax(-1))[seen].sum().item(), count + row.supervised
    found = evaluation.distance(pairs.ours(tiny), pairs.ours(other), rows)
    assert found.kl == pytest.approx(kl / count, rel=1e-3) and found.same == same / count

"""Adapters of mlx-lm and of PEFT: written and read here, loaded by both packages, strict about names and shapes."""
import json

import mlx.core as mlx
import numpy as np
import peft
import pytest
import torch
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file

from lazulite import lora
from lazulite.engine import array as mx
from lazulite.engine import nn
from lazulite.engine.errors import UserError
from lazulite.lora import adapter as adapters
from lazulite.lora.layers import adapted

IDS = [5, 9, 200, 31, 77, 8, 60]
METHODS = {
    "uniform": lora.Method(rank=4, alpha=8),
    "last layers": lora.Method(rank=4, layers="2", target=("q_proj", "v_proj")),
    "rslora": lora.Method(rank=4, alpha=8, rslora=True),
    "patterns": lora.Method(rank=4, rank_pattern={"mlp.*_proj": 2, "q_proj": 6}, alpha_pattern={"v_proj": 1.0}),
    "some of some": lora.Method(rank=4, target=(r"layers\.[01]\.self_attn\.q_proj", "layers.2.mlp.up_proj")),
}


def logits(model) -> np.ndarray:
    return np.asarray(model(mx.array(IDS), nn.Context.packed([len(IDS)])))  # no pages, whose keys are float16


def adapter_of(model, method: lora.Method) -> lora.Adapter:
    lora.prepare(model, method)
    for _, layer in adapted(model):
        layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.1
    return adapters.of(model, name="tiny")


@pytest.mark.parametrize("name", METHODS)
def test_both_packages_load_it(name, pairs, tiny, tmp_path) -> None:
    model = pairs.ours(tiny)
    adapter = adapter_of(model, METHODS[name])
    wanted = logits(model)
    for format in ("mlx-lm", "peft"):
        lora.write(tmp_path / format, adapter, format)
        again = pairs.ours(tiny)
        lora.load_adapter(again, tmp_path / format)
        np.testing.assert_allclose(logits(again), wanted, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(pairs.theirs(tiny), tmp_path / "peft")
    with torch.inference_mode():
        np.testing.assert_allclose(theirs(torch.tensor([IDS])).logits[0].numpy(), wanted, atol=1e-4)
    mlx_model, _ = load_model(tiny)
    load_adapters(mlx_model, tmp_path / "mlx-lm")
    mlx_model.eval()
    np.testing.assert_allclose(np.array(mlx_model(mlx.array([IDS]))[0].astype(mlx.float32)), wanted, atol=1e-4)


@pytest.mark.parametrize("options", [
    dict(use_rslora=True), dict(rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3}),
    dict(layers_to_transform=[0, 2])])
def test_pefts_own_is_read(options, pairs, tiny, tmp_path) -> None:
    base = pairs.theirs(tiny)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"],
                             init_lora_weights=False, **options)
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "theirs")
    model = pairs.ours(tiny)
    lora.load_adapter(model, tmp_path / "theirs")
    with torch.inference_mode():
        np.testing.assert_allclose(logits(model), theirs(torch.tensor([IDS])).logits[0].numpy(), atol=1e-4)
    lora.write(tmp_path / "again", lora.read(tmp_path / "theirs"), "peft")
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "again"))
    assert first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)


def test_mlx_lms_own_is_read(pairs, tiny, tmp_path) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _ = load_model(tiny)
    model.freeze()
    parameters = {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    linear_to_lora_layers(model, 2, parameters)
    weights = {k: mlx.random.normal(v.shape) * 0.1 for k, v in tree_flatten(model.trainable_parameters())}
    model.load_weights(list(weights.items()), strict=False)
    mlx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ours = pairs.ours(tiny)
    lora.load_adapter(ours, tmp_path)
    model.eval()
    wanted = np.array(model(mlx.array([IDS]))[0].astype(mlx.float32))
    np.testing.assert_allclose(logits(ours), wanted, atol=1e-4)


def test_full_weights_are_an_adapter_of_mlx_lm(pairs, tiny, tmp_path) -> None:
    model = pairs.ours(tiny)
    lora.prepare(model, lora.Method(full=True, layers="1"))
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[2].mlp.up_proj.weight * 1.5
    lora.write(tmp_path, adapters.of(model))
    again = pairs.ours(tiny)
    lora.load_adapter(again, tmp_path)
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-5)
    with pytest.raises(UserError, match="no full fine-tuning"):
        lora.write(tmp_path, adapters.of(model), "peft")


# what does not fit is an error, never a warning

def change(tensors, kind: str) -> None:
    """One thing wrong with a file."""
    name = sorted(tensors)[0]
    if kind == "unknown layer":
        for n in [n for n in tensors if n.split(".lora")[0] == name.split(".lora")[0]]:
            tensors[n.replace("layers.0", "layers.9")] = tensors.pop(n)
    elif kind == "missing side":
        tensors.pop(name)
    elif kind == "missing layer":
        for n in [n for n in tensors if "q_proj" in n]:
            tensors.pop(n)
    elif kind == "unknown tensor":
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = tensors[name]
    elif kind == "another shape":
        tensors[name] = tensors[name][:, :-1].copy()


@pytest.mark.parametrize("format", ["mlx-lm", "peft"])
@pytest.mark.parametrize(("kind", "said"), [
    ("unknown layer", "layers.9|no tensors for"), ("missing side", "has only lora_"),
    ("missing layer", "no tensors for .*q_proj"), ("unknown tensor", "lora_embedding_A .* is no matrix"),
    ("another shape", "rank|wanted")])
def test_what_is_wrong_is_named(format, kind, said, pairs, tiny, tmp_path) -> None:
    lora.write(tmp_path, adapter_of(pairs.ours(tiny), METHODS["uniform"]), format)
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors, kind)
    save_file(tensors, file)
    with pytest.raises(UserError, match=said):
        lora.load_adapter(pairs.ours(tiny), tmp_path)


@pytest.mark.parametrize(("format", "change", "said"), [
    ("peft", {"use_dora": True}, "use_dora"), ("peft", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ("peft", {"peft_type": "IA3"}, "IA3"), ("mlx-lm", {"fine_tune_type": "dora"}, "dora"),
    ("mlx-lm", {"lora_parameters": {"rank": 4, "alpha": 8}}, "scale is None")])
def test_configs_that_are_not_read(format, change, said, pairs, tiny, tmp_path) -> None:
    lora.write(tmp_path, adapter_of(pairs.ours(tiny), METHODS["uniform"]), format)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=said):
        lora.read(tmp_path)


def test_a_folder_that_is_none(tmp_path) -> None:
    with pytest.raises(UserError, match="no adapter_config.json"):
        lora.read(tmp_path)


def test_another_base_is_said(pairs, tiny, tmp_path) -> None:
    model = pairs.ours(tiny)
    base = adapters.stamp(model)
    adapter = adapter_of(model, METHODS["uniform"])
    assert adapters.stamp(model) == base  # of the base, whatever is on it
    adapter.base = base
    lora.write(tmp_path, adapter)
    other = pairs.ours(tiny)
    other.model.norm.weight = other.model.norm.weight + 1
    with pytest.warns(UserWarning, match="trained on other weights"):
        lora.load_adapter(other, tmp_path)
    with pytest.raises(UserError, match="has an adapter already"):
        lora.load_adapter(other, tmp_path)

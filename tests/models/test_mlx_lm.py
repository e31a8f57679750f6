"""Folders both ways: what we write loads in mlx-lm with equal numbers, and what mlx-lm's convert writes loads here."""
import json
from pathlib import Path

import numpy as np
import pytest
import test_foreign as foreign
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM

from lazulite.engine import array as mx
from lazulite.engine import nn
from lazulite.models import build, read
from lazulite.models.convert import convert
from lazulite.models.weights import expanded
from lazulite.quant import RECIPES, Format, Quantizer, recipe

mlx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")
TINY = dict(
    vocab_size=128, hidden_size=128, intermediate_size=192, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=False, head_dim=32,
)
FORMATS = {
    **{f"{bits} bits": Format(64, bits) for bits in (2, 3, 4, 5, 6, 8)},
    "groups of 32": Format(32, 4),
    "mxfp4": Format(mode="mxfp4"), "nvfp4": Format(mode="nvfp4"), "mxfp8": Format(mode="mxfp8"),
}
FAMILIES = {  # those that mlx-lm has
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {}, "olmo2": {},
    "smollm3": dict(pad_token_id=0), "granite": dict(attention_multiplier=0.2),
    "gemma": dict(tie_word_embeddings=True), "gemma2": dict(tie_word_embeddings=True, query_pre_attn_scalar=32),
    "gemma3_text": dict(tie_word_embeddings=True, query_pre_attn_scalar=32),
    "phi3": dict(pad_token_id=0), "cohere2": dict(tie_word_embeddings=True, sliding_window_pattern=4),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
                      shared_expert_intermediate_size=64),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=64),
    "gpt2": dict(n_embd=128, n_layer=3, n_head=4, n_positions=64, num_key_value_heads=4, tie_word_embeddings=True),
}


def source(folder: Path, model_type: str = "llama", **changes: object):
    """A tiny Hugging Face folder with a tokenizer, and its model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TINY, **changes})).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    Tokenizer(models.WordLevel({f"t{i}": i for i in range(128)}, unk_token="t0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "t2", "tokenizer_class": "PreTrainedTokenizerFast"}')
    config = json.loads((folder / "config.json").read_text())
    old = {"rope_theta": 10000.0, "n_ctx": 64, "num_experts": config.get("num_local_experts")}  # mlx-lm asks for these,
    tensors = load_file(folder / "model.safetensors")
    if model_type == "gpt2":                                                                     # for names as OpenAI's
        save_file({name.removeprefix("transformer."): w for name, w in tensors.items()}, folder / "model.safetensors")
    if model_type == "gpt_oss":                                                                  # and for these codes
        old["quantization_config"] = {"quant_method": "mxfp4"}
        for name in [name for name in tensors if name.endswith("_proj")]:
            e, k, n = tensors.pop(name).shape
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (e, n, k // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(120, 124, (e, n, k // 32), dtype=torch.uint8)
        save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(old | config))
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "hf"
    source(folder)
    return folder


def by_mlx(folder: Path) -> dict[str, np.ndarray]:
    """The numbers of every weight in the folder as mlx-lm has them, by module."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    parts = dict(tree_flatten(model.parameters()))
    found = {}
    for path, module in model.named_modules():
        if f"{path}.scales" in parts:
            w = mlx.dequantize(module.weight, module.scales, module.get("biases"), module.group_size, module.bits,
                               module.mode, dtype=mlx.float32)
            found[path] = np.array(w)
    return found


def by_us(folder: Path) -> dict[str, np.ndarray]:
    files = read(folder)
    found = {}
    for get in files.parts:
        part = get()
        path = next(iter(part)).rpartition(".")[0]
        if f"{path}.scales" in part:
            found[path] = np.asarray(expanded(path, part, files.config["quantization"]))
    return found


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours and ours.keys() == theirs.keys()
    for path, w in ours.items():
        np.testing.assert_allclose(w, theirs[path], rtol=1e-6, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", [*FORMATS, *RECIPES])
def test_what_we_write_loads_in_mlx_lm(name: str, llama: Path, tmp_path: Path) -> None:
    if name in RECIPES:
        quantizer = Quantizer(Format(64, RECIPES[name][0]), recipe(name, TINY["num_hidden_layers"], 64))
    else:
        quantizer = Quantizer(FORMATS[name])
    out = convert(str(llama), tmp_path / "out", quantizer)
    same(by_us(out), by_mlx(out))


@pytest.mark.parametrize("name", [*FORMATS, *RECIPES])
def test_what_mlx_lm_writes_loads_here(name: str, llama: Path, tmp_path: Path) -> None:
    """The same numbers, formats and logits; for a recipe the choices are ours."""
    from mlx_lm.utils import load_model

    out, format = tmp_path / "theirs", FORMATS.get(name)
    options = {"quant_predicate": name, "q_group_size": 64} if format is None else {
        "q_group_size": format.group_size, "q_bits": format.bits, "q_mode": format.mode}
    mlx_lm.convert(str(llama), str(out), quantize=True, **options)
    same(by_us(out), by_mlx(out))
    settings = json.loads((out / "config.json").read_text())["quantization"]
    ours = build(read(out))
    for path, module in ours.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            stated = settings.get(path, settings)
            assert (module.group_size, module.bits, module.mode) == (stated["group_size"], stated["bits"],
                                                                     stated.get("mode", "affine")), path
    theirs, _ = load_model(out)
    assert difference(logits(out), np.array(theirs(mlx.array([IDS])).astype(mlx.float32))[0]) < 1e-2
    if format is None:
        choose = recipe(name, TINY["num_hidden_layers"], 64)
        chosen = {path: choose(path).bits for path, module in ours.named_modules() if hasattr(module, "bits")}
        assert chosen == {path: settings.get(path, settings)["bits"] for path in chosen}


@pytest.mark.parametrize("row", ["gptq", "gptq act-order", "awq", "packed with zeros", "fp8 blocks"])
def test_what_others_quantized_loads_in_mlx_lm_once_converted(row: str, tmp_path: Path) -> None:
    """Codes are the file's; what MLX has no words for, act-order and FP8, is bfloat16 of the same numbers."""
    from mlx_lm.utils import load_model

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **foreign.TINY))
    foreign.write(tmp_path / "hf", model, *foreign.FOLDERS[row])
    theirs, _ = load_model(convert(str(tmp_path / "hf"), tmp_path / "out"))
    modules, kept = dict(theirs.named_modules()), not row.startswith(("gptq act", "fp8"))
    for name, module in model.model.layers.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        found, wanted = modules[f"model.layers.{name}"], module.weight.detach().numpy()
        w = found.weight
        assert kept == (w.dtype == mlx.uint32)
        if kept:
            w = mlx.dequantize(w, found.scales, found.biases, found.group_size, found.bits, dtype=mlx.float32)
        tolerance = 1e-6 if kept else 2**-8
        np.testing.assert_allclose(np.array(w.astype(mlx.float32)), wanted, rtol=tolerance, atol=1e-6)


IDS = [3, 4, 5, 6]


def logits(folder: Path) -> np.ndarray:
    model = build(read(folder))
    context = nn.Context.single(len(IDS), [spec.empty(1, 1, mx.float16) for spec in model.cache_spec()])
    return np.asarray(model(mx.array(IDS), context))


def difference(ours: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(ours - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_that_mlx_lm_sanitized(family: str, tmp_path: Path) -> None:
    """Stacked experts, turned matrices: its folder gives transformers' logits (gpt-oss, of random codes: those of the
    source), and its 4 bits those of the same numbers as floats."""
    hf, out, few, wide = (tmp_path / name for name in ("hf", "float", "few", "wide"))
    model = source(hf, family, **{"num_hidden_layers": 4, **FAMILIES[family]})
    mlx_lm.convert(str(hf), str(out))
    with torch.inference_mode():
        wanted = logits(hf) if family == "gpt_oss" else model(torch.tensor([IDS])).logits[0].numpy()
    assert difference(logits(out), wanted) < 2e-3
    if family != "gpt_oss":
        mlx_lm.convert(str(hf), str(few), quantize=True, q_group_size=32)
        mlx_lm.convert(str(few), str(wide), dequantize=True)
        assert difference(logits(few), logits(wide)) < 2e-3

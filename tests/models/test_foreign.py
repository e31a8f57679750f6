"""Folders that other programs quantized: tiny models written here by the published formulas, as logits against the
dequantized model in transformers, and codes that are the file's."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lazulite.engine import array as mx
from lazulite.engine import nn
from lazulite.engine.errors import UserError
from lazulite.models import build, read

TINY = dict(
    vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=False,
)
RNG = np.random.default_rng(0)
Written = tuple[dict[str, np.ndarray | torch.Tensor], np.ndarray]  # a weight's tensors by leaf, and its numbers (N, K)


def pack(codes: np.ndarray, bits: int, places: list[int] | None = None) -> np.ndarray:
    """Codes (R, C) into int32 words along C, that of place i at bit i · bits."""
    each = 32 // bits
    places = places or list(range(each))
    words = np.zeros((len(codes), codes.shape[1] // each), np.uint32)
    for i, place in enumerate(places):
        words |= codes[:, place::each].astype(np.uint32) << np.uint32(bits * i)
    return words.view(np.int32)


def sides(n: int, groups: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zeros (groups, N)"""
    scales = (RNG.uniform(0.5, 1.5, (groups, n)) * 0.4 / 2**bits).astype(np.float16)
    return scales, RNG.integers(2 ** (bits - 1) - 2, 2 ** (bits - 1) + 3, (groups, n))


def gptq(n: int, k: int, bits: int = 4, group: int = 32, v2: bool = False, act_order: bool = False) -> Written:
    """w[k, n] = scale[g, n] (q[k, n] - zero[g, n]), g = g_idx[k]; v1 keeps zero - 1."""
    group = k if group < 0 else group
    q, (scales, zeros) = RNG.integers(0, 1 << bits, (k, n)), sides(n, k // group, bits)
    index = np.arange(k) // group
    index = RNG.permutation(index) if act_order else index
    w = scales.astype(np.float64)[index] * (q - zeros[index])
    parts = {"qweight": pack(q.T, bits).T, "qzeros": pack(zeros - (not v2), bits), "scales": scales,
             "g_idx": index.astype(np.int32)}
    return parts, w.T


def awq(n: int, k: int, group: int = 64) -> Written:
    """The gemm packing: of 8 neighbours those at 0, 2, 4, 6, 1, 3, 5, 7, low bits first."""
    q, (scales, zeros) = RNG.integers(0, 16, (k, n)), sides(n, k // group, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    index = np.arange(k) // group
    return ({"qweight": pack(q, 4, order), "qzeros": pack(zeros, 4, order), "scales": scales},
            (scales.astype(np.float64)[index] * (q - zeros[index])).T)


def fp8(n: int, k: int, block: tuple[int, int] | None = (64, 64), name: str = "weight_scale_inv") -> Written:
    codes = torch.randn(n, k).mul(20).to(torch.float8_e4m3fn)
    rows, columns = block or (1, k)
    scales = RNG.uniform(0.5, 1.5, (-(-n // rows), -(-k // columns))).astype(np.float32) / 200
    wide = np.repeat(np.repeat(scales, rows, 0)[:n], columns, 1)[:, :k]
    return {"weight": codes, name: scales}, codes.double().numpy() * wide


def packed(n: int, k: int, group: int = 32, symmetric: bool = True) -> Written:
    q, (scales, zeros) = RNG.integers(0, 16, (n, k)), (a.T for a in sides(n, k // group, 4))
    zeros = np.full_like(zeros, 8) if symmetric else zeros
    parts = {"weight_packed": pack(q, 4), "weight_scale": scales, "weight_shape": np.array([n, k])}
    if not symmetric:
        parts["weight_zero_point"] = pack(zeros.T, 4).T
    index = np.arange(k) // group
    return parts, scales.astype(np.float64)[:, index] * (q - zeros[:, index])


def compressed(format: str, **weights: object) -> dict:
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": {"weights": weights}}}


FOLDERS = {  # what writes a weight, its options, quantization_config
    "gptq": (gptq, {}, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "gptq v2": (gptq, {"v2": True},
                {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}),
    "gptq act-order": (gptq, {"act_order": True},
                       {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}),
    "gptq 8 bits": (gptq, {"bits": 8}, {"quant_method": "gptq", "bits": 8, "group_size": 32}),
    "gptq a group a row": (gptq, {"group": -1}, {"quant_method": "gptq", "bits": 4, "group_size": -1}),
    "awq": (awq, {}, {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}),
    "fp8 blocks": (fp8, {}, {"quant_method": "fp8", "weight_block_size": [64, 64]}),
    "fp8 blocks of 128": (fp8, {"block": (128, 128)}, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "fp8 rows": (fp8, {"block": None, "name": "weight_scale"}, compressed("float-quantized", num_bits=8)),
    "packed": (packed, {}, compressed("pack-quantized", num_bits=4, group_size=32)),
    "packed with zeros": (packed, {"symmetric": False}, compressed("pack-quantized", num_bits=4, group_size=32)),
}


def write(folder: Path, model: torch.nn.Module, make, options: dict, settings: dict) -> None:
    """The model's folder with its layers' linears replaced by what `make` writes; their numbers go into the model."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, module in model.model.layers.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        parts, numbers = make(*module.weight.shape, **options)
        module.weight.data = torch.tensor(numbers, dtype=torch.float32)
        del tensors[f"model.layers.{name}.weight"]
        for leaf, part in parts.items():
            part = part if isinstance(part, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(part))
            tensors[f"model.layers.{name}.{leaf}"] = part.contiguous()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def worst(ours, theirs, tokens: int = 4) -> float:
    """The largest difference of logits, of the largest logit: keys and values are rounded to float16."""
    ids = list(range(3, 3 + tokens))
    with torch.inference_mode():
        wanted = theirs(torch.tensor([ids])).logits[0].numpy()
    context = nn.Context.single(tokens, [nn.LayerCache.empty(1, *spec[:2], mx.float16) for spec in ours.cache_spec()])
    return float(np.abs(np.asarray(ours(mx.array(ids), context)) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("row", FOLDERS)
def test_logits(row: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)).eval()
    write(tmp_path, model, *FOLDERS[row])
    ours = build(read(tmp_path))
    assert isinstance(ours.model.layers[0].self_attn.q_proj, nn.QuantizedLinear)
    assert worst(ours, model) < 2e-3
    for name, module in model.model.layers.named_modules():  # the numbers are the formula's, not only nearly
        if isinstance(module, torch.nn.Linear):
            *path, leaf = name.split(".")
            parent = ours.model.layers
            for step in path:
                parent = parent[int(step)] if step.isdigit() else getattr(parent, step)
            np.testing.assert_allclose(np.asarray(getattr(parent, leaf).dequantized()), module.weight.detach().numpy(),
                                       rtol=1e-6, atol=1e-9)


def test_gpt_oss_blocks(tmp_path: Path) -> None:
    """Blocks and scales of random bytes: logits of transformers' own dequantization, codes in place."""
    sizes = TINY | dict(hidden_size=64, intermediate_size=96, num_local_experts=3, num_experts_per_tok=2, head_dim=32)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **sizes)).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for i, layer in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.mlp.experts, name)
            e, k, n = weight.shape
            blocks = torch.from_numpy(RNG.integers(0, 256, (e, n, k // 32, 16), np.uint8))
            scales = torch.from_numpy(RNG.integers(120, 125, (e, n, k // 32), np.uint8))
            weight.data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            path = f"model.layers.{i}.mlp.experts.{name}"
            del tensors[path]
            tensors |= {f"{path}_blocks": blocks, f"{path}_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = read(tmp_path)
    assert files.config["quantization"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    ours = build(files)
    gate = ours.model.layers[0].mlp.experts.gate_proj
    assert (gate.bits, gate.group_size, gate.mode, gate.weight.dtype) == (4, 32, "mxfp4", mx.uint32)
    assert np.array_equal(np.asarray(gate.scales), tensors["model.layers.0.mlp.experts.gate_up_proj_scales"][:, ::2])
    assert worst(ours, model) < 2e-3


REFUSED = [
    ({"quant_method": "bitsandbytes"}, {}, "quantized by 'bitsandbytes', which is not read; read: gptq, awq, fp8"),
    (FOLDERS["awq"][2] | {"version": "gemv"}, {}, "AWQ with 4 bits, version 'gemv'"),
    (FOLDERS["gptq"][2], {"qzeros": None}, "q_proj: the tensor qzeros is missing beside"),
    (FOLDERS["gptq"][2], {"g_idx": torch.zeros(128, dtype=torch.int32)}, "q_proj.g_idx: groups of unequal sizes"),
]


@pytest.mark.parametrize(("settings", "changes", "message"), REFUSED)
def test_refused(settings: dict, changes: dict, message: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))
    make, options = (awq if settings["quant_method"] == "awq" else gptq), {}
    write(tmp_path, model, make, options, settings)
    tensors = load_file(tmp_path / "model.safetensors")
    for leaf, value in changes.items():
        tensors["model.layers.0.self_attn.q_proj." + leaf] = value
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        build(read(tmp_path))


def test_a_dense_e4m3_weight_is_bfloat16(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)).eval()
    model.save_pretrained(tmp_path)
    tensors = {name: w.to(torch.float8_e4m3fn) if "_proj" in name else w.double()
               for name, w in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model.load_state_dict({name: w.float() for name, w in tensors.items()})
    ours = build(read(tmp_path))
    assert ours.model.layers[0].mlp.up_proj.weight.dtype is mx.bfloat16
    assert ours.model.embed_tokens.weight.dtype is mx.float32
    assert worst(ours, model) < 2e-3


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model.text_model."])
def test_the_text_part_of_a_model_that_sees(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)).eval()
    model.save_pretrained(tmp_path)
    head = "language_model.lm_head." if prefix.startswith("language_model.") else "lm_head."
    names = {"lm_head.weight": f"{head}weight"}
    tensors = {names.get(name, prefix + name.removeprefix("model.")): w
               for name, w in load_file(tmp_path / "model.safetensors").items()}
    beyond = ("vision_tower.patch.weight", "model.multi_modal_projector.norm.weight")
    tensors |= {name: torch.zeros(4) for name in beyond}
    save_file(tensors, tmp_path / "model.safetensors")
    text = json.loads((tmp_path / "config.json").read_text())
    config = {"model_type": "llava", "architectures": ["Llava"], "vision_config": {}, "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    ours = build(read(tmp_path))
    assert worst(ours, model) < 2e-3
    wanted = f"{tmp_path}: llava has more than text; its text part is loaded, 2 tensors are left out\n"
    assert capsys.readouterr().err == wanted

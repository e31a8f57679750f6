"""Logits held against transformers in float32: the same tiny random weights in both, prefill, then greedy decoding."""
import json
from pathlib import Path

import gguf
import mlx.core as mlx
import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

from lazulite.engine import array as mx
from lazulite.engine import cpu, nn
from lazulite.models import build, read

TINY = dict(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=False,
)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=128,
                short_factor=[1.0 + i / 8 for i in range(8)], long_factor=[2.0 + i for i in range(8)])
GEMMA3 = {"full_attention": dict(rope_type="linear", rope_theta=1e6, factor=4.0),
          "sliding_attention": dict(rope_type="default", rope_theta=1e4)}
ROWS = {
    "llama": ("llama", {}),
    "every head its own": ("llama", dict(num_key_value_heads=4)),
    "one kv head": ("llama", dict(num_key_value_heads=1)),
    "tied": ("llama", dict(tie_word_embeddings=True)),
    "biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "head_dim": ("llama", dict(head_dim=32)),
    "rope llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "rope linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "gelu": ("llama", dict(hidden_act="gelu_pytorch_tanh")),
    "mistral": ("mistral", dict(sliding_window=None)),
    "sliding window": ("mistral", dict(sliding_window=20)),
    "rope dynamic": ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0))),
    "rope yarn": ("llama", dict(rope_parameters=YARN)),
    "qwen2": ("qwen2", {}),
    "qwen2 windows": ("qwen2", dict(use_sliding_window=True, sliding_window=20, max_window_layers=1)),
    "qwen3": ("qwen3", dict(head_dim=32)),
    "gemma": ("gemma", dict(head_dim=32, tie_word_embeddings=True)),
    "gemma2": ("gemma2", dict(head_dim=32, sliding_window=20, query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
                              final_logit_softcapping=3.0, tie_word_embeddings=True)),
    "gemma3_text": ("gemma3_text", dict(head_dim=32, sliding_window=20, query_pre_attn_scalar=24,
                                        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                                        rope_parameters=GEMMA3, tie_word_embeddings=True)),
    "phi3": ("phi3", dict(pad_token_id=0, rope_parameters=dict(rope_type="default", rope_theta=1e4,
                                                               partial_rotary_factor=0.5))),
    "phi3 longrope": ("phi3", dict(pad_token_id=0, original_max_position_embeddings=128, rope_parameters=LONGROPE)),
    "smollm3": ("smollm3", dict(pad_token_id=0, no_rope_layer_interval=2, tie_word_embeddings=True)),
    "olmo2": ("olmo2", dict(num_key_value_heads=2)),
    "granite": ("granite", dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5,
                                logits_scaling=4.0)),
    "cohere2": ("cohere2", dict(sliding_window=20, sliding_window_pattern=2, logit_scale=0.5,
                                tie_word_embeddings=True)),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "qwen2_moe": ("qwen2_moe", dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32, mlp_only_layers=[1],
                                    shared_expert_intermediate_size=48)),
    "qwen3_moe": ("qwen3_moe", dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32, head_dim=32,
                                    norm_topk_prob=True)),
    "gpt_oss": ("gpt_oss", dict(num_local_experts=4, num_experts_per_tok=2, head_dim=32, sliding_window=20,
                                rope_parameters={**YARN, "truncate": False})),
    "gpt2": ("gpt2", dict(n_embd=64, n_layer=3, n_head=4, n_positions=256,
                          num_key_value_heads=4, intermediate_size=256, tie_word_embeddings=True)),
}
PROMPT, DECODE = 45, 16  # the prompt crosses a page, decoding crosses the next


def float16_cache(module, q, k, v, mask, **options):
    """transformers' attention on keys and values as our cache holds them; eagerly with soft caps or sinks."""
    if options.get("softcap") or options.get("s_aux") is not None:
        eager = gpt_oss if options.get("s_aux") is not None else gemma2
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if mask is None else mask
        wide = torch.where(seen, 0.0, -torch.inf)
        return eager.eager_attention_forward(module, q, k.half().float(), v.half().float(), wide, **options)
    return sdpa_attention_forward(module, q, k.half().float(), v.half().float(), mask, **options)


AttentionInterface.register("float16_cache", float16_cache)
AttentionMaskInterface.register("float16_cache", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def reference(folder: Path, model_type: str = "llama", *, dtype=torch.float32, shard: str = "1GB", **config):
    """Saves a random model of transformers and returns it as loaded again, computing in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TINY, **config}))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)  # norms and biases that are not all alike
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="float16_cache").eval()


class Session:
    """One sequence with a cache, step by step."""

    def __init__(self, model, cache: mx.Dtype, most: int = 128):
        self.model, self.past = model, 0
        self.layers = [nn.LayerCache.empty(most // nn.PAGE, heads, dim, cache) for heads, dim, _ in model.cache_spec()]

    def __call__(self, tokens: list[int]) -> np.ndarray:
        context = nn.Context.single(len(tokens), self.layers, start=self.past)
        logits = self.model(mx.array(tokens, dtype=mx.int32), context)
        mx.eval(logits, *(array for layer in context.layers for array in layer if array is not None))
        self.layers, self.past = context.layers, self.past + len(tokens)
        return np.asarray(logits)


def compare(model, theirs, exact: float = 2e-4, fast: float = 1e-2, cache: mx.Dtype = mx.float16) -> None:
    """No logit is off by more than these parts of the largest: the prompt in steps of 4 tokens, and in one step, where
    kernels round activations to 8 bits or bfloat16; then decoding, whose greedy tokens are the same."""
    for chunk, error in (4, exact), (PROMPT, fast):
        ours, wanted = logits(model, theirs, chunk, cache)
        found = np.abs(ours - wanted).max(1) / np.abs(wanted).max()
        assert found.max() <= error, (chunk, [f"{x:.1e}" for x in found])
        if error == 2e-4:
            assert ours[PROMPT:].argmax(1).tolist() == wanted[PROMPT:].argmax(1).tolist()


def logits(model, theirs, chunk: int, cache: mx.Dtype) -> tuple[np.ndarray, np.ndarray]:
    """Ours and theirs after each token of a prompt that is run in chunks, and of what is decoded from it."""
    ids = np.random.default_rng(0).integers(0, TINY["vocab_size"], PROMPT).tolist()
    session = Session(model, cache)
    rows = [session(ids[i : i + chunk]) for i in range(0, PROMPT, chunk)]
    for _ in range(DECODE):
        ids.append(int(rows[-1][-1].argmax()))
        rows.append(session(ids[-1:]))
    with torch.inference_mode():
        return np.concatenate(rows), theirs(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("row", ROWS)
def test_config(row: str, tmp_path: Path) -> None:
    model_type, config = ROWS[row]
    theirs = reference(tmp_path, model_type, **config)
    routed = model_type.endswith("moe")                    # rounding may send a token to another expert
    compare(build(read(tmp_path)), theirs, fast=1e-1 if routed else 1e-2)


@pytest.fixture
def without_tiles():
    """AMX attention rounds probabilities to bfloat16 where a tile has rows enough, which the mix of a step decides."""
    runtime = cpu.runtime()
    before = runtime.isa
    runtime.set_isa("avx512" if before == "amx" else before)
    yield
    runtime.set_isa(before)


def ints(values) -> mx.Array:
    return mx.array(np.array(values), dtype=mx.int32)


@pytest.mark.parametrize("row", [row for row in ROWS if ROWS[row][0] != "llama"])
def test_ragged_is_solo(row: str, tmp_path: Path, without_tiles: None) -> None:
    """Sequences of different lengths in one step, on pages in no order, get the logits that each gets alone."""
    model_type, config = ROWS[row]
    reference(tmp_path, model_type, **config)
    model, counts, pages = build(read(tmp_path)), [7, 40, 5, 33], [[2, 0], [4, 6], [3, 0], [1, 5]]
    random = np.random.default_rng(1)
    prompts = [random.integers(0, TINY["vocab_size"], n) for n in counts]
    alone = [np.asarray(model(ints(p))) for p in prompts]
    slots = [row[i // nn.PAGE] * nn.PAGE + i % nn.PAGE for n, row in zip(counts, pages, strict=True) for i in range(n)]
    context = nn.Context(
        positions=ints(np.concatenate([np.arange(n) for n in counts])), slots=ints(slots),
        starts=ints(np.cumsum([0, *counts[:-1]])), counts=ints(counts), lengths=ints(counts), page_table=ints(pages),
        layers=[nn.LayerCache.empty(7, heads, dim) for heads, dim, _ in model.cache_spec()],
    )
    together = np.asarray(model(ints(np.concatenate(prompts)), context))
    wanted = np.concatenate(alone)
    assert np.abs(together - wanted).max() <= 2e-5 * np.abs(wanted).max()  # a cached float16 may round the other way


@pytest.mark.parametrize(("cache", "error"), [(mx.float16, 1e-3), (mx.bfloat16, 1e-2), (mx.int8, 2e-2)], ids=str)
def test_cache_dtype(cache: mx.Dtype, error: float, tmp_path: Path) -> None:
    """What rounding keys and values costs, against a float32 cache."""
    reference(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    compare(build(read(tmp_path)), theirs, exact=error, fast=error + 1e-2, cache=cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = reference(tmp_path, dtype=dtype, attention_bias=True, mlp_bias=True)
    model = build(read(tmp_path))
    assert str(model.lm_head.weight.dtype).split(".")[-1] == str(dtype).split(".")[-1]
    compare(model, theirs)


def test_shards(tmp_path: Path) -> None:
    theirs = reference(tmp_path, shard="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    compare(build(read(tmp_path)), theirs)


def quantize_folder(folder: Path, formats: dict[str, tuple[int, int]], default: tuple[int, int]) -> dict:
    """Rewrites a folder as mlx-lm would, with mlx's own quantizer. Returns the weights that the codes stand for."""
    config = json.loads((folder / "config.json").read_text())
    entry = {"bits": default[0], "group_size": default[1], "mode": "affine"}
    entry |= {path: {"bits": bits, "group_size": group} for path, (bits, group) in formats.items()}
    tensors, dense = {}, {}
    for name, weight in mlx.load(str(folder / "model.safetensors")).items():
        path = name.removesuffix(".weight")
        bits, group = formats.get(path, default)
        if weight.ndim == 2:
            codes, scales, biases = mlx.quantize(weight, group, bits)
            tensors |= {name: codes, f"{path}.scales": scales, f"{path}.biases": biases}
            weight = mlx.dequantize(codes, scales.astype(mlx.float32), biases.astype(mlx.float32), group, bits)
        else:
            tensors[name] = weight
        dense[name] = torch.tensor(np.array(weight.astype(mlx.float32)))
    mlx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization": entry, "quantization_config": entry}))
    return dense


MIXED = {"lm_head": (8, 64), "model.embed_tokens": (8, 32), "model.layers.1.mlp.down_proj": (8, 32)}
QUANTIZED = {  # (bits, group size), exceptions by path
    "4 bits": ((4, 64), {}),
    "4 bits, groups of 32": ((4, 32), {}),
    "8 bits": ((8, 64), {}),
    "mixed": ((4, 32), MIXED),
}


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("row", QUANTIZED)
def test_quantized(row: str, tied: bool, tmp_path: Path) -> None:
    default, formats = QUANTIZED[row]
    theirs = reference(tmp_path, tie_word_embeddings=tied, intermediate_size=128, dtype=torch.bfloat16)
    theirs.load_state_dict(quantize_folder(tmp_path, formats, default), strict=not tied)
    model = build(read(tmp_path))
    assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding)
    compare(model, theirs, exact=1e-3, fast=4e-2)  # activations of 14 bits and of 8


NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
         "o_proj": "attn_output", **{f"{x}_proj": f"attn_{x}" for x in "qkv"},
         **{f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}}


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_gguf_architectures(arch: str, tmp_path: Path) -> None:
    """A file as llama.cpp's converter writes it, by the package `gguf`."""
    theirs = reference(tmp_path / "hf", arch, head_dim=16)
    writer, c = gguf.GGUFWriter(tmp_path / "model.gguf", arch), theirs.config
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    for name, weight in theirs.state_dict().items():
        words = name.split(".")
        layer = f"blk.{words[2]}." if "layers" in words else ""
        writer.add_tensor(f"{layer}{NAMES[words[-2]]}.{words[-1]}", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    compare(build(read(tmp_path / "model.gguf")), theirs)

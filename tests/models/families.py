"""The families and what is measured of each against transformers: the same tiny random weights in both.

test_numerics.py holds every row to its tolerance; `python tests/models/families.py` writes docs/families.md.
"""
from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from lazulite.engine import array as mx
from lazulite.engine import nn
from lazulite.models import build, read

logging.disable_progress_bar()
torch.set_num_threads(1)             # of models this small
TINY = dict(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=False,
)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=128,
                short_factor=[1.0 + i / 8 for i in range(8)], long_factor=[2.0 + i for i in range(8)])
LONG = {**LONGROPE, "original_max_position_embeddings": 32, "partial_rotary_factor": 0.75,
        "short_factor": LONGROPE["short_factor"][:6], "long_factor": LONGROPE["long_factor"][:6]}
PARTIAL = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
GEMMA3 = {"full_attention": dict(rope_type="linear", rope_theta=1e6, factor=4.0),
          "sliding_attention": dict(rope_type="default", rope_theta=1e4)}
DELTA = dict(num_hidden_layers=4, head_dim=32, initializer_range=0.05, linear_key_head_dim=16,
             linear_value_head_dim=24, linear_num_key_heads=2, linear_num_value_heads=4)
MOE = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {  # what differs: transformers' model_type, config
    "llama": ("llama", {}),
    "every head its own": ("llama", dict(num_key_value_heads=4)),
    "one kv head": ("llama", dict(num_key_value_heads=1)),
    "tied": ("llama", dict(tie_word_embeddings=True)),
    "biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "head_dim": ("llama", dict(head_dim=32)),
    "gelu": ("llama", dict(hidden_act="gelu_pytorch_tanh")),
    "rope linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "rope dynamic": ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0))),
    "rope llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "rope yarn": ("llama", dict(rope_parameters=YARN)),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral window": ("mistral", dict(sliding_window=20, head_dim=32)),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "qwen2": ("qwen2", {}),
    "qwen2 windows": ("qwen2", dict(use_sliding_window=True, sliding_window=20, max_window_layers=1)),
    "qwen2_moe": ("qwen2_moe", dict(**MOE, mlp_only_layers=[1], shared_expert_intermediate_size=64)),
    "qwen3": ("qwen3", dict(head_dim=32)),
    "qwen3 windows": ("qwen3", dict(head_dim=32, use_sliding_window=True, sliding_window=20, max_window_layers=1)),
    "qwen3_moe": ("qwen3_moe", dict(**MOE, head_dim=32, norm_topk_prob=True)),
    "qwen3_5": ("qwen3_5_text", DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", dict(**DELTA, **MOE, shared_expert_intermediate_size=64)),
    "gemma": ("gemma", dict(head_dim=32, tie_word_embeddings=True)),
    "gemma2": ("gemma2", dict(head_dim=32, sliding_window=20, query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
                              final_logit_softcapping=3.0, tie_word_embeddings=True)),
    "gemma3_text": ("gemma3_text", dict(head_dim=32, sliding_window=20, query_pre_attn_scalar=24,
                                        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                                        rope_parameters=GEMMA3, tie_word_embeddings=True)),
    "phi3": ("phi3", dict(pad_token_id=0, sliding_window=None)),
    "phi3 window": ("phi3", dict(pad_token_id=0, sliding_window=20)),
    "phi3 partial": ("phi3", dict(pad_token_id=0, rope_parameters=PARTIAL)),
    "phi3 longrope": ("phi3", dict(pad_token_id=0, original_max_position_embeddings=128, rope_parameters=LONGROPE)),
    "phi3 long": ("phi3", dict(pad_token_id=0, original_max_position_embeddings=32, tie_word_embeddings=True,
                               partial_rotary_factor=0.75, rope_parameters=LONG)),
    "smollm3": ("smollm3", dict(pad_token_id=0, no_rope_layer_interval=2, tie_word_embeddings=True)),
    "smollm3 windows": ("smollm3", dict(pad_token_id=0, use_sliding_window=True, sliding_window=20,
                                        no_rope_layer_interval=2)),
    "olmo2": ("olmo2", dict(num_key_value_heads=2)),
    "granite": ("granite", dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5,
                                logits_scaling=4.0)),
    "cohere2": ("cohere2", dict(sliding_window=20, sliding_window_pattern=2, logit_scale=0.5,
                                tie_word_embeddings=True)),
    "gpt_oss": ("gpt_oss", dict(num_local_experts=4, num_experts_per_tok=2, head_dim=32, sliding_window=20,
                                rope_parameters={**YARN, "truncate": False})),
    "gpt2": ("gpt2", dict(n_embd=64, n_layer=3, n_head=4, n_positions=256,
                          num_key_value_heads=4, intermediate_size=256, tie_word_embeddings=True)),
}
PROMPT, DECODE = 45, 16              # the prompt crosses a page, decoding crosses the next
COUNTS, PAGES = (7, 40, 5, 33), ((2, 0), (4, 6), (3, 0), (1, 5))  # of sequences in one step, pages in no order
FORMATS = "float32, bfloat16, 4 bits"     # of a family's first row; the others differ in what no format touches


def reference(folder: Path, model_type: str = "llama", *, dtype=torch.float32, shard: str = "1GB", **config):
    """Saves a random model of transformers and returns it as loaded again, computing in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TINY, **config}))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)  # norms and biases that are not all alike
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return loaded(folder)


def loaded(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


class Session:
    """One sequence with a cache, step by step."""

    def __init__(self, model, cache: mx.Dtype, most: int = 128):
        self.model, self.past = model, 0
        self.layers = nn.caches(model.cache_spec(), most // nn.PAGE, 1, cache)

    def __call__(self, tokens: list[int]) -> np.ndarray:
        context = nn.Context.single(len(tokens), self.layers, start=self.past)
        logits = self.model(mx.array(tokens, dtype=mx.int32), context)
        mx.eval(logits, *(array for layer in context.layers for array in layer if array is not None))
        self.layers, self.past = context.layers, self.past + len(tokens)
        return np.asarray(logits)


def logits(model, theirs, chunk: int = PROMPT, cache: mx.Dtype = mx.float32, decode: int = DECODE):
    """Ours and theirs after each token of a prompt that is run in chunks, and of what is decoded from it."""
    ids = np.random.default_rng(0).integers(0, TINY["vocab_size"], PROMPT).tolist()
    session = Session(model, cache)
    rows = [session(ids[i : i + chunk]) for i in range(0, PROMPT, chunk)]
    for _ in range(decode):
        ids.append(int(rows[-1][-1].argmax()))
        rows.append(session(ids[-1:]))
    with torch.inference_mode():
        return np.concatenate(rows), theirs(torch.tensor([ids])).logits[0].numpy()


def errors(model, theirs, *arguments, **options) -> tuple[float, float, bool]:
    """The largest error of a logit in parts of the largest logit, of the prompt and of what is decoded; whether the
    greedy tokens are the same."""
    ours, wanted = logits(model, theirs, *arguments, **options)
    found = np.abs(ours - wanted).max(1) / np.abs(wanted).max()
    same = bool((ours.argmax(1) == wanted.argmax(1))[PROMPT:].all())
    return found[:PROMPT].max(), found[PROMPT:].max(initial=0.0), same


def ints(values) -> mx.Array:
    return mx.array(np.array(values), dtype=mx.int32)


def ragged_error(model, cache: mx.Dtype = mx.float32) -> float:
    """Sequences of different lengths in one step against each alone, in parts of the largest logit."""
    random = np.random.default_rng(1)
    prompts = [random.integers(0, TINY["vocab_size"], n) for n in COUNTS]
    wanted = np.concatenate([Session(model, cache)(p.tolist()) for p in prompts])
    slots = [row[i // nn.PAGE] * nn.PAGE + i % nn.PAGE for n, row in zip(COUNTS, PAGES, strict=True) for i in range(n)]
    context = nn.Context(
        positions=ints(np.concatenate([np.arange(n) for n in COUNTS])), slots=ints(slots),
        starts=ints(np.cumsum([0, *COUNTS[:-1]])), counts=ints(COUNTS), lengths=ints(COUNTS), page_table=ints(PAGES),
        layers=nn.caches(model.cache_spec(), 7, 5, cache), states=ints([2, 0, 4, 1]),
    )
    contexts = context, nn.Context.packed(COUNTS)                # as it serves, as it trains
    together = [np.asarray(model(ints(np.concatenate(prompts)), context)) for context in contexts]
    return max(np.abs(found - wanted).max() for found in together) / np.abs(wanted).max()


def quantize(model, folder: Path, bits: int = 4, group: int = 32):
    """Quantizes the model in place; returns transformers' with the weights that the codes stand for.

    `sanitize` only moves numbers, so what it makes of their places says where each goes back to.
    """
    files, start = read(folder), 0
    places = {name: np.arange(array.size, dtype=np.int32).reshape(array.shape) for name, array in files.tensors.items()}
    for name in places:
        places[name] += start
        start += places[name].size
    flat = np.concatenate([np.asarray(array.astype(mx.float32)).ravel() for array in files.tensors.values()])
    moved = model.sanitize({name: mx.array(array) for name, array in places.items()})

    def layer(path: str, module: nn.Module) -> nn.Module | None:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group:
            return None
        made = module.to_quantized(group, bits)
        dense = mx.dequantize(made.weight, made.scales, made.biases, group, bits)
        flat[np.asarray(moved[f"{path}.weight"]).ravel()] = np.asarray(dense).ravel()
        return made

    nn.swap(model, layer)
    file = folder / "model.safetensors"
    save_file({name: torch.tensor(flat[places[name]]) for name in load_file(file)}, file, {"format": "pt"})
    return loaded(folder)


def measure(row: str, folder: Path) -> dict[str, Any]:
    """All numbers of a row, by name; a family's first row has those of the other formats too."""
    model_type, config = ROWS[row]
    theirs = reference(folder, model_type, **config)
    model, found = build(read(folder)), {}
    found["prefill"], found["decode"], found["greedy"] = errors(model, theirs)
    found["chunked"], *_ = errors(model, theirs, 16, decode=0)
    found["ragged"] = ragged_error(model)
    if row != next(name for name in ROWS if ROWS[name][0] == model_type):
        return found
    half = folder / "bfloat16"
    theirs.to(torch.bfloat16).save_pretrained(half)
    found["bfloat16"] = max(errors(build(read(half)), loaded(half))[:2])
    theirs = quantize(model, folder)
    with mx.fast.precise():
        prompt, decoded, exact = errors(model, theirs)
    found["4-bit exact"] = max(prompt, decoded)
    prompt, decoded, few = errors(model, theirs, 4)
    found["4-bit few rows"], found["4-bit greedy"] = max(prompt, decoded), exact and few
    found["4-bit prompt"], *_ = errors(model, theirs, decode=0)
    return found


HEAD = """# Families against transformers

Each row is a tiny random model of `transformers`, saved to disk and loaded here; both compute the logits of a prompt
of 45 tokens and of 16 tokens that are decoded from it. An error is the largest of a logit, in parts of the largest
logit; the greedy tokens are the same in every row. A family's first row is its plain self and is tried in more formats.
`python tests/models/families.py` wrote this table, and `tests/models/test_numerics.py` holds every row to the
tolerance at the head of its column.

* **prefill, decode**: float32 weights and pages, against transformers in float32. The prompt runs in one step.
* **ragged**: four sequences of 5 to 40 tokens in one step, on pages in no order, and packed for training without
  pages, against each of them alone.
* **bfloat16**: weights in bfloat16, prompt and decoding, against transformers in float32 with the same weights.
* **4 bits, exact**: quantized here (groups of 32), against transformers with the weights that the codes stand for;
  products are taken in float32 (`mx.fast.precise`).
* **4 bits, few rows**: as decoding runs, activations of 15 bits; the prompt in steps of 4 tokens.
* **4 bits, prompt**: as a prompt runs, activations of 8 bits or bfloat16. Where experts are chosen, such rounding may
  send a token to another one.

"""
COLUMNS = {  # column: (what `measure` calls it, tolerance)
    "prefill": ("prefill", 2e-4), "decode": ("decode", 2e-4), "ragged": ("ragged", 1e-5),
    "bfloat16": ("bfloat16", 2e-4), "4 bits, exact": ("4-bit exact", 2e-4),
    "4 bits, few rows": ("4-bit few rows", 2e-3), "4 bits, prompt": ("4-bit prompt", 1e-1),
}


def heads() -> list[str]:
    return [f"{column} (≤ {tolerance:.0e})" for column, (_, tolerance) in COLUMNS.items()]


def main() -> None:
    lines = ["| row | model_type | " + " | ".join(heads()) + " | formats tried |", "|---" * (len(COLUMNS) + 3) + "|"]
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(None):
            found = measure(row, Path(folder))
        numbers = [f"{found[name]:.1e}" if name in found else "–" for name, _ in COLUMNS.values()]
        formats = FORMATS if "bfloat16" in found else "float32"
        lines.append(f"| {row} | {ROWS[row][0]} | {' | '.join(numbers)} | {formats} |")
        print(lines[-1], flush=True)
    path = Path(__file__).parents[2] / "docs" / "families.md"
    path.write_text(HEAD + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""A path or a repo id to a model with its weights in place. Weights are mapped: nothing is read before it is used."""
from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine import array as mx
from ..engine import nn
from ..engine.array.quantized import MODES, mode_of
from ..engine.errors import UserError
from . import weights
from .blocks import Decoder
from .weights import Weights

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

FAMILIES = (  # one file each, named after config.json's model_type
    "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "granite", "llama", "mistral", "mixtral", "olmo2",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "smollm3",
)
ALIASES = {  # model_type of a text_config: the family that it is
    "gemma3": "gemma3_text", "qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5_moe", "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe",
}
CONTEXT = 4096  # tokens of cache that must find room beside the weights


def load(path_or_id: str | os.PathLike[str] | None = None) -> tuple[Decoder, Tokenizer]:
    """A model and its tokenizer from a Hugging Face or MLX folder, a .gguf file or a repo id; None: the default model.

    Raises UserError with the file, what was found and what was wanted.
    """
    files = weights.read(path_or_id)
    return build(files), files.tokenizer()


def family(model_type: str) -> type[Decoder]:
    """The Model class of the family file named after `model_type`."""
    model_type = ALIASES.get(model_type, model_type)
    if model_type not in FAMILIES:
        near = get_close_matches(model_type, FAMILIES, 1, 0.0)[0]
        what = f"[load] model_type {model_type[:40]!r} is not supported, the nearest that is: {near!r}"
        raise UserError(what, f"supported: {', '.join(FAMILIES)}")
    return importlib.import_module(f".{model_type}", __package__).Model


def build(files: Weights) -> Decoder:
    """The family's module tree with these weights in it: quantized where they are."""
    raw = files.config
    model_class = family(str(raw.get("model_type")))
    with contradictions(files), nn.loading():
        plausible(files)
        eos = files.generation_config.get("eos_token_id") or raw.get("eos_token_id")
        model = model_class(model_class.config_class.from_dict({**raw, "eos_token_id": eos}))
    foresee(files, model)
    with contradictions(files), nn.loading():
        tensors = model.sanitize(files.tensors)
        nn.swap(model, lambda path, module: _quantized(path, module, tensors))
    try:
        model.load_weights(tensors.items())
    except ValueError as error:
        what = f"{files.path}: {str(error).removeprefix('[load_weights] ')}"
        raise UserError(what, "config.json and the weights do not belong together, or files are missing") from None
    return model


@contextmanager
def contradictions(files: Weights) -> Iterator[None]:
    """Values of config.json that no check foresaw and no model can have."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        what = f"{files.path}: config.json: {type(error).__name__}: {str(error)[:200]}"
        raise UserError(what, "config.json contradicts itself or the weights: fetch the model again") from error


def plausible(files: Weights) -> None:
    """Refuses sizes that the files, if there are any, cannot hold, before anything of that size is made."""
    most = 8 * files.nbytes or 1 << 62  # one bit a weight
    limits = dict.fromkeys(("num_hidden_layers", "n_layer"), max(len(files.parts), 64))  # so few cost nothing
    for name, limit in {**dict.fromkeys(SIZES, most), **limits}.items():
        if isinstance(found := files.config.get(name), int) and found > limit:
            hint = "config.json and the weights do not belong together, or files are missing"
            raise UserError(f"{files.path}: config.json: {name} is {found}, the files hold at most {limit}", hint)


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads",
         "n_embd", "n_head", "num_experts", "num_local_experts")


def _quantized(path: str, module: nn.Module, tensors: dict[str, mx.Array]) -> nn.Module | None:
    """The quantized twin of a layer that has scales. Shapes say the format; configs have been wrong about it."""
    scales, weight = tensors.get(f"{path}.scales"), tensors.get(f"{path}.weight")
    if scales is None or weight is None or not hasattr(module, "to_quantized"):
        return None
    columns, affine = module.weight.shape[-1], f"{path}.biases" in tensors
    bits, group_size = weight.shape[-1] * 32 / columns, columns / scales.shape[-1]
    mode = mode_of(bits, group_size, scales.dtype, affine)
    if mode is None:
        sides = f"scales {scales.dtype}, with{'' if affine else 'out'} biases"
        read = ", ".join(f"{name} bits {sorted(b)} groups {sorted(g)}" for name, (g, b) in MODES.items())
        raise UserError(f"[load] {path} has {bits:g} bits in groups of {group_size:g}, {sides}", f"read: {read}")
    twin = module.to_quantized(int(group_size), int(bits), mode)
    if f"{path}.order" in tensors:
        twin.order = mx.zeros((columns,), mx.int32)
    return twin


def foresee(files: Weights, model: Decoder) -> None:
    """Raises UserError if the weights and a float16 cache do not fit in memory, before any of it is taken."""
    tokens = min(CONTEXT, model.config.max_position_embeddings)
    cache = sum(spec.nbytes(tokens) for spec in model.cache_spec())
    if (needed := files.nbytes + cache) > (available := available_memory()):
        what = f"{files.path}: weights and a cache of {tokens} tokens take {needed / 1e9:.1f} GB of memory"
        hint = "close other programs, or take a smaller model or fewer bits: llm convert -q"
        raise UserError(f"{what}, {available / 1e9:.1f} GB are available", hint)


def available_memory() -> int:
    """Bytes that can be taken without swapping, as the system and the control group allow."""
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.exists():  # macOS gives memory back as it is asked for: all of it counts
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text())
    free = int(found[1]) * 1024 if found else 1 << 62
    most = limit.read_text().strip() if limit.exists() else "max"
    return free if most == "max" else min(free, int(most))

"""What is on the disk of a model: its config, its tensors, its tokenizer, whatever the format."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..engine import array as mx
from ..engine.array.quantized import MODES
from ..engine.errors import UserError
from . import foreign, gguf, hub, safetensors

Part = dict[str, mx.Array]  # a tensor, or the codes, scales and biases of a quantized one, by name


@dataclass
class Weights:
    """A model's files, mapped. `config` and `generation_config` are Hugging Face's; names are Hugging Face's."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    parts: list[Callable[[], Part]] = field(repr=False)  # each yields one weight, so that a converter can stream
    nbytes: int  # of the weight files
    tokenizer: Callable[[], Any] = field(repr=False)  # reads the Tokenizer

    @cached_property
    def tensors(self) -> Part:
        """All tensors by name: views of the map where the file's layout is ours."""
        return {name: array for part in self.parts for name, array in part().items()}


def read(path_or_id: str | os.PathLike[str] | None = None) -> Weights:
    """The files of a folder, a .gguf file or a Hub id (fetched if need be); None is the default model."""
    path = hub.resolve(path_or_id)
    return read_folder(path) if path.is_dir() else read_gguf(path)


def read_folder(folder: Path) -> Weights:
    """A Hugging Face or MLX folder: config.json, model*.safetensors, tokenizer.json."""
    from . import tokenizer

    if not (folder / "config.json").is_file():
        hint = "A model folder has config.json, model*.safetensors and tokenizer.json."
        raise UserError(f"{folder}: no config.json", hint)
    config, generation = (tokenizer.read_json(folder / f"{name}.json") for name in ("config", "generation_config"))
    files = safetensors.find(folder)
    tensors: Part = {}
    for file in files:
        found = safetensors.read(file)
        if twice := tensors.keys() & found.keys():
            raise UserError(f"{file}: tensor {min(twice)} is in another file of {folder} too")
        tensors |= found
    config, tensors = text_part(folder, config, tensors)
    config, parts = grouped(folder, config, tensors)
    size = sum(file.stat().st_size for file in files)
    return Weights(folder, config, generation, parts, size, lambda: tokenizer.from_folder(folder))


def grouped(folder: Path, config: dict[str, Any], tensors: Part) -> tuple[dict[str, Any], list[Callable[[], Part]]]:
    """The config, with MLX's `quantization`, and the weights, each with its scales, as functions that give them."""
    settings = config.get("quantization_config")
    settings = settings if isinstance(settings, dict) else {}
    method = foreign.method(settings, folder)
    groups: dict[str, Part] = {}
    foreigners: dict[str, Part] = {}
    for name, array in tensors.items():
        if method and (found := foreign.split(method, name)):
            foreigners.setdefault(found[0], {})[found[1]] = array
        else:
            path, _, leaf = name.rpartition(".")
            groups.setdefault(path if leaf in ("weight", "scales", "biases") else name, {})[name] = array
    parts: list[Callable[[], Part]] = [partial(dense, group) for group in groups.values()]
    if method:
        parts += [partial(method.read, path, group, settings) for name, group in foreigners.items()
                  for path in method.paths(name)]
        quantization = method.format(settings)
        config = config | {"quantization": quantization, "quantization_config": quantization}
    return config, parts


def dense(part: Part) -> Part:
    """A weight of a type that kernels do not have in one that they have: e4m3 as bfloat16, float64 as float32."""
    if len(part) > 1:
        return part
    [(name, array)] = part.items()
    if array.dtype is mx.uint8 and name.endswith(".weight"):
        return {name: mx.from_fp8(array)}
    return {name: array.astype(mx.float32)} if array.dtype is mx.float64 else part


TOWER = re.compile(r"(?:model\.)?(?:language_model|text_model)\.(?:model\.)?")    # what the text part's names begin by
PLAIN = re.compile(r"lm_head\.|model\.(embed_tokens|layers|norm)\.")


def text_part(folder: Path, config: dict[str, Any], tensors: Part) -> tuple[dict[str, Any], Part]:
    """Of a model that sees or hears too, the config and tensors of its language model, under that one's own names."""
    text = config.get("text_config")
    if not isinstance(text, dict):  # mlx-lm writes a text model of a multi-modal family under its tower's name
        return config, {name.removeprefix("language_model."): array for name, array in tensors.items()}
    outer = {key: value for key, value in config.items() if not key.endswith("_config") or key == "quantization_config"}
    outer.pop("architectures", None)

    def own(name: str) -> str:
        found = TOWER.match(name)
        rest = name[found.end():] if found else name
        return rest if not found or rest.startswith("lm_head") else f"model.{rest}"

    kept = {own(name): array for name, array in tensors.items() if TOWER.match(name) or PLAIN.match(name)}
    for key in ("quantization", "quantization_config"):
        if isinstance(outer.get(key), dict):
            outer[key] = {own(path): value for path, value in outer[key].items()}
    left = len(tensors) - len(kept)
    kind = config.get("model_type")
    print(f"{folder}: {kind} has more than text; its text part is loaded, {left} tensors are left out", file=sys.stderr)
    tied = {key: outer[key] for key in outer if key == "tie_word_embeddings"}  # who owns the head says so
    return {**outer, **text, **tied, "model_type": text.get("model_type") or kind}, kept


def format_of(path: str, part: Part, settings: Any) -> tuple[int, int, str]:
    """Group size, bits and mode of a quantized weight. Shapes say all but affine's, for which config.json's
    `quantization` must: `settings`, an entry for the path first."""
    codes, scales = part[f"{path}.weight"], part[f"{path}.scales"]
    ratio, floats = codes.shape[-1] * 32 / scales.shape[-1], scales.dtype is not mx.uint8  # group size times bits
    if f"{path}.biases" not in part:
        for mode, (groups, widths) in MODES.items():
            for group in groups:
                if mode != "affine" and floats == (mode == "fp8") and group * widths[0] == ratio:
                    return group, widths[0], mode
    entry = (settings or {}).get(path)
    entry = entry if isinstance(entry, dict) else settings or {}
    group, bits = entry.get("group_size") or 64, entry.get("bits") or 4
    if f"{path}.biases" not in part or group * bits != ratio:
        found = f"{codes.shape[-1]} words, {scales.shape[-1]} scales of {scales.dtype}"
        wanted = f"{entry.get('mode', 'affine')} with {bits} bits in groups of {group}"
        raise UserError(f"[convert] {path}: found {found}, wanted {wanted}")
    return group, bits, "affine"


def expanded(path: str, part: Part, settings: Any) -> mx.Array:
    """The numbers of a quantized weight in float32, columns in their own order."""
    group, bits, mode = format_of(path, part, settings)
    w = mx.dequantize(part[f"{path}.weight"], part[f"{path}.scales"], part.get(f"{path}.biases"), group, bits, mode,
                      dtype=mx.float32)
    order = part.get(f"{path}.order")
    return w if order is None else mx.take(w, mx.argsort(order), axis=1)


def read_gguf(path: Path) -> Weights:
    """A GGUF file, with the config, tokenizer and chat template inside it."""
    from . import tokenizer

    file = gguf.open_all(path)
    config = gguf.config(file)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return Weights(
        path, config, generation, gguf.parts(file), file.size, lambda: tokenizer.from_gguf(file.metadata, path)
    )

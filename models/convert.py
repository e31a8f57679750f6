"""Writes a model as a folder that MLX, mlx-lm and Hugging Face read, weight by weight: it need not fit in memory."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..engine import array as mx
from ..engine.errors import UserError
from .hub import PATTERNS
from .safetensors import Writer
from .weights import Part, Weights, read

DROPPED = ("rotary_emb.inv_freq",)  # computed, not weights
FLOATS = {dtype.name: dtype for dtype in (mx.float16, mx.bfloat16, mx.float32)}

Progress = Callable[[int, int], None]  # weights done, weights in all


class Quantizer(Protocol):
    """Gives the codes, scales and biases of a weight, or None to leave it; `config` is what config.json says of it."""

    config: dict[str, Any]

    def __call__(self, name: str, array: mx.Array) -> Part | None: ...


def convert(
    source: str | None,
    dest: str | Path,
    quantize: Quantizer | None = None,
    dtype: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Converts a folder, a .gguf file or a Hub id to the new folder `dest`.

    Weights that are quantized keep their codes, unless `quantize` is given: then they are expanded first. `dtype`
    (float16, bfloat16, float32) is that of the floats; left out, they stay as they are. `dest` appears when it is
    complete, or not at all. UserError if it exists, or the disk is full.
    """
    dest = Path(dest)
    if dest.exists():
        raise UserError(f"{dest}: exists already", "Name a new folder, or remove this one.")
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"[convert] dtype {dtype!r} is not supported; supported: {', '.join(FLOATS)}")
    weights = read(source)
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        partial = dest.with_name(f"{dest.name}.partial-{os.getpid()}")
        partial.mkdir()
        try:
            write(weights, partial, quantize, FLOATS[dtype] if dtype else None, progress)
            partial.rename(dest)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        hint = "Nothing was left behind. Free some space, or name another disk."
        raise UserError(f"{dest}: could not be written: {error.strerror or error}", hint) from None
    return dest


def write(weights: Weights, folder: Path, quantize: Quantizer | None, dtype: Any, progress: Progress) -> None:
    tied, settings = bool(weights.config.get("tie_word_embeddings")), weights.config.get("quantization")
    write_tokenizer(weights, folder)
    writer, parameters = Writer(folder, room=1024 + 1024 * len(weights.parts)), 0
    for done, read_part in enumerate(weights.parts):
        progress(done, len(weights.parts))
        part = read_part()
        name = next(iter(part))
        if name.endswith(DROPPED) or (tied and name.startswith("lm_head.")):
            continue
        part, size = convert_part(part, settings, quantize, dtype)
        parameters += size
        for name, array in part.items():
            writer.add(name, array)
    writer.finish(parameters)
    progress(len(weights.parts), len(weights.parts))
    write_config(weights, folder, quantize.config if quantize else settings, dtype)


def convert_part(part: Part, settings: Any, quantize: Quantizer | None, dtype: Any) -> tuple[Part, int]:
    """One weight as it is written, and how many parameters it holds."""
    name = next((name for name in part if name.endswith(".weight")), next(iter(part)))
    path, array = name.removesuffix(".weight"), part[name]
    if f"{path}.scales" in part:
        scales, format = part[f"{path}.scales"], quantized_as(path, part, settings)
        size = array.size * 32 // format["bits"]
        if quantize is None:
            return part, size
        array = mx.dequantize(array, *(part[f"{path}.{x}"].astype(mx.float32) for x in ("scales", "biases")), **format)
        array = array.astype(dtype or scales.dtype)
    elif dtype and array.dtype in FLOATS.values():
        array = array.astype(dtype)
    return (quantize(name, array) if quantize else None) or {name: array}, array.size


def quantized_as(path: str, part: Part, settings: Any) -> dict[str, int]:
    """The group size and bits that config.json states for a module, checked against its shapes."""
    entry = (settings or {}).get(path)
    entry = entry if isinstance(entry, dict) else settings or {}
    group, bits = entry.get("group_size") or 64, entry.get("bits") or 4
    words, groups = part[f"{path}.weight"].shape[-1], part[f"{path}.scales"].shape[-1]
    if f"{path}.biases" not in part or groups * group * bits != words * 32:
        found = f"{words} words and {groups} scales, mode {entry.get('mode', 'affine')}"
        raise UserError(f"[convert] {path}: found {found}, wanted affine with {bits} bits in groups of {group}")
    return {"group_size": group, "bits": bits}


def write_config(weights: Weights, folder: Path, settings: Any, dtype: Any) -> None:
    dropped = ("quantization", "quantization_config", "_name_or_path")
    config = {key: value for key, value in weights.config.items() if key not in dropped}
    if settings:
        config["quantization"] = config["quantization_config"] = settings
    if dtype:
        config["torch_dtype"] = dtype.name
    (folder / "config.json").write_text(json.dumps(finite(dict(sorted(config.items()))), indent=4), "utf-8")


def finite(value: Any) -> Any:
    """JSON has no infinities; transformers writes them as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return {"__float__": json.dumps(value)} if isinstance(value, float) and not math.isfinite(value) else value


def write_tokenizer(weights: Weights, folder: Path) -> None:
    """The tokenizer, chat template and generation config: the source's files, or those made from what a GGUF holds."""
    if weights.path.is_dir():
        for pattern in PATTERNS:
            for file in weights.path.glob(pattern):
                if not file.name.startswith(("config.json", "model")):
                    shutil.copyfile(file, folder / file.name)
        return
    (folder / "generation_config.json").write_text(json.dumps(weights.generation_config, indent=2))
    weights.tokenizer().save(folder)

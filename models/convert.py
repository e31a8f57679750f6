"""Writes a model as a folder that MLX, mlx-lm and Hugging Face read, weight by weight: it need not fit in memory."""

import json
import math
import mmap
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..engine import array as mx
from ..engine.errors import UserError
from .hub import PATTERNS
from .load import FAMILIES, family
from .weights import Part, Weights, expanded, format_of, read
from .writer import Journal, Writer, resumable

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
    dequantize: bool = False,
) -> Path:
    """Converts a folder, a .gguf file or a Hub id to the new folder `dest`.

    Weights that are quantized keep their codes, unless `quantize` or `dequantize` is given: then they are expanded
    first. `dtype` (float16, bfloat16, float32) is that of the floats; left out, they stay as they are. `dest` appears
    when it is complete; until then `dest`.partial has what is done, and the same call goes on from there. UserError if
    `dest` exists, or the disk is full.
    """
    dest = new(dest)
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"[convert] dtype {dtype!r} is not supported; supported: {', '.join(FLOATS)}")
    weights = read(source)
    settings = {"quantization": quantize and dict(quantize.config), "dtype": dtype, "dequantize": dequantize}
    settings |= getattr(quantize, "job", {})
    with resumable(dest, job(weights, settings)) as (folder, journal):
        write(weights, folder, journal, quantize, FLOATS[dtype] if dtype else None, dequantize, progress)
    return dest


def new(dest: str | Path) -> Path:
    if (dest := Path(dest)).exists():
        raise UserError(f"{dest}: exists already", "Name a new one, or remove this one.")
    return dest


def job(weights: Weights, settings: dict[str, Any]) -> dict[str, Any]:
    """What is converted, and how: a conversion that was stopped is resumed if all of it is still the same."""
    files = sorted(weights.path.iterdir()) if weights.path.is_dir() else [weights.path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {"source": str(weights.path.resolve()), "files": stats, "weights": len(weights.parts), **settings}


def write(
    weights: Weights, folder: Path, journal: Journal, quantize: Quantizer | None, dtype: Any, dequantize: bool,
    progress: Progress,
) -> None:  # fmt: skip
    settings, total = weights.config.get("quantization"), len(weights.parts)
    writer, stated = Writer(folder, room=1024 + 1024 * total), quantize.config if quantize else {}
    for row in journal.done:
        writer.replay(row["tensors"])
        stated |= row["config"]
    writer.resume()
    layout = as_mlx(weights) if quantize else lambda part: [part]
    for done in range(len(journal.done), total):
        progress(done, total)
        part, before, row = weights.parts[done](), set(stated), {"tensors": {}, "parameters": 0}
        for one in [] if left_out(next(iter(part)), weights) else layout(part):
            converted, size = convert_part(one, settings, quantize, dtype, dequantize)
            row["tensors"] |= {name: writer.add(name, array) for name, array in converted.items()}
            row["parameters"] += size
        journal.add(row | {"config": {key: value for key, value in stated.items() if key not in before}})
        release(part)
    progress(total, total)
    write_tokenizer(weights, folder)
    write_config(weights, folder, stated or of_codes(settings, journal), getattr(quantize, "dtype", dtype))
    writer.finish(sum(row["parameters"] for row in journal.done))


def as_mlx(weights: Weights) -> Callable[[Part], list[Part]]:
    """Parts that are not quantized yet, as MLX has them: in its layout, rows can be."""
    name = weights.config.get("model_type")
    turn = family(name).as_mlx if name in FAMILIES else dict
    return lambda part: [part] if len(part) > 1 else [{name: array} for name, array in turn(part).items()]


def of_codes(settings: Any, journal: Journal) -> Any:
    """What config.json says of codes that were kept; nothing if all were expanded."""
    return settings if any(name.endswith(".scales") for row in journal.done for name in row["tensors"]) else None


def left_out(name: str, weights: Weights) -> bool:
    return name.endswith(DROPPED) or (name.startswith("lm_head.") and bool(weights.config.get("tie_word_embeddings")))


def release(part: Part) -> None:
    """Lets go of the mapped pages of tensors that are done with."""
    for array in part.values():
        buffer = array._evaluated().buffer
        base = getattr(buffer, "owner", None)
        while isinstance(base, np.ndarray | memoryview):
            base = base.obj if isinstance(base, memoryview) else base.base
        if buffer and isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            start = buffer.pointer - np.frombuffer(base, np.uint8).__array_interface__["data"][0]
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            base.madvise(mmap.MADV_DONTNEED, first, start + buffer.nbytes - first)


def convert_part(
    part: Part, settings: Any, quantize: Quantizer | None, dtype: Any, dequantize: bool
) -> tuple[Part, int]:
    """One weight as it is written, and how many parameters it holds."""
    name = weight_name(part)
    path, array = name.removesuffix(".weight"), part[name]
    if f"{path}.scales" in part:
        _, bits, mode = format_of(path, part, settings)
        foreign = mode == "fp8" or f"{path}.order" in part  # which MLX has no words for
        if not (quantize or dequantize or foreign):
            return part, array.size * 32 // bits
        scales = part[f"{path}.scales"].dtype
        array = expanded(path, part, settings)
        array = array.astype(dtype or (scales if scales in (mx.float16, mx.bfloat16) else mx.bfloat16))
    elif dtype and array.dtype in FLOATS.values():
        array = array.astype(dtype)
    return (quantize(name, array) if quantize else None) or {name: array}, array.size


def weight_name(part: Part) -> str:
    return next((name for name in part if name.endswith(".weight")), next(iter(part)))


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
        for pattern in (*PATTERNS, "additional_chat_templates/*.jinja"):
            for file in weights.path.glob(pattern):
                if not file.name.startswith(("config.json", "model")):
                    place = folder / file.relative_to(weights.path)
                    place.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, place)
        return
    (folder / "generation_config.json").write_text(json.dumps(weights.generation_config, indent=2))
    weights.tokenizer().save(folder)

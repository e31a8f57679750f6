"""Adapter folders of mlx-lm and of PEFT, read and written.

| | mlx-lm | PEFT |
|---|---|---|
| file | adapters.safetensors | adapter_model.safetensors |
| names | PATH.lora_a, PATH.lora_b | base_model.model.PATH.lora_A.weight, … .lora_B.weight |
| shapes | (in, r), (r, out) | (r, in), (out, r) |
| scale | lora_parameters.scale | lora_alpha / r, or / √r with use_rslora |

Source: mlx_lm/tuner/utils.py, peft/tuners/lora/config.py
"""
from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..engine import array as mx
from ..engine.array.files import replacing
from ..engine.errors import UserError
from .adapter import Adapter, Pair, layer_of

CONFIG = "adapter_config.json"
FILES = {"mlx-lm": "adapters.safetensors", "peft": "adapter_model.safetensors"}
UNREAD = {"use_dora": False, "modules_to_save": None, "bias": "none", "lora_bias": False, "fan_in_fan_out": False,
          "target_parameters": None, "trainable_token_indices": None, "alora_invocation_tokens": None}


def read(folder: str | os.PathLike[str]) -> Adapter:
    """The adapter in a folder. UserError names the file and what is wrong with it."""
    folder = Path(folder)
    config = _config(folder / CONFIG)
    format = "peft" if "peft_type" in config else "mlx-lm"
    file = folder / FILES[format]
    if not file.is_file():
        raise UserError(f"{folder}: no {FILES[format]}", f"{CONFIG} says that this is an adapter of {format}")
    tensors, metadata = mx.load(str(file), return_metadata=True)
    return READERS[format](file, config, tensors, {k[5:]: v for k, v in metadata.items() if k.startswith("base_")})


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {CONFIG}", "wanted: a folder that llm lora, mlx-lm or PEFT wrote") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {str(error)[:80]}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: found a {type(config).__name__}, wanted a JSON object")
    return config


def _read_mlx(file: Path, config: dict[str, Any], tensors: dict[str, mx.Array], base: dict[str, str]) -> Adapter:
    kind, parameters = config.get("fine_tune_type", "lora"), config.get("lora_parameters") or {}
    if kind == "full":
        return Adapter({}, tensors, base=base, name=str(config.get("model") or ""))
    if kind != "lora":
        raise UserError(f"{file.parent / CONFIG}: fine_tune_type is {kind!r}, wanted lora or full")
    scale = parameters.get("scale")
    if not isinstance(scale, int | float):
        raise UserError(f"{file.parent / CONFIG}: lora_parameters.scale is {scale!r}, wanted a number")
    pairs = _pairs(file, tensors, r"(?P<path>.+)\.lora_(?P<side>[ab])", lambda path, a, b: Pair(a, b, float(scale)))
    _complete(file, pairs, parameters.get("keys") or [], None)
    return Adapter(pairs, {}, float(parameters.get("dropout") or 0), base, str(config.get("model") or ""))


def _read_peft(file: Path, config: dict[str, Any], tensors: dict[str, mx.Array], base: dict[str, str]) -> Adapter:
    if str(config.get("peft_type")).upper() != "LORA":
        raise UserError(f"{file.parent / CONFIG}: peft_type is {config.get('peft_type')!r}, wanted LORA")
    for key, usual in UNREAD.items():
        if config.get(key, usual) not in (usual, None, False, []):
            raise UserError(f"{file.parent / CONFIG}: {key} is {config[key]!r}, which is not read")

    def pair(path: str, a: mx.Array, b: mx.Array) -> Pair:
        rank = _patterned(config.get("rank_pattern"), path, config.get("r"))
        alpha = _patterned(config.get("alpha_pattern"), path, config.get("lora_alpha"))
        if rank != a.shape[0] or not isinstance(alpha, int | float):
            raise UserError(f"{file}: {path} has rank {a.shape[0]}, {CONFIG} says r {rank!r}, lora_alpha {alpha!r}")
        return Pair(a.T, b.T, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))

    names = r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight"
    pairs = _pairs(file, tensors, names, pair)
    wanted = config.get("target_modules") or []
    _complete(file, pairs, wanted if isinstance(wanted, list) else [], config.get("layers_to_transform"))
    return Adapter(pairs, {}, float(config.get("lora_dropout") or 0), base,
                   str(config.get("base_model_name_or_path") or ""))


READERS: dict[str, Callable[..., Adapter]] = {"mlx-lm": _read_mlx, "peft": _read_peft}


def _patterned(patterns: dict[str, Any] | None, path: str, otherwise: Any) -> Any:
    """PEFT's rule: the first pattern that is the end of the path."""
    return next((v for k, v in (patterns or {}).items() if re.fullmatch(rf"(?:.*\.)?(?:{k})", path)), otherwise)


def _pairs(file: Path, tensors: dict[str, mx.Array], names: str, pair: Callable[..., Pair]) -> dict[str, Pair]:
    """Both sides of every product. UserError about a name that is none, or a side without its other."""
    sides: dict[str, dict[str, mx.Array]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(names, name)
        if not match or tensor.ndim != 2:
            raise UserError(f"{file}: tensor {name} {tuple(tensor.shape)} is no matrix of a LoRA adapter",
                            "adapted embeddings and experts, DoRA and saved modules are not read")
        sides.setdefault(match["path"], {})[match["side"].lower()] = tensor
    for path, found in sides.items():
        if len(found) < 2:
            raise UserError(f"{file}: {path} has only lora_{'/'.join(found)}", "the file is incomplete: fetch it again")
    if not sides:
        raise UserError(f"{file}: no tensors in it")
    return {path: pair(path, found["a"], found["b"]) for path, found in sides.items()}


def _complete(file: Path, pairs: Iterable[str], keys: Iterable[str], layers: Any) -> None:
    """Every key that the config names must have tensors, in each of its layers."""
    layers = [layers] if isinstance(layers, int) else layers
    for key in keys:
        found = {layer_of(path) for path in pairs if path == key or path.endswith(f".{key}")}
        missing = [str(n) for n in layers or [] if n not in found]
        if not found or missing and found != {None}:
            where = f" in layer {', '.join(missing)}" if found else ""
            raise UserError(f"{file}: no tensors for {key}{where}, which {CONFIG} names",
                            "the file is incomplete: fetch it again")


# writing

def write(folder: str | os.PathLike[str], adapter: Adapter, format: str = "mlx-lm") -> None:
    """Writes an adapter; each of the two files keeps its old content until the new one is on the disk."""
    if format not in WRITERS:
        raise UserError(f"[lora] format is {format!r}, wanted one of {', '.join(WRITERS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = WRITERS[format](adapter)
    metadata = {"format": "mlx" if format == "mlx-lm" else "pt", **{f"base_{k}": v for k, v in adapter.base.items()}}
    mx.save_safetensors(str(folder / FILES[format]), tensors, metadata)
    with replacing(folder / CONFIG) as file:
        file.write(json.dumps(config, indent=2, sort_keys=True).encode())


def _write_mlx(adapter: Adapter) -> tuple[dict[str, Any], dict[str, mx.Array]]:
    """One rank and one scale: a smaller rank is filled up with zeros, another scale goes into B."""
    common = {"model": adapter.name, "num_layers": -1}
    if adapter.weights:
        return {"fine_tune_type": "full", **common}, adapter.weights
    rank = max(pair.a.shape[1] for pair in adapter.pairs.values())
    scale = Counter(pair.scale for pair in adapter.pairs.values()).most_common(1)[0][0]
    tensors = {}
    for path, pair in adapter.pairs.items():
        room = rank - pair.a.shape[1]
        b = pair.b if pair.scale == scale else pair.b * (pair.scale / scale)
        tensors[f"{path}.lora_a"] = mx.pad(pair.a, [(0, 0), (0, room)]) if room else pair.a
        tensors[f"{path}.lora_b"] = mx.pad(b, [(0, room), (0, 0)]) if room else b
    parameters = {"rank": rank, "scale": scale, "dropout": adapter.dropout, "keys": list(adapter.pairs)}
    return {"fine_tune_type": "lora", "lora_parameters": parameters, **common}, tensors


def _write_peft(adapter: Adapter) -> tuple[dict[str, Any], dict[str, mx.Array]]:
    if adapter.weights:
        raise UserError("[lora] PEFT's format has no full fine-tuning", "write mlx-lm's, or llm fuse the weights")
    ranks = {path: int(pair.a.shape[1]) for path, pair in adapter.pairs.items()}
    alphas = {path: pair.scale * pair.a.shape[1] for path, pair in adapter.pairs.items()}
    rank, alpha = (Counter(of.values()).most_common(1)[0][0] for of in (ranks, alphas))
    modules, layers = _regular(list(adapter.pairs))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": adapter.name or None,
        "r": rank, "lora_alpha": alpha, "lora_dropout": adapter.dropout, "bias": "none", "use_rslora": False,
        "target_modules": modules, "layers_to_transform": layers, "inference_mode": True, "fan_in_fan_out": False,
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
    }
    tensors = {}
    for path, pair in adapter.pairs.items():
        for side, matrix in ("A", pair.a), ("B", pair.b):
            tensors[f"base_model.model.{path}.lora_{side}.weight"] = mx.contiguous(matrix.T)
    return config, tensors


WRITERS: dict[str, Callable[[Adapter], tuple[dict[str, Any], dict[str, mx.Array]]]] = {
    "mlx-lm": _write_mlx, "peft": _write_peft}


def _regular(paths: list[str]) -> tuple[list[str], list[int] | None]:
    """The last words of the paths, and the layers, where every layer has the same; else the paths themselves."""
    leaves, layers = {path.rpartition(".")[2] for path in paths}, {layer_of(path) for path in paths}
    if None in layers or len(leaves) * len(layers) != len(paths):
        return sorted(paths), None
    return sorted(leaves), sorted(n for n in layers if n is not None)

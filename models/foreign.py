"""Folders that other programs quantized: their codes, kept as they are, in our layout (engine/array/quantized.py).

A `Method` names the tensors that make up one weight and turns them into weight, scales and biases. Codes are moved and
never rounded; a scale times a zero point is exact in float32, which the biases are where float16 does not hold it.
"""
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..engine import array as mx
from ..engine.array.ggml import pack
from ..engine.array.quantized import GROUPS
from ..engine.errors import UserError

Part = dict[str, mx.Array]
Settings = dict[str, Any]            # `quantization_config`


class Method(NamedTuple):
    """`leaves` are the last names of a weight's tensors. read(path, tensors by leaf, settings) gives the parts by name;
    `format` is MLX's `quantization` for the settings."""

    leaves: tuple[str, ...]
    read: Callable[[str, Part, Settings], Part]
    format: Callable[[Settings], Settings]
    join: str = "."                  # between a module's path and a leaf
    paths: Callable[[str], list[str]] = lambda path: [path]    # of the weights that are read from one group of tensors


def method(settings: Settings, place: object) -> Method | None:
    """How a folder with this `quantization_config` is read; None: as it is. UserError if it cannot be."""
    name = settings.get("quant_method")
    if name is None or isinstance(name, str) and name in METHODS:
        return METHODS[name] if name else None
    what = f"[load] {place}: the weights are quantized by {name!r}, which is not read; read: {', '.join(METHODS)}"
    raise UserError(what, "take the unquantized model; llm convert -q quantizes it")


def split(method: Method, name: str) -> tuple[str, str] | None:
    """A tensor's name as a module's path and a leaf of the method."""
    found = re.fullmatch(rf"(.+){re.escape(method.join)}({'|'.join(method.leaves)})", name)
    return (found[1], found[2]) if found else None


# shapes

def stream(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes from words (…, n) uint32 that hold them low bits first."""
    bytes_ = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    return np.packbits(bytes_.reshape(*words.shape[:-1], -1, bits), axis=-1, bitorder="little")[..., 0]


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (N, K) to words (N, K · bits / 32)"""
    return pack(np.ascontiguousarray(codes), bits).reshape(len(codes), -1)


def fields(array: mx.Array) -> np.ndarray:
    """Packed words or codes, unsigned."""
    x = np.asarray(array)
    return x.view(f"u{x.itemsize}")


def grouped(path: str, side: np.ndarray, columns: int) -> np.ndarray:
    """Scales (N, groups of any size) as groups that we have: each repeated as often as need be."""
    size = columns // side.shape[1]
    group = next((g for g in sorted(GROUPS, reverse=True) if size % g == 0), 0)
    if not group or size * side.shape[1] != columns:
        raise UserError(f"[load] {path}: {columns} columns in {side.shape[1]} groups", f"wanted: multiples of {GROUPS}")
    return np.repeat(side, size // group, axis=1)


def affine(path: str, words: np.ndarray, bits: int, scales: np.ndarray, zeros: np.ndarray) -> Part:
    """Codes whose zeros (N, groups) are given: weight = scale · (code - zero)."""
    columns = words.shape[1] * 32 // bits
    biases = -scales.astype(np.float32) * zeros
    if np.array_equal(biases.astype(scales.dtype), biases):
        biases = biases.astype(scales.dtype)
    else:
        scales = scales.astype(np.float32)
    sides = (grouped(path, side, columns) for side in (scales, biases))
    return {f"{path}.{leaf}": mx.array(part) for leaf, part in zip(("weight", "scales", "biases"), (words, *sides),
                                                                   strict=True)}


def need(path: str, part: Part, *leaves: str) -> list[mx.Array]:
    if missing := [leaf for leaf in leaves if leaf not in part]:
        raise UserError(f"[load] {path}: the tensor {missing[0]} is missing beside {', '.join(part)}")
    return [part[leaf] for leaf in leaves]


def columns_first(scales: mx.Array) -> np.ndarray:
    """(groups, N) to (N, groups), bfloat16 as float32"""
    return np.asarray(scales if scales.dtype is mx.float16 else scales.astype(mx.float32)).T


# methods

def gptq(path: str, part: Part, settings: Settings) -> Part:
    """qweight (K · bits / 32, N): a column's codes from low bits up, so that its transpose is our layout; qzeros
    (groups, N · bits / 32) are one less than the zeros, but in the format gptq_v2; g_idx (K): the group of each input,
    not in order if `desc_act`: then columns are sorted by group, and `order` says whose they are. Frantar et al."""
    bits = int(settings.get("bits") or 4)
    qweight, qzeros, scales = need(path, part, "qweight", "qzeros", "scales")
    words, zeros = np.ascontiguousarray(fields(qweight).T), stream(fields(qzeros), bits).T
    if settings.get("checkpoint_format") != "gptq_v2":
        zeros = zeros.astype(np.float32) + 1
    columns, order = words.shape[1] * 32 // bits, None
    if "g_idx" in part:
        index = np.asarray(part["g_idx"])
        size = -(-columns // scales.shape[0])
        order = np.argsort(index, kind="stable")
        if not np.array_equal(index[order], np.arange(columns) // size):
            raise UserError(f"[load] {path}.g_idx: groups of unequal sizes", f"wanted: {size} inputs in each")
        if np.array_equal(order, np.arange(columns)):
            order = None
    if order is not None:
        words = packed(stream(words, bits)[:, order], bits)
    made = affine(path, words, bits, columns_first(scales), zeros)
    return made if order is None else made | {f"{path}.order": mx.array(order.astype(np.int32))}


AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])       # where in a word each of 8 neighbours lies


def awq(path: str, part: Part, settings: Settings) -> Part:
    """qweight (K, N / 8): 8 neighbouring outputs in a word, in AWQ_ORDER; qzeros (groups, N / 8) too. Lin et al."""
    if (settings.get("bits") or 4, settings.get("version") or "gemm") != (4, "gemm"):
        what = f"[load] {path}: AWQ with {settings.get('bits')} bits, version {settings.get('version')!r}"
        raise UserError(what, "read: 4 bits, version 'gemm'")
    qweight, qzeros, scales = need(path, part, "qweight", "qzeros", "scales")
    codes, zeros = (stream(fields(a), 4).reshape(len(a), -1, 8)[..., AWQ_ORDER].reshape(len(a), -1).T
                    for a in (qweight, qzeros))
    return affine(path, packed(codes, 4), 4, columns_first(scales), zeros)


def fp8(path: str, part: Part, settings: Settings) -> Part:
    """weight (N, K) of e4m3 with a scale for the tensor, for each row, or for each block, the last of which may be cut.
    `weight_scale_inv` is DeepSeek's name; it multiplies as well."""
    weight, scales = part["weight"], part.get("weight_scale_inv", part.get("weight_scale"))
    if weight.dtype is not mx.uint8 or scales is None:   # a layer that was left out
        return {f"{path}.weight": weight if weight.dtype is not mx.uint8 else mx.from_fp8(weight)}
    (rows, columns), scales = weight.shape, scales if scales.ndim == 2 else scales.reshape(-1, 1)
    whole = [-(-n // m) for n, m in zip(weight.shape, scales.shape, strict=True)]
    block = settings.get("weight_block_size") or whole
    if scales.shape != tuple(-(-n // b) for n, b in zip(weight.shape, block, strict=True)):
        raise UserError(f"[load] {path}: scales {scales.shape} for a weight {weight.shape}, blocks of {block}")
    group = next((g for g in sorted(GROUPS, reverse=True) if columns % g == block[1] % g == 0), 0)
    if not group:
        raise UserError(f"[load] {path}: {columns} inputs in blocks of {block[1]}", f"wanted: multiples of {GROUPS}")
    place = np.arange(rows)[:, None] // block[0], np.arange(0, columns, group) // block[1]
    wide = np.asarray(scales.astype(mx.float32))[place]
    return {f"{path}.weight": mx.array(np.asarray(weight).view(np.uint32)), f"{path}.scales": mx.array(wide)}


def packed_weights(settings: Settings) -> Settings:
    """What compressed-tensors says of the weights of the first group of layers."""
    groups = settings.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    return weights if isinstance(weights, dict) else {}


def compressed_tensors(path: str, part: Part, settings: Settings) -> Part:
    """float-quantized: `fp8`. pack-quantized: weight_packed (N, K · bits / 32) in our layout, codes whose zero is the
    middle, or weight_zero_point (N · bits / 32, groups). Source: the library of that name."""
    if "weight_packed" not in part:
        return fp8(path, part, {})
    bits = int(packed_weights(settings).get("num_bits") or 4)
    words, scales = fields(part["weight_packed"]), np.asarray(need(path, part, "weight_scale")[0].astype(mx.float32))
    if words.dtype != np.uint32 or "weight_g_idx" in part or bits not in (4, 8):
        what = f"[load] {path}: compressed-tensors {settings.get('format')!r} with {bits} bits, {', '.join(part)}"
        raise UserError(what, "read: float-quantized (FP8), and pack-quantized with 4 or 8 bits without g_idx")
    zeros = part.get("weight_zero_point")
    zero = np.full(scales.shape, 1 << bits - 1) if zeros is None else stream(fields(zeros).T, bits).T
    return affine(path, words, bits, scales, zero)


def mxfp4(path: str, part: Part, settings: Settings) -> Part:
    """gpt-oss: blocks (E, N, K / 32, 16) of nibbles, scales (E, N, K / 32) of e8m0: ours, but for the rows of gate and
    up, which take turns in gate_up_proj."""
    if "blocks" not in part:
        return {f"{path}_{leaf}": array for leaf, array in part.items()}
    blocks, scales = need(path, part, "blocks", "scales")
    made = {"weight": mx.view(blocks.reshape(*blocks.shape[:2], -1), mx.uint32), "scales": scales}
    made |= {"bias": part["bias"]} if "bias" in part else {}
    if path.endswith("down_proj"):
        return {f"{path}.{leaf}": array for leaf, array in made.items()}
    first = int(path.endswith(".up_proj"))
    return {f"{path}.{leaf}": mx.contiguous(array[:, first::2]) for leaf, array in made.items()}


def gate_and_up(path: str) -> list[str]:
    parent, _, last = path.rpartition(".")
    return [f"{parent}.gate_proj", f"{parent}.up_proj"] if last == "gate_up_proj" else [path]


def as_affine(settings: Settings) -> Settings:
    size, bits = settings.get("group_size") or 128, settings.get("bits") or 4
    return {"group_size": size if size in GROUPS else max(GROUPS), "bits": bits, "mode": "affine"}


def as_fp8(settings: Settings) -> Settings:
    return {"group_size": 128, "bits": 8, "mode": "fp8"}


def as_mxfp4(settings: Settings) -> Settings:
    return {"group_size": 32, "bits": 4, "mode": "mxfp4"}


def as_compressed(settings: Settings) -> Settings:
    weights = packed_weights(settings)
    packed = {"group_size": weights.get("group_size"), "bits": weights.get("num_bits")}
    return as_affine(packed) if settings.get("format") == "pack-quantized" else as_fp8(settings)


FP8_LEAVES = ("weight", "weight_scale_inv", "weight_scale", "input_scale", "activation_scale", "input_scale_ub")
PACKED_LEAVES = ("weight_packed", "weight_zero_point", "weight_shape", "weight_g_idx")
METHODS = {
    "gptq": Method(("qweight", "qzeros", "scales", "g_idx"), gptq, as_affine),
    "awq": Method(("qweight", "qzeros", "scales"), awq, as_affine),
    "fp8": Method(FP8_LEAVES, fp8, as_fp8),
    "compressed-tensors": Method(FP8_LEAVES + PACKED_LEAVES, compressed_tensors, as_compressed),
    "mxfp4": Method(("blocks", "scales", "bias"), mxfp4, as_mxfp4, "_", gate_and_up),
}

"""Safetensors files: a length, a JSON header and bytes. Read as views of a map; nothing in the file is trusted.

The library's NumPy interface has no bfloat16, and reads a file that lies about its offsets with a message of its own.
Source: https://huggingface.co/docs/safetensors
"""
from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import UserError
from .array import Array
from .dtypes import DTYPES as ALL
from .dtypes import Dtype, uint8
from .files import Bytes, damaged, name_of, raw, read_bytes, replacing, view

KINDS = {"b": "BOOL", "bfloat16": "BF16", "complex64": "C64"}
CODES = {d: KINDS.get(d.name) or KINDS.get(d.kind) or f"{d.kind}{8 * d.size}".upper() for d in ALL}
DTYPES = {code: dtype for dtype, code in CODES.items()} | {"F8_E4M3": uint8, "F8_E8M0": uint8}  # as MLX reads them
HEADER_LIMIT = 100 << 20             # bytes, the format's

Extent = tuple[Dtype, tuple[int, ...], int, int]           # type, shape, first byte of the data and the last one's end


def read(file: Any) -> dict[str, Array]:
    """The tensors of a file by name. Nothing is read but the header; pages come in as they are used."""
    return parse(read_bytes(file), name_of(file))[0]


def parse(data: Bytes, name: str) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors and the metadata in the bytes of a file."""
    if (size := len(data)) < 8:
        damaged(name, "size", f"{size} bytes", "at least 8")
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(size - 8, HEADER_LIMIT):
        damaged(name, "header length", length, f"2 to {min(size - 8, HEADER_LIMIT)}")
    try:
        header = json.loads(data[8:8 + length], object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        damaged(name, "header", str(error)[:80], "a JSON object")
    if not isinstance(header, dict):
        damaged(name, "header", type(header).__name__, "a JSON object")
    metadata = header.pop("__metadata__", None) or {}        # MLX writes null
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        damaged(name, "__metadata__", metadata, "an object of strings")
    extents = {key: extent(name, key, entry, size - 8 - length) for key, entry in header.items()}
    check_order(name, extents)
    views = {key: view(data, 8 + length + start, dtype, shape) for key, (dtype, shape, start, _) in extents.items()}
    return views, metadata


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def extent(name: str, key: str, entry: Any, room: int) -> Extent:
    """The checked header entry of one tensor."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        damaged(name, f"tensor {key}", entry, "dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise UserError(f"{name}: tensor {key} has dtype {str(code)[:40]}; supported: {', '.join(DTYPES)}")
    for field, values in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(values, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in values):
            damaged(name, f"tensor {key}, {field}", values, "a list of sizes")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= room:
        damaged(name, f"tensor {key}, data_offsets", offsets, f"[start, end] within the file's {room} bytes of data")
    if len(shape) > 32 or math.prod(shape) * DTYPES[code].size != offsets[1] - offsets[0]:
        damaged(name, f"tensor {key}, bytes", offsets[1] - offsets[0], f"those of {code} {shape}")
    return DTYPES[code], tuple(shape), *offsets


def check_order(name: str, extents: Mapping[str, Extent]) -> None:
    end = 0
    for key, (_, _, start, stop) in sorted(extents.items(), key=lambda item: item[1][2:]):
        if start < end:
            damaged(name, f"tensor {key}, data_offsets", [start, stop], f"a start from {end} on, the last one's end")
        end = stop


def header(arrays: Iterable[tuple[str, Array]], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the file says of tensors that follow one another."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for key, a in arrays:
        entries[key] = {"dtype": CODES[a.dtype], "shape": list(a.shape), "data_offsets": [start, start + a.nbytes]}
        start += a.nbytes
    return entries


def encode(entries: dict[str, Any], room: int = 0) -> bytes:
    """Length and header, filled up with spaces to `room` bytes, or to a multiple of 8 so that tensors are aligned."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(room - 8 if room else -(-len(text) // 8) * 8)
    if room and len(text) > room - 8:
        raise UserError(f"[safetensors] a header of {len(text)} bytes for {room - 8}: names are too long")
    return len(text).to_bytes(8, "little") + text


def save_safetensors(file: Any, arrays: dict[str, Array], metadata: dict[str, str] | None = None) -> None:
    """Writes arrays by name, largest element type first so that each is aligned, and a dictionary of strings."""
    rows = sorted(arrays.items(), key=lambda row: -row[1].dtype.size)
    for key, text in (metadata or {}).items():
        if not isinstance(text, str):
            raise ValueError(f"[save_safetensors] metadata {key!r} is {type(text).__name__}, a string wanted")
    with replacing(file, ".safetensors") as out:
        out.write(encode(header(rows, metadata or {})))
        for _, array in rows:
            out.write(raw(array))

"""Safetensors files: read as views of a map, written tensor by tensor in shards.

The library's NumPy interface has no bfloat16, and reads a file that lies about its offsets with a message of its own;
the format is a length, a JSON header and bytes, so both directions are here, with every field checked.
Source: https://huggingface.co/docs/safetensors
"""

import json
import math
import mmap
import os
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from ..engine import array as mx
from ..engine.errors import UserError

DTYPES = {"BOOL": mx.bool_, "F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32, "F64": mx.float64}
DTYPES |= {"U8": mx.uint8, "U16": mx.uint16, "U32": mx.uint32, "U64": mx.uint64}
DTYPES |= {"I8": mx.int8, "I16": mx.int16, "I32": mx.int32, "I64": mx.int64}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BITS = {mx.bfloat16: mx.uint16}  # what NumPy sees of a type that it does not have
HEADER_LIMIT, SHARD_LIMIT = 100 << 20, 5 << 30  # bytes; the first is the format's, the second is what the Hub likes


def find(folder: Path) -> list[Path]:
    """The weight files of a model folder: those that the index names, or else model*.safetensors."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise UserError(f"{folder}: no model*.safetensors", "Other weight formats (pickle .bin/.pth) are not read.")
        return files
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not an index with a weight_map: {error!r}") from None
    if missing:
        raise UserError(f"{index}: {len(missing)} of {len(names)} files are missing, the first is {missing[0]!r}")
    return [folder / name for name in names]


def read(path: Path) -> dict[str, mx.Array]:
    """The tensors of one file by name. Nothing is read but the header; pages come in as they are used."""
    size = path.stat().st_size
    if size < 8:
        damaged(path, "size", f"{size} bytes", "at least 8")
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(size - 8, HEADER_LIMIT):
        damaged(path, "header length", length, f"2 to {min(size - 8, HEADER_LIMIT)}")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        damaged(path, "header", str(error)[:80], "a JSON object")
    if not isinstance(header, dict):
        damaged(path, "header", type(header).__name__, "a JSON object")
    header.pop("__metadata__", None)
    extents = {name: extent(path, name, entry, size - 8 - length) for name, entry in header.items()}
    end = 0
    for name, (_, _, start, stop) in sorted(extents.items(), key=lambda item: item[1][2:]):
        if start < end:
            damaged(path, f"tensor {name}, data_offsets", [start, stop], f"a start from {end} on, the last one's end")
        end = stop
    return {name: view(data, 8 + length + start, dtype, shape) for name, (dtype, shape, start, _) in extents.items()}


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def damaged(path: Path, field: str, found: object, wanted: object) -> NoReturn:
    """What is wrong with a weight file, cut to a readable length."""
    hint = "The file is damaged or incomplete: fetch it again."
    raise UserError(f"{path}: {field[:200]}: found {str(found)[:200]}, wanted {wanted}", hint)


def extent(path: Path, name: str, entry: Any, room: int) -> tuple[Any, tuple[int, ...], int, int]:
    """The checked dtype, shape, first byte and end of one header entry."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        damaged(path, f"tensor {name}", entry, "dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise UserError(f"{path}: tensor {name} has dtype {str(code)[:40]}; supported: {', '.join(DTYPES)}")
    for field, values in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(values, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in values):
            damaged(path, f"tensor {name}, {field}", values, "a list of sizes")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= room:
        damaged(path, f"tensor {name}, data_offsets", offsets, f"[start, end] within the file's {room} bytes of data")
    if len(shape) > 32 or math.prod(shape) * DTYPES[code].size != offsets[1] - offsets[0]:
        damaged(path, f"tensor {name}, bytes", offsets[1] - offsets[0], f"those of {code} {shape}")
    return DTYPES[code], tuple(shape), *offsets


def view(data: mmap.mmap, offset: int, dtype: Any, shape: tuple[int, ...]) -> mx.Array:
    stored = BITS.get(dtype, dtype)
    array = np.frombuffer(data, stored.numpy, math.prod(shape), offset).reshape(shape)
    return mx.asarray(array) if stored is dtype else mx.asarray(array).view(dtype)


class Writer:
    """Writes tensors as they come into shards of at most 5 GiB, then the index, with the names that MLX gives them.

    A header precedes its data but is known after it, so `room` bytes are kept free for it and filled with spaces.
    """

    def __init__(self, folder: Path, room: int, limit: int = SHARD_LIMIT) -> None:
        self.folder, self.room, self.limit = folder, 8 + -(-room // 8) * 8, limit
        self.shards: list[dict[str, Any]] = []
        self.file: BinaryIO | None = None
        self.total = self.position = 0

    def add(self, name: str, array: mx.Array) -> None:
        stored = BITS.get(array.dtype, array.dtype)
        data = np.ascontiguousarray(np.asarray(array if stored is array.dtype else array.view(stored)))
        if self.file is None or (self.position and self.position + data.nbytes > self.limit):
            self.start()
        assert self.file is not None
        self.file.write(data.data.cast("B") if data.size else b"")
        end = self.position + data.nbytes
        entry = {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": [self.position, end]}
        self.shards[-1][name], self.position, self.total = entry, end, self.total + data.nbytes

    def start(self) -> None:
        self.end()
        self.shards.append({"__metadata__": {"format": "mlx"}})
        self.file, self.position = (self.folder / f"{len(self.shards)}.part").open("wb"), 0
        self.file.seek(self.room)

    def end(self) -> None:
        """Fills in the header of the shard being written."""
        if self.file is None:
            return
        header = json.dumps(self.shards[-1], separators=(",", ":")).encode().ljust(self.room - 8)
        if len(header) > self.room - 8:
            raise UserError(f"[safetensors] a header of {len(header)} bytes for {self.room - 8}: names are too long")
        self.file.seek(0)
        self.file.write(len(header).to_bytes(8, "little") + header)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None

    def finish(self, parameters: int) -> None:
        """Names the shards and writes the index; `parameters` counts the weights before quantization."""
        self.end()
        weight_map: dict[str, str] = {}
        count = len(self.shards)
        for i, shard in enumerate(self.shards, 1):
            name = "model.safetensors" if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
            (self.folder / f"{i}.part").rename(self.folder / name)
            weight_map |= {tensor: name for tensor in shard if tensor != "__metadata__"}
        metadata = {"total_size": self.total, "total_parameters": parameters}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))

"""A model folder's safetensors files: which they are, and a writer of shards. engine/array reads and writes one."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from ..engine import array as mx
from ..engine.array.files import raw
from ..engine.array.safetensors import CODES, encode, read
from ..engine.errors import UserError

__all__ = ["Writer", "find", "read"]
SHARD_LIMIT = 5 << 30  # bytes, what the Hub likes


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
        data = raw(array)
        if self.file is None or (self.position and self.position + data.nbytes > self.limit):
            self.start()
        assert self.file is not None
        self.file.write(data)
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
        self.file.seek(0)
        self.file.write(encode(self.shards[-1], self.room))
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

"""What a conversion writes: safetensors shards, in a folder beside the destination with a journal of what is done.

A conversion that was stopped, even by kill -9, goes on after the last weight of the journal when it is run again.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..engine import array as mx
from ..engine.array.files import raw
from ..engine.array.safetensors import CODES, encode
from ..engine.errors import UserError

SHARD_LIMIT = 5 << 30  # bytes, what the Hub likes
JOURNAL = "journal.jsonl"
Row = dict[str, Any]


class Journal:
    """Rows of JSON, each written when its weight is in the files. The first row is the job: another job starts anew."""

    def __init__(self, folder: Path, job: Row) -> None:
        self.file = (folder / JOURNAL).open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"{folder}: another llm convert is writing it"
            raise UserError(what, "Wait for it, or name another DEST.") from None
        self.rows, end = self.read()
        if not self.rows or self.rows[0] != json.loads(json.dumps(job)):
            for path in folder.iterdir():
                if path.name != JOURNAL:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.rows, end = [], 0
        self.file.truncate(end)
        if not self.rows:
            self.add(job)

    def read(self) -> tuple[list[Row], int]:
        """The whole rows, and where they end: the last one may have been cut off."""
        self.file.seek(0)
        lines = self.file.read().split(b"\n")[:-1]
        try:
            return [json.loads(line) for line in lines], sum(len(line) + 1 for line in lines)
        except ValueError:
            return [], 0

    def add(self, row: Row) -> None:
        self.file.write(json.dumps(row).encode() + b"\n")
        self.file.flush()
        self.rows.append(row)

    @property
    def done(self) -> list[Row]:
        return self.rows[1:]


@contextmanager
def resumable(dest: Path, job: Row) -> Iterator[tuple[Path, Journal]]:
    """The folder to write into, `dest`.partial, and its journal. It becomes `dest`, a folder or its one .gguf file."""
    partial = dest.with_name(f"{dest.name}.partial")
    journal = None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        journal = Journal(partial, job)
        yield partial, journal
        (partial / JOURNAL).unlink()
        file = partial / "model.gguf"
        (file if file.exists() else partial).rename(dest)
        shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        hint = f"Free some space, or whatever it says; then the same command goes on after what {partial} holds."
        raise UserError(f"{dest}: could not be written: {error.strerror or error}", hint) from None
    finally:
        if journal and not journal.done:  # nothing worth keeping
            shutil.rmtree(partial, ignore_errors=True)
        if journal:
            journal.file.close()


class Writer:
    """Writes tensors as they come into shards of at most 5 GiB, then the index, with the names that MLX gives them.

    A header precedes its data but is known after it, so `room` bytes are kept free for it and filled with spaces.
    """

    def __init__(self, folder: Path, room: int, limit: int = SHARD_LIMIT) -> None:
        self.folder, self.room, self.limit = folder, 8 + -(-room // 8) * 8, limit
        self.shards: list[Row] = []
        self.file: BinaryIO | None = None
        self.total = self.position = 0

    def add(self, name: str, array: mx.Array) -> Row:
        """Writes a tensor; what `replay` needs to know of it."""
        data = raw(array)
        if self.file is None or (self.position and self.position + data.nbytes > self.limit):
            self.start()
        assert self.file is not None
        self.file.write(data)
        self.file.flush()
        start, end = self.position, self.position + data.nbytes
        self.note(name, {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]})
        return {"shard": len(self.shards), **self.shards[-1][name]}

    def note(self, name: str, entry: Row) -> None:
        start, end = entry["data_offsets"]
        self.shards[-1][name], self.position, self.total = entry, end, self.total + end - start

    def start(self) -> None:
        self.end()
        self.shards.append({"__metadata__": {"format": "mlx"}})
        self.file, self.position = self.part(len(self.shards)).open("wb"), 0
        self.file.seek(self.room)

    def part(self, number: int) -> Path:
        return self.folder / f"{number}.part"

    def replay(self, tensors: dict[str, Row]) -> None:
        """Takes tensors that an earlier run wrote as written."""
        for name, entry in tensors.items():
            entry = dict(entry)
            if entry.pop("shard") > len(self.shards):
                self.shards.append({"__metadata__": {"format": "mlx"}})
            self.note(name, entry)

    def resume(self) -> None:
        """Opens the last shard where what was replayed ends."""
        if not self.shards:
            return
        path = self.part(len(self.shards))
        if not path.is_file() or path.stat().st_size < self.room + self.position:
            raise UserError(f"{path}: less is in it than the journal says", f"Remove {self.folder} and run again.")
        self.file = path.open("r+b")
        self.file.truncate(self.room + self.position)
        self.file.seek(0, os.SEEK_END)

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
            self.part(i).rename(self.folder / name)
            weight_map |= {tensor: name for tensor in shard if tensor != "__metadata__"}
        metadata = {"total_size": self.total, "total_parameters": parameters}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))

"""A model folder's safetensors files: which they are. engine/array reads and writes one."""

import json
from pathlib import Path

from ..engine.array.safetensors import read
from ..engine.errors import UserError

__all__ = ["find", "read"]


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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{index}: not an index with a weight_map: {str(error)[:200]}") from None
    if missing:
        raise UserError(f"{index}: {len(missing)} of {len(names)} files are missing, the first is {missing[0]!r}")
    return [folder / name for name in names]

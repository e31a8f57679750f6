"""save and load: .npy, .npz, .safetensors and .gguf, with the names and arguments of MLX."""
from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.lib import format as npy

from ..errors import UserError
from .array import Array
from .dtypes import FROM_NUMPY, bfloat16
from .files import Bytes, damaged, name_of, raw, read_bytes, replacing
from .gguf import load_gguf, save_gguf
from .node import from_numpy
from .safetensors import parse, save_safetensors

__all__ = ["load", "save", "save_gguf", "save_safetensors", "savez", "savez_compressed"]
HEADER = 1 << 14                     # bytes that hold the header of any .npy of plain numbers
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
VOID = np.dtype("V2")                # what a .npy says of bfloat16, which NumPy does not know


def save(file: Any, arr: Array) -> None:
    """Writes one array to a .npy file: a path, which is replaced when all is written, or an open binary file."""
    with replacing(file, ".npy") as out:
        _write_npy(out, arr)


def _write_npy(out: Any, array: Array) -> None:
    descr = "|V2" if array.dtype is bfloat16 else npy.dtype_to_descr(array.dtype.numpy)
    npy.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": array.shape})
    out.write(raw(array))


def savez(file: Any, *args: Array, **kwargs: Array) -> None:
    """Writes arrays to an uncompressed .npz file, positional ones as arr_0, arr_1, …"""
    _save_zip(file, args, kwargs, zipfile.ZIP_STORED)


def savez_compressed(file: Any, *args: Array, **kwargs: Array) -> None:
    """Writes arrays to a compressed .npz file, positional ones as arr_0, arr_1, …"""
    _save_zip(file, args, kwargs, zipfile.ZIP_DEFLATED)


def _save_zip(file: Any, args: tuple[Array, ...], named: dict[str, Array], method: int) -> None:
    arrays = {f"arr_{i}": array for i, array in enumerate(args)}
    if twice := arrays.keys() & named.keys():
        raise ValueError(f"[savez] {min(twice)!r} names a positional array and another one")
    with replacing(file, ".npz") as out, zipfile.ZipFile(out, "w", method) as archive:
        for name, array in (arrays | named).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                _write_npy(member, array)


# load

def _read_npy(data: Bytes, name: str) -> Array:
    """The array in the bytes of a .npy file: a view of them unless their order is foreign."""
    head = io.BytesIO(data[:HEADER])
    try:
        shape, column_major, stored = HEADERS[npy.read_magic(head)](head)
    except Exception as error:                             # the header is Python source, and can be wrong in many ways
        damaged(name, "npy header", str(error).partition("\n")[0], "version 1.0 or 2.0 of one array")
    native = stored.newbyteorder("=")
    if native != VOID and native not in FROM_NUMPY:
        raise UserError(f"{name}: the array has NumPy type {stored}; supported: {', '.join(map(str, FROM_NUMPY))}")
    room, count = len(data) - head.tell(), math.prod(shape)
    if len(shape) > 32 or any(size < 0 for size in shape) or count * stored.itemsize > room:
        damaged(name, "shape", shape, f"one of {stored} in {room} bytes")
    array = np.frombuffer(data, stored, count, head.tell()).reshape(shape, order="F" if column_major else "C")
    if native == VOID:
        return Array.of(from_numpy(array.view(np.uint16), bfloat16, False))
    return Array.of(from_numpy(array.astype(native, copy=False), FROM_NUMPY[native], False))


def _load_npz(file: Any) -> dict[str, Array]:
    name = name_of(file)
    with nullcontext(file) if hasattr(file, "read") else open(file, "rb") as opened:
        try:
            with zipfile.ZipFile(opened) as archive:
                if any(info.compress_size > archive.start_dir for info in archive.infolist()):
                    raise ValueError("a member beyond the end")
                members = {member.removesuffix(".npy"): archive.read(member) for member in archive.namelist()}
        except Exception as error:                         # zipfile and the decompressors have many kinds
            damaged(name, "archive", error, "an .npz")
    return {key: _read_npy(data, f"{name}, {key}") for key, data in members.items()}


READERS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "npy": lambda file: (_read_npy(read_bytes(file), name_of(file)), None),
    "npz": lambda file: (_load_npz(file), None),
    "safetensors": lambda file: parse(read_bytes(file), name_of(file)),
    "gguf": load_gguf,
}


def load(file: Any, /, format: str | None = None, return_metadata: bool = False) -> Any:
    """The array of a .npy file, or the arrays of an .npz, .safetensors or .gguf file by name; with `return_metadata`,
    a pair whose second is the metadata of the last two.

    file: a path or an open binary file; format: its extension unless given. Paths are mapped, not read: arrays are
    views of the file (an .npz is read), so it may be replaced while they live, as `save` does, but not written over.
    """
    format = format or name_of(file).rpartition(".")[2]
    if format not in READERS:
        raise ValueError(f"[load] {name_of(file)}: format {format!r}; supported: {', '.join(READERS)}")
    if return_metadata and format in ("npy", "npz"):
        raise ValueError(f"[load] {name_of(file)}: {format} has no metadata")
    arrays, metadata = READERS[format](file)
    return (arrays, metadata) if return_metadata else arrays

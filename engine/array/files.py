"""Files as bytes: mapped where they can be, replaced whole or not at all, and what is said of damaged ones."""
from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NoReturn

import numpy as np

from ..errors import UserError
from .array import Array
from .dtypes import Dtype
from .node import from_numpy, to_numpy

Bytes = bytes | mmap.mmap


def name_of(file: Any) -> str:
    """The path of a file, or what an open one is called."""
    return str(getattr(file, "name", file) if hasattr(file, "read") else os.fspath(file))


def read_bytes(file: Any) -> Bytes:
    """The content of a path, mapped, or of an open binary file from where it stands, read."""
    if hasattr(file, "read"):
        data = file.read()
        if not isinstance(data, bytes):
            raise TypeError(f"[load] {name_of(file)} gives {type(data).__name__}: a file opened in binary mode wanted")
        return data
    with open(file, "rb") as opened:
        if os.fstat(opened.fileno()).st_size == 0:         # which cannot be mapped
            return b""
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


@contextmanager
def replacing(file: Any, extension: str = "") -> Iterator[BinaryIO]:
    """An open file to write. A path keeps its old content until all of the new one is on the disk."""
    if hasattr(file, "write"):
        yield file
        return
    path = os.path.realpath(file)
    path += "" if path.endswith(extension) else extension
    partial = f"{path}.partial-{os.getpid()}-{threading.get_ident()}"
    try:
        with open(partial, "wb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(partial)
        if isinstance(error, OSError):                     # a full disk names no file
            raise type(error)(error.errno, error.strerror, path) from error
        raise


def damaged(name: object, field: str, found: object, wanted: object) -> NoReturn:
    """What is wrong with a file, cut to a readable length."""
    hint = "The file is damaged or incomplete: fetch it again."
    raise UserError(f"{name}: {field[:200]}: found {str(found)[:200]}, wanted {wanted}", hint)


def view(data: Bytes, offset: int, dtype: Dtype, shape: tuple[int, ...]) -> Array:
    """A row-major array on the bytes of a file, which are checked to be there."""
    bits = np.frombuffer(data, dtype.numpy, math.prod(shape), offset).reshape(shape)
    return Array.of(from_numpy(bits, dtype, False))


def raw(array: Array) -> memoryview:
    """The bytes of an array in row-major order."""
    bits = np.ascontiguousarray(to_numpy(array._evaluated()))
    return bits.reshape(-1).view(np.uint8).data

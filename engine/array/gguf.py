"""GGUF files: metadata and tensors in MLX's layout, read from a map and written. Nothing in the file is trusted.

Dense tensors are views of the map; quantized blocks become codes, scales and biases (w = scale·q + bias, groups of 32)
whose codes are the file's own. Every count, offset and type is checked.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ..errors import UserError
from . import ggml
from .array import Array
from .dtypes import FROM_NUMPY, Dtype, bfloat16, float16, float32, float64, int8, int16, int32, int64
from .files import Bytes, damaged, name_of, raw, read_bytes, replacing, view
from .ggml import BLOCKS, Block
from .node import from_numpy, show


class Type(NamedTuple):
    """A tensor type: `block` elements in `size` bytes. It is read if it has a dtype, or if ggml.BLOCKS has its name."""

    name: str
    block: int
    size: int
    dtype: Dtype | None = None

    @property
    def codes(self) -> Block | None:
        return BLOCKS.get(self.name)


DENSE = {
    0: Type("F32", 1, 4, float32),
    1: Type("F16", 1, 2, float16),
    30: Type("BF16", 1, 2, bfloat16),
    24: Type("I8", 1, 1, int8),
    25: Type("I16", 1, 2, int16),
    26: Type("I32", 1, 4, int32),
    27: Type("I64", 1, 8, int64),
    28: Type("F64", 1, 8, float64),
}
BLOCKED = """
2 Q4_0 32 18, 3 Q4_1 32 20, 6 Q5_0 32 22, 7 Q5_1 32 24, 8 Q8_0 32 34, 9 Q8_1 32 40, 10 Q2_K 256 84, 11 Q3_K 256 110,
12 Q4_K 256 144, 13 Q5_K 256 176, 14 Q6_K 256 210, 15 Q8_K 256 292, 16 IQ2_XXS 256 66, 17 IQ2_XS 256 74,
18 IQ3_XXS 256 98, 19 IQ1_S 256 50, 20 IQ4_NL 32 18, 21 IQ3_S 256 110, 22 IQ2_S 256 82, 23 IQ4_XS 256 136,
29 IQ1_M 256 56, 34 TQ1_0 256 54, 35 TQ2_0 256 66, 39 MXFP4 32 17, 40 NVFP4 64 36
"""  # code, name, block, size
ROWS = map(str.split, BLOCKED.split(","))
TYPES = DENSE | {int(code): Type(name, int(block), int(size)) for code, name, block, size in ROWS}
SUPPORTED = ", ".join(kind.name for kind in TYPES.values() if kind.dtype or kind.codes)
WRITTEN = {kind.dtype: code for code, kind in DENSE.items() if kind.dtype}
AS_CODES = ("Q4_0", "Q4_1", "Q8_0")  # what MLX loads as codes, scales and biases, and not as float16


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]  # rows first, as NumPy has it; the file says columns first
    type: Type
    offset: int  # in `data`, the file that has it: one of several, if the model was split
    nbytes: int
    data: Bytes


STRING, ARRAY, DEPTH = 8, 9, 4  # DEPTH: arrays of arrays of …
CODES = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
SCALARS = {code: np.dtype(name) for code, name in CODES.items()}


class File:
    """The header of a GGUF file, checked, and the mapped bytes behind it."""

    def __init__(self, file: Any) -> None:
        self.path, self.data, self.position = name_of(file), read_bytes(file), 0
        self.size = len(self.data)
        if self.size < 24:
            self.fail("size", f"{self.size} bytes", "at least 24")
        if self.data[:4] != b"GGUF":
            self.fail("magic", self.data[:4], b"GGUF")
        self.position = 4
        if (version := self.number("<u4")) not in (2, 3):
            self.fail("version", version, "2 or 3")
        tensors = self.count("tensor count", 24)
        entries = self.count("metadata count", 13)
        self.metadata: dict[str, Any] = {}
        self.kinds: dict[str, int] = {}                    # the type of each value
        for _ in range(entries):
            self.read_entry()
        self.tensors = self.read_tensors(tensors)

    def fail(self, field: str, found: object, wanted: object) -> NoReturn:
        damaged(self.path, field, found, wanted)

    def numbers(self, dtype: Any, count: int, field: str = "header") -> np.ndarray:
        dtype, start = np.dtype(dtype), self.position
        if count * dtype.itemsize > self.size - start:
            self.fail(field, f"{count} values at byte {start}", f"an end before byte {self.size}")
        self.position += count * dtype.itemsize
        return np.frombuffer(self.data, dtype, count, start)

    def number(self, dtype: Any, field: str = "header") -> Any:
        return self.numbers(dtype, 1, field)[0].item()

    def count(self, field: str, size: int) -> int:
        """A count of items that take at least `size` bytes each, bounded by what is left of the file."""
        count = self.number("<u8", field)
        if count * size > self.size - self.position:
            self.fail(field, count, f"at most {(self.size - self.position) // size}, the file's end")
        return count

    def strings(self, count: int, field: str) -> list[str]:
        out, data, unpack, end = [], self.data, struct.Struct("<Q").unpack_from, self.position
        for _ in range(count):
            start = end + 8
            length = unpack(data, end)[0] if start <= self.size else self.size
            end = start + length
            if end > self.size:
                self.fail(field, f"a string of {length} bytes at byte {start}", f"an end before byte {self.size}")
            out.append(data[start:end])
        self.position = end
        return [text.decode("utf-8", "replace") for text in out]

    def read_entry(self) -> None:
        (key,) = self.strings(1, "metadata key")
        if key in self.metadata:
            self.fail("metadata key", f"{key!r} twice", "it once")
        self.kinds[key] = self.number("<u4", key)
        self.metadata[key] = self.value(self.kinds[key], key, 0)

    def value(self, kind: int, key: str, depth: int) -> Any:
        if kind == STRING:
            return self.strings(1, key)[0]
        if kind in SCALARS:
            return self.number(SCALARS[kind], key)
        if kind != ARRAY or depth == DEPTH:
            wanted = f"arrays nested at most {DEPTH} deep" if kind == ARRAY else "0 to 12"
            self.fail(f"{key}, value type", kind, wanted)
        item = self.number("<u4", key)
        count = self.count(f"{key}, array length", {STRING: 8, ARRAY: 12}.get(item, 1))
        if item == STRING:
            return self.strings(count, key)
        if item in SCALARS:
            return self.numbers(SCALARS[item], count, key)
        return [self.value(item, key, depth + 1) for _ in range(count)]

    def read_tensors(self, count: int) -> dict[str, Tensor]:
        rows = [self.read_tensor() for _ in range(count)]
        align = self.get("general.alignment", int, 32)
        if align < 8 or align & (align - 1) or align > 1 << 20:
            self.fail("general.alignment", align, "a power of two from 8 to 2**20")
        end = start = -(-self.position // align) * align
        tensors: dict[str, Tensor] = {}
        for name, shape, kind, offset in sorted(rows, key=lambda row: row[3]):
            nbytes = math.prod(shape) // kind.block * kind.size
            if name in tensors:
                self.fail("tensor name", f"{name!r} twice", "it once")
            if offset % align or start + offset < end:
                self.fail(f"tensor {name}, offset", offset, f"a multiple of {align} from {end - start} on")
            if (end := start + offset + nbytes) > self.size:
                self.fail(f"tensor {name}, end", f"byte {end}", f"at most {self.size}, the file's size")
            tensors[name] = Tensor(name, shape, kind, start + offset, nbytes, self.data)
        return tensors

    def read_tensor(self) -> tuple[str, tuple[int, ...], Type, int]:
        (name,) = self.strings(1, "tensor name")
        if not 1 <= (ndim := self.number("<u4", name)) <= 4:
            self.fail(f"tensor {name}, dimensions", ndim, "1 to 4")
        shape = tuple(self.numbers("<u8", ndim, name)[::-1].tolist())
        code, offset = self.number("<u4", name), self.number("<u8", name)
        if code not in TYPES:
            raise UserError(f"{self.path}: tensor {name} has the unknown type {code}; supported: {SUPPORTED}")
        kind = TYPES[code]
        if min(shape) == 0 or shape[-1] % kind.block:
            self.fail(f"tensor {name}, shape", shape, f"no zero, rows of whole blocks of {kind.block} ({kind.name})")
        return name, shape, kind, offset

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The metadata value of `key`, which must be of `kind`; without a default it must be there."""
        value = self.metadata.get(key, default)
        if value is None:
            self.fail(key, "nothing", f"a value of type {kind.__name__}")
        if not isinstance(value, kind) and not (kind is float and isinstance(value, int)):
            self.fail(key, f"{value!r}", f"a value of type {kind.__name__}")
        return value

    def read(self, tensor: Tensor, name: str, rows: np.ndarray | None = None) -> dict[str, Array]:
        """One tensor under `name`: an array, or the codes, scales and biases. `rows` puts its rows in another order."""
        kind = tensor.type
        if kind.dtype is not None and rows is None:
            return {name: view(tensor.data, tensor.offset, kind.dtype, tensor.shape)}
        raw = self.blocks(tensor).reshape(tensor.shape[0], -1)
        items = (raw if rows is None else raw[rows]).reshape(-1)
        if kind.dtype is not None:
            self.release(tensor)
            return {name: _array(items.view(kind.dtype.numpy).reshape(tensor.shape), kind.dtype)}
        parts = ggml.read(kind.name, items)
        self.release(tensor)
        keys = (name, *(name.removesuffix("weight") + part for part in ("scales", "biases")))
        return {k: _array(part.reshape(*tensor.shape[:-1], -1)) for k, part in zip(keys, parts, strict=False)}

    def expand(self, tensor: Tensor) -> Array:
        """The numbers of a quantized tensor, as float16."""
        numbers = ggml.expand(tensor.type.name, self.blocks(tensor))
        self.release(tensor)
        return _array(numbers.reshape(tensor.shape))

    def blocks(self, tensor: Tensor) -> np.ndarray:
        """A tensor's bytes."""
        if tensor.type.dtype is None and tensor.type.codes is None:
            raise UserError(f"{self.path}: tensor {tensor.name} has type {tensor.type.name}; supported: {SUPPORTED}")
        return np.frombuffer(tensor.data, np.uint8, tensor.nbytes, tensor.offset)

    def release(self, tensor: Tensor) -> None:
        """Forget the mapped pages of a tensor that was copied."""
        start = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = tensor.offset + tensor.nbytes
        if isinstance(tensor.data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and end > start:
            tensor.data.madvise(mmap.MADV_DONTNEED, start, end - start)


def _array(items: np.ndarray, dtype: Dtype | None = None) -> Array:
    return Array.of(from_numpy(items, dtype or FROM_NUMPY[items.dtype], True))


def load_gguf(file: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    """All tensors by name (`x.weight` that is quantized comes with `x.scales` and `x.biases`, or as float16 where its
    blocks have no layout of MLX's) and the metadata: arrays, strings and lists of strings."""
    opened = File(file)
    arrays: dict[str, Array] = {}
    for tensor in opened.tensors.values():
        whole = tensor.type.dtype is None and tensor.type.name not in AS_CODES
        part = {tensor.name: opened.expand(tensor)} if whole else opened.read(tensor, tensor.name)
        if twice := arrays.keys() & part.keys():
            opened.fail("tensor name", f"{min(twice)!r} twice", "it once")
        arrays |= part
    metadata = {key: value if isinstance(value, str | list) else _array(np.array(value, SCALARS.get(opened.kinds[key])))
                for key, value in opened.metadata.items()}
    return arrays, metadata


# writing

ALIGNMENT = 32


def save_gguf(file: Any, arrays: dict[str, Array], metadata: Mapping[str, Any] | None = None) -> None:
    """Writes arrays of 1 to 4 axes by name, and metadata: arrays of at most one axis, strings, lists of strings."""
    head = header([(name, *_typed(name, array)) for name, array in arrays.items()], metadata or {})
    with replacing(file, ".gguf") as out:
        out.write(head)
        for array in arrays.values():
            out.write(raw(array))
            out.write(bytes(-array.nbytes % ALIGNMENT))


def header(tensors: Iterable[tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, Any]) -> bytes:
    """All that comes before the data: metadata, and name, shape, type and bytes of tensors that follow one another."""
    entries = [_text(key) + _value(key, value) for key, value in metadata.items()]
    offset, infos = 0, []
    for name, shape, code, nbytes in tensors:
        infos.append(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], code, offset))
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    head = b"".join([b"GGUF", struct.pack("<IQQ", 3, len(infos), len(entries)), *entries, *infos])
    return head + bytes(-len(head) % ALIGNMENT)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(name: str, array: Array) -> tuple[tuple[int, ...], int, int]:
    if array.dtype not in WRITTEN or not 1 <= array.ndim <= 4 or 0 in array.shape:
        types = ", ".join(dtype.name for dtype in WRITTEN)
        found = f"{name!r} is {array.dtype}{show(array.shape)}"
        raise ValueError(f"[save_gguf] {found}: 1 to 4 axes, none of them empty, of {types}")
    return array.shape, WRITTEN[array.dtype], array.nbytes


def _value(key: str, value: Any) -> bytes:
    """The type and bytes of a metadata value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    array = value if isinstance(value, Array) else Array(value)
    codes = [code for code, dtype in SCALARS.items() if dtype == array.dtype.numpy]
    if array.ndim > 1 or not codes or array.dtype is bfloat16:
        found = f"{key!r} is {array.dtype}{show(array.shape)}"
        raise ValueError(f"[save_gguf] metadata {found}: at most 1 axis of bool, integers, float32 or float64")
    kind = struct.pack("<IIQ", ARRAY, codes[0], array.size) if array.ndim else struct.pack("<I", codes[0])
    return kind + bytes(raw(array))

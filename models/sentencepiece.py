"""SentencePiece's tokenizer.model, read by protobuf's wire format: fields of a number, a kind and a value.

Sources: https://protobuf.dev/programming-guides/encoding/ and sentencepiece_model.proto of google/sentencepiece.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..engine.errors import UserError
from .vocabulary import Pieces

Value = Any  # int, float or bytes
UNIGRAM, BPE = 1, 2
SPECIAL = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}  # field, default


def varint(data: bytes, start: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and where it ends."""
    value = 0
    for i in range(10):
        byte = data[start + i]
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, start + i + 1
    raise ValueError(f"a number at byte {start} does not end")


def fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of a message: whole numbers, 32-bit floats, and bytes that are text or a message."""
    position = 0
    while position < len(data):
        key, position = varint(data, position)
        if key & 7 == 0:
            value, position = varint(data, position)
            yield key >> 3, value
            continue
        size, position = varint(data, position) if key & 7 == 2 else ({1: 8, 5: 4}.get(key & 7, -1), position)
        if size < 0 or position + size > len(data):
            raise ValueError(f"field {key >> 3} of kind {key & 7} at byte {position}")
        found = data[position : position + size]
        yield key >> 3, struct.unpack("<f", found)[0] if key & 7 == 5 else found
        position += size


def read(path: Path) -> tuple[Pieces, dict[str, str]]:
    """The vocabulary in a file, and its special tokens as tokenizer_config.json names them."""
    try:
        return parse(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path}: {error.what}", error.hint) from None
    except (ValueError, IndexError, TypeError, AttributeError, struct.error) as error:
        hint = "Llama 3's and tiktoken's files have this name too: take the repo's tokenizer.json."
        raise UserError(f"{path}: not a SentencePiece model: {str(error)[:100]}", hint) from None


def parse(data: bytes) -> tuple[Pieces, dict[str, str]]:
    rows, specs = [], {2: b"", 3: b""}
    for number, value in fields(data):
        if number == 1:
            rows.append({1: b"", 2: 0.0, 3: 1, **dict(fields(value))})
        elif number in specs:
            specs[number] += value
    if not rows:
        raise ValueError("no pieces in it")
    trainer, normalizer = (dict(fields(spec)) for spec in specs.values())
    kind = trainer.get(3, UNIGRAM)
    if kind not in (UNIGRAM, BPE) or trainer.get(24):  # 24: spaces are suffixes
        raise UserError(f"model type {kind} is not read; read: 1 (unigram) and 2 (BPE), spaces as prefixes")
    pieces = [text(row[1]) for row in rows]
    ids = {name: signed(trainer.get(number, default)) for name, (number, default) in SPECIAL.items()}
    special = {name: pieces[i] for name, i in ids.items() if 0 <= i < len(pieces)}
    vocabulary = Pieces(
        pieces, [float(row[2]) for row in rows], [int(row[3]) for row in rows], ids["unk_token"], kind == UNIGRAM,
        charsmap=normalizer.get(2, b""), prefix=bool(normalizer.get(3, 1)), collapse=bool(normalizer.get(4, 1)),
    )  # fmt: skip
    return vocabulary, special


def text(value: Any) -> str:
    return value.decode("utf-8")


def signed(value: Any) -> int:
    """Negative numbers are written as their 64-bit complement."""
    return value - (1 << 64) if value >> 63 else value

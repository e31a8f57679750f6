"""Safetensors: the reference library writes, we read, and the other way round; every kind of damage is named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from lazulite.engine import array as mx
from lazulite.engine.errors import UserError
from lazulite.models import safetensors
from lazulite.models.writer import Writer

TENSORS = {
    "a.weight": torch.randn(3, 5).to(torch.bfloat16),
    "b.weight": torch.randn(7),
    "half": torch.randn(2, 2, 2).half(),
    "codes": torch.arange(6, dtype=torch.int32).view(torch.uint32).reshape(2, 3),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "signed": torch.arange(-3, 3, dtype=torch.int64),
    "flags": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def same(found: mx.Array, want: torch.Tensor) -> bool:
    values = want.float() if want.dtype == torch.bfloat16 else want
    return found.shape == tuple(want.shape) and np.array_equal(np.asarray(found), values.numpy())


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = safetensors.read(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert [name for name in TENSORS if not same(found[name], TENSORS[name])] == []
    assert found["a.weight"].dtype is mx.bfloat16 and found["codes"].dtype is mx.uint32


@pytest.mark.parametrize(("limit", "shards"), [(1 << 30, 1), (60, 3)])
def test_the_library_reads_what_we_write(tmp_path: Path, limit: int, shards: int) -> None:
    (tmp_path / "in").mkdir()
    save_file(TENSORS, tmp_path / "in/model.safetensors")
    out = Writer(tmp_path, room=2000, limit=limit)
    for name, array in safetensors.read(tmp_path / "in/model.safetensors").items():
        out.add(name, array)
    out.finish(parameters=37)
    files = safetensors.find(tmp_path)
    assert len(files) == shards
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    size = sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["metadata"] == {"total_size": size, "total_parameters": 37}
    assert list(index["weight_map"]) == sorted(TENSORS)


def test_nothing_is_read_but_the_header(tmp_path: Path) -> None:
    """A sparse file of 8 GB opens at once, and its last element is there."""
    header = json.dumps({"big": {"dtype": "F32", "shape": [1 << 31], "data_offsets": [0, 1 << 33]}}).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 33))
    assert safetensors.read(tmp_path / "model.safetensors")["big"].shape == (1 << 31,)


def file(header: object, data: int = 64, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(data)


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16), **more: object) -> dict:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}, **more}


TWICE = json.dumps(entry())[:-1].encode() + b', "t"' + json.dumps(entry())[4:].encode()
BAD = {  # id: (bytes of the file, the message)
    "short": (b"abc", "size: found 3 bytes, wanted at least 8"),
    "length": (file({}, length=1 << 60), "header length: found 1152921504606846976, wanted 2 to 66"),
    "pickle": (b"\x80\x02}q\x00." * 20, "header length"),
    "not-json": (file(b"{" * 40), "header: found .*, wanted a JSON object"),
    "not-utf8": (file(b"\xff" * 40), "header: found"),
    "deep": (file(b"[" * 100000), "header: found .*, wanted a JSON object"),
    "list": (file([1, 2]), "header: found list"),
    "entry": (file({"t": 3}), "tensor t: found 3, wanted dtype, shape and data_offsets"),
    "twice": (file(TWICE), "a name occurs twice"),
    "dtype": (file(entry("F4")), "tensor t has dtype F4; supported: BOOL, U8"),
    "dtype-kind": (file(entry([1])), r"tensor t has dtype \[1\]"),
    "shape-kind": (file(entry(shape="4")), "tensor t, shape: found 4, wanted a list of sizes"),
    "negative": (file(entry(shape=[-4])), r"tensor t, shape: found \[-4\]"),
    "fraction": (file(entry(shape=[4.0])), r"tensor t, shape: found \[4.0\]"),
    "shape": (file(entry(shape=[5])), "tensor t, bytes: found 16, wanted those of F32"),
    "overflow": (file(entry(shape=[1 << 62, 1 << 62])), "tensor t, bytes: found 16"),
    "past-end": (file(entry(shape=[20], offsets=[0, 80])), r"tensor t, data_offsets: found \[0, 80\].* 64 bytes"),
    "backwards": (file(entry(offsets=[16, 0])), r"tensor t, data_offsets: found \[16, 0\]"),
    "three": (file(entry(offsets=[0, 16, 32])), r"tensor t, data_offsets: found \[0, 16, 32\]"),
    "overlap": (file(entry(u=entry(offsets=[8, 24])["t"])), r"tensor u, data_offsets: found \[8, 24\], .* from 16"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged(tmp_path: Path, name: str) -> None:
    data, message = BAD[name]
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        safetensors.read(tmp_path / "m.safetensors")
    assert str(error.value).startswith(str(tmp_path))


GOOD = save({name: TENSORS[name] for name in ("a.weight", "b.weight")})


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    length=st.one_of(st.just(len(GOOD)), st.integers(0, len(GOOD))),
)
def test_flipped_and_truncated_files_load_or_are_refused(tmp_path: Path, flips: list, length: int) -> None:
    data = bytearray(GOOD)
    for position, value in flips:
        data[position % len(data)] = value
    (tmp_path / "m.safetensors").write_bytes(data[:length])
    try:
        safetensors.read(tmp_path / "m.safetensors")
    except UserError as error:
        assert len(error.what) < 600


INDEX = [
    ("{", "not an index with a weight_map"),
    ('{"weight_map": 3}', "not an index with a weight_map"),
    ('{"weight_map": {"a": "model-1.safetensors"}}', "1 of 1 files are missing, the first is 'model-1.safetensors'"),
    ('{"weight_map": {"a": "../../etc/passwd"}}', "1 of 1 files are missing"),
]


@pytest.mark.parametrize(("text", "message"), INDEX)
def test_index(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=message):
        safetensors.find(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="no model.*safetensors"):
        safetensors.find(tmp_path)

"""Files: NumPy, safetensors, gguf and MLX read what we write, and the other way round; damage is named."""
import errno
import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import gguf as gguf_reference
import mlx.core as mlx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from safetensors.torch import load_file, save_file

from lazulite.engine import array as mx
from lazulite.engine.array import ggml
from lazulite.engine.errors import UserError

TYPES = ["bool_", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16",
         "float32", "float64", "complex64"]
SHAPES = [(), (0,), (3,), (2, 0, 4), (2, 3, 5)]
FORMATS = ["npy", "npz", "safetensors", "gguf"]


def values(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    kind = bfloat16 if dtype == "bfloat16" else dtype
    return np.asarray(10 * np.random.default_rng(3).standard_normal(shape)).astype(kind)


def same(found: mx.Array, want: np.ndarray) -> bool:
    name = "bool" if found.dtype is mx.bool_ else found.dtype.name
    return (name, found.shape) == (want.dtype.name, want.shape) and bytes(found) == want.tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_comes_back(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    want = values(dtype, shape)
    array = mx.asarray(want)
    mx.save(tmp_path / "a", array)
    mx.savez(tmp_path / "a", array, named=array)
    mx.savez_compressed(tmp_path / "b", array)
    mx.save_safetensors(tmp_path / "a", {"x": array, "y": array})
    assert same(mx.load(tmp_path / "a.npy"), want)
    assert {k: same(a, want) for k, a in mx.load(tmp_path / "a.npz").items()} == {"arr_0": True, "named": True}
    assert {k: same(a, want) for k, a in mx.load(tmp_path / "b.npz").items()} == {"arr_0": True}
    assert {k: same(a, want) for k, a in mx.load(tmp_path / "a.safetensors").items()} == {"x": True, "y": True}
    plain = want.view("V2") if dtype == "bfloat16" else want
    stored = [np.load(tmp_path / "a.npy"), np.load(tmp_path / "a.npz")["named"], np.load(tmp_path / "b.npz")["arr_0"]]
    for found in stored:
        assert found.dtype == plain.dtype and found.shape == shape and found.tobytes() == plain.tobytes()


@pytest.mark.parametrize("dtype", [name for name in TYPES if name != "float64"])
def test_mlx_and_we_read_each_other(tmp_path: Path, dtype: str) -> None:
    want = values(dtype, (2, 3))
    ours, theirs = mx.asarray(want), mlx.array(want.astype(np.float32) if dtype == "bfloat16" else want)
    theirs = theirs.astype(getattr(mlx, dtype))
    for library, array, other in ((mx, ours, mlx), (mlx, theirs, mx)):
        folder = tmp_path / library.__name__
        folder.mkdir()
        library.save(str(folder / "a.npy"), array)
        library.savez(str(folder / "a.npz"), x=array)
        library.save_safetensors(str(folder / "a.safetensors"), {"x": array}, {"key": "text"})
        found, metadata = other.load(str(folder / "a.safetensors"), return_metadata=True)
        assert metadata == {"key": "text"}
        for result in (other.load(str(folder / "a.npy")), other.load(str(folder / "a.npz"))["x"], found["x"]):
            assert str(result.dtype).endswith(str(array.dtype).split(".")[-1])
            assert bytes(mx.asarray(result)) == bytes(ours)


def test_the_safetensors_library_reads_and_writes_ours(tmp_path: Path) -> None:
    arrays = {name: mx.asarray(values(name, (3, 5))) for name in TYPES}
    mx.save_safetensors(tmp_path / "a.safetensors", arrays)
    found = load_file(tmp_path / "a.safetensors")
    assert {name: bytes(mx.from_dlpack(tensor)) for name, tensor in found.items()} == {
        name: bytes(array) for name, array in arrays.items()}
    save_file(found, tmp_path / "b.safetensors")
    again = mx.load(tmp_path / "b.safetensors")
    assert {k: (a.dtype, bytes(a)) for k, a in again.items()} == {k: (a.dtype, bytes(a)) for k, a in arrays.items()}


NPY = {  # what NumPy can write and we read
    "column-major": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "big-endian": np.arange(6, dtype=">i4").reshape(2, 3),
    "big-endian-half": np.arange(6, dtype=">f2"),
    "strided": np.arange(24, dtype=np.int16).reshape(4, 6)[::-2, 1::2],
}


@pytest.mark.parametrize("name", NPY)
def test_npy_layouts(tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "a.npy", NPY[name])
    assert same(mx.load(tmp_path / "a.npy"), NPY[name].astype(NPY[name].dtype.newbyteorder("=")))
    with open(tmp_path / "v2.npy", "wb") as file:
        np.lib.format.write_array(file, NPY[name], version=(2, 0))
    assert mx.load(tmp_path / "v2.npy").tolist() == NPY[name].tolist()


def test_results_that_are_not_row_major_are_written_in_order(tmp_path: Path) -> None:
    x = mx.array(np.arange(12, dtype=np.float32).reshape(3, 4))
    mx.save_safetensors(tmp_path / "a", {"t": x.T, "lazy": x + 1, "row": x[1:2, ::2]})
    found = load_file(tmp_path / "a.safetensors")
    want = np.arange(12).reshape(3, 4)
    assert [found[k].tolist() for k in ("t", "lazy", "row")] == [want.T.tolist(), (want + 1).tolist(), [[4.0, 6.0]]]


@pytest.mark.parametrize("name", ["npy", "safetensors"])
def test_large_files_are_mapped_not_read(tmp_path: Path, name: str) -> None:
    """A sparse file of 8 GB opens at once and its last element is there."""
    path, count = tmp_path / f"big.{name}", 1 << 31
    if name == "npy":
        np.lib.format.open_memmap(path, "w+", "<f4", (count,))
    else:
        header = b'{"x":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (count, 4 * count)
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + 4 * count)
    found = mx.load(path)
    assert (found if name == "npy" else found["x"])[-3:].tolist() == [0.0] * 3


def test_open_files(tmp_path: Path) -> None:
    x = mx.arange(5)
    stream = io.BytesIO()
    mx.save(stream, x)
    mx.save(stream, x + 1)
    stream.seek(0)
    assert mx.load(stream, format="npy").tolist() == [0, 1, 2, 3, 4]
    for name, save in (("npz", mx.savez), ("safetensors", lambda f, x: mx.save_safetensors(f, {"arr_0": x}))):
        with open(tmp_path / f"a.{name}", "wb") as file:
            save(file, x)
        with open(tmp_path / f"a.{name}", "rb") as file:
            assert mx.load(file)["arr_0"].tolist() == x.tolist()
    with open(tmp_path / "a.npy", "w") as file, pytest.raises(TypeError):
        mx.save(file, x)


# GGUF

Q = gguf_reference.GGMLQuantizationType


def write_gguf(path: Path) -> Path:
    """What the reference package writes."""
    writer = gguf_reference.GGUFWriter(path, "test")
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    for kind in (Q.Q4_0, Q.Q4_1, Q.Q8_0, Q.F16, Q.F32, Q.BF16):
        raw = gguf_reference.quants.quantize(x, kind)
        writer.add_tensor(f"{kind.name.lower()}.weight", raw, raw_dtype=kind)
    for dtype in (np.int8, np.int16, np.int32):
        writer.add_tensor(dtype.__name__, np.arange(-3, 3, dtype=dtype).reshape(2, 3))
    writer.add_bool("flag", True)
    writer.add_uint64("large", 1 << 40)
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("words", ["a", "ü"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_read_as_mlx_reads_it(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    (ours, facts), (theirs, want) = mx.load(path, return_metadata=True), mlx.load(str(path), return_metadata=True)
    assert ours.keys() - {"bf16.weight"} == theirs.keys() - {"bf16.weight"}
    for name in ours.keys() - {"bf16.weight"}:
        assert str(theirs[name].dtype).endswith(ours[name].dtype.name)
        assert bytes(ours[name]) == bytes(mx.asarray(theirs[name]))
    assert ours["bf16.weight"].dtype is mx.bfloat16
    plain = {k: v.tolist() if isinstance(v, mx.Array) else v for k, v in facts.items()}
    assert plain == {k: v.tolist() if isinstance(v, mlx.array) else v for k, v in want.items()}
    assert plain["words"] == ["a", "ü"] and facts["large"].dtype is mx.uint64


def test_other_gguf_blocks_come_as_float16(tmp_path: Path) -> None:
    rng, want = np.random.default_rng(0), {}
    writer = gguf_reference.GGUFWriter(tmp_path / "a.gguf", "test")
    for name in ggml.BLOCKS.keys() - {"Q4_0", "Q4_1", "Q8_0"}:
        kind = Q[name]
        raw = rng.integers(0, 120, (20, gguf_reference.GGML_QUANT_SIZES[kind][1]), np.uint8)
        rows = raw.reshape(-1).view(ggml.BLOCKS[name].layout)
        for scale in [field for field in rows.dtype.names if rows.dtype[field] == np.float16]:
            rows[scale] = rng.standard_normal(20)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=kind)
        want[f"{name}.weight"] = gguf_reference.quants.dequantize(raw, kind).astype(np.float16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = mx.load(tmp_path / "a.gguf")
    assert found.keys() == want.keys()
    assert [k for k, a in found.items() if not np.array_equal(a, want[k])] == []  # ours have no -0


def test_gguf_writes_what_the_package_and_mlx_read(tmp_path: Path) -> None:
    kinds = ["float32", "float16", "int8", "int16", "int32", "bfloat16", "int64", "float64"]
    arrays = {name: mx.asarray(values(name, (2, 3, 32))) for name in kinds}
    metadata = {"text": "ü", "words": ["a", "b"], "one": mx.array(3), "flag": mx.array(True)}
    metadata["some"] = mx.array([1.5, 2.5])
    mx.save_gguf(tmp_path / "a", arrays, metadata)
    found = {t.name: t for t in gguf_reference.GGUFReader(tmp_path / "a.gguf").tensors}
    assert {k: t.data.tobytes() for k, t in found.items()} == {k: bytes(a) for k, a in arrays.items()}
    again, facts = mx.load(tmp_path / "a.gguf", return_metadata=True)
    assert {k: (a.dtype, bytes(a)) for k, a in again.items()} == {k: (a.dtype, bytes(a)) for k, a in arrays.items()}
    mx.save_gguf(tmp_path / "b", {k: arrays[k] for k in kinds[:5]}, metadata)
    theirs, want = mlx.load(str(tmp_path / "b.gguf"), return_metadata=True)
    assert {k: bytes(mx.asarray(a)) for k, a in theirs.items()} == {k: bytes(arrays[k]) for k in kinds[:5]}
    for key, value in metadata.items():
        both = (facts[key], want[key])
        assert all((v if isinstance(v, str | list) else v.tolist()) == (
            value if isinstance(value, str | list) else value.tolist()) for v in both)


# writing whole or not at all

def write(name: str, path: Path, x: mx.Array) -> None:
    one = {"npy": mx.save, "npz": mx.savez, "safetensors": lambda p, x: mx.save_safetensors(p, {"x": x}),
           "gguf": lambda p, x: mx.save_gguf(p, {"x": x})}
    one[name](path, x)


@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a.{name}"
    write(name, path, mx.ones((4,)))
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left.*{path.name}"):
        write(name, path, mx.zeros((4,)))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_a_failing_computation_leaves_nothing(tmp_path: Path) -> None:
    x = mx.placeholder((3,), mx.float32)
    with pytest.raises(ValueError, match="placeholder"):
        mx.save_safetensors(tmp_path / "a", {"x": x})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_mapped_file_can_be_replaced(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"a.{name}"
    write(name, path, mx.ones((4,)))
    old = mx.load(path)
    old = old if name == "npy" else next(iter(old.values()))
    write(name, path, old + 1)
    new = mx.load(path)
    assert old.tolist() == [1.0] * 4 and (new if name == "npy" else next(iter(new.values()))).tolist() == [2.0] * 4


# what is refused

def zipped(**members: bytes) -> bytes:
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def npy(header: str, data: bytes = bytes(64)) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


def fact(descr: object = "<f4", order: object = False, shape: object = (4,)) -> str:
    return str({"descr": descr, "fortran_order": order, "shape": shape})


BAD = [  # extension, bytes, message
    ("npy", b"", "npy header: found .*, wanted version 1.0 or 2.0 of one array"),
    ("npy", b"PK" + bytes(60), "npy header: found"),
    ("npy", b"\x93NUMPY\x09\x00" + bytes(60), "npy header: found"),
    ("npy", npy("{" * 900), "npy header: found"),
    ("npy", npy("(" * 9000), "npy header: found"),
    ("npy", npy(fact("|O")), "the array has NumPy type object; supported: bool, uint8"),
    ("npy", npy(fact("<c16")), "the array has NumPy type complex128"),
    ("npy", npy(fact([("a", "<f4")])), "the array has NumPy type"),
    ("npy", npy(fact(shape=(17,))), r"shape: found \(17,\), wanted one of float32 in 64 bytes"),
    ("npy", npy(fact(shape=(1 << 60, 1 << 60))), "shape: found"),
    ("npy", npy(fact(shape=(-4,))), r"shape: found \(-4,\)"),
    ("npz", b"PK" + bytes(99), "archive: found File is not a zip file, wanted an .npz"),
    ("npz", zipped(a=b"abc"), "a: npy header: found"),
    ("safetensors", b"abc", "size: found 3 bytes, wanted at least 8"),
    ("safetensors", b"\x19" + bytes(7) + b'{"__metadata__":{"a":[]}}', "__metadata__: found .*, wanted an object of"),
    ("gguf", b"GGUF", "size: found 4 bytes"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD)
def test_damage_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / f"a.{name}"
    path.write_bytes(data)
    for file in (path, io.BytesIO(data)):
        with pytest.raises(UserError, match=message) as error:
            mx.load(file, format=name)
        assert len(str(error.value)) < 600
    with pytest.raises(UserError, match=f"^{path}"):
        mx.load(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    x = mx.asarray(values("float16", (2, 32)))
    for name in FORMATS[:3]:
        write(name, folder / f"a.{name}", x)
    mx.savez_compressed(folder / "c.npz", x)
    write_gguf(folder / "a.gguf")
    return folder


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "c.npz", "a.safetensors", "a.gguf"])
@given(flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=3), cut=st.integers(0, 1 << 20))
def test_flipped_and_truncated_files_load_or_are_refused(tmp_path: Path, good: Path, name: str, flips: list,
                                                         cut: int) -> None:
    data = bytearray((good / name).read_bytes())
    for position, value in flips:
        data[position % min(len(data), 600)] = value
    path = tmp_path / name
    path.unlink(missing_ok=True)                           # what is still mapped must not shrink
    path.write_bytes(data[:cut % len(data)] if cut % 2 else data)
    tracemalloc.start()
    try:
        mx.load(path)
    except UserError as error:
        assert len(error.what) < 700
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8 << 20


ERRORS = [
    (lambda p: mx.load(p / "none.npy"), FileNotFoundError, "none.npy"),
    (lambda p: mx.load(p / "a.bin"), ValueError, r"a.bin: format 'bin'; supported: npy, npz, safetensors, gguf"),
    (lambda p: mx.load(p / "a.npy", return_metadata=True), ValueError, "npy has no metadata"),
    (lambda p: mx.savez(p / "a", mx.ones(2), arr_0=mx.ones(2)), ValueError, "'arr_0' names a positional array and"),
    (lambda p: mx.save_safetensors(p / "a", {}, {"k": 3}), ValueError, "metadata 'k' is int, a string wanted"),
    (lambda p: mx.save_gguf(p / "a", {"x": mx.ones((2,), mx.uint8)}), ValueError, r"'x' is uint8\(2,\): 1 to 4 axes"),
    (lambda p: mx.save_gguf(p / "a", {"x": mx.array(1.0)}), ValueError, r"'x' is float32\(\): 1 to 4 axes"),
    (lambda p: mx.save_gguf(p / "a", {}, {"k": mx.ones((2, 2))}), ValueError, r"'k' is float32\(2, 2\): at most 1"),
    (lambda p: mx.save(p / "no/a.npy", mx.ones(2)), FileNotFoundError, "no/a.npy"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_errors(tmp_path: Path, call: object, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        call(tmp_path)
    assert os.listdir(tmp_path) == []

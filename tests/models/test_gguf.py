"""GGUF files written by the reference package `gguf`, read by ours: values, names, config, and every kind of damage."""

import struct
import subprocess
import sys
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazulite.engine.errors import UserError
from lazulite.models import gguf, hub, tokenizer

HEADS, KV_HEADS, WIDTH, ROWS = 4, 2, 64, 96
MODEL = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
}


def write(path: Path, tensors: dict, metadata: dict = MODEL) -> Path:
    """`tensors`: name -> (values, type)."""
    writer = reference.GGUFWriter(path, None)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
            add[type(value)](key, value)
    for name, (values, kind) in tensors.items():
        raw = reference.quants.quantize(values, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def dequantized(part: dict, name: str) -> np.ndarray:
    """float64 values of a read weight, by MLX's definition: little-endian bit stream, w = scale·q + bias."""
    if len(part) == 1:
        return np.asarray(part[name]).astype(np.float64)
    codes, scales, biases = (np.asarray(part[name.replace("weight", x)]) for x in ("weight", "scales", "biases"))
    bits = codes.shape[-1] // scales.shape[-1]  # 32-bit words for each group of 32
    stream = np.unpackbits(codes.view(np.uint8), axis=-1, bitorder="little").reshape(*scales.shape, 32, bits)
    q = (stream << np.arange(bits)).sum(-1)
    return (q * scales[..., None].astype(float) + biases[..., None].astype(float)).reshape(*scales.shape[:-1], -1)


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q8_0], ids=lambda kind: kind.name)
def test_types(tmp_path: Path, kind: Q) -> None:
    values = normal(ROWS, WIDTH)
    file = gguf.File(write(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": (values, kind)}))
    part = gguf.parts(file)[0]()
    want = reference.quants.dequantize(reference.quants.quantize(values, kind), kind)
    np.testing.assert_array_equal(dequantized(part, "model.layers.0.mlp.up_proj.weight").astype(np.float32), want)


def test_biases_beyond_float16_are_float32(tmp_path: Path) -> None:
    values = normal(4, 32) * 127 * 600  # scales of 600 and more: biases of -128 scales overflow float16
    part = gguf.parts(gguf.File(write(tmp_path / "m.gguf", {"output.weight": (values, Q.Q8_0)})))[0]()
    want = reference.quants.dequantize(reference.quants.quantize(values, Q.Q8_0), Q.Q8_0)
    np.testing.assert_array_equal(dequantized(part, "lm_head.weight").astype(np.float32), want)


@pytest.mark.parametrize("kind", [Q.F32, Q.Q4_0])
@pytest.mark.parametrize(("name", "heads"), [("attn_q", HEADS), ("attn_k", KV_HEADS), ("attn_v", 0)])
def test_rotary_rows_are_in_hugging_face_order(tmp_path: Path, name: str, heads: int, kind: Q) -> None:
    values = normal(16 * max(heads, 2), WIDTH)
    stored = values
    if heads:  # llama.cpp's convert_hf_to_gguf.py
        stored = values.reshape(heads, 2, len(values) // heads // 2, WIDTH).swapaxes(1, 2).reshape(values.shape)
    part = gguf.parts(gguf.File(write(tmp_path / "m.gguf", {f"blk.0.{name}.weight": (stored, kind)})))[0]()
    want = reference.quants.dequantize(reference.quants.quantize(values, kind), kind)
    found = dequantized(part, f"model.layers.0.self_attn.{name[-1]}_proj.weight")
    np.testing.assert_array_equal(found.astype(np.float32), want)


EMBED = {"token_embd.weight": (normal(ROWS, WIDTH), Q.Q8_0), "output_norm.weight": (normal(WIDTH), Q.F32)}


def test_config(tmp_path: Path) -> None:
    up = {f"blk.0.ffn_{x}.weight": (normal(ROWS, WIDTH), Q.Q4_0) for x in ("up", "gate")}
    config = gguf.config(gguf.File(write(tmp_path / "m.gguf", EMBED | up)))
    want = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH // HEADS,
        "vocab_size": ROWS,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_scaling": None,
    }
    assert {key: config[key] for key in want} == want
    wide = {"group_size": 32, "bits": 8, "mode": "affine"}
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine", "model.embed_tokens": wide}


def test_llama3_scaling_comes_back_from_its_divisors(tmp_path: Path) -> None:
    """The divisors are those of transformers' own llama3 frequencies."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    size = {"hidden_size": 512, "num_attention_heads": 4, "max_position_embeddings": 131072}
    config = LlamaConfig(**size, rope_parameters={"rope_theta": 500000.0, **scaling})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(64) / 64)
    divisors = {"rope_freqs.weight": ((plain / scaled.numpy()).astype(np.float32), Q.F32)}
    file = gguf.File(write(tmp_path / "m.gguf", EMBED | divisors, MODEL | {"llama.rope.freq_base": 500000.0}))
    assert gguf.config(file)["rope_scaling"] == scaling
    assert len(gguf.parts(file)) == 2  # the table is not a weight


REFUSED = [  # changes of the metadata, the type of the tensor blk.0.attn_v.weight, the message
    ({"general.architecture": "rwkv"}, Q.F32, "architecture 'rwkv' is not supported; supported: llama"),
    ({}, Q.TQ2_0, r"tensor blk.0.attn_v.weight has type TQ2_0; supported: F32, F16, BF16"),
    ({"llama.block_count": "two"}, Q.F32, "llama.block_count: found 'two', wanted a value of type int"),
    ({"llama.attention.head_count": 0}, Q.F32, "model: found .*'num_attention_heads': 0"),
    ({"llama.attention.head_count_kv": [2, 2]}, Q.F32, "llama.attention.head_count_kv: found .* wanted a value of"),
    ({"llama.rope.scaling.type": "magic"}, Q.F32, "rope.scaling.type 'magic' is not supported"),
    ({"llama.rope.scaling.type": "linear"}, Q.F32, "rope.scaling.factor: found nothing, wanted a value of type float"),
    ({"general.alignment": 48}, Q.F32, "general.alignment: found 48, wanted a power of two"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED)
def test_refused_by_name(tmp_path: Path, changes: dict, kind: Q, message: str) -> None:
    path = write(tmp_path / "m.gguf", EMBED | {"blk.0.attn_v.weight": (normal(8, 256), kind)}, MODEL | changes)
    with pytest.raises(UserError, match=message):
        load(path)


def load(path: Path) -> None:
    file = gguf.File(path)
    gguf.config(file)
    for part in gguf.parts(file):
        part()
    if "tokenizer.ggml.model" in file.metadata:
        tokenizer.from_gguf(file.metadata, path).encode("a b")


def header(version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str = "t", dims: tuple = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


NESTED = text("a") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 8
KEY = text("key") + struct.pack("<II", 4, 7)
BAD = {  # id: (bytes of the file, the message)
    "short": (b"GGUF", "size: found 4 bytes"),
    "magic": (b"GGML" + bytes(60), "magic: found b'GGML', wanted b'GGUF'"),
    "version": (header(1) + bytes(60), "version: found 1, wanted 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(60), "version: found 50331648"),
    "tensor-count": (header(tensors=1 << 62) + bytes(60), "tensor count: found 4611686018427387904, wanted at most"),
    "entry-count": (header(entries=1 << 40) + bytes(60), "metadata count: found 1099511627776"),
    "huge-key": (header(entries=1) + struct.pack("<Q", 1 << 63) + bytes(60), "a string of 9223372036854775808 bytes"),
    "value-type": (header(entries=1) + text("key") + struct.pack("<I", 77) + bytes(9), "key, value type: found 77"),
    "array-length": (header(entries=1) + text("k") + struct.pack("<IIQ", 9, 4, 1 << 60), "k, array length: found 115"),
    "string-array": (header(entries=1) + text("k") + struct.pack("<IIQQ", 9, 8, 1, 1 << 33), "k: found a string of"),
    "nested": (header(entries=1) + NESTED + bytes(60), "arrays nested at most 4 deep"),
    "key-twice": (header(entries=2) + KEY + KEY, "metadata key: found 'key' twice"),
    "dimensions": (header(3, 1) + text("t") + struct.pack("<I", 5) + bytes(60), "t, dimensions: found 5, wanted 1"),
    "dtype": (header(3, 1) + tensor(kind=99) + bytes(200), "tensor t has the unknown type 99; supported: F32"),
    "no-rows": (header(3, 1) + tensor(dims=(32, 0)) + bytes(200), "tensor t, shape"),
    "part-block": (header(3, 1) + tensor(dims=(33,), kind=2) + bytes(200), r"tensor t, shape: found \(33,\)"),
    "past-end": (header(3, 1) + tensor(offset=1 << 50) + bytes(200), "tensor t, end: found byte 11258999068"),
    "overflow": (header(3, 1) + tensor(dims=(1 << 63, 1 << 63, 4)) + bytes(200), "tensor t, end: found byte"),
    "unaligned": (header(3, 1) + tensor(offset=5) + bytes(300), "tensor t, offset: found 5, wanted a multiple of 32"),
    "overlap": (header(3, 2) + tensor("a") + tensor("b", offset=32) + bytes(400), "tensor b, offset: found 32"),
    "name-twice": (header(3, 2) + tensor() + tensor(offset=128) + bytes(400), "tensor name: found 't' twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged(tmp_path: Path, name: str) -> None:
    data, message = BAD[name]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        gguf.File(tmp_path / "m.gguf")
    assert str(error.value).startswith(str(tmp_path))  # the file is named


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tensors = EMBED | {"blk.0.attn_q.weight": (normal(WIDTH, WIDTH), Q.Q4_1)}
    vocabulary = {"model": "llama", "tokens": ["<unk>", "a", "b", "ab", "<s>"], "scores": [0.0, 0.5, 1.5, 2.0, 0.0]}
    vocabulary |= {"token_type": [2, 1, 1, 1, 3], "bos_token_id": 4, "eos_token_id": 4, "unknown_token_id": 0}
    metadata = MODEL | {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf", tensors, metadata).read_bytes()


def test_truncated_anywhere(tmp_path: Path, good: bytes) -> None:
    for length in [*range(0, 1800, 13), *range(1800, len(good), 997)]:
        (tmp_path / "m.gguf").write_bytes(good[:length])
        with pytest.raises(UserError):
            load(tmp_path / "m.gguf")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 1800), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_load_or_are_refused(tmp_path: Path, good: bytes, flips: list) -> None:
    data = bytearray(good)
    for position, value in flips:
        data[position] = value
    path = tmp_path / f"{hash(tuple(flips))}.gguf"
    path.write_bytes(data)
    try:
        load(path)
    except UserError as error:
        assert len(error.what) < 600
    finally:
        path.unlink()


MEASURE = """
import re
from lazulite.models import weights
files = weights.read()
print(len(files.tensors), files.nbytes, re.search("VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_default_model_values_and_memory() -> None:
    """The real file: a sample of its tensors equals the reference's, and mapped pages are let go of while it loads."""
    path = hub.resolve()
    count, size, peak = map(int, subprocess.check_output([sys.executable, "-c", MEASURE]).split())
    assert count == 272 + 2 * 211 and 1024 * peak < 1.5 * size + 150e6
    file = gguf.File(path)
    for tensor in reference.GGUFReader(path).tensors[:12]:
        if "attn_q" in tensor.name or "attn_k" in tensor.name:  # permuted, see above
            continue
        name = gguf.hf_name(file, tensor.name)
        found = dequantized(file.read(file.tensors[tensor.name], name), name)
        want = reference.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found.astype(np.float32), want)

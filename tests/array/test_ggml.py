"""ggml's blocks against the package `gguf`: every type, any bytes."""
import gguf
import ml_dtypes
import numpy as np
import pytest

from lazulite.engine.array import ggml

SIZES = gguf.GGML_QUANT_SIZES


def blocks(kind: str, count: int) -> np.ndarray:
    """Random bytes with scales that are numbers."""
    rng = np.random.default_rng(count)
    raw = rng.integers(0, 256, (count, SIZES[gguf.GGMLQuantizationType[kind]][1]), np.uint8)
    fields = raw.view([(name, *rest) for name, *rest in ggml.BLOCKS[kind].layout]).reshape(-1)
    for name in {"d", "m"} & set(fields.dtype.names):
        powers = fields.dtype[name] == np.uint8
        fields[name] = rng.integers(60, 140, count) if powers else rng.standard_normal(count).astype(np.float16)
    return raw


@pytest.mark.parametrize("count", [1, 5000])
@pytest.mark.parametrize("kind", ggml.BLOCKS)
def test_as_the_package_reads_it(kind: str, count: int) -> None:
    raw, block = blocks(kind, count), ggml.BLOCKS[kind]
    want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    words, scales, *biases = ggml.read(kind, raw.reshape(-1))
    stream = np.unpackbits(words.view(np.uint8), bitorder="little").reshape(len(scales), block.group, block.bits)
    codes = (stream << np.arange(block.bits)).sum(-1)
    if biases:
        found = codes * scales.astype(np.float32)[:, None] + biases[0].astype(np.float32)[:, None]
    else:
        floats = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        found = floats * scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[:, None]
    np.testing.assert_array_equal(found.astype(np.float32).reshape(want.shape), want)
    if kind in ("Q4_0", "Q4_1"):  # packed at once, never expanded
        return
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(ggml.expand(kind, raw.reshape(-1)).reshape(want.shape), want.astype(np.float16))


@pytest.mark.parametrize("blocks", [1, 8191, 8192, 20000])
def test_nibbles_of_any_number_of_blocks(blocks: int) -> None:
    raw = np.random.default_rng(blocks).integers(0, 256, (blocks, 16), np.uint8)
    want = np.concatenate([raw & 15, raw >> 4], axis=1)  # byte j holds elements j and j + 16
    words = ggml.unshuffle(raw.reshape(-1).view("V16"))
    np.testing.assert_array_equal(words.view(np.uint8).reshape(-1, 16), want[:, 0::2] | want[:, 1::2] << 4)

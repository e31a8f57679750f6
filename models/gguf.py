"""Reads a GGUF file: metadata, tensors in MLX's layout, and the Hugging Face config that they amount to.

The file is mapped. Dense tensors are views of it; quantized blocks become codes, scales and biases (w = scale·q + bias,
groups of 32) whose codes are the file's own. Nothing in the file is trusted: every count, offset and type is checked.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ..engine import array as mx
from ..engine.errors import UserError
from .safetensors import damaged

GROUP = 32
Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # codes u32, scales, biases; flat


def unshuffle(blocks: np.ndarray) -> np.ndarray:
    """16 bytes of nibbles, byte j = elements j and j + 16, to 4 words of 8 elements in order. [n] V16 -> [4n] u32"""
    words = np.empty((len(blocks), 2, 2), np.uint32)  # block, which half of its elements, which 8 of them
    steps = ((4, 0x00F000F000F000F0), (8, 0x0000FF000000FF00), (16, 0x00000000FFFF0000))
    for start in range(0, len(blocks), 8192):  # a chunk and its temporary stay in the second-level cache
        x = blocks[start : start + 8192].copy().view(np.uint64)
        for shift, mask in steps:  # swap neighbours of 4, 8 and 16 bits: even nibbles sink to the low half
            t = x >> np.uint64(shift)
            t ^= x
            t &= np.uint64(mask)
            x ^= t
            t <<= np.uint64(shift)
            x ^= t
        words[start : start + 8192] = x.view(np.uint32).reshape(-1, 2, 2).swapaxes(1, 2)
    return words.reshape(-1)


def centred(codes: np.ndarray, scales: np.ndarray, zero: int) -> Parts:
    """Biases of codes whose zero is `zero`, a power of two: exact in float16 unless it overflows, then float32."""
    biases = scales.astype(np.float32) * -zero
    wide = not np.abs(biases).max(initial=0) <= np.finfo(np.float16).max
    return codes, scales.astype(np.float32) if wide else scales, biases if wide else biases.astype(np.float16)


def q4_0(blocks: np.ndarray) -> Parts:
    return centred(unshuffle(blocks["q"]), blocks["d"].copy(), 8)


def q4_1(blocks: np.ndarray) -> Parts:
    return unshuffle(blocks["q"]), blocks["d"].copy(), blocks["m"].copy()


def q8_0(blocks: np.ndarray) -> Parts:
    codes = blocks["q"].copy().view(np.uint32)
    codes ^= np.uint32(0x80808080)  # int8 to the unsigned code q + 128
    return centred(codes, blocks["d"].copy(), 128)


class Type(NamedTuple):
    """A tensor type: `block` elements in `size` bytes; its NumPy layout and width if it is read."""

    name: str
    block: int
    size: int
    layout: Any = None
    bits: int = 0
    unpack: Callable[[np.ndarray], Parts] | None = None


SCALE, MINIMUM = ("d", "<f2"), ("m", "<f2")
READ = {
    0: Type("F32", 1, 4, "<f4"),
    1: Type("F16", 1, 2, "<f2"),
    30: Type("BF16", 1, 2, "<u2"),
    2: Type("Q4_0", 32, 18, [SCALE, ("q", "V16")], 4, q4_0),
    3: Type("Q4_1", 32, 20, [SCALE, MINIMUM, ("q", "V16")], 4, q4_1),
    8: Type("Q8_0", 32, 34, [SCALE, ("q", "V32")], 8, q8_0),
}
KNOWN = """
6 Q5_0 32 22, 7 Q5_1 32 24, 9 Q8_1 32 40, 10 Q2_K 256 84, 11 Q3_K 256 110, 12 Q4_K 256 144, 13 Q5_K 256 176,
14 Q6_K 256 210, 15 Q8_K 256 292, 16 IQ2_XXS 256 66, 17 IQ2_XS 256 74, 18 IQ3_XXS 256 98, 19 IQ1_S 256 50,
20 IQ4_NL 32 18, 21 IQ3_S 256 110, 22 IQ2_S 256 82, 23 IQ4_XS 256 136, 24 I8 1 1, 25 I16 1 2, 26 I32 1 4, 27 I64 1 8,
28 F64 1 8, 29 IQ1_M 256 56, 34 TQ1_0 256 54, 35 TQ2_0 256 66, 39 MXFP4 32 17, 40 NVFP4 64 36
"""  # code, name, block, size
TYPES = {int(c): Type(name, int(block), int(size)) for c, name, block, size in map(str.split, KNOWN.split(","))} | READ
SUPPORTED = ", ".join(kind.name for kind in READ.values())


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]  # rows first, as NumPy has it; the file says columns first
    type: Type
    offset: int  # of the file
    nbytes: int


STRING, ARRAY, DEPTH = 8, 9, 4  # DEPTH: arrays of arrays of …
CODES = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
SCALARS = {code: np.dtype(name) for code, name in CODES.items()}


class File:
    """The header of a GGUF file, checked, and the mapped bytes behind it."""

    def __init__(self, path: Path) -> None:
        self.path, self.position = Path(path), 0
        self.size = self.path.stat().st_size
        if self.size < 24:
            self.fail("size", f"{self.size} bytes", "at least 24")
        with open(path, "rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self.data[:4] != b"GGUF":
            self.fail("magic", self.data[:4], b"GGUF")
        self.position = 4
        if (version := self.number("<u4")) not in (2, 3):
            self.fail("version", version, "2 or 3")
        tensors = self.count("tensor count", 24)
        entries = self.count("metadata count", 13)
        self.metadata: dict[str, Any] = {}
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
        self.metadata[key] = self.value(self.number("<u4", key), key, 0)

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
            tensors[name] = Tensor(name, shape, kind, start + offset, nbytes)
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

    def read(self, tensor: Tensor, name: str, heads: int = 0) -> dict[str, mx.Array]:
        """One tensor under its Hugging Face name; with `heads`, its rows in two halves, not interleaved."""
        if tensor.type.layout is None:
            raise UserError(f"{self.path}: tensor {tensor.name} has type {tensor.type.name}; supported: {SUPPORTED}")
        raw = np.frombuffer(self.data, np.uint8, tensor.nbytes, tensor.offset).reshape(tensor.shape[0], -1)
        if heads:
            if tensor.shape[0] % (2 * heads):
                self.fail(f"tensor {tensor.name}, rows", tensor.shape[0], f"a multiple of {2 * heads}, twice the heads")
            raw = raw[np.arange(len(raw)).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)]
        items = raw.reshape(-1).view(tensor.type.layout)
        if tensor.type.unpack is None:
            array = mx.asarray(items.reshape(tensor.shape))
            return {name: array.view(mx.bfloat16) if tensor.type.name == "BF16" else array}
        parts = tensor.type.unpack(items)
        self.release(tensor)
        keys = (name, *(name.removesuffix("weight") + part for part in ("scales", "biases")))
        return {k: mx.asarray(part.reshape(*tensor.shape[:-1], -1)) for k, part in zip(keys, parts, strict=True)}

    def release(self, tensor: Tensor) -> None:
        """Forget the mapped pages of a tensor that was copied."""
        start = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and tensor.offset + tensor.nbytes > start:
            self.data.madvise(mmap.MADV_DONTNEED, start, tensor.offset + tensor.nbytes - start)


# -- what the metadata means -----------------------------------------------------------------------------------------

MODULES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
SIZES = {
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size", "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads", "context_length": "max_position_embeddings",
}  # fmt: skip
ARCHITECTURES = {"llama": ("llama", "LlamaForCausalLM")}  # general.architecture -> model_type, Hugging Face's class
COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # not weights: in the config


def hf_name(file: File, name: str) -> str:
    match = re.fullmatch(r"(blk\.\d+\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in MODULES:
        raise UserError(f"{file.path}: tensor {name} is not part of the architecture that the file names")
    return f"{(match[1] or '').replace('blk.', 'model.layers.')}{MODULES[match[2]]}.{match[3]}"


def parts(file: File) -> list[Callable[[], dict[str, mx.Array]]]:
    """One function for each tensor, the largest first, that returns it (or its codes, scales and biases) by name."""
    arch = file.get("general.architecture", str)
    heads = file.get(f"{arch}.attention.head_count", int)
    rotated = {"attn_q": heads, "attn_k": file.get(f"{arch}.attention.head_count_kv", int, heads)}
    tensors = sorted(file.tensors.values(), key=lambda tensor: -tensor.nbytes)
    return [
        lambda t=t: file.read(t, hf_name(file, t.name), rotated.get(t.name.split(".")[-2], 0))  # type: ignore[misc]
        for t in tensors
        if t.name not in COMPUTED
    ]


def config(file: File) -> dict[str, Any]:
    """The config.json that Hugging Face has for this model, with MLX's "quantization"."""
    arch = file.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise UserError(f"{file.path}: architecture {arch!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    sizes = {name: file.get(f"{arch}.{key}", int) for key, name in SIZES.items()}
    embed, heads = file.tensors.get("token_embd.weight"), sizes["num_attention_heads"]
    if min(sizes.values()) < 1 or embed is None:
        file.fail("model", f"{sizes}, token_embd.weight {embed}", "sizes from 1 on, and the embedding")
    rotary = file.get(f"{arch}.rope.dimension_count", int, sizes["hidden_size"] // heads)
    ids = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    return {
        "model_type": ARCHITECTURES[arch][0],
        "architectures": [ARCHITECTURES[arch][1]],
        **sizes,
        "num_key_value_heads": file.get(f"{arch}.attention.head_count_kv", int, heads),
        "head_dim": file.get(f"{arch}.attention.key_length", int, rotary),
        "vocab_size": embed.shape[0],
        "rms_norm_eps": float(str(np.float32(file.get(f"{arch}.attention.layer_norm_rms_epsilon", float)))),
        "rope_theta": file.get(f"{arch}.rope.freq_base", float, 10000.0),
        "rope_scaling": rope_scaling(file, arch),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        **{f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in ids},
        **quantization(file),
    }


def quantization(file: File) -> dict[str, Any]:
    """MLX's settings: the commonest width for all, and the path of each module that differs."""
    widths = {hf_name(file, t.name).removesuffix(".weight"): t.type.bits for t in file.tensors.values() if t.type.bits}
    if not widths:
        return {}
    common = Counter(widths.values()).most_common(1)[0][0]
    settings: dict[str, Any] = {"group_size": GROUP, "bits": common, "mode": "affine"}
    settings |= {path: settings | {"bits": bits} for path, bits in widths.items() if bits != common}
    return {"quantization": settings, "quantization_config": settings}


def rope_scaling(file: File, arch: str) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        return llama3_scaling(file, file.tensors["rope_freqs.weight"], file.get(f"{arch}.rope.freq_base", float, 1e4))
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"{file.path}: {arch}.rope.scaling.type {kind!r} is not supported; supported: linear, yarn")
    scaling = {"rope_type": kind, "factor": file.get(f"{arch}.rope.scaling.factor", float)}
    if kind == "yarn":
        original = file.get(f"{arch}.rope.scaling.original_context_length", int)
        scaling["original_max_position_embeddings"] = original
    return scaling


def llama3_scaling(file: File, tensor: Tensor, theta: float) -> dict[str, Any]:
    """Llama 3's parameters behind the table of frequency divisors that llama.cpp computes from them."""
    if tensor.type.name != "F32":
        file.fail("tensor rope_freqs.weight, type", tensor.type.name, "F32")
    found = np.frombuffer(file.data, "<f4", math.prod(tensor.shape), tensor.offset).astype(np.float64)
    factor, low, high, original = round(float(found.max()), 3), 1.0, 4.0, 8192  # the last three: every Llama 3.x
    turns = original / (2 * np.pi) * theta ** (-np.arange(len(found)) / len(found))  # of the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(1 / found, (1 - smooth) / factor + smooth, rtol=1e-3):
        file.fail("tensor rope_freqs.weight", found[[0, -1]], "the divisors of Llama 3's scaling")
    names = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return dict(zip(names, ("llama3", factor, low, high, original), strict=True))

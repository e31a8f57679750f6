"""Writes a model as one GGUF file, weight by weight, with the vocabulary and the chat template inside.

Names and keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's convert_hf_to_gguf.py.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine import array as mx
from ..engine.array import ggml_writer as ggml
from ..engine.array.files import raw
from ..engine.array.gguf import ALIGNMENT, TYPES, header
from ..engine.errors import UserError
from . import gguf, tokenizer, vocabulary
from .config import Config
from .convert import Progress, convert_part, job, left_out, new, release, weight_name
from .load import family
from .weights import Part, Weights, format_of, read
from .writer import resumable

CODES = {kind.name: code for code, kind in TYPES.items()}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}  # general.file_type, and what is written
FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # by model_type
NAMES = {theirs: ours for ours, theirs in gguf.MODULES.items()}
CHUNK = 1 << 20  # elements that are quantized at a time


@dataclass
class Row:
    """One tensor of the file: which part it is made of, its name, shape and type."""

    part: int
    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def nbytes(self) -> int:
        kind = TYPES[CODES[self.kind]]
        return math.prod(self.shape) // kind.block * kind.size

    @property
    def room(self) -> int:
        """Bytes up to the next tensor."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


def convert_gguf(
    source: str | None, dest: str | Path, kind: str | None = None, progress: Progress = lambda done, total: None
) -> Path:
    """Converts a folder, a .gguf file or a Hub id to the new file `dest`.

    `kind` is the type of matrices: F16, Q8_0, Q4_0, Q4_1, BF16, F32. Left out, weights that are quantized keep their
    codes where GGUF has the layout, and all others are F16. As llama.cpp does, norms and biases are F32, and the output
    head is Q8_0 where the rest has 4 bits. Streams and resumes as `convert` does.
    """
    if kind is not None and kind not in FILE_TYPES:
        raise UserError(f"[convert] type {kind!r} is not supported; supported: {', '.join(FILE_TYPES)}")
    dest, weights = new(dest), read(source)
    arch = ARCHITECTURES.get(str(weights.config.get("model_type")))
    if arch is None:
        what = f"{weights.path}: model_type {weights.config.get('model_type')!r} is not written as GGUF"
        raise UserError(what, f"written: {', '.join(ARCHITECTURES)}")
    config = family(weights.config["model_type"]).config_class.from_dict(weights.config)
    rows = [row for index in range(len(weights.parts)) if (row := plan(weights, index, config, kind))]
    embed = next((row.shape[0] for row in rows if row.name == "token_embd.weight"), 0)
    metadata = {**about(weights, config, arch, kind), **words(weights, embed)}
    head = beginning(rows, metadata, llama3_divisors(config))
    with resumable(dest, job(weights, {"to": "gguf", "type": kind})) as (folder, journal):
        path, written = folder / "model.gguf", len(journal.done)
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(head)
            file.seek(sum(row.room for row in rows[:written]), 1)
            for done, row in enumerate(rows[written:], written):
                progress(done, len(rows))
                part = weights.parts[row.part]()
                for chunk in data(part, row, weights, config, arch):
                    file.write(chunk)
                file.write(bytes(row.room - row.nbytes))
                file.flush()
                journal.add({"tensor": row.name})
                release(part)
        progress(len(rows), len(rows))
    return dest


def beginning(rows: list[Row], metadata: dict[str, Any], divisors: np.ndarray | None) -> bytes:
    """The header, and the data of a first tensor that is computed and no weight."""
    infos = [(row.name, row.shape, CODES[row.kind], row.nbytes) for row in rows]
    values = {key: typed(value) for key, value in metadata.items()}
    if divisors is None:
        return header(infos, values)
    first, data = ("rope_freqs.weight", divisors.shape, CODES["F32"], divisors.nbytes), divisors.tobytes()
    return header([first, *infos], values) + data + bytes(-len(data) % ALIGNMENT)


def typed(value: Any) -> Any:
    """Whole numbers as uint32, which llama.cpp wants, and others as float32."""
    return np.uint32(value) if type(value) is int else np.float32(value) if type(value) is float else value


def plan(weights: Weights, index: int, config: Config, kind: str | None) -> Row | None:
    """What becomes of a part; None: it is not written."""
    part = weights.parts[index]()
    name = weight_name(part)
    if left_out(name, weights):
        return None
    match = re.fullmatch(r"(model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if match is None or (module := NAMES.get(match[3])) is None:
        raise UserError(f"{weights.path}: tensor {name} has no name in GGUF", f"named: {', '.join(NAMES)}")
    shape, same = stored(part, weights)
    head = module == "output" or (module == "token_embd" and config.tie_word_embeddings)
    if len(shape) < 2:
        chosen = "F32"
    elif kind in (None, same):
        chosen = same or "F16"
    else:
        chosen = "Q8_0" if head and kind in ("Q4_0", "Q4_1") else str(kind)
    if chosen in ggml.LAYOUTS and shape[-1] % ggml.BLOCK:
        chosen = "F16"
    release(part)
    return Row(index, f"{f'blk.{match[2]}.' if match[1] else ''}{module}.{match[4]}", shape, chosen)


def stored(part: Part, weights: Weights) -> tuple[tuple[int, ...], str | None]:
    """The shape of a weight, and the type whose blocks can hold its codes as they are."""
    name = weight_name(part)
    path = name.removesuffix(".weight")
    if f"{path}.scales" not in part:
        return part[name].shape, None
    group, bits, mode = format_of(path, part, weights.config.get("quantization"))
    shape = (*part[name].shape[:-1], part[f"{path}.scales"].shape[-1] * group)
    fits = mode == "affine" and group % ggml.BLOCK == 0 and f"{path}.order" not in part
    return shape, ggml.same_codes(bits, *arrays(part)[1:]) if fits else None


def arrays(part: Part) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes as words, scales and biases as float32."""
    path = weight_name(part).removesuffix(".weight")
    scales, biases = (np.asarray(part[f"{path}.{leaf}"].astype(mx.float32)) for leaf in ("scales", "biases"))
    return np.asarray(part[f"{path}.weight"]), scales, biases


def data(part: Part, row: Row, weights: Weights, config: Config, arch: str) -> Iterator[bytes]:
    """The bytes of a tensor, in pieces."""
    order = interleaved(row, config) if arch in gguf.INTERLEAVED else None
    if row.kind in ggml.LAYOUTS and stored(part, weights)[1] == row.kind:
        parts = [x if order is None else x[order] for x in arrays(part)]
        yield ggml.keep(row.kind, *parts).tobytes()
        return
    settings = weights.config.get("quantization")
    (array,) = convert_part(part, settings, None, FLOATS.get(row.kind, mx.float32), True)[0].values()
    if order is not None:
        array = mx.take(array, mx.array(order.astype(np.int32)), axis=0)
    if row.kind in FLOATS:
        if row.kind == "F16" and not bool(mx.all(mx.isfinite(array))):
            raise UserError(f"[convert] {row.name} has numbers beyond float16", "take --type BF16 or F32")
        yield bytes(raw(array))
        return
    flat = np.asarray(array).reshape(-1)
    for start in range(0, flat.size, CHUNK):
        yield ggml.encode(row.kind, flat[start : start + CHUNK]).tobytes()


def interleaved(row: Row, config: Config) -> np.ndarray | None:
    """llama.cpp's order of the rows of q and k: the two halves of each head take turns."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(row.name.split(".")[-2])
    return None if heads is None else np.arange(row.shape[0]).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def about(weights: Weights, config: Config, arch: str, kind: str | None) -> dict[str, Any]:
    """The metadata of the model."""
    scaling = config.rope_parameters
    found: dict[str, Any] = {
        **{key: getattr(config, name) for key, name in gguf.SIZES.items()},
        **dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), config.head_dim),
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(scaling["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if (method := scaling.get("rope_type", "default")) in ("linear", "yarn"):
        found |= {"rope.scaling.type": method, "rope.scaling.factor": float(scaling["factor"])}
    if method == "yarn":
        original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
        found["rope.scaling.original_context_length"] = original
    if method not in ("default", "linear", "yarn", "llama3"):
        raise UserError(f"{weights.path}: rope_type {method!r} has no name in GGUF that is read")
    return {
        "general.architecture": arch,
        "general.name": weights.path.stem,
        "general.file_type": FILE_TYPES[kind or "F16"],
        "general.quantization_version": 2,
        **{f"{arch}.{key}": value for key, value in found.items()},
    }


def llama3_divisors(config: Config) -> np.ndarray | None:
    """By what llama.cpp divides the rotary frequencies under Llama 3's scaling."""
    p = config.rope_parameters
    if p.get("rope_type") != "llama3":
        return None
    low, high, original = p["low_freq_factor"], p["high_freq_factor"], p["original_max_position_embeddings"]
    half = config.head_dim // 2
    turns = original / (2 * np.pi) * p["rope_theta"] ** (-np.arange(half) / half)  # of the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / p["factor"] + smooth)).astype(np.float32)


# -- The vocabulary --------------------------------------------------------------------------------------------------

PROBE = (  # what splits of text differ in
    "I'm WE'LL don'T naïveÉcole straße; 1 22 4444 x12 ½² 3.14 --- `a|b` <<=>> $5^2~ ...\n\n"
    "  \t if (x) {\r\n    y++; }  end \n"
    "日本語とカナ、中文。한국어 हिन्दी ไทย العربية 👩‍👧 🇫🇷 e\u0301 \u00a0\u3000 "
    "http://a.b/c?d=e#f__g CamelCaseHTML"
)


def words(weights: Weights, rows: int) -> dict[str, Any]:
    """The metadata of the tokenizer, for an embedding of so many rows; it is read back and tried on a text."""
    tokens = weights.tokenizer()
    state = json.loads(tokens.backend.to_str())["model"]
    if state["type"] != "BPE" or tokens.vocab_size > rows:
        what = f"{weights.path}: a vocabulary of type {state['type']} with {tokens.vocab_size} tokens, {rows} rows"
        raise UserError(what, "GGUF files are written with BPE, and a row of the embedding for every token")
    names = [tokens.backend.id_to_token(i) for i in range(rows)]
    values = {
        "tokens": [f"[PAD{i}]" if name is None else name for i, name in enumerate(names)],
        "token_type": np.array([token_kind(tokens, i, name, state) for i, name in enumerate(names)], np.int32),
        **(byte_level(tokens, state) if tokens.byte_level else sentence_piece(tokens, state, names)),
        **special(tokens),
    }
    found = {f"tokenizer.ggml.{key}": value for key, value in values.items()} | templates(tokens)
    again = tokenizer.from_gguf(found, weights.path)
    if again.encode(PROBE) != tokens.encode(PROBE):
        raise UserError(f"{weights.path}: the tokenizer splits text in a way that has no name in GGUF")
    return found


def token_kind(tokens: Any, id: int, name: str | None, state: dict[str, Any]) -> int:
    if added := tokens.added.get(id):
        return vocabulary.CONTROL if added.special else vocabulary.USER_DEFINED
    if name is None:
        return vocabulary.UNUSED
    if not tokens.byte_level and re.fullmatch("<0x[0-9A-F]{2}>", name):
        return vocabulary.BYTE
    return vocabulary.UNKNOWN if name == state.get("unk_token") and not tokens.byte_level else vocabulary.NORMAL


def byte_level(tokens: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The name of the split that cuts a text as this tokenizer does."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["merges"]]
    want = tokens.backend.pre_tokenizer.pre_tokenize_str(PROBE)
    for split, names in vocabulary.SPLITS.items():
        cuts = vocabulary.byte_level((), (), split).pre_tokenizer.pre_tokenize_str(PROBE)
        if cuts == want and split.ignore_merges == bool(state.get("ignore_merges")):
            return {"model": "gpt2", "pre": names.split()[0], "merges": merges}
    return {"model": "gpt2", "pre": "default", "merges": merges}  # which `words` then finds to be another


def sentence_piece(tokens: Any, state: dict[str, Any], names: list[str | None]) -> dict[str, Any]:
    """Scores that put the merges in the order in which the tokenizer has them."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(state["merges"]):
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), i)
    scores = np.array([-rank[name] if name in rank else -len(rank) for name in map(str, names)], np.float32)
    prefix = tokens.backend.encode("a", add_special_tokens=False).tokens[0].startswith("▁")
    return {"model": "llama", "scores": scores, "add_space_prefix": prefix}


def special(tokens: Any) -> dict[str, Any]:
    """The ids of special tokens, and which of them begin and end a text."""
    ids = {name: tokens.backend.token_to_id(text) for name, text in tokens.special_tokens.items()}
    named = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    found: dict[str, Any] = {f"{key}_token_id": i for key, name in named.items() if (i := ids.get(name)) is not None}
    if ends := sorted(tokens.eos_token_ids - {ids.get("eos_token")}):
        found |= dict(zip(("eot_token_id", "eom_token_id"), ends, strict=False))
    empty = tokens.encode("")
    known = {key: ids.get(f"{key}_token") for key in ("bos", "eos")}
    return found | {f"add_{key}_token": bool(empty) and i is not None and i in empty for key, i in known.items()}


def templates(tokens: Any) -> dict[str, Any]:
    named = tokens.template if isinstance(tokens.template, dict) else {"default": tokens.template}
    keys = {name: "tokenizer.chat_template" + ("" if name == "default" else f".{name}") for name in named}
    return {keys[name]: text for name, text in named.items() if isinstance(text, str)}

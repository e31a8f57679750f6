"""Damaged files of every kind: each loads or is refused with a UserError, in a second, in memory of the file's size.

A case is a seed: it picks a kind of file, damages the structure of a good one (fields, types, counts, offsets, shapes,
JSON values) and sometimes its bytes. LAZULITE_FUZZ=200000 sets the number of cases.
"""

import copy
import itertools
import json
import os
import random
import resource
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lazulite.engine.errors import UserError
from lazulite.models import load

CASES = int(os.environ.get("LAZULITE_FUZZ", 2000))
BATCH = 40  # cases of neighbouring seeds: hypothesis takes longer than a case
ROOM = 4 << 20  # bytes that opening takes beside the files themselves
CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 48,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "eos_token_id": [1, 2],
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "layer_types": ["full_attention"], "torch_dtype": "float32", "quantization": None,
}  # fmt: skip
FAMILIES = ("qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite",
            "cohere2", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "gpt2", "qwen3_5", "klingon")  # fmt: skip
LAYER = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
         "self_attn.o_proj": (32, 32), "mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64),
         "input_layernorm": (32,), "post_attention_layernorm": (32,)}  # fmt: skip
TENSORS = {"model.embed_tokens.weight": (48, 32), "model.norm.weight": (32,)}
TENSORS |= {f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()}
WORDS = [chr(c) for c in range(33, 78)] + ["ab", "<s>", "</s>"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
TOKENIZER_CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE,
                    "added_tokens_decoder": {"46": {"content": "<s>", "special": True}}}  # fmt: skip
ODD = (None, True, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.5, 1e308, float("inf"),
       float("nan"), "", "x", "💥" * 50, "\x00", "<s>", [], [[]], [None], [1, "a"], {}, {"a": 1}, {"__float__": "x"},
       "a" * 5000)  # fmt: skip


# -- How structures are damaged --------------------------------------------------------------------------------------


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths to every value in a JSON structure."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in inner for place in places(item, (*path, key))]


def odd(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(ODD))


def damage_json(value: Any, rng: random.Random, names: tuple = ()) -> Any:
    """Replaces, removes or adds a value somewhere."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not (found := places(value)):
            return odd(rng)
        *way, key = rng.choice(found)
        holder = value
        for step in way:
            holder = holder[step]
        how = rng.randrange(8)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            name = rng.choice([*map(str, names), *map(str, ODD), *holder])
            holder[name] = odd(rng) if rng.random() < 0.9 else holder[key]
        elif how == 2 and isinstance(holder[key], str) and names:
            holder[key] = rng.choice(names)
        elif how == 3 and type(holder[key]) is int:
            holder[key] = holder[key] + rng.choice((-1, 1, 7, 2**32, -(2**33)))
        else:
            holder[key] = odd(rng)
    return value


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, doubles or inserts bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out) + 1) if rng.random() < 0.5 else rng.randrange(min(len(out), 64) + 1)
        how = rng.randrange(5)
        if how == 0:
            del out[at:]
        elif how == 1:
            del out[at : at + rng.randrange(1, 16)]
        elif how == 2:
            out[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif how == 3:
            out[at : at + 8] = rng.choice((b"\xff" * 8, bytes(8), struct.pack("<Q", 1 << rng.randrange(64))))
        elif at < len(out):
            out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def text_of(value: Any, rng: random.Random) -> bytes:
    data = json.dumps(value).encode()
    return damage_bytes(data, rng) if rng.random() < 0.15 else data


# -- Good files ------------------------------------------------------------------------------------------------------


def weights() -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in TENSORS.items()}


def quantized() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Weights of an MLX folder: 4 bits in groups of 32, one matrix of 8 bits, one of mxfp4."""
    tensors, settings = {}, {"group_size": 32, "bits": 4, "mode": "affine"}
    for name, shape in TENSORS.items():
        path, bits = name.removesuffix(".weight"), {"o_proj": 8}.get(name.split(".")[-2], 4)
        if len(shape) < 2:
            tensors[name] = np.zeros(shape, np.float16)
            continue
        tensors[name] = np.zeros((shape[0], shape[1] * bits // 32), np.uint32)
        if "up_proj" in name:
            tensors[f"{path}.scales"] = np.full((shape[0], shape[1] // 32), 127, np.uint8)
            settings[path] = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
            continue
        tensors |= {f"{path}.{x}": np.zeros((shape[0], shape[1] // 32), np.float16) for x in ("scales", "biases")}
        if bits == 8:
            settings[path] = {"group_size": 32, "bits": 8}
    return tensors, settings


def backend() -> Any:
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, [("a", "b")] if "a" in WORDS else []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    return json.loads(made.to_str())


def pieces(folder: Path) -> bytes:
    prefix = str(folder / "spm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc abd bcd", "hello world", "aaa bbb"]), model_prefix=prefix, vocab_size=48,
        model_type="bpe", hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    return Path(f"{prefix}.model").read_bytes()


GGUF_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
              "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
              "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
              "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34), 12: (256, 144), 39: (32, 17)}  # by type
U32, F32, STRING, ARRAY = 4, 6, 8, 9
PACK = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def gguf_entries() -> list[list[Any]]:
    """[key, type, value]; an array is (type of its items, items)."""
    arch = {"embedding_length": 32, "feed_forward_length": 64, "block_count": 1, "attention.head_count": 2,
            "attention.head_count_kv": 1, "context_length": 64, "rope.dimension_count": 16}  # fmt: skip
    words = {"bos_token_id": 46, "eos_token_id": 47, "unknown_token_id": 0}
    return [
        ["general.architecture", STRING, "llama"],
        *([f"llama.{key}", U32, value] for key, value in arch.items()),
        ["llama.attention.layer_norm_rms_epsilon", F32, 1e-5],
        ["llama.rope.scaling.type", STRING, "yarn"],
        ["llama.rope.scaling.factor", F32, 2.0],
        ["llama.rope.scaling.original_context_length", U32, 16],
        ["tokenizer.ggml.model", STRING, "llama"],
        ["tokenizer.ggml.tokens", ARRAY, (STRING, WORDS)],
        ["tokenizer.ggml.scores", ARRAY, (F32, [0.0] * 48)],
        ["tokenizer.ggml.token_type", ARRAY, (5, [1] * 46 + [3, 3])],
        ["tokenizer.ggml.merges", ARRAY, (STRING, ["A B"])],
        *([f"tokenizer.ggml.{key}", U32, value] for key, value in words.items()),
        ["tokenizer.chat_template", STRING, TEMPLATE],
    ]


def gguf_value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        data = str(value).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(data)) + data
    if kind == ARRAY:
        item, items = value if isinstance(value, tuple) else (U32, [])
        return struct.pack("<IQ", item, len(items)) + b"".join(gguf_value(item, x) for x in items)
    try:
        return struct.pack(PACK.get(kind, "<I"), value)
    except (struct.error, TypeError, OverflowError):
        return struct.pack("<Q", 2**63)[: struct.calcsize(PACK.get(kind, "<I"))]


def gguf_bytes(rng: random.Random) -> bytes:
    entries, infos, data, offset = gguf_entries(), [], b"", 0
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        damage_entry(entries, rng)
    for name, shape in TENSORS.items():
        path = name.removesuffix(".weight").removeprefix("model.layers.0.")
        kind = rng.choice((0, 0, 2, 8, 39)) if len(shape) > 1 else 0
        block, size = SIZES[kind]
        nbytes = int(np.prod(shape)) // block * size
        blk = "blk.0." if "layers" in name else ""
        infos.append([f"{blk}{GGUF_NAMES[path]}.weight", list(shape[::-1]), kind, offset])
        offset += -(-nbytes // 32) * 32
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        damage_info(rng.choice(infos), infos, rng)
    data = bytes(offset)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(infos), len(entries))
    for key, kind, value in entries:
        head += gguf_value(STRING, key) + struct.pack("<I", kind) + gguf_value(kind, value)
    for name, shape, kind, start in infos:
        numbers = [len(shape), *(size & (2**64 - 1) for size in shape), kind, start & (2**64 - 1)]
        head += gguf_value(STRING, name) + struct.pack(f"<I{len(shape)}QIQ", *numbers)
    head += bytes(-len(head) % 32)
    return damage_bytes(head, rng) + data if rng.random() < 0.3 else head + data[: rng.choice((None, -1, -500, 0))]


def damage_entry(entries: list[list[Any]], rng: random.Random) -> None:
    entry, how = rng.choice(entries), rng.randrange(7)
    if how == 0:
        entries.remove(entry)
    elif how == 1:
        entries.append(rng.choice(entries)[:])
    elif how == 2:
        entry[1:] = rng.choice([[STRING, "gpt2"], [STRING, "qwen3"], [STRING, "linear"], [U32, 0], [U32, 2**32 - 1],
                                [F32, float("nan")], [F32, -1.0], [ARRAY, (STRING, [])], [ARRAY, (F32, [1.0, 2.0])],
                                [ARRAY, (ARRAY, [(U32, [1])])], [99, 0], [7, True], [12, 1e300]])  # fmt: skip
    elif how == 3:
        entry[1] = rng.randrange(14)
    elif entry[1] == ARRAY and isinstance(entry[2], tuple) and entry[2][1]:
        kind, items = entry[2]
        items = items[:]
        choices = ODD if kind == STRING else (-1, 0, 2**31, 3, 4, 6, 1e30)
        items[rng.randrange(len(items))] = rng.choice((*items, *choices))
        entry[2] = (kind, items if rng.random() < 0.7 else items[: rng.randrange(len(items))])
    else:
        entry[2] = rng.choice(ODD)
        entry[1] = entry[1] if isinstance(entry[2], int | float) and entry[1] != ARRAY else STRING


def damage_info(info: list[Any], infos: list[list[Any]], rng: random.Random) -> None:
    how = rng.randrange(6)
    if how == 0:
        infos.remove(info)
    elif how == 1:
        info[0] = rng.choice(("output.weight", "blk.7.attn_q.weight", "blk.0.attn_q.bias", "", "x" * 3000, infos[0][0],
                              "rope_freqs.weight", "blk.0.attn_q_norm.weight"))  # fmt: skip
    elif how == 2:
        info[2] = rng.choice((*SIZES, 9, 16, 24, 27, 28, 30, 35, 40, 77, 2**31))
    elif how == 3:
        info[3] += rng.choice((1, 32, -32, 2**40, 2**63))
    else:
        at = rng.randrange(len(info[1]) + 1)
        info[1][at : at + 1] = rng.choice(([0], [1], [7], [2**62], [2**63, 2], [32, 32], [1, 1, 1, 1, 1], []))


# -- Kinds of cases: each writes a folder or a file and returns its path ---------------------------------------------


class Good:
    """The bytes of good files, made once."""

    def __init__(self, folder: Path) -> None:
        self.backend, self.pieces = backend(), pieces(folder)
        tensors, self.quantization = quantized()
        self.plain, self.mlx = save(weights()), save(tensors)


def write(folder: Path, **files: bytes) -> Path:
    folder.mkdir()
    names = {"tokenizer": "tokenizer.json", "spm": "tokenizer.model", "tensors": "model.safetensors"}
    for name, data in files.items():
        (folder / names.get(name, f"{name}.json")).write_bytes(data)
    return folder


def case_gguf(folder: Path, good: Good, rng: random.Random) -> Path:
    folder.mkdir()
    (folder / "m.gguf").write_bytes(gguf_bytes(rng))
    return folder / "m.gguf"


def case_config(folder: Path, good: Good, rng: random.Random) -> Path:
    config = damage_json(CONFIG | {"model_type": rng.choice(("llama", rng.choice(FAMILIES)))}, rng, FAMILIES)
    generation = damage_json({"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.7}, rng)
    return write(folder, config=text_of(config, rng), generation_config=text_of(generation, rng),
                 tokenizer=json.dumps(good.backend).encode(), tensors=good.plain)  # fmt: skip


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    names = ("BF16", "F16", "U8", "F64", "I32", "U32", "F8_E4M3", "BOOL", "C64", *TENSORS)
    header = text_of(damage_json(json.loads(data[8 : 8 + length]), rng, names), rng)
    stated = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**63, len(data), 100 << 20))
    return stated.to_bytes(8, "little") + header + data[8 + length :][: rng.choice((None, None, None, -1, 0))]


def case_safetensors(folder: Path, good: Good, rng: random.Random) -> Path:
    return write(folder, config=json.dumps(CONFIG).encode(), tokenizer=json.dumps(good.backend).encode(),
                 tensors=damage_safetensors(good.plain, rng))  # fmt: skip


def case_index(folder: Path, good: Good, rng: random.Random) -> Path:
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(TENSORS, "model.safetensors")}
    damaged = damage_json(index, rng, ("../../etc/passwd", "/dev/zero", "config.json", "x.safetensors"))
    write(folder, config=json.dumps(CONFIG).encode(), tensors=good.plain)
    (folder / "model.safetensors.index.json").write_bytes(text_of(damaged, rng))
    return folder


def case_mlx(folder: Path, good: Good, rng: random.Random) -> Path:
    key = rng.choice(("quantization", "quantization_config"))
    names = ("mxfp4", "nvfp4", "mxfp8", "affine", "gptq", "awq", "fp8", "compressed-tensors", "quant_method")
    settings = damage_json(good.quantization, rng, names)
    tensors = damage_safetensors(good.mlx, rng) if rng.random() < 0.5 else good.mlx
    return write(folder, config=text_of(CONFIG | {key: settings}, rng), tensors=tensors,
                 tokenizer=json.dumps(good.backend).encode())  # fmt: skip


def case_tokenizer(folder: Path, good: Good, rng: random.Random) -> Path:
    kinds = ("BPE", "Unigram", "WordPiece", "WordLevel", "ByteLevel", "Metaspace", "Sequence", "Split", "Strip")
    found = damage_json(good.backend, rng, kinds)
    config = damage_json(TOKENIZER_CONFIG, rng) if rng.random() < 0.5 else TOKENIZER_CONFIG
    return write(folder, config=json.dumps(CONFIG).encode(), tensors=good.plain, tokenizer=text_of(found, rng),
                 tokenizer_config=text_of(config, rng))  # fmt: skip


def case_sentencepiece(folder: Path, good: Good, rng: random.Random) -> Path:
    config = damage_json(TOKENIZER_CONFIG, rng)
    return write(folder, config=json.dumps(CONFIG).encode(), tensors=good.plain, spm=damage_bytes(good.pieces, rng),
                 tokenizer_config=text_of(config, rng))  # fmt: skip


KINDS: list[Callable[[Path, Good, random.Random], Path]] = [
    case_gguf, case_gguf, case_config, case_safetensors, case_index, case_mlx, case_tokenizer, case_sentencepiece,
]  # fmt: skip


def use(path: Path) -> None:
    """What `llm generate` does with a model before it computes."""
    _, tokens = load(path)
    ids = tokens.encode("Hello, world")
    tokens.decode(ids)
    if tokens.template:
        tokens.apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    made = Good(tmp_path_factory.mktemp("good"))
    folder = tmp_path_factory.mktemp("sound")
    files = {"config": json.dumps(CONFIG).encode(), "tokenizer": json.dumps(made.backend).encode()}
    use(write(folder / "plain", tensors=made.plain, **files))
    quantized_config = json.dumps(CONFIG | {"quantization": made.quantization}).encode()
    use(write(folder / "mlx", tensors=made.mlx, spm=made.pieces, config=quantized_config))
    return made


NUMBERS = itertools.count()
SLOWEST: list[tuple[float, int]] = [(0.0, 0)]


def run(good: Good, root: Path, seed: int) -> bool:
    """One case; whether it loaded."""
    rng = random.Random(seed)
    folder = root / str(next(NUMBERS))
    path = rng.choice(KINDS)(folder, good, rng)
    files = [path] if path.is_file() else list(path.iterdir())
    room = ROOM + sum(file.stat().st_size for file in files)
    tracemalloc.reset_peak()
    before, begin = tracemalloc.get_traced_memory()[0], time.process_time()
    try:
        use(path)
        loaded = True
    except UserError as error:
        loaded = False
        assert 10 < len(str(error)) < 1500, str(error)[:3000]
    seconds, taken = time.process_time() - begin, tracemalloc.get_traced_memory()[1] - before
    SLOWEST[0] = max(SLOWEST[0], (seconds, seed))
    assert seconds < 1 and taken < room, (seconds, taken, room)
    shutil.rmtree(folder)
    return loaded


def test_damaged_models_are_refused_clearly(good: Good, tmp_path: Path) -> None:
    counts = {True: 0, False: 0}
    tracemalloc.start()

    @settings(max_examples=CASES // BATCH, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(seed=st.integers(0, 2**62))
    def cases(seed: int) -> None:
        for i in range(BATCH):
            counts[run(good, tmp_path, seed + i)] += 1

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        cases()
    finally:
        tracemalloc.stop()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(f"{sum(counts.values())} cases, {counts[False]} refused, slowest {SLOWEST[0][0]:.2f} s, memory +{grown:,}")
    assert sum(counts.values()) >= CASES * 0.9 and counts[False] > counts[True] > 0
    assert grown < 300e6  # what tracemalloc does not see: the tokenizers library and ours


def test_layers_that_no_file_holds_are_not_made(good: Good, tmp_path: Path) -> None:
    """Found by seed: a file without tensors and a config with 100,000 layers."""
    config = json.dumps(CONFIG | {"num_hidden_layers": 100_000, "layer_types": []}).encode()
    with pytest.raises(UserError, match="num_hidden_layers is 100000, the files hold at most 64"):
        load(write(tmp_path / "m", config=config, tensors=(20_000).to_bytes(8, "little") + b"{}".ljust(20_000)))


@pytest.mark.parametrize("seed", [1051961, 2020923])
def test_a_template_is_text(good: Good, tmp_path: Path, seed: int) -> None:
    """Found by seed: a GGUF whose chat template is an array of numbers."""
    tracemalloc.start()
    try:
        assert run(good, tmp_path, seed) is False
    finally:
        tracemalloc.stop()

"""A tiny random model with the default one's tokenizer and template, and servers as people start them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "generate")]

from lazulite.engine.generate import Scheduler  # noqa: E402
from lazulite.models import load, read  # noqa: E402
from lazulite.server.service import Service  # noqa: E402

CONTEXT = 512
CONFIG = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "torch_dtype": "float32",
}  # fmt: skip
REFUSES = "{% if 'exception' in messages[0].content %}{{ raise_exception('No exceptions here') }}{% endif %}"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face folder named `tiny`."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    tokenizer = read().tokenizer()
    tokenizer.template = REFUSES + tokenizer.template
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng, width, inner = np.random.default_rng(0), CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (CONFIG["vocab_size"], width), "norm": (width,)}
    for i in range(CONFIG["num_hidden_layers"]):
        attention = {"q_proj": (width, width), "k_proj": (16, width), "v_proj": (16, width), "o_proj": (width, width)}
        shapes |= {f"layers.{i}.self_attn.{name}": shape for name, shape in attention.items()}
        shapes |= {f"layers.{i}.mlp.{name}": (inner, width) for name in ("gate_proj", "up_proj")}
        shapes |= {f"layers.{i}.mlp.down_proj": (width, inner)}
        shapes |= {f"layers.{i}.{name}": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    weights = {f"model.{name}.weight": 0.4 * rng.standard_normal(shape) for name, shape in shapes.items()}
    save_file({name: w.astype(np.float32) for name, w in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def service(folder: Path) -> Iterator[Service]:
    """The tiny model without a socket."""
    model, tokenizer = load(folder)
    scheduler = Scheduler(model)
    yield Service(model, tokenizer, scheduler, ["tiny", "alias"])
    scheduler.close()


class Process:
    """`llm serve` on a free port."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "lazulite.cli", "serve", "--port", "0", *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stderr=pipe, text=True, env={**os.environ, **environment})
        assert self.process.stderr
        line = self.process.stderr.readline()
        assert "serving" in line, line + self.process.stderr.read()
        self.url = line.split(" at ")[1].split("/v1")[0]
        self.port = int(self.url.rsplit(":", 1)[1])

    def rss(self) -> int:
        """Bytes of memory that it holds now."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Process]:
    process = Process(*arguments, **environment)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.stop()


@pytest.fixture(scope="session")
def default() -> Iterator[Process]:
    """The default model behind HTTP, shared by all tests of a session."""
    with serving() as process:
        yield process


@pytest.fixture(scope="session")
def start(folder: Path) -> Callable[..., Any]:
    """Starts `llm serve` on the tiny model: a context manager."""
    return lambda *arguments, **environment: serving("-m", str(folder), *arguments, **environment)

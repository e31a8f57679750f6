"""Tiny models in our format and in transformers', with the same random weights, and rows to learn from."""
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lazulite.engine import array as mx
from lazulite.lora import data
from lazulite.models import build, read

TINY = dict(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=False,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # smollm2.py
Letters = runpy.run_path(str(Path(__file__).with_name("letters.py")))["Letters"]


class Pairs:
    """Makes a folder of a random transformers model, and reads it into both libraries."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, model_type: str = "llama", **config) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TINY, **config}))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)  # norms and biases that are not all alike
        folder = self.folder / f"{model_type}{len(list(self.folder.iterdir()))}"
        model.save_pretrained(folder)
        return folder

    @staticmethod
    def ours(folder: Path):
        return build(read(folder))

    @staticmethod
    def theirs(folder: Path):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    (folder := tmp_path / "models").mkdir()
    return Pairs(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The folder of a tiny llama."""
    return Pairs(tmp_path_factory.mktemp("tiny")).save()


@pytest.fixture
def letters():
    return Letters()


@pytest.fixture
def rows() -> list[data.Row]:
    """Twelve rows of 5 to 40 random tokens, the first third of each a prompt."""
    rng, found = np.random.default_rng(0), []
    for number in range(12):
        ids = rng.integers(3, 256, rng.integers(6, 41)).astype(np.int32)
        learnt = np.arange(1, len(ids)) >= len(ids) // 3
        found.append(data.Row(f"row {number}", ids[:-1], np.where(learnt, ids[1:], data.IGNORED).astype(np.int32)))
    return found


@pytest.fixture(autouse=True)
def seeded() -> None:
    mx.random.seed(0)

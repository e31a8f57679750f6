"""What is on the disk of a model: its config, its tensors, its tokenizer, whatever the format."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..engine import array as mx
from ..engine.errors import UserError
from . import gguf, hub, safetensors

Part = dict[str, mx.Array]  # a tensor, or the codes, scales and biases of a quantized one, by name


@dataclass
class Weights:
    """A model's files, mapped. `config` and `generation_config` are Hugging Face's; names are Hugging Face's."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    parts: list[Callable[[], Part]] = field(repr=False)  # each yields one weight, so that a converter can stream
    nbytes: int  # of the weight files
    tokenizer: Callable[[], Any] = field(repr=False)  # reads the Tokenizer

    @cached_property
    def tensors(self) -> Part:
        """All tensors by name: views of the map where the file's layout is ours."""
        return {name: array for part in self.parts for name, array in part().items()}


def read(path_or_id: str | os.PathLike[str] | None = None) -> Weights:
    """The files of a folder, a .gguf file or a Hub id (fetched if need be); None is the default model."""
    path = hub.resolve(path_or_id)
    return read_folder(path) if path.is_dir() else read_gguf(path)


def read_folder(folder: Path) -> Weights:
    """A Hugging Face or MLX folder: config.json, model*.safetensors, tokenizer.json."""
    from . import tokenizer

    if not (folder / "config.json").is_file():
        hint = "A model folder has config.json, model*.safetensors and tokenizer.json."
        raise UserError(f"{folder}: no config.json", hint)
    config, generation = (tokenizer.read_json(folder / f"{name}.json") for name in ("config", "generation_config"))
    files = safetensors.find(folder)
    groups: dict[str, Part] = {}
    for file in files:
        for name, array in safetensors.read(file).items():
            path, _, leaf = name.rpartition(".")
            group = groups.setdefault(path if leaf in ("weight", "scales", "biases") else name, {})
            if name in group:
                raise UserError(f"{file}: tensor {name} is in another file of {folder} too")
            group[name] = array
    return Weights(
        folder,
        config,
        generation,
        [lambda group=group: group for group in groups.values()],  # type: ignore[misc]
        sum(file.stat().st_size for file in files),
        lambda: tokenizer.from_folder(folder),
    )


def read_gguf(path: Path) -> Weights:
    """A GGUF file, with the config, tokenizer and chat template inside it."""
    from . import tokenizer

    file = gguf.File(path)
    config = gguf.config(file)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return Weights(
        path, config, generation, gguf.parts(file), file.size, lambda: tokenizer.from_gguf(file.metadata, path)
    )

"""The one file from which training goes on: weights, moments, random key and numbers, replaced whole or not at all."""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..engine import array as mx
from ..engine.errors import UserError
from .trainer import Trainer, slots

FILE = "state.safetensors"
VERSION = "lazulite.lora.1"


@dataclass
class Progress:
    """Where training stands, beside the arrays. `position`: rows that were learnt. `best`: of the validations."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    supervised: int = 0
    skipped: int = 0
    best: float | None = None
    best_step: int = 0
    waited: int = 0                    # validations since the best
    seconds: float = 0.0
    sizes: list[int] = field(default_factory=list)         # of the steps' plans
    before: list[str] = field(default_factory=list)        # the samples' answers before training
    settings: dict[str, Any] = field(default_factory=dict)
    rows: str = ""                     # digest of the training rows
    base: dict[str, str] = field(default_factory=dict)


def containers(trainer: Trainer) -> dict[str, Any]:
    return {"leaf": trainer.leaves, "optimizer": trainer.optimizer.state, "random": mx.random.state}


def save(folder: Path, trainer: Trainer, progress: Progress) -> None:
    """Writes the state beside the old one and renames it. OSError, of a full disk too, leaves the old one."""
    arrays = {f"{name}.{number}": tree[key] for name, container in containers(trainer).items()
              for number, (tree, key) in enumerate(slots(container))}
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / FILE), arrays, {"format": VERSION, "progress": json.dumps(asdict(progress)),
                                                     "leaves": json.dumps(trainer.leaves.paths)})


def read(folder: Path) -> Progress:
    """The numbers of a saved state. UserError if there is none, or it is no state."""
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"{folder}: no {FILE} to go on from", "leave out --resume to begin")
    _, metadata = mx.load(str(file), return_metadata=True)
    if metadata.get("format") != VERSION:
        raise UserError(f"{file}: format is {metadata.get('format')!r}, wanted {VERSION}", "it is of another version")
    return Progress(**json.loads(metadata["progress"]))


def tidy(folder: Path) -> None:
    """Removes the halves of files that a killed run was writing."""
    for file in folder.rglob("*.partial-*"):
        file.unlink()


def restore(folder: Path, trainer: Trainer) -> None:
    """Puts the saved arrays into a trainer that was made with the same settings."""
    arrays, metadata = mx.load(str(folder / FILE), return_metadata=True)
    places = {f"{name}.{number}": place for name, container in containers(trainer).items()
              for number, place in enumerate(slots(container))}
    if json.loads(metadata["leaves"]) != trainer.leaves.paths or places.keys() != arrays.keys():
        raise UserError(f"{folder / FILE}: holds other arrays than this model trains", "resume with the same model")
    for name, (tree, key) in places.items():
        if tree[key].shape != arrays[name].shape or tree[key].dtype != arrays[name].dtype:
            raise UserError(f"{folder / FILE}: {name} is {arrays[name].shape}, wanted {tree[key].shape}")
        tree[key] = mx.array(np.array(arrays[name]))       # memory of its own: the file is about to be replaced

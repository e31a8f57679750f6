"""Everything that `llm lora` can be told: a field here is a flag, and a key of its YAML file."""
from __future__ import annotations

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..engine import optimizers
from ..engine.errors import UserError
from .adapter import Method
from .formats import FILES

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = {name.lower(): name for name in ("Adam", "AdamW", "Adamax", "Adafactor", "Adagrad", "AdaDelta", "Lion",
                                              "Muon", "RMSprop", "SGD")}
LATER = ("iters", "epochs", "save_every", "eval_every", "patience", "samples", "sample_tokens")  # a resume may change


def told(help: str, default: Any = MISSING, **options: Any) -> Any:
    """A field with its help."""
    factory = {"default_factory": lambda: default.copy()} if isinstance(default, dict | list) else {"default": default}
    return field(metadata={"help": help, **options}, **factory)


@dataclass
class Settings:
    model: str = told("What to adapt: a Hub id, a folder or a .gguf file. Default: the embedded model.", "")
    data: str = told("train, valid, test as .jsonl, .json, .csv or .parquet in a folder; one file; or a Hub id.", "")
    adapter: str = told("The folder to write.", "adapters")

    full: bool = told("Train the weights themselves, not an adapter.", False)
    rank: int = told("Rank of the products.", 8)
    alpha: float = told("The products count alpha / rank.", 16.0)
    rslora: bool = told("The products count alpha / √rank.", False)
    dropout: float = told("Share of a product's inputs that is dropped.", 0.0)
    target: list[str] = told("Linear layers that learn: a name, `*_proj`, or a regex; may be repeated. Default: all.",
                             [])
    layers: str = told("Blocks that learn: all, the last N, or a list such as 0-3,7.", "all")
    rank_pattern: dict[str, int] = told("NAME=RANK for some layers; may be repeated.", {})
    alpha_pattern: dict[str, float] = told("NAME=ALPHA for some layers; may be repeated.", {})

    iters: int = told("Optimizer steps. Default: as many as the epochs have.", 0)
    epochs: float = told("Passes over the rows.", 1.0)
    batch_size: int = told("Rows that are computed at once, one after another, without padding.", 4)
    batch_tokens: int = told("Tokens of a batch, of the rows that fill it best; 0: batch_size rows.", 0)
    accumulate: int = told("Batches of an optimizer step.", 1)
    max_seq_length: int = told("Most tokens of a row.", 2048)
    supervise: str = told("What is learnt of conversations: answers, or all.", "answers", choices=("answers", "all"))
    learning_rate: float = told("Largest learning rate.", 2e-4)
    schedule: str = told("Of the learning rate: constant, linear or cosine.", "constant", choices=SCHEDULES)
    warmup: str = told("Steps (`100`) or epochs (`0.1 epochs`) in which the rate rises.", "0")
    optimizer: str = told("Of engine/optimizers; Adam and AdamW correct their bias.", "adamw", choices=(*OPTIMIZERS,))
    optimizer_options: dict[str, Any] = told("NAME=VALUE for the optimizer, such as weight_decay=0.1.", {})
    clip: float = told("Largest norm of the gradient; 0 is off.", 1.0)
    seed: int = told("Decides the first values, the order of rows and what is dropped.", 0)
    precise: bool = told("Products of quantized matrices in float32: slower, equal to other programs' to 1e-4.", False)

    eval_every: str = told("Steps or epochs between validations.", "100")
    save_every: str = told("Steps or epochs between saves.", "100")
    patience: int = told("Stop after so many validations without a new best; 0 is off.", 0)
    format: str = told("Of the adapter's folder.", "mlx-lm", choices=(*FILES,))
    samples: int = told("Prompts that are answered before and after, for the report.", 3)
    sample_tokens: int = told("Most tokens of such an answer.", 64)
    checkpoint: int = told("MLPs computed again for the gradient, beyond all of them whole blocks; -1: all blocks.", 0)
    fit: str = told("Most memory, such as 2GB: chooses checkpoint, and batches of the same step.", "")
    show: int = told("Print so many rows, what is learnt in colour, and stop.", 0)
    resume: bool = told("Go on where the adapter's folder was left.", False)

    def check(self) -> Settings:
        """Itself. UserError names the first field whose value makes no sense."""
        rules = {
            "data": (bool(self.data), "a folder, a file or a Hub id"),
            "rank": (self.rank >= 1, "at least 1"), "dropout": (0 <= self.dropout < 1, "at least 0 and below 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"), "accumulate": (self.accumulate >= 1, "at least 1"),
            "iters": (self.iters >= 0, "at least 1"), "epochs": (self.epochs > 0, "more than 0"),
            "max_seq_length": (self.max_seq_length >= 2, "at least 2"), "clip": (self.clip >= 0, "at least 0"),
            "learning_rate": (self.learning_rate > 0 and math.isfinite(self.learning_rate), "more than 0"),
            "batch_tokens": (self.batch_tokens >= 0, "at least 0"),
            "seed": (self.seed >= 0, "at least 0"), "checkpoint": (self.checkpoint >= -1, "-1 or more"),
        }
        rules |= {f.name: (getattr(self, f.name) in f.metadata["choices"], f"one of {', '.join(f.metadata['choices'])}")
                  for f in fields(self) if "choices" in f.metadata}
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise UserError(f"[lora] {name} is {getattr(self, name)!r}, wanted {wanted}")
        for name in ("warmup", "eval_every", "save_every"):
            steps(getattr(self, name), 1, name)
        return self

    @property
    def method(self) -> Method:
        names = {f.name for f in fields(Method)}
        values = {name: value for name, value in asdict(self).items() if name in names}
        return Method(**{**values, "target": tuple(self.target)})

    def make_optimizer(self, total: int, per_epoch: float) -> optimizers.Optimizer:
        """The optimizer, its rate scheduled for `total` steps."""
        options = dict(self.optimizer_options)
        if self.optimizer in ("adam", "adamw"):
            options.setdefault("bias_correction", True)
        if self.optimizer == "adafactor":
            options.setdefault("relative_step", False)
        rate = self.rate(total, steps(self.warmup, per_epoch, "warmup"))
        try:
            return getattr(optimizers, OPTIMIZERS[self.optimizer])(rate, **options)
        except (TypeError, ValueError) as error:
            raise UserError(f"[lora] optimizer_options of {self.optimizer}: {error}") from None

    def rate(self, total: int, warmup: int) -> Any:
        """Of step 0, 1, …: rises to the largest in `warmup` steps, above 0 from the first, then falls as scheduled."""
        peak, rest = self.learning_rate, max(1, total - warmup)
        fall: dict[str, Any] = {
            "constant": lambda step: optimizers.linear_schedule(peak, peak, 1)(step),
            "linear": optimizers.linear_schedule(peak, 0.0, rest), "cosine": optimizers.cosine_decay(peak, rest)}
        if not warmup:
            return peak if self.schedule == "constant" else fall[self.schedule]
        rise = optimizers.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
        return optimizers.join_schedules([rise, fall[self.schedule]], [warmup])


def steps(text: str | int, per_epoch: float, name: str) -> int:
    """`100` steps, or `0.5 epochs` in steps."""
    found = re.fullmatch(r"(\d+)|(\d*\.?\d+) *ep(?:och)?s?", str(text).strip())
    if not found:
        raise UserError(f"[lora] {name} is {text!r}, wanted a number of steps, or epochs as in `0.5 epochs`")
    return int(found[1]) if found[1] else max(1, round(float(found[2]) * per_epoch))


def size(text: str) -> int:
    """`2GB`, `800MB` or bytes, as a number of bytes."""
    found = re.fullmatch(r"(\d*\.?\d+) *(?:([KMGT])(i?)B?)?", text.strip(), re.IGNORECASE)
    if not found:
        raise UserError(f"[lora] fit is {text!r}, wanted a size such as 2GB")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** ("KMGT".index(found[2].upper()) + 1 if found[2] else 0))


# values from flags, YAML and state files

KINDS = typing.get_type_hints(Settings)


def of(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checked values of some fields. UserError names a key that is none and the nearest that is one, or a value of
    another type."""
    found = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in KINDS:
            near = difflib.get_close_matches(name, KINDS, 1, 0.0)[0]
            raise UserError(f"{where}: unknown key {key!r}, the nearest known one: {near!r}")
        found[name] = typed(name, value, where)
    return found


def typed(name: str, value: Any, where: str) -> Any:
    """A value as its field's type: whole numbers are floats too, numbers are texts where texts are wanted."""
    kind = KINDS[name]
    plain = typing.get_origin(kind) or kind
    if plain is float and type(value) is int or plain is str and type(value) in (int, float):
        return plain(value)
    if plain is float and isinstance(value, str):          # YAML takes 1e-4 for a text
        try:
            return float(value)
        except ValueError:
            pass
    if plain is list and isinstance(value, str | tuple):
        return [value] if isinstance(value, str) else list(value)
    if not isinstance(value, plain) or plain is int and isinstance(value, bool):
        raise UserError(f"{where}: {name} is {value!r}, wanted {WORDS[plain]}")
    if plain is dict:
        item = typing.get_args(kind)[1]
        return {str(k): item(v) if item in (int, float) and not isinstance(v, str) else v for k, v in value.items()}
    return value


WORDS: dict[type | types.GenericAlias, str] = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list", dict: "a mapping"}


def from_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields that a YAML file sets."""
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text("utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found a {type(found).__name__}, wanted keys and values")
    return of(found, str(path))

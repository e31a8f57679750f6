"""How the next token is chosen. The choice itself is the kernel `sample`; here are its parameters as rows."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..array.paged import INTS, PARAMS, TOP
from ..errors import UserError

MAX_BIASES = 1024  # entries of logit_bias
PARAM_COLUMNS, INT_COLUMNS = len(PARAMS), len(INTS)
COUNTER, HISTORY, SEQUENCE, BIASES, MASKED, TARGET = map(
    INTS.index, ("counter", "history_length", "sequence", "biases", "masked", "target")
)

# field: (smallest, largest) allowed
LIMITS = {
    "max_tokens": (1, 2**31),
    "temp": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "top_logprobs": (0, TOP),
}


@dataclass(frozen=True)
class Sampling:
    """temp 0 takes the most likely token; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.

    logit_bias: token -> -100 to 100, added to its logit. top_logprobs: so many of the likeliest tokens are told with
    each token. seed None draws one; the same seed, prompt and settings give the same tokens. (In a batch of another
    size sums round otherwise, which can turn a near tie.)
    """

    max_tokens: int = 512
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()  # a string is one stop string
    seed: int | None = None
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"[sampling] {name} is {getattr(self, name)}, wanted {low} to {high}")
        if len(self.logit_bias) > MAX_BIASES:
            raise UserError(f"[sampling] logit_bias has {len(self.logit_bias)} entries, wanted at most {MAX_BIASES}")
        for token, bias in self.logit_bias.items():
            if token < 0 or not -100 <= bias <= 100:
                raise UserError(f"[sampling] logit_bias has {token}: {bias}, wanted a token id: -100 to 100")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if "" in stop:
            raise UserError("[sampling] a stop string is empty, wanted at least one character")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "seed", secrets.randbits(63) if self.seed is None else self.seed % 2**64)

    @property
    def penalizes(self) -> bool:
        """Whether the kernel has to read the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def params(self) -> tuple[float, ...]:
        """The kernel's row of floats."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return (self.temp, self.top_p, self.min_p, *penalties)

    def ints(self, prompt_length: int, generated: int, sequence: int = 0) -> tuple[int, ...]:
        """The kernel's row of integers for the next token of the step's sequence of that number; no mask, no target."""
        low, high = (((self.seed or 0) >> shift) % 2**32 for shift in (0, 32))
        signed = (x - 2**32 if x >= 2**31 else x for x in (low, high))
        history = prompt_length + generated if self.penalizes else 0
        biases = len(self.logit_bias)
        return (self.top_k, *signed, generated, history, prompt_length, sequence, biases, 0, self.top_logprobs, 0)

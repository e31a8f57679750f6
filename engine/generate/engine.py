"""The engine runs steps: token ids in, token ids out. It knows nothing of text.

A step is a flat list of tokens from any number of sequences: prompts in chunks and decoded tokens, mixed. One plan
with symbolic sizes T (tokens), B (sequences) and R (sampled rows) serves every step. Its inputs are NumPy arrays bound
once; a step writes what changed, makes one native call and reads the sampled ids.

A sequence with a draft runs it too and samples after each of its tokens: as far as the samples are the draft, they are
the tokens that steps of one token would have brought, for a sample depends on its row and its number alone.

On a GPU the next step starts before the last one is read: there are two sides, each with its own of the inputs that
change in every step, and where one side writes what it samples, the other has its tokens.
"""

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from .. import array as mx
from ..errors import UserError
from ..nn.attention import PAGE, Cache, Context, StateCache, caches
from .pace import Pace
from .pages import Pages
from .sampling import COUNTER, HISTORY, INT_COLUMNS, MASKED, MAX_BIASES, PARAM_COLUMNS, TARGET, TOP
from .sequence import Sequence, Token
from .snapshots import COPIES, Snapshots
from .speculation import EXACT

# Inputs of the plan that change from step to step: name -> axes, dtype. P: pages a sequence, H: tokens a sequence,
# F, I: parameters of a row, N: biases of a sequence, W: words of a mask.
INPUTS = {
    "tokens": ("T", np.int32),
    "positions": ("T", np.int32),
    "slots": ("T", np.int32),
    "starts": ("B", np.int32),
    "counts": ("B", np.int32),
    "lengths": ("B", np.int32),
    "page_table": ("BP", np.int32),
    "states": ("B", np.int32),
    "adapters": ("T", np.int32),
    "rows": ("R", np.int32),
    "params": ("RF", np.float32),
    "ints": ("RI", np.int32),
    "history": ("BH", np.int32),
    "bias_ids": ("BN", np.int32),
    "biases": ("BN", np.float32),
    "masks": ("RW", np.uint32),
}
CHANGING = ("tokens", "positions", "slots", "lengths", "ints")  # from one decoded token to the next
CONTEXT = ("positions", "slots", "starts", "counts", "lengths", "page_table", "states")
SAMPLE = ("params", "ints", "history", "bias_ids", "biases", "masks")


@dataclass
class Side:
    """What one step reads and writes; numbers and ids are memoryviews: single numbers at little cost."""

    executable: Any
    arrays: dict[str, np.ndarray]
    results: list[np.ndarray]  # ids, logprobs, likeliest ids and their logprobs

    def __post_init__(self) -> None:
        self.numbers = {name: array.data for name, array in self.arrays.items()}
        self.ids, self.logprobs = (array.data for array in self.results[:2])


class Engine:
    """A model with its cache.

    max_sequences: most sequences of a step; max_context: most tokens of a sequence, by default what the model was
    made for; max_step: most tokens of a step, longer prompts run in chunks; max_draft: most sampled rows of a step
    beside one a sequence; cache_dtype: float16, bfloat16 or int8; pages: of the pool, by default enough for every
    sequence at full length (memory is taken as pages are used); pace: where the seconds of steps are kept.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_sequences: int = 1,
        max_context: int | None = None,
        max_step: int = 512,
        max_draft: int = EXACT - 1,
        cache_dtype: mx.Dtype = mx.float16,
        pages: int | None = None,
        pace: Pace | None = None,
    ):
        limit = model.config.max_position_embeddings
        self.max_context = min(max_context or limit, limit)
        self.max_sequences, self.max_step = max_sequences, max(max_step, max_sequences)
        self.max_draft = min(max_draft, self.max_step - max_sequences)
        self.vocabulary = int(model.config.vocab_size)
        self.pages = Pages(pages or max_sequences * -(-self.max_context // PAGE))
        self.adapters = {None: 0} | {name: i for i, name in enumerate(_adapters(model), 1)}
        self.pace = pace or Pace()
        self.python_seconds = self.native_seconds = 0.0
        self.drafted = self.accepted = 0  # tokens of drafts, and of them those that came true
        self._last: list[Sequence] = []  # of the last step, when each ran one token and got one: the next may follow on
        self._ahead: int | None = None  # of the step after the last, if it was started: the other side's
        self._sampled: list[tuple[Sequence, int]] = []  # who samples in this step, and how many rows
        self._states = list(range(max_sequences))  # slots that no sequence has
        size = len(self.pages.references)
        self.cache = caches(model.cache_spec(), size, max_sequences + COPIES, cache_dtype)
        self.cache_bytes = token_bytes(model, size * PAGE, cache_dtype)
        states = _flat([layer for layer in self.cache if isinstance(layer, StateCache)])
        self.recurrent, self.snapshots = bool(states), Snapshots(states, max_sequences)
        axes = self._axes()
        self.plan = _plan(model, axes, self.cache)
        self._sides = self._bind(axes)
        self._use(self._sides[0])

    def _axes(self) -> dict[str, int]:
        """Sizes of the axes of INPUTS; those of a step are symbolic, with these bounds."""
        bounds = {"B": self.max_sequences, "R": self.max_sequences + self.max_draft, "T": self.max_step}
        sizes = {"P": -(-self.max_context // PAGE), "H": self.max_context, "F": PARAM_COLUMNS, "I": INT_COLUMNS}
        sizes |= {"N": MAX_BIASES, "W": -(-self.vocabulary // 32)}
        return {name: mx.Dim(name, bound) for name, bound in bounds.items()} | sizes

    def _bind(self, axes: dict[str, int]) -> list[Side]:
        """Makes the arrays that steps write and read: one side, or two that take turns."""
        arrays = {n: np.zeros([int(axes[a]) for a in shape], dtype) for n, (shape, dtype) in INPUTS.items()}
        executables, rows = [self.plan.load()], int(axes["R"])
        if executables[0].asynchronous:
            executables.append(self.plan.load())
        own = [arrays, *(arrays | {n: np.zeros_like(arrays[n]) for n in CHANGING} for _ in executables[1:])]
        ids = [own[1 - i]["tokens"][:rows] if own[1:] else np.zeros(rows, np.int32) for i in range(len(own))]
        sides = []
        for executable, inputs, sampled in zip(executables, own, ids, strict=True):
            logprobs, top = np.zeros(rows, np.float32), (np.zeros((rows, TOP), t) for t in (np.int32, np.float32))
            sides.append(Side(executable, inputs, [sampled, logprobs, *top]))
            for i, array in enumerate([*inputs.values(), *_flat(self.cache)]):
                executable.set_input(i, array)
            for i, array in enumerate(sides[-1].results):
                executable.set_output(i, array)
        return sides

    def _use(self, side: Side) -> None:
        self.side, self.executable = side, side.executable
        self._arrays, self._numbers = side.arrays, side.numbers

    def check(self, sequence: Sequence) -> None:
        """UserError for a sequence that can never run."""
        length, most = sequence.prompt_length, self.max_context - 1
        if not 0 < length <= most:
            what = f"[generate] the prompt has {length} tokens, wanted 1 to {most}"
            raise UserError(what, f"the context is {self.max_context} tokens, prompt and answer together")
        if sequence.adapter not in self.adapters:
            known = ", ".join(str(name) for name in self.adapters if name) or "none"
            raise UserError(f"[generate] adapter {sequence.adapter!r} is unknown, wanted one of those loaded: {known}")
        for what, ids in (("prompt", sequence.tokens), ("logit_bias", sequence.sampling.logit_bias)):
            if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
                found = next(i for i in ids if not 0 <= i < self.vocabulary)
                raise UserError(f"[generate] {what} has token {found}, wanted 0 to {self.vocabulary - 1}")

    def start(self, sequence: Sequence) -> None:
        """Admits a sequence: pages that already hold the beginning of its tokens become its own."""
        self.check(sequence)
        sequence.restart(self.pages.root(sequence.adapter))
        if self.recurrent:
            sequence.state = self._states.pop()
        self.adopt(sequence)

    def adopt(self, sequence: Sequence) -> None:
        """Pages that hold what comes next become the sequence's own, but for its last token: it makes the logits."""
        if sequence.telling or sequence.cached % PAGE:
            return
        before = sequence.chain
        pages, sequence.chain = self.pages.match(sequence.tokens[:-1], before, sequence.cached)
        if self.recurrent:
            pages, sequence.chain = self.snapshots.restore(self.pages, pages, before, sequence.state)
        sequence.pages += pages
        sequence.cached += len(pages) * PAGE
        if not sequence.generated:
            sequence.reused += len(pages) * PAGE

    def release(self, sequence: Sequence) -> None:
        """Gives the sequence's pages back; what they hold stays findable until the room is needed."""
        self._last = []
        self.pages.release(sequence.pages)
        if sequence.state >= 0:
            self._states.append(sequence.state)
        sequence.pages, sequence.state, sequence.cached = [], -1, 0

    def step(self, sequences: list[Sequence]) -> list[Sequence]:
        """Runs the next tokens of each sequence; returns those that sampled: `fresh` has their new tokens, which are
        also appended to their tokens."""
        begin = perf_counter()
        started = self._started(sequences)
        if started is not None:
            counts = [1] * len(sequences)
        elif sequences == self._last and not any([s.draft for s in sequences]):
            counts = self._advance(sequences, self._numbers)
        else:
            counts = self._pack(sequences)
        size, rows = sum(counts), sum([n for _, n in self._sampled])
        prompts = sum([n for s, n in zip(sequences, counts, strict=True) if len(s.tokens) - s.cached > 1])
        called = perf_counter()
        if len(self._sides) == 1:
            self.executable.run(T=size, B=len(sequences), R=rows)
        else:
            if started is None:
                started = self.executable.start(T=size, B=len(sequences), R=rows)
            if size == rows == len(sequences) and not self.recurrent and all([self._goes_on(s) for s in sequences]):
                self._ahead = self._lead(sequences)
            self.executable.wait(started)
        returned = perf_counter()
        row = 0
        for s, n in self._sampled:
            self._take(s, row, n)
            row += n
        for s, count in zip(sequences, counts, strict=True):
            if not s.error:
                self._cached(s, min(s.cached + count, len(s.tokens) - (s.generated > 0)))
        self._last = list(sequences) if size == rows == len(sequences) else []
        self.pace.learn(size - prompts, prompts, returned - begin)
        self.native_seconds += returned - called
        self.python_seconds += perf_counter() - returned + called - begin
        return [s for s, _ in self._sampled if s.fresh or s.finish_reason]

    def _started(self, sequences: list[Sequence]) -> int | None:
        """The number of the step that was started for these sequences, and now is the one to be read. Another one is
        let go: it wrote what will be written again."""
        started, self._ahead = self._ahead, None
        if started is None:
            return None
        if sequences != self._last:
            self.executable.wait()
            return None
        self._use(self._other)
        for s in sequences:
            s.fresh, s.draft = [], []
        return started

    @property
    def _other(self) -> Side:
        return self._sides[self.side is self._sides[0]]

    def _goes_on(self, s: Sequence) -> bool:
        """Whether the step after the one that runs needs nothing of it but its token."""
        more = s.generated + 1 < s.sampling.max_tokens and len(s.tokens) + 1 < self.max_context
        free = not (s.constraint or s.telling or s.sampling.penalizes)
        return more and free and len(s.pages) * PAGE > s.cached + 1

    def _lead(self, sequences: list[Sequence]) -> int:
        """Starts the step after the one that runs."""
        side, n = self._other, len(sequences)
        side.arrays["ints"][:n] = self._arrays["ints"][:n]
        self._advance(sequences, side.numbers, 1)
        return side.executable.start(T=n, B=n, R=n)

    def _pack(self, sequences: list[Sequence]) -> list[int]:
        """Writes every input; returns how many tokens of each sequence run. Each gets one at least."""
        if not 0 < len(sequences) <= self.max_sequences:
            raise UserError(f"[step] {len(sequences)} sequences, wanted 1 to {self.max_sequences}")
        a, start, row, counts, self._sampled = self._arrays, 0, 0, [], []
        for b, s in enumerate(sequences):
            others = len(sequences) - b - 1
            room = min(s.chunk, self.max_step - start - others)
            if self.recurrent and (left := (len(s.tokens) - 1) // PAGE * PAGE - s.cached) > 0:
                room = min(room, left)  # a step ends with the prompt's last whole page: then its states are kept
            rows = self.max_sequences + self.max_draft - row - others
            if s.telling:
                room = min(room, rows)
            tokens = s.tokens[s.cached : s.cached + room]
            if s.cached + len(tokens) == len(s.tokens):
                s.draft = s.draft[: min(room - len(tokens), rows - 1, self.max_context - len(s.tokens) - 1)]
                tokens += s.draft
            end, length = start + len(tokens), s.cached + len(tokens)
            self._reserve(s, length)
            a["page_table"][b, : len(s.pages)] = s.pages
            a["tokens"][start:end] = tokens
            a["positions"][start:end] = np.arange(s.cached, length)
            pages, offsets = np.divmod(a["positions"][start:end], PAGE)
            a["slots"][start:end] = a["page_table"][b, pages] * PAGE + offsets
            a["starts"][b], a["counts"][b], a["lengths"][b], a["states"][b] = start, len(tokens), length, s.state
            a["adapters"][start:end] = self.adapters[s.adapter]
            row += self._rows(s, b, row, start, len(tokens))
            start = end
            counts.append(len(tokens))
        return counts

    def _rows(self, s: Sequence, b: int, row: int, start: int, count: int) -> int:
        """Writes the sampled rows of sequence b of the step, tokens start … start + count; returns how many."""
        a, length, s.fresh = self._arrays, s.cached + count, []
        first = s.cached if s.telling else max(s.cached, len(s.tokens) - 1)  # from this token on, a row for each
        if (rows := length - first) <= 0:
            return 0
        a["rows"][row : row + rows] = np.arange(start + count - rows, start + count)
        a["params"][row : row + rows] = s.sampling.params()
        a["ints"][row : row + rows] = s.sampling.ints(s.prompt_length, s.generated, b)
        if s.sampling.penalizes:
            a["history"][b, : len(s.tokens)] = s.tokens
            a["history"][b, len(s.tokens) : length] = s.draft
        if biases := s.sampling.logit_bias:
            a["bias_ids"][b, : len(biases)], a["biases"][b, : len(biases)] = [*biases], [*biases.values()]
        drafted = len(s.draft)
        for i in range(1, drafted + 1):
            a["ints"][row + rows - 1 - drafted + i, COUNTER] += i
            a["ints"][row + rows - 1 - drafted + i, HISTORY] += i * s.sampling.penalizes
        for i in range(first, min(length, s.prompt_length - 1)):
            a["ints"][row + i - first, TARGET] = s.tokens[i + 1] + 1
        if s.constraint and length >= len(s.tokens):
            self._mask(s, row + rows - 1 - drafted)
        self._sampled.append((s, rows))
        return rows

    def _mask(self, s: Sequence, row: int) -> None:
        """Writes what the constraint allows next, and after each token of the draft."""
        assert s.constraint is not None
        try:
            for i, mask in enumerate(s.constraint.masks(s.draft) if s.draft else [s.constraint.mask()]):
                self._numbers["ints"][row + i, MASKED] = mask is not None
                if mask is not None:
                    self._arrays["masks"][row + i, : len(mask)] = mask
                    self._arrays["masks"][row + i, len(mask) :] = 0
        except Exception as error:
            s.fail(error)  # its rows run, nobody reads them

    def _advance(self, sequences: list[Sequence], a: dict[str, memoryview], ahead: int = 0) -> list[int]:
        """The same sequences as in the last step, each by the one token it got: a few numbers change. ahead: 1 before
        that step is read, whose samples are the tokens."""
        for b, s in enumerate(sequences):
            at = s.cached + ahead
            page, offset = divmod(at, PAGE)
            if not offset:
                self._reserve(s, at + 1)
                a["page_table"][b, page] = s.pages[page]
            a["positions"][b] = at
            a["slots"][b] = s.pages[page] * PAGE + offset
            a["lengths"][b] = at + 1
            a["ints"][b, COUNTER] = s.generated + ahead
            if ahead:
                continue
            a["tokens"][b] = s.tokens[-1]
            s.fresh = []
            if s.sampling.penalizes:
                a["history"][b, s.cached] = s.tokens[-1]
                a["ints"][b, HISTORY] = s.cached + 1
            if s.constraint:
                self._mask(s, b)
        return [1] * len(sequences)

    def _take(self, s: Sequence, row: int, rows: int) -> None:
        """Reads what the rows sampled, as far as a draft was right."""
        for r in range(row, row + rows):
            if s.error:
                return
            token: int = self.side.ids[r]
            top: tuple[tuple[int, float], ...] = ()
            if token < 0:
                self.pages.forget(s.pages)  # what they hold may be no numbers
                return s.fail(UserError("[generate] the model's output is not a number, or no token is allowed"))
            if n := min(s.sampling.top_logprobs, self.vocabulary):
                top = tuple(zip(*(likeliest[r, :n].tolist() for likeliest in self.side.results[2:]), strict=True))
            if s.telling:
                s.told.append(Token(token, self.side.logprobs[r], top))
                continue
            try:
                s.append(Token(token, self.side.logprobs[r], top), self.max_context)
            except Exception as error:
                return s.fail(error)
            left = row + rows - 1 - r
            if s.finish_reason or (left and token != s.draft[-left]):
                break
        if s.draft:
            s.lookup.learn(len(s.draft), len(s.fresh) - 1)
            self.drafted += len(s.draft)
            self.accepted += len(s.fresh) - 1
            s.draft = []

    def _reserve(self, sequence: Sequence, length: int) -> None:
        while len(sequence.pages) * PAGE < length:
            sequence.pages.append(self.pages.allocate())

    def _cached(self, sequence: Sequence, length: int) -> None:
        """Counts the first `length` tokens as cached and makes the pages that they filled findable."""
        first, sequence.cached = sequence.cached // PAGE, length
        for i in range(first, length // PAGE):
            tokens = sequence.tokens[i * PAGE : (i + 1) * PAGE]
            sequence.chain = self.pages.keep(sequence.pages[i], sequence.chain, tokens)
        if self.recurrent and length % PAGE == 0 and length < sequence.prompt_length:
            self.snapshots.keep(sequence.chain, sequence.state)


def token_bytes(model: Any, tokens: int = PAGE, dtype: mx.Dtype = mx.float16) -> int:
    """Bytes of cache for each token of so many."""
    return max(1, sum(spec.nbytes(tokens, dtype.size) for spec in model.cache_spec()) // tokens)


def _flat(layers: list[Cache]) -> list[mx.Array]:
    return [array for layer in layers for array in layer if array is not None]


def _adapters(model: Any) -> tuple[str, ...]:
    """Names of the adapters that the model's layers can add, each row its own."""
    return model.adapters.names if hasattr(model, "adapters") else ()


def _plan(model: Any, axes: dict[str, int], cache: list[Cache]) -> Any:
    """From tokens to sampled tokens and their logprobs, the caches updated in place."""
    inputs = {
        name: mx.placeholder(tuple(axes[a] for a in shape), getattr(mx, np.dtype(dtype).name))
        for name, (shape, dtype) in INPUTS.items()
    }
    layers = [type(layer)(*[mx.placeholder(a.shape, a.dtype) for a in _flat([layer])]) for layer in cache]
    context = Context(**{name: inputs[name] for name in CONTEXT}, layers=list(layers))
    if _adapters(model):
        model.adapters.rows = inputs["adapters"]
    logits = model(inputs["tokens"], context, inputs["rows"])
    if _adapters(model):
        model.adapters.rows = None
    outputs = [*mx.fast.sample(logits, *(inputs[name] for name in SAMPLE)), *_flat(context.layers)]
    return mx.lower(outputs, [*inputs.values(), *_flat(layers)], donate=_flat(layers))

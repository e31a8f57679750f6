"""The engine runs steps: token ids in, token ids out. It knows nothing of text.

A step is a flat list of tokens from any number of sequences: prompts in chunks and decoded tokens, mixed. One plan
with symbolic sizes T (tokens), B (sequences) and R (sampled rows) serves every step. Its inputs are NumPy arrays bound
once; a step writes what changed, makes one native call and reads the sampled ids.
"""

from time import perf_counter
from typing import Any

import numpy as np

from .. import array as mx
from ..errors import UserError
from ..nn.attention import PAGE, Context, LayerCache
from .pages import Pages
from .sampling import COUNTER, HISTORY
from .sequence import Sequence

# Inputs of the plan that change from step to step: name -> axes, dtype. P: pages a sequence, H: tokens a sequence.
INPUTS = {
    "tokens": ("T", np.int32),
    "positions": ("T", np.int32),
    "slots": ("T", np.int32),
    "starts": ("B", np.int32),
    "counts": ("B", np.int32),
    "lengths": ("B", np.int32),
    "page_table": ("BP", np.int32),
    "rows": ("R", np.int32),
    "params": ("R8", np.float32),
    "ints": ("R8", np.int32),
    "history": ("RH", np.int32),
}
CONTEXT = ("positions", "slots", "starts", "counts", "lengths", "page_table")


class Engine:
    """A model with its cache.

    max_sequences: most sequences of a step; max_context: most tokens of a sequence, by default what the model was
    made for; max_step: most tokens of a step, longer prompts run in chunks; cache_dtype: float16, bfloat16 or int8;
    pages: of the pool, by default enough for every sequence at full length (memory is taken as pages are used).
    """

    def __init__(
        self,
        model: Any,
        *,
        max_sequences: int = 1,
        max_context: int | None = None,
        max_step: int = 512,
        cache_dtype: mx.Dtype = mx.float16,
        pages: int | None = None,
    ):
        limit = model.config.max_position_embeddings
        self.max_context = min(max_context or limit, limit)
        self.max_sequences, self.max_step = max_sequences, max(max_step, max_sequences)
        per_sequence = -(-self.max_context // PAGE)
        self.pages = Pages(pages or max_sequences * per_sequence)
        self.python_seconds = self.native_seconds = 0.0
        self._last: list[Sequence] = []  # of the last step, when each ran one token and got one: the next may follow on
        sizes = {"B": max_sequences, "R": max_sequences, "T": self.max_step}
        axes: dict[str, int] = {name: mx.Dim(name, size) for name, size in sizes.items()}
        axes |= {"P": per_sequence, "H": self.max_context, "8": 8}
        self._arrays = {n: np.zeros([int(axes[a]) for a in shape], dtype) for n, (shape, dtype) in INPUTS.items()}
        results = np.zeros(max_sequences, np.int32), np.zeros(max_sequences, np.float32)
        self._ids, self._logprobs = (array.data for array in results)  # memoryviews: single numbers at little cost
        self._numbers = {name: array.data for name, array in self._arrays.items()}
        size = len(self.pages.references)
        self.cache = [_layer_cache(size, heads, dim, cache_dtype) for heads, dim, *_ in model.cache_spec()]
        self.cache_bytes = sum(array.nbytes for array in _flat(self.cache)) // (size * PAGE)  # of a token, all layers
        self.plan = _plan(model, axes, self.cache)
        self.executable = self.plan.load()
        for i, array in enumerate([*self._arrays.values(), *_flat(self.cache)]):
            self.executable.set_input(i, array)
        for i, array in enumerate(results):
            self.executable.set_output(i, array)

    def start(self, sequence: Sequence) -> None:
        """Admits a sequence: pages that already hold the beginning of its prompt become its own."""
        if not 0 < sequence.prompt_length < self.max_context:
            what = f"[generate] the prompt has {sequence.prompt_length} tokens, wanted 1 to {self.max_context - 1}"
            raise UserError(what, f"the context is {self.max_context} tokens, prompt and answer together")
        sequence.pages, sequence.chain = self.pages.match(sequence.tokens[:-1])  # the last token makes the logits
        sequence.cached = sequence.reused = len(sequence.pages) * PAGE

    def release(self, sequence: Sequence) -> None:
        """Gives the sequence's pages back; what they hold stays findable until the room is needed."""
        self._last = []
        self.pages.release(sequence.pages)
        sequence.pages = []

    def step(self, sequences: list[Sequence]) -> list[Sequence]:
        """Runs the next tokens of each sequence; returns those that got a new token, appended to their tokens."""
        begin = perf_counter()
        counts = self._advance(sequences) if sequences == self._last else self._pack(sequences)
        sampled = [s for s, count in zip(sequences, counts, strict=True) if s.cached + count == len(s.tokens)]
        size = sum(counts)
        called = perf_counter()
        self.executable.run(T=size, B=len(sequences), R=len(sampled))
        returned = perf_counter()
        for s, count in zip(sequences, counts, strict=True):
            self._cached(s, count)
        for row, s in enumerate(sampled):
            s.append(self._ids[row], self._logprobs[row], self.max_context)
        self._last = list(sequences) if size == len(sampled) else []
        self.native_seconds += returned - called
        self.python_seconds += perf_counter() - returned + called - begin
        return sampled

    def _pack(self, sequences: list[Sequence]) -> list[int]:
        """Writes every input; returns how many tokens of each sequence run. Each gets one at least."""
        if not 0 < len(sequences) <= self.max_sequences:
            raise UserError(f"[step] {len(sequences)} sequences, wanted 1 to {self.max_sequences}")
        a, start, row, counts = self._arrays, 0, 0, []
        for b, s in enumerate(sequences):
            room = self.max_step - start - (len(sequences) - b - 1)
            count = min(len(s.tokens) - s.cached, room)
            end, length = start + count, s.cached + count
            self._reserve(s, length)
            a["page_table"][b, : len(s.pages)] = s.pages
            a["tokens"][start:end] = s.tokens[s.cached : length]
            a["positions"][start:end] = np.arange(s.cached, length)
            pages, offsets = np.divmod(a["positions"][start:end], PAGE)
            a["slots"][start:end] = a["page_table"][b, pages] * PAGE + offsets
            a["starts"][b], a["counts"][b], a["lengths"][b] = start, count, length
            if length == len(s.tokens):
                a["rows"][row] = end - 1
                a["params"][row] = s.sampling.params()
                a["ints"][row] = s.sampling.ints(s.prompt_length, s.generated)
                if s.sampling.penalizes:
                    a["history"][row, :length] = s.tokens
                row += 1
            start = end
            counts.append(count)
        return counts

    def _advance(self, sequences: list[Sequence]) -> list[int]:
        """The same sequences as in the last step, each by the one token it got: a few numbers change."""
        a = self._numbers
        for b, s in enumerate(sequences):
            page, offset = divmod(s.cached, PAGE)
            if not offset:
                self._reserve(s, s.cached + 1)
                a["page_table"][b, page] = s.pages[page]
            a["tokens"][b] = s.tokens[-1]
            a["positions"][b] = s.cached
            a["slots"][b] = s.pages[page] * PAGE + offset
            a["lengths"][b] = s.cached + 1
            a["ints"][b, COUNTER] = s.generated
            if s.sampling.penalizes:
                a["history"][b, s.cached] = s.tokens[-1]
                a["ints"][b, HISTORY] = s.cached + 1
        return [1] * len(sequences)

    def _reserve(self, sequence: Sequence, length: int) -> None:
        while len(sequence.pages) * PAGE < length:
            sequence.pages.append(self.pages.allocate())

    def _cached(self, sequence: Sequence, count: int) -> None:
        """Counts tokens as cached and makes the pages that they filled findable."""
        first, sequence.cached = sequence.cached // PAGE, sequence.cached + count
        for i in range(first, sequence.cached // PAGE):
            tokens = sequence.tokens[i * PAGE : (i + 1) * PAGE]
            sequence.chain = self.pages.keep(sequence.pages[i], sequence.chain, tokens)


def _layer_cache(pages: int, heads: int, head_dim: int, dtype: mx.Dtype) -> LayerCache:
    """Pages that are zeroed by the system when they are first touched: an unused page costs no memory."""
    shapes = (pages, heads, head_dim, PAGE), (pages, heads, PAGE, head_dim)
    values = [mx.asarray(np.zeros(shape, f"i{dtype.size}")).view(dtype) for shape in shapes]
    scales = [mx.asarray(np.zeros((pages, heads, PAGE), np.float32)) for _ in shapes if dtype == mx.int8]
    return LayerCache(*values, *scales)


def _flat(layers: list[LayerCache]) -> list[mx.Array]:
    return [array for layer in layers for array in layer if array is not None]


def _plan(model: Any, axes: dict[str, int], cache: list[LayerCache]) -> Any:
    """From tokens to sampled tokens and their logprobs, the caches updated in place."""
    inputs = {
        name: mx.placeholder(tuple(axes[a] for a in shape), getattr(mx, np.dtype(dtype).name))
        for name, (shape, dtype) in INPUTS.items()
    }
    layers = [LayerCache(*[mx.placeholder(a.shape, a.dtype) for a in _flat([layer])]) for layer in cache]
    context = Context(**{name: inputs[name] for name in CONTEXT}, layers=list(layers))
    logits = model(inputs["tokens"], context, inputs["rows"])
    tokens, logprobs = mx.fast.sample(logits, inputs["params"], inputs["ints"], inputs["history"])
    outputs = [tokens, logprobs, *_flat(context.layers)]
    return mx.lower(outputs, [*inputs.values(), *_flat(layers)], donate=_flat(layers))

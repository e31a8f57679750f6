"""What attention knows of a step: T tokens, of any number of sequences in a row, and the pages of their past."""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .. import array as mx

PAGE = 32  # tokens a page


class LayerCache(NamedTuple):
    """Pages of one layer. Keys lie transposed, so that the scores of a page's tokens come out side by side."""

    k: mx.Array                        # (N, K, D, PAGE) float16, bfloat16, int8, or float32 where exactness counts
    v: mx.Array                        # (N, K, PAGE, D)
    k_scales: mx.Array | None = None   # (N, K, PAGE) float32, for int8 only
    v_scales: mx.Array | None = None

    @classmethod
    def empty(cls, pages: int, kv_heads: int, head_dim: int, dtype: mx.Dtype = mx.float16) -> LayerCache:
        shapes = (pages, kv_heads, head_dim, PAGE), (pages, kv_heads, PAGE, head_dim)
        scales = [_zeros((pages, kv_heads, PAGE), mx.float32) for _ in shapes if dtype == mx.int8]
        return cls(*[_zeros(shape, dtype) for shape in shapes], *scales)


class StateCache(tuple[mx.Array, ...]):
    """What a recurrent layer keeps of the sequences: arrays (slots, …) float32."""

    def __new__(cls, *arrays: mx.Array) -> StateCache:
        return super().__new__(cls, arrays)


class PageSpec(NamedTuple):
    """A layer of attention: it keeps keys and values in pages."""

    kv_heads: int
    head_dim: int
    window: int = 0                    # tokens that it looks back, 0 for all

    def empty(self, pages: int, slots: int, dtype: mx.Dtype) -> LayerCache:
        return LayerCache.empty(pages, self.kv_heads, self.head_dim, dtype)

    def nbytes(self, tokens: int, size: int = 2) -> int:
        """Of a sequence of so many tokens, in numbers of `size` bytes."""
        return 2 * self.kv_heads * self.head_dim * tokens * size


class StateSpec(NamedTuple):
    """A recurrent layer: it keeps arrays of these shapes in float32, however long a sequence is."""

    shapes: tuple[tuple[int, ...], ...]

    def empty(self, pages: int, slots: int, dtype: mx.Dtype) -> StateCache:
        return StateCache(*[_zeros((slots, *shape), mx.float32) for shape in self.shapes])

    def nbytes(self, tokens: int, size: int = 2) -> int:
        return sum(4 * math.prod(shape) for shape in self.shapes)


Cache = LayerCache | StateCache


def caches(specs: Iterable[PageSpec | StateSpec], pages: int, slots: int = 1,
           dtype: mx.Dtype = mx.float16) -> list[Cache]:
    """Empty caches of the layers: pages in `dtype`, and slots for the states of sequences."""
    return [spec.empty(pages, slots, dtype) for spec in specs]


def _zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.Array:
    """Memory that the system zeroes when it is first touched: a page that is not used costs none."""
    return mx.asarray(np.zeros(shape, f"i{dtype.size}")).view(dtype)


@dataclass
class Context:
    """The sequences of one step. Sequence b owns rows starts[b] … starts[b]+counts[b]; all indices are int32.

    `layers` holds every layer's pages before the step; as a layer runs, its entry becomes the pages after the step.
    """

    positions: mx.Array                # (T) of each token in its sequence
    slots: mx.Array                    # (T) where its key and value go: page·PAGE + offset, or −1 for nowhere
    starts: mx.Array                   # (B)
    counts: mx.Array                   # (B)
    lengths: mx.Array                  # (B) tokens of the sequence after this step
    page_table: mx.Array               # (B, P) pages of each sequence in order
    layers: list[Cache]
    states: mx.Array | None = None     # (B) slot of each sequence's recurrent states; None: B is its own slot

    @classmethod
    def single(cls, tokens: int, layers: Iterable[Cache], start: int = 0) -> Context:
        """One sequence that fills pages 0, 1, … in order; `tokens` new ones follow the `start` that are cached."""
        ints = lambda *values: mx.array(values, dtype=mx.int32)  # noqa: E731
        places, layers = mx.arange(start, start + tokens, dtype=mx.int32), list(layers)
        pages = mx.arange(max([layer.k.shape[0] for layer in layers if isinstance(layer, LayerCache)], default=0))
        table = pages.astype(mx.int32).reshape(1, -1)
        return cls(places, places, ints(0), ints(tokens), ints(start + tokens), table, layers)

    @classmethod
    def packed(cls, lengths: mx.Array | Sequence[int], tokens: int = 0) -> Context:
        """Rows of lengths (B) one after another, for training: no layer keeps anything, positions begin at 0 in each.

        tokens: T, if it is not the sum of the lengths; tokens after the last row belong to none. An array of lengths
        may be an input of a compiled function: one plan then serves all ways to divide T tokens into B rows.
        """
        counts = lengths.astype(mx.int32) if isinstance(lengths, mx.Array) else mx.array(list(lengths), mx.int32)
        tokens, longest = (tokens, tokens) if isinstance(lengths, mx.Array) else (tokens or sum(lengths), max(lengths))
        ends, places = mx.cumsum(counts), mx.arange(tokens, dtype=mx.int32)
        row = mx.sum(mx.expand_dims(places, 1) >= ends[:-1], axis=1)
        positions = (places - mx.take(ends - counts, row)).astype(mx.int32)
        no_pages = mx.zeros((counts.shape[0], -(-longest // PAGE)), mx.int32)
        return cls(positions, places, ends - counts, counts, counts, no_pages, [])

    def recurrent(self, layer: int, spec: StateSpec) -> tuple[StateCache, tuple[mx.Array, ...]]:
        """What a recurrent layer keeps, zeros if nothing does, and the slots, starts, counts and lengths (B)."""
        size = self.starts.shape[0]
        slots = mx.arange(size, dtype=mx.int32) if self.states is None else self.states
        cache = self.layers[layer] if self.layers else spec.empty(0, size, mx.float32)
        assert isinstance(cache, StateCache)
        return cache, (slots, self.starts, self.counts, self.lengths)

    def keep(self, layer: int, *states: mx.Array) -> None:
        """Takes a recurrent layer's states after the step."""
        if self.layers:
            self.layers[layer] = StateCache(*states)


class Rope(NamedTuple):
    """Rotary positions: angle = position · inv_freq (R/2), on the first R of D channels."""

    inv_freq: mx.Array
    scale: float = 1.0                 # of the rotated channels (yarn's and longrope's attention factor)
    interleaved: bool = False          # pairs are neighbours, not halves
    far: mx.Array | None = None        # inv_freq where sequences may be longer than `near` tokens
    near: int = 0


def attend(
    q: mx.Array, k: mx.Array, v: mx.Array, context: Context, layer: int, rope: Rope, *, scale: float,
    window: int = 0, softcap: float = 0.0, q_norm: mx.Array | None = None, k_norm: mx.Array | None = None,
    eps: float = 1e-6, sinks: mx.Array | None = None,
) -> mx.Array:
    """Rotates q (T, H, D) and k (T, K, D), appends k and v to the layer's pages, and attends causally: (T, H, D).

    A packed context has no pages: rows attend to themselves, and all of it has a gradient.
    """
    long = rope.far is not None and context.page_table.shape[1] * PAGE > rope.near
    inv_freq = rope.far if long else rope.inv_freq
    if not context.layers:
        q, k = (x if norm is None else mx.fast.rms_norm(x, norm, eps) for x, norm in ((q, q_norm), (k, k_norm)))
        q, k = (mx.fast.rotate(x, context.positions, inv_freq, interleaved=rope.interleaved, scale=rope.scale)
                for x in (q, k))
        return mx.fast.ragged_attention(q, k, v, context.starts, context.counts, scale=scale, window=window,
                                        softcap=softcap, sinks=sinks)
    cache = context.layers[layer]
    assert isinstance(cache, LayerCache)
    q, *pages = mx.fast.rope_append(
        q, k, v, cache.k, cache.v, context.positions, context.slots, inv_freq,
        interleaved=rope.interleaved, scale=rope.scale, q_norm=q_norm, k_norm=k_norm, eps=eps,
        k_scales=cache.k_scales, v_scales=cache.v_scales,
    )
    context.layers[layer] = cache = LayerCache(*pages)
    return mx.fast.paged_attention(
        q, cache.k, cache.v, context.page_table, context.starts, context.counts, context.lengths,
        scale=scale, window=window, softcap=softcap, sinks=sinks, k_scales=cache.k_scales, v_scales=cache.v_scales,
    )

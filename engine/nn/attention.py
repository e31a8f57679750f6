"""What attention knows of a step: T tokens, of any number of sequences in a row, and the pages of their past."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .. import array as mx

PAGE = 32  # tokens a page


class LayerCache(NamedTuple):
    """Pages of one layer. Keys lie transposed, so that the scores of a page's tokens come out side by side."""

    k: mx.Array                        # (N, K, D, PAGE) float16, bfloat16 or int8
    v: mx.Array                        # (N, K, PAGE, D)
    k_scales: mx.Array | None = None   # (N, K, PAGE) float32, for int8 only
    v_scales: mx.Array | None = None

    @classmethod
    def empty(cls, pages: int, kv_heads: int, head_dim: int, dtype: mx.Dtype = mx.float16) -> LayerCache:
        scales = mx.zeros((pages, kv_heads, PAGE)) if dtype == mx.int8 else None
        k, v = (pages, kv_heads, head_dim, PAGE), (pages, kv_heads, PAGE, head_dim)
        return cls(mx.zeros(k, dtype=dtype), mx.zeros(v, dtype=dtype), scales, scales)


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
    layers: list[LayerCache]

    @classmethod
    def single(cls, tokens: int, layers: Iterable[LayerCache], start: int = 0) -> Context:
        """One sequence that fills pages 0, 1, … in order; `tokens` new ones follow the `start` that are cached."""
        ints = lambda *values: mx.array(values, dtype=mx.int32)  # noqa: E731
        places = mx.arange(start, start + tokens, dtype=mx.int32)
        pages = mx.arange(-(-(start + tokens) // PAGE), dtype=mx.int32)
        return cls(places, places, ints(0), ints(tokens), ints(start + tokens), pages.reshape(1, -1), list(layers))


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
    """Rotates q (T, H, D) and k (T, K, D), appends k and v to the layer's pages, and attends causally: (T, H, D)."""
    cache = context.layers[layer]
    long = rope.far is not None and context.page_table.shape[1] * PAGE > rope.near
    q, *pages = mx.fast.rope_append(
        q, k, v, cache.k, cache.v, context.positions, context.slots, rope.far if long else rope.inv_freq,
        interleaved=rope.interleaved, scale=rope.scale, q_norm=q_norm, k_norm=k_norm, eps=eps,
        k_scales=cache.k_scales, v_scales=cache.v_scales,
    )
    context.layers[layer] = cache = LayerCache(*pages)
    return mx.fast.paged_attention(
        q, cache.k, cache.v, context.page_table, context.starts, context.counts, context.lengths,
        scale=scale, window=window, softcap=softcap, sinks=sinks, k_scales=cache.k_scales, v_scales=cache.v_scales,
    )

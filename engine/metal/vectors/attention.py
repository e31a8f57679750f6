"""Attention: the formula in float64; of pages, over the numbers that they hold, NaN wherever nothing may be read."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..rope import PAGE, PAGES
from . import Vector, rounded

# scores of size 10 in float32, their exponentials and sums of up to 2,000 of them: 1e-5 with room
TOLERANCE = 3e-5


@dataclass(frozen=True)
class _Case:
    """A ragged batch: new tokens and earlier ones of each sequence, in shuffled pages, with rows of nobody."""

    counts: tuple[int, ...]
    before: tuple[int, ...]
    size: int = 64
    kv_heads: int = 2
    group: int = 3
    dtype: str = "float16"
    window: int = 0
    causal: bool = True
    cap: float = 0.0
    sinks: bool = False
    width: int = 0                             # of the page table, at least

    def vector(self) -> Vector:
        rng = np.random.default_rng(sum(self.counts) + self.size)
        counts, heads = np.array(self.counts, np.int32), self.kv_heads * self.group
        lengths = counts + np.array(self.before, np.int32)
        sequences, width = len(counts), max(self.width, 1 - (-int(lengths.max(initial=0)) // PAGE))
        used = -(-lengths // PAGE)
        pages = int(used.sum()) + 1            # page 0 is nobody's
        table, free = np.zeros((sequences, width), np.int32), rng.permutation(np.arange(1, pages))
        for b, n in enumerate(used):
            table[b, :n], free = free[:n], free[n:]
        starts = (1 + np.cumsum([0, *(counts + 1)])[:sequences]).astype(np.int32)
        tokens = int(counts.sum()) + sequences + 1
        q = rng.standard_normal((tokens, heads + 1, self.size)).astype(np.float32)[:, :heads]
        sinks = rng.standard_normal(heads).astype(np.float32)
        seen = np.zeros((pages, PAGE), bool)
        for b, length in enumerate(lengths):
            for at in range(length):
                seen[table[b, at // PAGE], at % PAGE] = True
        k, v, scales, numbers = self._pages(rng, seen)
        wanted = np.zeros(q.shape)
        for b in range(sequences):
            keys, values = (x[table[b]].transpose(1, 0, 2, 3).reshape(self.kv_heads, -1, self.size) for x in numbers)
            for i in range(counts[b]):
                wanted[starts[b] + i] = self._attend(q[starts[b] + i], keys, values, int(lengths[b] - counts[b]) + i,
                                                     int(lengths[b]), sinks)
        inputs = [q, k, v, table, starts, counts, lengths, *([sinks] if self.sinks else []), *scales]
        return Vector(self.name, "paged_attention", [np.empty(q.shape, np.float32)], inputs,
                      [self.window, int(self.causal), int(self.sinks), int(bool(scales))],
                      [self.size**-0.5, self.cap], [wanted], TOLERANCE)

    @property
    def name(self) -> str:
        batch = "+".join(f"{c}at{b}" for c, b in zip(self.counts, self.before, strict=True)) or "none"
        options = "".join(f"-{n}{x:g}" for n, x in (("window", self.window), ("cap", self.cap)) if x)
        return (f"paged_attention-{batch}-D{self.size}-K{self.kv_heads}x{self.group}-{self.dtype}{options}"
                + "-sinks" * self.sinks + "-all" * (not self.causal))

    def _pages(self, rng: np.random.Generator, seen: np.ndarray) -> tuple:
        """k and v as operands, their scales, and the numbers that they hold (N,K,PAGE,D)."""
        quantized = self.dtype == "int8"
        raw = rng.standard_normal((2, len(seen), self.kv_heads, PAGE, self.size)) * (40 if quantized else 1)
        scales = rng.uniform(0.01, 0.04, (2, *raw.shape[1:4])).astype(np.float32)
        hidden = np.broadcast_to(~seen[:, None], raw.shape[1:4])
        raw[:, hidden] = 7 if quantized else np.nan
        operands, numbers = zip(*(rounded(np.clip(np.rint(x), -127, 127) if quantized else x, self.dtype)
                                  for x in (raw[0].transpose(0, 1, 3, 2).copy(), raw[1])), strict=True)
        if quantized:
            scales[:, hidden] = np.nan
            return *operands, list(scales), [x * s[..., None] for x, s in
                                             zip((numbers[0].transpose(0, 1, 3, 2), numbers[1]), scales, strict=True)]
        return *operands, [], [numbers[0].transpose(0, 1, 3, 2), numbers[1]]

    def _attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, own: int, length: int,
                sinks: np.ndarray) -> np.ndarray:
        """The row (H,D) of the token at position `own`."""
        at = np.arange(length)
        at = at[(at <= own if self.causal else at >= 0) & ((at > own - self.window) | (self.window == 0))]
        rows = []
        for h in range(len(q)):
            s = k[h // self.group, at] @ q[h] * self.size**-0.5
            s = self.cap * np.tanh(s / self.cap) if self.cap else s
            rows.append(_weighed(s, sinks[h] if self.sinks else -np.inf, v[h // self.group, at])[0])
        return np.array(rows)


def _weighed(scores: np.ndarray, sink: float, v: np.ndarray) -> tuple[np.ndarray, float]:
    """softmax(scores (S) and a sink) v (S,E), and the log of the sum."""
    total = np.logaddexp.reduce(np.append(scores, sink))
    return np.exp(scores - total) @ v, total


def _ragged(counts: tuple[int, ...], heads: int, kv_heads: int, size: int, columns: int, window: int = 0,
            cap: float = 0.0, sinks: bool = False) -> Vector:
    """Packed rows, a row of nobody before each sequence and after the last."""
    rng = np.random.default_rng(size + columns)
    tokens = sum(counts) + len(counts) + 1
    starts = np.cumsum([1, *(n + 1 for n in counts)])[:len(counts)].astype(np.int32)
    q, k = np.split(rng.standard_normal((tokens, heads + kv_heads, size)).astype(np.float32), [heads], axis=1)
    v = rng.standard_normal((tokens, kv_heads, columns)).astype(np.float32)
    sink = rng.standard_normal(heads).astype(np.float32)
    o, lse = np.zeros((tokens, heads, columns)), np.full((tokens, heads), 1e30)
    for start, count in zip(starts, counts, strict=True):
        for t in range(start, start + count):
            at = np.arange(max(start, t + 1 - window) if window else start, t + 1)
            for h in range(heads):
                s = k[at, h // (heads // kv_heads)].astype(float) @ q[t, h] * size**-0.5
                s = cap * np.tanh(s / cap) if cap else s
                o[t, h], lse[t, h] = _weighed(s, sink[h] if sinks else -np.inf, v[at, h // (heads // kv_heads)])
    options = "".join(f"-{n}{x:g}" for n, x in (("window", window), ("cap", cap), ("sinks", sinks)) if x)
    return Vector(f"ragged_attention_lse-{'+'.join(map(str, counts))}-H{heads}-K{kv_heads}-D{size}-E{columns}{options}",
                  "ragged_attention_lse", [np.empty(o.shape, np.float32), np.empty(lse.shape, np.float32)],
                  [q, k, v, starts, np.array(counts, np.int32), *([sink] if sinks else [])], [window, int(sinks)],
                  [size**-0.5, cap], [o, lse], TOLERANCE)


def _batched(batch: int, heads: int, kv_heads: int, tokens: int, keys: int, size: int, columns: int,
             causal: bool) -> Vector:
    """q, k and v as views of (B, tokens, heads, numbers)."""
    rng = np.random.default_rng(tokens + keys)
    q, k, v = (rng.standard_normal((batch, n, h, d)).astype(np.float32).swapaxes(1, 2) for n, h, d in
               ((tokens, heads, size), (keys, kv_heads, size), (keys, kv_heads, columns)))
    o, lse = np.zeros((batch, heads, tokens, columns)), np.zeros((batch, heads, tokens))
    for b, h, t in np.ndindex(lse.shape):
        seen, kv = t + keys - tokens + 1 if causal else keys, h // (heads // kv_heads)
        s = k[b, kv, :seen].astype(float) @ q[b, h, t] * size**-0.5
        o[b, h, t], lse[b, h, t] = _weighed(s, -np.inf, v[b, kv, :seen])
    name = f"attention_lse-B{batch}-H{heads}-K{kv_heads}-T{tokens}-S{keys}-D{size}-E{columns}" + "-causal" * causal
    return Vector(name, "attention_lse", [np.empty((batch, tokens, heads, columns), np.float32).swapaxes(1, 2),
                                          np.empty(lse.shape, np.float32)],
                  [q, k, v], [int(causal)], [size**-0.5], [o, lse], TOLERANCE)


MIXED = (1, 33, 0, 9, 8), (40, 5, 70, 0, 100)             # a decode, chunks of prompts, few tokens late in a sequence


def vectors() -> Iterator[Vector]:
    cases = [_Case((), ()), _Case((1,), (0,)), _Case((1, 1, 1), (31, 32, 100)), _Case((2, 8), (3, 40), group=1)]
    cases += [_Case(*MIXED, dtype=dtype, kv_heads=1) for dtype in PAGES]
    cases += [_Case((1, 2), (70, 33), dtype=dtype) for dtype in PAGES]
    cases += [_Case((1, 12), (37, 20), size, 1, group) for size, group in
              ((8, 1), (40, 4), (80, 1), (128, 8), (160, 2), (256, 5))]
    cases += [_Case((1, 40), (90, 60), 32, 1, 2, window=window, causal=causal, cap=cap, sinks=sinks)
              for window, causal, cap, sinks in ((1, True, 0, False), (40, True, 2, True), (0, False, 0, True),
                                                 (70, False, 5, False), (128, True, 0, False))]
    # more than 1,024 tokens: split over threadgroups, one sequence being shorter than another's first part
    cases += [_Case((1, 1), (1300, 5), 32, 1, 2, dtype, sinks=sinks, width=50)
              for dtype, sinks in (("float16", True), ("int8", False))]
    cases += [_Case((1, 10), (1100, 3), 40, 1, 3, window=600, width=64)]
    yield from (case.vector() for case in cases)
    yield from (_ragged(*case) for case in (
        ((1,), 1, 1, 64, 64), ((40, 1, 0, 33), 4, 2, 64, 64), ((5, 70), 3, 1, 30, 17, 20, 3.0, True),
        ((9, 2), 2, 2, 3, 150)))
    yield from (_batched(*case) for case in (
        (1, 1, 1, 1, 1, 8, 8, True), (2, 4, 2, 33, 33, 64, 64, True), (2, 2, 1, 7, 50, 20, 36, True),
        (1, 3, 3, 40, 35, 64, 64, False)))

"""Attention over the paged cache, and of packed or batched rows without one (forwards)."""
from __future__ import annotations

from math import e, log2

from .rope import PAGE, check_pages, check_rows
from .steps import Dispatch, Operand, Scratch, Step, Unsupported, View, ceil, struct

PEEK = {"paged_attention": 6}                 # the input, lengths, whose largest number the runtime looks up
SHORT = 1024                                  # tokens up to which one threadgroup has all of a sequence's kv head
MANY = 9                                      # tokens of a step from which on a sequence is prefill's
SIMDGROUPS = 16                               # of a decode's threadgroup; 4 do for 8 pages
GROUPS = 2048                                 # threadgroups of a decode that are worth a split
LARGEST = 256                                 # head size


def paged_attention(step: Step) -> list[Dispatch]:
    (o,), (q, k_pages, v_pages, table, starts, counts, lengths, *others) = step.outputs, step.inputs
    window, causal, has_sinks, has_scales = step.ints
    scale, cap = step.floats
    scales = others[-2:] if has_scales else []
    check_rows(q, o)
    check_pages(k_pages, v_pages, *scales)
    (tokens, heads, size), kv_heads, (sequences, width) = q.shape, k_pages.shape[1], table.shape
    if size % 8 or size > LARGEST or heads % kv_heads:
        raise Unsupported(f"{heads} heads of {size} numbers over {kv_heads}")
    mixed = tokens > sequences and tokens >= MANY
    tiles = _tiles(tokens, heads // kv_heads, min(sequences, tokens // MANY))
    params = struct(sequences, tokens, tiles, width, k_pages.shape[0], *q.strides[:2], *o.strides[:2],
                    float(scale / cap if cap else scale * log2(e)), float(cap * log2(e)))
    named: dict[str, Operand] = dict(starts=starts, counts=counts, lengths=lengths, o=o, p=params)
    named |= dict(sinks=others[0]) if has_sinks else {}
    pages = dict(q=q, k_pages=k_pages, v_pages=v_pages, table=table)
    pages |= dict(zip(("k_scales", "v_scales"), scales, strict=False))
    most = 8 if size <= 128 else 4                                       # heads that read k and v together: registers
    share = max(n for n in range(1, most + 1) if heads // kv_heads % n == 0)
    simdgroups = SIMDGROUPS if width > 8 else 4
    few = min(tokens, sequences * (MANY - 1)) if mixed else tokens       # of decode, at most
    splits = 1
    if (step.longest or width * PAGE) > SHORT:
        most = min(32, ceil(width, simdgroups), GROUPS // max(1, few * heads // share))
        splits = 1 << max(most, 1).bit_length() - 1                       # powers of two: few pipelines
    defines: dict[str, str | int] = dict(STORED=k_pages.type, D=size, E=size, SHARE=share, SIMDGROUPS=simdgroups,
                                         MANY=MANY)
    constants = dict(H=heads, KV=kv_heads, WINDOW=window, CAUSAL=bool(causal), SINKS=bool(has_sinks),
                     SCALES=bool(has_scales), CAPPED=cap > 0, SPLITS=splits, WIDTH=size, V_WIDTH=size,
                     MIXED=mixed, RAGGED=False)

    def dispatch(function: str, arguments: dict[str, Operand], groups: tuple[int, int, int], threads: int) -> Dispatch:
        return Dispatch("attention", function, arguments, groups, (threads, 1, 1), defines, constants)

    parts = dict(parts=Scratch(4 * few * heads * splits * (size + 2))) if splits > 1 else {}
    dispatches = [dispatch("decode", named | pages | parts, (heads // share, few, splits), 32 * simdgroups)]
    if parts:
        dispatches.append(dispatch("merge", named | parts, (heads, few, 1), 32))
    if mixed:
        dispatches.append(dispatch("prefill", named | pages, (kv_heads, tiles + ceil(tokens, PAGE), 1), 128))
    return dispatches


def _tiles(tokens: int, together: int, sequences: int) -> int:
    """Tiles of 32 rows that so many sequences need at most; a row is a token and one of `together` heads."""
    return (tokens * together + 31 * sequences) // 32


def ragged_attention_lse(step: Step) -> list[Dispatch]:
    (q, k, _, starts, counts, *sinks), (window, _) = step.inputs, step.ints
    tokens, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    tiles = _tiles(tokens, heads // kv_heads, min(starts.size, tokens))
    return _dense(step, tokens, starts.size, tiles, (kv_heads, tiles + ceil(tokens, PAGE), 1), (0, 1),
                  dict(starts=starts, counts=counts) | dict(zip(("sinks",), sinks, strict=False)),
                  dict(WINDOW=window, CAUSAL=True, SINKS=bool(sinks), RAGGED=True))


def attention_lse(step: Step) -> list[Dispatch]:
    (q, k, _), (causal,) = step.inputs, step.ints
    batch, heads, tokens, _ = q.shape
    rows = tokens * (heads // k.shape[1])
    return _dense(step, k.shape[2], batch, 0, (k.shape[1], ceil(rows, PAGE), batch), (2, 1, 0), {},
                  dict(WINDOW=0, CAUSAL=bool(causal), SINKS=False, RAGGED=False))


def _dense(step: Step, keys: int, sequences: int, tiles: int, groups: tuple[int, int, int], axes: tuple[int, ...],
           arguments: dict[str, View], constants: dict[str, int]) -> list[Dispatch]:
    """axes: of tokens, heads and, if each has its own keys, of sequences."""
    (o, lse), (q, k, v) = step.outputs, step.inputs[:3]
    check_rows(q, k, v, o)
    width, columns = q.shape[-1], v.shape[-1]
    if max(width, columns) > LARGEST or lse.dtype != "float32":
        raise Unsupported(f"heads of {width} and {columns} numbers")
    scale, cap = (*step.floats, 0.0)[:2]
    strides = [view.strides[axis] for view in (q, k, v, o, lse) for axis in axes + (axes[0],) * (3 - len(axes))]
    params = struct(sequences, q.shape[axes[0]], keys, tiles, *strides, float(scale / cap if cap else scale * log2(e)),
                    float(cap * log2(e)))
    rows: dict[str, Operand] = dict(q=q, k=k, v=v, o=o, lse=lse, p=params)
    return [Dispatch("attention", "dense", {**rows, **arguments}, groups, (128, 1, 1),
                     dict(STORED="float", D=8 * ceil(width, 8), E=8 * ceil(columns, 8), SHARE=1, SIMDGROUPS=1, MANY=0),
                     dict(H=q.shape[1], KV=k.shape[1], CAPPED=cap > 0, MIXED=False, WIDTH=width, V_WIDTH=columns)
                     | constants)]

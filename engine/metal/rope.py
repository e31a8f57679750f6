"""Rotary positions, with norms and the write into the cache's pages: the steps rope and rope_append."""
from __future__ import annotations

from .steps import Dispatch, Step, Unsupported, View, ceil, struct

PAGE = 32                                     # tokens
PAGES = ("float32", "float16", "bfloat16", "int8")
SIMDGROUPS = 4                                # heads of a threadgroup


def check_rows(*views: View) -> None:
    """Heads (T,H,D) of float32, each in one piece."""
    for view in views:
        if view.dtype != "float32" or (view.size and view.shape[-1] != 1 and view.strides[-1] != 1):
            raise Unsupported(f"heads of {view.dtype} with strides {view.strides}")


def check_pages(*pages: View) -> None:
    """The pages of k (N,K,D,32) and v (N,K,32,D), then their scales: read four numbers at a time."""
    for view in pages:
        if view.dtype not in PAGES or not view.contiguous or view.offset % 16:
            raise Unsupported(f"pages of {view.dtype} at byte {view.offset}, strides {view.strides}")
    if pages[0].shape[3] != PAGE or pages[0].dtype != pages[1].dtype:
        raise Unsupported(f"pages of {pages[0].shape[3]} tokens, {pages[0].dtype} and {pages[1].dtype}")


def rope(step: Step) -> list[Dispatch]:
    (y,), (x, positions, inv_freq) = step.outputs, step.inputs
    check_rows(x, y)
    tokens, heads, size = x.shape
    params = struct(heads, *x.strides[:2], *y.strides[:2], float(step.floats[0]))
    return [Dispatch("rope", "rope", dict(x=x, positions=positions, inv_freq=inv_freq, y=y, p=params),
                     (ceil(heads, SIMDGROUPS), tokens, 1), (32 * SIMDGROUPS, 1, 1), dict(STORED="float"),
                     dict(D=size, HALF=inv_freq.size, INTERLEAVED=bool(step.ints[0]), HAS_NORMS=False))]


def rope_append(step: Step) -> list[Dispatch]:
    (y, k_pages, v_pages, *scales), (q, k, v, _, _, positions, slots, inv_freq, *norms) = step.outputs, step.inputs
    interleaved, has_norms, has_scales = map(bool, step.ints)
    check_rows(q, k, v, y)
    check_pages(k_pages, v_pages, *scales)
    tokens, heads, size = q.shape
    kv_heads = k.shape[1]
    strides = [stride for view in (q, k, v, y) for stride in view.strides[:2]]
    arguments = dict(q=q, k=k, v=v, positions=positions, slots=slots, inv_freq=inv_freq, y=y, k_pages=k_pages,
                     v_pages=v_pages)
    arguments |= dict(zip(("q_norm", "k_norm"), norms[:2], strict=True)) if has_norms else {}
    arguments |= dict(zip(("k_scales", "v_scales"), scales, strict=False))
    params = struct(heads, kv_heads, k_pages.shape[0] * PAGE, *strides, *map(float, step.floats))
    return [Dispatch("rope", "rope_append", arguments | dict(p=params),
                     (ceil(heads + 2 * kv_heads, SIMDGROUPS), tokens, 1), (32 * SIMDGROUPS, 1, 1),
                     dict(STORED=k_pages.type),
                     dict(D=size, HALF=inv_freq.size, INTERLEAVED=interleaved, HAS_NORMS=has_norms,
                          HAS_SCALES=has_scales))]

"""mx.fft: discrete Fourier transforms by pocketfft in single precision: complex64 both ways, float32 real signals.
It is SciPy's where that is installed, which transforms several signals at once, 3 to 14 times faster than NumPy's.
`norm` says which direction is divided by the number of points: backward, forward, or ortho (both by its root)."""
from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import ops
from .array import Array
from .dtypes import Dtype, complex64, float32
from .host import host
from .node import Shape, apply, show
from .operands import array_of, axes_of, axis_of
from .primitives import linear

__all__ = ["fft", "fft2", "fftfreq", "fftn", "fftshift", "ifft", "ifft2", "ifftn", "ifftshift", "irfft", "irfft2",
           "irfftn", "istft", "rfft", "rfft2", "rfftfreq", "rfftn", "stft"]
DUAL = {"backward": "forward", "ortho": "ortho", "forward": "backward"}        # of the transposed transform
Axes = Sequence[int] | None
Transform = Callable[..., Array]


# rows: one of complex numbers along several axes, two between real and half of the complex ones along one

def _transform(name: str, shape: Callable[..., Shape], dtype: Dtype, fn: Callable[..., Any],
               transpose: Callable[..., Array]) -> Callable[..., Array]:
    def op(x: Array, **params: Any) -> Array:
        return Array.of(apply(primitive, x._value, **params)[0])

    def batch(xs: list[Array], batched: list[bool], **params: Any) -> list[Array]:
        if "axes" in params:
            return [op(xs[0], **params | {"axes": tuple(i + 1 for i in params["axes"])})]
        return [op(xs[0], **params | {"axis": params["axis"] + 1})]

    primitive = host(name, lambda x, **params: [(shape(x.shape, **params), dtype)], fn, vmap=batch,
                     **linear(name, transpose))
    return op


@functools.cache
def _library() -> Any:
    try:
        return importlib.import_module("scipy.fft")
    except ImportError:
        return np.fft


def _sized(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1:])


def _real_transpose(ct: Array, x: Array, axis: int, norm: str) -> Array:
    """The cotangent of a real signal: the frequencies that rfft leaves out are zero."""
    return ops.real(_fft(_resized(ct, axis, x.shape[axis]), axes=(axis,), inverse=True, norm=DUAL[norm]))


def _half_transpose(ct: Array, x: Array, axis: int, n: int, norm: str) -> Array:
    """irfft reads all frequencies but the first and, if n is even, the last one twice."""
    once = [0, n // 2] if n % 2 == 0 else [0]
    count = Array(np.where(np.isin(np.arange(n // 2 + 1), once), 1, 2), float32)
    return _rfft(ct, axis=axis, norm=DUAL[norm]) * ops.reshape(count, _sized((1,) * ct.ndim, axis, n // 2 + 1))


_fft: Transform = _transform(
    "fft", lambda shape, **_: shape, complex64,
    lambda x, axes, inverse, norm: (_library().ifftn if inverse else _library().fftn)(x, axes=axes, norm=norm),
    lambda ct, x, axes, inverse, norm: _fft(ct, axes=axes, inverse=not inverse, norm=DUAL[norm]))
_rfft: Transform = _transform(
    "rfft", lambda shape, axis, norm: _sized(shape, axis, shape[axis] // 2 + 1), complex64,
    lambda x, axis, norm: _library().rfft(x, axis=axis, norm=norm), _real_transpose)
_irfft: Transform = _transform(
    "irfft", lambda shape, axis, n, norm: _sized(shape, axis, n), float32,
    lambda x, axis, n, norm: _library().irfft(x, n, axis=axis, norm=norm), _half_transpose)


# functions

def _resized(a: Array, axis: int, n: int) -> Array:
    """Cut, or padded with zeros, at the end of an axis."""
    size = a.shape[axis]
    if n < size:
        return a[(slice(None),) * axis + (slice(n),)]
    return ops.pad(a, [(0, n - size if i == axis else 0) for i in range(a.ndim)]) if n > size else a


def _prepared(name: str, a: Any, s: Sequence[int] | None, axes: Axes, norm: str, complexes: bool = True,
              half: bool = False) -> tuple[Array, tuple[int, ...], int]:
    """The array with the wanted sizes, the axes in the order given, and the size of the last one."""
    a = array_of(a)
    if norm not in DUAL:
        raise ValueError(f'[{name}] norm {norm!r}: "backward", "ortho" or "forward" wanted')
    if not complexes and a.dtype is complex64:
        raise ValueError(f"[{name}] complex64{show(a.shape)}: real numbers wanted")
    order = range(-len(s) if s else -a.ndim, 0) if axes is None else axes
    named = tuple(axis_of(name, i, a.ndim) for i in order)
    axes_of(name, named, a.ndim)
    if not named:
        raise ValueError(f"[{name}] {show(a.shape)}: at least one axis wanted")
    sizes = [a.shape[i] for i in named] if s is None else list(s)
    if s is None and half:
        sizes[-1] = 2 * (sizes[-1] - 1)
    if len(sizes) != len(named) or min(sizes) < 1:
        raise ValueError(f"[{name}] sizes {show(sizes)} for axes {show(named)}: one size of at least 1 for each wanted")
    a = ops.astype(a, complex64 if complexes else float32)
    for axis, n in zip(named, sizes, strict=True):
        a = _resized(a, axis, n // 2 + 1 if half and axis == named[-1] else n)
    return a, named, sizes[-1]


def _between_complex(name: str, inverse: bool, a: Any, s: Sequence[int] | None, axes: Axes, norm: str) -> Array:
    a, named, _ = _prepared(name, a, s, axes, norm)
    return _fft(a, axes=named, inverse=inverse, norm=norm)


def _from_real(name: str, a: Any, s: Sequence[int] | None, axes: Axes, norm: str) -> Array:
    a, named, _ = _prepared(name, a, s, axes, norm, complexes=False)
    out = _rfft(a, axis=named[-1], norm=norm)
    return _fft(out, axes=named[:-1], inverse=False, norm=norm) if named[:-1] else out


def _to_real(name: str, a: Any, s: Sequence[int] | None, axes: Axes, norm: str) -> Array:
    a, named, n = _prepared(name, a, s, axes, norm, half=True)
    a = _fft(a, axes=named[:-1], inverse=True, norm=norm) if named[:-1] else a
    return _irfft(a, axis=named[-1], n=n, norm=norm)


def _sizes(n: int | None) -> tuple[int, ...] | None:
    return None if n is None else (n,)


def fft(a: Any, n: int | None = None, axis: int = -1, norm: str = "backward") -> Array:
    """The transform along one axis; n: its size, by cutting or zeros at the end."""
    return _between_complex("fft", False, a, _sizes(n), (axis,), norm)


def ifft(a: Any, n: int | None = None, axis: int = -1, norm: str = "backward") -> Array:
    """The inverse of fft."""
    return _between_complex("ifft", True, a, _sizes(n), (axis,), norm)


def rfft(a: Any, n: int | None = None, axis: int = -1, norm: str = "backward") -> Array:
    """fft of real numbers: only the first n // 2 + 1 frequencies, which determine the rest."""
    return _from_real("rfft", a, _sizes(n), (axis,), norm)


def irfft(a: Any, n: int | None = None, axis: int = -1, norm: str = "backward") -> Array:
    """The inverse of rfft. Without n the size is even: 2 (N - 1)."""
    return _to_real("irfft", a, _sizes(n), (axis,), norm)


def fft2(a: Any, s: Sequence[int] | None = None, axes: Axes = (-2, -1), norm: str = "backward") -> Array:
    """fft along two axes."""
    return _between_complex("fft2", False, a, s, axes, norm)


def ifft2(a: Any, s: Sequence[int] | None = None, axes: Axes = (-2, -1), norm: str = "backward") -> Array:
    """The inverse of fft2."""
    return _between_complex("ifft2", True, a, s, axes, norm)


def rfft2(a: Any, s: Sequence[int] | None = None, axes: Axes = (-2, -1), norm: str = "backward") -> Array:
    """rfft along the last of two axes, fft along the first."""
    return _from_real("rfft2", a, s, axes, norm)


def irfft2(a: Any, s: Sequence[int] | None = None, axes: Axes = (-2, -1), norm: str = "backward") -> Array:
    """The inverse of rfft2."""
    return _to_real("irfft2", a, s, axes, norm)


def fftn(a: Any, s: Sequence[int] | None = None, axes: Axes = None, norm: str = "backward") -> Array:
    """fft along several axes (all); s: their sizes."""
    return _between_complex("fftn", False, a, s, axes, norm)


def ifftn(a: Any, s: Sequence[int] | None = None, axes: Axes = None, norm: str = "backward") -> Array:
    """The inverse of fftn."""
    return _between_complex("ifftn", True, a, s, axes, norm)


def rfftn(a: Any, s: Sequence[int] | None = None, axes: Axes = None, norm: str = "backward") -> Array:
    """rfft along the last of several axes (all), fft along the others; s: their sizes."""
    return _from_real("rfftn", a, s, axes, norm)


def irfftn(a: Any, s: Sequence[int] | None = None, axes: Axes = None, norm: str = "backward") -> Array:
    """The inverse of rfftn."""
    return _to_real("irfftn", a, s, axes, norm)


def fftfreq(n: int, d: float = 1.0) -> Array:
    """The frequencies of fft's results in cycles per unit of the sample spacing d."""
    return Array(np.fft.fftfreq(n, d), float32)


def rfftfreq(n: int, d: float = 1.0) -> Array:
    """The frequencies of rfft's results in cycles per unit of the sample spacing d."""
    return Array(np.fft.rfftfreq(n, d), float32)


def fftshift(a: Any, axes: int | Sequence[int] | None = None) -> Array:
    """Frequency 0 moved to the middle."""
    a = array_of(a)
    named = axes_of("fftshift", axes, a.ndim)
    return ops.roll(a, [a.shape[i] // 2 for i in named], named)


def ifftshift(a: Any, axes: int | Sequence[int] | None = None) -> Array:
    """The inverse of fftshift."""
    a = array_of(a)
    named = axes_of("ifftshift", axes, a.ndim)
    return ops.roll(a, [-(a.shape[i] // 2) for i in named], named)


# short-time transforms

def _frames(n_fft: int, hop: int, count: int) -> Array:
    """The sample numbers of each frame (count, n_fft)."""
    return ops.expand_dims(ops.arange(count) * hop, 1) + ops.arange(n_fft)


def _window(name: str, n_fft: int, hop: int | None, length: int | None, window: Array | None) -> tuple[Array, int]:
    """The window in the middle of n_fft points, and the hop."""
    hop = n_fft // 4 if hop is None else hop
    length = (n_fft if length is None else length) if window is None else window.shape[0]
    if hop < 1 or not 0 < length <= n_fft:
        raise ValueError(f"[{name}] n_fft {n_fft}, hop_length {hop}, window of {length}: a hop of at least 1 and "
                         "a window of 1 to n_fft points wanted")
    before = (n_fft - length) // 2
    return ops.pad(ops.ones((length,)) if window is None else window, [(before, n_fft - length - before)]), hop


def stft(x: Any, n_fft: int = 2048, hop_length: int | None = None, win_length: int | None = None,
         window: Array | None = None, center: bool = True, pad_mode: str = "reflect", norm: str = "backward",
         onesided: bool | None = None) -> Array:
    """Transforms of overlapping windows of the last axis: (…, samples) -> (…, frequencies, frames). onesided: only
    frequencies from 0 on, as real signals have them by default."""
    x = array_of(x)
    window, hop = _window("stft", n_fft, hop_length, win_length, window)
    if center:
        x = ops.pad(x, [(0, 0)] * (x.ndim - 1) + [(n_fft // 2, n_fft // 2)], mode=pad_mode)
    if x.shape[-1] < n_fft:
        raise ValueError(f"[stft] {show(x.shape)}: {x.shape[-1]} samples, at least n_fft = {n_fft} wanted")
    frames = ops.take(x, _frames(n_fft, hop, (x.shape[-1] - n_fft) // hop + 1), -1) * window
    onesided = x.dtype is not complex64 if onesided is None else onesided
    return ops.swapaxes(rfft(frames, norm=norm) if onesided else fft(frames, norm=norm), -1, -2)


def istft(stft_matrix: Any, n_fft: int | None = None, hop_length: int | None = None, win_length: int | None = None,
          window: Array | None = None, center: bool = True, norm: str = "backward", onesided: bool | None = None,
          length: int | None = None) -> Array:
    """The signal whose stft this is: windows added where they overlap, divided by the sum of the squared windows."""
    z, onesided = array_of(stft_matrix), onesided is not False
    n_fft = n_fft or (2 * (z.shape[-2] - 1) if onesided else z.shape[-2])
    window, hop = _window("istft", n_fft, hop_length, win_length, window)
    spectra = ops.swapaxes(z, -1, -2)
    frames = (irfft(spectra, n_fft, norm=norm) if onesided else ifft(spectra, n_fft, norm=norm)) * window
    at = _frames(n_fft, hop, z.shape[-1])
    size = n_fft + hop * (z.shape[-1] - 1)
    added = ops.zeros((*z.shape[:-2], size), frames.dtype).at[..., at].add(frames)
    weight = ops.zeros((size,)).at[at].add(ops.broadcast_to(ops.square(window), at.shape))
    signal = added / ops.maximum(weight, 1e-10)
    if center:
        signal = signal[..., n_fft // 2:size - n_fft // 2]
    return signal if length is None else _resized(signal, signal.ndim - 1, length)

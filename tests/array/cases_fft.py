"""Fourier transforms against NumPy's in double precision, short-time ones against SciPy's."""
from __future__ import annotations

import numpy as np
import scipy.signal
from cases import Case, Input

from lazulite.engine import array as mx

X, Z = (2, 5, 6), Input((2, 5, 6), "complex")
HANN = np.hanning(9)[:-1]


def row(name: str, *args, given=X, **options) -> Case:
    label = " ".join(str(v) for v in (*args, *options.values()))
    fn, reference = getattr(mx.fft, name), getattr(np.fft, name)
    return Case(f"fft.{name} {label}".strip(), lambda x: fn(x, *args, **options),
                lambda x: reference(x, *args, **options), (given,), half=False)


def stft_reference(x, hop=2):
    padded = np.pad(x, [(0, 0), (4, 4)], mode="reflect")
    frames = np.stack([padded[:, i:i + 8] * HANN for i in range(0, padded.shape[1] - 7, hop)], 1)
    return np.fft.rfft(frames).swapaxes(-1, -2)


def itself(x):
    if not x.shape[-1]:
        raise ValueError("no samples")
    return x


def window():
    return mx.array(HANN, mx.float32)


def istft_reference(x):
    z = np.fft.rfft(x.reshape(2, 8, 5).swapaxes(-1, -2), 8).swapaxes(-1, -2)
    return scipy.signal.istft(z / np.sum(HANN), window=HANN, nperseg=8, noverlap=6, boundary=True)[1]


CASES = [
    row("fft", given=Z), row("ifft", given=Z), row("fft", 4), row("fft", 8, 1, given=Z),
    row("ifft", None, 0, "ortho", given=Z), row("rfft"), row("rfft", 9, 1), row("rfft", norm="forward"),
    row("irfft", given=Z), row("irfft", 7, 1, given=Z), row("irfft", 4, norm="ortho", given=Z), row("fft2", given=Z),
    row("ifft2", (4, 8), given=Z), row("rfft2"), row("irfft2", (5, 6), given=Z), row("fftn", given=Z),
    row("ifftn", (3, 2), (0, 2), "forward", given=Z), row("rfftn", (3, 4), (2, 0)),
    row("irfftn", None, (0, 1), given=Z), row("fftshift"), row("fftshift", (1,)), row("ifftshift", axes=(0, 2)),
    Case("fft.stft", lambda x: mx.fft.stft(x, 8, 2, window=window()), stft_reference, ((2, 20),), half=False),
    Case("fft.istft of stft", lambda x: mx.fft.istft(mx.fft.stft(x, 8, 2, window=window()), 8, 2, window=window()),
         itself, ((2, 20),), half=False),
    Case("fft.istft", lambda x: mx.fft.istft(mx.fft.rfft(x.reshape(2, 8, 5), axis=1), 8, 2, window=window()),
         istft_reference, ((2, 40),), half=False, vmap=False),
]

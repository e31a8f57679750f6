"""What the Python array API asks a namespace about itself. Source: https://data-apis.org/array-api/latest/API_specification"""
from __future__ import annotations

from typing import Any

from . import device as devices
from . import dtypes as dt
from .device import Device
from .dtypes import Dtype

MAX_DIMS = 8                         # of the runtimes' views


class ArrayNamespaceInfo:
    """The answers; `device` is accepted and changes none of them."""

    def capabilities(self) -> dict[str, Any]:
        return {"boolean indexing": False, "data-dependent shapes": False, "max dimensions": MAX_DIMS}

    def default_device(self) -> Device:
        return devices.default_device()

    def devices(self) -> tuple[Device, ...]:
        return tuple(Device(kind) for kind in devices.RUNTIMES if devices.is_available(kind))

    def default_dtypes(self, *, device: Device | None = None) -> dict[str, Dtype]:
        floats = {"real floating": dt.float32, "complex floating": dt.complex64}
        return floats | {"integral": dt.int32, "indexing": dt.int32}

    def dtypes(self, *, device: Device | None = None, kind: str | tuple[str, ...] | None = None) -> dict[str, Dtype]:
        """The standard's dtypes that are here, by name, of one kind or of several."""
        standard = [d for d in dt.DTYPES if d not in (dt.float16, dt.bfloat16)]
        return {d.name: d for d in standard if kind is None or dt.isdtype(d, kind)}


def __array_namespace_info__() -> ArrayNamespaceInfo:
    return ArrayNamespaceInfo()

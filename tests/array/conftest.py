import importlib
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from numpy_runtime import NumpyRuntime  # noqa: E402

from lazulite.engine.array import device  # noqa: E402

RUNTIMES = ["native", "numpy"] if os.environ.get("LAZULITE_DEVICE", "cpu") == "cpu" else ["native"]


@pytest.fixture(params=RUNTIMES)
def runtime(request, monkeypatch):
    """The default device's runtime, whose kernels run fused ops, and a NumPy one, where their definitions run."""
    evaluate = importlib.import_module("lazulite.engine.array.evaluate")
    chosen = device.runtime_of(device.default_device()) if request.param == "native" else NumpyRuntime()
    for part in ("plan", "lowering"):
        monkeypatch.setattr(importlib.import_module(f"lazulite.engine.array.{part}"), "runtime", lambda: chosen)
    monkeypatch.setattr(evaluate, "PLANS", evaluate.Cache())
    return chosen

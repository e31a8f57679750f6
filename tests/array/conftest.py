import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from numpy_runtime import NumpyRuntime  # noqa: E402

from lazulite.engine import cpu  # noqa: E402


@pytest.fixture(params=["native", "numpy"])
def runtime(request, monkeypatch):
    """The CPU runtime, whose kernels run fused ops, and a NumPy one, where their definitions run."""
    evaluate = importlib.import_module("lazulite.engine.array.evaluate")
    chosen = cpu.runtime() if request.param == "native" else NumpyRuntime()
    for part in ("plan", "lowering"):
        monkeypatch.setattr(importlib.import_module(f"lazulite.engine.array.{part}"), "runtime", lambda: chosen)
    monkeypatch.setattr(evaluate, "PLANS", evaluate.Cache())
    return chosen

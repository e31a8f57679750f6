"""Every test of a kernel takes `isa` and so runs once per instruction set that this machine has."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lazulite.engine import cpu


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", cpu.runtime().isas())


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def threads() -> Any:
    """Sets the number of threads, also to more than there are cores; the number from before comes back afterwards."""
    runtime = cpu.runtime()
    before = runtime.threads
    yield runtime._library.lz_set_threads
    runtime.set_threads(before)


@pytest.fixture
def ulps() -> Callable[[Any, Any], float]:
    """Largest distance of a float32 result from a float64 reference, in units in the last place of the reference."""

    def distance(result: Any, reference: Any) -> float:
        rounded = np.asarray(reference).astype(np.float32)
        same = (result == rounded) | (np.isnan(result) & np.isnan(rounded))
        with np.errstate(invalid="ignore"):
            error = np.abs(result - np.asarray(reference, np.float64)) / np.spacing(np.abs(rounded).astype(np.float32))
        return float(np.max(np.where(same, 0, error), initial=0))

    return distance

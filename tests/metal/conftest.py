import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from lazulite.engine.errors import UserError  # noqa: E402
from lazulite.engine.metal import emulated, msl  # noqa: E402
from lazulite.engine.metal.encoders import encode  # noqa: E402
from lazulite.engine.metal.steps import Unsupported  # noqa: E402
from lazulite.engine.metal.vectors import bind, vectors  # noqa: E402


@pytest.fixture(scope="session")
def compiled():
    """The sources of all vectors, compiled side by side. What fails here fails again, and is reported, in its test."""
    def compile_all(vector):
        with contextlib.suppress(UserError, Unsupported):
            for d in encode(bind(vector)[0]):
                emulated.compile_kernels(msl.source(d.file, d.defines, d.source))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(compile_all, vectors()))

"""Every vector of every kernel on the emulated GPU, under four schedules, against NumPy in float64."""
import pytest

from lazulite.engine.metal import emulated
from lazulite.engine.metal.encoders import encode
from lazulite.engine.metal.vectors import bind, compare, results, vectors

SCHEDULES = {0: "in turn", 1: "a simdgroup as far as it goes, groups backwards", 2: "at random", 3: "at random again"}


@pytest.mark.parametrize("vector", list(vectors()), ids=lambda vector: vector.id)
def test_kernel(vector, compiled):
    for schedule in SCHEDULES:
        step, buffers = bind(vector)
        emulated.run(encode, step, buffers, schedule)
        assert compare(vector, results(step, buffers)) is None, SCHEDULES[schedule]

"""Each barrier is taken out of each kernel file once: the vectors must miss it."""
import re

import pytest

from lazulite.engine.metal import emulated, msl
from lazulite.engine.metal.encoders import encode
from lazulite.engine.metal.steps import Unsupported
from lazulite.engine.metal.vectors import bind, compare, results, vectors

BARRIER = re.compile(r"\b(threadgroup|simdgroup)_barrier\(mem_flags::mem_(threadgroup|device)[^;]*\)")
FILES = sorted(path.stem for path in msl.FOLDER.glob("*.metal") if BARRIER.search(path.read_text()))
# Barriers whose absence no schedule can show here: attention: a shuffle after it is a meeting, though no fence;
# reduce: what is written again is the same value; sample: a barrier orders device memory, too, and a later one follows.
UNSEEN = {"attention": 1, "reduce": 1, "sample": 2}


def using(file):
    """Vectors whose dispatches are of this file, the small ones first."""
    found = []
    for vector in vectors():
        try:
            dispatches = encode(bind(vector)[0])
        except Unsupported:
            continue
        if any(d.file == file for d in dispatches):
            found.append((sum(d.groups[0] * d.groups[1] * d.groups[2] for d in dispatches), vector))
    return [vector for _, vector in sorted(found, key=lambda pair: pair[0])]


def is_right(vector, schedule):
    step, buffers = bind(vector)
    try:
        emulated.run(encode, step, buffers, schedule)
    except (RuntimeError, IndexError):
        return False
    return compare(vector, results(step, buffers)) is None


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_barriers_are_missed(file, monkeypatch):
    text, source, chosen = (msl.FOLDER / f"{file}.metal").read_text(), msl.source, using(file)
    unseen = []
    for barrier in BARRIER.finditer(text):
        mutant = f"{text[:barrier.start()]}(void)0{text[barrier.end():]}"
        monkeypatch.setattr(msl, "source", lambda name, defines=None, own="", mutant=mutant: source(
            name, defines, mutant if name == file and not own else own))
        if all(is_right(vector, schedule) for vector in chosen for schedule in (1, 2)):
            unseen.append(text.count("\n", 0, barrier.start()) + 1)
    assert len(unseen) <= UNSEEN.get(file, 0), f"{file}.metal: nobody misses the barriers of lines {unseen}"

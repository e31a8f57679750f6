"""A run goes on bit for bit after kill -9 at any moment, a full disk, or Ctrl-C; the best adapter is kept."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lazulite import lora
from lazulite.engine.errors import UserError
from lazulite.lora import state
from lazulite.lora.session import Session
from lazulite.lora.settings import Settings

LINES = ["the cat sat on the mat", "a dog ran", "birds fly south in the autumn", "rain falls", "one two three four",
         "hello there", "what is this", "a longer line with several more words in it", "short", "the end of it"]
CHILD = """
import os, runpy, signal, sys
from lazulite.models import build, read
from lazulite.lora.session import Session
from lazulite.lora.settings import Settings
tests, model, data, adapter, resume, step, replaced = sys.argv[1:]
letters, replace, count = runpy.run_path(tests + "/letters.py")["Letters"](), os.replace, 0
def dying(*args):
    global count
    count += 1
    if count == int(replaced):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
os.replace = dying
def listen(what, numbers):
    if what == "step" and numbers["step"] == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
settings = Settings(data=data, adapter=adapter, rank=2, dropout=0.1, iters=9, batch_size=2, accumulate=2,
                    save_every="2", eval_every="3", samples=0, schedule="cosine", warmup="2", learning_rate=0.01,
                    resume=resume == "1")
Session(settings, build(read(model)), letters, listen).run()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, lines in ("train", LINES), ("valid", LINES[:3]):
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def settings(folder: Path, **options) -> Settings:
    usual = dict(data=str(folder), adapter=str(folder / "out"), rank=2, iters=6, batch_size=2, samples=0,
                 save_every="2", eval_every="2", learning_rate=0.01)
    return Settings(**{**usual, **options})


def session(pairs, tiny, letters, folder, listen=lambda what, n: None, **options) -> Session:
    return Session(settings(folder, **options), pairs.ours(tiny), letters, listen)


def child(tiny: Path, folder: Path, out: str, resume: bool, step: int = 0, replaced: int = 0) -> int:
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), tiny, folder, folder / out, str(int(resume)),
               str(step), str(replaced)]
    return subprocess.run(list(map(str, command)), capture_output=True, timeout=300).returncode


def result(folder: Path) -> dict[str, object]:
    """Everything that a run leaves but seconds."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("adapter*"))}
    arrays = {name: array.tobytes() for name, array in load_file(folder / state.FILE).items()}
    events = [{k: v for k, v in json.loads(line).items() if k != "seconds"}
              for line in (folder / "log.jsonl").read_text().splitlines()]
    return {**files, **arrays, "events": events}


def test_killed_at_random_moments_it_ends_the_same(tiny, folder) -> None:
    assert child(tiny, folder, "whole", False) == 0
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))
    step, replaced = int(rng.integers(3, 9)), int(rng.integers(9, 16))
    assert child(tiny, folder, "parts", False, step=step) == -signal.SIGKILL
    killed = child(tiny, folder, "parts", True, replaced=replaced)       # in the middle of writing some file
    assert killed in (-signal.SIGKILL, 0)
    if killed:
        assert child(tiny, folder, "parts", True) == 0
    found, wanted = result(folder / "parts"), result(folder / "whole")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == value, (name, step, replaced)


@pytest.mark.parametrize("tokens", [0, 64])
def test_ctrl_c_saves_and_resume_goes_on(tokens, pairs, tiny, letters, folder) -> None:
    session(pairs, tiny, letters, folder, adapter=str(folder / "whole"), batch_tokens=tokens).run()
    first = session(pairs, tiny, letters, folder, batch_tokens=tokens)
    first.run(lambda: first.progress.step == 3)
    assert state.read(folder / "out").step == 3
    session(pairs, tiny, letters, folder, batch_tokens=tokens, resume=True).run()
    found, wanted = (result(folder / name) for name in ("out", "whole"))
    found["events"] = [event for event in found["events"] if event not in wanted["events"]]
    assert not found["events"]
    assert {k: v for k, v in found.items() if k != "events"} == {k: v for k, v in wanted.items() if k != "events"}


def test_a_full_disk_leaves_the_last_state(pairs, tiny, letters, folder, monkeypatch) -> None:
    saved = []

    def listen(what: str, numbers: dict) -> None:
        if what == "saved" and not saved:
            saved.append((folder / "out" / state.FILE).read_bytes())
            monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))

    with pytest.raises(OSError, match=r"No space left on device.*out"):
        session(pairs, tiny, letters, folder, listen, eval_every="100").run()
    monkeypatch.undo()
    assert (folder / "out" / state.FILE).read_bytes() == saved[0]
    assert not list((folder / "out").glob("*partial*"))
    session(pairs, tiny, letters, folder, resume=True).run()
    assert state.read(folder / "out").step == 6


def test_the_best_is_kept_and_patience_ends_the_run(pairs, tiny, letters, folder) -> None:
    """The rate is so high that training gets worse."""
    heard = []
    it = session(pairs, tiny, letters, folder, lambda what, n: heard.append((what, n)), learning_rate=3.0, patience=2,
                 iters=50, eval_every="1", clip=0.0)
    it.run()
    losses = {n["step"]: n["loss"] for what, n in heard if what == "valid"}
    best = min(losses, key=losses.__getitem__)
    assert it.progress.step < 50 and it.progress.waited == 2 and it.progress.best_step == best
    model = pairs.ours(tiny)
    lora.load_adapter(model, folder / "out")
    fresh = session(pairs, tiny, letters, folder, adapter=str(folder / "other"))
    fresh.trainer.model = model
    from lazulite.lora.evaluation import score

    assert score(model, fresh.rows["valid"]).loss == pytest.approx(losses[best], rel=1e-5)


def test_validation_moves_nothing(pairs, tiny, letters, folder) -> None:
    for name, every in ("out", "1"), ("rarely", "100"):
        session(pairs, tiny, letters, folder, dropout=0.2, iters=4, eval_every=every, adapter=str(folder / name)).run()
    found, wanted = (load_file(folder / name / state.FILE) for name in ("out", "rarely"))
    assert all((found[name] == wanted[name]).all() for name in wanted)


def test_a_run_is_not_overwritten_and_resumes_as_it_was(pairs, tiny, letters, folder) -> None:
    session(pairs, tiny, letters, folder).run()
    with pytest.raises(UserError, match="holds a run already"):
        session(pairs, tiny, letters, folder)
    with pytest.raises(UserError, match="no state.safetensors"):
        session(pairs, tiny, letters, folder, resume=True, adapter=str(folder / "none"))
    (folder / "train.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    with pytest.raises(UserError, match="training rows are not those"):
        session(pairs, tiny, letters, folder, resume=True)


def test_rates_follow_optimizer_steps(pairs, tiny, letters, folder) -> None:
    """Ten rows, 2 x 2 a step: 2.5 steps an epoch, and a warm-up of two epochs is five steps."""
    heard = []
    session(pairs, tiny, letters, folder, lambda what, n: heard.append(n) if what == "step" else None, accumulate=2,
            iters=10, warmup="2 epochs", schedule="linear").run()
    rates = [n["learning_rate"] / 0.01 for n in heard]
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2], rtol=1e-5)


def test_fit_divides_the_same_step(pairs, tiny, letters, folder, monkeypatch) -> None:
    monkeypatch.setattr("lazulite.lora.memory.resident", lambda: 0)      # what else is in this process changes
    whole = session(pairs, tiny, letters, folder, batch_size=4, iters=3, adapter=str(folder / "whole"))
    limit = whole.estimate.total * 7 // 10
    smaller = session(pairs, tiny, letters, folder, batch_size=4, iters=3, fit=str(limit))
    chosen = smaller.settings
    assert smaller.estimate.total <= limit < whole.estimate.total and chosen.fit == ""
    assert chosen.batch_size * chosen.accumulate == 4 and (chosen.batch_size < 4 or chosen.checkpoint)
    whole.run()
    smaller.run()
    found, wanted = (session.progress for session in (smaller, whole))
    assert found.best == pytest.approx(wanted.best, rel=1e-3) and found.supervised == wanted.supervised
    with pytest.raises(UserError, match="the least that training takes"):
        session(pairs, tiny, letters, folder, batch_size=2, fit="1KB", adapter=str(folder / "no"))


def test_the_report_stands_alone(pairs, tiny, letters, folder) -> None:
    (folder / "valid.jsonl").write_text(json.dumps({"text": "a <b> & c in the valid rows"}) + "\n")
    session(pairs, tiny, letters, folder, samples=1, sample_tokens=4).run()
    page = (folder / "out" / "report.html").read_text()
    assert "http" not in page and "<script" not in page and "<b> & c" not in page
    assert page.count("<svg") == 3 and "polyline" in page and "after" in page and "learning rate" in page
    lines = (folder / "out" / "log.csv").read_text().splitlines()
    assert lines[0].startswith("step,loss,valid_loss") and sum(line.split(",")[1] != "" for line in lines) == 7

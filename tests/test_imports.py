"""Imports point downwards: cli → server → {models, quant, lora} → engine parts → engine.array. Read from the source."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("engine", "models", "quant", "lora", "server", "cli")
LOW = {"engine.array", "engine.errors"}
ENGINE = LOW | {"engine.nn", "engine.optimizers", "engine.generate"}
ALLOWED = {  # a part may import itself and these; engine.array knows the runtimes by name only
    "engine.errors": set(),
    "engine.cpu": {"engine.errors"},
    "engine.metal": {"engine.errors", "engine.cpu"},
    "engine.array": {"engine.errors"},
    "engine.nn": LOW,
    "engine.optimizers": LOW,
    "engine.generate": LOW | {"engine.nn"},
    "models": ENGINE,
    "quant": ENGINE,
    "lora": ENGINE,
    "server": ENGINE | {"models", "quant", "lora"},
    "cli": ENGINE | {"engine.cpu", "engine.metal", "models", "quant", "lora", "server"},
}


def part_of(dotted: str) -> str:
    """`lazulite.engine.nn.attention` is part `engine.nn`; `lazulite.models.llama` is part `models`."""
    words = dotted.split(".")[1:]
    return ".".join(words[:2]) if words and words[0] == "engine" else ".".join(words[:1])


def imports(path: Path) -> set[str]:
    """Every `lazulite.*` module that the file imports, relative and `from package import part` ones resolved."""
    module = ["lazulite", *path.relative_to(ROOT).with_suffix("").parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module[: len(module) - node.level]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            found |= {f"{source}.{name.name}" for name in node.names} if source == "lazulite.engine" else {source}
    return {name for name in found if name.startswith("lazulite.")}


FILES = [path for part in PARTS for path in (ROOT / part).rglob("*.py")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    here = part_of(".".join(["lazulite", *path.relative_to(ROOT).with_suffix("").parts]))
    wrong = {name for name in imports(path) if part_of(name) not in ALLOWED[here] | {here}}
    assert not wrong, f"{path.relative_to(ROOT)} ({here}) may import {sorted(ALLOWED[here])}, not {sorted(wrong)}"


def test_there_is_something_to_read() -> None:
    assert len(FILES) > 20

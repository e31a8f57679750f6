"""What happened at which step, as log.jsonl and log.csv beside the adapter."""
from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from ..engine.array.files import replacing

COLUMNS = ("step", "loss", "valid_loss", "test_loss", "learning_rate", "gradient_norm", "supervised", "tokens",
           "seconds")


class Log:
    """Events, each a dict with its step. Those after `step` are of a run that was cut off: they come again."""

    def __init__(self, folder: Path, step: int = -1):
        folder.mkdir(parents=True, exist_ok=True)
        self.jsonl, self.csv = folder / "log.jsonl", folder / "log.csv"
        self.events = [event for event in _lines(self.jsonl) if event["step"] <= step]
        with replacing(self.jsonl) as file:
            file.write("".join(json.dumps(event) + "\n" for event in self.events).encode())
        with replacing(self.csv) as file:
            file.write("".join(map(_row, [dict(zip(COLUMNS, COLUMNS, strict=True)), *self.events])).encode())

    def add(self, **event: Any) -> None:
        self.events.append(event)
        for path, line in (self.jsonl, json.dumps(event) + "\n"), (self.csv, _row(event)):
            with path.open("a", encoding="utf-8") as file:
                file.write(line)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Complete lines: the last one may be cut off."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text("utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            break
        if not isinstance(event, dict) or not isinstance(event.get("step"), int):
            break
        found.append(event)
    return found


def _row(event: dict[str, Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([event.get(column, "") for column in COLUMNS])
    return text.getvalue()

"""report.html: the curves, the settings and the model's answers before and after, in one file that needs no other."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.array.files import replacing

if TYPE_CHECKING:
    from .session import Session

Points = list[tuple[float, float]]
WIDTH, HEIGHT, LEFT, BOTTOM = 720, 260, 52, 28             # of a chart, and the room for its axes

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #667085; --line: #e4e7ec; --paper: #fff; --card: #f8f9fb;
        --a: #2f6feb; --b: #d9480f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --dim: #98a2b3; --line: #2c3442; --paper: #12161d; --card: #1a202a; --a: #6ea8fe;
          --b: #ff9f5a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 40px 24px; max-width: 800px; background: var(--paper); color: var(--ink);
       font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 40px 0 10px; }
p { margin: 0; color: var(--dim); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 24px 0; }
.tile { flex: 1 1 130px; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
        padding: 12px 14px; }
.tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: 13px; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--dim); font-size: 12px; }
.grid { stroke: var(--line); } .a { stroke: var(--a); } .b { stroke: var(--b); } .dot { fill: var(--b); }
.a, .b { fill: none; stroke-width: 2; stroke-linejoin: round; } .faint { stroke-width: 1; opacity: .3; }
.key { font-size: 13px; } .key i { display: inline-block; width: 18px; height: 3px; margin: 0 6px 3px 14px; }
table { width: 100%; border-collapse: collapse; font-size: 14px; } td { padding: 5px 12px 5px 0; vertical-align: top;
        border-bottom: 1px solid var(--line); } td:first-child { color: var(--dim); white-space: nowrap; width: 1%; }
td:last-child { overflow-wrap: anywhere; }
.sample { border: 1px solid var(--line); border-radius: 10px; padding: 4px 14px; margin: 12px 0;
          background: var(--card); }
.sample td { white-space: pre-wrap; border: 0; } .sample td:first-child { padding-right: 18px; }
"""


@dataclass
class Curve:
    points: Points
    style: str                         # CSS classes
    dots: bool = False


def write(path: Path, session: Session, after: Sequence[str], tested: float | None) -> None:
    """Writes the report of a run; `after` are the samples' answers now, `tested` the loss of the test split."""
    with replacing(path) as file:
        file.write(page(session, after, tested).encode())


def page(session: Session, after: Sequence[str], tested: float | None) -> str:
    progress, events = session.progress, session.log.events
    losses = points(events, "loss")
    rate = progress.tokens / progress.seconds if progress.seconds else 0.0
    tiles = {"steps": f"{progress.step:,}", "tokens learnt": f"{progress.supervised:,}",
             "tokens a second": f"{rate:,.0f}",
             "last training loss": _figure(losses[-1][1] if losses else None),
             "best validation loss": _figure(progress.best), "test loss": _figure(tested)}
    name = session.settings.model or "the default model"
    charts = [
        ("Loss", '<p class="key"><i style="background:var(--a)"></i>training, a step and a running mean'
                 '<i style="background:var(--b)"></i>validation</p>',
         [Curve(losses, "a faint"), Curve(smooth(losses), "a"), Curve(points(events, "valid_loss"), "b", dots=True)]),
        ("Learning rate", "", [Curve(points(events, "learning_rate"), "a")]),
        ("Norm of the gradient", "", [Curve(points(events, "gradient_norm"), "a")]),
    ]
    parts = [
        f"<h1>Fine-tuning {escape(Path(name).name)}</h1>",
        f"<p>{escape(str(session.folder))} · {escape(session.settings.data)}</p>",
        '<div class="tiles">', *(f'<div class="tile"><b>{v}</b><span>{k}</span></div>' for k, v in tiles.items() if v),
        "</div>",
        *(f"<h2>{title}</h2>{key}{chart(curves)}" for title, key, curves in charts),
        "<h2>Samples</h2>" if after else "", *samples(session, after),
        "<h2>Rows</h2>", table({split: str(tally) for split, tally in session.tallies.items()}),
        "<h2>Settings</h2>", table(about(session)),
    ]
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>Fine-tuning {escape(Path(name).name)}</title><style>{STYLE}</style><body>{''.join(parts)}</body>"
            "</html>\n")


def about(session: Session) -> dict[str, Any]:
    given = {key: value for key, value in asdict(session.settings).items() if value not in ("", [], {}, False)}
    skipped = {"steps skipped": session.progress.skipped} if session.progress.skipped else {}
    return given | skipped | {"learning": f"{len(session.paths)} layers", "memory, estimated": str(session.estimate),
                              "base": ", ".join(f"{k} {v}" for k, v in session.progress.base.items())}


def table(rows: dict[str, Any]) -> str:
    cells = (f"<tr><td>{escape(key.replace('_', ' '))}</td><td>{escape(str(value))}</td></tr>"
             for key, value in rows.items())
    return f"<table>{''.join(cells)}</table>"


def samples(session: Session, after: Sequence[str]) -> list[str]:
    decode = session.tokenizer.decode
    rows = [{"prompt": decode(prompt), "in the data": decode(wanted), "before": then, "after": now}
            for (prompt, wanted), then, now in zip(session.prompts(), session.progress.before, after, strict=False)]
    return [f'<div class="sample">{table(row)}</div>' for row in rows]


# curves

def points(events: Sequence[dict[str, Any]], key: str) -> Points:
    return [(event["step"], event[key]) for event in events if event.get(key) is not None]


def smooth(found: Points, share: float = 0.9) -> Points:
    """A running mean that forgets, corrected for its beginning."""
    mean, weight, result = 0.0, 0.0, []
    for step, value in found:
        mean, weight = share * mean + (1 - share) * value, share * weight + 1 - share
        result.append((step, mean / weight))
    return result


def chart(curves: list[Curve]) -> str:
    """An SVG of curves over the steps, with a grid at round numbers."""
    found = [point for curve in curves for point in curve.points]
    if not found:
        return "<p>nothing yet</p>"
    last = max(max(x for x, _ in found), 1)
    ticks = round_ticks(min(y for _, y in found), max(y for _, y in found))
    low, high = ticks[0], ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return (LEFT + x / last * (WIDTH - LEFT - 12),
                10 + (high - y) / (high - low) * (HEIGHT - BOTTOM - 10))

    body = []
    for tick in ticks:
        _, y = place(0, tick)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>'
                    f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in round_ticks(0, last):
        if tick <= last and tick == int(tick):
            x, _ = place(tick, low)
            body.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{tick:,.0f}</text>')
    for curve in curves:
        spots = [place(x, y) for x, y in curve.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        body.append(f'<polyline class="{curve.style}" points="{line}"/>')
        body += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in spots] if curve.dots else []
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(body)}</svg>'


def round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from below `low` to above `high`."""
    span = (high - low) or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(span / most))
    step = next(unit * factor for factor in (1, 2, 5, 10, 20) if span / (unit * factor) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

"""A bar chart as SVG: one group of bars a test, each group on its own scale."""
from html import escape

COLORS = ["#2451a8", "#6f7b8f", "#a9b3c2", "#d6dbe3"]  # the first contestant's stands out
WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 860, 215, 200, 17, 22, 82
NOTES = {
    "pp512": "prompt of 512 tokens",
    "tg128": "generation",
    "tg64 @ d4096": "generation after 4096 tokens",
    "tg128 b=8": "8 sequences at once",
    "tg128 b=16": "16 sequences at once",
}
TEXT = '<text x="{x}" y="{y}" fill="{fill}" {more}>{text}</text>'


def text(x: float, y: float, what: str, fill: str = "#1f2733", more: str = "") -> str:
    return TEXT.format(x=x, y=y, text=escape(what), fill=fill, more=more)


def group(y: int, title: str, values: dict[str, float]) -> list[str]:
    """The bars of one test, the first contestant's with its advantage over the best of the others."""
    first, *others = values.values()
    longest = max(1.0, *values.values())
    lines = [text(24, y + 13, title, more='font-weight="600"')]
    lines.append(text(24, y + 31, NOTES.get(title, ""), "#5b6676", 'font-size="12"'))
    for i, (value, color) in enumerate(zip(values.values(), COLORS, strict=False)):
        width = (WIDTH - LEFT - RIGHT) * value / longest
        label = f"{value:,.0f}" if value else "–"
        if i == 0 and value and max(others, default=0):
            label += f" · {value / max(others):.2f} × the best peer"
        bold = 'font-size="12" font-weight="600"' if i == 0 else 'font-size="12"'
        lines.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR - 3}" rx="2" fill="{color}"/>')
        lines.append(text(LEFT + width + 7, y + 12, label, "#1f2733" if i == 0 else "#5b6676", bold))
        y += BAR
    return lines


def chart(title: str, subtitle: str, results: dict[str, dict[str, float]]) -> str:
    """`results[test][contestant]` in tokens/s."""
    names = list(next(iter(results.values())))
    lines, x = [text(24, 32, title, more='font-size="18" font-weight="600"')], LEFT
    lines.append(text(24, 53, subtitle, "#5b6676", 'font-size="12"'))
    y = TOP
    for name, color in zip(names, COLORS, strict=False):
        lines.append(f'<rect x="{x}" y="{y - 10}" width="11" height="11" rx="2" fill="{color}"/>')
        lines.append(text(x + 16, y, name, more='font-size="12"'))
        x += 34 + 7 * len(name)
    y += GAP
    for test, values in results.items():
        lines += group(y, test, values)
        y += BAR * len(values) + GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
    head += 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="14">'
    background = f'<rect width="{WIDTH}" height="{y}" rx="10" fill="#ffffff"/>'
    return "\n".join([head, background, *lines, "</svg>\n"])

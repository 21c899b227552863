"""The results as one self-contained SVG: a panel for each workload, a bar for each proxy, as long as its rate.

It follows the reader's light or dark setting and needs no script, no font and no other file.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from report import Result, Row, number, rate_unit

COLUMNS = 2
FIGURES_WIDTH = 220  # beside the longest bar
CHARACTER_WIDTH = 7.3  # of a name, at most
BAR_WIDTH = 190
BAR_HEIGHT = 13
LINE_HEIGHT = 19
TITLE_HEIGHT = 44
MARGIN = 20
HEAD_HEIGHT = 64

STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f; }
.head { font-size: 17px; font-weight: 600; } .title { font-weight: 600; } .quiet { fill: #57606a; font-size: 11px; }
.label { text-anchor: end; } .own-text { font-weight: 600; }
.page { fill: #ffffff; } .own { fill: #0969da; } .other { fill: #8c959f; } .direct { fill: #d0d7de; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .quiet { fill: #9198a1; } .page { fill: #0d1117; }
  .own { fill: #4493f8; } .other { fill: #6e7681; } .direct { fill: #343b44; }
}
"""


def text(x: float, y: float, words: str, kind: str) -> str:
    """One line of it."""
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}">{escape(words)}</text>'


def kind_of(row: Row) -> str:
    """Whose bar it is."""
    return "own" if row.kind.startswith("es-proxy") else "direct" if row.kind == "direct" else "other"


def bar(row: Row, longest: float, unit: str, x: float, y: float, indent: float) -> list[str]:
    """A proxy's line: name, bar, figures."""
    kind, rate = kind_of(row), row.figures.get("rate", 0.0)
    width = max(1.0, BAR_WIDTH * rate / longest) if longest else 1.0
    words = f"{number(rate)} {unit}, p99 {number(row.figures.get('p99_ms'))} ms"
    cpu_us = row.figures.get("cpu_us", 0.0)
    if cpu_us:
        words += f", CPU {number(cpu_us)} µs" if cpu_us < 10_000 else f", CPU {number(cpu_us / 1000)} ms"
    baseline = y + BAR_HEIGHT - 2
    return [
        text(x + indent - 8, baseline, row.label, "label own-text" if kind == "own" else "label"),
        f'<rect x="{x + indent:.0f}" y="{y:.0f}" width="{width:.1f}" height="{BAR_HEIGHT}" rx="2" class="{kind}">'
        f"<title>{escape(f'{row.label}: {words}')}</title></rect>",
        text(x + indent + width + 6, baseline, words, "quiet"),
    ]


def panel(result: Result, x: float, y: float, indent: float) -> list[str]:
    """A workload."""
    rows = [row for row in result.rows if row.samples]
    longest = max((row.figures.get("rate", 0.0) for row in rows), default=0.0)
    unit = "MB/s" if result.workload.bulk else "/s"
    out = [
        text(x, y + 14, result.workload.title, "title"),
        text(x, y + 30, f"{result.workload.name}, {rate_unit(result.workload)}", "quiet"),
    ]
    for index, row in enumerate(rows):
        out += bar(row, longest, unit, x, y + TITLE_HEIGHT + index * LINE_HEIGHT, indent)
    return out


def draw(results: Sequence[Result], subtitle: str) -> str:
    """The whole chart."""
    shown = [result for result in results if result.rows]
    body: list[str] = []
    indent = 8 + CHARACTER_WIDTH * max((len(row.label) for result in shown for row in result.rows), default=0)
    panel_width = int(indent) + BAR_WIDTH + FIGURES_WIDTH
    tops = [HEAD_HEIGHT] * COLUMNS
    for result in shown:
        column = tops.index(min(tops))
        body += panel(result, MARGIN + column * panel_width, tops[column], indent)
        tops[column] += TITLE_HEIGHT + LINE_HEIGHT * len(result.rows) + MARGIN
    columns = min(COLUMNS, max(1, len(shown)))
    width, height = 2 * MARGIN + columns * panel_width, max(tops)
    head = "es-proxy beside other proxies, each on one core and recording what it can"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            f' role="img" aria-label="{escape(head)}">',
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{width}" height="{height}"/>',
            text(MARGIN, 28, head, "head"),
            text(MARGIN, 46, subtitle, "quiet"),
            *body,
            "</svg>\n",
        ]
    )

"""A picture of the medians: one panel a scenario and data set, one bar a contender, shorter is better."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from bench.bars import OURS
from bench.scenarios import Scenario

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.results import Measurement

_COLUMNS, _PANEL_WIDTH, _BAR_HEIGHT, _GAP = 3, 320, 16, 24
_NAME_WIDTH, _VALUE_WIDTH, _TITLE_HEIGHT = 96, 60, 26
# Grey text and mid-tone bars are legible on a white page and on a dark one.
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#777}.title{font-weight:600}.value{font-variant-numeric:tabular-nums}"
    ".bar{fill:#9aa5b1}.ours{fill:#d9822b}.range{stroke:#555;stroke-width:1.5}"
)


def picture(groups: Mapping[tuple[str, str], Sequence[Measurement]]) -> str:
    """An SVG of what was timed, by (data set, scenario)."""
    names = sorted({name for name, _ in groups})
    keys = [(name, scenario) for name in names for scenario in Scenario if (name, scenario) in groups]
    timed = {key: [line for line in groups[key] if line.wall is not None] for key in keys}
    panels = [(key, lines) for key, lines in timed.items() if lines]
    body, top, width = [], 0, _COLUMNS * (_PANEL_WIDTH + _GAP)
    for start in range(0, len(panels), _COLUMNS):
        row = panels[start : start + _COLUMNS]
        for column, ((name, scenario), lines) in enumerate(row):
            body.append(f'<g transform="translate({column * (_PANEL_WIDTH + _GAP)},{top})">')
            body += _panel(f"{name}: {scenario}", lines)
            body.append("</g>")
        top += _TITLE_HEIGHT + max(len(lines) for _, lines in row) * _BAR_HEIGHT + _GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {max(top, 1)}" width="{width}" role="img">'
    title = "<title>Seconds by scenario and program; shorter is better</title>"
    return "\n".join([head, title, f"<style>{_STYLE}</style>", *body, "</svg>", ""])


def _panel(title: str, lines: Sequence[Measurement]) -> list[str]:
    """One scenario: bars from the fastest to the slowest, a line for the range of the rounds."""
    spreads = sorted(((line.wall, line.contender) for line in lines if line.wall), key=lambda pair: pair[0].median)
    longest = max(spread.max for spread, _ in spreads)
    scale = (_PANEL_WIDTH - _NAME_WIDTH - _VALUE_WIDTH) / max(longest, 1e-9)
    parts = [f'<text class="title" x="0" y="14">{escape(title)}, seconds</text>']
    for number, (spread, name) in enumerate(spreads):
        y = _TITLE_HEIGHT + number * _BAR_HEIGHT
        kind, width = "bar ours" if name == OURS else "bar", spread.median * scale
        low, high = _NAME_WIDTH + spread.min * scale, _NAME_WIDTH + spread.max * scale
        parts += [
            f'<text x="0" y="{y + 10}">{escape(name)}</text>',
            f'<rect class="{kind}" x="{_NAME_WIDTH}" y="{y}" width="{width:.1f}" height="{_BAR_HEIGHT - 4}"/>',
            f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{y + 6}" y2="{y + 6}"/>',
            f'<text class="value" x="{high + 5:.1f}" y="{y + 10}">{spread.median:.2f}</text>',
        ]
    return parts

"""Draw ``docs/images/recover.svg`` from the first table of the README.

python benchmarks/readme_picture.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "images" / "recover.svg"
DENSE = "dense model"
SERIES = {"not repaired": "#c9ced6", "published method": "#6f8fb3", "`ghoststream recover`": "#c8502d"}
"""Rows of the table that are drawn, and their colours."""
TEXTS = ("C4", "WikiText-2")
REMOVED = (6, 9, 12)
TITLE = "Loss above the dense model, nats a token (lower is better)"
WIDTH, HEIGHT, BAR, TOP, FLOOR = 760, 300, 30, 76, 250


def gaps(readme: str) -> dict[str, list[float]]:
    """Return the losses above the dense model's by the first cell of a row; NaN where nothing was measured.

    The columns of the first table are C4 and WikiText-2 in turn, for 6, 9 and 12 layers.
    """
    found: dict[str, list[float]] = {}
    for line in re.findall(r"^\| (.*) \|$", readme, flags=re.MULTILINE):
        name, *cells = (cell.strip(" *").replace(",", "") for cell in line.split("|"))
        if len(cells) == len(TEXTS) * len(REMOVED) and name in (DENSE, *SERIES):
            found[name] = [
                math.log(float(cell)) if re.fullmatch(r"[\d.]+", cell) else math.nan for cell in cells
            ]
    dense = found.pop(DENSE)
    return {name: [loss - base for loss, base in zip(row, dense, strict=True)] for name, row in found.items()}


def picture(table: Mapping[str, list[float]]) -> str:
    """Return the picture: the loss above the dense model's, a panel for each text."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"',
        ' font-family="sans-serif" font-size="13" fill="#222222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="20" y="22" font-size="14">{TITLE}</text>',
        *_legend(),
    ]
    highest = max(gap for row in table.values() for gap in row if not math.isnan(gap))
    for index in range(len(TEXTS)):
        parts += _panel(table, index, (FLOOR - TOP) / highest)
    return "\n".join([*parts, "</svg>", ""])


def _legend() -> Iterator[str]:
    x = 20
    for name, colour in SERIES.items():
        label = name.strip("`")
        yield f'<rect x="{x}" y="34" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{x + 18}" y="45">{label}</text>'
        x += 46 + 7 * len(label)


def _panel(table: Mapping[str, list[float]], index: int, per_nat: float) -> Iterator[str]:
    left = 20 + index * (WIDTH // 2)
    width = len(REMOVED) * 115
    yield f'<line x1="{left}" y1="{FLOOR}" x2="{left + width}" y2="{FLOOR}" stroke="#888888"/>'
    for group, removed in enumerate(REMOVED):
        column = len(TEXTS) * group + index
        x = left + 8 + group * 115
        for place, (name, colour) in enumerate(SERIES.items()):
            gap = table[name][column]
            if not math.isnan(gap):
                yield from _bar(x + place * (BAR + 2), gap, gap * per_nat, colour)
        yield f'<text x="{x + 47}" y="{FLOOR + 18}" text-anchor="middle">{removed} layers</text>'
    place = f'x="{left + width // 2}" y="{FLOOR + 40}"'
    yield f'<text {place} text-anchor="middle" font-weight="bold">{TEXTS[index]}</text>'


def _bar(x: int, gap: float, height: float, colour: str) -> Iterator[str]:
    y = FLOOR - height
    yield f'<rect x="{x}" y="{y:.1f}" width="{BAR}" height="{height:.1f}" fill="{colour}"/>'
    yield f'<text x="{x + BAR // 2}" y="{y - 4:.1f}" text-anchor="middle" font-size="12">{gap:.2f}</text>'


if __name__ == "__main__":
    PICTURE.write_text(picture(gaps(README.read_text(encoding="utf-8"))), encoding="utf-8")

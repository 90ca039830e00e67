"""Draws who says what to whom, from text: docs/request.txt becomes docs/request.svg.

    python -m tools.sequence

The head of docs/request.txt tells its grammar. The same text gives the same bytes, so that
`tests/unit/test_documents.py` can hold the picture to it. Widths are counted in letters, for a
picture can't ask which font will show it: boxes leave room for a wide one.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
SOURCE, PICTURE = DOCS / "request.txt", DOCS / "request.svg"

# All in pixels, but for LETTERS.
LANE = 340  # from the middle of one process to the middle of the next
MARGIN = 185  # from the edge to the middle of the outer ones
LINE = 18  # from one line of text to the next
BOX = 290  # a box's width
LETTERS = 37  # to a line in it, and to what a message says
GAP = 16
HEAD = 64
STYLE = (
    "text{font-family:Helvetica,Arial,sans-serif;font-size:14px;fill:#222}"
    ".name{font-size:17px;font-weight:bold}.part{font-size:15px;font-weight:bold;fill:#345}"
    ".head{fill:#dfe8f5;stroke:#567}.does{fill:#fff7df;stroke:#b89b4a}"
    ".life{stroke:#9ab;stroke-dasharray:4 4}.says{stroke:#345;stroke-width:1.5}"
    ".rule{stroke:#ccd6e2}"
)
POINT = (
    '<defs><marker id="point" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
    '<path d="M0,0 L9,4 L0,8 z" fill="#345"/></marker></defs>'
)


@dataclass(frozen=True)
class Process:
    """A column."""

    name: str
    title: str
    about: str


@dataclass(frozen=True)
class Row:
    """A row: a heading (no process), what one does (`to` is empty), or a message."""

    text: str
    start: str = ""
    to: str = ""
    repeats: bool = False


def parse(text: str) -> tuple[list[Process], list[Row]]:
    """Columns and rows. Raises `ValueError` that names a line that is neither."""
    processes: list[Process] = []
    rows: list[Row] = []
    for line in text.splitlines():
        left, colon, right = (part.strip() for part in line.partition(":"))
        names = {process.name for process in processes}
        start, arrow, to = (part.strip() for part in left.partition(">"))
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("=="):
            rows.append(Row(line.removeprefix("==").strip()))
        elif left.startswith("process ") and colon:
            title, _, about = (part.strip() for part in right.partition("/"))
            processes.append(Process(left.removeprefix("process "), title, about))
        elif arrow and len(right) > LETTERS:
            raise ValueError(f"A message says at most {LETTERS} letters: {line!r}.")
        elif right and start in names and (to.lstrip("> ") in names if arrow else True):
            rows.append(Row(right, start, to.lstrip("> "), to.startswith(">")))
        else:
            raise ValueError(f"This is no line of a sequence: {line!r}.")
    return processes, rows


def draw(text: str) -> str:
    """The picture, as SVG."""
    processes, rows = parse(text)
    middle = {process.name: MARGIN + LANE * k for k, process in enumerate(processes)}
    width = 2 * MARGIN + LANE * (len(processes) - 1)
    drawn: list[str] = []
    y = GAP + HEAD + GAP
    for row in rows:
        if not row.start:
            y += GAP
            drawn.append(f'<line class="rule" x1="0" y1="{y}" x2="{width}" y2="{y}"/>')
            drawn.append(_text(GAP, y + LINE, row.text, "part", anchor="start"))
            y += LINE + GAP
        elif not row.to:
            lines = textwrap.wrap(row.text, LETTERS)
            height = LINE * len(lines) + 12
            x = middle[row.start]
            drawn.append(_box(x, y, BOX, height, "does"))
            drawn += [_text(x, y + LINE * (k + 1), line) for k, line in enumerate(lines)]
            y += height + GAP
        else:
            start, end = middle[row.start], middle[row.to]
            y += LINE
            drawn.append(_text((start + end) // 2, y - 6, row.text))
            dashes = ' stroke-dasharray="9 4"' if row.repeats else ""
            drawn.append(
                f'<line class="says" x1="{start}" y1="{y}" x2="{end}" y2="{y}"{dashes} '
                'marker-end="url(#point)"/>'
            )
            y += GAP
    y += GAP
    heads: list[str] = []
    for process in processes:
        x = middle[process.name]
        heads.append(f'<line class="life" x1="{x}" y1="{GAP + HEAD}" x2="{x}" y2="{y - GAP}"/>')
        heads.append(_box(x, GAP, BOX + GAP, HEAD, "head"))
        heads.append(_text(x, GAP + 26, process.title, "name"))
        heads.append(_text(x, GAP + 48, process.about))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" '
            f'viewBox="0 0 {width} {y}">',
            f"<style>{STYLE}</style>{POINT}",
            f'<rect width="{width}" height="{y}" fill="#fff"/>',
            *heads,
            *drawn,
            "</svg>\n",
        ]
    )


def _box(x: int, y: int, width: int, height: int, kind: str) -> str:
    left = x - width // 2
    return f'<rect class="{kind}" x="{left}" y="{y}" width="{width}" height="{height}" rx="6"/>'


def _text(x: int, y: int, text: str, kind: str = "", anchor: str = "middle") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def main() -> None:
    PICTURE.write_text(draw(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"drew {PICTURE.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()

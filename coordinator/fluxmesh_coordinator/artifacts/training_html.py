"""`report.html`: a training's loss curve and its progress pictures side by side, in one file.

Made from what lies in the output folder (`metrics.jsonl`, `*_progress.png`), so that it is the
same after a resume. The pictures are inside the file, the curve is SVG: it opens anywhere, and
loads nothing from elsewhere. The SVG is written here, for a plotting library would be a large
dependency for one polyline, and its file a picture whose points can't be read.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxmesh.storage.atomic import write_file

REPORT = "report.html"
METRICS = "metrics.jsonl"
PICTURE = re.compile(r"(\d{7,})_progress\.png")
WIDTH, HEIGHT, MARGIN = 860, 280, 48  # of the curve, in pixels
SPARSE = 30  # points of a curve, below which each is marked
SMOOTH = 0.9  # of the running mean beside the single updates

Point = tuple[float, float]

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em;
  color: #1d2430; background: #fff }}
h1 {{ font-size: 1.4em }} h2 {{ font-size: 1.1em; margin-top: 2em }}
table {{ border-collapse: collapse }} td {{ padding: .1em 1.5em .1em 0; vertical-align: top }}
td:first-child {{ color: #5b6675 }}
.pictures {{ display: flex; flex-wrap: wrap; gap: 12px }} figure {{ margin: 0 }}
figure img {{ display: block; width: 200px; image-rendering: auto }} figcaption {{ color: #5b6675 }}
svg {{ width: 100%; height: auto }} svg text {{ font-size: 12px; fill: #5b6675 }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def write_report(folder: Path, title: str, facts: Mapping[str, Any]) -> Path:
    """Writes the report of the run in `folder`, over an older one; returns its file.

    `facts` are told in a table as they stand. Raises `OutputError`.
    """
    metrics = folder / METRICS
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    entries = [json.loads(line) for line in lines]
    losses = [(e["iteration"], e["loss"]) for e in entries if e["event"] == "updated"]
    held_out = [(e["iteration"], e["loss"]) for e in entries if e["event"] == "validated"]
    parts = [_table(facts)]
    if losses:
        parts += ["<h2>Loss</h2>", curve(losses, held_out)]
    pictures = sorted(path for path in folder.iterdir() if PICTURE.fullmatch(path.name))
    if pictures:
        parts += ["<h2>Progress</h2>", '<div class="pictures">']
        parts += [_figure(path) for path in pictures]
        parts.append("</div>")
    page = _PAGE.format(title=html.escape(title), body="\n".join(parts))
    write_file(folder / REPORT, page.encode(), replace=True)
    return folder / REPORT


def curve(losses: Sequence[Point], held_out: Sequence[Point]) -> str:
    """The losses over the iterations, as SVG: single updates, their running mean, held out."""
    every = [*losses, *held_out]
    across = ticks(0, max(x for x, _ in every))
    up = ticks(min(0.0, min(y for _, y in every)), max(y for _, y in every))
    right, (low, high) = across[-1], (up[0], up[-1])

    def place(x: float, y: float) -> tuple[str, str]:
        left = MARGIN + x / right * (WIDTH - 2 * MARGIN)
        top = HEIGHT - MARGIN - (y - low) / (high - low) * (HEIGHT - 2 * MARGIN)
        return f"{left:.1f}", f"{top:.1f}"

    def line(points: Sequence[Point], style: str) -> str:
        places = " ".join(",".join(place(*point)) for point in points)
        return f'<polyline fill="none" stroke-linejoin="round" {style} points="{places}"/>'

    parts = []
    for y in up:
        x0, top = place(0, y)
        parts.append(f'<path stroke="#e6eaf0" d="M{x0} {top}H{WIDTH - MARGIN}"/>')
        parts.append(
            f'<text x="{MARGIN - 8}" y="{top}" dy="4" text-anchor="end">{_short(y)}</text>'
        )
    for x in across:
        left, foot = place(x, low)
        parts.append(f'<text x="{left}" y="{foot}" dy="20" text-anchor="middle">{_short(x)}</text>')
    parts.append(f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 8}" text-anchor="end">iterations</text>')
    kinds = [
        ("each update", losses, "#a9b9d0", 1),
        ("running mean", running_mean(losses), "#2463b5", 2),
        ("held out", held_out, "#c2571a", 2),
    ]
    left_of_name = MARGIN
    for name, points, colour, width in kinds:
        if not points:
            continue
        parts.append(line(points, f'stroke="{colour}" stroke-width="{width}"'))
        if width == 2 and len(points) < SPARSE:
            circles = (place(*point) for point in points)
            parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in circles]
        parts.append(f'<path stroke="{colour}" stroke-width="3" d="M{left_of_name} 14h18"/>')
        parts.append(f'<text x="{left_of_name + 24}" y="18">{name}</text>')
        left_of_name += 130
    drawn = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss">{drawn}</svg>'


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly apart, the first at or below `low` and the last at or above `high`."""
    rough = (high - low) / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9)) * power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _short(number: float) -> str:
    return f"{round(number, 10):.10g}"


def running_mean(points: Sequence[Point]) -> list[Point]:
    """An exponential mean that weighs its first values rightly."""
    total, weight, out = 0.0, 0.0, []
    for x, y in points:
        total, weight = SMOOTH * total + y, SMOOTH * weight + 1
        out.append((x, total / weight))
    return out


def _table(facts: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    iteration = int(path.name.partition("_")[0])
    return (
        f'<figure><img alt="iteration {iteration}" src="data:image/png;base64,{data}">'
        f"<figcaption>iteration {iteration}</figcaption></figure>"
    )

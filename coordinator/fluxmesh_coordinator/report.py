"""`report.html`: a training's loss curve and its progress pictures side by side, in one file.

Made from what lies in the output folder (`metrics.jsonl`, `*_progress.png`), so that it is the
same after a resume. The pictures are inside the file, the curve is SVG: it opens anywhere, and
loads nothing from elsewhere.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxmesh_coordinator.files import write_file

REPORT = "report.html"
METRICS = "metrics.jsonl"
PICTURE = re.compile(r"(\d{7,})_progress\.png")
WIDTH, HEIGHT, MARGIN = 860, 280, 48  # of the curve, in pixels
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
    left, right = 0.0, max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)
    if high == low:
        low, high = low - 1, high + 1

    def place(point: Point) -> str:
        x = MARGIN + (point[0] - left) / (right - left) * (WIDTH - 2 * MARGIN)
        y = HEIGHT - MARGIN + (point[1] - low) / (high - low) * (2 * MARGIN - HEIGHT)
        return f"{x:.1f},{y:.1f}"

    def line(points: Sequence[Point], style: str) -> str:
        return f'<polyline fill="none" {style} points="{" ".join(map(place, points))}"/>'

    marks = []
    for i in range(5):
        y = low + (high - low) * i / 4
        x = right * i / 4
        across, down = place((left, y)), place((x, low))
        marks.append(f'<text x="4" y="{across.split(",")[1]}" dy="4">{y:.3g}</text>')
        marks.append(
            f'<text x="{down.split(",")[0]}" y="{HEIGHT - MARGIN + 20}" text-anchor="middle">'
            f"{x:.0f}</text>"
        )
    drawn = [
        line(losses, 'stroke="#b9c6d8" stroke-width="1"'),
        line(running_mean(losses), 'stroke="#2463b5" stroke-width="2"'),
    ]
    legend = "light: each update; blue: their running mean"
    if held_out:
        drawn.append(line(held_out, 'stroke="#c2571a" stroke-width="2"'))
        legend += "; orange: held out"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss">{"".join(marks)}'
        f'{"".join(drawn)}<text x="{MARGIN}" y="16">{legend}</text></svg>'
    )


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

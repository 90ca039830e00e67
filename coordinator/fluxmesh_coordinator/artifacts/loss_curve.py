"""A training's losses as SVG, for `report.html`.

Written here, for a plotting library would be a large dependency for one polyline, and its file a
picture whose points can't be read. Colours are those of the page: `--grid`, `--faint`, `--mean`,
`--held`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH, HEIGHT, MARGIN = 860, 280, 48  # of the curve, in pixels
SPARSE = 30  # points of a curve, below which each is marked
SMOOTH = 0.9  # of the running mean beside the single updates

Point = tuple[float, float]


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
        parts.append(f'<path stroke="var(--grid)" d="M{x0} {top}H{WIDTH - MARGIN}"/>')
        parts.append(
            f'<text x="{MARGIN - 8}" y="{top}" dy="4" text-anchor="end">{_short(y)}</text>'
        )
    for x in across:
        left, foot = place(x, low)
        parts.append(f'<text x="{left}" y="{foot}" dy="20" text-anchor="middle">{_short(x)}</text>')
    parts.append(f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 8}" text-anchor="end">iterations</text>')
    kinds = [
        ("each update", losses, "var(--faint)", 1),
        ("running mean", running_mean(losses), "var(--mean)", 2),
        ("held out", held_out, "var(--held)", 2),
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

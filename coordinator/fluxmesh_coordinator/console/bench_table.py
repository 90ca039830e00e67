"""What `fluxmesh bench` prints: the machines, and a step of each model by size and placement. Pure.

Strings and dictionaries from a `BenchReport`, which `commands/bench.py` fills. The table is made to
be posted: it says on which chip, system and MLX it was measured, and what may have slowed it down.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fluxmesh.cluster.snapshot import LinkInfo, RingTiming
from fluxmesh.planning.plan import spoken
from fluxmesh.version import __version__
from fluxmesh_coordinator.console.columns import GAP, Column, fitted
from fluxmesh_coordinator.console.plan_table import ring_line

# How a narrow terminal is met.
LEAVE_OUT = ("first picture", "predicted picture", "weights", "picture")
SLOWER = 1.15  # times as long as the first steps are the last ones, where that is worth a sentence
FROM_ARITHMETIC = "arithmetic"  # what a step was reckoned from, where none was timed before


@dataclass(frozen=True, kw_only=True)
class BenchHost:
    """One host, and what computes there."""

    rank: int
    name: str
    chip: str
    memory_bytes: int  # of the machine; 0 is unknown
    mlx_version: str
    system: str  # "macOS 26.2"; "" where nobody could look
    remarks: tuple[str, ...] = ()  # sentences: what slows it down


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One model at one size, on some hosts: seconds, of a run in which all is warm."""

    model: str
    weights: str  # "bfloat16", "4 bits"
    height: int
    width: int
    placement: str
    hosts: tuple[int, ...]
    problem: str = ""  # why it was not measured
    predicted_step: float | None = None  # before anything ran
    predicted_from: str = ""  # which figure that came from
    step: float | None = None
    predicted_picture: float | None = None  # before the run that was measured
    picture: float | None = None  # from the request to its pixels
    first_picture: float | None = None  # the same in the run before, which loads and compiles
    slower: float = 1.0  # the last steps over the first ones


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """All that was found out."""

    hosts: tuple[BenchHost, ...]
    rows: tuple[BenchRow, ...]
    links: tuple[LinkInfo, ...] = ()
    rings: tuple[RingTiming, ...] = ()
    notes: tuple[str, ...] = ()  # sentences about the mesh


def lines(report: BenchReport, width: int, now: float) -> list[str]:
    """The whole of it; no line of the table is wider than `width`, if any of it can be left out.

    `now` is seconds since 1970.
    """
    made = [f"fluxmesh {__version__}", *map(host_line, report.hosts), ""]
    made += _aligned(fitted(columns(report.rows), width, LEAVE_OUT))
    rest = [*link_lines(report.links), *(ring_line(ring, now) for ring in report.rings)]
    rest += [*report.notes, *map(sentence, unmeasured(report.rows)), *remarks(report)]
    return [*made, "", *rest] if rest else made


def sentence(row: BenchRow) -> str:
    """A row as it is measured, for people who wait for the table."""
    hosts = f"host{'s' if len(row.hosts) > 1 else ''} {','.join(map(str, row.hosts))}"
    way = f"{shown(row.model)} at {row.height}x{row.width} by {row.placement} on {hosts}"
    if row.step is None or row.picture is None:  # one of `unmeasured`
        return f"{way}: not measured: {row.problem.rstrip('.')}."
    return f"{way}: {spoken(row.step)} a step, {spoken(row.picture)} in all."


def unmeasured(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """Those without figures: why, is a sentence that no column holds."""
    return [row for row in rows if row.step is None or row.picture is None]


def shown(model: str) -> str:
    """A model's name without the folders that it lies in: they are nobody else's business."""
    return os.path.basename(model.rstrip("/")) if os.path.isabs(model) else model


def host_line(host: BenchHost) -> str:
    memory = f"{host.memory_bytes / 1e9:.0f} GB" if host.memory_bytes else ""
    parts = (host.chip, memory, host.system, f"MLX {host.mlx_version}")
    return f"Host {host.rank} ({host.name}): {', '.join(filter(None, parts))}"


def columns(rows: Sequence[BenchRow]) -> list[Column]:
    """A column a kind of figure; a row that was not measured has none."""

    def seconds(values: Sequence[float | None]) -> tuple[str, ...]:
        return tuple("" if value is None else spoken(value) for value in values)

    return [
        Column("model", tuple(shown(row.model) for row in rows)),
        Column("weights", tuple(row.weights for row in rows)),
        Column("size", tuple(f"{row.height}x{row.width}" for row in rows)),
        Column("placement", tuple(row.placement for row in rows)),
        Column("hosts", tuple(",".join(map(str, row.hosts)) for row in rows)),
        Column("predicted step", seconds([row.predicted_step for row in rows]), right=True),
        Column("step", seconds([row.step for row in rows]), right=True),
        Column("predicted picture", seconds([row.predicted_picture for row in rows]), right=True),
        Column("picture", seconds([row.picture for row in rows]), right=True),
        Column("first picture", seconds([row.first_picture for row in rows]), right=True),
    ]


def _aligned(table: Sequence[Column]) -> list[str]:
    rows = [[column.heading for column in table]]
    rows += [list(cells) for cells in zip(*(column.cells for column in table), strict=True)]
    return [
        (" " * GAP)
        .join(
            cell.rjust(column.width) if column.right else cell.ljust(column.width)
            for column, cell in zip(table, row, strict=True)
        )
        .rstrip()
        for row in rows
    ]


def link_lines(links: Sequence[LinkInfo]) -> list[str]:
    """What `up` has measured with plain sockets, before any ring."""
    return [
        f"Link {link.source} to {link.target}: {link.rate / 1e9:.2f} GB/s, "
        f"{link.latency * 1e3:.2f} ms"
        for link in links
    ]


def remarks(report: BenchReport) -> list[str]:
    """What a reader of the table should know of how it came about."""
    made = [
        f"Host {host.rank}: {remark.rstrip('.')}."
        for host in report.hosts
        for remark in host.remarks
    ]
    made += [
        f"{shown(row.model)} at {row.height}x{row.width} by {row.placement} on hosts "
        f"{','.join(map(str, row.hosts))}: its last steps took {row.slower:.2f} times as long as "
        "its first ones, as on a chip that grows hot or that others use too."
        for row in report.rows
        if row.slower >= SLOWER
    ]
    if any(row.predicted_from == FROM_ARITHMETIC for row in report.rows):
        made.append(
            "Steps that nobody had timed before were predicted from the rate at which a chip "
            "multiplies matrices."
        )
    return made


def as_json(report: BenchReport) -> dict[str, Any]:
    """The last line of `bench --json`."""
    return {
        "event": "bench",
        "version": __version__,
        **asdict(report),
        "remarks": remarks(report),
    }

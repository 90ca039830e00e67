"""What `fluxmesh plan` prints: each way with its predicted time, beside what was last measured.

Strings and dictionaries from a `Plan`; only `show` touches rich. `now` is seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from fluxmesh.cluster.snapshot import MeshView, RingTiming
from fluxmesh.planning.collectives import fitted
from fluxmesh.planning.cost import Figure
from fluxmesh.planning.plan import Option, Phase, Plan

HEADINGS = (
    *("", "placement", "hosts", "time", "loading", "cold", "a step", "last measured"),
    *("memory a host", "sends"),
)
LEFT = {"", "placement", "hosts"}
# What a predicted step comes from: in a row, and where it decided.
FIGURES: dict[Figure, tuple[str, str]] = {
    "step": ("", "a step at this size on these hosts"),
    "step of a like host": (
        "from a like host",
        "a step at this size on a host of the same kind",
    ),
    "step of another size": ("from another size", "a step at another size on these hosts"),
    "collectives": (
        "from its collectives",
        "a step of one host, and the collectives of this ring",
    ),
    "links": (
        "from plain sockets",
        "a step of one host, and the links as plain sockets found them: no collectives of this "
        "ring were measured",
    ),
    "arithmetic": ("from arithmetic", "the arithmetic of the device, for no step was timed"),
}


def show(plan: Plan, view: MeshView, now: float) -> None:
    """Prints a plan on stdout."""
    from fluxmesh_coordinator.console import terminal

    work = plan.work
    kinds = sorted({host.kind for host in view.hosts})
    images = f"{work.images} image{'' if work.images == 1 else 's'}"
    table = terminal.table((*HEADINGS, ""), right=set(HEADINGS) - LEFT)
    table.title_justify = "left"
    table.title = (
        f"{images} of {work.height}x{work.width}, {work.steps} steps with "
        f"{work.weights.model}, on {len(view.hosts)} x {', '.join(kinds)}"
    )
    for column in table.columns[:-1]:
        column.no_wrap = True
    for option in plan.options:
        table.add_row(*row(option, option is plan.winner, now))
    console = terminal.output()
    console.print(table)
    lines = (plan.reason, plan.notice, *decided_by(plan, now), *rings(plan, view, now))
    for line in filter(None, lines):
        terminal.say(console, line)


def row(option: Option, wins: bool, now: float) -> list[str]:
    """An option's cells under `HEADINGS`, and notes."""
    hosts = ",".join(map(str, option.ranks))
    need = max(option.memory, key=lambda need: need.needed, default=None)
    memory = "" if need is None else f"{need.needed / 1e9:.1f} of {need.available / 1e9:.1f} GB"
    if option.problem:
        return ["", option.name, hosts, "", "", "", "", "", memory, "", option.problem]
    phases = option.phases
    sent = max(phase.sent_a_step for phase in phases)
    shares = " + ".join(f"{len(phase.images)} by {phase.placement}" for phase in phases)
    notes = [shares] if option.name == "mixed" else []
    notes += ["sharded"] if phases[0].layout == "sharded" else []
    notes += dict.fromkeys(text for phase in phases if (text := FIGURES[phase.figure][0]))
    return [
        "*" if wins else "",
        option.name,
        hosts,
        duration(option.seconds),
        duration(option.load_seconds) if option.load_seconds else "",
        duration(option.cold_seconds) if option.cold_seconds >= 0.01 else "",
        " + ".join(duration(phase.step_seconds) for phase in phases),
        " + ".join(measured(phase, now) for phase in phases),
        memory,
        f"{sent / 1e9:.2f} GB/step" if sent >= 1e7 else f"{sent / 1e6:.2f} MB/step" if sent else "",
        ", ".join(notes),
    ]


def measured(phase: Phase, now: float) -> str:
    """A step at this size on these hosts, as it was measured last."""
    seconds, when = phase.last_seconds, phase.last_when
    if seconds is None and phase.figure == "step":
        seconds, when = phase.step_seconds, phase.figure_when
    if seconds is None:
        return "-"
    return f"{duration(seconds)}, {ago(when, now)}" if when else duration(seconds)


def decided_by(plan: Plan, now: float) -> list[str]:
    """Which figures the winner's time comes from."""
    if plan.winner is None:
        return []
    figures: dict[str, None] = {}
    for phase in plan.winner.phases:
        when = f", measured {ago(phase.figure_when, now)}" if phase.figure_when else ""
        figures[f"{phase.placement}: {FIGURES[phase.figure][1]}{when}"] = None
    return [f"Decided by {'; '.join(figures)}."]


def rings(plan: Plan, view: MeshView, now: float) -> list[str]:
    """What the collectives of the rings that were considered took."""
    lines: list[str] = []
    for ring in _timings(plan.options, view):
        hosts = ",".join(map(str, ring.ranks))
        when = f", measured {ago(ring.when, now)}" if ring.when else ""
        tables = f"{_table('gathers', ring.gathers)}, {_table('sums', ring.sums)}"
        beside = f"{ring.hidden:.0%} of a gather passes beside products"
        lines.append(f"Ring of hosts {hosts} over {ring.backend}{when}: {tables}; {beside}.")
    return lines


def as_json(plan: Plan, view: MeshView, now: float) -> dict[str, Any]:
    """All that `plan --json` tells."""
    work = plan.work
    return {
        "event": "plan",
        "model": work.weights.model,
        "images": work.images,
        "height": work.height,
        "width": work.width,
        "steps": work.steps,
        "now": now,
        "hosts": [{"rank": host.rank, "name": host.name, "kind": host.kind} for host in view.hosts],
        "winner": None if plan.winner is None else plan.options.index(plan.winner),
        "warm": None if plan.warm is None else plan.options.index(plan.warm),
        "reason": plan.reason,
        "notice": plan.notice,
        "options": [
            {**asdict(option), "seconds": None if option.problem else option.seconds}
            for option in plan.options
        ],
        "rings": [asdict(ring) for ring in _timings(plan.options, view)],
    }


def ago(when: float, now: float) -> str:
    """An age for a person."""
    seconds = max(0.0, now - when)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def duration(seconds: float) -> str:
    """Seconds for a person."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _timings(options: Iterable[Option], view: MeshView) -> list[RingTiming]:
    timings = (view.ring_timing(option.ranks) for option in options)
    return list(dict.fromkeys(ring for ring in timings if ring is not None))


def _table(what: str, table: Any) -> str:
    if not table:
        return f"no {what}"
    latency, rate = fitted(table)
    return f"{what} take {latency * 1e3:.2f} ms and {rate / 1e9:.2f} GB/s"

"""What `fluxmesh plan` prints: each way with its predicted time, beside what was last measured.

Strings and dictionaries from a `Plan`; only `show` touches rich. `now` is seconds since 1970.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fluxmesh.cluster.snapshot import MeshView, RingTiming
from fluxmesh.planning.collectives import fitted
from fluxmesh.planning.cost import Figure
from fluxmesh.planning.plan import Option, Phase, Plan, spoken
from fluxmesh_coordinator.console import columns

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = (
    *("", "placement", "hosts", "time", "loading", "cold", "a step", "last measured"),
    *("memory a host", "sends"),
)
USAGE = ("host", "reads the prompt", "reads pictures", "paints", "decodes", "may use")
LEFT = {"", "placement", "hosts"}
# How a narrow terminal is met; a name that stands twice is shortened first.
LEAVE_OUT = (
    *("sends", "last measured", "memory a host", "loading", "cold", "last measured"),
    "memory a host",
)
NOTES = 24  # characters that a table leaves for its notes; longer ones are folded
# What a predicted step comes from: in a row, and where it decided.
FIGURES: dict[Figure, tuple[str, str]] = {
    "step": ("", "a step at this size on these hosts"),
    "step of a like host": (
        "from a like host",
        "a step at this size on a host of the same kind",
    ),
    "step of another size": ("from another size", "a step at another size on these hosts"),
    "step in other shares": (
        "from other shares",
        "a step at this size on these hosts, which shared it in another way",
    ),
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
    console = terminal.output()
    console.print(
        f"{images} of {work.height}x{work.width}, {work.steps} steps with "
        f"{work.weights.model}, on {len(view.hosts)} x {', '.join(kinds)}",
        style="italic",
        soft_wrap=True,
    )
    rows = [row(option, option is plan.winner, now) for option in plan.options]
    console.print(_drawn(rows, console.width))
    if plan.winner is not None and plan.winner.usage:
        console.print(_memory(plan.winner))
    lines = (
        *(plan.reason, text_line(plan), plan.notice),
        *(*decided_by(plan, now), *rings(plan, view, now)),
    )
    for line in filter(None, lines):
        terminal.say(console, line)


def _drawn(rows: Sequence[Sequence[str]], width: int) -> Table:
    """The rows in so many characters a line; notes alone are folded."""
    from fluxmesh_coordinator.console import terminal

    *cells, notes = zip(*rows, strict=True)
    every = [
        columns.Column(
            heading, tuple(texts), right=heading not in LEFT, brief=_brief(heading, texts)
        )
        for heading, texts in zip(HEADINGS, cells, strict=True)
    ]
    room = min(max(map(len, notes)), NOTES)
    shown = columns.fitted(every, width - (room + columns.GAP if room else 0), LEAVE_OUT)
    headings = [column.heading for column in shown]
    table = terminal.table((*headings, ""), right=set(headings) - LEFT)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for texts in zip(*(column.cells for column in shown), notes, strict=True):
        table.add_row(*texts)
    return table


def _memory(option: Option) -> Table:
    """What each host of an option has in memory, phase by phase."""
    from fluxmesh_coordinator.console import terminal

    shown = [name for name in USAGE if name != "reads pictures" or option.picture_rank is not None]
    table = terminal.table(shown, right=set(shown))
    for host in option.usage:
        pictures = () if option.picture_rank is None else (host.pictures,)
        sizes = (host.text, *pictures, host.denoise, host.decode, host.available)
        cells = (f"{nbytes / 1e9:.1f} GB" if nbytes else "-" for nbytes in sizes)
        table.add_row(str(host.rank), *cells)
    return table


def text_line(plan: Plan) -> str:
    """Who reads the prompt as the winner does it, how, why so, and what a new prompt takes."""
    winner = plan.winner
    if winner is None or winner.text is None:
        return ""
    text, work = winner.text, plan.work
    usage = {host.rank: host for host in winner.usage}[text.rank]
    who = f"host {text.rank}"
    if text.way == "remembered":
        return f"The prompt is remembered on {who}: no text encoder runs."
    bits = work.weights.bits_of_text
    what = f"{bits} bits" if bits else work.weights.dtype
    whole, painting = work.text_bytes / 1e9, max(usage.denoise, usage.decode) / 1e9
    sentence = f"Text encoder ({what}, {whole:.1f} GB) on {who}"
    if text.way == "stays":
        part = "with no part of the denoiser" if not painting else "beside its part of the denoiser"
        sentence += f", {part}, where it stays"
    elif text.way == "turns":
        sentence += (
            f", in turns with the denoiser: {whole:.1f} and {painting:.1f} GB are more than "
            f"{usage.available / 1e9:.1f} GB"
        )
    else:
        why = "in turns with it, the denoiser would have to load again for each prompt"
        if work.text_bytes > usage.available:
            why = f"as a whole it doesn't fit into {usage.available / 1e9:.1f} GB"
        sentence += f", layer by layer, {text.nbytes / 1e9:.1f} GB at a time: {why}"
    parts = [
        (text.load_seconds, "loads it"),
        (text.encode_seconds, "reads the prompt"),
        (text.reload_seconds, "loads the denoiser again"),
    ]
    now = ", ".join(f"{duration(seconds)} {what}" for seconds, what in parts if seconds)
    return f"{sentence}. Now {now}; the next new prompt takes {duration(text.again_seconds)}."


def _brief(heading: str, cells: Sequence[str]) -> tuple[str, ...] | None:
    """Without what a measured step's age, or the memory that there is, adds; None elsewhere."""
    if heading == "last measured":
        return tuple(re.sub(r", [^+]* ago", "", cell) for cell in cells)
    if heading == "memory a host":
        return tuple(f"{cell.partition(' of ')[0]} GB" if cell else "" for cell in cells)
    return None


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
    notes += dict.fromkeys(text for phase in phases if (text := dealt(phase)))
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


def dealt(phase: Phase) -> str:
    """Unequal shares of a ring, in its order: "71:29%"; "" where they are equal."""
    shares = phase.shares
    units = shares.tokens or shares.heads
    return ":".join(f"{share / sum(units):.0%}"[:-1] for share in units) + "%" if units else ""


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
    return [ring_line(ring, now) for ring in _timings(plan.options, view)]


def ring_line(ring: RingTiming, now: float) -> str:
    """What the collectives of one ring took."""
    hosts = ",".join(map(str, ring.ranks))
    when = f", measured {ago(ring.when, now)}" if ring.when else ""
    tables = f"{_table('gathers', ring.gathers)}, {_table('sums', ring.sums)}"
    beside = f"{ring.hidden:.0%} of a gather passes beside products"
    return f"Ring of hosts {hosts} over {ring.backend}{when}: {tables}; {beside}."


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
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 99.5 else spoken(seconds)


def _timings(options: Iterable[Option], view: MeshView) -> list[RingTiming]:
    timings = (view.ring_timing(option.ranks) for option in options)
    return list(dict.fromkeys(ring for ring in timings if ring is not None))


def _table(what: str, table: Any) -> str:
    if not table:
        return f"no {what}"
    latency, rate = fitted(table)
    speed = f"{rate / 1e9:.2f} GB/s" if rate >= 1e7 else f"{rate / 1e6:.2f} MB/s"
    return f"{what} take {latency * 1e3:.2f} ms and {speed}"

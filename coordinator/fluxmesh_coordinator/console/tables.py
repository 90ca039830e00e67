"""A mesh at one moment for people, and the same for programs: `status`, `up`, `doctor`.

Strings and dictionaries from a `Survey`; only what draws them touches rich. One row a host; below
it, who waits, and which hosts don't answer and why.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fluxmesh.cluster.hostfile import Host
from fluxmesh.cluster.snapshot import Holding, StepTiming
from fluxmesh.wire.messages import JobProgress, Status
from fluxmesh_coordinator.agents.status import Survey
from fluxmesh_coordinator.console.columns import Column, fitted

if TYPE_CHECKING:
    from rich.console import RenderableType

# How a narrow terminal is met; a name that stands twice is shortened first.
LEAVE_OUT = (
    *("link", "step", "device", "job", "for", "free", "step", "for", "left", "free"),
    "holds",
)
STYLES = {
    "busy": "cyan", "loading": "yellow", "ready": "green", "failed": "bold red", "gone": "bold red",
}  # fmt: skip
SHORT_OF_MEMORY = "yellow"


def columns(survey: Survey) -> list[Column]:
    """All that is told of each host, a column a kind; a host that is gone has a name alone."""
    hosts = survey.record.hosts
    rows = [(host, survey.statuses.get(host.rank)) for host in hosts]

    def cells(tell: Any) -> tuple[str, ...]:
        return tuple("" if status is None else tell(host, status) for host, status in rows)

    names = tuple(f"{host.rank} {host.name}" for host in hosts)
    states = tuple("gone" if status is None else state(status) for _, status in rows)
    full = cells(lambda _host, status: user(status))
    return [
        Column("host", names),
        Column("device", cells(lambda _host, status: short_device(status.kind))),
        Column("state", states),
        Column("for", full, brief=tuple(name.partition("@")[0] for name in full)),
        Column("job", cells(lambda _host, status: status.lease.title if status.lease else "")),
        Column("done", cells(lambda _host, status: done(status))),
        Column("left", cells(lambda _host, status: left(status)), right=True),
        Column(
            "free",
            cells(lambda _host, status: free(status)),
            right=True,
            brief=cells(lambda _host, status: f"{_gigabytes(status.free_bytes)} GB"),
        ),
        Column("holds", cells(lambda _host, status: holds(status))),
        Column(
            "step",
            cells(lambda host, status: step(survey, host, status, with_size=True)),
            right=True,
            brief=cells(lambda host, status: step(survey, host, status, with_size=False)),
        ),
        Column("link", cells(lambda host, _status: link(survey, host)), right=True),
    ]


def state(status: Status) -> str:
    return f"{status.state}, short of memory" if status.pressure else status.state


def user(status: Status) -> str:
    """Who has the host's lease."""
    return status.lease.user if status.lease else ""


def done(status: Status) -> str:
    """How far the job of this host is."""
    progress = status.lease.progress if status.lease else JobProgress()
    if not progress.unit:
        return ""
    if progress.unit == "update":
        return f"update {progress.done}/{progress.total}"
    images = f"{progress.done}/{progress.total}"
    return f"{images}, step {progress.step}/{progress.steps}" if progress.steps else images


def left(status: Status) -> str:
    """Until the lease is free."""
    seconds = status.lease.progress.seconds if status.lease else 0.0
    return duration(seconds) if seconds >= 1 else ""


def duration(seconds: float) -> str:
    """`0:09`, `12:34`, `1:02:03`."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes = f"{rest // 60:02}" if hours else f"{rest // 60}"
    return f"{hours}:{minutes}:{rest % 60:02}" if hours else f"{minutes}:{rest % 60:02}"


def free(status: Status) -> str:
    """Memory that nobody uses, of all that an engine may use."""
    return f"{_gigabytes(status.free_bytes)}/{_gigabytes(status.memory_bytes)} GB"


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.0f}" if nbytes >= 10e9 else f"{nbytes / 1e9:.1f}"


def holds(status: Status) -> str:
    """What an engine has in memory now: which weights, how much of them, or what it reads."""
    if status.loading is not None:
        read, total = status.loading.done_bytes / 1e9, status.loading.total_bytes / 1e9
        return f"{status.loading.component}, {read:.1f} of {total:.1f} GB"
    if status.holds is None:
        return "nothing"
    return ", also ".join(
        [_held(status.holds), *(_held(each.holds) for each in reversed(status.kept))]
    )


def _held(part: Holding) -> str:
    weights = part.weights
    precision = f"{weights.bits}-bit" if weights.bits else weights.dtype
    if weights.text_bits:
        precision += f", text {weights.text_bits}-bit"
    shard = f", shard {part.shard + 1} of {part.shards}" if part.shards > 1 else ""
    return f"{_short_model(weights.model)} {precision}{shard}"


def step(survey: Survey, host: Host, status: Status, *, with_size: bool) -> str:
    """What a step of the held weights took when it was timed last."""
    timing = step_timing(survey, host.rank, status)
    if timing is None:
        return ""
    seconds = timing.step_seconds
    text = f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
    if not with_size:
        return text
    together = "" if timing.hosts == 1 else f" on {timing.hosts}"
    return f"{text} {timing.height}x{timing.width}{together}"


def step_timing(survey: Survey, rank: int, status: Status) -> StepTiming | None:
    """The latest timing of what a host holds: alone, or of the ring that its shard is of."""
    if status.holds is None:
        return None
    weights = status.holds.weights
    timings = [*survey.view.timed(rank).measured]
    timings += [job.measured for job in survey.record.timings.jobs if rank in job.ranks]
    alone = status.holds.shards == 1
    own = [
        timing
        for timing in timings
        if (timing.model, timing.dtype, timing.bits) == (weights.model, weights.dtype, weights.bits)
        and (timing.placement == "data") == alone
    ]
    return max(own, key=lambda timing: timing.when, default=None)


def link(survey: Survey, host: Host) -> str:
    following = next_in_ring(survey, host.rank)
    return "" if following is None else f"{following / 1e9:.2f} GB/s"


def short_device(kind: str) -> str:
    """A device's name without what all of its kind have: `Xeon Platinum 8481C`, `M2 Ultra`."""
    name = re.sub(r"\((?:R|TM|C)\)|@.*|\b(?:CPU|Processor|\d+-Core)\b", " ", kind, flags=re.I)
    name = " ".join(name.split())
    return re.sub(r"^(?:Intel|AMD|Apple|NVIDIA(?: GeForce)?) (?=\S)", "", name)


def _short_model(model: str) -> str:
    """A folder by its name; an alias and a Hub id as they are."""
    return os.path.basename(model.rstrip("/")) if model.startswith("/") else model


def waiting(survey: Survey) -> list[str]:
    """A sentence for each job in line."""
    return [
        f"{job.user} waits for host {rank}: {ordinal(place)} in line"
        + (f", about {duration(job.seconds)}" if job.seconds >= 1 else "")
        + (f" ({job.title})." if job.title else ".")
        for rank, status in sorted(survey.statuses.items())
        for place, job in enumerate(status.line, start=1)
    ]


def ordinal(number: int) -> str:
    """`1st`, `2nd`, `11th`."""
    teen = number % 100 in (11, 12, 13)
    return f"{number}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def next_in_ring(survey: Survey, rank: int) -> float | None:
    """Bytes a second to the host that follows in the ring; None where no link was measured."""
    ranks = [member.rank for member in survey.record.members]
    following = ranks[(ranks.index(rank) + 1) % len(ranks)]
    rates = [
        link.rate for link in survey.record.links if (link.source, link.target) == (rank, following)
    ]
    return rates[0] if rates else None


def as_json(survey: Survey) -> dict[str, Any]:
    """All that `status --json` tells."""
    hosts: list[dict[str, Any]] = []
    for host in survey.record.hosts:
        member = survey.record.member(host.rank)
        line: dict[str, Any] = {"rank": host.rank, "ssh": host.ssh}
        line["address"] = "" if member is None else member.address
        if host.rank in survey.statuses:
            line |= {"answers": True, **asdict(survey.statuses[host.rank])}
            line["clock_skew"] = round(survey.clock_skews[host.rank], 3)
        else:
            line |= {"answers": False, "reason": str(survey.errors[host.rank])}
        hosts.append(line)
    return {
        "event": "status",
        "mesh": survey.record.name,
        "backend": survey.record.hostfile.backend,
        "backend_faults": [asdict(fault) for fault in survey.record.faults],
        "hosts": hosts,
        "links": [asdict(link) for link in survey.record.links],
    }


def drawn(survey: Survey, width: int) -> RenderableType:
    """The mesh for a terminal of so many characters a line; no line of the table is folded."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from fluxmesh_coordinator.console.option_names import in_options

    table = Table(box=None, pad_edge=False, show_edge=False)
    shown = fitted(columns(survey), width, LEAVE_OUT)
    for column in shown:
        table.add_column(
            column.heading,
            justify="right" if column.right else "left",
            overflow="ellipsis",
            no_wrap=True,
        )
    for cells in zip(*(column.cells for column in shown), strict=True):
        table.add_row(
            *(
                Text(cell, style=_style(cell) if column.heading == "state" else "")
                for column, cell in zip(shown, cells, strict=True)
            )
        )
    below = [Text(sentence) for sentence in (*waiting(survey), *survey.record.backend_notes)]
    below += [Text(in_options(str(error)), style="red") for error in survey.errors.values()]
    return Group(table, *below)


def _style(state: str) -> str:
    word, comma, _ = state.partition(",")
    return SHORT_OF_MEMORY if comma else STYLES.get(word, "")


def show(survey: Survey) -> None:
    """Prints the mesh on stdout."""
    from fluxmesh_coordinator.console import terminal

    console = terminal.output()
    console.print(drawn(survey, console.width), soft_wrap=False)

"""The tables of a mesh for people, and the same for programs: `status`, `up`, `doctor`.

Strings and dictionaries from a `Survey`; only `show` and `mesh_table` touch rich.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fluxmesh.cluster.hostfile import Host
from fluxmesh.wire.messages import Status
from fluxmesh_coordinator.agents.status import Survey

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("host", "name", "device", "state", "model", "memory", "free", "step", "link", "queue")
RIGHT = ("memory", "free", "step", "link")


def mesh_table(survey: Survey) -> Table:
    """One row a host, in rank order; hosts that don't answer with the reason below."""
    from fluxmesh_coordinator.console import terminal

    table = terminal.table(HEADINGS, right=RIGHT)
    for host in survey.record.hosts:
        table.add_row(*row(survey, host))
    return table


def row(survey: Survey, host: Host) -> list[str]:
    """A host's cells under `HEADINGS`."""
    status = survey.statuses.get(host.rank)
    if status is None:
        return [str(host.rank), host.name, "", "gone", "", "", "", "", "", ""]
    following = next_in_ring(survey, host.rank)
    link = "" if following is None else f"{following / 1e9:.2f} GB/s"
    known = survey.view.timed(host.rank).measured
    step = min(known, key=lambda timing: (timing.hosts, timing.height * timing.width), default=None)
    timed = "" if step is None else f"{_seconds(step.step_seconds)} at {step.height}x{step.width}"
    if step is not None and step.placement != "data":
        timed += f", {step.placement} on {step.hosts}"
    cells = [str(host.rank), host.name, status.kind, state(status), holds(status)]
    cells += [f"{status.memory_bytes / 1e9:.1f} GB", f"{status.free_bytes / 1e9:.1f} GB"]
    return [*cells, timed, link, queue(status)]


def state(status: Status) -> str:
    said = f"{status.state}, {status.job}" if status.job else status.state
    return f"{said}, short of memory" if status.pressure else said


def holds(status: Status) -> str:
    """What an engine has in memory now: which weights, how much of them, or what it reads."""
    if status.loading is not None:
        done, total = status.loading.done_bytes / 1e9, status.loading.total_bytes / 1e9
        return f"{status.loading.component}, {done:.1f} of {total:.1f} GB"
    if status.holds is None:
        return "nothing"
    weights, part = status.holds.weights, status.holds
    precision = f"{weights.bits}-bit" if weights.bits else weights.dtype
    shard = f", shard {part.shard + 1} of {part.shards}" if part.shards > 1 else ""
    return f"{weights.model} {precision}{shard}"


def queue(status: Status) -> str:
    taken = "leased" if status.holder else "free"
    return f"{taken}, {status.waiting} waiting" if status.waiting else taken


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
        "hosts": hosts,
        "links": [asdict(link) for link in survey.record.links],
    }


def show(survey: Survey) -> None:
    """Prints the mesh on stdout."""
    from fluxmesh_coordinator.console import terminal

    console = terminal.output()
    console.print(mesh_table(survey))
    for error in survey.errors.values():
        terminal.say(console, str(error))


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"

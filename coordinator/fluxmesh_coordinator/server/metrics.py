"""What is counted of a server, in the text format that Prometheus reads. Pure.

Names and units follow its guidelines: seconds and bytes, `_total` on what only grows. Nothing here
tells what anybody painted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = tuple[tuple[str, str], ...]

HELP = {
    "fluxmesh_jobs_total": ("counter", "Jobs that have ended, by how they did."),
    "fluxmesh_jobs": ("gauge", "Jobs now, by stage."),
    "fluxmesh_pictures_total": ("counter", "Pictures that were finished."),
    "fluxmesh_phase_seconds_total": ("counter", "Seconds that finished jobs spent, by phase."),
    "fluxmesh_requests_total": ("counter", "HTTP requests, by status."),
    "fluxmesh_received_bytes_total": ("counter", "Bytes of bodies that came in."),
    "fluxmesh_sent_bytes_total": ("counter", "Bytes of bodies that went out."),
    "fluxmesh_hosts": ("gauge", "Hosts of the mesh, by state."),
    "fluxmesh_lost_hosts_total": ("counter", "Hosts that were lost in the middle of a job."),
}


class Metrics:
    """Counters, by name and labels."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, Labels]] = Counter()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """`name` is one of `HELP`."""
        self._counts[name, tuple(sorted(labels.items()))] += amount  # type: ignore[assignment]

    def text(self, gauges: Mapping[str, Iterable[tuple[Mapping[str, str], float]]]) -> str:
        """All of it, with what is true only now: (labels, value) by name."""
        rows: dict[str, list[tuple[Labels, float]]] = {name: [] for name in HELP}
        for (name, counted), value in self._counts.items():
            rows[name].append((counted, value))
        for name, now in gauges.items():
            rows[name] += [(tuple(sorted(labels.items())), value) for labels, value in now]
        lines: list[str] = []
        for name, (kind, about) in HELP.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            values = sorted(rows[name]) or ([((), 0.0)] if kind == "counter" else [])
            lines += [f"{name}{_shown(pairs)} {value:.15g}" for pairs, value in values]
        return "\n".join(lines) + "\n"


def _shown(labels: Labels) -> str:
    if not labels:
        return ""
    pairs = (f'{name}="{_escaped(value)}"' for name, value in labels)
    return f"{{{','.join(pairs)}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

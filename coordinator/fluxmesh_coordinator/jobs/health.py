"""How often the hosts of a job have failed, and which of them are used no more. Pure.

Below `recovery.py`. A host that fails again soon is left out: each time costs
the others a load. What lies far back is forgiven, and so is a host that has worked well since: in
a job of hours, two lost connections are no sign of a bad host.
"""

from __future__ import annotations

from dataclasses import dataclass

from fluxmesh.deadlines import DEADLINES, Deadlines

MAX_FAILURES = 2  # of one host, one soon after another; then it is left out
ENOUGH = 20  # steps or micro-batches that a host has done since: it is forgiven too


@dataclass
class _Record:
    failures: int = 0
    last: float = 0.0  # when it failed last
    done: int = 0  # steps or micro-batches since
    is_out: bool = False


class HostHealth:
    """Of one job, by rank."""

    def __init__(self, deadlines: Deadlines = DEADLINES) -> None:
        self._forgiven = deadlines.forgiven
        self._hosts: dict[int, _Record] = {}

    def takes(self, rank: int) -> bool:
        """Whether a host may take part (again)."""
        return not self._of(rank).is_out

    def worked(self, rank: int) -> None:
        """A host has done a step, or a micro-batch."""
        self._of(rank).done += 1

    def failed(self, rank: int, now: float) -> None:
        """A host is to blame for a loss."""
        host = self._of(rank)
        if now - host.last >= self._forgiven or host.done >= ENOUGH:
            host.failures = 0
        host.failures += 1
        host.last, host.done = now, 0
        host.is_out = host.is_out or host.failures >= MAX_FAILURES

    def leave_out(self, rank: int) -> None:
        """A host can't do the job, however often it is asked."""
        self._of(rank).is_out = True

    def _of(self, rank: int) -> _Record:
        return self._hosts.setdefault(rank, _Record())

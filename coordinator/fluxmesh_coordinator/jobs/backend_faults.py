"""When a ring's failure is its backend's, and its hosts' rings go on over the next one. Pure.

Below `recovery.py`, which ends a ring that failed. A backend is used no more among the hosts of a
ring that did not form over it, hung in a collective, or lost an engine in one twice within
`Deadlines.forgiven`, where `cluster/backends.py` has one below it. No host is to blame for that.

A host that is out of reach looks the same to its neighbours at first. So a failure is a suspicion
until the agents of all members have ended their engines: then their hosts are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Generic

from fluxmesh.cluster.backends import BackendFault
from fluxmesh.deadlines import Deadlines
from fluxmesh.events import BackendChanged
from fluxmesh_coordinator.jobs import failures
from fluxmesh_coordinator.jobs.host import HostState
from fluxmesh_coordinator.jobs.state import H, JobState


class BackendFaults(Generic[H]):
    """Of one job; `remember` hears of what others should know."""

    def __init__(
        self,
        state: JobState[H],
        tell: Callable[[BackendChanged], None],
        remember: Callable[[BackendFault], None],
        deadlines: Deadlines,
    ) -> None:
        self.state, self.tell, self.remember = state, tell, remember
        self._forgiven = deadlines.forgiven
        self._deaths: dict[tuple[str, tuple[int, ...]], float] = {}  # when rings lost an engine
        self._suspected: BackendFault | None = None
        self._generation = 0  # of the suspected ring

    def hangs(self, host: HostState, reason: str) -> BackendFault | None:
        """A host's engine gave no sign in time: its ring's backend, if that may be the cause."""
        return self._suspect(host, reason, is_out=True)

    def dies(self, host: HostState, kind: str, reason: str, now: float) -> BackendFault | None:
        """A host's engine died, or told of an exception and ended; `kind` is that of `Failed`."""
        if not failures.is_of_backend(kind):
            return None
        ring = self.state.ring
        if ring is None or not ring.is_up:
            return self._suspect(host, reason, is_out=True)
        earlier = [
            when
            for (backend, ranks), when in self._deaths.items()
            if backend == ring.backend and len({*ranks} & {*ring.ranks}) > 1
        ]
        if earlier:  # of this job, which dates them; those of others are forgiven before it begins
            is_second = now - max(earlier) < self._forgiven
        else:
            is_second = self.state.links.fallback.has_failed_once(ring.backend, ring.ranks)
        fault = self._suspect(host, reason, is_out=is_second)
        if fault is not None:
            self._deaths[ring.backend, ring.ranks] = now
        return fault

    def explained(self, rank: int, ring_generation: int, kind: str) -> None:
        """An engine of a ring that was ended tells too, after a neighbour that noticed first."""
        fault = self._suspected
        if fault is None or rank not in fault.ranks or ring_generation != self._generation:
            return
        if not failures.is_of_backend(kind):
            self._acquit()

    def host_lost(self, rank: int) -> None:
        """A host is out of reach: its neighbours may have noticed first, and it may come back."""
        if self._suspected is not None and rank in self._suspected.ranks:
            self._acquit()

    def settle(self) -> bool:
        """Whether a backend is used no more from now on; asked after all that happens."""
        fault, hosts = self._suspected, self.state.hosts
        if fault is None:
            return False
        members = [hosts[rank] for rank in fault.ranks if rank in hosts]
        if any(member.killed is not None for member in members):
            return False
        if len(members) < len(fault.ranks):  # a host was lost, and its neighbours noticed first
            self._acquit()
            return False
        self._suspected = None
        links = self.state.links
        self.state.links = replace(links, fallback=links.fallback.noted(fault))
        self.remember(fault)
        if fault.is_out:
            self.tell(
                BackendChanged(
                    hosts=fault.ranks,
                    names=tuple(member.info.name for member in members),
                    before=fault.backend,
                    after=self.state.links.backend_of(fault.ranks),
                    reason=fault.reason,
                )
            )
        return fault.is_out

    def _suspect(self, host: HostState, reason: str, *, is_out: bool) -> BackendFault | None:
        """None where something else fails: no collective was under way, or nothing is below."""
        ring = self.state.ring
        if ring is None or not self.state.shares_ring(host.rank) or not host.is_in_collective:
            return None
        if self.state.links.fallback.after(ring.backend) is None:
            return None
        self._suspected = BackendFault(
            backend=ring.backend,
            ranks=ring.ranks,
            reason=f"{host.info.name}: {reason.rstrip('.')}.",
            is_out=is_out,
        )
        self._generation = ring.ring_generation
        return self._suspected

    def _acquit(self) -> None:
        """It was no fault of the backend."""
        if self._suspected is not None:
            self._deaths.pop((self._suspected.backend, self._suspected.ranks), None)
        self._suspected = None

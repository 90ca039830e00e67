"""What a ring forms over where the hostfile's backend does not work among some hosts. Pure.

RDMA over thunderbolt (`jaccl`) may not form a group, end an engine in the middle of a collective,
or wait for ever in one, where sockets between the same Macs work; `nccl` likewise on Linux. So a
backend has others below it, the fastest first: `jaccl` by a cable to every host, `jaccl-ring` by a
cable to the next one, `ring` by sockets. A `BackendFault` is what a mesh remembers of a failure:
`jobs/backend_faults.py` decides what is one, `mesh_file.py` keeps it until the next `fluxmesh up`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fluxmesh.cluster.hostfile import Host, Hostfile
from fluxmesh.cluster.rendezvous import for_sockets

BELOW = {"jaccl": ("jaccl-ring", "ring"), "jaccl-ring": ("ring",), "nccl": ("ring",)}


@dataclass(frozen=True, kw_only=True)
class BackendFault:
    """A backend that failed among some hosts, none of which was gone."""

    backend: str
    ranks: tuple[int, ...]  # of the ring that failed
    reason: str  # a sentence
    is_out: bool = True  # it is used no more; else a first death, which the next one makes so
    when: float = 0.0  # seconds since 1970; 0 is not known

    def concerns(self, backend: str, ranks: Iterable[int]) -> bool:
        """Whether a ring of these hosts over this backend would join two that it failed between."""
        return backend == self.backend and len({*ranks} & {*self.ranks}) > 1


@dataclass(frozen=True)
class Fallback:
    """The backends of a mesh below its hostfile's, and which have failed."""

    below: tuple[str, ...] = ()  # the fastest first
    faults: tuple[BackendFault, ...] = ()

    def backend(self, first: str, ranks: Sequence[int]) -> str:
        """What a ring of these hosts forms over; `first` is the hostfile's backend."""
        if not self.faults:
            return first
        for backend in (first, *self.below):
            if not any(fault.is_out and fault.concerns(backend, ranks) for fault in self.faults):
                return backend
        return self.below[-1] if self.below else first

    def after(self, backend: str) -> str | None:
        """The next one below a backend; None where there is none."""
        if backend not in self.below:
            return self.below[0] if self.below else None
        rest = self.below[self.below.index(backend) + 1 :]
        return rest[0] if rest else None

    def has_failed_once(self, backend: str, ranks: Sequence[int]) -> bool:
        """Whether an engine died there not long ago."""
        return any(not f.is_out and f.concerns(backend, ranks) for f in self.faults)

    def noted(self, fault: BackendFault) -> Fallback:
        """With one more fault; the last of a ring and a backend counts.

        But a first death, of which somebody tells late, brings no backend back that is out.
        """
        key = (fault.backend, fault.ranks)
        if not fault.is_out and any(f.is_out and (f.backend, f.ranks) == key for f in self.faults):
            return self
        kept = (f for f in self.faults if (f.backend, f.ranks) != key)
        return replace(self, faults=(*kept, fault))

    def forgiving(self, since: float) -> Fallback:
        """Without first deaths from before a moment, in seconds since 1970."""
        return replace(self, faults=tuple(f for f in self.faults if f.is_out or f.when >= since))


def below(hostfile: Hostfile) -> tuple[str, ...]:
    """The backends below a hostfile's that its hosts have what is needed for."""
    if not hostfile.falls_back or len(hostfile.hosts) < 2:
        return ()
    have_addresses = all(host.ips for host in for_sockets(hostfile.hosts))
    return tuple(b for b in BELOW.get(hostfile.backend, ()) if b != "ring" or have_addresses)


def with_addresses(hosts: Sequence[Host], agents: Mapping[int, str]) -> tuple[Host, ...]:
    """Hosts without `ips` get the address of their agent, by rank: sockets can use that one.

    Of hosts of `jaccl` and `nccl` only the first needs `ips`. An agent that listens at loopback is
    reached by those on its own machine alone.
    """
    is_one_machine = len({host.machine for host in hosts}) == 1
    return tuple(
        replace(host, ips=(agents[host.rank],))
        if not host.ips
        and host.rank in agents
        and (is_one_machine or not agents[host.rank].startswith("127."))
        else host
        for host in hosts
    )

"""How the engines of some hosts come to be one ring: fresh ports, one nonce, one generation. Pure.

Below `session.py`, which sends what stands here. The steps: ask each member for ports, tell all of
them to join, wait until all have. A failure on the way ends the
generation; the next one begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fluxmesh.cluster.hostfile import Host
from fluxmesh.cluster.rendezvous import for_sockets, joining
from fluxmesh.cluster.snapshot import RingPlace
from fluxmesh.planning.cold import RESTARTING
from fluxmesh.wire.messages import AskPorts, Changing, Join, ring_name
from fluxmesh_coordinator.jobs.host import HostState
from fluxmesh_coordinator.jobs.types import Job

Orders = list[tuple[int, Changing]]  # (rank in the mesh, what is sent there)


class Ring:
    """A ring, from the first port to the end of its generation. `ranks` are in its own order."""

    def __init__(self, ranks: tuple[int, ...], ring_generation: int, backend: str) -> None:
        self.ranks, self.ring_generation, self.backend = ranks, ring_generation, backend
        self.ports: dict[tuple[int, str], int | None] = {}  # (rank, address) -> port
        self.joined: set[int] = set()
        self.is_asked = False  # for ports
        self.is_told = False  # to join
        self.begun: float | None = None  # when it began to form
        self.formed = 0.0  # seconds until it was up; 0 where it was already
        self.timed: set[int] | None = None  # who has measured its collectives, once asked

    @property
    def is_up(self) -> bool:
        return self.joined == set(self.ranks)

    @property
    def has_ports(self) -> bool:
        return None not in self.ports.values()

    @classmethod
    def of(cls, ranks: tuple[int, ...], hosts: Mapping[int, HostState], backend: str) -> Ring:
        """The ring that these engines are in already, in this order; else a new one."""
        members = [hosts[rank] for rank in ranks]
        name = members[0].ring.name
        fits = all(
            member.ring == RingPlace(name, place, len(ranks), backend)
            and member.ring_generation == members[0].ring_generation
            for place, member in enumerate(members)
        )
        if not (name and fits):
            return cls(ranks, 1 + max(member.ring_generation for member in members), backend)
        ring = cls(ranks, members[0].ring_generation, backend)
        ring.is_asked = ring.is_told = True
        ring.joined = set(ranks)
        return ring

    def advance(self, hosts: Mapping[int, HostState], job: Job) -> Orders:
        """What brings it one step nearer, if anything does now. Raises as `join`."""
        orders = [] if self.is_asked else self.ask(hosts)
        if self.has_ports and not self.is_told:
            orders += self.join(hosts, job)
        return orders

    def ask(self, hosts: Mapping[int, HostState]) -> Orders:
        """A port at each address of each member; backends but `ring` meet at the first one's."""
        self.is_asked = True
        entries = self._entries(hosts)
        for entry in entries if self.backend == "ring" else entries[:1]:
            for ip in entry.ips if self.backend == "ring" else entry.ips[:1]:
                self.ports[entry.rank, ip] = None
        return [
            (rank, AskPorts(fence=hosts[rank].fence, ip=ip))
            for (rank, ip), port in self.ports.items()
            if port is None
        ]

    def answered(
        self, rank: int, ip: str, ports: Sequence[int], hosts: Mapping[int, HostState]
    ) -> Orders:
        """Keeps a port; asks for another where two agents of a machine were given the same."""
        self.ports[rank, ip] = ports[0]
        taken = {
            (hosts[other].entry.machine, port)
            for (other, _), port in self.ports.items()
            if other != rank
        }
        if (hosts[rank].entry.machine, ports[0]) in taken:
            self.ports[rank, ip] = None
            return [(rank, AskPorts(fence=hosts[rank].fence, ip=ip))]
        return []

    def join(self, hosts: Mapping[int, HostState], job: Job) -> Orders:
        """What each member is told. Raises `UsageError` where addresses don't match."""
        self.is_told = True
        entries = self._entries(hosts)
        ports = [
            [self.ports[entry.rank, ip] or 0 for ip in entry.ips if (entry.rank, ip) in self.ports]
            for entry in entries
        ]
        nonce = job.nonce(self.ring_generation)
        orders: Orders = []
        for place, joins in enumerate(joining(self.backend, entries, ports)):
            host = hosts[self.ranks[place]]
            if host.ring.name or self.backend in RESTARTING:  # another engine joins
                host.info = replace(host.info, compiled=())
            host.ring_generation = self.ring_generation
            host.ring = RingPlace(ring_name(nonce), place, len(self.ranks), self.backend)
            join = Join(
                fence=host.fence,
                ring_generation=self.ring_generation,
                rank=place,
                size=len(self.ranks),
                backend=self.backend,
                envs=joins.envs,
                files=joins.files,
                nonce=nonce,
            )
            orders.append((host.rank, join))
        return orders

    def _entries(self, hosts: Mapping[int, HostState]) -> Sequence[Host]:
        """The members as the hostfile has them, with the addresses that this backend can use."""
        entries = [hosts[rank].entry for rank in self.ranks]
        return for_sockets(entries) if self.backend == "ring" else entries

"""How the engines of some hosts come to be one ring: fresh ports, one nonce, one epoch. Pure.

Below `session.py`, which sends what stands here. The steps: ask each member for ports, tell all of
them to join, wait until all have. A failure on the way ends the epoch; the next one begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from fluxmesh.cluster.rendezvous import joining
from fluxmesh.wire.messages import AskPorts, Changing, Join, ring_name
from fluxmesh_coordinator.jobs.host import Worker

Orders = list[tuple[int, Changing]]  # (rank in the mesh, what is sent there)


class Secret(Protocol):
    """A job that a ring works for."""

    def nonce(self, epoch: int) -> bytes:
        """What the ring of `epoch` gathers: nobody else can know it."""


class Ring:
    """A ring, from the first port to the end of its epoch. `ranks` are in its own order."""

    def __init__(self, ranks: tuple[int, ...], epoch: int) -> None:
        self.ranks, self.epoch = ranks, epoch
        self.ports: dict[tuple[int, str], int | None] = {}  # (rank, address) -> port
        self.joined: set[int] = set()
        self.is_asked = False  # for ports
        self.is_told = False  # to join

    @property
    def is_up(self) -> bool:
        return self.joined == set(self.ranks)

    @classmethod
    def of(cls, ranks: tuple[int, ...], workers: Mapping[int, Worker]) -> Ring:
        """The ring that these engines are in already, in this order; else a new one."""
        members = [workers[rank] for rank in ranks]
        name = members[0].ring[0]
        fits = all(
            worker.ring == (name, place, len(ranks)) and worker.epoch == members[0].epoch
            for place, worker in enumerate(members)
        )
        if not (name and fits):
            return cls(ranks, 1 + max(worker.epoch for worker in members))
        ring = cls(ranks, members[0].epoch)
        ring.is_asked = ring.is_told = True
        ring.joined = set(ranks)
        return ring

    def ask(self, workers: Mapping[int, Worker], backend: str) -> Orders:
        """A port at each address of each member; backends but `ring` meet at the first one's."""
        self.is_asked = True
        for rank in self.ranks if backend == "ring" else self.ranks[:1]:
            ips = workers[rank].host.ips
            for ip in ips if backend == "ring" else ips[:1]:
                self.ports[rank, ip] = None
        return self._missing(workers)

    def answered(
        self, rank: int, ip: str, ports: Sequence[int], workers: Mapping[int, Worker]
    ) -> Orders:
        """Keeps a port; asks for another where two agents of a machine were given the same."""
        self.ports[rank, ip] = ports[0]
        taken = {
            (workers[other].host.machine, port)
            for (other, _), port in self.ports.items()
            if other != rank
        }
        if (workers[rank].host.machine, ports[0]) in taken:
            self.ports[rank, ip] = None
            return [(rank, AskPorts(workers[rank].fence, ip))]
        return []

    @property
    def has_ports(self) -> bool:
        return None not in self.ports.values()

    def join(self, workers: Mapping[int, Worker], job: Secret, backend: str) -> Orders:
        """What each member is told. Raises `UsageError` where addresses don't match."""
        self.is_told = True
        hosts = [workers[rank].host for rank in self.ranks]
        ports = [
            [self.ports[host.rank, ip] or 0 for ip in host.ips if (host.rank, ip) in self.ports]
            for host in hosts
        ]
        nonce = job.nonce(self.epoch)
        orders: Orders = []
        for place, (rank, told) in enumerate(
            zip(self.ranks, joining(backend, hosts, ports), strict=True)
        ):
            worker = workers[rank]
            worker.epoch = self.epoch
            worker.ring = (ring_name(nonce), place, len(self.ranks))
            orders.append(
                (
                    rank,
                    Join(
                        worker.fence,
                        self.epoch,
                        place,
                        len(self.ranks),
                        backend,
                        told.envs,
                        told.files,
                        nonce,
                    ),
                )
            )
        return orders

    def _missing(self, workers: Mapping[int, Worker]) -> Orders:
        return [
            (rank, AskPorts(workers[rank].fence, ip))
            for (rank, ip), port in self.ports.items()
            if port is None
        ]

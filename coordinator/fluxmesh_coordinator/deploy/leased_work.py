"""What `fluxmesh up` has the engines of leased hosts do: units of work, alone or as a ring.

Below `warmup.py`, which decides what is to be loaded and timed. A job has `session.py` for what
can go wrong; here a host that fails is an error that names it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fluxmesh.cluster.backends import BackendFault
from fluxmesh.cluster.hostfile import Host
from fluxmesh.cluster.snapshot import HostInfo, RingPlace, RingTiming, Timings
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError, HostUnreachableError
from fluxmesh.events import BackendChanged
from fluxmesh.planning.workload import Workload
from fluxmesh.wire import messages
from fluxmesh.wire.tasks import together
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.agents.mesh_file import MeshRecord
from fluxmesh_coordinator.jobs.failures import error_of, is_of_backend
from fluxmesh_coordinator.jobs.host import HostState
from fluxmesh_coordinator.jobs.ring import Orders, Ring
from fluxmesh_coordinator.jobs.types import Job, LeasedHost


class PlaceInLine:
    """Tells of the line that `up` stands in for a host, once for each place that it has."""

    def __init__(self, note: Callable[[str], None], rank: int) -> None:
        self.note, self.rank = note, rank
        self.place = 0

    def __call__(self, queued: messages.LeaseQueued) -> None:
        if queued.place != self.place:
            self.place = queued.place
            self.note(f"Host {self.rank} is busy; this `up` is number {self.place} in line.")


class Errand:
    """Work on one leased host."""

    def __init__(self, client: AgentClient, granted: messages.Granted, work: Workload) -> None:
        self.client = client
        self.fence, self.ring_generation = granted.fence, granted.ring_generation
        self.weights = work.weights
        self.failure = ""  # the kind of what its engine failed with last, as in `Failed`
        self._job = f"up-{secrets.token_hex(4)}"

    @property
    def common(self) -> dict[str, Any]:
        """The fields that every unit of work has."""
        return {"fence": self.fence, "job": self._job, "ring_generation": self.ring_generation}

    async def begin_anew(self) -> None:
        """Ends the engine, with all that it holds; the next work starts another."""
        self.ring_generation += 1
        await self.client.ask(
            messages.Kill(fence=self.fence, ring_generation=self.ring_generation), messages.Done
        )

    async def do(self, work: messages.Work, silence: float) -> AsyncIterator[messages.Report]:
        """The reports about one unit of work, to the one that ends it.

        Raises what the engine failed with, `HostUnreachableError` after `silence` seconds, or
        after those that the unit may take: an engine that stands still in a ring goes on ticking.
        """
        await self.client.ask(work, messages.Done)
        limit, begun = work.limit(DEADLINES), time.monotonic()
        while True:
            report = await self._report(silence)
            yield report
            if work.is_ended_by(report):
                return
            if isinstance(report, messages.LoadProgress):
                begun = time.monotonic()  # weights are read as fast as the disk is
            elif time.monotonic() - begun > limit:
                raise HostUnreachableError(
                    f"{self.client.title}: {work.late(limit)}; look at `fluxmesh logs`."
                )

    async def join(self, join: messages.Join) -> None:
        """Takes its place in a ring. Raises as `do`."""
        await self.client.ask(join, messages.Done)
        self.ring_generation = join.ring_generation
        while not isinstance(await self._report(DEADLINES.first_sign), messages.Joined):
            continue

    async def _report(self, silence: float) -> messages.Report:
        while True:
            try:
                async with asyncio.timeout(silence):
                    report = await self.client.report()
            except TimeoutError:
                raise HostUnreachableError(
                    f"{self.client.title}: no sign of life for {silence:.0f} s; look at "
                    "`fluxmesh logs`."
                ) from None
            if isinstance(report, messages.EngineReport) and (
                report.ring_generation < self.ring_generation
            ):
                continue  # left over from an engine that was ended
            if isinstance(report, messages.Failed):
                self.failure = report.kind
                text = f"{self.client.title}: {report.text}"
                raise error_of(report.kind, text, report.setting)
            if isinstance(report, messages.Lost):
                raise FluxmeshError(f"{self.client.title}: {report.reason}")
            return report


async def form_ring(
    errands: Mapping[int, Errand],
    hosts: Sequence[Host],
    infos: Mapping[int, HostInfo],
    backend: str,
) -> float:
    """The engines of all errands become one ring, in rank order; each begins a new ring generation.

    `hosts` are those of the hostfile, by rank. Returns how many seconds that took, 0 where they are
    in that ring already. Raises `FluxmeshError` naming a host.
    """
    begun = time.monotonic()
    states: dict[int, HostState] = {}
    for rank, errand in errands.items():
        info = infos[rank]
        leased = LeasedHost(
            info=info,
            host=hosts[rank],
            fence=errand.fence,
            ring_generation=errand.ring_generation,
            ring=info.ring.name,
            ring_rank=info.ring.rank,
            ring_size=info.ring.size,
            ring_backend=info.ring.backend,
        )
        states[rank] = HostState(leased, 0.0)
    ring = Ring.of(tuple(sorted(errands)), states, backend)
    if ring.is_up:
        return 0.0
    orders = ring.ask(states)
    while orders:
        asked, orders = orders, []
        for rank, message in asked:
            assert isinstance(message, messages.AskPorts)
            reply = await errands[rank].client.ask(message, messages.Ports)
            orders += ring.answered(rank, message.ip, reply.ports, states)
    joins: Orders = ring.join(states, Job(id="", secret=secrets.token_bytes(32)))
    await together(
        errands[rank].join(join) for rank, join in joins if isinstance(join, messages.Join)
    )
    return time.monotonic() - begun


@dataclass(frozen=True)
class RingFindings:
    """What is known of a ring that was formed."""

    news: Timings = Timings()
    faults: tuple[BackendFault, ...] = ()  # of the mesh's backends, with those that were known


async def form_known_ring(
    errands: Mapping[int, Errand],
    infos: Mapping[int, HostInfo],
    mesh: MeshRecord,
    note: Callable[[str], None],
) -> RingFindings:
    """As `form_ring`; what is news of it: its collectives too, where nobody has timed them.

    Where a backend does not work, which `note` hears, the next one below it is tried: it fails here
    as in a job, and a ring that can't be measured can't work. Raises as `form_ring`, also where an
    engine was killed, or its host short of what it takes: no backend is to blame for that.
    """
    hostfile, ranks, fallback = mesh.hostfile, tuple(sorted(errands)), mesh.fallback
    while True:
        backend = fallback.backend(hostfile.backend, ranks)
        try:
            news = await _form_measured(errands, hostfile.hosts, infos, backend, mesh.timings)
            return RingFindings(news, fallback.faults)
        except FluxmeshError as error:
            is_host = any(not is_of_backend(errand.failure) for errand in errands.values())
            if fallback.after(backend) is None or is_host:
                raise
            fault = BackendFault(backend=backend, ranks=ranks, reason=str(error), when=time.time())
        highest = max(errand.ring_generation for errand in errands.values())
        for errand in errands.values():
            errand.ring_generation = highest
        await together(errand.begin_anew() for errand in errands.values())  # all hosts are there
        fallback = fallback.noted(fault)
        infos = {rank: replace(info, ring=RingPlace()) for rank, info in infos.items()}
        changed = BackendChanged(
            hosts=ranks,
            names=tuple(infos[rank].name for rank in ranks),
            before=backend,
            after=fallback.backend(hostfile.backend, ranks),
            reason=fault.reason,
        )
        note(str(changed))


async def _form_measured(
    errands: Mapping[int, Errand],
    hosts: Sequence[Host],
    infos: Mapping[int, HostInfo],
    backend: str,
    known: Timings,
) -> Timings:
    """Over one backend."""
    seconds = await form_ring(errands, hosts, infos, backend)
    timing = known.ring(backend, tuple(sorted(errands)))
    if timing is None:
        return Timings((await measure_ring(errands, backend, seconds),))
    if not seconds:
        return Timings()
    return Timings((replace(timing, gathers=(), sums=(), forming_seconds=seconds),))


async def measure_ring(
    ring: Mapping[int, Errand], backend: str, forming_seconds: float
) -> RingTiming:
    """What the collectives of a ring that is up take its engines, which need hold nothing.

    `forming_seconds` is what `form_ring` took. Raises `FluxmeshError` naming a host.
    """
    timed: dict[int, messages.RingTimed] = {}

    async def measure(rank: int) -> None:
        work = messages.MeasureRing(**ring[rank].common)
        async for report in ring[rank].do(work, DEADLINES.engine_sign):
            if isinstance(report, messages.RingTimed):
                timed[rank] = report

    ranks = tuple(sorted(ring))
    await together(measure(rank) for rank in ranks)
    first = timed[ranks[0]]
    return RingTiming(
        backend=backend,
        ranks=ranks,
        gathers=first.gathers,
        sums=first.sums,
        hidden=first.hidden,
        forming_seconds=forming_seconds,
        when=time.time(),
    )

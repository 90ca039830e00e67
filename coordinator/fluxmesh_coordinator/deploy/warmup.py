"""A mesh whose agents run becomes warm: links measured, weights loaded, steps timed.

The second part of `fluxmesh up`, after `bringup.py`; then `deploy/trial_run.py` makes pictures.
It goes by `shard_layout.py` (who holds what), `link_rates.py` and `model_loading.py`. What a host
holds, and what was measured before, is not done again, and needs no lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fluxmesh.cluster.snapshot import HostInfo, MeshView, Placement
from fluxmesh.errors import FluxmeshError, HostUnreachableError
from fluxmesh.planning.learning import learned
from fluxmesh.planning.step_times import neighbours
from fluxmesh.planning.workload import Workload
from fluxmesh.storage.homes import Home
from fluxmesh.wire import messages
from fluxmesh.wire.tasks import together
from fluxmesh.wire.transport.base import Dialer
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.agents.mesh_file import MeshRecord
from fluxmesh_coordinator.agents.status import host_info, run, user_keys
from fluxmesh_coordinator.deploy.bringup import Watcher, leave_out
from fluxmesh_coordinator.deploy.leased_work import (
    Errand,
    PlaceInLine,
    RingFindings,
    form_known_ring,
)
from fluxmesh_coordinator.deploy.link_rates import measure_links
from fluxmesh_coordinator.deploy.model_loading import ModelLoading
from fluxmesh_coordinator.deploy.shard_layout import ShardLayout, layout
from fluxmesh_coordinator.deploy.trial_run import Size, TrialRun, keeps

T = TypeVar("T")


@dataclass
class Warming:
    """What `up` does once the agents of `mesh` listen."""

    mesh: MeshRecord
    work: Workload  # of one picture of the model's own size
    watcher: Watcher
    home: Home = field(default_factory=Home.default)
    allow_partial: bool = False
    content: str = ""  # `Checkpoint.content` of what shall be held; "" is whatever the hosts have
    sizes: tuple[Size, ...] = ()  # of pictures that the mesh shall be ready for
    clients: dict[int, AgentClient] = field(default_factory=dict)
    _place: ShardLayout = field(default=ShardLayout((), 1), init=False)

    def __post_init__(self) -> None:
        self._model = ModelLoading(self.work, self.content, self.watcher)

    def run(self) -> MeshRecord:
        """The mesh, warm and on record. Raises `FluxmeshError` naming the host that failed."""
        return run(user_keys(self.home), self.run_with)

    async def run_with(self, dialer: Dialer) -> MeshRecord:
        names = {host.rank: host.name for host in self.mesh.hosts}
        async with AsyncExitStack() as stack:
            members = {member.rank: member for member in self.mesh.members}

            async def connect(rank: int) -> AgentClient:
                client = AgentClient(dialer, members[rank], names[rank])
                return await stack.enter_async_context(client)

            self.clients = await self._each(connect, members)
            if not self.mesh.links and len(self.clients) > 1:
                self.watcher.stage("Measuring the links")
                hosts, note = self.mesh.hostfile.hosts, self.watcher.note
                links = await measure_links(self.clients, hosts, note)
                await self._save(replace(self.mesh, links=links))
            await self._know_ring()
            while not await self._fill():
                continue  # with the hosts that are left
            reader = await self._try() if self.sizes else None
            await self._keep(reader)
        return self.mesh

    async def _try(self) -> int | None:
        """Makes the mesh ready for `sizes`; returns who has the text encoders in memory.

        What an engine loses on the way is loaded again.
        """
        reader: int | None = None
        for rings in (True, False):
            hosts, shards = self._place.ranks, self._place.shards
            trial = TrialRun(
                mesh=self.mesh,
                work=self.work,
                watcher=self.watcher,
                clients=self.clients,
                hosts=hosts,
                shards=shards,
                sizes=self.sizes,
                learn=self._learn,
            )
            try:
                is_done = await trial.run(rings=rings)
            except HostUnreachableError as error:
                if not self.allow_partial:
                    raise
                self.watcher.note(f"The mesh is not made ready: {error}")
                is_done = False
            reader = trial.reader
            if is_done:
                break
            while not await self._fill():
                continue
        return reader

    async def _learn(self, findings: RingFindings) -> None:
        """Puts what was found out about rings on the mesh's record."""
        timings = learned(self.mesh.timings, findings.news)
        mesh = replace(self.mesh, timings=timings, faults=findings.faults)
        if mesh != self.mesh:
            await self._save(mesh)

    async def _save(self, mesh: MeshRecord) -> None:
        """Agents whose leases this has go on hearing of it, however long another process writes."""
        self.mesh = mesh
        writing = asyncio.create_task(asyncio.to_thread(mesh_file.save, mesh, self.home))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing})  # else it came after what a cancelled `up` writes
            raise

    async def _keep(self, reader: int | None) -> None:
        """Every host is told what it shall hold from now on."""
        place = self._place
        keep = keeps(self.work, place.ranks, place.shards, reader, place.idle, place.shares)

        async def tell(rank: int) -> messages.Done:
            return await self.clients[rank].ask(keep[rank], messages.Done)

        await self._each(tell, [rank for rank in keep if rank in self.clients])

    async def _each(
        self, do: Callable[[int], Coroutine[Any, Any, T]], ranks: Iterable[int]
    ) -> dict[int, T]:
        """`do` for all these hosts side by side: what came of it, by rank.

        Hosts that fail leave `clients`, where the user allows it; they stay in the mesh, without
        weights. Raises `FluxmeshError` where he doesn't.
        """
        chosen = list(ranks)
        ended = await asyncio.gather(*map(do, chosen), return_exceptions=True)
        results: dict[int, T] = {}
        errors: dict[int, FluxmeshError] = {}
        for rank, end in zip(chosen, ended, strict=True):
            if isinstance(end, FluxmeshError):
                errors[rank] = end
            elif isinstance(end, BaseException):
                raise end
            else:
                results[rank] = end
        others = bool({*self.clients, *results} - set(errors))
        leave_out(errors, others, self.watcher, allowed=self.allow_partial)
        for rank in errors:
            self.clients.pop(rank, None)
        return results

    async def _know_ring(self) -> None:
        """Forms the ring of all hosts and times its collectives, where nobody did before."""
        ranks = tuple(sorted(self.clients))
        backend = self.mesh.fallback.backend(self.mesh.hostfile.backend, ranks)
        view = MeshView((), self.mesh.links)
        is_joined = all(view.link(a, b) for a, b in neighbours(ranks))
        if len(ranks) < 2 or not is_joined or self.mesh.timings.ring(backend, ranks):
            return
        self.watcher.stage("Measuring the ring")
        errands: dict[int, Errand] = {}
        infos: dict[int, HostInfo] = {}
        try:
            for rank in ranks:
                granted = await self._lease(rank)
                errands[rank] = Errand(self.clients[rank], granted, self.work)
                infos[rank] = host_info(rank, granted.status)
            await self._form_ring(errands, infos)
        except FluxmeshError as error:
            self.watcher.note(f"The ring could not be measured: {error}")
            await _begin_anew(errands.values())
        for errand in errands.values():
            with contextlib.suppress(FluxmeshError):
                await errand.client.ask(messages.LeaveQueue(), messages.Done)

    async def _form_ring(
        self, errands: Mapping[int, Errand], infos: Mapping[int, HostInfo]
    ) -> None:
        """One of all these; its timings go on the mesh's record."""
        await self._learn(await form_known_ring(errands, infos, self.mesh, self.watcher.note))

    # Weights and step times

    async def _fill(self) -> bool:
        """Loads and times what isn't yet, under the leases of the hosts that need it.

        False where a host failed at it: the others may have to hold other parts now.
        """

        async def ask(rank: int) -> messages.Status:
            return await self.clients[rank].ask(messages.AskStatus(), messages.Status)

        statuses = await self._each(ask, self.clients)
        infos = tuple(host_info(rank, status) for rank, status in statuses.items())
        mesh = self.mesh
        view = MeshView(infos, mesh.links, mesh.hostfile.backend, mesh.timings, mesh.fallback)
        place = self._place = layout(self.work, view)
        for rank in place.idle:
            self.watcher.note(f"Host {rank} holds no weights: {place.why}.")
        cold = [
            rank for rank in place.ranks if not self._model.is_held(statuses[rank], place, rank)
        ]
        untimed = self._model.untimed(view, place)
        leases: dict[int, messages.Granted] = {}
        for rank in sorted({*cold, *untimed}):  # in rank order, so that no two can deadlock
            leases[rank] = await self._lease(rank)
        errands = {rank: Errand(self.clients[rank], leases[rank], self.work) for rank in leases}
        if untimed and place.shards > 1:
            cold = [] if await self._time_together(errands, view, place) else list(place.ranks)
        if cold:
            self.watcher.stage(f"Loading {self.work.weights.model}")
            await self._each(lambda rank: self._model.load(errands[rank], place, rank), cold)
        if untimed and place.shards == 1 and set(leases) <= set(self.clients):
            with self._timing("data", untimed):
                await self._each(lambda rank: self._model.time_step(errands[rank], "data"), untimed)
        for rank in leases:  # of one that failed too, if it still hears
            with contextlib.suppress(HostUnreachableError):
                await errands[rank].client.ask(messages.LeaveQueue(), messages.Done)
        return set(leases) <= set(self.clients)

    async def _lease(self, rank: int) -> messages.Granted:
        waiting = PlaceInLine(self.watcher.note, rank)
        return await self.clients[rank].lease(
            f"up-{secrets.token_hex(4)}", 60.0, waiting, "getting ready"
        )

    @contextlib.contextmanager
    def _timing(self, placement: Placement, ranks: Sequence[int]) -> Iterator[None]:
        """What is timed is ready from then on, which is told where anything is to be."""
        self.watcher.stage("Timing a step")
        start = time.monotonic()
        yield
        if self.sizes:
            size = (self.work.height, self.work.width)
            self.watcher.warmed(placement, ranks, size, time.monotonic() - start)

    async def _time_together(
        self, errands: Mapping[int, Errand], view: MeshView, place: ShardLayout
    ) -> bool:
        """Loads the shards and times a step of all of them; they stay the ring of the next job.

        False where that fails: jobs can be planned without, and their sessions know what to do.
        """
        ring = {rank: errands[rank] for rank in place.ranks}
        try:
            await self._form_ring(ring, {host.rank: host for host in view.hosts})
            self.watcher.stage(f"Loading {self.work.weights.model}")
            await together(self._model.load(ring[rank], place, rank) for rank in ring)
            with self._timing("tensor", place.ranks):
                await together(
                    self._model.time_step(ring[rank], "tensor", place.shares) for rank in ring
                )
        except FluxmeshError as error:
            self.watcher.note(f"A step of all hosts together could not be timed: {error}")
            await _begin_anew(ring.values())
            return False
        return True


async def _begin_anew(errands: Iterable[Errand]) -> None:
    """Ends the engines of a ring that failed: a survivor of a broken one can hang."""
    for errand in errands:
        with contextlib.suppress(FluxmeshError):
            await errand.begin_anew()

"""A mesh whose agents run becomes warm: links measured, weights loaded, steps timed.

The second part of `fluxmesh up`, after `bringup.py`; then `deploy/trial_run.py` makes pictures.
Weights are replicated where they fit on every host, else each holds its shard; `layout` decides,
purely. What a host holds, and what was measured before, is not done again, and needs no lease.
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

from fluxmesh.cluster.snapshot import Holding, HostInfo, LinkInfo, MeshView, Placement, Timings
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import (
    DoesNotFitError,
    FluxmeshError,
    HostUnreachableError,
    LocalNetworkError,
    WeightsError,
)
from fluxmesh.planning.capacity import Memory, shortage
from fluxmesh.planning.learning import learned
from fluxmesh.planning.remedies import for_weights
from fluxmesh.planning.step_times import neighbours
from fluxmesh.planning.workload import Workload, tensor_problem
from fluxmesh.storage.homes import Home
from fluxmesh.wire import messages
from fluxmesh.wire.tasks import together
from fluxmesh.wire.transport.base import Dialer
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.agents.mesh_file import MeshRecord
from fluxmesh_coordinator.agents.status import host_info, run, user_keys
from fluxmesh_coordinator.deploy.bringup import Watcher, leave_out
from fluxmesh_coordinator.deploy.leased_work import Errand, form_known_ring
from fluxmesh_coordinator.deploy.trial_run import Size, TrialRun, keeps
from fluxmesh_coordinator.jobs import remedies
from fluxmesh_coordinator.jobs.model_check import remedy

FAR = 8  # hosts; in a larger mesh only neighbours are measured
PROBE = 16 << 20  # bytes that a link is measured with
COMPONENTS = ("transformer", "autoencoder")

T = TypeVar("T")


@dataclass(frozen=True)
class ShardLayout:
    """Who holds what: shard i of `shards` on `ranks[i]`, or all of it on each where that is 1."""

    ranks: tuple[int, ...]
    shards: int
    idle: tuple[int, ...] = ()  # hosts that can't hold their part
    why: str = ""  # they can't

    def shard(self, rank: int) -> int:
        return self.ranks.index(rank) if self.shards > 1 else 0


def layout(work: Workload, view: MeshView) -> ShardLayout:
    """As `_layout`. Raises `DoesNotFitError`, with what helps, where no host can hold its part."""
    place = _layout(work, view)
    if place.ranks:
        return place

    def fits(work: Workload, view: MeshView) -> int | None:
        shards = _layout(work, view).shards
        placement: Placement = "tensor" if shards > 1 else "data"
        return Memory(work, view).needed(placement, shards, shards) if shards else None

    helps = remedies.sentences(for_weights(work, view, fits)) or "Use more hosts."
    raise DoesNotFitError(f"{work.weights.model} does not fit: {place.why}. {helps}")


def _layout(work: Workload, view: MeshView) -> ShardLayout:
    """Replicated where that fits, else sharded, else replicated on the hosts where it fits.

    Without ranks or shards where no host can hold its part.
    """
    memory, ranks, size = Memory(work, view), view.ranks, len(view.ranks)
    whole, part = memory.needed("data", 1, 1), memory.needed("tensor", size, size)
    needs = memory.needs(ranks, [whole] * size)
    if all(need.fits for need in needs):
        return ShardLayout(ranks, 1)
    if size > 1 and not tensor_problem(work, size):
        shares = memory.needs(ranks, [part] * size, size)
        if all(need.fits for need in shares):
            return ShardLayout(ranks, size)
    able: tuple[int, ...] = ()
    for rank in ranks:
        if all(need.fits for need in memory.needs((*able, rank), [whole] * (len(able) + 1))):
            able = (*able, rank)
    idle = tuple(rank for rank in ranks if rank not in able)
    return ShardLayout(able, 1 if able else 0, idle, shortage(needs))


def pairs(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Rounds of (source, target) in which each host sends to one other, as in a ring."""
    size = len(ranks)
    steps = range(1, size) if size <= FAR else (1, size - 1)
    return [[(ranks[i], ranks[(i + step) % size]) for i in range(size)] for step in steps]


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
    kept_out: dict[int, str] = field(default_factory=dict)  # by macOS, and in whose words
    _place: ShardLayout = field(default=ShardLayout((), 1), init=False)

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
                self.mesh = replace(self.mesh, links=await self._links())
                mesh_file.save(self.mesh, self.home)
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

    def _learn(self, news: Timings) -> None:
        """Puts what was measured of rings on the mesh's record."""
        if news.rings:
            self.mesh = replace(self.mesh, timings=learned(self.mesh.timings, news))
            mesh_file.save(self.mesh, self.home)

    async def _keep(self, reader: int | None) -> None:
        """Every host is told what it shall hold from now on."""
        place = self._place
        keep = keeps(self.work, place.ranks, place.shards, reader, place.idle)

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

    # Links

    async def _links(self) -> tuple[LinkInfo, ...]:
        measured: list[LinkInfo] = []
        for each in pairs(list(self.clients)):
            links = await together(self._link(*pair) for pair in each)
            measured += [link for link in links if link is not None]
        for source in {*self.kept_out} - {link.source for link in measured}:
            self.watcher.note(self.kept_out[source])
        return tuple(sorted(measured, key=lambda link: (link.source, link.target)))

    async def _link(self, source: int, target: int) -> LinkInfo | None:
        """None where `target` can't be reached at the addresses that a ring would use."""
        host = self.mesh.hostfile.hosts[target]
        rates: list[messages.LinkRate] = []
        for ip in host.ips:  # a ring sends over all of them at once
            token = secrets.token_bytes(32)
            try:
                listen = messages.ListenForLink(ip, token)
                ports = await self.clients[target].ask(listen, messages.Ports, DEADLINES.link)
                probe = messages.ProbeLink(ip=ip, port=ports.ports[0], token=token, nbytes=PROBE)
                rates.append(
                    await self.clients[source].ask(probe, messages.LinkRate, DEADLINES.link)
                )
            except HostUnreachableError:
                raise
            except FluxmeshError as error:
                if isinstance(error, LocalNetworkError):
                    self.kept_out[source] = str(error)
                return None  # no cable between these two
        if not rates:
            return None
        rate = sum(each.rate for each in rates)
        return LinkInfo(
            source=source, target=target, rate=rate, latency=max(each.latency for each in rates)
        )

    async def _know_ring(self) -> None:
        """Forms the ring of all hosts and times its collectives, where nobody did before."""
        ranks, backend = tuple(sorted(self.clients)), self.mesh.hostfile.backend
        view = MeshView((), self.mesh.links)
        is_joined = all(view.link(a, b) for a, b in neighbours(ranks))
        if len(ranks) < 2 or not is_joined or self.mesh.timings.ring(backend, ranks):
            return
        self.watcher.stage("Measuring the ring")
        jobs: dict[int, Errand] = {}
        infos: dict[int, HostInfo] = {}
        try:
            for rank in ranks:
                granted = await self._lease(rank)
                jobs[rank] = Errand(self.clients[rank], granted, self.work)
                infos[rank] = host_info(rank, granted.status)
            self._learn(
                await form_known_ring(
                    jobs, self.mesh.hostfile.hosts, infos, backend, self.mesh.timings
                )
            )
        except FluxmeshError as error:
            self.watcher.note(f"The ring could not be measured: {error}")
            for job in jobs.values():  # a survivor of a broken ring can hang
                with contextlib.suppress(FluxmeshError):
                    await job.begin_anew()
        for job in jobs.values():
            with contextlib.suppress(FluxmeshError):
                await job.client.ask(messages.LeaveQueue(), messages.Done)

    # Weights and step times

    async def _fill(self) -> bool:
        """Loads and times what isn't yet, under the leases of the hosts that need it.

        False where a host failed at it: the others may have to hold other parts now.
        """

        async def ask(rank: int) -> messages.Status:
            return await self.clients[rank].ask(messages.AskStatus(), messages.Status)

        statuses = await self._each(ask, self.clients)
        infos = tuple(host_info(rank, status) for rank, status in statuses.items())
        view = MeshView(infos, self.mesh.links, self.mesh.hostfile.backend, self.mesh.timings)
        place = self._place = layout(self.work, view)
        for rank in place.idle:
            self.watcher.note(f"Host {rank} holds no weights: {place.why}.")
        cold = [rank for rank in place.ranks if not self._holds(statuses[rank], place, rank)]
        untimed = self._untimed(view, place)
        leases: dict[int, messages.Granted] = {}
        for rank in sorted({*cold, *untimed}):  # in rank order, so that no two can deadlock
            leases[rank] = await self._lease(rank)
        jobs = {rank: Errand(self.clients[rank], leases[rank], self.work) for rank in leases}
        if untimed and place.shards > 1:
            cold = [] if await self._time_together(jobs, view, place) else list(place.ranks)
        if cold:
            self.watcher.stage(f"Loading {self.work.weights.model}")
            await self._each(lambda rank: self._load(jobs[rank], place, rank), cold)
        if untimed and place.shards == 1 and set(leases) <= set(self.clients):
            with self._timing("data", untimed):
                await self._each(lambda rank: self._time(jobs[rank], "data"), untimed)
        for rank in leases:  # of one that failed too, if it still hears
            with contextlib.suppress(HostUnreachableError):
                await jobs[rank].client.ask(messages.LeaveQueue(), messages.Done)
        return set(leases) <= set(self.clients)

    def _holds(self, status: messages.Status, place: ShardLayout, rank: int) -> bool:
        """Whole weights serve where a shard would do: nothing is thrown away."""
        held = status.holds
        if held is None or held.weights != self.work.weights or not self._is_meant(held):
            return False
        return held.shards == 1 or (held.shards, held.shard) == (place.shards, place.shard(rank))

    def _is_meant(self, held: Holding) -> bool:
        """Whether it came from the files that this machine has now under that name."""
        return self.content in ("", held.content)

    def _untimed(self, view: MeshView, place: ShardLayout) -> list[int]:
        """Who has to time a step of this size: one host of each device, or all that hold shards."""
        weights, work = self.work.weights, self.work
        how = ("data", 1) if place.shards == 1 else ("tensor", place.shards)
        wanted = (weights.model, work.height, work.width, weights.dtype, weights.bits, *how)
        devices: dict[str, int] = {}
        for rank in place.ranks:
            known = view.timed(rank).measured
            if wanted not in [
                (o.model, o.height, o.width, o.dtype, o.bits, o.placement, o.hosts) for o in known
            ]:
                devices.setdefault(view.host(rank).device_key, rank)
        if place.shards == 1 or not devices:
            return list(devices.values())
        ring = zip(place.ranks, place.ranks[1:] + place.ranks[:1], strict=True)
        return list(place.ranks) if all(view.link(a, b) for a, b in ring) else []

    async def _lease(self, rank: int) -> messages.Granted:
        def waiting(queued: messages.LeaseQueued) -> None:
            self.watcher.note(f"Host {rank} is busy; this `up` is number {queued.place} in line.")

        return await self.clients[rank].lease(f"up-{secrets.token_hex(4)}", 60.0, waiting)

    async def _load(self, job: Errand, place: ShardLayout, rank: int) -> None:
        """Raises `WeightsError` where a host has other files under the model's name."""
        for is_last in (False, True):
            load = messages.Load(
                **job.common,
                weights=job.weights,
                shards=place.shards,
                shard=place.shard(rank),
                components=COMPONENTS,
            )
            async for report in job.do(load, DEADLINES.engine_sign):
                if isinstance(report, messages.LoadProgress):
                    what, done, total = report.component, report.done_bytes, report.total_bytes
                    self.watcher.progress(rank, what, done, total)
                elif isinstance(report, messages.Loaded) and self._is_meant(report.holding):
                    return
            if not is_last:  # the engine may have read them before they changed
                await job.begin_anew()
        model = self.work.weights.model
        raise WeightsError(
            f"{job.client.title} has other files under the name {model} than this machine. "
            f"{remedy(model)}"
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

    async def _time(self, job: Errand, placement: Placement) -> None:
        """With nothing else running on the device."""
        measure = messages.Measure(
            **job.common,
            weights=job.weights,
            height=self.work.height,
            width=self.work.width,
            placement=placement,
        )
        try:
            async with asyncio.timeout(DEADLINES.timed_step):
                async for _ in job.do(measure, DEADLINES.timed_step):
                    pass  # it beats until it is done
        except TimeoutError:
            raise HostUnreachableError(
                f"{job.client.title}: a step is not done after {DEADLINES.timed_step:.0f} s; "
                "look at `fluxmesh logs`."
            ) from None

    async def _time_together(
        self, jobs: Mapping[int, Errand], view: MeshView, place: ShardLayout
    ) -> bool:
        """Loads the shards and times a step of all of them; they stay the ring of the next job.

        False where that fails: jobs can be planned without, and their sessions know what to do.
        """
        ring = {rank: jobs[rank] for rank in place.ranks}
        infos = {host.rank: host for host in view.hosts}
        try:
            self._learn(
                await form_known_ring(
                    ring, self.mesh.hostfile.hosts, infos, view.backend, self.mesh.timings
                )
            )
            self.watcher.stage(f"Loading {self.work.weights.model}")
            await together(self._load(ring[rank], place, rank) for rank in ring)
            with self._timing("tensor", place.ranks):
                await together(self._time(ring[rank], "tensor") for rank in ring)
        except FluxmeshError as error:
            self.watcher.note(f"A step of all hosts together could not be timed: {error}")
            for job in ring.values():  # a survivor of a broken ring can hang
                with contextlib.suppress(FluxmeshError):
                    await job.begin_anew()
            return False
        return True

"""Pictures that nobody sees, so that the first one that somebody asks for comes as fast as others.

The last part of `fluxmesh up`, after `warmup.py`. For each size it takes the placements that plans
there would choose, for one picture and for one a host, and has the hosts make a step and a decode
in that way: the text encoders load, the ring forms, kernels are compiled. It stays so: the next job
finds that ring. What was done before is not done again, and needs no lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import MeshView, ModelVariant, Placement, RingPlace, StepShape
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError, HostUnreachableError
from fluxmesh.planning.plan import Plan, plan
from fluxmesh.planning.workload import Workload
from fluxmesh.request import GenerateRequest
from fluxmesh.wire import messages
from fluxmesh.wire.tasks import together
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.agents.mesh_file import MeshRecord
from fluxmesh_coordinator.agents.status import Survey, host_info
from fluxmesh_coordinator.deploy.bringup import Watcher
from fluxmesh_coordinator.deploy.leased_work import (
    Errand,
    PlaceInLine,
    RingFindings,
    form_known_ring,
)

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Way:
    """How pictures of a size are made: by each of `ranks` alone, or by their ring."""

    size: Size
    placement: Placement
    ranks: tuple[int, ...]
    shares: Shares = EVEN  # of the ring's hosts

    def shape(self, weights: ModelVariant) -> StepShape:
        """What an engine tells that has made a step in this way."""
        return StepShape.of(weights, self.placement, len(self.ranks), *self.size)


@dataclass(frozen=True)
class Programme:
    """What is to be tried, in this order."""

    ways: tuple[Way, ...]
    ring: tuple[int, ...]  # whose engines one ring is; () where no plan wants one
    reader: int | None  # who reads prompts, if the text encoders may stay in its memory
    left_out: tuple[Way, ...]  # rings of other members: an engine is in one at a time


def programme(
    work: Workload,
    view: MeshView,
    sizes: Iterable[Size],
    hosts: Sequence[int],
    shards: int,
    *,
    rings: bool = True,
) -> Programme:
    """What plans for `work`'s model would choose at these sizes, on `hosts`, which hold it. Pure.

    `shards` is in how many parts. Its ring is the one of the first size whose plan wants one;
    without `rings` there is none.
    """
    ways: list[Way] = []
    reader: int | None = None
    for size in sizes:
        for images in dict.fromkeys((1, len(hosts))):
            settled = _plan(work, view, size, images)
            option = settled.warm or settled.winner  # which is the best is what it is once warm
            if option is None:
                continue
            if reader is None and option.text is not None and option.text.stays:
                reader = option.text_rank
            for phase in option.phases:
                # Whoever holds the weights is given whole images when there are more of them.
                apart = phase.placement == "data"
                if apart and shards > 1:
                    continue
                if apart or rings:
                    ranks = tuple(hosts) if apart else phase.ranks
                    ways.append(Way(size, phase.placement, ranks, phase.shares))
    ring = next((way.ranks for way in ways if way.placement != "data"), ())
    wanted = dict.fromkeys(ways)
    kept = [way for way in wanted if way.placement == "data" or way.ranks == ring]
    left_out = tuple(way for way in wanted if way not in kept)
    kept.sort(key=lambda way: way.placement != "data")
    return Programme(tuple(kept), ring, reader, left_out)


def _plan(work: Workload, view: MeshView, size: Size, images: int) -> Plan:
    weights = work.weights
    request = GenerateRequest(
        prompt="",
        seed=0,
        model=weights.model,
        n_images=images,
        height=size[0],
        width=size[1],
        steps=work.steps,
        dtype=weights.dtype,
        bits=weights.bits,
        text_bits=weights.text_bits,
    )
    return plan(work.model.fill(request), view, work.model)


@dataclass
class TrialRun:
    """One for each `fluxmesh up`: the agents of `clients`, of which `hosts` hold the weights."""

    mesh: MeshRecord
    work: Workload
    watcher: Watcher
    clients: Mapping[int, AgentClient]
    hosts: Sequence[int]
    shards: int  # in how many parts
    sizes: Sequence[Size]
    learn: Callable[[RingFindings], Awaitable[None]]  # hears of a ring that is new
    reader: int | None = None  # who has the text encoders in memory afterwards
    _errands: dict[int, Errand] = field(default_factory=dict)

    async def run(self, *, rings: bool = True) -> bool:
        """Whether all hosts still hold what they held: a ring that fails takes its engines along.

        Then it can be tried again without `rings`, once the weights are loaded again. Raises
        `HostUnreachableError` where an agent is gone.
        """
        statuses = await self._statuses()
        view = Survey(self.mesh, statuses, {}, {}).view
        todo = programme(self.work, view, self.sizes, self.hosts, self.shards, rings=rings)
        self.reader = todo.reader
        for way in todo.left_out:
            self.watcher.note(
                f"{_title(way)} is not made ready: its ring has other members than the one for "
                f"{'x'.join(map(str, self.sizes[0]))}."
            )
        new_ring = () if self._is_ring(statuses, todo.ring) else todo.ring  # may end its engines
        reads = todo.reader is not None and (
            "text encoders" not in statuses[todo.reader].components
        )
        cold = [
            way
            for way in todo.ways
            if not (self._is_ready(way, statuses) and set(way.ranks).isdisjoint(new_ring))
        ]
        ranks = {rank for way in cold for rank in way.ranks}
        if reads and todo.reader is not None:
            ranks.add(todo.reader)
        try:
            for rank in sorted(ranks):  # in rank order, so that no two can deadlock
                self._errands[rank] = await self._lease(rank)
            return await self._try(cold, new_ring, todo.reader if reads else None)
        finally:
            for errand in self._errands.values():
                with contextlib.suppress(FluxmeshError):
                    await errand.client.ask(messages.LeaveQueue(), messages.Done)

    async def _statuses(self) -> dict[int, messages.Status]:
        async def ask(rank: int) -> messages.Status:
            return await self.clients[rank].ask(messages.AskStatus(), messages.Status)

        statuses = await together(map(ask, self.clients))
        return dict(sorted(zip(self.clients, statuses, strict=True)))

    async def _lease(self, rank: int) -> Errand:
        waiting = PlaceInLine(self.watcher.note, rank)
        client = self.clients[rank]
        granted = await client.lease("up, trial pictures", 60.0, waiting, "getting ready")
        return Errand(client, granted, self.work)

    async def _read(self, rank: int) -> None:
        """Loads the text encoders and runs them once."""
        self.watcher.stage("Loading the text encoders")
        errand = self._errands[rank]
        await self._do(rank, messages.Encode(**errand.common, weights=errand.weights, prompt=""))

    async def _try(self, ways: Sequence[Way], ring: tuple[int, ...], reader: int | None) -> bool:
        """Reads the prompt and makes a picture in each way. False where the ring failed.

        `ring` is formed before all that: an engine that leaves another ring for it starts anew.
        """
        try:
            if ring:
                self.watcher.stage("Forming the ring")
                await self._form(ring)
                statuses = await self._statuses()
                ways = [way for way in ways if not self._is_ready(way, statuses)]
        except HostUnreachableError:
            raise
        except FluxmeshError as error:
            self.watcher.note(f"The ring of hosts {', '.join(map(str, ring))} failed: {error}")
            await self._end_engines(ring)
            return False
        if reader is not None:
            await self._read(reader)
        stage = ""
        for way in ways:
            size = "x".join(map(str, way.size))
            if stage != size:
                stage = size
                self.watcher.stage(f"Getting ready for pictures of {size}")
            start = time.monotonic()
            try:
                await together(self._warm(rank, way) for rank in way.ranks)
            except HostUnreachableError:
                raise
            except FluxmeshError as error:
                self.watcher.note(f"{_title(way)} could not be made ready: {error}")
                if way.placement != "data":
                    await self._end_engines(way.ranks)
                    return False
                continue
            seconds = time.monotonic() - start
            self.watcher.warmed(way.placement, way.ranks, way.size, seconds)
        return True

    def _is_ready(self, way: Way, statuses: Mapping[int, messages.Status]) -> bool:
        """Whether every host of it has made such a step, in the ring that it is in."""
        if way.placement != "data" and not self._is_ring(statuses, way.ranks):
            return False
        shape = way.shape(self.work.weights)
        return all(shape in statuses[rank].compiled for rank in way.ranks)

    def _is_ring(self, statuses: Mapping[int, messages.Status], ranks: tuple[int, ...]) -> bool:
        """Whether the engines of these hosts are the ring already that a job would form."""
        if not ranks:
            return False
        first = statuses[ranks[0]]
        backend = self.mesh.fallback.backend(self.mesh.hostfile.backend, ranks)
        return bool(first.ring) and all(
            host_info(rank, statuses[rank]).ring
            == RingPlace(first.ring, place, len(ranks), backend)
            and statuses[rank].ring_generation == first.ring_generation
            for place, rank in enumerate(ranks)
        )

    async def _form(self, ring: tuple[int, ...]) -> None:
        infos = {
            host.rank: host for host in Survey(self.mesh, await self._statuses(), {}, {}).view.hosts
        }
        members = {rank: self._errands[rank] for rank in ring}
        findings = await form_known_ring(members, infos, self.mesh, self.watcher.note)
        self.mesh = replace(self.mesh, faults=findings.faults)
        await self.learn(findings)

    async def _end_engines(self, ranks: Iterable[int]) -> None:
        """A survivor of a broken ring can hang."""
        for rank in ranks:
            with contextlib.suppress(FluxmeshError):
                await self._errands[rank].begin_anew()

    async def _warm(self, rank: int, way: Way) -> None:
        errand = self._errands[rank]
        height, width = way.size
        warm = messages.Warm(
            **errand.common,
            weights=errand.weights,
            height=height,
            width=width,
            placement=way.placement,
            shares=way.shares,
        )
        await self._do(rank, warm)

    async def _do(self, rank: int, work: messages.Work) -> None:
        """Raises what the engine failed with."""
        errand = self._errands[rank]
        try:
            async with asyncio.timeout(DEADLINES.tried_step):
                async for report in errand.do(work, DEADLINES.engine_sign):
                    if isinstance(report, messages.LoadProgress):
                        what, done, total = report.component, report.done_bytes, report.total_bytes
                        self.watcher.progress(rank, what, done, total)
        except TimeoutError:
            raise FluxmeshError(
                f"{errand.client.title}: a first step is not done after "
                f"{DEADLINES.tried_step:.0f} s; look at `fluxmesh logs`."
            ) from None


def _title(way: Way) -> str:
    hosts = ", ".join(map(str, way.ranks))
    return f"{way.placement} at {'x'.join(map(str, way.size))} on hosts {hosts}"


def keeps(
    work: Workload,
    hosts: Sequence[int],
    shards: int,
    reader: int | None,
    idle: Iterable[int] = (),
    shares: Shares = EVEN,
) -> dict[int, messages.Keep]:
    """What each host is to hold, whatever happens to its engine; `idle` ones nothing."""
    wanted = {rank: messages.Keep(weights=None) for rank in idle}
    for place, rank in enumerate(hosts):
        components: tuple[str, ...] = ("transformer", "autoencoder")
        if rank == reader:
            components = (*components, "text encoders")
        shard = place if shards > 1 else 0
        wanted[rank] = messages.Keep(
            weights=work.weights, shards=shards, shard=shard, shares=shares, components=components
        )
    if reader is not None and reader not in hosts:  # it reads for the others
        wanted[reader] = messages.Keep(
            weights=work.weights, shards=1, shard=0, components=("text encoders",)
        )
    return wanted

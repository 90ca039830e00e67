"""Where a job stands: its plan, its hosts, its images, and what every unit of work needs. Pure.

Shared by `session.py` (what happens), `dispatch.py` (what is to be done next) and `recovery.py`
(what is lost and given back).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fluxmesh.cluster.snapshot import Holding, HostInfo, MeshView
from fluxmesh.planning.plan import Option, Phase, Plan, plan
from fluxmesh.planning.workload import Work
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs.generation.images import Album
from fluxmesh_coordinator.jobs.host import Worker
from fluxmesh_coordinator.jobs.model_check import Contents
from fluxmesh_coordinator.jobs.ring import Ring
from fluxmesh_coordinator.jobs.types import Job, Links

Send = Callable[[Worker, messages.Changing], None]


@dataclass
class Course:
    """One job's state. A `Phase` of the plan is under way while images of it are unpainted."""

    job: Job
    work: Work
    album: Album
    contents: Contents
    workers: dict[int, Worker] = field(default_factory=dict)  # by rank; those that can be used
    links: Links = field(default_factory=Links)
    option: Option | None = None  # how what is left is done; None while nothing can do it
    phases: list[Phase] = field(default_factory=list)  # the first is under way
    ring: Ring | None = None  # of the phase, or kept from an earlier one
    features: messages.Encoded | None = None  # of the prompt
    source: np.ndarray | None = None  # of the picture to begin from, float32 [1, L, 4C]
    needs_plan: bool = False  # once all engines that are being ended have ended
    losses: int = 0
    shuns_rings: bool = False  # once one was lost for a host that came late

    @classmethod
    def of(cls, job: Job) -> Course:
        work, request = Work.of(job.request, job.sizes), job.request
        return cls(
            job,
            work,
            Album(
                request.n_images,
                work.steps,
                request.decoding_batch_size,
                decode_last=request.low_memory,
            ),
            Contents(request.model),
        )

    @property
    def in_ring(self) -> bool:
        """Whether the phase under way is one in which hosts work on one image together."""
        return bool(self.phases) and self.phases[0].placement != "data"

    @property
    def is_killing(self) -> bool:
        return any(worker.killed is not None for worker in self.workers.values())

    @property
    def members(self) -> list[Worker]:
        """Who works in this phase, or decodes after the last one; in the order of its ring."""
        ranks = self.phases[0].ranks if self.phases else ()
        if not ranks and self.option is not None:
            ranks = self.option.ranks
        found = [self.workers[rank] for rank in ranks if rank in self.workers]
        return found or list(self.workers.values())

    @property
    def reader(self) -> Worker | None:
        """Who runs the text encoders."""
        chosen = None if self.option is None else self.option.text_rank
        if chosen is not None and chosen in self.workers:
            return self.workers[chosen]
        return next(iter(self.members), None)

    @property
    def encoders_stay(self) -> bool:
        """Whether the text encoders stay in memory after the prompt is read."""
        request = self.job.request
        fits = self.option is not None and self.option.text_stays
        return request.preload or (fits and self.job.warm and not request.low_memory)

    @property
    def can_paint(self) -> bool:
        """Whether the prompt is read, and the picture to begin from."""
        has_source = self.job.request.source is None or self.source is not None
        return self.features is not None and has_source

    def has_ring_with(self, rank: int) -> bool:
        """Whether a host's death is the death of the ring that works now, or forms."""
        return self.ring is not None and self.in_ring and rank in self.ring.ranks

    def find(self, hosts: Sequence[HostInfo]) -> Plan:
        """How what is left is best done by these hosts, as a request of that many images.

        After a ring was lost for a late host, by `data` where any host can, whatever was asked for.
        """
        left = max(1, len(self.album.unpainted))
        request = replace(self.job.request, n_images=left)
        ordered = tuple(sorted(hosts, key=lambda host: host.rank))
        view = MeshView(ordered, self.links.links, self.links.backend)
        placement, force = self.job.placement, self.job.force_shard
        if self.shuns_rings:
            found = plan(request, view, self.job.sizes, placement="data")
            if found.winner is not None:
                return found
        found = plan(request, view, self.job.sizes, placement=placement, force_shard=force)
        if found.winner is None and self.losses and hosts:
            # A picture that is finished in another way is better than none.
            found = plan(request, view, self.job.sizes)
        return found

    def plan(self) -> Plan:
        """Settles how what is left is done by the hosts that are left: `option` and `phases`."""
        left = self.album.unpainted
        found = self.find([worker.info for worker in self.workers.values()])
        self.needs_plan = False
        self.option, self.phases, self.ring = found.winner, [], None
        if found.winner is not None and left:
            self.phases = [
                replace(phase, images=tuple(left[k] for k in phase.images))
                for phase in found.winner.phases
            ]
        self.enter()
        return found

    def join_phase(self, rank: int) -> None:
        """A host that returned takes part in the phase under way, which is one of `data`."""
        phase = self.phases[0]
        self.phases[0] = replace(phase, ranks=tuple(sorted({*phase.ranks, rank})))

    def enter(self) -> None:
        """A phase begins: every engine is told what it must hold."""
        for worker in self.workers.values():
            worker.is_loaded = False

    def holds(self, worker: Worker, holding: Holding | None) -> None:
        """Keeps the view true: agents on one device share what is free there."""
        more = worker.hold(holding)
        for other in self.workers.values():
            if other.info.device_key == worker.info.device_key:
                free = max(0, other.info.free_bytes - more)
                other.info = replace(other.info, free_bytes=free)

    def give_back(self, worker: Worker) -> None:
        """What its engine had in line is for others, and what it held is gone."""
        worker.line.clear()
        self.album.give_back(worker.rank)
        self.holds(worker, None)

"""Where a generation stands: its plan, its images, and what every unit of work needs. Pure.

Shared by `session.py` (what happens) and `dispatch.py` (what is to be done next); what all kinds of
job have stands in `jobs/state.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fluxmesh.cluster.snapshot import Holding, HostInfo, Placement
from fluxmesh.planning.plan import Option, Phase, Plan, plan
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import FilledRequest
from fluxmesh_coordinator.jobs.generation.images import ImageTable
from fluxmesh_coordinator.jobs.host import HostState
from fluxmesh_coordinator.jobs.state import JobState
from fluxmesh_coordinator.jobs.types import Job


@dataclass(frozen=True, kw_only=True)
class GenerationJob(Job):
    """A request, ready for a mesh: nothing is left open, adapters are named by hash."""

    request: FilledRequest
    sizes: ModelSizes
    placement: Placement | None = None
    force_shard: bool = False
    warm: bool = True  # encoders and autoencoder may stay in memory for the next job


class GenerationState(JobState[HostState]):
    """One job's state. A `Phase` of the plan is under way while images of it are unpainted."""

    job: GenerationJob

    def __init__(self, job: GenerationJob) -> None:
        super().__init__(job, job.request.model)
        request = job.request
        self.work = Workload.of(request, job.sizes)
        self.images = ImageTable(
            request.n_images,
            self.work.steps,
            request.decoding_batch_size,
            decode_last=request.low_memory,
        )
        self.option: Option | None = None  # how what is left is done; None: nothing can do it
        self.phases: list[Phase] = []  # the first is under way
        self.features: Mapping[str, np.ndarray] | None = (
            None  # of the prompt, as an engine gave them
        )
        self.source: np.ndarray | None = None  # of the picture to begin from, float32 [1, L, 4C]
        self.needs_plan = False  # once all engines that are being ended have ended

    @property
    def in_ring(self) -> bool:
        """Whether the phase under way is one in which hosts work on one image together."""
        return bool(self.phases) and self.phases[0].placement != "data"

    @property
    def members(self) -> list[HostState]:
        """Who works in this phase, or decodes after the last one; in the order of its ring."""
        ranks = self.phases[0].ranks if self.phases else ()
        if not ranks and self.option is not None:
            ranks = self.option.ranks
        members = [self.hosts[rank] for rank in ranks if rank in self.hosts]
        return members or list(self.hosts.values())

    @property
    def reader(self) -> HostState | None:
        """Who runs the text encoders."""
        chosen = None if self.option is None else self.option.text_rank
        if chosen is not None and chosen in self.hosts:
            return self.hosts[chosen]
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

    # The plan

    def find(self, hosts: Sequence[HostInfo]) -> Plan:
        """How what is left is best done by these hosts, as a request of that many images.

        After a ring was lost for a late host, by `data` where any host can, whatever was asked for.
        """
        left = max(1, len(self.images.unpainted))
        request = replace(self.job.request, n_images=left)
        view = self.links.view(hosts)
        placement, force = self.job.placement, self.job.force_shard
        if self.shuns_rings:
            proposal = plan(request, view, self.job.sizes, placement="data")
            if proposal.winner is not None:
                return proposal
        proposal = plan(request, view, self.job.sizes, placement=placement, force_shard=force)
        if proposal.winner is None and self.losses and hosts:
            # A picture that is finished in another way is better than none.
            proposal = plan(request, view, self.job.sizes)
        return proposal

    def plan(self) -> Plan:
        """Settles how what is left is done by the hosts that are left: `option` and `phases`."""
        left = self.images.unpainted
        settled = self.find([host.now for host in self.hosts.values()])
        self.needs_plan = False
        self.option, self.phases, self.ring = settled.winner, [], None
        if settled.winner is not None and left:
            self.phases = [
                replace(phase, images=tuple(left[k] for k in phase.images))
                for phase in settled.winner.phases
            ]
        self.enter()
        return settled

    def join_phase(self, rank: int) -> None:
        """A host that returned takes part in the phase under way, which is one of `data`."""
        phase = self.phases[0]
        self.phases[0] = replace(phase, ranks=tuple(sorted({*phase.ranks, rank})))

    def enter(self) -> None:
        """A phase begins: every engine is told what it must hold."""
        for host in self.hosts.values():
            host.is_loaded = False

    def holds(self, host: HostState, holding: Holding | None) -> None:
        """Keeps the view true: agents on one device share what is free there."""
        more = host.hold(holding)
        for other in self.hosts.values():
            if other.info.device_key == host.info.device_key:
                free = max(0, other.info.free_bytes - more)
                other.info = replace(other.info, free_bytes=free)

    # Losses

    def has_ring_with(self, rank: int) -> bool:
        return self.in_ring and super().has_ring_with(rank)

    def give_back(self, host: HostState) -> None:
        host.let_go()
        self.images.give_back(host.rank)
        self.holds(host, None)

    def goes_on_without(self, rank: int) -> None:
        if not self.phases:
            self.needs_plan = self.needs_plan or not self.hosts
            return
        left = tuple(other for other in self.phases[0].ranks if other in self.hosts)
        if any(set(phase.ranks) - set(self.hosts) for phase in self.phases[1:]):
            self.needs_plan = True  # a ring that was to work later
        elif self.in_ring:
            self.needs_plan = self.needs_plan or rank in self.phases[0].ranks
        elif left:
            self.phases[0] = replace(self.phases[0], ranks=left)
        else:
            self.needs_plan = True

    def ring_ends(self) -> None:
        if self.ring is not None:
            self.images.give_back(self.ring.ranks[0])
        self.ring, self.phases, self.needs_plan = None, [], True

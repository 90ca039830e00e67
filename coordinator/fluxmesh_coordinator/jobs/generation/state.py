"""Where a generation stands: its plan, its images, and what every unit of work needs. Pure.

Shared by `session.py` (what happens) and `dispatch.py` (what is to be done next); what all kinds of
job have stands in `jobs/state.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fluxmesh.cluster.snapshot import Holding, HostInfo, Placement, TextHolding
from fluxmesh.planning.candidates import read_elsewhere, text_leaves
from fluxmesh.planning.plan import Option, Phase, Plan, plan
from fluxmesh.planning.text_place import TextPlace
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import FilledRequest
from fluxmesh.wire.messages import Load
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
    reader: str = ""  # `Checkpoint.content` of what reads references; "" is not known here


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
        self.text: TextPlace | None = None  # who reads the prompt, and how
        self.read_by: int | None = None  # who has read it
        self.phases: list[Phase] = []  # the first is under way
        self.features: Mapping[str, np.ndarray] | None = (
            None  # of the prompt, as an engine gave them
        )
        self.start = job.sizes.architecture.start(request)  # the picture to begin from
        self.source: np.ndarray | None = None  # of the picture to begin from, float32 [1, L, 4C]
        # Other pictures that the model reads, by name, and what an engine made of them.
        self.pictures = job.sizes.architecture.pictures(request)
        self.conditions: Mapping[str, np.ndarray] | None = None
        # Whether they are read where the prompt is, by models that come after the text encoders.
        self.sees = bool(self.pictures and job.sizes.architecture.of_role("vision"))
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
        if self.text is not None and self.text.rank in self.hosts:
            return self.hosts[self.text.rank]
        return next(iter(self.members), None)

    @property
    def spare_reader(self) -> int | None:
        """Who has read the prompt and has no part in what comes then, if it is here still."""
        is_over = self.is_read and self.option is not None and not self.needs_plan
        if self.read_by not in self.hosts or self.option is None or not is_over:
            return None
        at_work = {*self.option.ranks, *(rank for phase in self.phases for rank in phase.ranks)}
        is_spare = self.read_by not in at_work and self.hosts[self.read_by].is_free
        return self.read_by if is_spare else None

    @property
    def text_leaves(self) -> tuple[int, ...]:
        """Hosts whose text encoders must leave before their weights load."""
        return () if self.option is None else self.option.text_leaves

    @property
    def is_read(self) -> bool:
        """Whether the prompt is read, and what is read with it."""
        return self.features is not None and (not self.sees or self.conditions is not None)

    @property
    def picture_reader(self) -> HostState | None:
        """Who encodes pictures: one who decodes some, too, and so needs the autoencoder."""
        members, rank = self.members, self.option and self.option.picture_rank
        chosen = next((host for host in members if host.rank == rank), None)
        return chosen or next(iter(members), None)

    def memory_on(self, rank: int) -> int:
        """Bytes that the job takes on a host, by its plan; 0: the plan does not know that host."""
        usage = () if self.option is None else self.option.usage
        return next(
            (max(u.text, u.pictures, u.denoise, u.decode) for u in usage if u.rank == rank), 0
        )

    @property
    def encoders_stay(self) -> bool:
        """Whether the text encoders stay in memory after the prompt is read."""
        request = self.job.request
        fits = self.text is not None and self.text.way in ("stays", "remembered")
        return request.preload or (fits and self.job.warm and not request.low_memory)

    @property
    def can_paint(self) -> bool:
        """Whether the prompt is read, and every picture that the job comes with."""
        return self.features is not None and self.are_encoded

    @property
    def are_encoded(self) -> bool:
        """Whether every picture that the job comes with is."""
        has_source = self.start is None or self.source is not None
        return has_source and (not self.pictures or self.conditions is not None)

    # The plan

    def find(self, hosts: Sequence[HostInfo]) -> Plan:
        """How what is left is best done by these hosts, as a request of that many images.

        After a ring was lost for a late host, by `data` where any host can, whatever was asked for.
        """
        left = max(1, len(self.images.unpainted))
        request = replace(self.job.request, n_images=left)
        view = self.links.view(hosts)
        placement, force = self.job.placement, self.job.force_shard
        find = partial(
            plan, request, view, self.job.sizes, is_read=self.is_read, are_encoded=self.are_encoded
        )
        if self.shuns_rings:
            proposal = find(placement="data")
            if proposal.winner is not None:
                return proposal
        proposal = find(placement=placement, force_shard=force)
        if proposal.winner is None and self.losses and hosts:
            # A picture that is finished in another way is better than none.
            proposal = find()
        return proposal

    def plan(self) -> Plan:
        """Settles how what is left is done by the hosts that are left: `option` and `phases`."""
        left = self.images.unpainted
        settled = self.find([host.now for host in self.hosts.values()])
        self.needs_plan = False
        self.option, self.phases, self.ring = settled.winner, [], None
        self.text = None if settled.winner is None else settled.winner.text
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
        view = self.links.view(host.now for host in self.hosts.values())
        if self.option is not None and text_leaves(self.work, view, rank):
            leaves = (*self.option.text_leaves, rank)
            self.option = replace(self.option, text_leaves=leaves)

    def enter(self) -> None:
        """A phase begins: every engine is told what it must hold."""
        for host in self.hosts.values():
            host.is_loaded = False

    def holds(self, host: HostState, holding: Holding | None) -> None:
        """Keeps the view true of the denoiser."""
        self._takes(host, host.hold(holding))

    def has_read(self, host: HostState, *, encoders_stay: bool) -> None:
        """Keeps the view true of the text encoders, which a new plan may have to send away."""
        nbytes = self.work.text_bytes if encoders_stay else 0
        text = TextHolding(weights=self.work.weights, nbytes=nbytes, prompts=(self.work.mark,))
        self._takes(host, host.can_read(text))

    def encoders_leave(self, host: HostState) -> None:
        """It was told to let text encoders go."""
        if host.info.text is not None:
            self._takes(host, host.can_read(replace(host.info.text, nbytes=0)))

    def _takes(self, host: HostState, more: int) -> None:
        """Agents on one device share what is free there."""
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
        if self.option and self.option.picture_rank == host.rank and not self.are_encoded:
            self.needs_plan = True  # who encodes pictures is chosen for its memory
        if self.text is not None and self.text.rank == host.rank and not self.is_read:
            self._place_text(host.rank)

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

    def _place_text(self, lost: int) -> None:
        """Another host than `lost` reads the prompt, if one can; all else goes on as planned."""
        self.text = None
        if self.option is not None and self.hosts:
            view = self.links.view(map(self._once_loaded, self.hosts.values()))
            self.text = read_elsewhere(self.work, view, self.option, lost)
        self.needs_plan = self.needs_plan or self.text is None

    def _once_loaded(self, host: HostState) -> HostInfo:
        """The host as it is when its turn to read comes: weights on their way are there by then."""
        load = next((unit.message for unit in host.line if isinstance(unit.message, Load)), None)
        if load is None or load.low_memory:
            return host.now
        share = self.work.share("tensor", load.shards, load.shares, load.shard)
        nbytes = self.work.transformer.on_each_of(load.shards, self.work.weights_part(share))
        text = 0 if host.info.text is None else host.info.text.nbytes
        holding = Holding(
            weights=load.weights,
            nbytes=nbytes + text,
            shards=load.shards,
            shard=load.shard,
            shares=load.shares,
        )
        then = replace(host.now, holds=holding)
        more = then.held_bytes - host.info.held_bytes
        return replace(then, free_bytes=max(0, then.free_bytes - more))

    def ring_ends(self) -> None:
        if self.ring is not None:
            self.images.give_back(self.ring.ranks[0])
        self.ring, self.phases, self.needs_plan = None, [], True

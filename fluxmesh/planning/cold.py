"""What a mesh is not ready for: rings to form, engines that end for it, steps never made. Pure.

Beside `cost.py`, which has the times of what is warm. A ring of other members ends the engines that
are in another one, and all that they hold. An engine compiles a model's kernels at its first step,
whatever its size, and the few that another size or placement needs at the first step of those: one
takes from seconds to minutes, the other as good as nothing on CUDA. What each takes is known from
`up` and from jobs; where nobody measured it, nothing is added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fluxmesh.cluster.snapshot import JobTiming, MeshView, Placement, StepShape, StepTiming
from fluxmesh.planning.cost import is_of
from fluxmesh.planning.workload import Workload

RESTARTING = ("nccl",)  # backends that an engine starts anew for: the environment names its device


class Extras(NamedTuple):
    """What a request costs beside loading, steps and decodes."""

    begin: float  # seconds before its first step: the prompt is read
    gap: float  # seconds of each image: what travels, and waits


class Distance(NamedTuple):
    """How unlike a measurement is to what is asked about: the least is the best known."""

    is_other_placement: bool
    size: float
    hosts: int
    has_other_members: bool
    age: float

    @property
    def besides_size(self) -> Distance:
        """For what takes as long at every size."""
        return self._replace(size=0.0)


class Cold:
    """How far a view is from ready for one request."""

    def __init__(self, work: Workload, view: MeshView) -> None:
        self.work, self.view = work, view
        self._jobs = [job for job in view.timings.jobs if is_of(job.measured, work)]

    def is_formed(self, ranks: Sequence[int]) -> bool:
        """Whether the engines of these hosts are one ring, in this order."""
        places = [self.view.host(rank).ring for rank in ranks]
        name = places[0].name
        return bool(name) and all(
            (place.name, place.rank, place.size) == (name, i, len(ranks))
            for i, place in enumerate(places)
        )

    def ending(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Of these hosts, those whose engines end, and lose their weights, to form this ring."""
        if self.is_formed(ranks):
            return ()
        if self.view.backend in RESTARTING:
            return tuple(ranks)
        return tuple(rank for rank in ranks if self.view.host(rank).ring.name)

    def forming_seconds(self, ranks: Sequence[int]) -> float:
        """Until these engines are one ring; as rings of about this size took where it is new."""
        if self.is_formed(ranks):
            return 0.0
        known = [
            ring
            for ring in self.view.timings.rings
            if ring.backend == self.view.backend and ring.forming_seconds
        ]
        nearest = min(
            known,
            key=lambda ring: (
                ring.ranks != tuple(ranks),
                abs(len(ring.ranks) - len(ranks)),
                -ring.when,
            ),
            default=None,
        )
        return 0.0 if nearest is None else nearest.forming_seconds

    def first_seconds(self, placement: Placement, ranks: Sequence[int]) -> float:
        """By how much the first step takes longer than the next; 0 where these have made one."""
        work, hosts = self.work, [self.view.host(rank) for rank in ranks]
        ending = () if placement == "data" else self.ending(ranks)
        shape = StepShape.of(work.weights, placement, len(ranks), work.height, work.width)
        if ending or not all(host.has_kernels(work.weights) for host in hosts):
            seconds = self._kernels_seconds(placement, ranks)
            if seconds is not None:  # with what the shape takes
                return seconds
        elif all(shape in host.compiled for host in hosts):
            return 0.0
        known = [
            (self._distance(measured, placement, members, ranks), measured.first_seconds)
            for measured, members in self._measured()
            if measured.first_seconds is not None
        ]
        return min(known, default=((), 0.0))[1]

    def _kernels_seconds(self, placement: Placement, ranks: Sequence[int]) -> float | None:
        """By how much the first step of an engine took longer, at whatever size."""
        known = [
            (self._distance(measured, placement, members, ranks).besides_size, seconds)
            for measured, members in self._measured()
            if (seconds := measured.kernels_seconds) is not None
        ]
        return min(known)[1] if known else None

    def extras(self, placement: Placement, ranks: Sequence[int]) -> Extras:
        """As jobs measured them, on these hosts at about this size if they did."""
        near = sorted(
            self._jobs,
            key=lambda job: self._distance(job.measured, placement, job.ranks, ranks),
        )
        begins = (job.begin_seconds for job in near if job.begin_seconds is not None)
        gaps = (job.gap_seconds for job in near if job.gap_seconds is not None)
        return Extras(next(begins, 0.0), next(gaps, 0.0))

    def last_job(self, placement: Placement, ranks: Sequence[int]) -> JobTiming | None:
        """What the latest jobs took on just these hosts, at this very size."""
        size = (self.work.height, self.work.width)
        jobs = [
            job
            for job in self._jobs
            if (job.measured.placement, job.ranks) == (placement, tuple(ranks))
            and (job.measured.height, job.measured.width) == size
            and job.backend in ("", self.view.backend)
        ]
        return max(jobs, key=lambda job: job.measured.when, default=None)

    def _measured(self) -> list[tuple[StepTiming, tuple[int, ...]]]:
        """Everything timed on these weights, with the hosts that it was timed on."""
        of_hosts = [
            (measured, (host.rank,))
            for host in self.view.hosts
            for measured in host.measured
            if is_of(measured, self.work)
        ]
        return [*of_hosts, *((job.measured, job.ranks) for job in self._jobs)]

    def _distance(
        self,
        measured: StepTiming,
        placement: Placement,
        members: tuple[int, ...],
        ranks: Sequence[int],
    ) -> Distance:
        pixels = self.work.height * self.work.width
        return Distance(
            measured.placement != placement,
            abs(math.log(pixels / (measured.height * measured.width))),
            abs(measured.hosts - len(ranks)),
            set(members) != set(ranks),
            -measured.when,
        )

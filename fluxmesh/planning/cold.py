"""What a mesh is not ready for: rings to form, engines that end for it, steps never made. Pure.

Beside `cost.py`, which has the times of what is warm. A ring of other members ends the engines that
are in another one, and all that they hold. An engine compiles a model's kernels at its first step,
whatever its size, those that another placement needs at its first step by that one, and the few
that another size needs at the first of those: from seconds to minutes, some seconds, and as good as
nothing on CUDA. What each takes is known from `up` and from jobs; where nobody measured it, nothing
is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

from fluxmesh.cluster.snapshot import (
    FIRSTS,
    JobTiming,
    MeshView,
    Placement,
    RingPlace,
    StepShape,
    StepTiming,
)
from fluxmesh.planning.cost import is_of
from fluxmesh.planning.workload import Workload

RESTARTING = ("nccl",)  # backends that an engine starts anew for: the environment names its device


class Extras(NamedTuple):
    """What a request costs beside loading, steps and decodes."""

    begin: float  # seconds before its first step: the prompt is read
    gap: float  # seconds of each image: what travels, and waits


class Known(NamedTuple):
    """A time that was measured, of several that are equally like what is asked about."""

    age: float
    members: frozenset[int]  # the hosts that it was measured on
    seconds: float


class Cold:
    """How far a view is from ready for one request."""

    def __init__(self, work: Workload, view: MeshView) -> None:
        self.work, self.view = work, view
        self._jobs = [job for job in view.timings.jobs if is_of(job.measured, work)]
        self._near: dict[tuple[str, Placement, int], list[Known]] = {}

    def is_formed(self, ranks: Sequence[int]) -> bool:
        """Whether the engines of these hosts are one ring, in this order."""
        places = [self.view.host(rank).ring for rank in ranks]
        name, backend = places[0].name, self.view.backend_of(tuple(ranks))
        return bool(name) and all(
            place == RingPlace(name, i, len(ranks), backend) for i, place in enumerate(places)
        )

    def ending(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Of these hosts, those whose engines end, and lose their weights, to form this ring."""
        if self.is_formed(ranks):
            return ()
        if self.view.backend_of(tuple(ranks)) in RESTARTING:
            return tuple(ranks)
        return tuple(rank for rank in ranks if self.view.host(rank).ring.name)

    def forming_seconds(self, ranks: Sequence[int]) -> float:
        """Until these engines are one ring; as rings of about this size took where it is new."""
        if self.is_formed(ranks):
            return 0.0
        backend = self.view.backend_of(tuple(ranks))
        known = [
            ring
            for ring in self.view.timings.rings
            if ring.backend == backend and ring.forming_seconds
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
            names = FIRSTS
        elif all(shape in host.compiled for host in hosts):
            return 0.0
        elif all(host.has_taken(shape) for host in hosts):
            names = FIRSTS[2:]
        else:
            names = FIRSTS[1:]
        known = (self._nearest(name, placement, ranks) for name in names)
        return next((seconds for seconds in known if seconds is not None), 0.0)

    def _nearest(self, name: str, placement: Placement, ranks: Sequence[int]) -> float | None:
        """One of `FIRSTS`, as it was measured where that was most like this."""
        members = frozenset(ranks)
        best = min(
            self._nearest_of(name, placement, len(ranks)),
            key=lambda known: (known.members != members, known.age, known.seconds),
            default=None,
        )
        return None if best is None else best.seconds

    def _nearest_of(self, name: str, placement: Placement, hosts: int) -> list[Known]:
        """What is known of a time, of the placement, size and number of hosts most like these.

        `name` is that of a field of `StepTiming`, or else of `JobTiming`.
        """
        how = (name, placement, hosts)
        if how not in self._near:
            # All kernels, or all of a placement, take as long at every size.
            counts_size = name not in FIRSTS[:2]
            groups: dict[tuple[bool, float, int], list[Known]] = {}
            for measured, members, seconds in self._times(name):
                size = self._size_distance(measured) if counts_size else 0.0
                like = (measured.placement != placement, size, abs(measured.hosts - hosts))
                groups.setdefault(like, []).append(Known(-measured.when, members, seconds))
            self._near[how] = groups[min(groups)] if groups else []
        return self._near[how]

    def _times(self, name: str) -> Iterator[tuple[StepTiming, frozenset[int], float]]:
        """All that was measured of a time: on what, by which hosts, seconds."""
        if name in FIRSTS:
            for measured, members in self._measured:
                if (seconds := getattr(measured, name)) is not None:
                    yield measured, members, seconds
            return
        for job in self._jobs:
            if (seconds := getattr(job, name)) is not None:
                yield job.measured, frozenset(job.ranks), seconds

    def extras(self, placement: Placement, ranks: Sequence[int]) -> Extras:
        """As jobs measured them, on these hosts at about this size if they did."""
        members = frozenset(ranks)

        def nearest(name: str) -> float:
            best = min(
                self._nearest_of(name, placement, len(ranks)),
                key=lambda known: (known.members != members, known.age),
                default=None,
            )
            return 0.0 if best is None else best.seconds

        return Extras(nearest("begin_seconds"), nearest("gap_seconds"))

    def last_job(self, placement: Placement, ranks: Sequence[int]) -> JobTiming | None:
        """What the latest jobs took on just these hosts, at this very size."""
        size, members = (self.work.height, self.work.width), tuple(ranks)
        backends = ("", self.view.backend_of(members))
        jobs = [
            job
            for job in self._jobs
            if job.ranks == members
            and job.measured.placement == placement
            and (job.measured.height, job.measured.width) == size
            and job.backend in backends
        ]
        return max(jobs, key=lambda job: job.measured.when, default=None)

    @cached_property
    def _measured(self) -> list[tuple[StepTiming, frozenset[int]]]:
        """Everything timed on these weights, with the hosts that it was timed on."""
        of_hosts = [
            (measured, frozenset([host.rank]))
            for host in self.view.hosts
            for measured in host.measured
            if is_of(measured, self.work)
        ]
        return [*of_hosts, *((job.measured, frozenset(job.ranks)) for job in self._jobs)]

    def _size_distance(self, measured: StepTiming) -> float:
        """How unlike its size is to the work's."""
        pixels = self.work.height * self.work.width
        return abs(math.log(pixels / (measured.height * measured.width)))

"""What a job's images take the hosts that paint them, for the plans of later jobs. Pure.

Beside `session.py`, which tells it what is given out and what comes back. Only what a plan can
count on is kept: steps that are neither approximated by a cache nor stretched by previews, on hosts
that have their devices to themselves, of jobs in which nothing was lost.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fluxmesh.cluster.shares import Shares
from fluxmesh.cluster.snapshot import JobTiming, Placement, StepTiming, Timings
from fluxmesh.planning.learning import typical
from fluxmesh.planning.workload import Workload
from fluxmesh.request import FilledRequest
from fluxmesh_coordinator.jobs.host import Readiness

# How, by which ranks in the order of their ring, and in which shares.
Members = tuple[Placement, tuple[int, ...], Shares]


@dataclass
class _Image:
    """One image on its way, as the first rank of its ring paints it."""

    members: Members
    readiness: Readiness  # of its painters
    steps: list[float] = field(default_factory=list)  # seconds, as the engine told them
    painting: float = 0.0  # seconds from when it was first in line to its last step


@dataclass
class _Seen:
    """What images of one placement on the same hosts took."""

    steps: list[float] = field(default_factory=list)  # without first ones
    # Seconds that first steps took longer: of new engines, by a new placement, at a new size.
    kernels: list[float] = field(default_factory=list)
    placements: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)


class JobTimes:
    """The times of one job."""

    def __init__(self, work: Workload, request: FilledRequest) -> None:
        self.work = work
        # Steps with references, or of another number of calls, say nothing of plain ones.
        self.counts = work.is_plain and not (
            request.cache or request.low_memory or request.stepwise
        )
        self._images: dict[int, _Image] = {}
        self._seen: dict[Members, _Seen] = {}
        self._begun: float | None = None  # when the job began; None where it had to load or to join
        self._begin: float | None = None  # seconds until its first image was begun

    def begin(self, now: float) -> None:
        """The job has its hosts."""
        self._begun, self._begin = now, None

    def prepares(self) -> None:
        """A host loads, or joins: what comes before the first step is no measure of the next."""
        if self._begin is None:
            self._begun = None

    def encoded(self, seconds: float) -> None:
        """The prompt is read: what that took is known by itself (`TextTiming`)."""
        if self._begun is not None and self._begin is None:
            self._begun += seconds

    def given(self, image: int, members: Members, now: float, readiness: Readiness) -> None:
        """An image is given out from its first step on."""
        self._images[image] = _Image(members, readiness)
        if self._begin is None and self._begun is not None:
            self._begin = max(0.0, now - self._begun)

    def stepped(self, image: int, step: int, seconds: float, painting: float) -> None:
        """A step is done, `painting` seconds after the image came first in line."""
        known = self._images.get(image)
        if known is not None and step == len(known.steps) + 1:
            known.steps.append(seconds)
            known.painting = painting

    def decoded(self, image: int, seconds: float, took: float) -> None:
        """A picture is there: `took` seconds after it came first in line, of which the engine
        tells `seconds`."""
        known = self._images.pop(image, None)
        if known is None or len(known.steps) != self.work.steps:
            return
        seen = self._seen.setdefault(known.members, _Seen())
        rest = _later(known.steps)
        if known.readiness != "warm":
            seen.steps += rest
            if rest and known.readiness != "loading":
                firsts = {"new engine": seen.kernels, "new placement": seen.placements}
                longer = max(0.0, known.steps[0] - typical(rest))
                firsts.get(known.readiness, seen.firsts).append(longer)
            return
        seen.steps += rest or known.steps
        step = typical(rest or known.steps)
        gap = known.painting - step * self.work.steps
        if known.members[0] == "data":  # in a ring, others decode meanwhile
            gap += took - seconds
        seen.gaps.append(max(0.0, gap))
        seen.decodes.append(seconds)

    def news(
        self, backend: Callable[[tuple[int, ...]], str], shared: Iterable[int] = ()
    ) -> Timings:
        """What is worth knowing; nothing of `data` on the ranks that are `shared` devices'.

        `backend` tells what a ring formed over.
        """
        if not self.counts:
            return Timings()
        crowded = set(shared)
        return Timings(
            jobs=tuple(
                self._job(backend(members[1]), members, seen)
                for members, seen in self._seen.items()
                if seen.steps and not (members[0] == "data" and crowded & set(members[1]))
            )
        )

    def _job(self, backend: str, members: Members, seen: _Seen) -> JobTiming:
        (placement, ranks, shares), work = members, self.work
        step = typical(seen.steps)
        measured = StepTiming(
            model=work.weights.model,
            height=work.height,
            width=work.width,
            dtype=work.weights.dtype,
            bits=work.weights.bits,
            step_seconds=step,
            decode_seconds=_known(seen.decodes),
            placement=placement,
            hosts=len(ranks),
            kernels_seconds=max(seen.kernels, default=None),
            placement_seconds=max(seen.placements, default=None),
            first_seconds=max(seen.firsts, default=None),
            shares=shares,
        )
        return JobTiming(
            backend="" if placement == "data" else backend,
            ranks=ranks,
            measured=measured,
            last_seconds=step,
            begin_seconds=self._begin,
            gap_seconds=_known(seen.gaps),
        )


def _later(steps: list[float]) -> list[float]:
    """Of an image's steps those after the first, as long as they are.

    Where the last one begins early (`engine/lookahead.py`) it looks short, and the one before long.
    """
    later = steps[1:]
    return [statistics.mean(later)] if len(later) == 2 else later[:-1] or later


def _known(seconds: list[float]) -> float | None:
    return typical(seconds) if seconds else None

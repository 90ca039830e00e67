"""How long a step and a decode take on one host: measured, or scaled from what was measured. Pure.

Between `workload.py` (the request in numbers) and `plan.py` (which adds the links).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import HostInfo, MeshView, Placement, StepTiming
from fluxmesh.models.base import Architecture
from fluxmesh.planning.workload import Workload

FLOAT32_SLOWER = 2.0  # than bfloat16, where it was not measured
DECODE_RATE = 0.4  # of a step's FLOP/s: convolutions keep a GPU less busy (57 ms at 1024², H200)


Figure = Literal[
    "step",
    "step of a like host",
    "step of another size",
    "step in other shares",
    "collectives",
    "links",
    "arithmetic",
]


class Estimate(NamedTuple):
    """A predicted time, and which figure it comes from."""

    seconds: float
    figure: Figure
    when: float = 0.0  # that figure was measured: seconds since 1970; 0 is not known

    @property
    def measured(self) -> bool:
        """Whether it is a time that was measured at this very size."""
        return self.figure == "step"


def step_time(host: HostInfo, work: Workload, like: Sequence[StepTiming] = ()) -> Estimate:
    """Seconds of one step of one image on this host alone.

    A step timed at this size, by the host or else by those of its kind (`like`); else the one
    nearest in size, by the ratio of their arithmetic; else the arithmetic at the host's rate.
    """
    model = work.model.architecture
    flops = work.step_flops
    candidates: list[tuple[float, bool, float, StepTiming]] = []
    for is_other, timings in ((False, host.measured), (True, like)):
        for timed in timings:
            if timed.placement == "data" and is_of(timed, work):
                ratio = flops / model.step_flops(timed.height, timed.width)
                candidates.append((abs(math.log(ratio)), is_other, ratio, timed))
    if not candidates:
        return Estimate(flops / guessed_rate(host, work), "arithmetic")
    _, is_other, ratio, timed = min(candidates, key=lambda candidate: candidate[:2])
    if (timed.height, timed.width) == (work.height, work.width) and work.is_plain:
        figure: Figure = "step of a like host" if is_other else "step"
        return Estimate(timed.step_seconds, figure, timed.when)
    return Estimate(timed.step_seconds * ratio, "step of another size", timed.when)


def ring_time(
    view: MeshView,
    ranks: tuple[int, ...],
    placement: Placement,
    work: Workload,
    shares: Shares = EVEN,
) -> StepTiming | None:
    """What these hosts took for a step together, at the size nearest to the work's.

    As jobs found on just this ring, or as the hosts timed it with so many; of those that are
    equally near the one with these shares, or else the latest. None where neither did.
    """
    pixels, timings = work.height * work.width, _timed_together(view, ranks, placement, work)
    backend = view.backend_of(ranks)
    timings += [
        job.measured
        for job in view.timings.jobs
        if job.ranks == ranks
        and job.backend == backend
        and job.measured.placement == placement
        and is_of(job.measured, work)
    ]
    return min(
        timings,
        key=lambda timing: (
            abs(math.log(pixels / (timing.height * timing.width))),
            timing.shares != shares,
            -timing.when,
        ),
        default=None,
    )


def _timed_together(
    view: MeshView, ranks: tuple[int, ...], placement: Placement, work: Workload
) -> list[StepTiming]:
    """A step of so many hosts at each size that all of these timed: the slowest one's time."""
    size, backend = len(ranks), view.backend_of(ranks)
    slowest: dict[tuple[int, int, Shares], StepTiming] = {}
    tellers: dict[tuple[int, int, Shares], set[int]] = {}
    for rank in ranks:
        for timed in view.timed(rank).measured:
            if (timed.placement, timed.hosts) != (placement, size) or not is_of(timed, work):
                continue
            if timed.backend not in ("", backend):
                continue
            at = (timed.height, timed.width, timed.shares)
            tellers.setdefault(at, set()).add(rank)
            slowest[at] = max(timed, slowest.get(at, timed), key=lambda timing: timing.step_seconds)
    return [timed for at, timed in slowest.items() if len(tellers[at]) == size]


def decode_time(host: HostInfo, work: Workload, like: Sequence[StepTiming] = ()) -> float:
    """Seconds in which this host alone decodes one image; as `step_time`."""
    pixels = work.height * work.width
    timed = [
        (timed.decode_seconds, pixels / (timed.height * timed.width))
        for timed in (*host.measured, *like)
        if timed.decode_seconds is not None
        and (timed.model, timed.dtype) == (work.weights.model, work.weights.dtype)
    ]
    if timed:
        seconds, ratio = min(timed, key=lambda pair: abs(math.log(pair[1])))
        return seconds * ratio
    flops = decode_flops(work.model.architecture, work.height, work.width)
    return flops / (DECODE_RATE * guessed_rate(host, work))


@lru_cache(maxsize=256)
def decode_flops(model: Architecture, height: int, width: int) -> float:
    """As `Architecture.decode_flops`, which counts every convolution, once."""
    return model.decode_flops(height, width)


def is_of(timed: StepTiming, work: Workload) -> bool:
    """Whether it was measured on the weights that the work needs."""
    weights = work.weights
    return (timed.model, timed.dtype, timed.bits) == (weights.model, weights.dtype, weights.bits)


def guessed_rate(host: HostInfo, work: Workload) -> float:
    """FLOP a second, as an engine guesses at its device when it starts."""
    slower = FLOAT32_SLOWER if work.weights.dtype == "float32" else 1.0
    return host.flops_per_second / slower

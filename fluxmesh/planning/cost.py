"""How long a step and a decode take on one host: measured, or scaled from what was measured. Pure.

Between `workload.py` (the request in numbers) and `plan.py` (which adds the links).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from fluxmesh.cluster.snapshot import HostInfo, MeshView, Placement, StepTiming
from fluxmesh.models.flux1 import tensor_maps
from fluxmesh.models.flux1.config import AutoencoderConfig
from fluxmesh.planning.workload import ModelSizes, Workload

FLOAT32_SLOWER = 2.0  # than bfloat16, where it was not measured
DECODE_RATE = 0.4  # of a step's FLOP/s: convolutions keep a GPU less busy (57 ms at 1024², H200)


Figure = Literal[
    "step", "step of a like host", "step of another size", "collectives", "links", "arithmetic"
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
    flops = step_flops(work.model, work.height, work.width)
    candidates: list[tuple[float, bool, float, StepTiming]] = []
    for is_other, timings in ((False, host.measured), (True, like)):
        for timed in timings:
            if timed.placement == "data" and is_of(timed, work):
                ratio = flops / step_flops(work.model, timed.height, timed.width)
                candidates.append((abs(math.log(ratio)), is_other, ratio, timed))
    if not candidates:
        return Estimate(flops / _rate(host, work), "arithmetic")
    _, is_other, ratio, timed = min(candidates, key=lambda candidate: candidate[:2])
    if (timed.height, timed.width) == (work.height, work.width):
        figure: Figure = "step of a like host" if is_other else "step"
        return Estimate(timed.step_seconds, figure, timed.when)
    return Estimate(timed.step_seconds * ratio, "step of another size", timed.when)


def ring_time(
    view: MeshView, ranks: tuple[int, ...], placement: Placement, work: Workload
) -> StepTiming | None:
    """What these hosts took for a step together, at the size nearest to the work's.

    As jobs found on just this ring, or as the hosts timed it with so many; the later of two that
    are equally near. None where neither did.
    """
    pixels, timings = work.height * work.width, _timed_together(view, ranks, placement, work)
    timings += [
        job.measured
        for job in view.timings.jobs
        if (job.backend, job.ranks) == (view.backend, ranks)
        and job.measured.placement == placement
        and is_of(job.measured, work)
    ]
    return min(
        timings,
        key=lambda timing: (abs(math.log(pixels / (timing.height * timing.width))), -timing.when),
        default=None,
    )


def _timed_together(
    view: MeshView, ranks: tuple[int, ...], placement: Placement, work: Workload
) -> list[StepTiming]:
    """A step of so many hosts at each size that all of these timed: the slowest one's time."""
    size = len(ranks)
    slowest: dict[tuple[int, int], StepTiming] = {}
    tellers: dict[tuple[int, int], set[int]] = {}
    for rank in ranks:
        for timed in view.timed(rank).measured:
            if (timed.placement, timed.hosts) != (placement, size) or not is_of(timed, work):
                continue
            at = (timed.height, timed.width)
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
    flops = decode_flops(work.model.autoencoder, work.height, work.width)
    return flops / (DECODE_RATE * _rate(host, work))


@lru_cache(maxsize=256)
def step_flops(model: ModelSizes, height: int, width: int) -> float:
    """Arithmetic of one step of one image: the blocks' matrices and attention.

    FLUX.1 at 1024x1024 and 512 text tokens: 74.4e12.
    """
    config, tokens = model.transformer, model.tokens(height, width)
    hidden, mlp = config.hidden_size, config.mlp_hidden_dim
    matrices = 4 * hidden**2 + 2 * hidden * mlp  # of a block, as one token meets them
    blocks = config.depth + config.depth_single_blocks
    return float(blocks * tokens * (2 * matrices + 4 * tokens * hidden))


@lru_cache(maxsize=256)
def decode_flops(config: AutoencoderConfig, height: int, width: int) -> float:
    """Arithmetic of decoding one image: every convolution at its resolution, and attention."""
    total = 0.0
    coarsest = len(config.widths) - 1
    for name, target in tensor_maps.autoencoder_tensors(config).items():
        if not name.startswith("decoder.") or len(target.shape) != 4:
            continue
        level = 0 if name.startswith("decoder.conv_out") else coarsest
        if name.startswith("decoder.up."):
            level = int(name.split(".")[2]) - (".upsample." in name)
        total += 2.0 * math.prod(target.shape) * height * width / 4**level
    places = height * width / 4**coarsest
    return total + (4 * places**2 * config.widths[-1] if config.mid_attention else 0)


def is_of(timed: StepTiming, work: Workload) -> bool:
    """Whether it was measured on the weights that the work needs."""
    weights = work.weights
    return (timed.model, timed.dtype, timed.bits) == (weights.model, weights.dtype, weights.bits)


def _rate(host: HostInfo, work: Workload) -> float:
    slower = FLOAT32_SLOWER if work.weights.dtype == "float32" else 1.0
    return host.flops_per_second / slower

"""What would make a request fit that does not: the same planner, asked again with changes. Pure.

Beside `capacity.py`. `plan.py` and `fluxmesh up` say how they tell whether something fits; here is
what is tried, in the order in which it costs the user least: weights of 8 bits, loading the
transformer in two parts for each picture, fewer bits, a smaller picture. Beside these two things
that change no request: memory that other programs hold, and the share of a Mac's memory that macOS
lets a GPU use. A training has ways of its own (`training/needs.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fluxmesh.cluster.snapshot import HostInfo, MeshView
from fluxmesh.planning.workload import Workload

Fits = Callable[[Workload, MeshView], int | None]
"""The most bytes that a host needs, None where a piece of work does not fit on a view."""

MIB = 1 << 20
STEP = 512 * MIB  # the limit of a Mac's GPU is told in such steps
SIDES = (1024, 768, 512)  # of smaller pictures, in pixels


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """One change, or changes that go together, with which it fits."""

    needed: int  # bytes, on the host that then needs most
    bits: int | None = None
    low_memory: bool = False
    one_by_one: bool = False  # text encoders only when they are needed, one picture decoded at once
    side: int = 0  # pixels of a square picture
    grad_checkpoint: bool = False  # of a training, as the next two
    lora_rank: int = 0
    resolution: int = 0  # pixels of a side
    freed: bool = False  # other programs end
    wired_mib: int = 0  # what macOS is told to let the GPU use


def remedies(work: Workload, view: MeshView, fits: Fits) -> tuple[Remedy, ...]:
    """The first change of the request that is enough, and what else would be; () if nothing is."""
    advice = list(_first(_changed(work), view, fits))
    needed = fits(work, _freed(view))
    if needed is not None:
        advice.append(Remedy(needed=needed, freed=True))
    wired = _wired(work, view, fits)
    return (*advice, wired) if wired is not None else tuple(advice)


def for_weights(work: Workload, view: MeshView, fits: Fits) -> tuple[Remedy, ...]:
    """As `remedies`, where nothing but the weights is asked for: of changes, fewer bits alone."""
    changed = (
        (each, how) for each, how in _changed(work) if how == Remedy(needed=0, bits=how.bits)
    )
    advice = list(_first(changed, view, fits))
    wired = _wired(work, view, fits)
    return (*advice, wired) if wired is not None else tuple(advice)


def of_training(
    ways: Sequence[Remedy], view: MeshView, fits: Callable[[int, MeshView], bool]
) -> tuple[Remedy, ...]:
    """As `remedies`: `ways` begin with the training as it is asked for, each with what it needs.

    `fits` tells whether so many bytes do on a host of a view.
    """
    if not ways:
        return ()
    asked, *changed = ways
    advice = [way for way in changed if fits(way.needed, view)][:1]
    if fits(asked.needed, _freed(view)):
        advice.append(replace(asked, freed=True))
    limit = -(-asked.needed // STEP) * STEP
    if fits(asked.needed, _raised_all(view, limit)):
        advice.append(replace(asked, wired_mib=limit // MIB))
    return tuple(advice)


Changed = Iterator[tuple[Workload, Remedy]]


def _first(changed: Changed, view: MeshView, fits: Fits) -> Iterator[Remedy]:
    for work, remedy in changed:
        needed = fits(work, view)
        if needed is not None:
            yield replace(remedy, needed=needed)
            return


def _changed(work: Workload) -> Changed:
    """The work with each change, in the order in which they are tried."""
    if work.preload or work.decoding_batch_size > 1:
        work = replace(work, preload=False, decoding_batch_size=1)
        yield work, Remedy(needed=0, one_by_one=True)
    least = work
    for bits, low_memory in ((8, False), (None, True), (8, True), (4, False), (4, True)):
        now = work.weights.bits
        if bits is not None and (work.model.bits is not None or (now is not None and bits >= now)):
            continue  # a checkpoint that is stored in some bits has no others
        if low_memory and work.low_memory:
            continue
        weights = work.weights if bits is None else replace(work.weights, bits=bits)
        least = replace(work, weights=weights, low_memory=low_memory or work.low_memory)
        yield least, Remedy(needed=0, bits=bits, low_memory=low_memory)
    given = Remedy(needed=0, bits=least.weights.bits, low_memory=least.low_memory)
    for side in SIDES:
        if side**2 < work.height * work.width:
            yield replace(least, height=side, width=side), replace(given, side=side)


def _freed(view: MeshView) -> MeshView:
    """The view, were there no other programs."""
    hosts = (replace(h, free_bytes=max(h.free_bytes, h.memory_bytes)) for h in view.hosts)
    return replace(view, hosts=tuple(hosts))


def _wired(work: Workload, view: MeshView, fits: Fits) -> Remedy | None:
    """The limit of Macs' GPUs with which it fits as it is, if they have so much memory."""
    needed = fits(work, _raised_all(view, math.inf))
    if needed is None:
        return None
    limit = -(-max(needed, work.text_bytes) // STEP) * STEP
    needed = fits(work, _raised_all(view, limit))
    return None if needed is None else Remedy(needed=needed, wired_mib=limit // MIB)


def _raised_all(view: MeshView, limit: float) -> MeshView:
    return replace(view, hosts=tuple(_raised(host, limit) for host in view.hosts))


def _raised(host: HostInfo, limit: float) -> HostInfo:
    """A Mac whose GPU may use up to `limit` bytes, with what macOS itself needs left to it."""
    if host.platform != "metal" or not host.machine_bytes:
        return host
    most = host.machine_bytes - max(4 << 30, host.machine_bytes // 8)
    return replace(host, memory_bytes=int(max(host.memory_bytes, min(limit, most))))

"""What a mesh learns from its jobs: new timings into those that are known. Pure.

`Timings` hold a table of each ring and an average of each kind of job; the coordinator keeps them
in `mesh.json` (`mesh_file.py`). The latest measurement counts `LATEST`, the one before half of the
rest, and so on: a link that has become slow is believed after two or three jobs, and one that was
disturbed once is soon forgotten.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from fluxmesh.cluster.snapshot import JobTiming, RingTiming, StepTiming, TextTiming, Timings

LATEST = 0.5  # of an average
MOST = 256  # kinds of jobs, and rings, that are remembered: the latest

T = TypeVar("T")


def learned(known: Timings, news: Timings) -> Timings:
    """`known` after `news`, which is later."""
    rings = {(ring.backend, ring.ranks): ring for ring in known.rings}
    for ring in news.rings:
        key = (ring.backend, ring.ranks)
        rings[key] = _ring(rings.get(key), ring)
    jobs = {kind(job): job for job in known.jobs}
    for job in news.jobs:
        jobs[kind(job)] = _job(jobs.get(kind(job)), job)
    texts = {text_kind(text): text for text in known.texts}
    for text in news.texts:
        before = texts.get(text_kind(text))
        seconds = text.seconds if before is None else _average(before.seconds, text.seconds)
        texts[text_kind(text)] = replace(text, seconds=seconds)
    return Timings(
        _latest(rings.values(), [ring.when for ring in rings.values()]),
        _latest(jobs.values(), [job.measured.when for job in jobs.values()]),
        _latest(texts.values(), [text.when for text in texts.values()]),
    )


def kind(job: JobTiming) -> Hashable:
    """Equal for jobs whose times are averaged: same weights, size, placement, hosts, shares."""
    m = job.measured
    weights = (m.model, m.dtype, m.bits)
    return (job.backend, job.ranks, m.placement, m.shares, *weights, m.height, m.width)


def text_kind(text: TextTiming) -> Hashable:
    """Equal for readings of prompts whose times are averaged."""
    return (text.rank, text.model, text.dtype, text.bits, text.by_layers)


def dated(news: Timings, when: float) -> Timings:
    """`news` as measured at `when`, in seconds since 1970: sessions know no clock."""
    return Timings(
        tuple(replace(ring, when=when) for ring in news.rings),
        tuple(replace(job, measured=replace(job.measured, when=when)) for job in news.jobs),
        tuple(replace(text, when=when) for text in news.texts),
    )


def _ring(old: RingTiming | None, new: RingTiming) -> RingTiming:
    """The new one; what it did not measure is still as it was."""
    if old is None:
        return new
    if not new.gathers and not new.sums:  # it only formed
        return replace(old, forming_seconds=new.forming_seconds)
    return replace(new, forming_seconds=new.forming_seconds or old.forming_seconds)


def _job(old: JobTiming | None, new: JobTiming) -> JobTiming:
    if old is None:
        return new
    return replace(
        new,
        measured=_measured(old.measured, new.measured),
        begin_seconds=_known(old.begin_seconds, new.begin_seconds),
        gap_seconds=_known(old.gap_seconds, new.gap_seconds),
    )


def _measured(old: StepTiming, new: StepTiming) -> StepTiming:
    return replace(
        new,
        step_seconds=_average(old.step_seconds, new.step_seconds),
        decode_seconds=_known(old.decode_seconds, new.decode_seconds),
        # What one engine has compiled the next one may find on its disk: the latest counts.
        kernels_seconds=old.kernels_seconds if new.kernels_seconds is None else new.kernels_seconds,
        placement_seconds=old.placement_seconds
        if new.placement_seconds is None
        else new.placement_seconds,
        first_seconds=_known(old.first_seconds, new.first_seconds),
    )


def _known(old: float | None, new: float | None) -> float | None:
    """The average of what is known."""
    if old is None or new is None:
        return new if old is None else old
    return _average(old, new)


def _average(old: float, new: float) -> float:
    return LATEST * new + (1 - LATEST) * old


def _latest(items: Iterable[T], when: Sequence[float]) -> tuple[T, ...]:
    """The `MOST` latest, in the order in which they came."""
    elements = list(items)
    kept = sorted(range(len(elements)), key=lambda i: when[i])[-MOST:]
    return tuple(elements[i] for i in sorted(kept))

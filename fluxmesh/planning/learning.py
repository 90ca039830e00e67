"""What a mesh learns from its jobs: new timings into those that are known. Pure.

`Timings` hold a table of each ring, and of each kind of job what is typical of the `RECENT` latest;
the coordinator keeps them in `mesh.json` (`mesh_file.py`). Whatever else a host does makes a job
slower and never faster: the lesser of two times counts, and the middle one of three. So a job that
was disturbed, be it the first, counts for nothing once the next is done, and a link that has become
slow is believed after two.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from fluxmesh.cluster.snapshot import JobTiming, Recent, RingTiming, TextTiming, Timings

RECENT = 3  # jobs of a kind
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
        texts[text_kind(text)] = _text(texts.get(text_kind(text)), text)
    return Timings(
        _latest(rings.values(), [ring.when for ring in rings.values()]),
        _latest(jobs.values(), [job.measured.when for job in jobs.values()]),
        _latest(texts.values(), [text.when for text in texts.values()]),
    )


def kind(job: JobTiming) -> Hashable:
    """Equal for jobs of one history: same weights, size, placement, hosts, shares."""
    m = job.measured
    weights = (m.model, m.dtype, m.bits)
    return (job.backend, job.ranks, m.placement, m.shares, *weights, m.height, m.width)


def text_kind(text: TextTiming) -> Hashable:
    """Equal for readings of prompts of one history."""
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
    before, now = _seconds_of(old), _seconds_of(new)
    recent = _recent(old.recent, before, now)
    known = {**before, **{name: typical(values) for name, values in recent}}
    m, known_m = new.measured, old.measured
    measured = replace(
        m,
        step_seconds=known["step"],
        decode_seconds=known.get("decode"),
        first_seconds=known.get("first"),
        # What one engine has compiled the next one may find on its disk: the latest counts.
        kernels_seconds=known_m.kernels_seconds if m.kernels_seconds is None else m.kernels_seconds,
        placement_seconds=known_m.placement_seconds
        if m.placement_seconds is None
        else m.placement_seconds,
    )
    return replace(
        new,
        measured=measured,
        begin_seconds=known.get("begin"),
        gap_seconds=known.get("gap"),
        recent=recent,
    )


def _text(old: TextTiming | None, new: TextTiming) -> TextTiming:
    if old is None:
        return new
    recent = _recent(old.recent, {"text": old.seconds}, {"text": new.seconds})
    return replace(new, seconds=typical(dict(recent)["text"]), recent=recent)


def typical(seconds: Sequence[float]) -> float:
    """The middle one, of an even number the lesser of the two: what disturbs only takes longer."""
    return statistics.median_low(seconds)


def _seconds_of(job: JobTiming) -> dict[str, float]:
    """What a job has measured of itself, by name."""
    m = job.measured
    seconds = {
        "step": m.step_seconds,
        "decode": m.decode_seconds,
        "first": m.first_seconds,
        "begin": job.begin_seconds,
        "gap": job.gap_seconds,
    }
    return {name: value for name, value in seconds.items() if value is not None}


def _recent(old: Recent, before: Mapping[str, float], now: Mapping[str, float]) -> Recent:
    """The latest values of each name, with those of `now`; `before` is what is known of old ones
    where they were not kept."""
    kept = dict(old)
    for name, value in before.items():
        kept.setdefault(name, (value,))
    for name, value in now.items():
        kept[name] = (*kept.get(name, ()), value)[-RECENT:]
    return tuple(kept.items())


def _latest(items: Iterable[T], when: Sequence[float]) -> tuple[T, ...]:
    """The `MOST` latest, in the order in which they came."""
    elements = list(items)
    kept = sorted(range(len(elements)), key=lambda i: when[i])[-MOST:]
    return tuple(elements[i] for i in sorted(kept))

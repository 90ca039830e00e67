"""Which of those in line begins now, on which hosts: jobs side by side, where that brings more.

Pure; between the line (`fair_queue.py`), which says whose turn it is, and `service.py`, which lends
hosts to jobs.

- Who is alone has all hosts: the planner takes those with which it is done soonest.
- Where others wait too, each job takes the hosts with which it costs least of the mesh's time, if
  it is not much later for it: two pictures on a host each are done before two on both hosts.
- Whoever is first waits for hosts that are busy only where it would be done much later without.
  It keeps them: who comes behind begins on other hosts, or is done before they come free.
- Where the hosts of the first one would have to read its model, one of those behind goes before it
  whose model they have in memory, if it is done before the first one would have been.
- All in all a job is overtaken a few times by guesses like these, and then it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fluxmesh.cluster.snapshot import MeshView
from fluxmesh.planning.plan import plan
from fluxmesh.planning.workload import Workload
from fluxmesh_coordinator.commands.generate import Spread
from fluxmesh_coordinator.runtime.resolved import Resolved
from fluxmesh_coordinator.server.queue.served_job import ServedJob

LATER = 2.0  # times as long as the soonest way may take a job that shares the mesh
LOOKS = 6  # jobs in line that are looked at, at once
SURE = 0.8  # part of the time until hosts come free that a job may be thought to need meanwhile
OVERTAKES = 4  # by jobs that were thought to be done in time: a guess may be wrong, not for ever
SWITCH = 1.0  # seconds of reading a model, below which nobody minds
UNKNOWN = 600.0  # seconds that a job takes of which nothing is known


@dataclass(frozen=True)
class PaintWay:
    """Hosts on which a job can be painted."""

    ranks: frozenset[int]
    seconds: float  # from now to its last picture
    wait: float = 0.0  # of these, until the last of the hosts is free
    load: float = 0.0  # of these, until its model is read into memory

    @property
    def cost(self) -> float:
        """Seconds of hosts."""
        return len(self.ranks) * (self.seconds - self.wait)


Ways = Callable[[ServedJob, frozenset[int]], Sequence[PaintWay]]
"""Every way in which a job can be done on some of these hosts, the planner's choice first."""


@dataclass(frozen=True)
class Start:
    """This job begins, on these hosts."""

    job: ServedJob
    ranks: frozenset[int]
    overtakes: ServedJob | None = None  # who would have begun on some of these hosts


def choose(
    line: Sequence[ServedJob], free: frozenset[int], busy: Mapping[int, float], ways: Ways
) -> Start | None:
    """Who of `line` begins now; None: nobody does until hosts come free.

    `free` are hosts that nobody has; `busy` tells of each other one when it is free, in seconds.
    """
    if not line or not free:
        return None
    head, is_alone = line[0], len(line) == 1
    if not busy and (is_alone or len(free) == 1 and _are_of_one_model(line[:LOOKS])):
        return Start(head, free)  # its own plan says which of them it needs
    way = None if is_alone else _beside(head, 0, free, busy, ways)
    if way is None:
        every = ways(head, free | frozenset(busy))
        if not every:  # it waits for hosts to return, or tells why it can't be done
            return Start(head, free)
        way = every[0]
    if way.ranks <= free:
        return _loaded(line, free, busy, ways, way) or Start(head, way.ranks)
    return _meanwhile(line, free, busy, ways, way)


def _are_of_one_model(line: Sequence[ServedJob]) -> bool:
    return len({job.denoiser for job in line}) < 2


def _loaded(
    line: Sequence[ServedJob],
    free: frozenset[int],
    busy: Mapping[int, float],
    ways: Ways,
    due: PaintWay,
) -> Start | None:
    """Who begins before the head of the line, which would begin now in the way that is `due`.

    Its model is in memory, and the head's is not: to read it first would cost both, and often
    twice, for the one leaves for the other.
    """
    head, others = line[0], line[1:LOOKS]
    if due.load < SWITCH or head.overtaken >= OVERTAKES:
        return None
    for number, job in enumerate(others, 1):
        if job.denoiser == head.denoiser:
            continue
        way = _beside(job, number, free, busy, ways)
        is_in_time = way is not None and way.load < SWITCH and way.seconds <= due.seconds
        if way is not None and is_in_time and way.ranks & due.ranks:
            return Start(job, way.ranks, head)
    return None


def _meanwhile(
    line: Sequence[ServedJob],
    free: frozenset[int],
    busy: Mapping[int, float],
    ways: Ways,
    reserved: PaintWay,
) -> Start | None:
    """Who begins while the head of the line waits for `reserved`, and does not delay it."""
    head, others = line[0], line[1:LOOKS]
    may_overtake = head.overtaken < OVERTAKES and reserved.wait < UNKNOWN
    kept = {rank: busy.get(rank, 0.0) for rank in {*busy, *reserved.ranks}}
    for number, job in enumerate(others, 1):
        beside = _beside(job, number, free - reserved.ranks, kept, ways)
        if beside is not None:
            return Start(job, beside.ranks)
        limit = SURE * reserved.wait if may_overtake else 0.0
        in_time = [way for way in ways(job, free) if way.seconds <= limit] if limit else []
        if in_time:
            return Start(job, min(in_time, key=lambda way: way.cost).ranks, head)
    return None


def _beside(
    job: ServedJob, number: int, free: frozenset[int], busy: Mapping[int, float], ways: Ways
) -> PaintWay | None:
    """The cheapest way on free hosts that is not much later than the soonest on any; or None.

    The job that is `number` in line would wait for those before it, had the mesh one fast host.
    """
    at_once = sorted(ways(job, free), key=lambda way: (way.cost, way.seconds))

    def fair(soonest: float) -> PaintWay | None:
        limit = soonest * (LATER + number)
        return next((way for way in at_once if way.seconds <= limit), None)

    if not at_once:
        return None
    # No way is sooner than the best of these, or than the first busy host is free: to plan for all
    # hosts of a large mesh takes long, and is seldom needed.
    best = min(way.seconds for way in at_once)
    way = fair(min([best, *busy.values()]))
    if way is None or way is not at_once[0]:
        every = ways(job, free | frozenset(busy))
        way = fair(min([best, *(each.seconds for each in every)]))
    return way


def planned_ways(view: MeshView, busy: Mapping[int, float]) -> Ways:
    """The planner's ways on `view`; `busy` as of `choose`."""
    hosts = {
        host.rank: replace(host, busy_seconds=max(host.busy_seconds, busy.get(host.rank, 0.0)))
        for host in view.hosts
    }
    known: dict[Hashable, list[PaintWay]] = {}  # of jobs that are alike, as those in line often are

    def ways(job: ServedJob, ranks: frozenset[int]) -> list[PaintWay]:
        if job.ready is None or not ranks:
            return []
        resolved = job.ready.resolved.of_images(0, max(1, job.n_images - job.kept))
        work = Workload.of(resolved.request, resolved.model.sizes)
        key = (ranks, job.spread, replace(work, mark=""))  # a mark is a prompt's
        if key not in known:
            known[key] = planned_for(resolved, job.spread, ranks)
        return known[key]

    def planned_for(
        resolved: Resolved, spread: Spread | None, ranks: frozenset[int]
    ) -> list[PaintWay]:
        asked = spread.placement if spread is not None else None
        some = replace(view, hosts=tuple(hosts[rank] for rank in sorted(ranks & set(hosts))))
        planned = plan(resolved.request, some, resolved.model.sizes, placement=asked)
        options = [
            option
            for option in planned.options
            if not option.problem and (asked is None or option.name == asked)
        ]
        options.sort(key=lambda option: option is not planned.winner)
        return [
            PaintWay(
                _ranks(option.ranks, option.text_rank),
                option.seconds,
                option.wait_seconds,
                option.load_seconds,
            )
            for option in options
        ]

    return ways


def _ranks(ranks: Iterable[int], text_rank: int | None) -> frozenset[int]:
    return frozenset(ranks) | (frozenset() if text_rank is None else {text_rank})

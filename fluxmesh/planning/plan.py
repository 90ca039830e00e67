"""How a request is spread over a mesh: every way, what each would take, and which one is best.

The last of the pure modules between a request and the mesh: `planning/` works out each way, and
`plan` chooses. It never fails: where nothing can be done, the plan says why. It formats no table;
`fluxmesh plan` does.

Predictions come from measured step times and link rates; `collectives.py`
counts the bytes. Where two ways are predicted to take the same time, the one whose pictures are the
very bytes that one host would give is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fluxmesh.cluster.snapshot import MeshView, Placement
from fluxmesh.planning.candidates import Candidates, Option, Phase
from fluxmesh.planning.capacity import Need
from fluxmesh.planning.remedies import Remedy, remedies
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import FilledRequest

__all__ = ["ModelSizes", "Need", "Option", "Phase", "Plan", "Remedy", "Workload", "plan"]

CLOSE = 1.05  # a faster way must be faster than this to be preferred to a more exact one
EXACTNESS = ("data", "mixed", "sequence", "tensor")
COLD = 0.5  # seconds that the first request takes longer, from which on it is told
COLD_PART = 0.05  # of the whole time, from which on it is told
SHARDED: tuple[Placement, ...] = ("sequence", "tensor")
MAX_LAST = 8  # images that a mixed plan tries to leave for the ring
MAX_RINGS = 4  # rings, the fastest ones, that it tries


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` found. `options` holds every way: those that can be taken first, by time."""

    work: Workload
    options: tuple[Option, ...]
    winner: Option | None  # None where nothing that was asked for can be done
    reason: str  # why the winner won, or why there is none
    remedies: tuple[Remedy, ...] = ()  # with which there would be one
    warm: Option | None = None  # what would win, had all of them made such a request before

    @property
    def notice(self) -> str:
        """What only the first such request takes, in a sentence, where it is worth one; else ""."""
        winner = self.winner
        if winner is None or winner.cold_seconds < max(COLD, COLD_PART * winner.seconds):
            return ""
        seconds = winner.cold_seconds
        about = f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}"
        return f"The first picture at this size takes about {about} s longer than the next."


def plan(
    request: FilledRequest,
    view: MeshView,
    model: ModelSizes,
    *,
    placement: Placement | None = None,
    force_shard: bool = False,
) -> Plan:
    """Every way to do `request` on `view`, and the best of them.

    `model` is the sizes of the request's checkpoint. `placement` allows that one alone;
    `force_shard` allows those in which all hosts of a ring work on each image (`sequence` and
    `tensor`). Both still list the others.
    """
    work = Workload.of(request, model)

    def allowed_of(options: Sequence[Option]) -> list[Option]:
        return [
            option
            for option in options
            if (placement is None or option.name == placement)
            and (not force_shard or option.name in SHARDED)
        ]

    def fits(work: Workload, view: MeshView) -> int | None:
        ways = [
            way for way in allowed_of(list(_options(Candidates(work, view)))) if not way.problem
        ]
        return min((max(need.needed for need in way.memory) for way in ways), default=None)

    options = list(_options(Candidates(work, view)))
    options.sort(key=lambda option: (bool(option.problem), option.seconds))
    allowed = allowed_of(options)
    usable = [option for option in allowed if not option.problem]
    winner, warm = _best(usable), _best(usable, warm=1.0)
    asked = placement or ("a sharded placement" if force_shard else "")
    if winner is None:
        reason = _why_none(view, allowed, asked)
    else:
        reason = _why(view, winner, allowed, asked)
        if warm is not None and warm is not winner:
            seconds = warm.seconds - warm.cold_seconds
            reason += f" Once it is warm, {_title(warm)} would take {seconds:.3g} s."
    helping = remedies(work, view, fits) if winner is None and allowed else ()
    return Plan(
        work=work, options=tuple(options), winner=winner, reason=reason, remedies=helping, warm=warm
    )


def _options(options: Candidates) -> Iterator[Option]:
    """One of each kind and number of hosts."""
    view, images = options.view, range(options.work.images)
    if not view.hosts:
        return
    yield options.data(images)
    rings: list[Option] = []
    for placement in SHARDED:
        for hosts in range(2, len(view.hosts) + 1):
            ring = options.sharded(placement, hosts, images)
            rings.append(ring)
            yield ring
    mixed = _mixed(options, rings)
    if mixed is not None:
        yield mixed


def _mixed(options: Candidates, rings: Sequence[Option]) -> Option | None:
    """The best mixed plan: the first images by `data`, the last few on a ring."""
    images, hosts = options.work.images, len(options.view.hosts)
    lasts = {*range(1, min(images, hosts, MAX_LAST + 1)), images % hosts} - {0, images}
    # Engines can't change what they hold half-way through a request: a slice serves both.
    usable = [ring for ring in rings if not ring.problem and ring.phases[0].layout == "replicated"]
    usable = sorted(usable, key=lambda ring: ring.seconds)[:MAX_RINGS]
    plans: list[Option] = []
    for count in sorted(lasts):
        first = options.data(range(images - count))
        if first.problem:
            return None
        for ring in usable:
            last = options.ring(ring.phases[0].placement, ring.ranks, range(images)[-count:])
            if not last.problem:
                plans.append(options.mixed(first, last))
    return min(plans, key=lambda option: (bool(option.problem), option.seconds), default=None)


def _best(options: Sequence[Option], warm: float = 0.0) -> Option | None:
    """The fastest, or a more exact one that is nearly as fast.

    `warm` is the part of what is cold that isn't counted: 0 to choose for now, 1 for later.
    """
    if not options:
        return None
    times = [option.seconds - warm * option.cold_seconds for option in options]
    limit = min(times) * CLOSE
    close = [pair for pair in zip(times, options, strict=True) if pair[0] <= limit]
    _, best = min(
        close, key=lambda pair: (EXACTNESS.index(pair[1].name), pair[0], len(pair[1].ranks))
    )
    return best


def _why(view: MeshView, winner: Option, allowed: Sequence[Option], asked: str) -> str:
    """One or two sentences about an option that can be taken."""
    if len(view.hosts) == 1:
        return "The mesh has one host."
    others = [option for option in allowed if not option.problem and option is not winner]
    prediction = f"{_title(winner)} is predicted to take {winner.seconds:.3g} s"
    if not others:
        reason = f"{prediction}; it is the only way."
    else:
        rival = min(others, key=lambda option: option.seconds)
        than = f"{_title(rival)} {rival.seconds:.3g} s"
        if rival.seconds < winner.seconds:
            reason = f"{prediction}, {than}: nearly the same, and the first is the more exact."
        else:
            reason = f"{prediction}; the next best, {than}."
    if asked:
        reason = f"You asked for {asked}. {reason}"
    wider = [
        option
        for option in allowed
        if option.name == winner.name and option.problem and winner.name in SHARDED
    ]
    if wider and len(winner.ranks) < len(view.hosts):
        reason += f" It can't use more hosts: {wider[-1].problem}."
    return reason


def _why_none(view: MeshView, allowed: Sequence[Option], asked: str) -> str:
    if not view.hosts:
        return "The mesh has no host."
    if not allowed and asked == "data":
        return "`placement` data and `force_shard` exclude each other; choose one."
    if not allowed:
        return f"You asked for {asked}, which needs two hosts; the mesh has {len(view.hosts)}."
    what = f"You asked for {asked}, which can't be done" if asked else "No placement can be done"
    problems = dict.fromkeys(option.problem for option in allowed)
    return f"{what}: {'; '.join(problems)}."


def _title(option: Option) -> str:
    hosts = len(option.ranks)
    return f"{option.name} on {hosts} host{'' if hosts == 1 else 's'}"

"""How a request is spread over a mesh: every way, what each would take, and which one is best.

The last of the pure modules between a request and the mesh: `planning/` works out each way, and
`plan` chooses. It never fails: where nothing can be done, the plan says why. It formats no table;
`fluxmesh plan` does.

Predictions come from measured step times and link rates; `collectives.py`
counts the bytes. Where two ways are predicted to take the same time, the one whose pictures are the
very bytes that one host would give is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fluxmesh.cluster.snapshot import MeshView, Placement
from fluxmesh.errors import UsageError
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
LONG = 180.0  # seconds, from which on a request is told with the size that takes a minute
MINUTE = 60.0
SIDE = 16  # pixels: sides are multiples of it
SMALLEST = 0.1  # part of a side, below which no smaller size is told
SHORTEST = 64  # pixels of a side: no model paints anything in fewer
EXCLUSIVE = "`placement` data and `force_shard` exclude each other; choose one."
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
    shorter: tuple[int, int] | None = None  # height, width that take a minute, of a long request

    @property
    def notice(self) -> str:
        """What a user would not expect of the time, in sentences; "" where there is nothing."""
        return " ".join(filter(None, (self._long(), self._first())))

    def _long(self) -> str:
        """That it takes minutes or hours, and how it would not."""
        if self.winner is None or self.winner.seconds < LONG:
            return ""
        minutes = self.winner.seconds / 60
        about = f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
        if self.shorter is None:
            return f"This takes about {about}."
        height, width = self.shorter
        return (
            f"This takes about {about}; at {height}x{width} (`image_size`) it would take about "
            "one minute."
        )

    def _first(self) -> str:
        """What only the first such request takes, where it is worth a sentence."""
        winner = self.winner
        if winner is None or winner.cold_seconds < max(COLD, COLD_PART * winner.seconds):
            return ""
        seconds = winner.cold_seconds
        about = f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}"
        return f"The first picture at this size takes about {about} s longer than the next."


def spoken(seconds: float) -> str:
    """Seconds for a person: `0.25 s`, `33.4 s`, `9 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def check_asked(placement: str | None, *, force_shard: bool) -> None:
    """Raises `UsageError` for a way to spread work that no hosts could take."""
    if placement not in (None, "data", *SHARDED):
        raise UsageError.about("placement", f"is {placement!r}", "choose data, sequence or tensor")
    if placement == "data" and force_shard:
        raise UsageError(EXCLUSIVE)


def plan(
    request: FilledRequest,
    view: MeshView,
    model: ModelSizes,
    *,
    placement: Placement | None = None,
    force_shard: bool = False,
    is_read: bool = False,
    are_encoded: bool = False,
) -> Plan:
    """Every way to do `request` on `view`, and the best of them.

    `model` is the sizes of the request's checkpoint. `placement` allows that one alone;
    `force_shard` allows those in which all hosts of a ring work on each image (`sequence` and
    `tensor`). Both still list the others. `is_read` tells that the prompt's features are there,
    `are_encoded` that what was made of the pictures is which the request comes with.
    """
    work = replace(Workload.of(request, model), is_read=is_read)
    if are_encoded:
        work = replace(work, reference_pixels=0, reads_canvas=False)
    view = replace(view, hosts=tuple(host.turned_to(work.weights) for host in view.hosts))

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
        reason = " ".join((_why(view, winner, allowed, asked), *_dealt(work, view, winner)))
        if warm is not None and warm is not winner:
            seconds = warm.seconds - warm.cold_seconds
            reason += f" Once it is warm, {_title(warm)} would take {spoken(seconds)}."
    helping = remedies(work, view, fits) if winner is None and allowed else ()
    shorter: tuple[int, int] | None = None
    if winner is not None and winner.seconds >= LONG:

        def seconds_at(height: int, width: int) -> float:
            smaller = replace(work, height=height, width=width)
            ways = allowed_of(list(_options(Candidates(smaller, view))))
            return min(way.seconds - way.load_seconds - way.wait_seconds for way in ways)

        shorter = _size_in(MINUTE, work.height, work.width, seconds_at)
    return Plan(
        work=work,
        options=tuple(options),
        winner=winner,
        reason=reason,
        remedies=helping,
        warm=warm,
        shorter=shorter,
    )


def _size_in(
    seconds: float, height: int, width: int, seconds_at: Callable[[int, int], float]
) -> tuple[int, int] | None:
    """The largest size of these proportions that takes no longer; None where none is in reach."""
    best: tuple[int, int] | None = None
    low, high = SMALLEST, 1.0
    for _ in range(8):
        scale = (low + high) / 2
        size = tuple(max(1, round(side * scale / SIDE)) * SIDE for side in (height, width))
        if min(size) >= SHORTEST and seconds_at(size[0], size[1]) <= seconds:
            best, low = (size[0], size[1]), scale
        elif min(size) < SHORTEST:
            low = scale
        else:
            high = scale
    return best


def _options(options: Candidates) -> Iterator[Option]:
    """One of each kind and number of hosts."""
    view, images = options.view, range(options.work.images)
    if not view.hosts:
        return
    yield options.with_usage(options.data(images))
    rings: list[Option] = []
    for placement in SHARDED:
        for hosts in range(2, len(view.hosts) + 1):
            ring = options.sharded(placement, hosts, images)
            rings.append(ring)
            yield options.with_usage(ring)
    mixed = _mixed(options, rings)
    if mixed is not None:
        yield options.with_usage(mixed)


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
        return _at_hand(view)
    others = [option for option in allowed if not option.problem and option is not winner]
    prediction = f"{_title(winner)} is predicted to take {spoken(winner.seconds)}"
    if not others:
        reason = f"{prediction}; it is the only way."
    else:
        rival = min(others, key=lambda option: option.seconds)
        than = f"{_title(rival)} {spoken(rival.seconds)}"
        if rival.seconds < winner.seconds:
            reason = f"{prediction}, {than}: nearly the same, and the first is the more exact."
        else:
            reason = f"{prediction}; the next best, {than}."
    if asked:
        reason = f"You asked for {asked}. {reason}"
    for host in view.hosts:
        if host.busy_seconds:
            about = f"about {spoken(host.busy_seconds)}"
            reason += f" Others have host {host.rank} for {about}."
    wider = [
        option
        for option in allowed
        if option.name == winner.name and option.problem and winner.name in SHARDED
    ]
    if wider and len(winner.ranks) < len(view.hosts):
        reason += f" It can't use more hosts: {wider[-1].problem}."
    return reason


def _dealt(work: Workload, view: MeshView, option: Option) -> Iterator[str]:
    """What each host has of the steps of a ring whose hosts differ, and what that saves."""
    names = [host.name for host in view.hosts]
    for phase in option.phases:
        if phase.shares.are_even:
            continue
        parts: list[str] = []
        for place, rank in enumerate(phase.ranks):
            share = work.share(phase.placement, len(phase.ranks), phase.shares, place)
            assert share is not None
            name = view.host(rank).name
            who = name if names.count(name) == 1 else f"host {rank}"
            if phase.placement == "sequence":
                parts.append(f"{who} {share.own / work.tokens:.0%}")
            else:
                parts.append(f"{who} {share.heads:.0%} and {share.columns:.0%}")
        what = "tokens" if phase.placement == "sequence" else "heads and MLP columns"
        parts[0] += f" of the {what}"
        shared = ", ".join(parts)
        if phase.even_seconds is None:
            yield f"{shared}: with equal shares it can't be done."
            continue
        saved = (phase.even_seconds - phase.step_seconds) * work.steps * len(phase.images)
        longer = spoken(option.seconds + saved)
        yield f"{shared}: {spoken(option.seconds)} instead of {longer} with equal shares."


def _why_none(view: MeshView, allowed: Sequence[Option], asked: str) -> str:
    if not view.hosts:
        return _at_hand(view)
    if not allowed and asked == "data":
        return EXCLUSIVE
    if not allowed:
        return f"You asked for {asked}, which needs two hosts. {_at_hand(view)}"
    what = f"You asked for {asked}, which can't be done" if asked else "No placement can be done"
    problems = dict.fromkeys(option.problem for option in allowed)
    return f"{what}: {'; '.join(problems)}."


def _at_hand(view: MeshView) -> str:
    """That there is one host, or none, in a sentence: nothing that isn't so of the whole mesh."""
    others = view.size - len(view.hosts)
    if others < 1:
        return "The mesh has one host." if view.hosts else "The mesh has no host."
    if not view.hosts:
        return "No host of the mesh can be used now."
    rest = "the other is" if others == 1 else "the others are"
    return (
        f"One of the mesh's {view.size} hosts is free for this; {rest} busy, gone or left to "
        "other jobs."
    )


def _title(option: Option) -> str:
    hosts = len(option.ranks)
    return f"{option.name} on {hosts} host{'' if hosts == 1 else 's'}"

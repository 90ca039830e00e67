"""The ways in which a mesh can do a request: who does what, in which memory, how fast. Pure.

`Candidates` works out one of them at a time: images shared out (`data`), or all hosts on one image
(`sequence`, `tensor`). `plan.py` asks for all of them and chooses. A way that can't be taken
is an `Option` too, with the reason in `problem`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fluxmesh.cluster.hostfile import JACCL_HOSTS
from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import JobTiming, Layout, MeshView, Placement
from fluxmesh.planning.capacity import Memory, Need, shortage
from fluxmesh.planning.cold import Cold
from fluxmesh.planning.cost import Estimate, Figure, decode_time
from fluxmesh.planning.list_schedule import ScheduledHost, share_out
from fluxmesh.planning.share_choice import ShareChoice
from fluxmesh.planning.step_times import StepTimes, neighbours
from fluxmesh.planning.text_place import TextPlace, TextPlaces
from fluxmesh.planning.workload import OwnShare, Workload, split_tokens, tensor_problem

SAME = 1.02  # times that differ by less are the same, and more hosts are taken
MANY = 16  # hosts; on larger meshes not every set of neighbours is tried


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Some of a request's images, by one placement; phases of an option follow each other."""

    placement: Placement
    layout: Layout
    images: tuple[int, ...]  # counted from 0
    ranks: tuple[int, ...]  # who takes part, in the order of the ring where there is one
    owners: tuple[int, ...]  # for each image, who makes it (`data`) or decodes it (as predicted)
    step_seconds: float  # of one image, on the slowest host that takes part
    tokens: tuple[int, ...] = ()  # of each rank, with `sequence`
    sent_a_step: int = 0  # bytes that each host sends
    figure: Figure = "arithmetic"  # which figure `step_seconds` comes from
    figure_when: float = 0.0  # it was measured: seconds since 1970; 0 is not known
    last_seconds: float | None = None  # a step of the last job by just these hosts at this size
    last_when: float = 0.0  # that job was
    shares: Shares = EVEN  # of the ring's hosts, in its order
    even_seconds: float | None = None  # a step with equal shares, where these aren't and could be


@dataclass(frozen=True, kw_only=True)
class HostUsage:
    """Bytes of one host while the prompt is read, while pictures that come with it are, while
    images are made, while they are decoded; 0 where it takes no part."""

    rank: int
    text: int
    pictures: int
    denoise: int
    decode: int
    available: int


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to do the request; `problem` is "" where it can be taken."""

    name: Literal["data", "mixed", "sequence", "tensor"]
    ranks: tuple[int, ...]
    phases: tuple[Phase, ...] = ()
    memory: tuple[Need, ...] = ()
    seconds: float = math.inf  # from now to the last picture: loading, denoising, decoding
    wait_seconds: float = 0.0  # of these, until others let go of the last host
    load_seconds: float = 0.0  # of these, until the last host has its weights
    cold_seconds: float = 0.0  # of these, what a second such request won't take: see `cold.py`
    measured: bool = False  # whether a step of this size was timed on each host
    text: TextPlace | None = None  # who reads the prompt, and how
    text_seconds: float = (
        0.0  # of `seconds`, for reading it: at most, for others may load meanwhile
    )
    text_leaves: tuple[int, ...] = ()  # hosts whose text encoders must leave for their weights
    picture_rank: int | None = None  # who encodes the pictures that the request comes with
    usage: tuple[HostUsage, ...] = ()  # memory of each host in each phase
    problem: str = ""

    @property
    def text_rank(self) -> int | None:
        """Who runs the text encoders."""
        return None if self.text is None else self.text.rank


class Candidates:
    """All about one request on one view of a mesh."""

    def __init__(self, work: Workload, view: MeshView) -> None:
        self.work, self.view = work, view
        self.memory = Memory(work, view)
        self.times = StepTimes(work, view)
        self.steps = self.times.alone
        self.shares = ShareChoice(work, view, self.memory, self.times)
        self.decodes = {
            rank: decode_time(view.timed(rank), work, view.like(rank)) for rank in view.ranks
        }
        self.cold = Cold(work, view)
        self.texts = TextPlaces(work, view, self.memory)
        self.waits = {host.rank: host.busy_seconds for host in view.hosts}  # until it can be leased

    def data(self, images: Sequence[int]) -> Option:
        """Whole images, each to whoever is free; hosts that would only delay it are left out."""
        order = self.by_speed()
        needed = {rank: self.memory.needed(rank, "data", 1, 1) for rank in order}
        usable: list[int] = []
        for rank in order:
            tried_ranks = (*usable, rank)
            needs = self.memory.needs(tried_ranks, [needed[each] for each in tried_ranks])
            if all(need.fits for need in needs):
                usable.append(rank)
        if not usable:
            needs = self.memory.needs(order[:1], [needed[order[0]]])
            return Option(
                name="data", ranks=tuple(order[:1]), memory=needs, problem=shortage(needs)
            )
        counts = range(1, len(usable) + 1)
        if len(usable) > MANY:
            counts = range(len(usable), 0, -(len(usable) // MANY))
        tried = [self._hand_out(usable[:count], len(images)) for count in counts]
        best = min(end for _, end in tried)
        owners, end = max(
            (pair for pair in tried if pair[1] <= best * SAME),
            key=lambda pair: (len(set(pair[0])), -pair[1]),
        )
        ranks = tuple(sorted(set(owners)))
        step = self.times.apart(ranks)
        phase = self._phase("data", "replicated", tuple(images), ranks, owners, step)
        cold = max(self.cold.first_seconds("data", (rank,)) for rank in ranks)
        return self._option("data", (phase,), [needed[rank] for rank in ranks], end, cold=cold)

    def sharded(self, placement: Placement, hosts: int, images: Sequence[int]) -> Option:
        """`sequence` or `tensor` on the `hosts` hosts that are fastest at it together."""
        problem = self._split_problem(placement, hosts)
        if problem:
            return Option(name=placement, ranks=(), problem=problem)
        options: list[Option] = []
        limit = math.inf
        for ranks in self._groups(placement, hosts):
            option = self._ring(placement, ranks, images, limit)
            if option is not None:
                options.append(option)
                limit = min(limit, option.seconds)
        problem = tensor_problem(self.work, hosts) if placement == "tensor" else ""
        if problem and all(option.problem == problem for option in options):
            return Option(name=placement, ranks=(), problem=problem)
        return min(options, key=lambda option: (bool(option.problem), option.seconds))

    def ring(self, placement: Placement, ranks: tuple[int, ...], images: Sequence[int]) -> Option:
        """`sequence` or `tensor` on these hosts, which are in rank order."""
        option = self._ring(placement, ranks, images)
        assert option is not None
        return option

    def _ring(
        self,
        placement: Placement,
        ranks: tuple[int, ...],
        images: Sequence[int],
        limit: float = math.inf,
    ) -> Option | None:
        """As `ring`; None where it would take no less than `limit` seconds, if memory allowed."""
        shards = self._shards(placement, ranks)
        no_ring = self._ring_problem(ranks)
        shares = EVEN if no_ring else self.shares.of(placement, ranks, shards)
        needs = self.memory.together(placement, ranks, shards, shares)
        needed = [need.needed for need in needs]
        problem = tensor_problem(self.work, len(ranks), shares) if placement == "tensor" else ""
        problem = problem or no_ring or shortage(needs)
        if problem:
            return Option(name=placement, ranks=ranks, memory=needs, problem=problem)
        step = self.times.together(placement, ranks, shares)
        extras, cold = self.cold.extras(placement, ranks), self._ring_cold(placement, needs, shards)
        ready = self._wait(ranks) + max(self.memory.load_seconds(need) for need in needs)
        ready += self.times.once(placement, ranks)
        denoised = ready + cold + extras.begin + self.times.before_first(step.seconds)
        denoised += len(images) * (self.work.steps * step.seconds + extras.gap)
        owners, end = share_out(
            len(images),
            [
                ScheduledHost(denoised, self.decodes[rank], rank, self.view.host(rank).device_key)
                for rank in ranks
            ],
        )
        if end >= limit:
            return None
        layout: Layout = "replicated" if shards == 1 else "sharded"
        even: float | None = None
        if not shares.are_even and self.shares.can(placement, ranks, shards, EVEN):
            even = self.times.together(placement, ranks).seconds
        phase = self._phase(placement, layout, tuple(images), ranks, owners, step, shares, even)
        return self._option(
            placement, (phase,), needed, end, shards, shares=shares, cold=cold, step=step
        )

    def mixed(self, first: Option, last: Option) -> Option:
        """Images by `data`, and the rest on all hosts of a ring once those are done."""
        ranks = tuple(sorted({*first.ranks, *last.ranks}))
        ring = {need.rank: need for need in last.memory}
        alone = {need.rank: need for need in first.memory}
        needed = [
            max(side[rank].needed for side in (ring, alone) if rank in side) for rank in ranks
        ]
        begin = first.seconds - first.text_seconds
        begin = max([begin, *(self.memory.load_seconds(need) for need in last.memory)])
        again = self.cold.extras(last.phases[0].placement, last.ranks).begin  # read once is enough
        begin = max(begin, last.wait_seconds)
        end = begin + last.seconds - last.wait_seconds - last.load_seconds - again
        end -= last.text_seconds
        cold = first.cold_seconds + last.cold_seconds
        return self._option("mixed", (*first.phases, *last.phases), needed, end, cold=cold)

    def by_speed(self) -> list[int]:
        """Ranks, fastest first; the second agent on a device after the first ones of all.

        Those that others have come last: all hosts of a way are leased before the first step.
        """
        seen: dict[str, int] = {}
        order: list[tuple[float, int, float, int]] = []
        for host in self.view.hosts:
            turn = seen[host.device_key] = seen.get(host.device_key, -1) + 1
            wait, step = self.waits[host.rank], self.steps[host.rank].seconds
            order.append((wait, turn, step, host.rank))
        return [rank for *_, rank in sorted(order)]

    # Time

    def _wait(self, ranks: Sequence[int]) -> float:
        """Seconds until all of these can be leased."""
        return max((self.waits[rank] for rank in ranks), default=0.0)

    def _hand_out(self, ranks: Sequence[int], images: int) -> tuple[tuple[int, ...], float]:
        workers: list[ScheduledHost] = []
        begin = self._wait(ranks)
        for need in self.memory.needs(ranks, [0] * len(ranks)):
            rank, extras = need.rank, self.cold.extras("data", (need.rank,))
            free = begin + self.memory.load_seconds(need) + extras.begin
            free += self.cold.first_seconds("data", (rank,))
            free += self.times.before_first(self.steps[rank].seconds)
            image = self.work.steps * self.steps[rank].seconds + self.decodes[rank] + extras.gap
            workers.append(ScheduledHost(free, image, rank, self.view.host(rank).device_key))
        return share_out(images, workers)

    def _ring_cold(self, placement: Placement, needs: Sequence[Need], shards: int) -> float:
        """Seconds beside loading until a ring has made its first step, where it is not warm."""
        ranks = tuple(need.rank for need in needs)
        ending = self.cold.ending(ranks)
        again = [
            replace(need, load_bytes=self.memory.whole_load(shards, need.weights_part))
            if need.rank in ending and not need.load_bytes and self.view.host(need.rank).holds
            else need
            for need in needs
        ]
        load, reload = (
            max(self.memory.load_seconds(need) for need in each) for each in (needs, again)
        )
        forming = self.cold.forming_seconds(ranks)
        return forming + reload - load + self.cold.first_seconds(placement, ranks)

    def _phase(
        self,
        placement: Placement,
        layout: Layout,
        images: tuple[int, ...],
        ranks: tuple[int, ...],
        owners: tuple[int, ...],
        step: Estimate,
        shares: Shares = EVEN,
        even_seconds: float | None = None,
    ) -> Phase:
        size = len(ranks)
        last = self.cold.last_job(placement, ranks) if placement != "data" else self._slowest(ranks)
        return Phase(
            placement=placement,
            layout=layout,
            images=images,
            ranks=ranks,
            owners=owners,
            step_seconds=step.seconds,
            tokens=split_tokens(self.work.tokens, size, shares) if placement == "sequence" else (),
            sent_a_step=self.work.sent_a_step(placement, size, shares),
            figure=step.figure,
            figure_when=step.when,
            last_seconds=None if last is None else last.last_seconds,
            last_when=0.0 if last is None else last.measured.when,
            shares=shares,
            even_seconds=even_seconds,
        )

    def _slowest(self, ranks: tuple[int, ...]) -> JobTiming | None:
        """The last job by `data` of the host that was slowest at it."""
        jobs = [self.cold.last_job("data", (rank,)) for rank in ranks]
        return max((j for j in jobs if j), key=lambda job: job.last_seconds, default=None)

    # Who can, and how

    def _shards(self, placement: Placement, ranks: tuple[int, ...]) -> int:
        """1, replicated, wherever that fits: it serves every placement. Else one shard a host.

        Hosts that hold just these shards already keep them.
        """
        size = len(ranks)
        if placement != "tensor":
            return 1
        held = self.view.host(ranks[0]).holds
        shares = EVEN if held is None else held.shares
        if all(self.memory.holds(rank, size, shard, shares) for shard, rank in enumerate(ranks)):
            return size
        needed = [self.memory.needed(rank, placement, size, 1) for rank in ranks]
        whole = self.memory.needs(ranks, needed)
        return 1 if all(need.fits for need in whole) else size

    def _split_problem(self, placement: Placement, hosts: int) -> str:
        if placement == "sequence" and self.work.tokens < hosts:
            return f"{self.work.tokens} tokens are fewer than {hosts} hosts"
        return ""

    def _ring_problem(self, ranks: tuple[int, ...]) -> str:
        """Why these hosts can't be a ring over what it would form over: see `backends.py`."""
        if self.view.backend_of(ranks) == "jaccl" and len(ranks) > JACCL_HOSTS:
            return f"a jaccl mesh has at most {JACCL_HOSTS} hosts"
        for a, b in neighbours(ranks):
            if self.view.link(a, b) is None:
                return f"no link from host {a} to host {b}"
        return ""

    def _groups(self, placement: Placement, hosts: int) -> list[tuple[int, ...]]:
        """Sets of hosts worth trying: the fastest, the fastest that fit, and all neighbours."""
        ranks, order = self.view.ranks, self.by_speed()
        if hosts == len(ranks):
            return [ranks]
        shards = hosts if placement == "tensor" else 1
        needed = [self.memory.needed(rank, placement, hosts, shards) for rank in order]
        fitting = [
            rank
            for rank, own in zip(order, needed, strict=True)
            if self.memory.needs((rank,), [own])[0].fits
        ]
        groups = [tuple(sorted(order[:hosts]))]
        if len(fitting) >= hosts:
            groups.append(tuple(sorted(fitting[:hosts])))
        if len(ranks) <= MANY:
            twice = ranks + ranks
            groups += [tuple(sorted(twice[i : i + hosts])) for i in range(len(ranks))]
        return list(dict.fromkeys(groups))

    def _option(
        self,
        name: Literal["data", "mixed", "sequence", "tensor"],
        phases: tuple[Phase, ...],
        needed: Sequence[int],
        end: float,
        shards: int = 1,
        *,
        shares: Shares = EVEN,
        cold: float = 0.0,
        step: Estimate | None = None,
    ) -> Option:
        """The option in full: memory of each host, who encodes text, and whether all of it fits."""
        ranks = tuple(sorted({rank for phase in phases for rank in phase.ranks}))
        needs, text, picture_rank = self._readers(ranks, phases[0].ranks, needed, shards, shares)
        problem, wait = shortage(needs), self._wait(ranks)
        if text is None:
            beside = " beside the rest" if self.work.preload else ""
            least = min(filter(None, (self.texts.whole, self.texts.layer)))
            least = self.texts.whole if self.work.preload else least
            problem = problem or f"no host has {least / 1e9:.1f} GB for the text encoders{beside}"
        longer = 0.0 if text is None else text.wait_seconds
        # As if nothing went on beside it: a ring is not made smaller so that somebody can read.
        reading = 0.0 if text is None else text.seconds + text.reload_seconds
        load = max((self.memory.load_seconds(need) for need in needs), default=0.0)
        return Option(
            name=name,
            ranks=ranks,
            phases=phases,
            memory=needs,
            seconds=math.inf if problem else end + longer + reading,
            wait_seconds=wait + longer,
            load_seconds=load,
            cold_seconds=cold,
            measured=step is not None
            and step.measured
            or all(self.steps[rank].measured for rank in ranks),
            text=text,
            text_seconds=reading,
            text_leaves=self.texts.leaving(needs, text),
            picture_rank=picture_rank,
            problem=problem,
        )

    def with_usage(self, option: Option) -> Option:
        """The same option with the memory of each host in each phase."""
        if not option.phases:
            return option
        return replace(option, usage=self._usage(option))

    def _readers(
        self,
        ranks: tuple[int, ...],
        first: tuple[int, ...],
        needed: Sequence[int],
        shards: int,
        shares: Shares,
    ) -> tuple[tuple[Need, ...], TextPlace | None, int | None]:
        """What each host needs, who reads the prompt, and who of the `first` phase the pictures.

        That is the one who reads the prompt, where that has the memory for both. Where nobody has,
        the needs are those of the one who would.
        """
        needs = self.memory.needs(ranks, needed, shards, shares)
        text = self.texts.best(needs, self.steps, self.waits)
        if not self.work.encoded_pixels:
            return needs, text, None
        encode = {
            need.rank: self.memory.encoding(need.rank, shards, need.weights_part) for need in needs
        }
        reader = None if text is None else text.rank
        tried: list[tuple[tuple[Need, ...], TextPlace | None, int]] = []
        for rank in sorted(first, key=lambda rank: (rank != reader, rank)):
            own = dict(zip(ranks, needed, strict=True))
            own[rank] = max(own[rank], encode[rank])
            needs = self.memory.needs(ranks, list(own.values()), shards, shares)
            text = self.texts.best(needs, self.steps, self.waits)
            tried.append((needs, text, rank))
            if text is not None and not shortage(needs):
                return tried[-1]
        return tried[0]

    def _usage(self, option: Option) -> tuple[HostUsage, ...]:
        """Memory of each host that takes part, phase by phase."""
        phases, needs, text = option.phases, option.memory, option.text
        available = {need.rank: need.available for need in needs}
        parts = {need.rank: need.weights_part for need in needs}
        if text is not None and text.rank not in available:
            asked = {need.rank: need.needed for need in needs}
            available[text.rank] = self.memory.room(text.rank, asked)
        usage: list[HostUsage] = []
        for rank, room in sorted(available.items()):
            each = [
                self.memory.phases(
                    rank,
                    phase.placement,
                    len(phase.ranks) if phase.placement != "data" else 1,
                    len(phase.ranks) if phase.layout == "sharded" else 1,
                    self._share(phase, rank),
                )
                for phase in phases
                if rank in phase.ranks
            ]
            is_reader = text is not None and text.rank == rank
            kept = self.texts.whole if is_reader and text is not None and text.stays else 0
            encode = self.memory.encoding(rank, needs[0].shards, parts.get(rank))
            usage.append(
                HostUsage(
                    rank=rank,
                    text=text.nbytes if is_reader and text is not None else 0,
                    pictures=encode + kept if rank == option.picture_rank else 0,
                    denoise=max((phase.denoise + kept for phase in each), default=0),
                    decode=max((phase.decode + kept for phase in each), default=0),
                    available=room,
                )
            )
        return tuple(usage)

    def _share(self, phase: Phase, rank: int) -> OwnShare | None:
        """What a host has of a phase's steps; None where all have the same."""
        place = phase.ranks.index(rank)
        return self.work.share(phase.placement, len(phase.ranks), phase.shares, place)


def text_leaves(work: Workload, view: MeshView, rank: int) -> bool:
    """Whether text encoders that a host has must leave for it to make whole images."""
    places = Candidates(work, view)
    needs = places.memory.needs((rank,), [places.memory.needed(rank, "data", 1, 1)])
    return rank in places.texts.leaving(needs, None)


def read_elsewhere(work: Workload, view: MeshView, option: Option, lost: int) -> TextPlace | None:
    """Who reads the prompt of an option that is under way, once who was to has failed at it.

    None where no host that is left can: then all is planned anew.
    """
    places = Candidates(work, view)
    needs = [need for need in option.memory if need.rank in view.ranks]
    how = (needs, places.steps, places.waits)
    return places.texts.best(*how, without=frozenset([lost])) or places.texts.best(*how)

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
from fluxmesh.cluster.snapshot import HostInfo, JobTiming, Layout, MeshView, Placement
from fluxmesh.planning.capacity import Memory, Need, shortage
from fluxmesh.planning.cold import Cold
from fluxmesh.planning.cost import Estimate, Figure, decode_time
from fluxmesh.planning.list_schedule import ScheduledHost, share_out
from fluxmesh.planning.step_times import StepTimes, neighbours
from fluxmesh.planning.workload import Workload, split_tokens, tensor_problem

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


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to do the request; `problem` is "" where it can be taken."""

    name: Literal["data", "mixed", "sequence", "tensor"]
    ranks: tuple[int, ...]
    phases: tuple[Phase, ...] = ()
    memory: tuple[Need, ...] = ()
    seconds: float = math.inf  # from now to the last picture: loading, denoising, decoding
    load_seconds: float = 0.0  # of these, until the last host has its weights
    cold_seconds: float = 0.0  # of these, what a second such request won't take: see `cold.py`
    measured: bool = False  # whether a step of this size was timed on each host
    text_rank: int | None = None  # who runs the text encoders
    text_stays: bool = False  # whether they fit there beside all that it holds
    problem: str = ""


class Candidates:
    """All about one request on one view of a mesh."""

    def __init__(self, work: Workload, view: MeshView) -> None:
        self.work, self.view = work, view
        self.memory = Memory(work, view)
        self.times = StepTimes(work, view)
        self.steps = self.times.alone
        self.decodes = {
            rank: decode_time(view.timed(rank), work, view.like(rank)) for rank in view.ranks
        }
        self.cold = Cold(work, view)

    def data(self, images: Sequence[int]) -> Option:
        """Whole images, each to whoever is free; hosts that would only delay it are left out."""
        order = self.by_speed()
        needed = self.memory.needed("data", 1, 1)
        usable: list[int] = []
        for rank in order:
            needs = self.memory.needs((*usable, rank), [needed] * (len(usable) + 1))
            if all(need.fits for need in needs):
                usable.append(rank)
        if not usable:
            needs = self.memory.needs(order[:1], [needed])
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
        return self._option("data", (phase,), [needed] * len(ranks), end, cold=cold)

    def sharded(self, placement: Placement, hosts: int, images: Sequence[int]) -> Option:
        """`sequence` or `tensor` on the `hosts` hosts that are fastest at it together."""
        problem = self._split_problem(placement, hosts)
        if problem:
            return Option(name=placement, ranks=(), problem=problem)
        options = [self.ring(placement, ranks, images) for ranks in self._groups(placement, hosts)]
        return min(options, key=lambda option: (bool(option.problem), option.seconds))

    def ring(self, placement: Placement, ranks: tuple[int, ...], images: Sequence[int]) -> Option:
        """`sequence` or `tensor` on these hosts, which are in rank order."""
        size = len(ranks)
        shards = self._shards(placement, ranks)
        needed = [self.memory.needed(placement, size, shards)] * size
        needs = self.memory.needs(ranks, needed, shards)
        problem = self._link_problem(ranks) or shortage(needs)
        if problem:
            return Option(name=placement, ranks=ranks, memory=needs, problem=problem)
        step = self.times.together(placement, ranks)
        extras, cold = self.cold.extras(placement, ranks), self._ring_cold(placement, needs, shards)
        ready = max(self.memory.load_seconds(need) for need in needs)
        ready += self.times.once(placement, ranks)
        denoised = ready + cold + extras.begin
        denoised += len(images) * (self.work.steps * step.seconds + extras.gap)
        owners, end = share_out(
            len(images),
            [
                ScheduledHost(denoised, self.decodes[rank], rank, self.view.host(rank).device_key)
                for rank in ranks
            ],
        )
        layout: Layout = "replicated" if shards == 1 else "sharded"
        phase = self._phase(placement, layout, tuple(images), ranks, owners, step)
        return self._option(placement, (phase,), needed, end, shards, cold=cold, step=step)

    def mixed(self, first: Option, last: Option) -> Option:
        """Images by `data`, and the rest on all hosts of a ring once those are done."""
        ranks = tuple(sorted({*first.ranks, *last.ranks}))
        ring = {need.rank: need for need in last.memory}
        alone = {need.rank: need for need in first.memory}
        needed = [
            max(side[rank].needed for side in (ring, alone) if rank in side) for rank in ranks
        ]
        begin = max([first.seconds, *(self.memory.load_seconds(need) for need in last.memory)])
        again = self.cold.extras(last.phases[0].placement, last.ranks).begin  # read once is enough
        end = begin + last.seconds - last.load_seconds - again
        cold = first.cold_seconds + last.cold_seconds
        return self._option("mixed", (*first.phases, *last.phases), needed, end, cold=cold)

    def by_speed(self) -> list[int]:
        """Ranks, fastest first; the second agent on a device after the first ones of all."""
        seen: dict[str, int] = {}
        order: list[tuple[int, float, int]] = []
        for host in self.view.hosts:
            turn = seen[host.device_key] = seen.get(host.device_key, -1) + 1
            order.append((turn, self.steps[host.rank].seconds, host.rank))
        return [rank for _, _, rank in sorted(order)]

    # Time

    def _hand_out(self, ranks: Sequence[int], images: int) -> tuple[tuple[int, ...], float]:
        workers: list[ScheduledHost] = []
        for need in self.memory.needs(ranks, [0] * len(ranks)):
            rank, extras = need.rank, self.cold.extras("data", (need.rank,))
            free = self.memory.load_seconds(need) + extras.begin
            free += self.cold.first_seconds("data", (rank,))
            image = self.work.steps * self.steps[rank].seconds + self.decodes[rank] + extras.gap
            workers.append(ScheduledHost(free, image, rank, self.view.host(rank).device_key))
        return share_out(images, workers)

    def _ring_cold(self, placement: Placement, needs: Sequence[Need], shards: int) -> float:
        """Seconds beside loading until a ring has made its first step, where it is not warm."""
        ranks = tuple(need.rank for need in needs)
        ending = self.cold.ending(ranks)
        again = [
            replace(need, load_bytes=self.memory.whole_load(shards))
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
            tokens=split_tokens(self.work.tokens, size) if placement == "sequence" else (),
            sent_a_step=self.work.sent_a_step(placement, size),
            figure=step.figure,
            figure_when=step.when,
            last_seconds=None if last is None else last.last_seconds,
            last_when=0.0 if last is None else last.measured.when,
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
        if all(self.memory.holds(rank, size, shard) for shard, rank in enumerate(ranks)):
            return size
        whole = self.memory.needs(ranks, [self.memory.needed(placement, size, 1)] * size)
        return 1 if all(need.fits for need in whole) else size

    def _split_problem(self, placement: Placement, hosts: int) -> str:
        if self.view.backend == "jaccl" and hosts > JACCL_HOSTS:
            return f"a jaccl mesh has at most {JACCL_HOSTS} hosts"
        if placement == "tensor":
            return tensor_problem(self.work, hosts)
        if self.work.tokens < hosts:
            return f"{self.work.tokens} tokens are fewer than {hosts} hosts"
        return ""

    def _link_problem(self, ranks: tuple[int, ...]) -> str:
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
        needed = self.memory.needed(placement, hosts, shards)
        fitting = [rank for rank in order if self.memory.needs((rank,), [needed])[0].fits]
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
        cold: float = 0.0,
        step: Estimate | None = None,
    ) -> Option:
        """The option in full: memory of each host, who encodes text, and whether all of it fits."""
        ranks = tuple(sorted({rank for phase in phases for rank in phase.ranks}))
        needs = self.memory.needs(ranks, needed, shards)
        asked = {need.rank: need.needed for need in needs}
        text, problem = self.work.text_bytes, shortage(needs)
        places: list[tuple[bool, float, HostInfo]] = []
        for host in self.view.hosts:
            room = self.memory.room(host.rank, asked)
            if text <= room:
                stays = text + asked.get(host.rank, host.held_bytes) <= room
                places.append((not stays, self.steps[host.rank].seconds, host))
        crowded, _, where = min(places, key=lambda place: place[:2], default=(True, 0.0, None))
        if where is None or (self.work.preload and crowded):
            beside = " beside the rest" if where is not None else ""
            problem = problem or f"no host has {text / 1e9:.1f} GB for the text encoders{beside}"
        load = max((self.memory.load_seconds(need) for need in needs), default=0.0)
        return Option(
            name=name,
            ranks=ranks,
            phases=phases,
            memory=needs,
            seconds=math.inf if problem else end,
            load_seconds=load,
            cold_seconds=cold,
            measured=step is not None
            and step.measured
            or all(self.steps[rank].measured for rank in ranks),
            text_rank=None if where is None else where.rank,
            text_stays=not crowded,
            problem=problem,
        )

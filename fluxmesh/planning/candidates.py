"""The ways in which a mesh can do a request: who does what, in which memory, how fast. Pure.

`Options` works out one of them at a time: images shared out (`data`), or all hosts on one image
(`sequence`, `tensor`). `plan.py` asks for all of them and chooses. A way that can't be taken
is an `Option` too, with the reason in `problem`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fluxmesh.cluster.hostfile import JACCL_HOSTS
from fluxmesh.cluster.snapshot import HostInfo, Layout, MeshView, Placement
from fluxmesh.planning.capacity import Memory, Need, shortage
from fluxmesh.planning.cost import Estimate, decode_time, ring_time, step_time
from fluxmesh.planning.list_schedule import Worker, share_out
from fluxmesh.planning.workload import Work, split_tokens, tensor_problem

SAME = 1.02  # times that differ by less are the same, and more hosts are taken
MANY = 16  # hosts; on larger meshes not every set of neighbours is tried


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Option:
    """One way to do the request; `problem` is "" where it can be taken."""

    name: Literal["data", "mixed", "sequence", "tensor"]
    ranks: tuple[int, ...]
    phases: tuple[Phase, ...] = ()
    memory: tuple[Need, ...] = ()
    seconds: float = math.inf  # from now to the last picture: loading, denoising, decoding
    load_seconds: float = 0.0  # of these, until the last host has its weights
    measured: bool = False  # whether a step of this size was timed on each host
    text_rank: int | None = None  # who runs the text encoders
    text_stays: bool = False  # whether they fit there beside all that it holds
    problem: str = ""


class Options:
    """All about one request on one view of a mesh."""

    def __init__(self, work: Work, view: MeshView) -> None:
        self.work, self.view = work, view
        self.memory = Memory(work, view)
        self.steps = {rank: step_time(view.timed(rank), work) for rank in view.ranks}
        self.decodes = {rank: decode_time(view.timed(rank), work) for rank in view.ranks}

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
            return Option("data", tuple(order[:1]), memory=needs, problem=shortage(needs))
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
        slow = max(self.steps[rank].seconds * self._crowd(ranks)[rank] for rank in ranks)
        phase = Phase("data", "replicated", tuple(images), ranks, owners, slow)
        return self._option("data", (phase,), [needed] * len(ranks), end)

    def sharded(self, placement: Placement, hosts: int, images: Sequence[int]) -> Option:
        """`sequence` or `tensor` on the `hosts` hosts that are fastest at it together."""
        problem = self._split_problem(placement, hosts)
        if problem:
            return Option(placement, (), problem=problem)
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
            return Option(placement, ranks, memory=needs, problem=problem)
        step, is_timed = self._ring_step(placement, ranks)
        rate, _ = self._slowest_link(ranks)
        ready = max(self.memory.load_seconds(need) for need in needs)
        ready += self.work.sent_a_request(placement, size) / rate
        denoised = ready + len(images) * self.work.steps * step
        owners, end = share_out(
            len(images),
            [
                Worker(denoised, self.decodes[rank], rank, self.view.host(rank).device_key)
                for rank in ranks
            ],
        )
        phase = Phase(
            placement,
            "replicated" if shards == 1 else "sharded",
            tuple(images),
            ranks,
            owners,
            step,
            split_tokens(self.work.tokens, size) if placement == "sequence" else (),
            self.work.sent_a_step(placement, size),
        )
        return self._option(placement, (phase,), needed, end, shards, is_timed=is_timed)

    def mixed(self, first: Option, last: Option) -> Option:
        """Images by `data`, and the rest on all hosts of a ring once those are done."""
        ranks = tuple(sorted({*first.ranks, *last.ranks}))
        ring = {need.rank: need for need in last.memory}
        alone = {need.rank: need for need in first.memory}
        needed = [
            max(side[rank].needed for side in (ring, alone) if rank in side) for rank in ranks
        ]
        begin = max([first.seconds, *(self.memory.load_seconds(need) for need in last.memory)])
        end = begin + last.seconds - last.load_seconds
        return self._option("mixed", (*first.phases, *last.phases), needed, end)

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
        return share_out(
            images,
            [
                Worker(
                    self.memory.load_seconds(need),
                    self.work.steps * self.steps[need.rank].seconds + self.decodes[need.rank],
                    need.rank,
                    self.view.host(need.rank).device_key,
                )
                for need in self.memory.needs(ranks, [0] * len(ranks))
            ],
        )

    def _ring_step(self, placement: Placement, ranks: tuple[int, ...]) -> Estimate:
        """One step of one image: as this ring was timed, or as it is reckoned.

        One that was timed at another size is reckoned at both, and off by the same factor.
        """
        hosts = [self.view.timed(rank) for rank in ranks]
        timed = ring_time(hosts, placement, self.work)
        if timed is None:
            return Estimate(self._reckoned_step(placement, ranks), False)
        size = (timed.height, timed.width)
        if size == (self.work.height, self.work.width):
            return Estimate(timed.step_seconds, True)
        then = Options(replace(self.work, height=size[0], width=size[1]), self.view)
        factor = timed.step_seconds / then._reckoned_step(placement, ranks)
        return Estimate(self._reckoned_step(placement, ranks) * factor, False)

    def _reckoned_step(self, placement: Placement, ranks: tuple[int, ...]) -> float:
        """The slowest host's share of the arithmetic, then the bytes on the slowest link."""
        size, crowd = len(ranks), self._crowd(ranks)
        share = 1 / size
        if placement == "sequence":  # what fills up the last runs is computed like tokens
            share = split_tokens(self.work.tokens, size)[0] / self.work.tokens
        compute = max(self.steps[rank].seconds * crowd[rank] for rank in ranks) * share
        rate, latency = self._slowest_link(ranks)
        hops = (size - 1) * (1 if placement == "sequence" else 2)  # a reduction goes round twice
        waits = self.work.collectives(placement) * hops * latency
        return compute + self.work.sent_a_step(placement, size) / rate + waits

    def _slowest_link(self, ranks: tuple[int, ...]) -> tuple[float, float]:
        links = [self.view.link(a, b) for a, b in _neighbours(ranks)]
        return (
            min((link.rate for link in links if link), default=math.inf),
            max((link.latency for link in links if link), default=0.0),
        )

    def _crowd(self, ranks: Iterable[int]) -> dict[int, int]:
        """For each of `ranks`, how many of them compute on its device and so share its time."""
        keys = {rank: self.view.host(rank).device_key for rank in ranks}
        devices = Counter(keys.values())
        return {rank: devices[key] for rank, key in keys.items()}

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
        for a, b in _neighbours(ranks):
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
        is_timed: bool = False,
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
            name,
            ranks,
            phases,
            needs,
            math.inf if problem else end,
            load,
            is_timed or all(self.steps[rank].measured for rank in ranks),
            None if where is None else where.rank,
            not crowded,
            problem,
        )


def _neighbours(ranks: tuple[int, ...]) -> list[tuple[int, int]]:
    """(rank, the next one) all the way round."""
    return list(zip(ranks, ranks[1:] + ranks[:1], strict=True))

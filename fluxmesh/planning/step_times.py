"""What one step takes on each host alone, and on hosts that work on it together. Pure.

Puts `cost.py` (arithmetic), `collectives.py` (what travels) and what was measured together;
`options.py` builds whole requests from it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import cached_property

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import MeshView, Placement
from fluxmesh.models.partition import TokenRuns
from fluxmesh.planning.collectives import PlainLink, compute_share, exposed_seconds, interpolated
from fluxmesh.planning.cost import Estimate, Figure, guessed_rate, ring_time, step_time
from fluxmesh.planning.workload import Workload


class StepTimes:
    """Steps of one request's images on one view of a mesh."""

    def __init__(self, work: Workload, view: MeshView) -> None:
        self.work, self.view = work, view
        self._sizes: dict[tuple[int, int], StepTimes] = {}
        self._crowds: dict[tuple[int, ...], dict[int, int]] = {}
        self._paces: dict[tuple[int, ...], tuple[tuple[float, ...], bool]] = {}
        self._slowest: dict[tuple[int, ...], PlainLink] = {}
        self.alone = {
            rank: step_time(view.timed(rank), work, view.like(rank)) for rank in view.ranks
        }

    def apart(self, ranks: tuple[int, ...]) -> Estimate:
        """A step of the slowest of these hosts, while each is at an image of its own."""
        crowd = self.crowd(ranks)
        steps = [
            self.alone[rank]._replace(seconds=self.alone[rank].seconds * crowd[rank])
            for rank in ranks
        ]
        return max(steps, key=lambda step: step.seconds)

    def together(
        self, placement: Placement, ranks: tuple[int, ...], shares: Shares = EVEN
    ) -> Estimate:
        """One step of one image: as this ring was timed, or as it is reckoned.

        One that was timed at another size, or with other shares, is reckoned in both ways, and off
        by the same factor.
        """
        timed = ring_time(self.view, ranks, placement, self.work, shares)
        if timed is None:
            return self.reckoned(placement, ranks, shares)
        size = (timed.height, timed.width)
        is_sized = size == (self.work.height, self.work.width) and self.work.is_plain
        if is_sized and timed.shares == shares:
            return Estimate(timed.step_seconds, "step", timed.when)
        then = self._at(size)
        factor = timed.step_seconds / then.reckoned(placement, ranks, timed.shares).seconds
        now = self.reckoned(placement, ranks, shares).seconds
        figure: Figure = "step in other shares" if is_sized else "step of another size"
        return Estimate(now * factor, figure, timed.when)

    def paces(self, ranks: tuple[int, ...]) -> tuple[tuple[float, ...], bool]:
        """Seconds in which each of these would make a step alone, and whether steps were timed.

        Where one was not, all are told apart by the first guess at their devices, which is rough:
        hosts of one kind count as equal.
        """
        if ranks not in self._paces:
            self._paces[ranks] = self._find_paces(ranks)
        return self._paces[ranks]

    def _find_paces(self, ranks: tuple[int, ...]) -> tuple[tuple[float, ...], bool]:
        crowd = self.crowd(ranks)
        is_timed = all(self.alone[rank].figure != "arithmetic" for rank in ranks)
        if is_timed:
            return tuple(self.alone[rank].seconds * crowd[rank] for rank in ranks), True
        hosts, rates = [self.view.host(rank) for rank in ranks], self._rates
        flops = self.work.step_flops
        return tuple(flops / rates[host.kind] * crowd[host.rank] for host in hosts), False

    @cached_property
    def _rates(self) -> dict[str, float]:
        """For each kind of host, FLOP a second as its engines guess, on average."""
        rates: dict[str, list[float]] = {}
        for host in self.view.hosts:
            rates.setdefault(host.kind, []).append(guessed_rate(host, self.work))
        return {kind: sum(each) / len(each) for kind, each in rates.items()}

    def _at(self, size: tuple[int, int]) -> StepTimes:
        """Those of a prompt alone at this height and width."""
        if size not in self._sizes:
            plain = replace(self.work.plain, height=size[0], width=size[1])
            self._sizes[size] = StepTimes(plain, self.view)
        return self._sizes[size]

    def once(self, placement: Placement, ranks: tuple[int, ...]) -> float:
        """Seconds of what hosts exchange once a request, beside the steps."""
        sent, timing = self.work.sent_a_request(placement, len(ranks)), self.view.ring_timing(ranks)
        if not sent or timing is None or not timing.gathers:
            return sent / self.slowest_link(ranks).rate
        return interpolated(timing.gathers, sent // (len(ranks) - 1))

    def before_first(self, step_seconds: float) -> float:
        """Seconds that hosts compute once a request, before a first step of so many seconds.

        The share of the step's arithmetic holds for what travels too: in a ring, references are
        split and gathered as a step's tokens are.
        """
        return step_seconds * self.work.begin_flops / self.work.step_flops

    def crowd(self, ranks: tuple[int, ...]) -> dict[int, int]:
        """For each of `ranks`, how many of them compute on its device and so share its time."""
        if ranks not in self._crowds:
            keys = {rank: self.view.host(rank).device_key for rank in ranks}
            devices = Counter(keys.values())
            self._crowds[ranks] = {rank: devices[key] for rank, key in keys.items()}
        return self._crowds[ranks]

    def slowest_link(self, ranks: tuple[int, ...]) -> PlainLink:
        """Of those round the ring, as plain sockets found them."""
        if ranks not in self._slowest:
            links = [self.view.link(a, b) for a, b in neighbours(ranks)]
            self._slowest[ranks] = PlainLink(
                min((link.rate for link in links if link), default=math.inf),
                max((link.latency for link in links if link), default=0.0),
            )
        return self._slowest[ranks]

    def reckoned(
        self, placement: Placement, ranks: tuple[int, ...], shares: Shares = EVEN
    ) -> Estimate:
        """The slowest host's share of the arithmetic, and what shows of the collectives."""
        if shares.are_even:
            crowd = self.crowd(ranks)
            paces = tuple(self.alone[rank].seconds * crowd[rank] for rank in ranks)
        else:
            paces, _ = self.paces(ranks)
        seconds = self._of_paces(placement, ranks, shares, paces)
        timing = self.view.ring_timing(ranks)
        if timing is None:
            return Estimate(seconds, "links")
        return Estimate(seconds, "collectives", timing.when)

    def spread_seconds(self, placement: Placement, ranks: tuple[int, ...], shares: Shares) -> float:
        """As `reckoned`, by `paces` whatever the shares: to compare some with others."""
        return self._of_paces(placement, ranks, shares, self.paces(ranks)[0])

    def _of_paces(
        self, placement: Placement, ranks: tuple[int, ...], shares: Shares, paces: tuple[float, ...]
    ) -> float:
        size = len(ranks)
        parts = self._parts(placement, size, shares)
        compute = max(
            pace * compute_share(placement, part, self.view.host(rank).platform)
            for rank, pace, part in zip(ranks, paces, parts, strict=True)
        )
        timing, links = self.view.ring_timing(ranks), self.slowest_link(ranks)
        exposed = exposed_seconds(self.work, placement, size, compute, timing, links, shares)
        return compute + exposed

    def _parts(self, placement: Placement, size: int, shares: Shares) -> list[float]:
        """Of a step's arithmetic, what each host of a ring does."""
        tokens = self.work.tokens
        if placement == "sequence":  # what fills up the last runs is computed like tokens
            return [count / tokens for count in TokenRuns.of(tokens, size, shares).counts]
        if shares.are_even:
            return [1 / size] * size
        by_heads = self.work.shape.heads_part(tokens)
        heads, columns = sum(shares.heads), sum(shares.columns)
        return [
            by_heads * own / heads + (1 - by_heads) * wide / columns
            for own, wide in zip(shares.heads, shares.columns, strict=True)
        ]


def neighbours(ranks: tuple[int, ...]) -> list[tuple[int, int]]:
    """(rank, the next one) all the way round."""
    return list(zip(ranks, ranks[1:] + ranks[:1], strict=True))

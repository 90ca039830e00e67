"""What one step takes on each host alone, and on hosts that work on it together. Pure.

Puts `cost.py` (arithmetic), `collectives.py` (what travels) and what was measured together;
`options.py` builds whole requests from it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from fluxmesh.cluster.snapshot import MeshView, Placement
from fluxmesh.planning.collectives import PlainLink, compute_share, exposed_seconds, interpolated
from fluxmesh.planning.cost import Estimate, ring_time, step_time
from fluxmesh.planning.workload import Workload, split_tokens


class StepTimes:
    """Steps of one request's images on one view of a mesh."""

    def __init__(self, work: Workload, view: MeshView) -> None:
        self.work, self.view = work, view
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

    def together(self, placement: Placement, ranks: tuple[int, ...]) -> Estimate:
        """One step of one image: as this ring was timed, or as it is reckoned.

        One that was timed at another size is reckoned at both, and off by the same factor.
        """
        timed = ring_time(self.view, ranks, placement, self.work)
        if timed is None:
            return self._reckoned(placement, ranks)
        size = (timed.height, timed.width)
        if size == (self.work.height, self.work.width):
            return Estimate(timed.step_seconds, "step", timed.when)
        then = StepTimes(replace(self.work, height=size[0], width=size[1]), self.view)
        factor = timed.step_seconds / then._reckoned(placement, ranks).seconds
        now = self._reckoned(placement, ranks).seconds
        return Estimate(now * factor, "step of another size", timed.when)

    def once(self, placement: Placement, ranks: tuple[int, ...]) -> float:
        """Seconds of what hosts exchange once a request, beside the steps."""
        sent, timing = self.work.sent_a_request(placement, len(ranks)), self.view.ring_timing(ranks)
        if not sent or timing is None or not timing.gathers:
            return sent / self.slowest_link(ranks).rate
        return interpolated(timing.gathers, sent // (len(ranks) - 1))

    def crowd(self, ranks: Iterable[int]) -> dict[int, int]:
        """For each of `ranks`, how many of them compute on its device and so share its time."""
        keys = {rank: self.view.host(rank).device_key for rank in ranks}
        devices = Counter(keys.values())
        return {rank: devices[key] for rank, key in keys.items()}

    def slowest_link(self, ranks: tuple[int, ...]) -> PlainLink:
        """Of those round the ring, as plain sockets found them."""
        links = [self.view.link(a, b) for a, b in neighbours(ranks)]
        return PlainLink(
            min((link.rate for link in links if link), default=math.inf),
            max((link.latency for link in links if link), default=0.0),
        )

    def _reckoned(self, placement: Placement, ranks: tuple[int, ...]) -> Estimate:
        """The slowest host's share of the arithmetic, and what shows of the collectives."""
        size, crowd = len(ranks), self.crowd(ranks)
        share = 1 / size
        if placement == "sequence":  # what fills up the last runs is computed like tokens
            share = split_tokens(self.work.tokens, size)[0] / self.work.tokens
        alone = max(self.alone[rank].seconds * crowd[rank] for rank in ranks)
        compute = alone * compute_share(placement, share)
        timing, links = self.view.ring_timing(ranks), self.slowest_link(ranks)
        exposed = exposed_seconds(self.work, placement, size, compute, timing, links)
        if timing is None:
            return Estimate(compute + exposed, "links")
        return Estimate(compute + exposed, "collectives", timing.when)


def neighbours(ranks: tuple[int, ...]) -> list[tuple[int, int]]:
    """(rank, the next one) all the way round."""
    return list(zip(ranks, ranks[1:] + ranks[:1], strict=True))

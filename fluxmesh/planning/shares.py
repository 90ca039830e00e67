"""Whole shares of a step for hosts that are not equally fast, so that all finish together. Pure.

Arithmetic alone: units of work (parts of all tokens, attention heads, groups of MLP columns) are
dealt to hosts, each of which has a `HostPace` and room for so many units. `share_choice.py` says
what the units of a request are, and whether unequal shares are worth it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

TURNS = 20  # at most, until few units are left to deal out one by one
TRIED = 8  # bounds on the longest share that `fastest` tries between even and best without links


class HostPace(NamedTuple):
    """How long a host takes with u units: `fixed` + u * `each`, in seconds."""

    fixed: float
    each: float

    def seconds(self, units: int) -> float:
        return self.fixed + units * self.each


def least_slowest(
    units: int, paces: Sequence[HostPace], most: Sequence[int]
) -> tuple[int, ...] | None:
    """Units for each host with which the slowest of them is as fast as can be.

    Everyone has at least one, and nobody more than his `most`; they add up to `units`. None where
    that can't be. Of equally good hosts, the first is given the unit that is left over.
    """
    if units < len(paces) or sum(most) < units or min(most) < 1:
        return None

    def within(limit: float) -> list[int]:
        """What each can do in so many seconds."""
        return [
            max(1, min(cap, math.floor((limit - fixed) / each)))
            for (fixed, each), cap in zip(paces, most, strict=True)
        ]

    low, high = 0.0, max(pace.seconds(units) for pace in paces)
    counts = [1] * len(paces)
    # In whole numbers the answer is little above what it would be in fractions without any bounds.
    limit = (units + sum(fixed / each for fixed, each in paces)) / sum(1 / p.each for p in paces)
    for _ in range(TURNS):
        tried = within(limit)
        left = units - sum(tried)
        if left < 0:
            high = limit
            limit = (low + high) / 2
            continue
        low, counts = limit, tried
        if left <= 2 * len(paces):
            break
        # So much later those who may have more have done as much more, and the rest of a unit each.
        rate = sum(1 / p.each for p, c, cap in zip(paces, counts, most, strict=True) if c < cap)
        limit = low + (left - len(paces)) / rate
    # The best takes longer than `low`, so that everyone may have what he can do in that time; what
    # is left goes, unit by unit, to whoever is then the soonest to finish.
    queue = [
        (pace.seconds(count + 1), i)
        for i, (pace, count) in enumerate(zip(paces, counts, strict=True))
        if count < most[i]
    ]
    heapq.heapify(queue)
    for _ in range(units - sum(counts)):
        _, i = heapq.heappop(queue)
        counts[i] += 1
        if counts[i] < most[i]:
            heapq.heappush(queue, (paces[i].seconds(counts[i] + 1), i))
    return tuple(counts)


def fastest(
    units: int,
    paces: Sequence[HostPace],
    most: Sequence[int],
    seconds: Callable[[tuple[int, ...]], float],
) -> tuple[int, ...] | None:
    """As `least_slowest`, where a longer longest share also makes what travels larger.

    `seconds` is what a whole step takes with some shares: the least of them is taken, of those that
    are best for the hosts with the longest share bounded.
    """
    free = least_slowest(units, paces, most)
    if free is None:
        return None
    least, longest = -(-units // len(paces)), max(free)
    step = max(1, -(-(longest - least) // TRIED))
    bounds = range(least, longest, step)
    bounded = (least_slowest(units, paces, [min(cap, top) for cap in most]) for top in bounds)
    return min(dict.fromkeys([free, *filter(None, bounded)]), key=seconds)

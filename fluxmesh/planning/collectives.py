"""What the collectives of a step cost a ring: their own time, and how much of it shows. Pure.

Beside `cost.py`, which has the arithmetic. A ring that was measured has a table of its collectives
by size (`cluster.RingTiming`), read between its points; else the links between its hosts, as plain
sockets found them, stand in. Three things with a meaning make a step's collectives out of it:

- `PLAIN_HIDDEN` and `RingTiming.hidden`: the part of a gather that passes while products run
  beside it. `sequence` sends keys and values first and computes queries and the MLP half of a
  single block meanwhile; there is never more to hide behind than that. Nothing stands beside a
  sum of `tensor`, which the next layer waits for. Two collectives are never in flight at once:
  each waits for the one before (`Ranks`), so that their times add up.
- `WAIT`: what each collective costs beside its own time, because ranks wait for the last one and
  the device starts anew after it.
- `UNSPLIT`: the part of one host's step that does not become less on more hosts: what every rank
  computes, and products that are less efficient when they are small. A processor minds that less
  than a GPU (`UNSPLIT_ON_PROCESSORS`).

The constants come from FLUX.1 at 1024x1024 on two and four H100s, with collectives and with false
ones that send nothing; those of processors from small models of both families, with false ones:
`tests/unit/test_ring_cost.py` has the numbers. What jobs measure on a mesh corrects what is
reckoned from them (`Options`).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import CollectiveTime, Placement, Platform, RingTiming
from fluxmesh.planning.workload import Workload

UNSPLIT: dict[Placement, float] = {"data": 0.0, "sequence": 0.10, "tensor": 0.19}
UNSPLIT_ON_PROCESSORS: dict[Placement, float] = {"data": 0.0, "sequence": 0.07, "tensor": 0.09}
WAIT: dict[Placement, float] = {"data": 0.0, "sequence": 0.27e-3, "tensor": 0.0}  # seconds
PLAIN_HIDDEN = 0.5  # where no ring was measured: 0.63 was on two H100s, 0.29 on four


class PlainLink(NamedTuple):
    """The slowest of the links round a ring, as plain sockets found them."""

    rate: float  # bytes/s
    latency: float  # seconds


def compute_share(placement: Placement, share: float, platform: Platform) -> float:
    """The part of one host's step that a rank takes which is given `share` of the work."""
    fixed = (UNSPLIT_ON_PROCESSORS if platform == "cpu" else UNSPLIT)[placement]
    return fixed + (1 - fixed) * share


def exposed_seconds(
    work: Workload,
    placement: Placement,
    size: int,
    alone: float,
    timing: RingTiming | None,
    links: PlainLink,
    shares: Shares = EVEN,
) -> float:
    """By how much its collectives make a step longer than a rank's arithmetic.

    `alone` is what a rank's own arithmetic takes, in seconds, behind which gathers are hidden.
    """
    count = work.shape.collectives(placement)
    nbytes = work.collective_bytes(placement, size, shares)
    if not count or size < 2:
        return 0.0
    bare = collective_seconds(placement, size, nbytes, timing, links)
    seconds = count * (bare + WAIT[placement])
    if placement == "sequence":
        hidden = PLAIN_HIDDEN if timing is None else min(1.0, timing.hidden)
        for blocks, part in work.beside_gathers:  # the rest of a block waits for what is gathered
            seconds -= blocks * min(hidden * bare, part * alone / max(1, count))
    return seconds


def collective_seconds(
    placement: Placement, size: int, nbytes: int, timing: RingTiming | None, links: PlainLink
) -> float:
    """One collective alone: a gather of `nbytes` of each rank (`sequence`), or a sum (`tensor`)."""
    table: Sequence[CollectiveTime] = ()
    if timing is not None:
        table = timing.gathers if placement == "sequence" else timing.sums
    if table:
        return interpolated(table, nbytes)
    # A gather goes round once with whole arrays, a sum twice with 1/size of one.
    hops = (size - 1) * (1 if placement == "sequence" else 2)
    piece = nbytes if placement == "sequence" else nbytes / size
    return hops * (piece / links.rate + links.latency)


def interpolated(table: Sequence[CollectiveTime], nbytes: int) -> float:
    """Seconds of a collective of `nbytes`, on the straight lines between measured sizes.

    Below the smallest it takes as long as that; above the largest, the last two give the rate.
    """
    points = _rising(table)
    sizes = [point.nbytes for point in points]
    right = bisect.bisect_left(sizes, nbytes)
    if right == 0:
        return points[0].seconds
    if len(points) == 1:
        return points[0].seconds * nbytes / sizes[0]
    right = min(right, len(points) - 1)
    low, high = points[right - 1], points[right]
    slope = (high.seconds - low.seconds) / (high.nbytes - low.nbytes)
    if nbytes > high.nbytes:  # a last step that came out flat is no infinite rate
        slope = max(slope, (high.seconds - points[0].seconds) / (high.nbytes - sizes[0]))
        low = high
    return low.seconds + slope * (nbytes - low.nbytes)


def fitted(table: Sequence[CollectiveTime]) -> tuple[float, float]:
    """(latency in seconds, bytes a second) for a person to read: the ends of the table.

    The rate is of the array that a rank gives, not of what travels for it.
    """
    points = _rising(table)
    first, last = points[0], points[-1]
    spent = last.seconds - first.seconds
    rate = (last.nbytes - first.nbytes) / spent if spent > 0 else last.nbytes / last.seconds
    return first.seconds, rate


def _rising(table: Sequence[CollectiveTime]) -> list[CollectiveTime]:
    """By size, each once; a larger one that came out faster takes as long as the smaller."""
    points: list[CollectiveTime] = []
    for point in sorted(table, key=lambda timing: (timing.nbytes, timing.seconds)):
        if points and point.nbytes == points[-1].nbytes:
            continue
        least = points[-1].seconds if points else 0.0
        points.append(CollectiveTime(point.nbytes, max(point.seconds, least)))
    return points

"""Images handed out one by one, each to whoever is free: who gets which, when all are done.

What happens on a mesh by itself under `data`; here it is played through, for `candidates.py`. Pure.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class ScheduledHost(NamedTuple):
    """A host to which images are handed; workers compare by who is free first, then fastest."""

    free: float  # from when on
    seconds: float  # of one image, with its device to itself
    rank: int
    device: str


def share_out(images: int, workers: Sequence[ScheduledHost]) -> tuple[tuple[int, ...], float]:
    """Hands images out one by one, each to whoever is free first.

    Gives the rank of each image, and when the last one is done.
    """
    if len({worker.device for worker in workers}) < len(workers):
        return _share_devices(images, workers)
    heap = sorted(workers)
    owners, end = [], 0.0
    for _ in range(images):
        worker = heapq.heappop(heap)
        done = worker.free + worker.seconds
        heapq.heappush(heap, worker._replace(free=done))
        owners.append(worker.rank)
        end = max(end, done)
    return tuple(owners), end


def _share_devices(images: int, workers: Sequence[ScheduledHost]) -> tuple[tuple[int, ...], float]:
    """The same where workers share devices: of n that are busy on one, each has 1/n of its time."""
    owners: list[int] = []
    waiting, busy = (
        sorted(workers),
        dict[ScheduledHost, float](),
    )  # busy: seconds of work that are left
    now = 0.0
    while len(owners) < images or busy:
        while waiting and waiting[0].free <= now and len(owners) < images:
            worker = waiting.pop(0)
            owners.append(worker.rank)
            busy[worker] = worker.seconds
        crowd = Counter(worker.device for worker in busy)
        steps = [left * crowd[worker.device] for worker, left in busy.items()]
        step = min(steps, default=math.inf)
        if len(owners) < images and waiting and waiting[0].free - now < step:
            step, now = waiting[0].free - now, waiting[0].free
        else:
            now += step
        for worker, left in list(busy.items()):
            if left * crowd[worker.device] <= step:
                del busy[worker]
                bisect.insort(waiting, worker._replace(free=now))
            else:
                busy[worker] = left - step / crowd[worker.device]
    return tuple(owners), now

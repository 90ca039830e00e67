"""Times the collectives of a ring in the engines that are in it, over the backend that runs them.

What plain sockets between two hosts carry says little about a ring of jaccl or nccl, and what a
large message carries says little about a small one. So every rank of a ring calls `timed`: gathers
and sums from a few KiB to tens of MiB, and a gather beside products of about its own length. All
ranks make the same calls in the same order: whatever depends on a clock, they agree on first. The
planner reads the result (`planning/collectives.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from fluxmesh.cluster.snapshot import CollectiveTime
from fluxmesh.models.collectives import Ranks

SIZES = tuple(4**k << 10 for k in range(1, 8)) + (32 << 20,)  # bytes that a rank gives: 4 KiB on
CHAIN = 8  # collectives one after another in one graph, as in a step
BESIDE = (2, 16)  # gathers, and as many products, of which the overlap is measured
LONG = 0.02  # seconds that they should take together, so that starting them does not count
PRODUCTS = (128, 256, 512, 1024, 2048, 4096)  # sides of square matrices
PART = 0.02  # of the memory, for arrays that travel
LONGEST = 10.0  # seconds, whoever asks
STOPPED = 2000.0  # seconds, which no measurement takes: who says so wants it to end


class RingTable(NamedTuple):
    """What `timed` found, the same on all ranks."""

    gathers: tuple[CollectiveTime, ...]
    sums: tuple[CollectiveTime, ...]
    hidden: float  # part of a gather that passes while products run beside it, 0 to 1


def timed(
    ranks: Ranks, seconds: float, memory: int, stopping: Callable[[], bool] = lambda: False
) -> RingTable | None:
    """Measures the ring for about `seconds`; a slow one by its smaller sizes alone.

    `memory` is what this engine may use, in bytes, most of which may be taken: the measurement
    keeps to a small part of it, on every rank that of the smallest. The first size is measured
    however slow the ring is and however little memory there is. None where `stopping` is true of
    a rank: all end there, between two sizes.
    """
    fitting = sum((ranks.size + 2) * nbytes <= memory * PART for nbytes in SIZES)
    sizes = SIZES[: max(1, -ranks.most(-fitting))]
    watch = _Watch(ranks, min(seconds, LONGEST), stopping)
    if watch.is_stopped():
        return None
    gathers = _table(watch, ranks.gather, sizes, until=0.4)
    if watch.is_stopped():
        return None
    sums = _table(watch, ranks.sum, sizes, until=0.8)
    if watch.is_stopped():
        return None
    table = RingTable(gathers, sums, _hidden(watch, gathers))
    mx.clear_cache()
    return table


class _Watch:
    """A clock that all ranks read alike: whatever it tells is the slowest one's."""

    def __init__(self, ranks: Ranks, seconds: float, stopping: Callable[[], bool]) -> None:
        self.ranks, self.seconds, self.stopping = ranks, seconds, stopping
        self.start = time.perf_counter()
        # On Metal a collective is waited for before what follows it is built.
        self.chains = not (mx.metal.is_available() and mx.default_device() == mx.gpu)

    def agreed(self, seconds: float) -> float:
        """The largest `seconds` of any rank."""
        micros = min(max(1, round(seconds * 1e6)), 2**31 - 1)
        return self.ranks.most(micros) / 1e6

    @property
    def left(self) -> float:
        """Of the time that the measurement may take."""
        spent = time.perf_counter() - self.start
        return self.seconds - self.agreed(STOPPED if self.stopping() else spent)

    def is_stopped(self) -> bool:
        """Whether any rank is told to stop."""
        return self.agreed(STOPPED if self.stopping() else 0.0) >= STOPPED

    def time(self, run: Callable[[], None]) -> float:
        """Seconds of `run` on the slowest rank; all begin together."""
        self.ranks.most(0)
        start = time.perf_counter()
        run()
        return self.agreed(time.perf_counter() - start)


def _table(
    watch: _Watch,
    collective: Callable[[mx.array], mx.array],
    sizes: Sequence[int],
    until: float,
) -> tuple[CollectiveTime, ...]:
    """One kind of collective by size, until `until` of the time is over."""
    timings: list[CollectiveTime] = []
    rest = (1 - until) * watch.seconds
    for nbytes in sizes:
        left = watch.left - rest
        if timings:
            expected = timings[-1].seconds * nbytes / timings[-1].nbytes
            if 2 * expected > left:
                break
        x = mx.zeros((nbytes // 2,), mx.bfloat16)
        mx.eval(x)
        once = watch.time(lambda x=x: mx.eval(collective(x)))  # type: ignore[misc]
        share = left / (len(sizes) - len(timings))
        count = max(0, min(CHAIN, int(share / 2 / once)))
        best = once
        for _ in range(2 if count else 0):
            many = watch.time(lambda x=x, n=count: _run(watch, collective, x, n))  # type: ignore[misc]
            best = min(best, many / count)
        timings.append(CollectiveTime(nbytes, best))
    return tuple(timings)


def _run(
    watch: _Watch, collective: Callable[[mx.array], mx.array], x: mx.array, count: int
) -> None:
    """`count` of them, as a step runs them; `Ranks` chains each to the one before."""
    for _ in range(count):
        last = collective(x)
        if not watch.chains:
            mx.eval(last)
    mx.eval(last)


def _hidden(watch: _Watch, gathers: Sequence[CollectiveTime]) -> float:
    """The part of a gather that passes while products of about its length run beside it."""
    share = watch.seconds / 30
    chosen = ([timing for timing in gathers if timing.seconds <= share] or gathers[:1])[-1]
    least, most = BESIDE
    count = max(least, min(most, round(LONG / chosen.seconds)))
    x = mx.zeros((chosen.nbytes // 2,), mx.bfloat16)
    square = _square(chosen.seconds, share)
    mx.eval(x, square)

    def products() -> list[mx.array]:
        return [square @ (square + k) for k in range(count)]

    def gather() -> list[mx.array]:
        return [watch.ranks.gather(x) for _ in range(count)]

    def both() -> list[mx.array]:
        # As a step does: whoever waits on the host begins its products before.
        made = products()
        return [*(watch.ranks.begin_gather(x).result(product) for product in made), *made]

    alone, bare, beside = (
        min(watch.time(lambda build=build: mx.eval(build())) for _ in range(2))  # type: ignore[misc]
        for build in (products, gather, both)
    )
    return hidden_part(alone, bare, beside)


def hidden_part(alone: float, bare: float, beside: float) -> float:
    """The part of gathers that passes beside products: seconds of products `alone`, of gathers
    `bare`, and of gathers with products `beside` them."""
    return min(1.0, max(0.0, (alone + bare - beside) / min(alone, bare)))


def _square(seconds: float, longest: float) -> mx.array:
    """A matrix whose product with another takes about `seconds`, and never over `longest`."""
    chosen = mx.ones((PRODUCTS[0], PRODUCTS[0]), mx.bfloat16)
    for side in PRODUCTS:
        x = mx.ones((side, side), mx.bfloat16)
        mx.eval(x, x @ x)  # compiles
        start = time.perf_counter()
        mx.eval(x @ x)
        spent = time.perf_counter() - start
        if spent > longest and side > PRODUCTS[0]:
            break
        chosen = x
        if spent >= seconds or 8 * spent > 2 * longest:
            break
    return chosen

"""Collectives are timed by size, within bounded time, on rings of any speed."""

from __future__ import annotations

import time

import mlx.core as mx
import pytest

from fluxmesh.engine import ring_probe
from fluxmesh.engine.ring_probe import SIZES, timed
from fluxmesh.models.collectives import Pending
from fluxmesh.models.waiting import InGraph

ROOM = 1 << 40  # bytes
BUDGETS = (1.0, 5.0, 25.0)  # seconds: more where a busy machine left no time for all sizes


class Slow:
    """A rank whose collectives take as long as they would on a wire of so many bytes a second."""

    size = 2

    def __init__(self, rate: float, latency: float = 0.0, others: float = 0.0) -> None:
        self.rate, self.latency, self.others = rate, latency, others
        self.calls: list[tuple[str, int]] = []

    def _wait(self, what: str, x: mx.array) -> mx.array:
        self.calls.append((what, x.nbytes))
        time.sleep(self.latency + x.nbytes / self.rate)
        return x

    def gather(self, x: mx.array) -> mx.array:
        return self._wait("gather", x)

    def begin_gather(self, x: mx.array) -> Pending:
        return Pending(self.gather(x), InGraph())

    def sum(self, x: mx.array) -> mx.array:
        return self._wait("sum", x)

    def most(self, value: int) -> int:
        return max(value, round(self.others * 1e6) if value > 0 else value)


def test_a_slow_ring_is_measured_by_its_smaller_sizes_alone() -> None:
    for seconds in (1.2, 6.0):  # more where a busy machine left no time for a second size
        ranks = Slow(1e6)
        timing = timed(ranks, seconds, ROOM)  # type: ignore[arg-type]
        assert max(nbytes for _, nbytes in ranks.calls) < SIZES[-1]  # it would take half a minute
        if min(len(timing.gathers), len(timing.sums)) >= 2:
            break
    for table in (timing.gathers, timing.sums):
        assert 2 <= len(table) < len(SIZES)
        for point in table:
            assert point.seconds >= 0.95 * point.nbytes / 1e6


def test_a_ring_that_takes_seconds_for_nothing_tells_one_size() -> None:
    ranks = Slow(1e9, latency=0.2)
    timing = timed(ranks, 0.2, ROOM)  # type: ignore[arg-type]
    assert [len(table) for table in (timing.gathers, timing.sums)] == [1, 1]
    assert timing.gathers[0].seconds >= 0.2


def test_a_fast_ring_is_measured_at_all_sizes_several_times() -> None:
    for seconds in BUDGETS:
        ranks = Slow(1e11)
        timing = timed(ranks, seconds, ROOM)  # type: ignore[arg-type]
        often = ranks.calls.count(("gather", SIZES[-1])) > 3
        if often and len(timing.gathers) == len(timing.sums) == len(SIZES):
            break
    assert [point.nbytes for point in timing.gathers] == list(SIZES)
    assert [point.nbytes for point in timing.sums] == list(SIZES)
    largest = [call for call in ranks.calls if call == ("gather", SIZES[-1])]
    assert len(largest) > 3


def test_a_host_with_little_memory_measures_with_small_arrays() -> None:
    for memory, largest in ((1 << 20, 4096), (4 * 50 * 65536, 65536), (ROOM, SIZES[-1])):
        for seconds in BUDGETS:
            ranks = Slow(1e11)
            timing = timed(ranks, seconds, memory)  # type: ignore[arg-type]
            if timing.gathers[-1].nbytes == timing.sums[-1].nbytes == largest:
                break
        assert timing.gathers[-1].nbytes == timing.sums[-1].nbytes == largest
        assert max(nbytes for _, nbytes in ranks.calls) == largest


def test_what_is_told_is_the_slowest_ranks_time() -> None:
    timing = timed(Slow(1e11, others=0.01), 0.5, ROOM)  # type: ignore[arg-type]
    assert all(point.seconds >= 0.01 / ring_probe.CHAIN for point in timing.gathers)


@pytest.mark.parametrize("hides", [False, True])
def test_what_products_hide_of_a_gather_is_told(
    monkeypatch: pytest.MonkeyPatch, hides: bool
) -> None:
    """A gather that waits while it is built hides nothing; one that another thread does, all."""
    clock = {"products": 0.0, "gathers": 0.0}

    def elapsed(watch: object, run: object) -> float:
        clock.update(products=0.0, gathers=0.0)
        run()  # type: ignore[operator]
        parts = clock.values()
        return max(parts) if hides else sum(parts)

    class CountingRing(Slow):
        def gather(self, x: mx.array) -> mx.array:
            clock["gathers"] += 0.004
            return x

    def evaluated(arrays: list[mx.array]) -> None:
        clock["products"] += 0.004 * sum(array.ndim == 2 for array in arrays)

    monkeypatch.setattr(ring_probe._Watch, "time", elapsed)
    ranks = CountingRing(1e11)
    watch = ring_probe._Watch(ranks, 2.0, lambda: False)  # type: ignore[arg-type]
    table = (ring_probe.CollectiveTime(4096, 0.004),)
    eval_ = mx.eval

    def spy(*arrays: object) -> None:
        if len(arrays) == 1 and isinstance(arrays[0], list):
            evaluated(arrays[0])
        eval_(*arrays)

    monkeypatch.setattr(ring_probe.mx, "eval", spy)
    assert ring_probe._hidden(watch, table) == pytest.approx(1.0 if hides else 0.0)


def test_who_waits_on_the_host_for_a_gather_has_its_products_under_way() -> None:
    """As on a Mac: a gather that is waited for before a product is begun would hide nothing."""
    beside: list[int] = []

    class Waited:
        looks_ahead = False

        def end(self, result: mx.array, meanwhile: tuple[mx.array, ...]) -> None:
            beside.append(sum(array.ndim == 2 for array in meanwhile))

    class HostRing(Slow):
        def begin_gather(self, x: mx.array) -> Pending:
            return Pending(x, Waited())  # type: ignore[arg-type]

    timed(HostRing(1e11), 0.5, ROOM)  # type: ignore[arg-type]
    assert len(beside) >= ring_probe.BESIDE[0] and set(beside) == {1}


@pytest.mark.parametrize("calls", [0, 3])
def test_a_rank_that_is_told_to_stop_ends_the_measurement_between_two_sizes(calls: int) -> None:
    ranks = Slow(1e6)
    table = timed(ranks, 2.0, ROOM, lambda: len(ranks.calls) >= calls)  # type: ignore[arg-type]
    assert table is None
    assert len(ranks.calls) <= calls + 200 and not any(what == "sum" for what, _ in ranks.calls)

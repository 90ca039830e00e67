"""Whole shares add up, leave nobody out, and are the fastest there are: held to all there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxmesh.cluster.shares import EVEN, Shares, dealt
from fluxmesh.cluster.snapshot import StepTiming
from fluxmesh.errors import UsageError
from fluxmesh.models.partition import Cut, Shard, TokenRuns
from fluxmesh.planning.shares import HostPace, fastest, least_slowest
from fluxmesh.storage.numbers.affine import GROUPS
from tests.unit.meshes import FLUX

PACES = st.builds(HostPace, st.floats(0.0, 2.0), st.floats(0.01, 3.0))


def compositions(total: int, most: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All ways to give `total` units to so many hosts, each at least one and at most his."""
    if len(most) == 1:
        if 1 <= total <= most[0]:
            yield (total,)
        return
    for first in range(1, min(most[0], total) + 1):
        for rest in compositions(total - first, most[1:]):
            yield (first, *rest)


def slowest(paces: Sequence[HostPace], units: Sequence[int]) -> float:
    return max(pace.seconds(count) for pace, count in zip(paces, units, strict=True))


@st.composite
def hosts(draw: st.DrawFn) -> tuple[int, list[HostPace], list[int]]:
    paces = draw(st.lists(PACES, min_size=1, max_size=4))
    units = draw(st.integers(1, 12))
    return units, paces, [draw(st.integers(1, 12)) for _ in paces]


@settings(max_examples=150, deadline=None)
@given(hosts())
def test_no_other_way_to_deal_units_out_is_faster(
    drawn: tuple[int, list[HostPace], list[int]],
) -> None:
    units, paces, most = drawn
    ways = list(compositions(units, most))
    best = least_slowest(units, paces, most)
    if not ways:
        assert best is None
        return
    assert best in ways  # they add up; everyone has one, and nobody more than his most
    assert slowest(paces, best) == pytest.approx(min(slowest(paces, way) for way in ways))
    assert least_slowest(units, paces, most) == best


@settings(max_examples=150, deadline=None)
@given(hosts(), st.floats(0.0, 2.0))
def test_what_travels_counts_too(drawn: tuple[int, list[HostPace], list[int]], link: float) -> None:
    """A gather takes as long as the longest share, which everyone's is filled up to."""
    units, paces, most = drawn

    def seconds(way: tuple[int, ...]) -> float:
        return slowest(paces, way) + link * max(way)

    best = fastest(units, paces, most, seconds)
    ways = list(compositions(units, most))
    assert (best is None) == (not ways)
    if best is not None:
        assert best in ways
        assert seconds(best) == pytest.approx(min(map(seconds, ways)))


@pytest.mark.parametrize(("ratio", "units"), [(1.0, (72, 72)), (2.0, (96, 48)), (5.0, (120, 24))])
def test_hosts_finish_together(ratio: float, units: tuple[int, int]) -> None:
    paces = [HostPace(0.0, 1.0), HostPace(0.0, ratio)]
    assert least_slowest(144, paces, [144, 144]) == units


def test_a_fast_host_with_little_memory_has_a_small_share() -> None:
    paces = [HostPace(0.0, 1.0), HostPace(0.0, 4.0)]
    assert least_slowest(24, paces, [6, 24]) == (6, 18)
    assert least_slowest(24, paces, [6, 17]) is None


@given(st.integers(0, 5000), st.lists(st.integers(1, 200), min_size=1, max_size=6).map(tuple))
def test_what_is_dealt_in_proportion_adds_up_and_is_within_one(
    total: int, parts: tuple[int, ...]
) -> None:
    counts = dealt(total, parts)
    assert sum(counts) == total and len(counts) == len(parts)
    assert dealt(total, parts) == counts
    if total >= len(parts):
        assert min(counts) >= 1
    exact = [total * part / sum(parts) for part in parts]
    if min(exact) >= 1:
        assert all(abs(count - part) < 1 for count, part in zip(counts, exact, strict=True))


@given(st.integers(1, 5000), st.integers(1, 8))
def test_equal_runs_are_those_of_ever(tokens: int, ranks: int) -> None:
    runs = TokenRuns.of(tokens, ranks)
    each = -(-tokens // ranks)
    assert runs.are_equal and runs.longest == each
    assert [runs.span(rank) for rank in range(ranks)] == [
        (rank * each, (rank + 1) * each) for rank in range(ranks)
    ]
    assert sum(runs.own) == tokens


@given(st.integers(1, 5000), st.lists(st.integers(1, 144), min_size=2, max_size=6).map(tuple))
def test_unequal_runs_follow_each_other_without_filling(
    tokens: int, parts: tuple[int, ...]
) -> None:
    runs = TokenRuns.of(tokens, len(parts), Shares(tokens=parts))
    spans = [runs.span(rank) for rank in range(len(parts))]
    assert [stop for _, stop in spans][:-1] == [start for start, _ in spans][1:]
    assert sum(runs.own) == tokens
    if tokens >= len(parts):
        assert runs.own == runs.counts == dealt(tokens, parts)
    else:  # too few for everyone: each computes one, of which some are filling
        assert set(runs.counts) == {1}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_an_equal_shard_is_that_of_ever(size: int) -> None:
    for rank in range(size):
        shard, step = Shard(rank, size), 24 // size
        assert shard.part(24, 100) == shard.columns(24, 100)
        assert shard.part(24, 100) == (100 + rank * step, 100 + (rank + 1) * step)


def test_shares_of_another_number_of_hosts_are_refused() -> None:
    with pytest.raises(UsageError, match="shares of heads are those of 2 hosts, and the ring has"):
        Shard(0, 3, Shares(heads=(3, 1), columns=(3, 1)))
    EVEN.check(7)
    assert EVEN.are_even and not Shares(tokens=(1, 1)).are_even
    assert Shares.from_plain({"tokens": [2, 1], "heads": [], "columns": []}) == Shares((2, 1))


# Quantization groups


def test_what_is_quantized_is_dealt_out_in_the_largest_groups_that_files_have() -> None:
    partition = FLUX.architecture.partition
    assert partition.units(False) == (1, 64)
    assert partition.units(True) == (1, max(GROUPS))


def test_columns_that_break_a_group_of_a_file_are_refused() -> None:
    """Of 256 in groups of 128 there are 2 scales a row: 64 columns have no whole one."""
    assert Cut(1, ((0, 128),), 256).spans_of(2) == ((0, 1),)
    with pytest.raises(UsageError, match="columns 0 to 64 are no whole quantization groups"):
        Cut(1, ((0, 64),), 256).spans_of(2)


def test_a_time_of_a_ring_is_told_with_a_share_for_each_of_its_hosts() -> None:
    how = {"model": "m", "height": 64, "width": 64, "dtype": "bfloat16", "bits": None}
    with pytest.raises(UsageError, match="shares of tokens are those of 3 hosts"):
        StepTiming(step_seconds=1.0, hosts=2, shares=Shares(tokens=(1, 2, 3)), **how)

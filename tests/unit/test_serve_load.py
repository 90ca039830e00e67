"""What `tools/serve_load.py` holds a server to: a broken promise is seen."""

from __future__ import annotations

import pytest

from tools.serve_clients import LoadLog
from tools.serve_load import FILES, FIRST_HALF, SECOND_HALF, ServerReading, flat, in_turn, report
from tools.serve_overhead import Overhead, Turn


@pytest.mark.parametrize(
    ("order", "most"),
    [("", 0), ("abcabcabc", 1), ("abcacbbca", 2), ("abbbba", 4), ("aaaab", 0)],
)
def test_pictures_of_another_between_two_of_ones_own_are_counted(order: str, most: int) -> None:
    assert LoadLog(order=list(order)).between() == most


@pytest.mark.parametrize(
    ("places", "order", "broken"),
    [
        ([[2, 1], [1]], "abab", []),
        ([[3, 1]], "abab", ["the last place that a job began at"]),
        ([[1, 2]], "abab", ["jobs whose place grew"]),
        ([[1]], "abbbba", ["pictures of one client between two of another"]),
    ],
)
def test_a_job_that_is_out_of_turn_breaks_a_promise(
    places: list[list[int]], order: str, broken: list[str]
) -> None:
    promises = in_turn(LoadLog(places=places, order=list(order)), clients=2)
    assert [each.about for each in promises if not each.is_kept] == broken
    assert report(promises) == int(bool(broken))


@pytest.mark.parametrize(
    ("middle", "end", "kept"),
    [
        ((FIRST_HALF, 0, 5), (FIRST_HALF + SECOND_HALF, FILES, 5), [True, True, True]),
        ((FIRST_HALF + 1, 0, 0), (0, 0, 0), [False, True, True]),
        ((0, 0, 0), (SECOND_HALF + 1, 0, 0), [False, True, True]),
        ((0, FILES + 1, 0), (0, 0, 0), [True, False, True]),
        ((0, 0, 0), (0, 0, 21), [True, True, False]),
    ],
)
def test_what_grows_breaks_a_promise(
    middle: tuple[int, int, int], end: tuple[int, int, int], kept: list[bool]
) -> None:
    """Each of (memory, descriptors, threads) is what is more than at the start."""
    start = (100 << 20, 20, 9)
    readings = [
        ServerReading(*(a + b for a, b in zip(start, more, strict=True)))
        for more in ((0, 0, 0), middle, end)
    ]
    assert [each.is_kept for each in flat(readings, clients=20)] == kept


def test_what_else_a_machine_does_falls_on_both_sides_of_a_turn() -> None:
    """Three turns, in which it got slower, and one that something disturbed."""
    mesh = (0.10, 0.20, 0.30, 0.10)
    server = (0.11, 0.21, 0.31, 0.90)
    measured = Overhead(
        tuple(Turn(seconds, seconds / 2) for seconds in server),
        tuple(Turn(seconds, seconds / 2) for seconds in mesh),
    )
    assert measured.seconds == pytest.approx(0.010)
    assert measured.cpu == pytest.approx(0.005)
    assert "+10.0 and +5.0 ms in the middle of 4 turns" in measured.sentence()

"""The server's line: turns, places, bounds. Pure, with a clock of its own."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxmesh_coordinator.server.queue.durations import Durations
from fluxmesh_coordinator.server.queue.fair_queue import (
    FairQueue,
    QueueBounds,
    QueueFullError,
    WaitingRequest,
)


def entry(id: str, client: str, seconds: float = 1.0, nbytes: int = 0) -> WaitingRequest:
    return WaitingRequest(id=id, client=client, seconds=seconds, nbytes=nbytes)


def ids(queue: FairQueue) -> list[str]:
    return [waiting.id for waiting in queue.line()]


def test_clients_take_turns_however_many_one_of_them_brings() -> None:
    queue = FairQueue()
    for number in range(5):
        queue.add(entry(f"a{number}", "anna"))
    queue.add(entry("b0", "ben"))
    queue.add(entry("c0", "cleo"))
    queue.add(entry("b1", "ben"))
    assert ids(queue) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3", "a4"]


def test_who_was_served_goes_behind_the_others() -> None:
    queue = FairQueue()
    for number in range(3):
        queue.add(entry(f"a{number}", "anna"))
    first = queue.take()
    assert first is not None and first.id == "a0"
    queue.add(entry("b0", "ben"))
    queue.add(entry("b1", "ben"))
    assert ids(queue) == ["a1", "b0", "a2", "b1"]
    assert [queue.take().id for _ in range(4)] == ["a1", "b0", "a2", "b1"]  # type: ignore[union-attr]
    assert queue.take() is None


def test_places_and_times_are_those_at_which_requests_are_done() -> None:
    queue = FairQueue()
    for id, client, seconds in (("a0", "a", 4.0), ("a1", "a", 2.0), ("b0", "b", 3.0)):
        queue.add(entry(id, client, seconds))
    places = queue.places([10.0])
    assert [(id, place.number, place.seconds_left) for id, place in places.items()] == [
        ("a0", 1, 14.0),
        ("b0", 2, 17.0),
        ("a1", 3, 19.0),
    ]
    two_lanes = queue.places([10.0, 1.0])
    assert [place.seconds_left for place in two_lanes.values()] == [5.0, 8.0, 10.0]


def test_no_time_is_told_where_one_before_is_not_known() -> None:
    queue = FairQueue()
    queue.add(entry("a", "a", 4.0))
    queue.add(entry("b", "b", 0.0))
    queue.add(entry("c", "c", 4.0))
    assert [place.seconds_left for place in queue.places([0.0]).values()] == [4.0, 0.0, 0.0]
    assert {place.seconds_left for place in queue.places([None]).values()} == {0.0}


def test_bounds_of_a_client_of_all_and_of_pictures_that_wait() -> None:
    queue = FairQueue(QueueBounds(per_client=2, whole=3, held_bytes=100))
    queue.add(entry("a0", "a", nbytes=60))
    with pytest.raises(QueueFullError, match="too many pictures"):
        queue.add(entry("big", "b", nbytes=41))
    queue.add(entry("a1", "a"))
    with pytest.raises(QueueFullError, match="2 of your requests wait") as refused:
        queue.add(entry("a2", "a"), retry_after=7.2)
    assert refused.value.retry_after == 8
    queue.add(entry("b0", "b"))
    with pytest.raises(QueueFullError, match="The line is full with 3"):
        queue.add(entry("c0", "c"))
    queue.take()
    queue.add(entry("c0", "c"))


def test_an_address_does_not_fill_the_line_under_many_names() -> None:
    queue = FairQueue(QueueBounds(per_client=2, per_address=3, whole=9))
    for name in "abc":
        queue.add(entry(name, f"10.0.0.7 {name}"))
    with pytest.raises(QueueFullError, match="3 requests of your address"):
        queue.add(entry("d", "10.0.0.7 d"))
    queue.add(entry("d", "10.0.0.8 d"))


def test_what_is_removed_is_painted_for_nobody() -> None:
    queue = FairQueue()
    queue.add(entry("a0", "a"))
    queue.add(entry("b0", "b"))
    assert queue.remove("a0") and not queue.remove("a0") and not queue.remove("nobody")
    assert ids(queue) == ["b0"] and len(queue) == 1


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 9)), min_size=1, max_size=40),
    st.integers(1, 3),
)
def test_a_line_that_nobody_joins_is_done_when_and_as_it_said(
    requests: list[tuple[str, int]], lanes: int
) -> None:
    queue = FairQueue(QueueBounds(per_client=100, per_address=100, whole=100))
    for number, (client, seconds) in enumerate(requests):
        queue.add(entry(str(number), client, float(seconds)))
    said = queue.places([0.0] * lanes)
    order = ids(queue)
    free = [(0.0, lane) for lane in range(lanes)]  # a clock of its own: when each lane is free
    served: dict[str, int] = {}
    for position in order:
        now, lane = heapq.heappop(free)
        taken = queue.take()
        assert taken is not None and taken.id == position
        heapq.heappush(free, (now + taken.seconds, lane))
        assert said[taken.id].seconds_left == now + taken.seconds
        waiting = {each.client for each in queue.line()}
        served[taken.client] = served.get(taken.client, 0) + 1
        # Nobody who still waits has been served less often by more than one turn.
        assert all(served[taken.client] - served.get(client, 0) <= 1 for client in waiting)


def test_a_guess_follows_what_requests_took() -> None:
    durations = Durations()
    assert durations.guess("tiny", 100.0) == 0.0
    durations.learn("tiny", 100.0, 10.0)
    assert durations.guess("tiny", 50.0) == 5.0
    durations.learn("tiny", 100.0, 20.0)  # beside something else, perhaps
    durations.learn("tiny", 0.0, 20.0)
    assert durations.guess("tiny", 100.0) == pytest.approx(10.0)
    durations.learn("tiny", 100.0, 20.0)  # no: it takes so long now
    assert durations.guess("tiny", 100.0) == pytest.approx(20.0)

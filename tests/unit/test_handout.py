"""Each image goes to whoever is free first, and hosts on one device share its time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxmesh.planning.list_schedule import ScheduledHost, share_out

TIMES = st.floats(0.01, 100)


def own(*workers: tuple[float, float]) -> list[ScheduledHost]:
    """Workers with a device each, from (free from, seconds an image)."""
    return [
        ScheduledHost(free, seconds, i, f"device {i}") for i, (free, seconds) in enumerate(workers)
    ]


def test_equal_hosts_take_turns() -> None:
    assert share_out(5, own((0, 2), (0, 2))) == ((0, 1, 0, 1, 0), 6)


def test_a_fast_host_does_more_and_a_late_one_less() -> None:
    assert share_out(5, own((0, 1), (0, 3))) == ((0, 1, 0, 0, 0), 4)
    assert share_out(3, own((5, 1), (0, 2))) == ((1, 1, 1), 6)


@given(st.integers(1, 40), st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=5))
def test_nobody_waits_while_an_image_is_left(
    images: int, workers: list[tuple[float, float]]
) -> None:
    owners, end = share_out(images, own(*workers))
    done = [free for free, _ in workers]
    for owner in owners:
        assert done[owner] == min(done)
        done[owner] += workers[owner][1]
    assert end == max(done[owner] for owner in set(owners))


@given(st.integers(1, 20), st.integers(2, 4), TIMES)
def test_agents_on_one_device_are_as_fast_as_one(images: int, agents: int, seconds: float) -> None:
    workers = [ScheduledHost(0.0, seconds, rank, "gpu") for rank in range(agents)]
    owners, end = share_out(images, workers)
    assert end == pytest.approx(images * seconds)
    counts = [owners.count(rank) for rank in range(agents)]
    assert max(counts) - min(counts) <= 1


@given(
    st.integers(1, 20),
    st.lists(st.tuples(TIMES, TIMES, st.sampled_from("ab")), min_size=2, max_size=5),
)
def test_a_shared_device_does_the_work_of_all_its_agents(
    images: int, workers: list[tuple[float, float, str]]
) -> None:
    given = [ScheduledHost(free, each, i, device) for i, (free, each, device) in enumerate(workers)]
    owners, end = share_out(images, given)
    assert len(owners) == images
    for device in "ab":
        work = sum(given[owner].seconds for owner in owners if given[owner].device == device)
        assert work <= end * (1 + 1e-9)
    alone, sooner = share_out(images, own(*[(free, each) for free, each, _ in workers]))
    assert len(alone) == images
    assert all(owner in range(len(workers)) for owner in owners)
    assert end >= min(free + each for free, each, _ in workers) * (1 - 1e-9)

"""How far a job is, and how long it still takes: predicted, then by its own pace."""

from __future__ import annotations

from fluxmesh_coordinator.jobs.progress import RemainingTime


def test_at_first_the_plan_says_how_long_and_then_the_jobs_own_pace() -> None:
    remaining = RemainingTime()
    assert remaining.left(0, 8, 0.0) == 0.0
    remaining.predicted(20.0, 100.0)
    assert remaining.left(0, 8, 105.0) == 15.0
    remaining.stepped(1, 110.0)  # the first step compiles: it is no measure
    assert remaining.left(1, 8, 110.0) == 10.0
    remaining.stepped(3, 114.0)
    assert remaining.left(3, 8, 114.0) == 10.0  # 2 s each
    assert remaining.left(3, 8, 115.0) == 12.5  # the next one is late
    assert remaining.left(8, 8, 130.0) == 0.0


def test_a_new_plan_is_believed_again() -> None:
    remaining = RemainingTime()
    remaining.predicted(1.0, 0.0)
    remaining.stepped(1, 1.0)
    remaining.stepped(2, 101.0)
    assert remaining.left(2, 3, 101.0) == 100.0
    remaining.predicted(7.0, 101.0)
    assert remaining.left(2, 3, 103.0) == 5.0
    assert remaining.left(2, 3, 120.0) == 0.0  # nothing is known any more

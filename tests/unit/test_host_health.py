"""Which hosts a job uses no more."""

from __future__ import annotations

from fluxmesh.deadlines import DEADLINES
from fluxmesh_coordinator.jobs.health import ENOUGH, HostHealth


def failing(*times: float) -> HostHealth:
    health = HostHealth()
    for now in times:
        health.failed(0, now)
    return health


def test_two_failures_soon_after_one_another_are_too_many() -> None:
    assert failing(10.0).takes(0)
    assert not failing(10.0, 10.0 + DEADLINES.forgiven - 1).takes(0)
    assert failing(10.0, 10.0 + DEADLINES.forgiven - 1).takes(1)
    assert failing(10.0, 10.0 + DEADLINES.forgiven).takes(0)


def test_work_done_since_forgives_one_failure_and_not_the_next() -> None:
    health = HostHealth()
    health.failed(0, 1.0)
    for _ in range(ENOUGH):
        health.worked(0)
    health.failed(0, 2.0)
    assert health.takes(0)
    health.failed(0, 3.0)
    assert not health.takes(0), "it has done nothing in between"


def test_who_is_left_out_stays_out() -> None:
    health = HostHealth()
    health.leave_out(0)
    for _ in range(ENOUGH):
        health.worked(0)
    health.failed(0, DEADLINES.forgiven)
    assert not health.takes(0)

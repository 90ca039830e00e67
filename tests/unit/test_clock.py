"""A coordinator that stood still blames nobody for it."""

from __future__ import annotations

import time

import pytest

from fluxmesh.machine.clock import RunningClock
from fluxmesh_coordinator.runtime.clock import OwnClock


class Times:
    def __init__(self) -> None:
        self.monotonic, self.wall = 100.0, 1e9

    def sleep(self, seconds: float, *, stops: bool = False) -> None:
        self.monotonic += 0.0 if stops else seconds
        self.wall += seconds


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    made = Times()
    monkeypatch.setattr(time, "monotonic", lambda: made.monotonic)
    monkeypatch.setattr(time, "time", lambda: made.wall)
    return made


def test_time_passes_from_tick_to_tick_and_not_while_it_stood_still(times: Times) -> None:
    clock = OwnClock()
    begin = clock.now
    for _ in range(8):
        times.sleep(0.25)
        clock.tick()
    assert clock.now - begin == 2.0 and not clock.has_just_woken
    times.sleep(600)
    clock.tick()
    assert clock.now - begin == 2.0 and clock.has_just_woken
    for _ in range(44):
        times.sleep(0.25)
        clock.tick()
    assert clock.now - begin == 13.0 and not clock.has_just_woken


def test_a_sleep_that_the_clock_sleeps_through_is_seen_too(times: Times) -> None:
    clock = OwnClock()
    begin = clock.now
    times.sleep(600, stops=True)
    clock.tick()
    assert clock.now == begin and clock.has_just_woken


def test_a_standstill_is_noticed_by_whoever_looks_first_and_counted_once(times: Times) -> None:
    clock = RunningClock()
    before = clock.tick()
    times.sleep(600)
    assert clock.tick() == clock.tick() == clock.now == before
    times.sleep(1)
    assert clock.tick() == before + 1

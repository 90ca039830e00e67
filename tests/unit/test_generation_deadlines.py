"""How long a generation waits for a host, and what it takes for a sign of life."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fluxmesh import events
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs.host import HostState
from fluxmesh_coordinator.jobs.types import Gone, Reported
from tests.unit.simulated_jobs import GenerationSimulation


def test_a_first_step_is_waited_for_as_the_plan_reckons(monkeypatch: pytest.MonkeyPatch) -> None:
    expected: list[tuple[str, float, bool]] = []

    def expect(host: HostState, paint: messages.Paint, seconds: float, *, measured: bool) -> None:
        expected.append((paint.placement, seconds, measured))

    monkeypatch.setattr(HostState, "expect", expect)
    done = GenerationSimulation(2, placement="sequence").run()
    option = done.session.state.option
    assert option is not None
    assert expected == [("sequence", option.phases[0].step_seconds, option.measured)] * 2


def test_an_agent_that_hangs_has_failed_once() -> None:
    """Its engine's deadline passes first, then the agent itself is found to be silent."""
    mesh = GenerationSimulation(1, steps=5).begin()
    while len(mesh.of(events.Step)) < 2:
        mesh.turn()
    mesh.stop_engine(0)
    agent = mesh.machines.pop(0)
    while not mesh.messages(messages.Kill):
        mesh.turn()
    mesh.feed(Gone(0, "Its agent is silent."))
    assert mesh.stuck
    mesh.start_agent(0)
    mesh.begin().go_on()
    mesh.check()
    assert agent.made + mesh.machines[0].made == [(0, step) for step in range(1, 6)]


def test_a_step_is_late_after_four_times_what_the_last_took_and_then_patience_doubles() -> None:
    def break_one(mesh: GenerationSimulation) -> None:
        if not stopped:
            mesh.now += 3.9
        if len(mesh.of(events.Step)) == 3 and not stopped:
            stopped.append(mesh.now)
            mesh.stop_engine(0)

    stopped: list[float] = []
    done = GenerationSimulation(1, steps=6, faults=break_one).run()
    done.check()
    (lost,) = done.of(events.HostLost)
    assert "a step did not come within 16 s" in lost.reason
    assert done.session.state.hosts[0].patience == 2


def test_an_engine_that_ticks_is_not_taken_for_dead() -> None:
    mesh = GenerationSimulation(1).begin()
    while not isinstance(mesh.machines[0].at, messages.Encode):
        mesh.report(0)
    ring_generation = mesh.session.state.hosts[0].ring_generation
    for _ in range(20):
        mesh.now += 3.0
        mesh.feed(
            Reported(0, messages.Beat(job="job", ring_generation=ring_generation, doing="encoding"))
        )
        mesh.tick()
    assert mesh.of(events.HostLost) == []
    mesh.now += 6.0
    mesh.tick()
    assert "no sign for 6 s" in mesh.of(events.HostLost)[0].reason


@pytest.mark.parametrize(
    ("every", "seconds", "reason"),
    [(0.0, 6, "no sign for 6 s while loading"), (1.0, 61, "not one byte was loaded for 60 s")],
)
def test_a_load_must_tick_and_its_bytes_must_come(every: float, seconds: int, reason: str) -> None:
    mesh = GenerationSimulation(1).begin()
    while not isinstance(mesh.machines[0].at, messages.Load):
        mesh.report(0)
    ring_generation = mesh.session.state.hosts[0].ring_generation
    mesh.feed(
        Reported(
            0,
            messages.LoadProgress(
                job="job",
                ring_generation=ring_generation,
                component="transformer",
                done_bytes=1,
                total_bytes=100,
            ),
        )
    )
    for _ in range(seconds):
        assert mesh.of(events.HostLost) == []
        mesh.now += 1.0
        if every:
            mesh.feed(
                Reported(
                    0, messages.Beat(job="job", ring_generation=ring_generation, doing="loading")
                )
            )
        mesh.tick()
    assert reason in mesh.of(events.HostLost)[0].reason


def test_a_cheap_step_leaves_a_slow_host_the_time_for_a_whole_one() -> None:
    mesh = GenerationSimulation(1, steps=9, cache=0.1).begin()
    while not mesh.messages(messages.Paint):
        mesh.turn()
    (paint,) = mesh.messages(messages.Paint)
    host = mesh.session.state.hosts[0]
    for step, (seconds, reused) in enumerate([(20.0, False), (0.1, True)], start=1):
        report = messages.Stepped(
            job="job",
            ring_generation=host.ring_generation,
            image=0,
            step=step,
            is_last=False,
            seconds=seconds,
            peak_bytes=1,
            latents=paint.noise,
        )
        mesh.feed(Reported(0, replace(report, reused=reused)))
        assert host.step_deadline(paint) == 80.0

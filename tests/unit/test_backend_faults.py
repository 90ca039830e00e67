"""When a ring's backend is to blame, and what its hosts' rings form over then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fluxmesh import events
from fluxmesh.cluster.backends import Fallback
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Kill, training
from fluxmesh_coordinator.jobs.types import Answered, Back, Gone, Reported
from tests.unit.meshes import LOWER
from tests.unit.simulated_jobs import GenerationSimulation, TrainingSimulation
from tests.unit.simulation import SimulatedMachine, Simulation

Sim = Simulation[Any]
Begin = Callable[[], Sim]


def over_jaccl(sim: Sim) -> Sim:
    """Each host has a cable to every other."""
    ranks = sim.ranks
    sim.links = replace(sim.links, backend="jaccl", fallback=Fallback(LOWER))
    for rank, machine in sim.machines.items():
        rdma = tuple(None if other == rank else ("rdma_en5",) for other in ranks)
        machine.leased = replace(machine.leased, host=replace(machine.leased.host, rdma=rdma))
    return sim.begin() if sim.heard else sim


def knows(sim: Sim, fallback: Fallback) -> None:
    """What is known of its mesh before the job begins."""
    sim.links = replace(sim.links, fallback=fallback)
    if sim.heard:  # it waits for a run's tasks
        sim.begin()


def generation(placement: Any) -> Begin:
    return lambda: over_jaccl(GenerationSimulation(3, n_images=3, steps=20, placement=placement))


def of_training() -> Sim:
    return over_jaccl(TrainingSimulation(3, iterations=60, grad_accumulate=6))


RING = pytest.mark.parametrize(
    "begin",
    [
        pytest.param(generation("sequence"), id="sequence"),
        pytest.param(generation("tensor"), id="tensor"),
        pytest.param(of_training, id="training"),
    ],
)


def joins(sim: Sim) -> list[str]:
    """Over what each ring was formed, in turn."""
    by_generation = {join.ring_generation: join.backend for join in sim.messages(messages.Join)}
    return list(by_generation.values())


def whenever(sim: Sim, kind: Any, strike: Callable[[], None], times: int, first: int = 0) -> None:
    """Strikes each new ring once, when rank 1 is at work of a kind and has done `first` pieces."""
    struck: set[int] = set()

    def faults(_: Sim) -> None:
        machine = sim.machines.get(1)
        if machine is None or not isinstance(machine.at, kind) or machine.done < first:
            return
        generation = machine.at.ring_generation
        if generation not in struck and len(struck) < times:
            struck.add(generation)
            strike()

    sim.faults = faults


def changes(sim: Sim) -> list[tuple[str, str]]:
    return [(event.before, event.after) for event in sim.of(events.BackendChanged)]


IN_COLLECTIVE = (messages.Paint, training.Update)


@RING
def test_a_group_that_does_not_form_is_tried_over_each_backend_below(begin: Begin) -> None:
    sim = begin()
    whenever(sim, messages.Join, lambda: sim.kill_engine(1), times=2)
    sim.play().check()
    assert joins(sim) == ["jaccl", "jaccl-ring", "ring"]
    assert changes(sim) == [("jaccl", "jaccl-ring"), ("jaccl-ring", "ring")]
    assert sim.lost == []  # no host is to blame, and one line is told of each backend


@RING
@pytest.mark.parametrize("kind", [messages.Join, IN_COLLECTIVE], ids=["init", "collective"])
def test_a_hang_costs_its_deadline_and_the_backend(begin: Begin, kind: Any) -> None:
    sim = begin()
    whenever(sim, kind, lambda: sim.stop_engine(1), times=1)
    sim.play().check()
    assert joins(sim) == ["jaccl", "jaccl-ring"]
    (event,) = sim.of(events.BackendChanged)
    assert event.reason.startswith("mac")
    members = "0, 1 and 2" if len(event.hosts) == 3 else "0 and 1"  # 2 is none of `tensor`
    assert str(event).startswith(
        f"jaccl failed on hosts {members}, which go on over jaccl-ring until the next "
    )


@RING
def test_the_second_death_in_collectives_is_the_backends(begin: Begin) -> None:
    sim = begin()
    whenever(sim, IN_COLLECTIVE, lambda: sim.kill_engine(1), times=2, first=1)
    sim.play().check()
    assert joins(sim) == ["jaccl", "jaccl", "jaccl-ring"]
    assert changes(sim) == [("jaccl", "jaccl-ring")]
    assert sim.lost == [1]  # the first one, as ever
    assert {1} <= set(sim.session.state.hosts)  # which is not left out for having failed twice


@RING
def test_deaths_that_lie_far_apart_are_forgiven(begin: Begin) -> None:
    sim = begin()

    def strike() -> None:
        sim.kill_engine(1)
        sim.now += DEADLINES.forgiven

    whenever(sim, IN_COLLECTIVE, strike, times=3, first=1)
    sim.play().check()
    assert set(joins(sim)) == {"jaccl"} and changes(sim) == []


@RING
def test_a_host_that_is_gone_is_no_fault_of_the_backend(begin: Begin) -> None:
    """Its neighbour fails first, before anybody knows that the host is out of reach."""
    sim = begin()

    def strike() -> None:
        del sim.machines[1]  # it hears of no kill
        sim.break_ring(0, "[jaccl] connection to a peer was lost")
        assert changes(sim) == []
        sim.feed(Gone(1, "Its agent is silent."))

    whenever(sim, messages.Join, strike, times=1)
    sim.play().check()
    assert set(joins(sim)) == {"jaccl"} and changes(sim) == []


@RING
def test_an_engine_that_somebody_kills_is_no_fault_of_the_backend(begin: Begin) -> None:
    sim = begin()

    def strike() -> None:
        sim.break_ring(1, "It was killed by signal 9.", messages.ENGINE_KILLED)

    whenever(sim, IN_COLLECTIVE, strike, times=2, first=1)
    sim.play().check()
    assert set(joins(sim)) == {"jaccl"} and changes(sim) == []
    assert 1 not in sim.session.state.hosts  # the host is: it failed twice


def breaks_unheard(sim: Sim, *ranks: int) -> Callable[[], None]:
    """Host 0 tells that its ring broke, and the agents of `ranks` have not ended their engines:
    the function that is returned tells that they have."""
    failed = of_ring(sim, 0, "Raised", "[jaccl] connection to a peer was lost")
    machines = {rank: sim.machines.pop(rank) for rank in ranks}
    sim.feed(Reported(0, failed))
    kills = {sent.rank: sent.message for sent in sim.sent if isinstance(sent.message, Kill)}

    def end() -> None:
        for rank, machine in machines.items():
            machine.empty()
            sim.machines.setdefault(rank, machine)
            sim.feed(Answered(rank, kills[rank], messages.Done()))

    return end


def of_ring(sim: Sim, rank: int, kind: str, text: str) -> messages.Failed:
    """What an engine of the ring that is there now tells at its end."""
    ring_generation = sim.session.state.hosts[rank].ring_generation
    return messages.Failed(
        ring_generation=ring_generation, job="job", kind=kind, text=text, fatal=True
    )


@RING
@pytest.mark.parametrize("kind", [messages.ENGINE_KILLED, "DoesNotFitError"])
def test_what_a_neighbour_notices_first_is_no_fault_of_the_backend(begin: Begin, kind: str) -> None:
    """The engine's own agent tells of a ring that has been ended meanwhile."""
    sim = begin()

    def strike() -> None:
        failed = of_ring(sim, 1, kind, "Gone.")
        end = breaks_unheard(sim, 1)
        sim.feed(Reported(1, failed))
        end()

    whenever(sim, messages.Join, strike, times=2)
    sim.play().check()
    assert set(joins(sim)) == {"jaccl"} and changes(sim) == []
    assert sim.links.fallback.faults == ()


@RING
def test_a_host_that_is_soon_back_is_no_fault_of_the_backend(begin: Begin) -> None:
    """Its agent begins anew before its neighbours' engines have ended."""
    sim = begin()

    def strike() -> None:
        leased = sim.machines.pop(1).leased  # it hears of no kill
        end = breaks_unheard(sim, 0)
        sim.feed(Gone(1, "Its agent is silent."))
        sim.machines[1] = SimulatedMachine(leased)
        sim.feed(Back(leased))
        end()

    whenever(sim, messages.Join, strike, times=1)
    sim.play().check()
    assert set(joins(sim)) == {"jaccl"} and changes(sim) == []


@RING
def test_a_death_of_a_larger_ring_is_forgiven_too(begin: Begin) -> None:
    """In one job, of hours: what lies far back counts no more for fewer of its hosts."""
    sim = begin()

    def strike() -> None:
        if len(sim.machines) > 2:
            sim.kill_engine(1)
            sim.lose(2)
            sim.now += DEADLINES.forgiven
        else:
            sim.kill_engine(1)

    whenever(sim, IN_COLLECTIVE, strike, times=2, first=1)
    sim.play().check()
    assert set(joins(sim)) == {"jaccl"} and changes(sim) == []


@RING
def test_what_fails_outside_of_collectives_is_no_fault_of_the_backend(begin: Begin) -> None:
    sim = begin()
    whenever(sim, messages.Load | training.OpenTraining, lambda: sim.kill_engine(1), times=1)
    sim.play().check()
    assert sim.links.fallback.faults == ()
    assert set(joins(sim)) == {"jaccl"} and changes(sim) == []


@RING
def test_where_nothing_is_below_a_ring_that_never_forms_ends_the_job(begin: Begin) -> None:
    sim = begin()
    knows(sim, Fallback())
    whenever(sim, messages.Join, lambda: sim.break_ring(1, "errno 60"), times=99)
    sim.play()
    assert isinstance(sim.error, FluxmeshError) and "5 rings failed" in str(sim.error)
    assert set(joins(sim)) == {"jaccl"} and changes(sim) == []


@RING
def test_the_last_backend_has_tries_of_its_own(begin: Begin) -> None:
    sim = begin()
    whenever(sim, messages.Join, lambda: sim.break_ring(1, "errno 60"), times=6)
    sim.play().check()
    assert joins(sim) == ["jaccl", "jaccl-ring", *["ring"] * 5]


@RING
def test_the_next_job_begins_over_what_works(begin: Begin) -> None:
    first, second = begin(), begin()
    whenever(first, messages.Join, lambda: first.kill_engine(1), times=1)
    first.play().check()
    knows(second, first.links.fallback)
    second.play().check()
    assert joins(second) == ["jaccl-ring"] and changes(second) == []


@RING
def test_a_death_in_the_job_before_makes_the_next_one_the_second(begin: Begin) -> None:
    first, second = begin(), begin()
    whenever(first, IN_COLLECTIVE, lambda: first.kill_engine(1), times=1, first=1)
    first.play().check()
    assert changes(first) == []
    knows(second, first.links.fallback)
    whenever(second, IN_COLLECTIVE, lambda: second.kill_engine(1), times=1, first=1)
    second.play().check()
    assert changes(second) == [("jaccl", "jaccl-ring")]


def test_a_ring_of_sockets_falls_back_to_nothing() -> None:
    sim: Sim = GenerationSimulation(3, steps=40, placement="sequence")
    whenever(sim, messages.Join, lambda: sim.break_ring(1, "refused"), times=2)
    sim.play().check()
    assert joins(sim) == ["ring"] * 3 and changes(sim) == []

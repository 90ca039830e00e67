"""What is true of every kind of job: no loss costs a result, and a stop leaves hosts idle.

A death, a hang, a return and a stop are tried at every report of a generation, by each placement,
and of a training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fluxmesh import events
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import (
    AdapterError,
    CancelledError,
    DoesNotFitError,
    FluxmeshError,
    IncompleteModelError,
    ModelNotFoundError,
    NotFiniteError,
    UsageError,
    WeightsError,
)
from fluxmesh.training.events import Dealt
from fluxmesh.wire import messages
from fluxmesh.wire.messages import training
from fluxmesh_coordinator.jobs.types import Reported, Stop
from tests.unit.simulated_jobs import GenerationSimulation, TrainingSimulation
from tests.unit.simulation import Simulation

Sim = Simulation[Any]
Begin = Callable[..., Sim]
Harm = Callable[[Sim, int], None]
LOADING = messages.Load | training.OpenTraining
COMPUTING = (messages.Paint, messages.Decode, training.Update, training.Validate)


def generation(placement: Any) -> Begin:
    def begin(hosts: int = 3, *, long: bool = False) -> Sim:
        images, steps = (4, 40) if long else (3, 2)
        return GenerationSimulation(hosts, n_images=images, steps=steps, placement=placement)

    return begin


def of_training(hosts: int = 3, *, long: bool = False) -> Sim:
    if long:
        return TrainingSimulation(hosts, iterations=120, grad_accumulate=12)
    return TrainingSimulation(hosts, iterations=10, grad_accumulate=5)


def without_checkpoints(hosts: int = 3) -> Sim:
    """A death costs all updates since the begin."""
    return TrainingSimulation(hosts, checkpoint=1000, iterations=9, grad_accumulate=3)


RINGS = [
    pytest.param(generation("sequence"), id="sequence"),
    pytest.param(generation("tensor"), id="tensor"),
    pytest.param(of_training, id="training"),
]
KINDS = [pytest.param(generation("data"), id="data"), *RINGS]
KIND = pytest.mark.parametrize("kind", KINDS)
RING = pytest.mark.parametrize("kind", RINGS)


def pieces(sim: Sim, rank: int | None = None) -> list[float]:
    """When the session heard of a step or a micro-batch; of one host's, or of all."""
    return [
        now
        for now, event in sim.heard
        if isinstance(event, Reported)
        and isinstance(event.report, messages.Stepped | training.Computed)
        and rank in (None, event.rank)
    ]


def work_on(sim: Sim, rank: int | None = None) -> None:
    """Until somebody, or this host, has done one more step or micro-batch."""
    before = len(pieces(sim, rank))
    sim.play(lambda: len(pieces(sim, rank)) > before)
    assert sim.end is None and sim.error is None


# --- at every report -----------------------------------------------------------------------------


def killed(sim: Sim, rank: int) -> None:
    sim.kill_engine(rank)


def hung(sim: Sim, rank: int) -> None:
    sim.stop_engine(rank)


def lost(sim: Sim, rank: int) -> None:
    sim.lose(rank)


def lost_and_back(sim: Sim, rank: int) -> None:
    sim.lose(rank)
    since = sim.now

    def bring_back(_: Sim) -> None:
        if rank not in sim.machines and sim.now > since + 0.3:
            sim.bring_back(rank)

    sim.faults = bring_back


def slept(sim: Sim, rank: int) -> None:
    """The coordinator did; when it wakes, all hosts have given it up."""
    for other in list(sim.machines):
        sim.lose(other, counts=False)
    for other in sim.ranks:
        sim.start_agent(other)


def at_every_report(
    kind: Begin, victim: str, harm: Harm, judge: Callable[[Sim, bool], None]
) -> None:
    """Plays a job as often as it has reports, and does harm before each of them in turn.

    `judge` hears whether the job's work was done already then.
    """
    whole = kind()
    whole.play()
    whole.check()
    for number in range(1, whole.reports + 1):
        sim, was_over = kind(), []

        def strike(
            report: Any, rank: int, sim: Sim = sim, n: int = number, over: list[bool] = was_over
        ) -> None:
            if sim.reports == n:
                over.append(sim.session.state.is_ending)
                harm(sim, rank if victim == "who reports" else (rank + 1) % 3)

        sim.before = strike
        try:
            sim.play()
            judge(sim, was_over[0])
        except BaseException as error:
            error.add_note(f"harm before report {number} of {whole.reports}")
            raise


@pytest.mark.parametrize(
    "kind", [*KINDS, pytest.param(without_checkpoints, id="training without checkpoints")]
)
@pytest.mark.parametrize(
    ("harm", "victim"),
    [
        *((harm, "who reports") for harm in (killed, hung, lost, lost_and_back, slept)),
        *((harm, "another") for harm in (killed, hung, lost, lost_and_back)),
    ],
)
def test_harm_at_every_report_costs_time_and_nothing_else(
    kind: Begin, harm: Harm, victim: str
) -> None:
    def judge(sim: Sim, was_over: bool) -> None:
        sim.check()
        assert not any(host.has(*COMPUTING) for host in sim.session.state.hosts.values())
        assert all(sim.session.given_up([rank]) is None for rank in sim.ranks)
        if was_over:
            assert not sim.lost
            return
        if harm is killed:
            (event,) = sim.of(events.HostLost)
            assert event.reason == "It was killed."
        elif harm is slept:
            assert sorted(sim.lost) == [0, 1, 2]
        if dealt := sim.of(Dealt):
            shares = list(dealt[-1].shares)
            assert shares == [0, 1, 2] or (harm in (lost, lost_and_back) and len(shares) == 2)

    at_every_report(kind, victim, harm, judge)


@KIND
@pytest.mark.parametrize("how", ["they run", "one hangs", "one dies"])
def test_a_stop_at_every_report_leaves_the_hosts_idle(kind: Begin, how: str) -> None:
    def stop(sim: Sim, rank: int) -> None:
        if how == "one hangs":
            sim.stop_engine(rank)
        sim.feed(Stop())
        if how == "one dies" and sim.end is None:
            sim.kill_engine(rank)
        computed[:] = [len(pieces(sim))]

    def judge(sim: Sim, was_over: bool) -> None:
        assert sim.end is not None
        assert sim.is_idle or how == "one hangs", "without a lease, its agent ends it"
        assert was_over == (sim.end.error is None)
        assert was_over or isinstance(sim.end.error, CancelledError)
        assert was_over or sim.end.error.exit_code == 130
        assert len(pieces(sim)) == computed[0], "nothing was computed after it"
        assert sim.session.handle(Stop(), sim.now) == [], "nothing comes after the end"
        if how == "they run" and pieces(sim):
            assert not sim.messages(messages.Kill), "those that hear of it let go by themselves"

    computed: list[int] = []
    at_every_report(kind, "who reports", stop, judge)


# --- whom a loss is blamed on --------------------------------------------------------------------


@KIND
def test_a_coordinator_that_stood_still_blames_no_host_and_no_ring(kind: Begin) -> None:
    """A laptop that sleeps again and again in a job, and wakes to hosts that gave it up."""
    sim = kind(long=True)
    for fence in range(2, 9):
        work_on(sim)
        for rank in sim.ranks:
            sim.lose(rank, counts=False)
            assert sim.session.given_up([rank]) is None
        for rank in sim.ranks:
            sim.start_agent(rank, fence)
    sim.play().check()
    assert sim.lost == [0, 1, 2] * 7


@RING
def test_a_coordinator_that_sleeps_while_a_ring_forms_has_broken_none(kind: Begin) -> None:
    sim = kind()
    for fence in range(2, 9):
        sim.play(lambda: isinstance(sim.machines[0].at, messages.Join))
        for rank in sim.ranks:
            sim.lose(rank, counts=False)
        for rank in sim.ranks:
            sim.start_agent(rank, fence)
    sim.play().check()


@KIND
def test_a_host_that_fails_twice_in_a_row_takes_part_no_more(kind: Begin) -> None:
    sim = kind(long=True)
    for _ in range(2):
        work_on(sim, 1)
        sim.kill_engine(1)
    assert sim.lost == [1, 1]
    assert str(sim.session.given_up([1])) == "mac1 failed twice: It was killed."
    sim.bring_back(1)
    assert list(sim.session.state.hosts) == [0, 2]
    sim.play().check()


@KIND
@pytest.mark.parametrize(("apart", "work", "stays"), [(1, 1, False), (400, 1, True), (1, 24, True)])
def test_losses_far_apart_or_with_good_work_between_them_are_forgiven(
    kind: Begin, apart: float, work: int, stays: bool
) -> None:
    sim = kind(hosts=2, long=True)
    for fence in (2, 3):
        for _ in range(work):
            work_on(sim, 1)
        sim.now += apart
        sim.lose(1)
        sim.bring_back(1, fence)
    assert (1 in sim.session.state.hosts) == stays
    sim.play().check()


@KIND
@pytest.mark.parametrize("error", [WeightsError, IncompleteModelError, DoesNotFitError])
def test_a_host_that_cannot_do_the_job_is_left_out_for_good(
    kind: Begin, error: type[FluxmeshError]
) -> None:
    """Its disk or its memory: it would say the same again, whenever it is asked."""
    sim = kind()
    sim.play(lambda: isinstance(sim.machines[1].at, LOADING))
    sim.fail(1, error.__name__, "It can't.")
    assert isinstance(sim.session.given_up([1]), error)
    infos = [machine.leased.info for machine in sim.machines.values()]
    winner = sim.session.find(infos, sim.links).winner
    assert winner is not None and 1 not in winner.ranks
    sim.bring_back(1)
    assert 1 not in sim.session.state.hosts
    sim.play().check()
    assert sim.machines[1].done == 0
    (unfit,) = sim.of(events.HostUnfit)
    assert (unfit.host, unfit.name, unfit.reason) == (1, "mac1", "It can't.")
    assert sim.lost == [], "who says what it can't do is not lost"


@RING
def test_in_a_ring_a_host_that_says_what_it_cannot_do_is_to_blame(kind: Begin) -> None:
    sim = kind(long=True)
    for _ in range(2):
        work_on(sim, 1)
        sim.fail(1, "FluxmeshError", "A latent is not finite.")
    assert str(sim.session.given_up([1])) == "mac1 failed twice: A latent is not finite."
    sim.play().check()


@RING
def test_in_a_ring_nobody_is_to_blame_for_what_a_neighbour_may_have_done(kind: Begin) -> None:
    sim = kind()
    for _ in range(5):
        sim.play(lambda: isinstance(sim.machines[0].at, messages.Join))
        sim.break_ring(0, "A stranger is in the ring.")
    assert sim.end is not None
    assert "5 rings failed one after another: A stranger is in the ring." in str(sim.end.error)
    assert all(sim.session.given_up([rank]) is None for rank in sim.ranks)
    assert len({join.ring_generation for join in sim.messages(messages.Join)}) == 5


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]])
def test_an_engine_alone_is_to_blame_for_whatever_it_ends_over(kind: Begin) -> None:
    sim = kind(hosts=1, long=True)
    for _ in range(2):
        work_on(sim)
        sim.break_ring(0, "The engine failed while denoising: out of memory.")
    assert "mac0 failed twice: The engine failed" in str(sim.error)


@KIND
@pytest.mark.parametrize("error", [AdapterError, NotFiniteError, UsageError])
def test_a_request_that_is_wrong_ends_the_job_at_once(
    kind: Begin, error: type[FluxmeshError]
) -> None:
    sim = kind()
    sim.play(lambda: isinstance(sim.machines[0].at, LOADING))
    sim.fail(0, error.__name__, "The adapter fits no key.", "adapters")
    sim.play()
    assert sim.end is not None and type(sim.end.error) is error
    assert sim.end.error.setting == "adapters"
    assert pieces(sim) == [] and sim.is_idle and sim.lost == []


# --- when no host is left ------------------------------------------------------------------------


@KIND
def test_when_all_hosts_have_failed_others_of_the_mesh_take_over(kind: Begin) -> None:
    sim = kind(hosts=2)
    sim.ranks = (0, 1, 2)
    work_on(sim)
    for rank in range(2):
        sim.fail(rank, "WeightsError", "Its disk is broken.")
    assert sim.end is None and sim.stuck, "whether there are others is not the session's to know"
    assert sim.session.given_up([0, 1, 2]) is None
    del sim.machines[0], sim.machines[1]
    sim.start_agent(2)
    sim.play().check()


@KIND
def test_when_the_whole_mesh_has_failed_every_reason_is_told(kind: Begin) -> None:
    sim = kind(hosts=2, long=True)
    work_on(sim)
    sim.fail(0, "WeightsError", "Its disk is broken.")
    for _ in range(2):
        work_on(sim, 1)
        sim.kill_engine(1)
    sim.play()
    assert sim.stuck and sim.end is None
    assert str(sim.error) == (
        "No host can go on. mac0: Its disk is broken. mac1 failed twice: It was killed."
    )


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]])
@pytest.mark.parametrize(
    "error", [WeightsError, ModelNotFoundError, IncompleteModelError, DoesNotFitError]
)
def test_what_the_only_host_cannot_do_is_the_sentence_alone(
    kind: Begin, error: type[FluxmeshError]
) -> None:
    """No host is lost, and none is named: there is no other."""
    sim = kind(hosts=1)
    sim.play(lambda: isinstance(sim.machines[0].at, LOADING))
    sim.fail(0, error.__name__, "/models/dev/x.safetensors is truncated.")
    sim.play()
    assert type(sim.error) is error
    assert str(sim.error) == "/models/dev/x.safetensors is truncated."
    assert not sim.of(events.HostUnfit) and sim.lost == []


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]])
def test_what_all_hosts_say_is_told_once_with_their_names(kind: Begin) -> None:
    sim = kind(hosts=2)
    for rank in range(2):
        sim.play(lambda rank=rank: isinstance(sim.machines[rank].at, LOADING))
        sim.fail(rank, "WeightsError", "dev is truncated.")
    sim.play()
    assert str(sim.error) == "mac0 and mac1: dev is truncated."
    assert [unfit.host for unfit in sim.of(events.HostUnfit)] == [0]


@KIND
def test_a_job_that_is_leased_anew_gives_out_again_what_was_being_done(kind: Begin) -> None:
    """As after `JobStuck`: those that worked before may not be there any more."""
    sim = kind()
    work_on(sim)
    del sim.machines[2]
    for rank in (0, 1):
        sim.start_agent(rank)
    sim.begin()
    sim.play().check()


# --- the end -------------------------------------------------------------------------------------


@KIND
@pytest.mark.parametrize("seconds", [0.1, 10.0])
def test_who_stops_a_job_waits_for_no_long_step(kind: Begin, seconds: float) -> None:
    """Hosts that let go by themselves stay warm; the others are their agents' to look after."""

    def work_slowly(report: messages.Report, rank: int) -> None:
        if isinstance(report, messages.Stepped | training.Computed):
            sim.now += seconds

    sim = kind(hosts=2, long=True)
    sim.before = work_slowly
    for _ in range(6):
        work_on(sim)
    for machine in sim.machines:
        sim.stop_engine(machine)
    stopped = sim.now
    sim.feed(Stop())
    assert sim.messages(messages.Cancel) and not sim.messages(messages.Kill)
    sim.now = stopped + 0.9 * DEADLINES.stop
    sim.tick()
    assert sim.end is None
    sim.now = stopped + 1.1 * DEADLINES.stop
    sim.tick()
    assert sim.end is not None and isinstance(sim.end.error, CancelledError)
    assert not sim.messages(messages.Kill)


@RING
def test_a_ring_that_forms_hears_of_no_cancel_and_is_ended_whole(kind: Begin) -> None:
    sim = kind()
    sim.play(lambda: isinstance(sim.machines[1].at, messages.Join))
    sim.feed(Stop())
    assert len(sim.messages(messages.Kill)) == len(sim.messages(messages.Join)) > 1
    assert not sim.messages(messages.Cancel)
    assert sim.end is not None and isinstance(sim.end.error, CancelledError)

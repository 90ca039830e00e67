"""A training's session, PURE: fake engines whose reports arrive in turn, and time is a number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fluxmesh import events
from fluxmesh.cluster.snapshot import Holding, LinkInfo, ModelVariant
from fluxmesh.errors import WeightsError
from fluxmesh.training.data.encode_units import Caption, Crop, Unit
from fluxmesh.training.events import Dealt
from fluxmesh.wire import messages
from fluxmesh.wire.messages import training
from fluxmesh_coordinator.jobs.training import host as training_host
from fluxmesh_coordinator.jobs.training import tasks
from fluxmesh_coordinator.jobs.training.tasks import UnitEncoded
from fluxmesh_coordinator.jobs.types import Links, Reported
from tests.fake_training import SIZE
from tests.fakes import FEATURES
from tests.unit.meshes import GB, mac
from tests.unit.simulated_jobs import TrainingSimulation, training_job
from tests.unit.simulation import once

LOSSES = [1.0, 1 / 2, 1 / 3]

# --- without harm --------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [1, 2, 3, 5])
def test_every_micro_batch_is_computed_once_by_a_host_that_has_its_features(hosts: int) -> None:
    sim = TrainingSimulation(hosts).opened()
    assert sim.train() == LOSSES
    computed = [number for machine in sim.machines.values() for number in machine.computed]
    assert sorted(computed) == list(range(24))
    assert [len(m.computed) for m in sim.machines.values()] == [
        3 * len(part) for part in np.array_split(range(8), hosts)
    ]


def test_a_host_is_sent_each_feature_once() -> None:
    sim = TrainingSimulation(2).opened()
    sim.train()
    names = [
        (s.rank, s.message.name) for s in sim.sent if isinstance(s.message, training.PutFeatures)
    ]
    assert names and len(names) == len(set(names))


def test_a_captions_features_reach_every_host_as_they_were_given() -> None:
    """By names that no model has: nobody but an engine knows what they are."""
    sim = TrainingSimulation(2).opened()
    sim.train(1)
    puts = [put for put in sim.messages(training.PutFeatures) if put.name.startswith("caption")]
    assert puts
    for put in puts:
        assert {name: array.shape for name, array in put.features.items()} == FEATURES


def test_features_leave_that_were_not_used_for_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_host, "KEPT", 5000)  # one crop is 4096 bytes
    sim = TrainingSimulation(1, grad_accumulate=1, iterations=8).opened()
    once_more = sim.machines[0].engine.training.features
    for update in range(8):
        sim.ask(tasks.AdvanceTask(update))
        needed = sim.session.state.names.of_micro_batches([update])
        assert set(needed) <= once_more
        assert sum(name.startswith("crop") for name in once_more) == 1
    assert sim.messages(training.DropFeatures)


def test_looking_asks_the_first_host_alone() -> None:
    sim = TrainingSimulation(3).opened()
    assert sim.ask(tasks.ValidateTask()) == 0.5
    assert sim.ask(tasks.PaintTask()).shape == (8, 8, 3)
    ranks = {s.rank for s in sim.sent if isinstance(s.message, training.Validate)}
    assert ranks == {0}
    assert set(sim.session.state.names.held_out()) <= sim.machines[0].engine.training.features


def test_hosts_share_out_what_is_encoded() -> None:
    sim = TrainingSimulation(3)
    units = (*(Caption(str(i)) for i in range(9)), *(Crop(0, i) for i in range(9)))
    sim.ask(tasks.EncodeTask(units))
    assert sorted(map(repr, (e.unit for e in sim.of(tasks.UnitEncoded)))) == sorted(
        map(repr, units)
    )
    shares = [
        sum(isinstance(s.message, messages.Encode) and s.rank == rank for s in sim.sent)
        for rank in range(3)
    ]
    assert shares == [3, 3, 3]


def test_a_state_is_sent_a_few_pieces_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PIECE", 10)
    monkeypatch.setattr(training_host, "WINDOW", 80)
    sim = TrainingSimulation(2)
    batches: list[int] = []
    do = sim.carry_out

    def count(instructions: list[Any]) -> None:  # that leave together, before any answer
        pieces = [
            x for x in instructions if isinstance(getattr(x, "message", 0), training.PutVector)
        ]
        batches.append(sum(piece.message.numbers.nbytes for piece in pieces if piece.rank == 0))
        do(instructions)

    sim.carry_out = count  # type: ignore[method-assign]
    weights = np.full(SIZE, 2, np.float32)
    sim.ask(tasks.OpenTask(2, {"weights": weights, "first": weights, "second": weights}))
    assert [m.engine.training.update for m in sim.machines.values()] == [2, 2]
    assert len(sim.messages(training.PutVector)) == 60
    assert sum(batches) == 3 * SIZE * 4 and max(batches) <= 80


def test_a_slow_host_is_dealt_less() -> None:
    sim = TrainingSimulation(2, iterations=64).opened()
    before = sim.feed

    def feed(event: Any) -> None:
        if isinstance(event, Reported) and isinstance(event.report, training.Computed):
            seconds = 1.0 if event.rank == 0 else 0.25
            report = training.Computed(
                job="job",
                ring_generation=event.report.ring_generation,
                number=event.report.number,
                seconds=seconds,
            )
            event = Reported(event.rank, report)
        before(event)

    sim.feed = feed  # type: ignore[method-assign]
    sim.train(4)
    last = {s.rank: s.message.numbers for s in sim.sent if isinstance(s.message, training.Update)}
    assert len(last[0]) == 2 and len(last[1]) == 6


def test_the_deal_is_told_in_images() -> None:
    (even,) = TrainingSimulation(4, batch_size=2).opened().of(Dealt)
    assert str(even) == "3 updates of 16 images: 4 a host on 4 hosts"
    (uneven,) = TrainingSimulation(3).opened().of(Dealt)
    assert str(uneven) == "3 updates of 8 images: 3, 3 and 2 on 3 hosts"
    (alone,) = TrainingSimulation(1).opened().of(Dealt)
    assert str(alone) == "3 updates of 8 images: 8 a host on 1 host"


def test_the_end_closes_the_training_on_every_host() -> None:
    sim = TrainingSimulation(3).opened()
    sim.train()
    sim.want(tasks.FinishTask())
    while sim.end is None:
        sim.turn()
    assert sim.end.error is None
    assert len(sim.messages(training.CloseTraining)) == 3


# --- who takes part ------------------------------------------------------------------------------


def test_hosts_without_the_memory_are_left_out() -> None:
    small = [mac(0), mac(1, memory_bytes=16 * GB), mac(2)]
    choice = tasks.choose(training_job(), small, Links())
    assert choice.winner is not None and choice.winner.ranks == (0, 2)
    none = tasks.choose(training_job(), [small[1]], Links())
    assert none.winner is None and "none may use more than 16.0 GB" in none.reason


def test_agents_of_one_device_share_its_memory() -> None:
    both = [
        mac(
            rank,
            device="gpu 0",
            free_bytes=40 * GB,
            holds=Holding(weights=ModelVariant("m"), nbytes=1),
            memory_bytes=GB * 60,
        )
        for rank in range(2)
    ]
    choice = tasks.choose(training_job(), both, Links())
    assert choice.winner is not None and choice.winner.ranks == (0,)


def test_a_ring_takes_hosts_that_are_joined_by_cables() -> None:
    ring = [(0, 1), (1, 2), (2, 3), (3, 0)]
    pairs = [*ring, *((b, a) for a, b in ring)]
    links = Links(tuple(LinkInfo(source=a, target=b, rate=1e9) for a, b in pairs))
    hosts = [mac(rank) for rank in range(4)]
    every = tasks.choose(training_job(), hosts, links).winner
    assert every is not None and every.ranks == (0, 1, 2, 3)
    left = tasks.choose(training_job(), hosts[:1] + hosts[2:], links).winner
    assert left is not None and left.ranks in ((2, 3), (0, 3))


# --- harm ----------------------------------------------------------------------------------------


def test_updates_since_the_last_checkpoint_are_done_again_and_no_others() -> None:
    sim = TrainingSimulation(2, iterations=80).opened()
    sim.train(6, checkpoint=4)
    sim.kill_engine(1)
    sim.ask(tasks.AdvanceTask(6))
    done = [s.message.update for s in sim.sent if isinstance(s.message, training.Update)][::2]
    assert done == [0, 1, 2, 3, 4, 5, 4, 5, 6]


def test_an_alarm_that_may_be_a_false_one_makes_later_ones_patient() -> None:
    sim = TrainingSimulation(2).opened()
    once(sim, lambda report, rank: rank == 1, lambda: sim.stop_engine(1))
    sim.ask(tasks.AdvanceTask(0))
    (lost,) = sim.of(events.HostLost)
    assert "no sign" in lost.reason
    assert [host.patience for host in sim.session.state.hosts.values()] == [2, 2]


def test_patience_ends_when_there_was_no_alarm_for_long() -> None:
    """A ring's sum may hang once in some thirty updates, through a whole night."""
    sim = TrainingSimulation(3, iterations=320).opened()  # 40 updates of 8 micro-batches
    for alarms, first in enumerate(range(0, 40, 10), start=1):
        sim.machines[1].is_stopped = True
        sim.ask(tasks.AdvanceTask(first))
        patience = [host.patience for host in sim.session.state.hosts.values()]
        assert len(sim.of(events.HostLost)) == alarms and patience == [2, 2, 2]
        for update in range(first + 1, first + 10):
            sim.ask(tasks.AdvanceTask(update))
        sim.ask(tasks.GiveTask())  # a checkpoint
        patience = [host.patience for host in sim.session.state.hosts.values()]
        assert patience == [1, 1, 1]


def test_what_an_engine_of_an_older_ring_generation_says_is_dropped() -> None:
    sim = TrainingSimulation(2).opened()
    ring_generation = sim.session.state.hosts[0].ring_generation
    sim.kill_engine(1)
    sim.number = 9
    sim.want(tasks.AdvanceTask(0))
    while not sim.messages(training.Update):
        sim.turn()
    late = training.UpdateDone(
        job="job",
        ring_generation=ring_generation,
        update=1,
        loss=7.0,
        norm=1.0,
        rate=0.1,
        images=8,
        bad=0,
        seconds=1.0,
        peak_bytes=100,
    )
    for rank in range(2):
        sim.feed(Reported(rank, late))
    assert not [answer for answer in sim.of(tasks.Answer) if answer.number == 9]
    other = training.UpdateDone(
        job="another",
        ring_generation=ring_generation + 5,
        update=1,
        loss=7.0,
        norm=1.0,
        rate=0.1,
        images=8,
        bad=0,
        seconds=1.0,
        peak_bytes=100,
    )
    sim.feed(Reported(0, other))
    assert sim.session.state.hosts[0].moved is None


def test_when_every_ring_fails_the_run_ends() -> None:
    sim = TrainingSimulation(6)
    victims = iter(range(6))
    sim.before = lambda report, rank: (
        sim.lose(next(victims)) if isinstance(report, messages.Joined) else None
    )
    sim.want(tasks.OpenTask(0, {}))
    for _ in range(300):
        if sim.end is not None:
            break
        sim.turn()
    assert sim.end is not None and "rings failed" in str(sim.end.error)


def test_when_no_host_is_left_others_are_asked_for_and_the_run_goes_on() -> None:
    sim = TrainingSimulation(1).opened()
    sim.ask(tasks.AdvanceTask(0))
    sim.ask(tasks.GiveTask())
    number = sim.want(tasks.AdvanceTask(1))
    sim.lose(0)
    assert sim.stuck == ["No host is left."]
    sim.start_agent(1, fence=1)
    sim.begin()
    while not sim.answers(number):
        sim.turn()
    assert sim.ask(tasks.GiveTask())["weights"][0] == 2


def test_a_host_that_comes_back_joins_in_at_the_next_checkpoint() -> None:
    sim = TrainingSimulation(3, iterations=40).opened()
    sim.ask(tasks.AdvanceTask(0))
    sim.lose(2)
    sim.ask(tasks.AdvanceTask(1))
    sim.bring_back(2)
    sim.ask(tasks.AdvanceTask(2))
    assert list(sim.of(Dealt)[-1].shares) == [0, 1], "not in the middle"
    sim.ask(tasks.GiveTask())
    assert sim.ask(tasks.AdvanceTask(3)).loss == 1 / 4
    assert list(sim.of(Dealt)[-1].shares) == [0, 1, 2]
    assert not [e for e in sim.of(events.HostLost) if e.host != 2]


@pytest.mark.parametrize("late", [0, 1])
def test_a_host_that_dies_while_it_encodes_gives_its_units_back(late: int) -> None:
    sim = TrainingSimulation(2)
    once(sim, lambda report, rank: rank == 1, lambda: sim.kill_engine(1, late))
    units = tuple(Caption("x" * i) for i in range(8))
    sim.ask(tasks.EncodeTask(units))
    encoded = [(event.unit, event.arrays["words"][0, 0, 0]) for event in sim.of(UnitEncoded)]
    assert sorted(encoded, key=lambda pair: pair[1]) == [(unit, i) for i, unit in enumerate(units)]


# --- stopping ------------------------------------------------------------------------------------


def test_a_halt_in_an_update_leaves_the_state_before_it() -> None:
    sim = TrainingSimulation(2).opened()
    sim.ask(tasks.AdvanceTask(0))
    sim.want(tasks.AdvanceTask(1))
    while not any(m.computed and m.computed[-1] >= 8 for m in sim.machines.values()):
        sim.turn()
    halted = sim.ask(tasks.HaltTask())
    assert halted.update == 1 and halted.moved.loss == 1.0
    assert sim.ask(tasks.GiveTask())["weights"][0] == 1


def test_a_halt_that_comes_too_late_tells_what_the_update_did() -> None:
    sim = TrainingSimulation(2).opened()
    sim.ask(tasks.AdvanceTask(0))
    sim.ask(tasks.AdvanceTask(1))
    halted = sim.ask(tasks.HaltTask())
    assert halted.update == 2 and halted.moved.loss == 1 / 2


def test_a_halt_before_there_is_a_state_says_so() -> None:
    sim = TrainingSimulation(3)
    sim.want(tasks.OpenTask(0, {}))
    sim.number = 1
    halted = sim.ask(tasks.HaltTask())
    assert halted.update is None


def test_an_update_without_a_usable_gradient_is_told_and_not_counted() -> None:
    sim = TrainingSimulation(2).opened()
    before = sim.feed

    def feed(event: Any) -> None:
        if isinstance(event, Reported) and isinstance(event.report, training.UpdateDone):
            event = Reported(event.rank, training.UpdateDone(**vars(event.report) | {"bad": 2}))
        before(event)

    sim.feed = feed  # type: ignore[method-assign]
    assert sim.ask(tasks.AdvanceTask(0)).bad == 2
    assert sim.ask(tasks.HaltTask()).update == 0


def test_hosts_whose_moves_differ_end_the_run() -> None:
    sim = TrainingSimulation(2).opened()
    before = sim.feed

    def feed(event: Any) -> None:
        if (
            isinstance(event, Reported)
            and isinstance(event.report, training.UpdateDone)
            and event.rank
        ):
            fields = vars(event.report) | {"loss": 0.123}
            event = Reported(event.rank, training.UpdateDone(**fields))
        before(event)

    sim.feed = feed  # type: ignore[method-assign]
    sim.want(tasks.AdvanceTask(0))
    while sim.end is None:
        sim.turn()
    assert "differ" in str(sim.end.error)


@pytest.mark.parametrize(
    ("run", "second_host", "sentence"),
    [
        # Checkpoints, pictures on the way and the cache of features would name another revision.
        ("older", "same", "and this machine hold different files under the name m"),
        ("", "newer", "host 0 (mac0) same, host 1 (mac1) newer"),
    ],
    ids=["hosts and the run", "two hosts"],
)
def test_files_that_differ_end_the_run_before_an_update(
    run: str, second_host: str, sentence: str
) -> None:
    sim = TrainingSimulation(2)
    sim.session.state.job = replace(sim.session.state.job, content=run)
    sim.machines[1].engine.content = second_host
    sim.want(tasks.OpenTask(0, {}))
    while sim.end is None:
        sim.turn()
    assert isinstance(sim.end.error, WeightsError)
    assert sentence in str(sim.end.error)
    assert sim.messages(training.Update) == []


@pytest.mark.parametrize("unit", [Caption("a"), Crop(0, 0)])
def test_what_was_encoded_from_other_files_is_not_kept_under_the_name_of_ours(unit: Unit) -> None:
    """Of crops alone too, as in a run that finds all captions in the cache."""
    sim = TrainingSimulation(1)
    sim.session.state.job = replace(sim.session.state.job, content="older")
    sim.want(tasks.EncodeTask((unit,)))
    while sim.end is None and not sim.of(tasks.Answer):
        sim.turn()
    assert sim.end is not None and isinstance(sim.end.error, WeightsError)
    assert "and this machine hold different files under the name m" in str(sim.end.error)
    assert sim.of(UnitEncoded) == []

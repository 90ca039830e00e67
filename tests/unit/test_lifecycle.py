"""The engine's life as the agent sees it: what is sent, told, started and ended, event by event."""

from __future__ import annotations

from typing import Any

import pytest

from fluxmesh.cluster.snapshot import Holding, Weights
from fluxmesh.wire.messages import (
    Account,
    Beat,
    Cancel,
    Cancelled,
    Counters,
    Device,
    Encode,
    Failed,
    Join,
    Joined,
    Kill,
    Load,
    Loaded,
    Message,
    ring_name,
)
from fluxmesh_agent.lifecycle import KillEngine, Lifecycle, Refusal, Send, StartEngine, Tell

WEIGHTS = Weights("tiny")
HOLDING = Holding(WEIGHTS, 100)
FILES = (("MLX_HOSTFILE", "[]"),)


def load(epoch: int = 0, job: str = "job") -> Load:
    return Load(1, job, epoch, WEIGHTS)


def encode(epoch: int = 0, job: str = "job") -> Encode:
    return Encode(1, job, epoch, WEIGHTS, "a cat")


def join(epoch: int, rank: int = 0, size: int = 2, **more: Any) -> Join:
    fields = {"envs": (("MLX_RANK", str(rank)),), "files": FILES, "nonce": b"n" * 32}
    return Join(1, epoch, rank, size, "ring", **(fields | more))


def over(holds: Holding | None = None) -> Account:
    return Account(True, holds, Counters(), 0.0)


def started() -> Lifecycle:
    life = Lifecycle()
    life.start()
    life.engine_said(Device("chip", "gpu", "1", 100, 1e9))
    return life


def test_an_engine_is_started_once_and_says_what_it_computes_on() -> None:
    life = Lifecycle()
    assert life.start() == [StartEngine()]
    assert life.start() == []
    assert life.engine_said(Device("chip", "gpu", "1", 100, 1e9)) == []
    assert life.device is not None
    assert life.state == "idle"


def test_work_is_sent_in_its_order_and_states_follow() -> None:
    life = started()
    assert life.work(load()) == [Send(load())]
    assert life.work(encode()) == [Send(encode())]
    assert (life.state, life.job, life.is_free) == ("loading", "job", False)
    loaded = Loaded("job", 0, HOLDING, 1.0)
    assert life.engine_said(loaded) == [Tell(loaded)]
    life.engine_said(over(HOLDING))
    assert life.state == "busy"
    life.engine_said(over(HOLDING))
    assert (life.state, life.job, life.is_free) == ("ready", "", True)


def test_what_is_told_on_the_way_ends_no_work() -> None:
    life = started()
    life.work(encode())
    life.engine_said(Account(False, None, Counters(steps=3), 5.0))
    assert not life.is_free
    assert (life.counters.steps, life.load_rate) == (3, 5.0)


def test_work_after_a_death_starts_a_new_engine() -> None:
    life = started()
    life.work(encode())
    assert life.engine_ended("killed") == [
        KillEngine(),
        Tell(Failed(0, "job", "Died", "killed", fatal=True)),
    ]
    assert (life.state, life.reason, life.holds, life.is_free) == ("failed", "killed", None, True)
    assert life.work(encode()) == [StartEngine(), Send(encode())]
    assert life.state == "busy"


def test_a_ring_on_the_device_that_the_engine_has_already_starts_no_other() -> None:
    device = (("CUDA_VISIBLE_DEVICES", "1"),)
    for own, starts in ((device, False), ((), True)):
        life = Lifecycle(own)
        life.start()
        told = life.join(join(1, envs=device))
        assert (StartEngine(device) in told) == starts
        assert told[-1] == Send(join(1, envs=device))


def test_an_engine_that_says_that_it_ends_is_ended_and_told_of_once() -> None:
    life = started()
    life.work(encode())
    failed = Failed(0, "job", "Died", "out of luck", fatal=True)
    assert life.engine_said(failed) == [KillEngine(), Tell(failed)]
    assert life.engine_ended("exit code 70") == []
    assert life.reason == "out of luck"


def test_a_failed_unit_leaves_the_engine_alone() -> None:
    life = started()
    life.work(load())
    failed = Failed(0, "job", "WeightsError", "truncated", fatal=False)
    assert life.engine_said(failed) == [Tell(failed)]
    life.engine_said(over())
    assert life.state == "idle"


def test_kill_begins_an_epoch_and_forgets_the_work() -> None:
    life = started()
    life.work(load())
    assert life.kill(Kill(1, 5)) == [KillEngine()]
    assert (life.epoch, life.state, life.is_free) == (5, "idle", True)
    assert life.kill(Kill(1, 6)) == []  # none is there


def test_messages_of_an_old_epoch_are_refused_and_reports_of_it_dropped() -> None:
    life = started()
    life.kill(Kill(1, 5))
    for ask, message in ((life.kill, Kill(1, 4)), (life.join, join(4)), (life.work, load(4))):
        with pytest.raises(Refusal) as refused:
            ask(message)  # type: ignore[operator]
        assert refused.value.code == "fence"
    assert life.epoch == 5
    old: list[Message] = [
        Beat("job", 4, "first step"),
        Loaded("job", 4, HOLDING, 1.0),
        Failed(4, "job", "UsageError", "old", fatal=False),
    ]
    for message in old:
        assert life.engine_said(message) == []


def test_an_engine_that_is_in_no_ring_joins_one_as_it_is() -> None:
    life = started()
    life.work(load())
    life.engine_said(over(HOLDING))
    assert life.join(join(1)) == [Send(join(1))]
    assert life.holds == HOLDING
    assert life.state == "busy"
    joined = Joined(1, 0)
    assert life.engine_said(joined) == [Tell(joined)]
    life.engine_said(over(HOLDING))
    assert life.ring == (ring_name(b"n" * 32), 0, 2)
    assert life.state == "ready"


def test_the_same_ring_is_joined_once() -> None:
    life = started()
    life.join(join(1))
    life.engine_said(over())
    assert life.join(join(3)) == [Tell(Joined(3, 0))]
    assert life.is_free


@pytest.mark.parametrize("other", [join(2, nonce=b"x" * 32), join(2, 1), join(2, size=3)])
def test_another_ring_takes_another_engine(other: Join) -> None:
    life = started()
    life.join(join(1))
    life.engine_said(over(HOLDING))
    assert life.join(other) == [KillEngine(), StartEngine(), Send(other)]
    assert life.holds is None


def test_to_be_alone_an_engine_leaves_its_ring_by_being_another() -> None:
    life = started()
    alone = join(1, size=1, envs=(), files=())
    assert life.join(alone) == [Tell(Joined(1, 0))]
    life.join(join(2))
    again = join(3, size=1, envs=(), files=())
    assert life.join(again) == [KillEngine(), StartEngine(), Tell(Joined(3, 0))]
    assert life.ring == ("", 0, 1)


def test_an_engine_that_needs_another_environment_is_started_with_it() -> None:
    life = started()
    other = join(1, envs=(("MLX_RANK", "0"), ("CUDA_VISIBLE_DEVICES", "3")), files=())
    start = StartEngine((("CUDA_VISIBLE_DEVICES", "3"),))
    assert life.join(other) == [KillEngine(), start, Send(other)]


@pytest.mark.parametrize(
    "wrong",
    [
        join(1, envs=(("PATH", "/tmp"),)),
        join(1, envs=(("LD_PRELOAD", "x"), ("MLX_RANK", "0"))),
        join(1, files=(("HOME", "x"),)),
        join(1, rank=2),
    ],
)
def test_a_join_that_sets_what_no_ring_needs_is_refused(wrong: Join) -> None:
    life = started()
    with pytest.raises(Refusal) as refused:
        life.join(wrong)
    assert refused.value.code == "usage"
    assert (life.epoch, life.is_free) == (0, True)


def test_cancel_goes_to_an_engine_that_works_and_is_answered_for_one_that_does_not() -> None:
    life = started()
    cancel = Cancel(1, "job")
    assert life.cancel(cancel) == [Tell(Cancelled("job", 0))]
    life.work(encode())
    assert life.cancel(cancel) == [Send(cancel)]
    life.kill(Kill(1, 4))
    life.start()
    # The engine doesn't know the epoch, and says 0.
    assert life.engine_said(Cancelled("job", 0)) == [Tell(Cancelled("job", 4))]


def test_what_a_lost_coordinator_leaves_behind_is_cancelled_and_then_ended() -> None:
    life = started()
    life.work(encode(job="a"))
    life.work(encode(job="a"))
    life.work(encode(job="b"))
    assert life.abandon() == [Send(Cancel(0, "a")), Send(Cancel(0, "b"))]
    assert life.give_up() == [KillEngine()]
    assert (life.epoch, life.is_free) == (1, True)
    assert life.give_up() == []


def test_an_engine_is_worth_as_long_a_wait_as_loading_again_takes() -> None:
    life = Lifecycle()
    assert life.seconds_to_load == 0.0
    life.work(load())
    life.engine_said(Account(False, HOLDING, Counters(), 0.0))
    assert life.seconds_to_load == 0.0  # nothing was timed yet
    life.engine_said(Account(True, HOLDING, Counters(), 20.0))
    assert life.seconds_to_load == 100 / 20.0
    life.kill(Kill(1, 1))
    assert life.seconds_to_load == 0.0  # nothing is held

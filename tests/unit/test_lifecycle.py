"""The engine's life as the agent sees it: what is sent, told, started and ended, event by event."""

from __future__ import annotations

from typing import Any

import pytest

from fluxmesh.cluster.snapshot import Holding, ModelVariant, RingPlace
from fluxmesh.wire.messages import (
    ENGINE_KILLED,
    Account,
    Beat,
    Cancel,
    Cancelled,
    Device,
    Encode,
    EngineCounters,
    Failed,
    Join,
    Joined,
    Kill,
    Load,
    Loaded,
    LoadProgress,
    Message,
    Reading,
    Warm,
    Warmed,
    ring_name,
)
from fluxmesh.wire.messages.training import CloseTraining
from fluxmesh_agent.lifecycle import (
    OWN,
    KillEngine,
    Lifecycle,
    Refusal,
    Send,
    StartEngine,
    Tell,
)

WEIGHTS = ModelVariant("tiny")
HOLDING = Holding(weights=WEIGHTS, nbytes=100)
FILES = (("MLX_HOSTFILE", "[]"),)


def load(ring_generation: int = 0, job: str = "job") -> Load:
    return Load(fence=1, job=job, ring_generation=ring_generation, weights=WEIGHTS)


def encode(ring_generation: int = 0, job: str = "job") -> Encode:
    return Encode(
        fence=1, job=job, ring_generation=ring_generation, weights=WEIGHTS, prompt="a cat"
    )


def join(ring_generation: int, rank: int = 0, size: int = 2, **more: Any) -> Join:
    fields = {"envs": (("MLX_RANK", str(rank)),), "files": FILES, "nonce": b"n" * 32}
    return Join(
        fence=1,
        ring_generation=ring_generation,
        rank=rank,
        size=size,
        backend="ring",
        **(fields | more),
    )


def over(holds: Holding | None = None) -> Account:
    return Account(is_over=True, holds=holds, counters=EngineCounters(), load_rate=0.0)


def started() -> Lifecycle:
    life = Lifecycle()
    life.start()
    life.engine_said(
        Device(kind="chip", name="gpu", mlx_version="1", memory_bytes=100, flops_per_second=1e9)
    )
    return life


def test_an_engine_is_started_once_and_says_what_it_computes_on() -> None:
    life = Lifecycle()
    assert life.start() == [StartEngine()]
    assert life.start() == []
    assert (
        life.engine_said(
            Device(kind="chip", name="gpu", mlx_version="1", memory_bytes=100, flops_per_second=1e9)
        )
        == []
    )
    assert life.device is not None
    assert life.state == "idle"


def test_work_is_sent_in_its_order_and_states_follow() -> None:
    life = started()
    assert life.work(load()) == [Send(load())]
    assert life.work(encode()) == [Send(encode())]
    assert (life.state, life.job, life.is_free) == ("loading", "job", False)
    loaded = Loaded(job="job", ring_generation=0, holding=HOLDING, seconds=1.0)
    assert life.engine_said(loaded) == [Tell(loaded)]
    life.engine_said(over(HOLDING))
    assert life.state == "busy"
    life.engine_said(over(HOLDING))
    assert (life.state, life.job, life.is_free) == ("ready", "", True)


def test_what_is_told_on_the_way_ends_no_work() -> None:
    life = started()
    life.work(encode())
    life.engine_said(
        Account(is_over=False, holds=None, counters=EngineCounters(steps=3), load_rate=5.0)
    )
    assert not life.is_free
    assert (life.counters.steps, life.load_rate) == (3, 5.0)


def test_work_after_a_death_starts_a_new_engine() -> None:
    life = started()
    life.work(encode())
    assert life.engine_ended("killed") == [
        KillEngine(),
        Tell(Failed(ring_generation=0, job="job", kind="Died", text="killed", fatal=True)),
    ]
    assert (life.state, life.reason, life.holds, life.is_free) == ("failed", "killed", None, True)
    assert life.work(encode()) == [StartEngine(), Send(encode())]
    assert life.state == "busy"


def test_a_ring_on_the_device_that_the_engine_has_already_starts_no_other() -> None:
    device = (("CUDA_VISIBLE_DEVICES", "1"),)
    for own, starts in ((device, False), ((), True)):
        life = Lifecycle(own)
        life.start()
        instructions = life.join(join(1, envs=device))
        assert (StartEngine(device) in instructions) == starts
        assert instructions[-1] == Send(join(1, envs=device))


def test_an_engine_that_says_that_it_ends_is_ended_and_told_of_once() -> None:
    life = started()
    life.work(encode())
    failed = Failed(ring_generation=0, job="job", kind="Died", text="out of luck", fatal=True)
    assert life.engine_said(failed) == [KillEngine(), Tell(failed)]
    assert life.engine_ended("exit code 70") == []
    assert life.reason == "out of luck"


def test_a_failed_unit_leaves_the_engine_alone() -> None:
    life = started()
    life.work(load())
    failed = Failed(
        ring_generation=0, job="job", kind="WeightsError", text="truncated", fatal=False
    )
    assert life.engine_said(failed) == [Tell(failed)]
    life.engine_said(over())
    assert life.state == "idle"


def test_kill_begins_a_ring_generation_and_forgets_the_work() -> None:
    life = started()
    life.work(load())
    assert life.kill(Kill(fence=1, ring_generation=5)) == [KillEngine()]
    assert (life.ring_generation, life.state, life.is_free) == (5, "idle", True)
    assert life.kill(Kill(fence=1, ring_generation=6)) == []  # none is there


def test_messages_of_an_old_ring_generation_are_refused_and_reports_of_it_dropped() -> None:
    life = started()
    life.kill(Kill(fence=1, ring_generation=5))
    for ask, message in (
        (life.kill, Kill(fence=1, ring_generation=4)),
        (life.join, join(4)),
        (life.work, load(4)),
    ):
        with pytest.raises(Refusal) as refused:
            ask(message)  # type: ignore[operator]
        assert refused.value.code == "fence"
    assert life.ring_generation == 5
    old: list[Message] = [
        Beat(job="job", ring_generation=4, doing="first step"),
        Loaded(job="job", ring_generation=4, holding=HOLDING, seconds=1.0),
        Failed(ring_generation=4, job="job", kind="UsageError", text="old", fatal=False),
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
    joined = Joined(ring_generation=1, rank=0)
    assert life.engine_said(joined) == [Tell(joined)]
    life.engine_said(over(HOLDING))
    assert life.ring == RingPlace(ring_name(b"n" * 32), 0, 2)
    assert life.state == "ready"


def test_the_same_ring_is_joined_once() -> None:
    life = started()
    life.join(join(1))
    life.engine_said(over())
    assert life.join(join(3)) == [Tell(Joined(ring_generation=3, rank=0))]
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
    assert life.join(alone) == [Tell(Joined(ring_generation=1, rank=0))]
    life.join(join(2))
    again = join(3, size=1, envs=(), files=())
    assert life.join(again) == [
        KillEngine(),
        StartEngine(),
        Tell(Joined(ring_generation=3, rank=0)),
    ]
    assert life.ring == RingPlace()


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
    assert (life.ring_generation, life.is_free) == (0, True)


def test_cancel_goes_to_an_engine_that_works_and_is_answered_for_one_that_does_not() -> None:
    life = started()
    cancel = Cancel(fence=1, job="job")
    assert life.cancel(cancel) == [Tell(Cancelled(job="job", ring_generation=0))]
    life.work(encode())
    assert life.cancel(cancel) == [Send(cancel)]
    life.kill(Kill(fence=1, ring_generation=4))
    life.start()
    # The engine doesn't know the ring generation, and says 0.
    assert life.engine_said(Cancelled(job="job", ring_generation=0)) == [
        Tell(Cancelled(job="job", ring_generation=4))
    ]


def test_what_a_lost_coordinator_leaves_behind_is_cancelled_and_then_ended() -> None:
    life = started()
    life.work(encode(job="a"))
    life.work(encode(job="a"))
    life.work(encode(job="b"))
    assert life.abandon() == [Send(Cancel(fence=0, job="a")), Send(Cancel(fence=0, job="b"))]
    assert life.give_up() == [KillEngine()]
    assert (life.ring_generation, life.is_free) == (1, True)
    assert life.give_up() == []


def test_an_engine_is_worth_as_long_a_wait_as_loading_again_takes() -> None:
    life = Lifecycle()
    assert life.seconds_to_load == 0.0
    life.work(load())
    life.engine_said(
        Account(is_over=False, holds=HOLDING, counters=EngineCounters(), load_rate=0.0)
    )
    assert life.seconds_to_load == 0.0  # nothing was timed yet
    life.engine_said(
        Account(is_over=True, holds=HOLDING, counters=EngineCounters(), load_rate=20.0)
    )
    assert life.seconds_to_load == 100 / 20.0
    life.kill(Kill(fence=1, ring_generation=1))
    assert life.seconds_to_load == 0.0  # nothing is held


# The agent's own work


def own_load(ring_generation: int = 0, shards: int = 1) -> Load:
    return Load(
        fence=0,
        job=OWN,
        ring_generation=ring_generation,
        weights=WEIGHTS,
        shards=shards,
        shard=0,
        components=("transformer",),
    )


WARM = Warm(fence=0, job=OWN, ring_generation=0, weights=WEIGHTS, height=64, width=64)
STOP = Send(Cancel(fence=0, job=OWN))


def test_the_agents_own_work_leaves_the_engine_free_and_is_told_to_nobody() -> None:
    life = Lifecycle()
    assert life.upkeep(own_load()) == [StartEngine(), Send(own_load())]
    assert (life.state, life.job, life.is_free) == ("loading", "", True)
    assert (
        life.engine_said(
            LoadProgress(
                job=OWN, ring_generation=0, component="transformer", done_bytes=5, total_bytes=9
            )
        )
        == []
    )
    assert life.loading == Reading("transformer", 5, 9)
    assert life.engine_said(over(HOLDING)) == []
    assert life.engine_said(Loaded(job=OWN, ring_generation=0, holding=HOLDING, seconds=1.0)) == []
    assert (life.state, life.holds, life.loading, life.own) == ("ready", HOLDING, None, None)
    life.upkeep(WARM)
    assert (life.state, life.is_free) == ("ready", True)
    assert life.engine_said(Warmed(job=OWN, ring_generation=0, seconds=1.0)) == []


def test_a_job_that_needs_what_is_loading_waits_for_it_and_hears_that_it_moves() -> None:
    life = started()
    life.upkeep(own_load())
    assert life.work(load(3)) == [Send(load(3))]
    assert life.work(encode(3)) == [Send(encode(3))]
    assert (life.state, life.job, life.is_free) == ("loading", "job", False)
    moved = LoadProgress(
        job=OWN, ring_generation=0, component="transformer", done_bytes=5, total_bytes=9
    )
    assert life.engine_said(moved) == [
        Tell(
            LoadProgress(
                job="job", ring_generation=3, component="transformer", done_bytes=5, total_bytes=9
            )
        )
    ]
    assert life.engine_said(Beat(job=OWN, ring_generation=0, doing="loading")) == [
        Tell(Beat(job="job", ring_generation=3, doing="loading"))
    ]
    life.engine_said(over(HOLDING))
    assert (
        life.engine_said(Loaded(job=OWN, ring_generation=0, holding=HOLDING, seconds=1.0)) == []
    )  # the job's own is to come
    loaded = Loaded(job="job", ring_generation=3, holding=HOLDING, seconds=0.0)
    assert life.engine_said(loaded) == [Tell(loaded)]


@pytest.mark.parametrize(
    "work",
    [
        Load(fence=1, job="job", ring_generation=0, weights=ModelVariant("dev")),
        Load(fence=1, job="job", ring_generation=0, weights=WEIGHTS, shards=2, shard=1),
        Load(fence=1, job="job", ring_generation=0, weights=WEIGHTS, low_memory=True),
        Encode(fence=1, job="job", ring_generation=0, weights=ModelVariant("dev"), prompt="a cat"),
        CloseTraining(fence=1, job="job", ring_generation=0),
    ],
)
def test_a_job_that_needs_anything_else_goes_before_the_agents_own_load(work: Any) -> None:
    life = started()
    life.upkeep(own_load())
    assert life.work(work) == [STOP, Send(work)]


def test_everything_goes_before_a_size_that_is_made_ready() -> None:
    for work in (load(), encode()):
        life = started()
        life.upkeep(WARM)
        assert life.work(work) == [STOP, Send(work)]


def test_a_ring_does_not_wait_for_a_load_for_its_other_members_would() -> None:
    life = started()
    life.upkeep(own_load())
    assert life.join(join(1)) == [STOP, Send(join(1))]
    life.engine_said(over())
    assert life.engine_said(Joined(ring_generation=1, rank=0)) == [
        Tell(Joined(ring_generation=1, rank=0))
    ]


def test_to_cancel_a_job_is_not_to_wait_for_the_agents_own_load() -> None:
    life = started()
    life.upkeep(own_load())
    cancel = Cancel(fence=1, job="job")
    assert life.cancel(cancel) == [
        Tell(Cancelled(job="job", ring_generation=0))
    ]  # it has nothing here
    life.work(load())
    assert life.cancel(cancel) == [STOP, Send(cancel)]


def test_a_lost_coordinator_leaves_the_agents_own_work_alone() -> None:
    life = started()
    life.upkeep(own_load())
    assert life.abandon() == [] and life.give_up() == []
    life.work(load())
    assert life.abandon() == [Send(Cancel(fence=0, job="job"))]


def test_an_engine_that_dies_at_the_agents_own_work_is_lost_to_nobody() -> None:
    for said in (True, False):
        life = started()
        life.upkeep(own_load())
        if said:
            failed = Failed(ring_generation=0, job=OWN, kind="Raised", text="no memory", fatal=True)
            assert life.engine_said(failed) == [KillEngine()]
        else:
            assert life.engine_ended("no memory") == [KillEngine()]
        assert (life.state, life.reason) == ("failed", "no memory")


def test_a_job_that_waits_behind_the_agents_own_work_hears_that_the_engine_died() -> None:
    for said in (True, False):
        life = started()
        life.upkeep(own_load())
        life.work(load(3))
        if said:
            instructions = life.engine_said(
                Failed(ring_generation=0, job=OWN, kind="Raised", text="no memory", fatal=True)
            )
            kind = "Raised"
        else:
            instructions, kind = life.engine_ended("no memory"), "Died"
        assert instructions == [
            KillEngine(),
            Tell(Failed(ring_generation=3, job="job", kind=kind, text="no memory", fatal=True)),
        ]


def test_what_an_engine_still_says_after_its_end_is_no_news() -> None:
    """Else a host that holds nothing would go on saying that it holds a model."""
    life = started()
    life.work(load())
    life.engine_said(
        Failed(ring_generation=0, job="job", kind="Raised", text="a peer is gone", fatal=True)
    )
    assert life.engine_said(over(HOLDING)) == []
    assert (
        life.engine_said(Loaded(job="job", ring_generation=0, holding=HOLDING, seconds=1.0)) == []
    )
    life.kill(Kill(fence=1, ring_generation=1))
    assert (life.state, life.holds, life.components) == ("idle", None, ())


def test_the_device_that_an_agent_was_given_is_its_engines_in_every_ring() -> None:
    """A ring of some of a machine's hosts counts GPUs without the others."""
    own, asked = (("CUDA_VISIBLE_DEVICES", "2"),), (("CUDA_VISIBLE_DEVICES", "1"),)
    life = Lifecycle(own)
    life.start()
    assert life.join(join(1, envs=asked)) == [Send(join(1, envs=asked))]
    other = join(2, envs=asked, nonce=b"x" * 32)
    assert life.join(other) == [KillEngine(), StartEngine(own), Send(other)]


def test_an_engine_that_others_have_ended_is_lost_in_another_way() -> None:
    life = Lifecycle()
    life.join(join(1))
    (_, told) = life.engine_ended("signal 9", is_killed=True)
    assert isinstance(told, Tell) and isinstance(told.report, Failed)
    assert (told.report.kind, told.report.fatal) == (ENGINE_KILLED, True)

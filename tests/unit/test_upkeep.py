"""What an agent has its engine do by itself, and when: nothing that delays anybody."""

from __future__ import annotations

from typing import Any

import pytest

from fluxmesh.cluster.shares import Shares
from fluxmesh.cluster.snapshot import Holding, ModelVariant, RingPlace, StepShape
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError
from fluxmesh.request import AdapterRef
from fluxmesh.wire.messages import (
    Account,
    Device,
    EngineCounters,
    Join,
    Keep,
    Kill,
    Load,
    NoteSize,
    Warm,
)
from fluxmesh.wire.messages.training import CloseTraining
from fluxmesh_agent.lifecycle import OWN, KillEngine, Lifecycle, Send, StartEngine
from fluxmesh_agent.upkeep import Upkeep, from_json, to_json

WEIGHTS = ModelVariant("tiny")
PARTS = ("transformer", "autoencoder", "text encoders")
KEEP = Keep(weights=WEIGHTS, shards=1, shard=0, components=PARTS)
SHARES = Shares(heads=(3, 1), columns=(128, 64))
WHOLE = Holding(weights=WEIGHTS, nbytes=100)


def shape(height: int, width: int = 32) -> StepShape:
    return StepShape.of(WEIGHTS, "data", 1, height, width)


def started(*components: str, holds: Holding | None = None, compiled: Any = ()) -> Lifecycle:
    """An engine that holds this."""
    life = Lifecycle()
    life.start()
    life.engine_said(
        Device(kind="chip", name="gpu", mlx_version="1", memory_bytes=100, flops_per_second=1e9)
    )
    life.engine_said(
        Account(
            is_over=False,
            holds=holds,
            counters=EngineCounters(),
            load_rate=0.0,
            components=components,
            compiled=compiled,
        )
    )
    return life


def due(upkeep: Upkeep, life: Lifecycle, now: float = 100.0, **more: Any) -> Load | Warm | None:
    return upkeep.due(life, leased=more.get("leased", False), now=now)


def load(*components: str, shards: int = 1, shard: int = 0, ring_generation: int = 0) -> Load:
    return Load(
        fence=0,
        job=OWN,
        ring_generation=ring_generation,
        weights=WEIGHTS,
        shards=shards,
        shard=shard,
        components=components,
    )


def test_an_engine_that_holds_nothing_loads_all_that_it_is_to_hold() -> None:
    assert due(Upkeep(KEEP), started()) == load(*PARTS)
    assert due(Upkeep(KEEP), Lifecycle()) == load(*PARTS)  # no engine runs
    assert due(Upkeep(), started()) is None
    assert due(Upkeep(Keep(weights=None)), started()) is None


def test_of_what_it_holds_only_the_rest_is_loaded() -> None:
    life = started("transformer", holds=WHOLE)
    assert due(Upkeep(KEEP), life) == load("autoencoder", "text encoders")
    assert due(Upkeep(KEEP), started(*PARTS, holds=WHOLE)) is None


def test_a_shard_is_loaded_where_the_mesh_holds_shards_and_whole_weights_serve_as_well() -> None:
    keep = Keep(weights=WEIGHTS, shards=4, shard=2, components=PARTS)
    assert due(Upkeep(keep), started()) == load(*PARTS, shards=4, shard=2)
    part = Holding(weights=WEIGHTS, nbytes=50, shards=4, shard=2)
    assert due(Upkeep(keep), started(*PARTS, holds=part)) is None
    assert due(Upkeep(keep), started(*PARTS, holds=WHOLE)) is None
    missing = started("transformer", "autoencoder", holds=WHOLE)
    assert due(Upkeep(keep), missing) == load("text encoders")  # and the rest stays whole


def test_weights_that_somebody_chose_meanwhile_stay() -> None:
    other = Holding(weights=ModelVariant("dev"), nbytes=100)
    assert due(Upkeep(KEEP), started("transformer", holds=other)) is None
    shard = Holding(
        weights=WEIGHTS, nbytes=50, shards=4, shard=1
    )  # left by a job with --placement tensor
    assert due(Upkeep(KEEP), started("transformer", holds=shard)) is None


def test_a_host_that_was_used_a_moment_ago_is_left_alone() -> None:
    upkeep = Upkeep(KEEP)
    upkeep.used(100.0)
    assert due(upkeep, started(), 100.0 + DEADLINES.idle - 0.1) is None
    assert due(upkeep, started(), 100.0 + DEADLINES.idle) is not None


def test_an_engine_that_works_is_left_alone_and_for_a_moment_afterwards() -> None:
    upkeep, life = Upkeep(KEEP), started()
    life.work(Load(fence=1, job="job", ring_generation=0, weights=ModelVariant("dev")))
    assert due(upkeep, life, 100.0) is None
    life.engine_said(Account(is_over=True, holds=None, counters=EngineCounters(), load_rate=0.0))
    assert due(upkeep, life, 100.5) is None
    assert due(upkeep, life, 100.0 + DEADLINES.idle) is not None


def test_what_is_under_way_is_not_begun_again() -> None:
    upkeep, life = Upkeep(KEEP), started()
    work = due(upkeep, life)
    assert work is not None
    life.upkeep(work)
    assert due(upkeep, life, 200.0) is None


def test_a_host_that_a_job_left_out_loads_while_the_job_goes_on_without_it() -> None:
    upkeep, life = Upkeep(KEEP), started()
    life.lease()
    life.work(Load(fence=1, job="job", ring_generation=0, weights=WEIGHTS))
    life.kill(Kill(fence=1, ring_generation=5))
    upkeep.used(100.0)
    assert due(upkeep, life, 100.0 + DEADLINES.left_out - 0.1, leased=True) is None
    work = due(upkeep, life, 100.0 + DEADLINES.left_out, leased=True)
    assert work == load(
        "transformer", "autoencoder", ring_generation=5
    )  # encoders may have no room now


def leased_lives() -> dict[str, Lifecycle]:
    new, other, trains, alive = started(), started(), started(), started()
    new.work(Load(fence=1, job="before", ring_generation=0, weights=WEIGHTS))
    new.kill(Kill(fence=1, ring_generation=5))
    new.lease()  # a job that has asked for nothing yet
    other.work(Load(fence=1, job="job", ring_generation=0, weights=ModelVariant("dev")))
    other.kill(Kill(fence=1, ring_generation=5))
    trains.work(CloseTraining(fence=1, job="job", ring_generation=0))
    trains.kill(Kill(fence=1, ring_generation=5))
    alive.work(Load(fence=1, job="job", ring_generation=0, weights=WEIGHTS))
    alive.engine_said(
        Account(is_over=True, holds=None, counters=EngineCounters(), load_rate=0.0)
    )  # with low memory, it holds nothing
    return {"new": new, "other weights": other, "training": trains, "engine lives": alive}


@pytest.mark.parametrize("name", leased_lives())
def test_nothing_is_loaded_beside_a_job_whose_memory_it_might_need(name: str) -> None:
    life = leased_lives()[name]
    assert due(Upkeep(KEEP), life, leased=True) is None
    assert due(Upkeep(KEEP), life) is not None


def in_ring(nonce: bytes = b"n" * 32, holds: Holding | None = WHOLE) -> Lifecycle:
    life = started(*PARTS, holds=holds)
    life.join(Join(fence=1, ring_generation=3, rank=0, size=2, nonce=nonce))
    life.engine_said(
        Account(
            is_over=True, holds=holds, counters=EngineCounters(), load_rate=0.0, components=PARTS
        )
    )
    return life


def test_an_engine_leaves_a_ring_that_a_loss_had_left_and_loads_all_again() -> None:
    upkeep, life = Upkeep(KEEP), in_ring()
    assert due(upkeep, life) is None and not upkeep.is_leaving(life)
    upkeep.leave(life.ring.name)
    assert due(upkeep, life) == load(*PARTS, ring_generation=3) and upkeep.is_leaving(life)
    assert life.renew(load(*PARTS, ring_generation=3)) == [
        KillEngine(),
        StartEngine(),
        Send(load(*PARTS, ring_generation=3)),
    ]
    assert (life.ring, life.holds) == (RingPlace(), None) and not upkeep.is_leaving(life)


def test_a_ring_that_another_job_formed_since_is_not_left() -> None:
    upkeep = Upkeep(KEEP)
    upkeep.leave(in_ring().ring.name)
    assert due(upkeep, in_ring(b"x" * 32)) is None
    other = in_ring(holds=Holding(weights=ModelVariant("dev"), nbytes=100))
    assert due(upkeep, other) is None and not upkeep.is_leaving(other)
    nowhere = started(*PARTS, holds=WHOLE)
    upkeep.leave("")
    assert due(upkeep, nowhere) is None


def test_what_fails_is_tried_again_later_and_ever_later() -> None:
    upkeep, life, now = Upkeep(KEEP), started(), 100.0
    pauses = []
    for _ in range(9):
        assert due(upkeep, life, now) is not None
        upkeep.failed(now)
        begun = now
        while due(upkeep, life, now) is None:
            now += 1.0
        pauses.append(now - begun)
    first, most = DEADLINES.load_again
    assert pauses[:3] == [first, 2 * first, 4 * first]
    assert pauses[-1] == most
    upkeep.worked()
    upkeep.failed(now)
    assert due(upkeep, life, now + DEADLINES.load_again[0]) is not None


def test_a_host_that_is_told_anew_what_to_hold_tries_at_once() -> None:
    upkeep, life = Upkeep(KEEP), started()
    due(upkeep, life)
    upkeep.failed(100.0)
    upkeep.want(KEEP)  # the same as before: nothing has changed
    assert due(upkeep, life, 101.0) is None
    upkeep.want(Keep(weights=ModelVariant("dev"), shards=1, shard=0, components=PARTS))
    assert due(upkeep, life, 101.0) is not None


def test_the_size_asked_for_last_is_made_ready_first_and_each_once() -> None:
    upkeep = Upkeep(KEEP)
    for side in (64, 128, 64):
        upkeep.note(NoteSize(WEIGHTS, side, 32))
    way = shape(64)
    assert due(upkeep, started(*PARTS, holds=WHOLE)) == Warm(
        fence=0, job=OWN, ring_generation=0, weights=WEIGHTS, height=64, width=32
    )
    second = due(upkeep, started(*PARTS, holds=WHOLE, compiled=(way,)))
    assert second == Warm(
        fence=0, job=OWN, ring_generation=0, weights=WEIGHTS, height=128, width=32
    )
    both = (way, shape(128))
    assert due(upkeep, started(*PARTS, holds=WHOLE, compiled=both)) is None


def test_sizes_wait_for_the_weights_and_for_the_end_of_every_lease() -> None:
    upkeep = Upkeep(KEEP)
    upkeep.note(NoteSize(WEIGHTS, 64, 64))
    assert isinstance(due(upkeep, started()), Load)
    assert due(upkeep, started(*PARTS, holds=WHOLE), leased=True) is None
    other = Holding(weights=ModelVariant("dev"), nbytes=100)
    assert due(upkeep, started(*PARTS, holds=other)) is None
    upkeep.want(Keep(weights=WEIGHTS, shards=2, shard=0, components=("transformer",)))
    part = Holding(
        weights=WEIGHTS, nbytes=50, shards=2, shard=0
    )  # no picture is made alone with it
    assert due(upkeep, started("transformer", holds=part)) is None


def test_only_the_latest_sizes_are_remembered() -> None:
    upkeep = Upkeep()
    for side in range(16, 16 * 20, 16):
        upkeep.note(NoteSize(WEIGHTS, side, 16))
    made: list[StepShape] = []
    while isinstance(work := due(upkeep, started(holds=WHOLE, compiled=tuple(made))), Warm):
        made.append(shape(work.height, 16))
    assert [way.height for way in made] == [304, 288, 272, 256, 240, 224, 208, 192]


def test_a_size_that_fails_is_forgotten() -> None:
    upkeep = Upkeep()
    for side in (64, 128):
        upkeep.note(NoteSize(WEIGHTS, side, 64))
    life = started(holds=WHOLE)
    assert due(upkeep, life) == Warm(
        fence=0, job=OWN, ring_generation=0, weights=WEIGHTS, height=128, width=64
    )
    upkeep.failed(100.0)
    assert due(upkeep, life) == Warm(
        fence=0, job=OWN, ring_generation=0, weights=WEIGHTS, height=64, width=64
    )


def test_what_to_hold_outlives_the_agent() -> None:
    adapted = ModelVariant("dev", "bfloat16", 4, (AdapterRef("a" * 64, 0.5),), True)
    for keep in (
        KEEP,
        Keep(weights=None),
        Keep(weights=adapted, shards=4, shard=3, components=("transformer",)),
        Keep(weights=adapted, shards=2, shard=1, components=PARTS, shares=SHARES),
    ):
        assert from_json(to_json(keep)) == keep


def test_a_share_comes_back_as_it_was_and_another_one_stays() -> None:
    """A job may have dealt anew what the mesh was brought up with: nothing is loaded twice."""
    keep = Keep(weights=WEIGHTS, shards=2, shard=1, components=PARTS, shares=SHARES)
    own = due(Upkeep(keep), started())
    assert isinstance(own, Load) and (own.shards, own.shard, own.shares) == (2, 1, SHARES)
    mine = Holding(weights=WEIGHTS, nbytes=100, shards=2, shard=1, shares=SHARES)
    more = due(Upkeep(keep), started("transformer", holds=mine))
    assert isinstance(more, Load) and more.shares == SHARES
    assert more.components == ("autoencoder", "text encoders")
    other = Holding(weights=WEIGHTS, nbytes=100, shards=2, shard=1)
    assert due(Upkeep(keep), started("transformer", holds=other)) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weights": 3}', '{"weights": {"model": "x"}}'])
def test_a_file_that_is_damaged_is_told_apart(text: str) -> None:
    with pytest.raises(FluxmeshError, match="does not say what this host is to hold"):
        from_json(text)

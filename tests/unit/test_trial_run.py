"""What `up` makes trial pictures of, and what comes of it on agents whose engines only pretend."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fluxmesh.cluster.snapshot import MeshView
from fluxmesh.planning.plan import Plan, plan
from fluxmesh.planning.workload import Workload
from fluxmesh.storage.homes import Home
from fluxmesh.wire import messages
from fluxmesh_coordinator.deploy import trial_run
from fluxmesh_coordinator.deploy import warmup as warm
from fluxmesh_coordinator.deploy.shard_layout import ShardLayout
from fluxmesh_coordinator.deploy.trial_run import Programme, Way, keeps, programme
from fluxmesh_coordinator.deploy.warmup import Warming
from tests.fakes import FakeEngine, FakeMesh
from tests.unit.meshes import FLUX, ask, full, held, mac, ring, small, warm_text
from tests.unit.test_warming import Told

SMALL, LARGE = (512, 512), (1024, 1024)


def work(**keys: object) -> Workload:
    return Workload.of(ask(**{"height": 512, "width": 512, **keys}), FLUX)


def tried(view: MeshView, *sizes: tuple[int, int], shards: int = 1) -> Programme:
    return programme(work(), view, sizes or (SMALL,), view.ranks, shards)


def test_both_what_one_picture_takes_and_what_one_a_host_takes_is_tried() -> None:
    trial = tried(full(*map(mac, range(4)), rate=100e9))
    assert trial.ways == (
        Way(SMALL, "data", (0, 1, 2, 3)),
        Way(SMALL, "sequence", (0, 1, 2, 3)),
    )
    assert (trial.ring, trial.reader, trial.left_out) == ((0, 1, 2, 3), 0, ())


def test_where_links_are_slow_no_ring_is_formed() -> None:
    trial = tried(full(*map(mac, range(4)), rate=1e8))
    assert trial.ways == (Way(SMALL, "data", (0, 1, 2, 3)),)
    assert trial.ring == ()


def test_hosts_that_hold_shards_are_tried_as_the_ring_that_they_must_be() -> None:
    hosts = [
        mac(
            rank,
            memory_bytes=20 * 10**9,
            free_bytes=4 * 10**9,
            holds=held(4, rank),
            text=warm_text("", nbytes=0),
        )
        for rank in range(4)
    ]
    trial = tried(full(*hosts), shards=4)
    assert {(way.placement, way.ranks) for way in trial.ways} == {("tensor", (0, 1, 2, 3))}


def test_a_ring_of_other_members_is_told_and_left_out_for_an_engine_is_in_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The ring of the first size stays."""

    def chosen(work: Workload, view: MeshView, size: tuple[int, int], images: int) -> Plan:
        hosts = 2 if size == SMALL else 4
        choice = plan(ask(height=size[0], width=size[1]), view, FLUX, placement="sequence")
        (way,) = (o for o in choice.options if o.name == "sequence" and len(o.ranks) == hosts)
        return replace(choice, winner=way, warm=way)

    monkeypatch.setattr(trial_run, "_plan", chosen)
    trial = tried(full(*map(mac, range(4))), SMALL, LARGE)
    assert trial.ways == (Way(SMALL, "sequence", (0, 1)),)
    assert trial.ring == (0, 1)
    assert trial.left_out == (Way(LARGE, "sequence", (0, 1, 2, 3)),)


def test_text_encoders_that_have_no_room_to_stay_are_not_loaded() -> None:
    tight = mac(0, memory_bytes=30 * 10**9, free_bytes=6 * 10**9)
    assert tried(ring(tight)).reader is None
    assert tried(ring(mac(0))).reader == 0


def test_every_host_is_told_what_it_shall_hold() -> None:
    parts = ("transformer", "autoencoder")
    weights = work().weights
    assert keeps(work(), (0, 2), 1, 2, (1,)) == {
        0: messages.Keep(weights=weights, shards=1, shard=0, components=parts),
        1: messages.Keep(weights=None),
        2: messages.Keep(weights=weights, shards=1, shard=0, components=(*parts, "text encoders")),
    }
    assert [keep.shard for keep in keeps(work(), (1, 3), 2, None).values()] == [0, 1]
    apart = keeps(work(), (0, 1), 2, 2)
    assert apart[2] == messages.Keep(
        weights=weights, shards=1, shard=0, components=("text encoders",)
    )


def play(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    ways: tuple[Way, ...],
    ring: tuple[int, ...] = (),
    times: int = 1,
    break_first: bool = False,
) -> tuple[Told, FakeMesh, list[messages.Status]]:
    """`up` on three agents, whose plans choose `ways`; with `break_first`, the first ring fails."""

    def chosen(*_: object, rings: bool) -> Programme:
        allowed = tuple(way for way in ways if rings or way.placement == "data")
        return Programme(allowed, ring if rings else (), 0, ())

    def broken(unit: messages.Work) -> Iterator[messages.Report]:
        if isinstance(unit, messages.Warm) and unit.placement != "data":
            yield messages.Failed(
                ring_generation=unit.ring_generation,
                job=unit.job,
                kind="Raised",
                text="A peer was lost.",
                fatal=True,
            )
        else:
            yield from FakeEngine.work(engine, unit)

    engine = FakeEngine()
    monkeypatch.setattr(trial_run, "programme", chosen)
    reporter = Told()

    async def scene() -> tuple[FakeMesh, list[messages.Status]]:
        async with FakeMesh(folder, 3) as mesh:
            while any(mesh.engine(rank).engine is None for rank in range(3)):
                await asyncio.sleep(0.01)
            if break_first:
                mesh.engine(1).engine.work = broken  # type: ignore[union-attr, method-assign]
            wanted = Workload.of(ask(height=32, width=32), small())
            dialer, record = mesh.network.dialer(), mesh.record
            try:
                for _ in range(times):
                    reporter.stages.clear()
                    up = Warming(record, wanted, reporter, Home(folder), sizes=((32, 32),))
                    record = await up.run_with(dialer)
            finally:
                await dialer.close()
            return mesh, [service.status() for service in mesh.services.values()]

    return reporter, *asyncio.run(scene())


TINY = Workload.of(ask(height=32, width=32), small()).weights
DATA = Way((32, 32), "data", (0, 1, 2))
PAIR = Way((32, 32), "sequence", (0, 2))


def test_a_mesh_that_is_up_has_made_a_picture_in_each_way_and_is_in_its_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter, _, statuses = play(tmp_path, monkeypatch, (DATA, PAIR), (0, 2))
    # Timing a step has made them ready by data; two of them ended for their ring, and are so again.
    assert reporter.ready == [
        ("data", (0, 1, 2), (32, 32)),
        ("data", (0, 1, 2), (32, 32)),
        ("sequence", (0, 2), (32, 32)),
    ]
    assert [set(status.compiled) for status in statuses] == [
        {DATA.shape(TINY), PAIR.shape(TINY)},
        {DATA.shape(TINY)},
        {DATA.shape(TINY), PAIR.shape(TINY)},
    ]
    assert ["text encoders" in status.components for status in statuses] == [True, False, False]
    # The ring of all, whose collectives were measured, is what two of them have left.
    assert [(s.ring_rank, s.ring_size) for s in statuses] == [(0, 2), (1, 3), (1, 2)]
    assert statuses[0].ring == statuses[2].ring
    kept = json.loads(Home(tmp_path).mesh.read_text())["timings"]["rings"]
    assert [(ring["backend"], ring["ranks"]) for ring in kept] == [
        ("ring", [0, 1, 2]),
        ("ring", [0, 2]),
    ]
    assert all(ring["gathers"] and ring["sums"] and ring["forming_seconds"] > 0 for ring in kept)
    assert [status.holder for status in statuses] == ["", "", ""]


def test_the_second_time_it_only_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, mesh, statuses = play(tmp_path, monkeypatch, (DATA, PAIR), (0, 2), times=2)
    assert len(reporter.ready) == 3 and reporter.stages == []
    assert [status.ring_generation for status in statuses] == [2, 1, 2]


def test_a_ring_that_fails_is_told_and_the_mesh_is_up_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = Way((32, 32), "sequence", (0, 1, 2))
    reporter, _, statuses = play(tmp_path, monkeypatch, (DATA, way), (0, 1, 2), break_first=True)
    (note,) = reporter.notes
    assert note.startswith("sequence at 32x32 on hosts 0, 1, 2 could not be made ready: host 1 ")
    assert "A peer was lost." in note
    assert [status.holds is not None for status in statuses] == [True, True, True]
    assert [status.ring for status in statuses] == ["", "", ""]
    assert [set(status.compiled) for status in statuses] == [{DATA.shape(TINY)}] * 3  # once more
    assert "text encoders" in statuses[0].components


def test_agents_know_what_to_hold_when_up_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        warm, "layout", lambda work, view: ShardLayout((0, 2), 1, (1,), "too small")
    )
    _, mesh, _ = play(tmp_path, monkeypatch, (Way((32, 32), "data", (0, 2)),))
    texts = [(tmp_path / f"agent-{rank}" / "keep.json").read_text() for rank in range(3)]
    assert ["text encoders" in text for text in texts] == [True, False, False]
    assert ["transformer" in text for text in texts] == [True, False, True]

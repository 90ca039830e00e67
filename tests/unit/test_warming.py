"""What `up` loads where: replicated if that fits, else sharded, else wherever it fits.

And what comes of it on agents whose engines only pretend.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fluxmesh.cluster.snapshot import MeshView, Timings
from fluxmesh.errors import DoesNotFitError, FluxmeshError, HostUnreachableError
from fluxmesh.planning.workload import Workload
from fluxmesh.storage.homes import Home
from fluxmesh.wire import messages
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.agents.mesh_file import MeshRecord
from fluxmesh_coordinator.deploy import leased_work
from fluxmesh_coordinator.deploy import warmup as warm
from fluxmesh_coordinator.deploy.leased_work import Errand
from fluxmesh_coordinator.deploy.link_rates import pairs
from fluxmesh_coordinator.deploy.shard_layout import ShardLayout, layout
from fluxmesh_coordinator.deploy.warmup import Warming
from tests.fakes import FakeEngine, FakeMesh
from tests.unit.meshes import FLUX, GB, ask, full, held, mac, small


def work(**keys: object) -> Workload:
    return Workload.of(ask(height=512, width=512, **keys), FLUX)


def mesh(*gigabytes: int, **keys: object) -> MeshView:
    hosts = [
        mac(rank, memory_bytes=size * GB, free_bytes=size * GB, holds=None, **keys)
        for rank, size in enumerate(gigabytes)
    ]
    return full(*hosts)


def test_weights_are_replicated_where_they_fit() -> None:
    held_by = layout(work(), mesh(64, 64, 64))
    assert (held_by.ranks, held_by.shards, held_by.idle) == ((0, 1, 2), 1, ())
    assert held_by.shard(2) == 0


def test_hosts_that_are_too_small_alone_hold_a_shard_each() -> None:
    held_by = layout(work(), mesh(16, 16, 64, 64))
    assert (held_by.ranks, held_by.shards, held_by.idle) == ((0, 1, 2, 3), 4, ())
    assert [held_by.shard(rank) for rank in held_by.ranks] == [0, 1, 2, 3]


def test_where_heads_do_not_divide_only_hosts_with_room_hold_weights() -> None:
    held_by = layout(work(), mesh(16, 64, 64, 64, 64))  # 24 heads over 5
    assert (held_by.ranks, held_by.shards, held_by.idle) == ((1, 2, 3, 4), 1, (0,))
    assert "host 0 needs" in held_by.why


def test_agents_of_one_machine_share_its_memory() -> None:
    held_by = layout(work(), mesh(64, 64, 64, 64, device="one"))
    assert held_by.shards == 4


def test_a_model_that_no_host_can_hold_is_refused() -> None:
    with pytest.raises(DoesNotFitError) as refused:
        layout(work(), mesh(10))
    assert str(refused.value) == (
        "m does not fit: host 0 needs 24.5 GB and may use 10.0 GB. "
        "It fits with `quantize` `bits` 4 (7.5 GB)."
    )
    with pytest.raises(DoesNotFitError, match=r"may use 4.0 GB. Use more hosts.$"):
        layout(work(), mesh(4))
    assert layout(work(bits=4), mesh(10)).shards == 1


def test_links_are_measured_in_rounds_in_which_each_host_sends_to_one_other() -> None:
    rounds = pairs([0, 2, 3])
    assert [pair for each in rounds for pair in each] == [
        (0, 2), (2, 3), (3, 0),
        (0, 3), (2, 0), (3, 2),
    ]  # fmt: skip
    assert pairs([0]) == []
    assert pairs([0, 1]) == [[(0, 1), (1, 0)]]


def test_in_a_large_mesh_only_neighbours_are_measured() -> None:
    rounds = pairs(range(20))
    assert {(b - a) % 20 for each in rounds for a, b in each} == {1, 19}


class Told:
    """A `Watcher` that remembers."""

    def __init__(self) -> None:
        self.left_out: dict[int, str] = {}
        self.notes: list[str] = []
        self.stages: list[str] = []
        self.ready: list[tuple[str, tuple[int, ...], tuple[int, int]]] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, rank: int, what: str, done: int, total: int) -> None: ...

    def warmed(
        self, placement: str, ranks: Sequence[int], size: tuple[int, int], seconds: float
    ) -> None:
        self.ready.append((placement, tuple(ranks), size))

    def may_pull(self, model: str, nbytes: int | None, free: Mapping[int, int]) -> bool:
        return False

    def may_end(self, names: Sequence[str]) -> bool:
        return False

    def failed(self, rank: int, text: str) -> None:
        self.left_out[rank] = text


@pytest.mark.parametrize("allowed", [True, False])
def test_a_host_that_cannot_load_is_named_and_the_others_go_on_where_allowed(
    tmp_path: Path, allowed: bool
) -> None:
    def broken(unit: messages.Work) -> Iterator[messages.Report]:
        if not isinstance(unit, messages.Load):
            yield from FakeEngine.work(engine, unit)
            return
        text = "transformer.safetensors is truncated."
        yield messages.Failed(
            ring_generation=unit.ring_generation,
            job=unit.job,
            kind="WeightsError",
            text=text,
            fatal=False,
        )

    engine = FakeEngine()

    async def scene() -> tuple[Told, list[bool], list[str]]:
        async with FakeMesh(tmp_path, 3) as mesh:
            while any(mesh.engine(rank).engine is None for rank in range(3)):
                await asyncio.sleep(0.01)
            mesh.engine(1).engine.work = broken  # type: ignore[union-attr, method-assign]
            wanted, reporter = Workload.of(ask(height=32, width=32), small()), Told()
            warming = Warming(mesh.record, wanted, reporter, Home(tmp_path), allow_partial=allowed)
            dialer = mesh.network.dialer()
            try:
                if allowed:
                    done = await warming.run_with(dialer)
                    assert replace(done, timings=Timings()) == mesh.record
                else:
                    with pytest.raises(FluxmeshError, match="truncated.*`allow_partial` goes on"):
                        await warming.run_with(dialer)
            finally:
                await dialer.close()
            lives = [service.lifecycle for service in mesh.services.values()]
            holders = [service.leases.holder for service in mesh.services.values()]
            return reporter, [life.holds is not None for life in lives], holders

    reporter, holds, holders = asyncio.run(scene())
    if allowed:
        assert list(reporter.left_out) == [1] and "is truncated" in reporter.left_out[1]
        assert holds == [True, False, True]
        assert holders == ["", "", ""]
    else:
        assert reporter.left_out == {}


def test_hosts_hear_of_their_leases_while_another_process_writes_the_record(
    tmp_path: Path,
) -> None:
    """Blocked for as long as that, the loop would lose them after `Deadlines.silence`."""

    async def scene() -> None:
        wanted = Workload.of(ask(height=32, width=32), small())
        record = FakeMesh(tmp_path, 2).record
        warming = Warming(record, wanted, Told(), Home(tmp_path))
        renewed = replace(record, envs=(("OMP_NUM_THREADS", "1"),))
        with open(tmp_path / "mesh.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            writing = asyncio.create_task(warming._save(renewed))
            for _ in range(10):  # would never come so far, blocked
                await asyncio.sleep(0.02)
            assert not writing.done() and mesh_file.load(Home(tmp_path)) is None
            writing.cancel()
            await asyncio.sleep(0.1)
            assert not writing.done()  # what is written next must come after it
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert mesh_file.load(Home(tmp_path)) == renewed

    tmp_path.chmod(0o700)
    asyncio.run(scene())


@pytest.mark.parametrize("is_here", [True, False])
def test_weights_whose_files_have_changed_since_are_loaded_anew_or_refused(
    tmp_path: Path, is_here: bool
) -> None:
    """Host 1 read older files; `is_here` where it has the new ones on disk by now."""

    async def scene() -> tuple[list[str], list[int]]:
        async with FakeMesh(tmp_path, 2) as mesh:
            mesh.engine(1).content = "older"
            while any(mesh.engine(rank).engine is None for rank in range(2)):
                await asyncio.sleep(0.01)
            mesh.engine(1).engine.content = "older"  # type: ignore[union-attr]
            wanted = Workload.of(ask(height=32, width=32), small())
            dialer = mesh.network.dialer()
            try:
                up = await Warming(mesh.record, wanted, Told(), Home(tmp_path)).run_with(dialer)
                mesh.engine(1).content = "same" if is_here else "older"
                again = Warming(up, wanted, Told(), Home(tmp_path), content="same")
                if is_here:
                    await again.run_with(dialer)
                else:
                    with pytest.raises(FluxmeshError, match="host 1 .*has other files .*pull"):
                        await again.run_with(dialer)
            finally:
                await dialer.close()
            lives = [service.lifecycle for service in mesh.services.values()]
            contents = [life.holds.content for life in lives if life.holds is not None]
            return contents, [mesh.engine(rank).starts for rank in range(2)]

    held, starts = asyncio.run(scene())
    assert held == ["same", "same" if is_here else "older"]
    assert starts == [1, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_hosts_that_hold_shards_time_a_step_together_or_are_ready_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    def broken(unit: messages.Work) -> Iterator[messages.Report]:
        if isinstance(unit, messages.Measure):
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
    monkeypatch.setattr(warm, "layout", lambda work, view: ShardLayout((0, 1), 2))

    async def scene() -> tuple[list[str], list[messages.Status]]:
        async with FakeMesh(tmp_path, 2) as mesh:
            while any(mesh.engine(rank).engine is None for rank in range(2)):
                await asyncio.sleep(0.01)
            if fails:
                mesh.engine(1).engine.work = broken  # type: ignore[union-attr, method-assign]
            wanted, reporter = Workload.of(ask(height=32, width=32), small()), Told()
            dialer = mesh.network.dialer()
            try:
                up = await Warming(mesh.record, wanted, reporter, Home(tmp_path)).run_with(dialer)
                if not fails:  # again, it only looks
                    await Warming(up, wanted, reporter, Home(tmp_path)).run_with(dialer)
            finally:
                await dialer.close()
            return reporter.notes, [service.status() for service in mesh.services.values()]

    notes, statuses = asyncio.run(scene())
    held = [status.holds for status in statuses]
    shards = [(holding.shard, holding.shards) for holding in held if holding is not None]
    assert shards == [(0, 2), (1, 2)]
    assert [status.holder for status in statuses] == ["", ""]
    if fails:
        (note,) = notes
        assert "could not be timed: host 1 " in note and "A peer was lost." in note
        assert [status.ring for status in statuses] == ["", ""]
    else:
        assert notes == []
        assert [status.ring_rank for status in statuses] == [0, 1]
        assert len({status.ring for status in statuses}) == 1 and statuses[0].ring
        assert {status.ring_generation for status in statuses} == {1}
        (timed, also) = (measured for status in statuses for measured in status.measured)
        assert (timed.placement, timed.hosts) == (also.placement, also.hosts) == ("tensor", 2)


@pytest.mark.parametrize("fails", ["", "for good", "and lives on"])
def test_up_has_the_engines_time_their_ring_once_and_goes_on_where_they_cannot(
    tmp_path: Path, fails: str
) -> None:
    def broken(unit: messages.Work) -> Iterator[messages.Report]:
        if isinstance(unit, messages.MeasureRing):
            is_gone = fails == "for good"
            yield messages.Failed(
                ring_generation=unit.ring_generation,
                job=unit.job,
                kind="Raised",
                text="A peer was lost.",
                fatal=is_gone,
            )
        else:
            yield from FakeEngine.work(engine, unit)

    engine = FakeEngine()

    async def scene() -> tuple[Told, list[MeshRecord], list[messages.Status]]:
        async with FakeMesh(tmp_path, 3) as mesh:
            while any(mesh.engine(rank).engine is None for rank in range(3)):
                await asyncio.sleep(0.01)
            for rank in range(3):
                mesh.engine(rank).engine.collective_rate = 5e9  # type: ignore[union-attr]
            if fails:
                mesh.engine(1).engine.work = broken  # type: ignore[union-attr, method-assign]
            wanted, reporter = Workload.of(ask(height=32, width=32), small()), Told()
            dialer = mesh.network.dialer()
            try:
                up = await Warming(mesh.record, wanted, reporter, Home(tmp_path)).run_with(dialer)
                again = up
                if not fails:
                    again = await Warming(up, wanted, reporter, Home(tmp_path)).run_with(dialer)
            finally:
                await dialer.close()
            return reporter, [up, again], [service.status() for service in mesh.services.values()]

    reporter, (up, again), statuses = asyncio.run(scene())
    assert all(status.holds is not None and status.holder == "" for status in statuses)
    if fails:
        (note,) = reporter.notes
        assert "ring could not be measured: host 1 " in note and "A peer was lost." in note
        assert up.timings == Timings()
        return
    assert reporter.notes == []
    (timing,) = up.timings.rings
    assert (timing.backend, timing.ranks) == ("ring", (0, 1, 2))
    assert timing.gathers[-1].seconds == pytest.approx(timing.gathers[-1].nbytes / 5e9)
    assert timing.forming_seconds > 0 and timing.when > 1.7e9
    assert again.timings == up.timings
    kept = json.loads(Home(tmp_path).mesh.read_text())["timings"]
    assert kept["rings"][0]["ranks"] == [0, 1, 2]
    assert [status.ring_rank for status in statuses] == [0, 1, 2]
    assert {status.ring_generation for status in statuses} == {1}


def test_an_errand_hears_nothing_of_an_engine_that_was_ended() -> None:
    class WarmingAgent:
        title = "host 0"

        def __init__(self) -> None:
            left_over = messages.RingTimed(
                job="up", ring_generation=1, gathers=(), sums=(), hidden=0.5
            )
            self.reports = [
                left_over,
                messages.Failed(
                    ring_generation=1, job="", kind="Died", text="It was killed.", fatal=True
                ),
            ]

        async def ask(self, request: messages.Message, answer: type[messages.Message]) -> None:
            if isinstance(request, messages.Load):
                loaded = messages.Loaded(
                    job=request.job,
                    ring_generation=request.ring_generation,
                    holding=held(),
                    seconds=0.1,
                )
                self.reports.append(loaded)

        async def report(self) -> messages.Report:
            return self.reports.pop(0)

    async def scene() -> list[messages.Report]:
        granted = messages.Granted(7, 1, None)  # type: ignore[arg-type]
        errand = Errand(WarmingAgent(), granted, work())  # type: ignore[arg-type]
        await errand.begin_anew()
        return [
            report
            async for report in errand.do(
                messages.Load(**errand.common, weights=errand.weights), 1.0
            )
        ]

    (report,) = asyncio.run(scene())
    assert isinstance(report, messages.Loaded) and report.ring_generation == 2


def test_an_engine_that_ticks_and_never_ends_its_unit_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As all ranks of a ring do while one of them stands still."""
    now = [0.0]

    class TickingAgent:
        title = "host 0"

        async def ask(self, request: messages.Message, answer: type[messages.Message]) -> None:
            pass

        async def report(self) -> messages.Message:
            now[0] += 1.0
            return messages.Beat(job="up", ring_generation=1, doing="measuring")

    async def scene() -> None:
        granted = messages.Granted(1, 1, None)  # type: ignore[arg-type]
        errand = Errand(TickingAgent(), granted, work())  # type: ignore[arg-type]
        unit = messages.MeasureRing(**errand.common)
        async for _ in errand.do(unit, 60.0):
            assert now[0] <= unit.budget + 1.0

    monkeypatch.setattr(leased_work.time, "monotonic", lambda: now[0])
    with pytest.raises(HostUnreachableError, match="measuring its ring took more than 60 s"):
        asyncio.run(scene())


def test_up_tells_once_for_each_place_in_line() -> None:
    notes: list[str] = []
    waiting = leased_work.PlaceInLine(notes.append, 1)
    for place in (2, 2, 1, 1, 1):
        waiting(messages.LeaseQueued(place=place, seconds=5.0))
    assert notes == [
        "Host 1 is busy; this `up` is number 2 in line.",
        "Host 1 is busy; this `up` is number 1 in line.",
    ]

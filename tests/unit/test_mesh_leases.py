"""When a job on a whole mesh in one process gives hosts back, and who waits for them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluxmesh import events
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import CancelledError
from fluxmesh.planning.text_place import TextPlace, TextPlaces
from fluxmesh.wire.messages import Done, LeaveQueue
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.jobs.generation.session import GenerationSession
from fluxmesh_coordinator.runtime.agent_pool import AgentPool
from fluxmesh_coordinator.runtime.job_runner import JobRunner
from tests.fakes import FakeMesh
from tests.unit.mesh_jobs import Heard, check, job, play


@pytest.mark.parametrize("placement", ["data", "tensor"])
def test_a_cancelled_job_leaves_the_mesh_idle_and_warm(tmp_path: Path, placement: Any) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        asked = job("one", n_images=2, steps=100, placement=placement)
        heard = Heard(events.Step, lambda: runner.stop.set())
        runner = JobRunner(pool, GenerationSession(asked), {}, heard)
        with pytest.raises(CancelledError):
            await runner.run()
        assert len(heard.of(events.Step)) < 50
        assert all(service.lifecycle.is_free for service in mesh.services.values())
        assert [mesh.engine(rank).starts for rank in range(2)] == [1, 1]
        again, heard = job("two", placement=placement), Heard()
        await JobRunner(pool, GenerationSession(again), {}, heard).run()
        check(heard, again)

    play(tmp_path, 2, body)


def test_who_waits_in_line_can_leave_it(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        async with AgentPool(mesh.record, mesh.network.dialer("other")) as other:
            asked, heard = job("one", n_images=3, steps=20), Heard()
            session = GenerationSession(asked)
            first = asyncio.create_task(JobRunner(pool, session, {}, heard).run())
            while not heard.of(events.Step):
                await asyncio.sleep(0.01)
            waiting = Heard(events.Queued, lambda: second.stop.set())
            second = JobRunner(other, GenerationSession(job("two")), {}, waiting)
            with pytest.raises(CancelledError):
                await second.run()
            assert mesh.services[0].leases.waiting == 0
            await first
            check(heard, asked)

    play(tmp_path, 1, body)


def test_a_place_in_line_is_told_once_however_often_the_agent_repeats_it(tmp_path: Path) -> None:
    """The agent says it every two seconds, as a sign of life; a program would read it as news."""

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        asked = [AgentClient(mesh.network.dialer(name), mesh.record.members[0]) for name in "ab"]
        for client in asked:
            await client.__aenter__()
        await asked[0].lease("first", 1.0, lambda _: None)
        second = asyncio.create_task(asked[1].lease("second", 1.0, lambda _: None))
        while not mesh.services[0].leases.waiting:
            await asyncio.sleep(0.01)
        heard, repeated = Heard(), list[int]()
        runner = JobRunner(pool, GenerationSession(job()), {}, heard)
        teller = runner._teller

        def counting(rank: int) -> Any:
            tell = teller(rank)
            return lambda queued: (repeated.append(queued.place), tell(queued))

        runner._teller = counting  # type: ignore[method-assign]
        running = asyncio.create_task(runner.run())
        for place in (2, 1):
            while repeated.count(place) < 3:
                await asyncio.sleep(0.01)
            await asked[2 - place].ask(LeaveQueue(), Done)
            if place == 2:
                await second
        await running
        assert [(event.place, event.host) for event in heard.of(events.Queued)] == [(2, 0), (1, 0)]
        for client in asked:
            await client.close()

    play(tmp_path, 1, body, agents=replace(DEADLINES, tell_place=0.05))


def test_a_host_that_a_job_uses_no_more_is_free_for_others(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        session = GenerationSession(job(n_images=40, steps=500, placement="data"))
        runner = JobRunner(pool, session, {}, Heard())
        running = asyncio.create_task(runner.run())
        while session.given_up([1]) is None:
            if 1 in runner._leased:
                runner._gone(1, runner._leased[1], "The cable was pulled.")
            await asyncio.sleep(0.01)
        while 1 not in pool.clients:
            await pool.change(1.0)
        await asyncio.sleep(1.5)
        assert not running.done() and mesh.services[0].leases.holder
        assert mesh.services[1].leases.holder == ""
        runner.stop.set()
        with pytest.raises(CancelledError):
            await running

    play(tmp_path, 2, body)


def test_a_host_whose_engine_failed_too_often_is_free_for_others(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        session = GenerationSession(job(n_images=40, steps=500, placement="data"))
        runner = JobRunner(pool, session, {}, Heard())
        running = asyncio.create_task(runner.run())
        while session.given_up([1]) is None:
            if mesh.engine(1).made:
                mesh.engine(1).die()
            await asyncio.sleep(0.01)
        while mesh.services[1].leases.holder:
            await asyncio.sleep(0.05)
        assert not running.done() and mesh.services[0].leases.holder
        runner.stop.set()
        with pytest.raises(CancelledError):
            await running

    play(tmp_path, 2, body)


def test_a_host_that_has_read_the_prompt_and_paints_nothing_is_free_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not leased again, for as long as the job can go on without it."""

    def apart(_places: TextPlaces, *_how: Any, **_more: Any) -> TextPlace:
        return TextPlace(rank=1, way="stays", nbytes=0, makes_room=False)

    monkeypatch.setattr(TextPlaces, "best", apart)

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        runner = JobRunner(
            pool, GenerationSession(job(n_images=1, steps=1000, placement="data")), {}, Heard()
        )
        mesh.engine(0).pause = 0.02
        running = asyncio.create_task(runner.run())
        while not mesh.engine(0).made:
            await asyncio.sleep(0.01)
        while mesh.services[1].leases.holder:
            await asyncio.sleep(0.05)
        reader = mesh.engine(1).engine
        assert reader is not None and reader.counters.encodes == 1 and not reader.steps
        await asyncio.sleep(1.5)
        assert not running.done() and mesh.services[0].leases.holder
        assert mesh.services[1].leases.holder == ""
        runner.stop.set()
        with pytest.raises(CancelledError):
            await running

    play(tmp_path, 2, body)


def test_a_conversation_that_ends_gives_its_lease_back_at_once(tmp_path: Path) -> None:
    """An `up` that is cancelled, say, between two of its own lines."""

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        dialer = mesh.network.dialer("other")
        async with AgentClient(dialer, mesh.record.members[0]) as client:
            await client.lease("up-1", 60.0, lambda queued: None)
            assert mesh.services[0].leases.job == "up-1"
        while mesh.services[0].leases.job:  # the agent reads it
            await asyncio.sleep(0.005)
        await dialer.close()

    # An agent that had not heard of it would wait that long for another connection.
    play(tmp_path, 1, body, agents=replace(DEADLINES, left=600.0, silence=600.0))


def test_a_second_user_gets_the_host_that_is_free(tmp_path: Path) -> None:
    """Also where both have seen it free, and one comes first."""

    async def body(mesh: FakeMesh, pool: AgentPool) -> None:
        async with AgentPool(mesh.record, mesh.network.dialer("other")) as other:
            asked = [job(name, steps=40, placement="data") for name in ("one", "two")]
            heard = [Heard(), Heard()]
            runners = [
                JobRunner(each, GenerationSession(begun), {}, tell)
                for each, begun, tell in zip((pool, other), asked, heard, strict=True)
            ]
            await asyncio.gather(*(runner.run() for runner in runners))
            plans = [tell.of(events.Planned)[0] for tell in heard]
            assert sorted(each.hosts for each in plans) == [(0,), (1,)]
            for tell, begun in zip(heard, asked, strict=True):
                check(tell, begun)
                assert not tell.of(events.Queued), "nobody waits"

    play(tmp_path, 2, body)

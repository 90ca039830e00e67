"""An agent between its coordinators and its engine: real but for the engine, without sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.errors import FluxmeshError
from fluxmesh.wire import messages
from fluxmesh_agent.leases import Loses
from fluxmesh_agent.supervisor import EngineStays
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.runtime.agent_pool import AgentPool
from tests.fakes import FakeMesh, FakeSupervisor

WEIGHTS = ModelVariant("tiny")


def play(
    folder: Path, body: Callable[[FakeMesh], Awaitable[None]], deadlines: Deadlines = DEADLINES
) -> None:
    """Runs `body` with one agent."""

    async def run() -> None:
        async with FakeMesh(folder, 1, deadlines) as mesh:
            await asyncio.wait_for(body(mesh), 60)

    asyncio.run(run())


async def leased(mesh: FakeMesh, name: str) -> tuple[AgentClient, messages.Load]:
    """A coordinator that holds the host, and something to load."""
    client = AgentClient(mesh.network.dialer(name), mesh.record.members[0])
    await client.__aenter__()
    granted = await client.lease(name, 1.0, lambda _: None)
    return client, messages.Load(
        fence=granted.fence, job=name, ring_generation=granted.ring_generation, weights=WEIGHTS
    )


def failed(load: messages.Load) -> messages.Failed:
    return messages.Failed(
        ring_generation=load.ring_generation,
        job=load.job,
        kind="Raised",
        text="The engine failed.",
        fatal=True,
    )


def test_an_abandoned_engine_that_failed_does_not_cost_the_next_holder_his(
    tmp_path: Path,
) -> None:
    async def body(mesh: FakeMesh) -> None:
        first, load = await leased(mesh, "first")
        mesh.engine(0).stop()
        await first.ask(load, messages.Done)
        await first.ask(messages.LeaveQueue(), messages.Done)
        mesh.services[0]._engine_said(failed(load))
        second, load = await leased(mesh, "second")
        mesh.engine(0).pause = 1.5  # a report: it is at work when the first one's time is up
        await second.ask(load, messages.Done)
        while not isinstance(report := await second.report(), messages.Loaded):
            assert not isinstance(report, messages.Failed)
        assert mesh.engine(0).starts == 2
        await first.close()
        await second.close()

    play(tmp_path, body, replace(DEADLINES, letting_go=1.0))


def test_work_that_comes_while_an_engine_ends_finds_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: FakeSupervisor, envs: tuple[tuple[str, str], ...] = ()) -> None:
        assert self.engine is None, "as the real one does"
        begin(self, envs)

    begin = FakeSupervisor.start
    monkeypatch.setattr(FakeSupervisor, "start", start)

    async def body(mesh: FakeMesh) -> None:
        client, load = await leased(mesh, "job")
        service = mesh.services[0]
        service._engine_said(failed(load))
        assert isinstance(await service._change(load), messages.Done)  # before the old one is gone
        while not isinstance(await client.report(), messages.Loaded):
            continue
        assert mesh.engine(0).starts == 2
        await client.close()

    play(tmp_path, body)


def test_a_host_whose_engine_does_not_end_says_so_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stays(self: FakeSupervisor) -> None:
        raise EngineStays("The engine does not end.")

    async def gone(self: FakeSupervisor) -> None:
        await is_gone.wait()

    is_gone = asyncio.Event()

    async def body(mesh: FakeMesh) -> None:
        client, load = await leased(mesh, "job")
        await client.ask(load, messages.Done)
        while not isinstance(await client.report(), messages.Loaded):
            continue
        service, generation = mesh.services[0], load.ring_generation + 1
        ends = FakeSupervisor.kill
        monkeypatch.setattr(FakeSupervisor, "kill", stays)
        monkeypatch.setattr(FakeSupervisor, "gone", gone)
        kill = messages.Kill(fence=load.fence, ring_generation=generation)
        again = replace(load, ring_generation=generation)
        for order in (kill, again):
            with pytest.raises(FluxmeshError, match=r"The engine does not end\."):
                await client.ask(order, messages.Done)
            status = service.status()
            assert (status.state, status.reason) == ("failed", "The engine does not end.")
        assert mesh.engine(0).starts == 1
        monkeypatch.setattr(FakeSupervisor, "kill", ends)
        is_gone.set()
        while service.status().reason:
            await asyncio.sleep(0.01)
        assert service.status().state == "idle"
        await client.ask(again, messages.Done)
        while not isinstance(await client.report(), messages.Loaded):
            continue
        assert mesh.engine(0).starts == 2
        await client.close()

    play(tmp_path, body)


def test_an_agent_serves_beside_an_engine_that_one_before_it_left_and_that_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stays(self: FakeSupervisor) -> None:
        raise EngineStays("The engine does not end.")

    async def gone(self: FakeSupervisor) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(FakeSupervisor, "kill", stays)
    monkeypatch.setattr(FakeSupervisor, "gone", gone)

    async def body(mesh: FakeMesh) -> None:
        client, _ = await leased(mesh, "job")
        status = await client.ask(messages.AskStatus(), messages.Status)
        assert (status.state, status.reason) == ("failed", "The engine does not end.")
        assert mesh.engine(0).starts == 0
        await client.close()

    play(tmp_path, body)


def test_a_conversation_that_breaks_takes_its_lease_with_it(tmp_path: Path) -> None:
    """Else it would be held for as long as the coordinator lives, which has forgotten it."""

    async def body(mesh: FakeMesh) -> None:
        async with AgentPool(mesh.record, mesh.network.dialer()) as pool:
            client = pool.clients[0]
            await client.lease("job", 1.0, lambda _: None)
            assert mesh.services[0].leases.holder
            pool.lost(0, client, "The cable was pulled.")
            while not pool.clients:
                await pool.change(1.0)
            assert mesh.services[0].leases.holder == ""

    play(tmp_path, body)


def test_a_host_names_the_job_that_holds_it_also_between_two_units_of_its_work(
    tmp_path: Path,
) -> None:
    async def body(mesh: FakeMesh) -> None:
        client, _ = await leased(mesh, "first")
        status = mesh.services[0].status()
        assert (status.state, status.job) == ("idle", "first")
        await client.ask(messages.LeaveQueue(), messages.Done)
        assert mesh.services[0].status().job == ""
        await client.close()

    play(tmp_path, body)


def test_what_was_told_of_an_earlier_lease_is_not_taken_for_the_next(tmp_path: Path) -> None:
    async def body(mesh: FakeMesh) -> None:
        first, _ = await leased(mesh, "first")
        second = AgentClient(mesh.network.dialer("second"), mesh.record.members[0])
        await second.__aenter__()
        await second.ask(messages.AskLease("old"), messages.Done)
        await first.ask(messages.LeaveQueue(), messages.Done)
        while not mesh.services[0].leases.holder.endswith(second._client):
            await asyncio.sleep(0.05)
        await second.ask(messages.LeaveQueue(), messages.Done)  # before it read that it was granted
        granted = await second.lease("new", 1.0, lambda _: None)
        answer = await second.ask(
            messages.HasFile(fence=granted.fence, sha256="0" * 64), messages.Found
        )
        assert not answer.there
        await first.close()
        await second.close()

    play(tmp_path, body)


def test_who_lost_the_place_in_line_gets_in_line_again(tmp_path: Path) -> None:
    """As a laptop does that slept for a while."""

    async def body(mesh: FakeMesh) -> None:
        first, _ = await leased(mesh, "first")
        second = AgentClient(mesh.network.dialer("second"), mesh.record.members[0])
        await second.__aenter__()
        waiting: list[messages.LeaseQueued] = []
        task = asyncio.create_task(second.lease("second", 1.0, waiting.append))
        while not waiting:
            await asyncio.sleep(0.05)
        service = mesh.services[0]
        (name,) = [asked.client for asked in service.leases._line]
        service.leases.leave(name)
        service._notify([Loses(name, "nothing was heard of it for 6 s")])
        await first.ask(messages.LeaveQueue(), messages.Done)
        assert (await task).fence
        await first.close()
        await second.close()

    play(tmp_path, body)


def test_the_log_has_a_line_for_who_changes_the_host_and_none_for_who_only_asks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`fluxmesh status --watch` asks every second, for days."""

    async def body(mesh: FakeMesh) -> None:
        caplog.clear()
        async with AgentClient(mesh.network.dialer("looks"), mesh.record.members[0]) as client:
            await client.ask(messages.AskStatus(), messages.Status)
            await client.ask(messages.AskLogs(10), messages.Logs)
        assert [line.getMessage() for line in caplog.records] == []
        client, _ = await leased(mesh, "first")
        assert [line.getMessage() for line in caplog.records] == ["first has the lease"]
        await client.close()

    with caplog.at_level("INFO"):
        play(tmp_path, body)
